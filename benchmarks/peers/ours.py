"""This library, under each of its gradient strategies and tiers of execution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

import symplectic_adjoint as sa
from benchmarks.peers.base import Bound, Counts, Peer, attached, second_order_remark
from benchmarks.problems import Instance, Problem, loosened
from symplectic_adjoint import steppers
from symplectic_adjoint.gradients._execution import TIERS

_STRATEGIES: dict[str, Callable[[], Any]] = {
    "backprop": sa.Backprop,
    "checkpoint": sa.Checkpoint,
    "aca": sa.ACA,
    "symplectic-stages": lambda: sa.Symplectic(store="stages"),
    "symplectic-steps": lambda: sa.Symplectic(store="steps"),
    "symplectic-graph": lambda: sa.Symplectic(store="graph"),
    "continuous": sa.Continuous,
    "mali": sa.MALI,
}

_TIERS: dict[str, tuple[str, ...]] = {
    "eager": tuple(_STRATEGIES),
    "step": ("symplectic-stages",),
    "loop": ("symplectic-stages", "symplectic-steps", "symplectic-graph"),
}


class Ours(Peer):
    """``symplectic_adjoint.solve`` under one strategy, in one tier."""

    package = "symplectic-adjoint"
    reference_note = "autograd in float64 on the steps it accepted"

    def __init__(self, strategy: str, tier: str = "eager") -> None:
        self.strategy, self.tier = strategy, tier
        self.name = f"ours/{strategy}" + ("" if tier == "eager" else f"/{tier}")
        self.compiled = tier != "eager"
        self.counted = tier == "eager"
        # Another dtype is compiled anew; the default strategy speaks for its tier.
        self.doubled = tier == "eager" or strategy == "symplectic-stages"

    def installed(self) -> bool:
        return True  # the package this benchmark belongs to need not be a distribution

    def remark(self, problem: Problem) -> str | None:
        return second_order_remark(problem) if self.strategy == "mali" else None

    def bind(self, instance: Instance) -> Bound:
        problem = instance.problem
        size = None if problem.steps is None else problem.t1 / problem.steps
        controller = None if size is None else sa.FixedGrid(step_size=size)
        return self._bind(instance, _STRATEGIES[self.strategy](), controller)

    def reference(self, instance: Instance, grid: Tensor | None) -> Bound | None:
        if grid is None:
            return None
        controller = sa.FixedGrid(grid_constructor=lambda func, y0, t: grid)
        same_method = Ours("mali" if self.strategy == "mali" else "backprop")
        return same_method._bind(instance, sa.Backprop(), controller)

    def _method(self, problem: Problem) -> Any:
        if self.strategy == "mali":
            return "alf"
        stepper: Any = steppers.get(problem.method)
        return replace(stepper, **dict(problem.options)) if problem.options else stepper

    def _bind(self, instance: Instance, gradient: Any, controller: Any) -> Bound:
        problem = loosened(instance.problem) if self.strategy == "mali" else instance.problem
        times, method = instance.times, self._method(problem)
        last: list[Any] = []

        def forward() -> Tensor:
            solution = sa.solve(
                instance.field,
                instance.y0,
                times,
                method=method,
                rtol=problem.rtol,
                atol=problem.atol,
                controller=controller,
                gradient=gradient,
                execution=self.tier,
            )
            last[:] = [solution.steps, solution.stats]
            after: Tensor = solution.y[1:]
            return after

        def counts() -> Counts:
            stats = last[1]
            return Counts(stats.evaluations, stats.backward_evaluations, stats.products)

        return attached(
            instance,
            forward,
            steps=lambda: len(last[0]) - 1 if last else None,
            grid=lambda: last[0] if last else None,
            counts=None if self.counted else counts,
        )


PEERS = tuple(
    Ours(strategy, tier)
    for tier, strategies in _TIERS.items()
    if tier in TIERS
    for strategy in strategies
)
