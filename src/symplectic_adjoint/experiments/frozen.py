"""One problem, frozen: weights, rows and noise at which gradients of all tolerances are compared.

Untrained flows hardly move, and any solver follows them in a few steps. The weights are therefore
trained first, always by the same exact gradient in float64.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from symplectic_adjoint.datasets import Dataset
from symplectic_adjoint.experiments.config import DTYPES, CompareConfig
from symplectic_adjoint.experiments.measure import (
    Probe,
    distance,
    exact_gradient,
    gradient_of,
)
from symplectic_adjoint.experiments.sweep import Outcome
from symplectic_adjoint.experiments.train import (
    Session,
    batch_of,
    build_model,
    counts,
    noise_of,
    to_device,
)

_REFERENCE = 1e-13
"""Absolute tolerance of the reference; the relative one is ten times that."""


class Frozen:
    """A trained flow, some rows, and the gradient of the differential equation there.

    Args:
        config: How it is trained.
        data: The rows, prepared for the model.
    """

    def __init__(self, config: CompareConfig, data: Dataset) -> None:
        self.data = data
        session = Session(config, "symplectic", data)
        while not session.finished:
            session.step()
        batch = batch_of(to_device(data.train, config), config, 0)
        noise = noise_of(session.model, batch, config, 0)
        self.probe = Probe(session.model.state_dict(), batch, noise)
        self.nll = session.history.validation[-1][1]
        tight = replace(config, method="dopri8", max_steps=100_000)
        self.reference = self._gradient(replace(tight, rtol=10 * _REFERENCE, atol=_REFERENCE))
        looser = self._gradient(replace(tight, rtol=1e3 * _REFERENCE, atol=100 * _REFERENCE))
        self.uncertainty = distance(looser, self.reference)

    def measure(self, config: CompareConfig, strategy: str) -> Outcome:
        """One gradient under a strategy, at the tolerance and in the precision of ``config``.

        Raises:
            SolveError: The equation cannot be solved so.
        """
        model = build_model(config, strategy, self.data)
        model.load_state_dict(self.probe.state)
        dtype = DTYPES[config.dtype]
        batch, noise = self.probe.batch.to(dtype), self.probe.noise.to(dtype)
        gradient, flow = gradient_of(model, batch, noise)
        totals = counts(flow)
        exact = exact_gradient(model, batch, noise, flow)
        return Outcome(
            {
                "data": self.data.name,
                "nll": self.nll,
                "gradient_error": distance(gradient, exact),
                "ode_error": distance(gradient, self.reference),
                "uncertainty": self.uncertainty,
                **totals,
            }
        )

    def _gradient(self, config: CompareConfig) -> torch.Tensor:
        model = build_model(config, "symplectic", self.data)
        model.load_state_dict(self.probe.state)
        return gradient_of(model, self.probe.batch, self.probe.noise)[0]
