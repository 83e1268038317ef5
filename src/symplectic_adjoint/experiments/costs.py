"""What a gradient costs as the network is used more often: the table of strategies, measured.

A flow of M components, each solved in N steps of s stages, uses its networks M N s times. Each of
the three is varied alone, and of one gradient are measured peak memory, evaluations, time, and the
error. Nothing is trained.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from symplectic_adjoint import datasets, steppers
from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint.datasets import Dataset
from symplectic_adjoint.experiments.config import STRATEGIES, CompareConfig
from symplectic_adjoint.experiments.costs_page import costs_page
from symplectic_adjoint.experiments.measure import Probe, gradient_of, measure_cost, seconds_of
from symplectic_adjoint.experiments.pages import Page
from symplectic_adjoint.experiments.sweep import Cell, Outcome, Record, Work
from symplectic_adjoint.experiments.train import batch_of, build_model, noise_of, to_device

_SET = "miniboone"


@dataclass(frozen=True)
class Scale:
    """How far the uses of the network grow.

    Attributes:
        components: Numbers of components M, each of N = ``few`` steps.
        steps: Numbers of steps N of one component.
        methods: Methods, by their number of stages s; ``few`` steps of one component.
        few: Steps where it is not these that are varied.
        width: Units of each of the two hidden layers.
        rows: Rows in the batch.
        repeats: Gradients that are timed, of which the median counts.
        strategies: Strategies.
    """

    components: tuple[int, ...]
    steps: tuple[int, ...]
    methods: tuple[str, ...] = ("euler", "midpoint", "bosh3", "rk4", "dopri5", "dopri8")
    few: int = 4
    width: int = 64
    rows: int = 64
    repeats: int = 3
    strategies: tuple[str, ...] = STRATEGIES


SCALES = {
    "paper": Scale((1, 2, 4, 8), (4, 16, 64, 256), width=860, rows=1000),
    "reduced": Scale((1, 2, 4), (2, 8, 32)),
    "tiny": Scale(
        (1, 2),
        (2, 4),
        ("euler", "rk4"),
        few=2,
        width=8,
        rows=8,
        repeats=1,
        strategies=("backprop", "symplectic", "continuous"),
    ),
}


class CostsStudy:
    """One gradient under every strategy, along M, N and s.

    Args:
        scale: "paper", "reduced" or "tiny".
        seed: Seed of everything random.
        device: Device of torch.

    Raises:
        UnknownNameError: There is no such scale.
    """

    name = "costs"

    def __init__(self, scale: str = "reduced", seed: int = 0, device: str = "cpu") -> None:
        if scale not in SCALES:
            raise UnknownNameError("scale", scale, SCALES)
        self.scale_name = scale
        self.scale = SCALES[scale]
        self.seed = seed
        self.device = device

    def settings(self) -> dict[str, Any]:
        """See ``Study``."""
        return {"scale": self.scale_name, "seed": self.seed, "device": self.device}

    def cells(self) -> Sequence[Cell]:
        """See ``Study``."""
        scale = self.scale
        ways = [("components", m, "dopri5", m, scale.few) for m in scale.components]
        ways += [("steps", n, "dopri5", 1, n) for n in scale.steps]
        ways += [("stages", _stages(method), method, 1, scale.few) for method in scale.methods]
        return [
            self._cell(strategy, *way)
            for way in ways
            for strategy in scale.strategies
            # mali has one method, with stages of its own
            if not (way[0] == "stages" and strategy == "mali")
        ]

    def run(self, cell: Cell, work: Work) -> Outcome:
        """See ``Study``."""
        config = CompareConfig.from_dict(cell.settings["config"])
        strategy = cell.settings["strategy"]
        model = build_model(config, strategy, self._data)
        batch = batch_of(to_device(self._data.train, config), config, 0)
        noise = noise_of(model, batch, config, 0)
        cost = measure_cost(model, Probe(model.state_dict(), batch, noise))
        seconds = seconds_of(
            lambda: gradient_of(model, batch, noise), self.device, self.scale.repeats
        )
        return Outcome(cost.to_dict(), {"gradient": seconds})

    def page(self, records: Mapping[str, Record]) -> Page:
        """See ``Study``."""
        return costs_page(self.settings(), records)

    def _cell(
        self, strategy: str, axis: str, value: int, method: str, components: int, steps: int
    ) -> Cell:
        scale = self.scale
        config = CompareConfig(
            data=_SET,
            strategies=(strategy,),
            method=method,
            step_size=1 / steps,
            blocks=components,
            hidden=(scale.width, scale.width),
            activation="softplus",
            noise="gaussian",
            batch_size=scale.rows,
            seed=self.seed,
            device=self.device,
            sweep=(),
        )
        uses = {"axis": axis, "value": value, "M": components, "N": steps, "method": method}
        settings = {**uses, "strategy": strategy, "config": config.to_dict()}
        return Cell(f"{axis}-{value}-{strategy}", settings)

    @functools.cached_property
    def _data(self) -> Dataset:
        return datasets.stand_in(_SET, rows=(self.scale.rows, 2, 2), seed=self.seed)


def _stages(method: str) -> int:
    work = steppers.get(method).work
    return work.inner + work.node
