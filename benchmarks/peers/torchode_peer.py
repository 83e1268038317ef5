"""torchode: autograd through a solver that steps every sample by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.base import Bound, Peer
from benchmarks.problems import Instance, Problem


class Torchode(Peer):
    """``AutoDiffAdjoint`` with Dormand-Prince and the integral controller, uncompiled."""

    name = "torchode/backprop"
    package = "torchode"
    reference_note = "its own backprop in float64, which chooses its own steps"

    def lacks(self, problem: Problem) -> str | None:
        return None if problem.method == "dopri5" else f"torchode has no {problem.method}"

    def bind(self, instance: Instance) -> Bound:
        import torchode

        problem, field, y0 = instance.problem, instance.field, instance.y0
        term = torchode.ODETerm(field)
        controller = torchode.IntegralController(problem.atol, problem.rtol, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term), controller)
        times = torch.tensor([0.0, problem.t1], dtype=y0.dtype).expand(len(y0), 2)
        ivp = torchode.InitialValueProblem(y0=y0, t_eval=times)
        accepted: list[int] = []

        def forward() -> Tensor:
            solution = solver.solve(ivp)
            accepted[:] = [int(solution.stats["n_accepted"].max())]
            final: Tensor = solution.ys[:, -1]
            return final

        return Bound(forward, steps=lambda: accepted[0] if accepted else None)

    def reference(self, instance: Instance, grid: Tensor | None) -> Callable[[], Tensor]:
        return self.bind(instance).forward


PEERS = (Torchode(),)
