"""Output times cost nothing: they neither clip steps nor add evaluations."""

from __future__ import annotations

import pytest
import torch

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.steppers import ExplicitRK, ImplicitRK
from tests.conformance.registry import IMPLICIT, QUICK, pairs, strategies
from tests.problems import Net

STAGEWISE = [s for s in strategies(exact=True) if s.name in ("symplectic", "mali")]


def solved(method: str, gradient: Strategy, count: int) -> sa.Solution:
    net = Net(dim=2)
    y0 = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0.0, 2.0, count, dtype=torch.float64)
    adaptive = steppers.get(method).error_order is not None and method not in IMPLICIT
    controller = sa.Adaptive() if adaptive else sa.FixedGrid(step_size=0.125)
    sol = sa.solve(
        net, y0, t, method=method, controller=controller, gradient=gradient, rtol=1e-4, atol=1e-6
    )
    sol.y.square().sum().backward()
    return sol


@pytest.mark.parametrize(
    ("method", "gradient"),
    pairs(STAGEWISE, QUICK) + pairs([sa.Symplectic(), sa.Symplectic(store="steps")], IMPLICIT),
)
def test_a_thousand_outputs_leave_steps_and_evaluations_as_they_are(
    method: str, gradient: Strategy
) -> None:
    few, many = solved(method, gradient, 2), solved(method, gradient, 1000)
    assert torch.equal(few.steps, many.steps)
    # Extra stages of the interpolant in every step, and the node at the very end.
    stepper, n = steppers.get(method), len(few.steps) - 1
    extras = len(stepper.dense.a) if isinstance(stepper, ExplicitRK) else 0
    if isinstance(stepper, ImplicitRK) and stepper.work.node == 0:
        extras = 1  # the slope at the step's start, which the step itself does not use
    last = int(isinstance(stepper, ExplicitRK | ImplicitRK) or stepper.work.dense_node)
    assert 0 <= many.stats.evaluations - few.stats.evaluations <= n * extras + last
    assert 0 <= many.stats.products - few.stats.products <= n * extras + last
    if extras == 0:
        recomputed = last * 2 if isinstance(gradient, sa.Symplectic) else 0
        grown = many.stats.backward_evaluations - few.stats.backward_evaluations
        assert 0 <= grown <= recomputed
