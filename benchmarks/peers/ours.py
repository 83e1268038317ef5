"""This library, under each of its gradient strategies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import symplectic_adjoint as sa
from benchmarks.peers.base import Bound, Peer, second_order_remark
from benchmarks.problems import Instance, Problem, loosened
from symplectic_adjoint import steppers

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


class Ours(Peer):
    """``symplectic_adjoint.solve`` under one strategy."""

    package = "symplectic-adjoint"
    reference_note = "autograd in float64 on the steps it accepted in float32"

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self.name = f"ours/{strategy}"

    def refuses(self, problem: Problem) -> str | None:
        return None  # the package this benchmark belongs to need not be installed as a distribution

    def remark(self, problem: Problem) -> str | None:
        return second_order_remark(problem) if self.strategy == "mali" else None

    def _method(self, problem: Problem) -> Any:
        if self.strategy == "mali":
            return "alf"
        stepper: Any = steppers.get(problem.method)
        return replace(stepper, **dict(problem.options)) if problem.options else stepper

    def _controller(self, problem: Problem) -> Any:
        if problem.steps is None:
            return None
        return sa.FixedGrid(step_size=problem.t1 / problem.steps)

    def bind(self, instance: Instance) -> Bound:
        problem, y0 = instance.problem, instance.y0
        return self._bind(
            instance, _STRATEGIES[self.strategy](), self._controller(problem), _times(y0, problem)
        )

    def reference(self, instance: Instance, grid: Tensor | None) -> Callable[[], Tensor]:
        assert grid is not None
        controller = sa.FixedGrid(grid_constructor=lambda func, y0, t: grid)
        return self._bind(instance, sa.Backprop(), controller, grid[[0, -1]]).forward

    def _bind(self, instance: Instance, gradient: Any, controller: Any, t: Tensor) -> Bound:
        problem = loosened(instance.problem) if self.strategy == "mali" else instance.problem
        last: list[Any] = []

        def forward() -> Tensor:
            solution = sa.solve(
                instance.field,
                instance.y0,
                t,
                method=self._method(problem),
                rtol=problem.rtol,
                atol=problem.atol,
                controller=controller,
                gradient=gradient,
            )
            last[:] = [solution.steps]
            final: Tensor = solution.y[-1]
            return final

        return Bound(
            forward,
            steps=lambda: len(last[0]) - 1 if last else None,
            grid=lambda: last[0] if last else None,
        )


def _times(y0: Tensor, problem: Problem) -> Tensor:
    return torch.tensor([0.0, problem.t1], dtype=y0.dtype)


PEERS = tuple(Ours(strategy) for strategy in _STRATEGIES)
