"""torchode: autograd through a solver that steps every sample by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.base import Bound, Peer, attached
from benchmarks.problems import Instance, Problem


class Torchode(Peer):
    """``AutoDiffAdjoint`` with Dormand-Prince and the integral controller.

    Args:
        compiled: ``torch.compile`` its step and its control of the step size. (Compiled as a whole,
            the solve unrolls its steps and takes minutes; ``torch.jit.script`` fails on it.) The
            counts are those of the same solver uncompiled.
    """

    package = "torchode"
    reference_note = "its own backprop in float64, which chooses its own steps"

    def __init__(self, compiled: bool) -> None:
        self.name = "torchode/compiled" if compiled else "torchode/backprop"
        self.compiled = compiled
        self.doubled = not compiled

    def lacks(self, problem: Problem) -> str | None:
        return None if problem.method == "dopri5" else f"torchode has no {problem.method}"

    def remark(self, problem: Problem) -> str | None:
        return "step and controller by torch.compile" if self.compiled else None

    def bind(self, instance: Instance) -> Bound:
        import torchode

        problem, field, y0 = instance.problem, instance.field, instance.y0
        term = torchode.ODETerm(field)
        controller = torchode.IntegralController(problem.atol, problem.rtol, term=term)
        method = torchode.Dopri5(term)
        if self.compiled and not field.counting:
            _compile(method, "step")
            _compile(controller, "adapt_step_size")
        solver = torchode.AutoDiffAdjoint(method, controller)
        times = instance.times.expand(len(y0), -1)
        ivp = torchode.InitialValueProblem(y0=y0, t_eval=times)
        accepted: list[int] = []

        def forward() -> Tensor:
            solution = solver.solve(ivp)
            accepted[:] = [int(solution.stats["n_accepted"].max())]
            after: Tensor = solution.ys[:, 1:]
            return after

        return attached(instance, forward, steps=lambda: accepted[0] if accepted else None)

    def reference(self, instance: Instance, grid: Tensor | None) -> Bound:
        return Torchode(compiled=False).bind(instance)


def _compile(owner: Any, method: str) -> None:
    setattr(owner, method, torch.compile(getattr(owner, method)))


PEERS = (Torchode(compiled=False), Torchode(compiled=True))
