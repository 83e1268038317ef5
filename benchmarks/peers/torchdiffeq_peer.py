"""torchdiffeq: autograd through the solver, and the continuous adjoint."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.base import Bound, Peer, attached
from benchmarks.problems import Instance, Problem


def _options(problem: Problem) -> dict[str, Any]:
    size = {} if problem.steps is None else {"step_size": problem.t1 / problem.steps}
    return {**size, **dict(problem.options)}


class Torchdiffeq(Peer):
    """``odeint`` or ``odeint_adjoint`` with their defaults."""

    package = "torchdiffeq"
    reference_note = "its own backprop in float64, which chooses its own steps"

    def __init__(self, adjoint: bool) -> None:
        self.adjoint = adjoint
        self.name = "torchdiffeq/adjoint" if adjoint else "torchdiffeq/backprop"

    def bind(self, instance: Instance) -> Bound:
        import torchdiffeq

        problem, field, y0 = instance.problem, instance.field, instance.y0
        odeint = torchdiffeq.odeint_adjoint if self.adjoint else torchdiffeq.odeint
        t = instance.times
        accepted: list[float] = []
        if problem.steps is None and field.counting:  # the callback costs time, and only counts
            counted: Any = field
            counted.callback_accept_step = lambda t0, y, dt: accepted.append(float(t0.detach()))

        def forward() -> Tensor:
            accepted.clear()
            solution: Tensor = odeint(
                field,
                y0,
                t,
                rtol=problem.rtol,
                atol=problem.atol,
                method=problem.method,
                options=_options(problem),
            )
            return solution[1:]

        return attached(instance, forward, steps=lambda: problem.steps or len(accepted) or None)

    def reference(self, instance: Instance, grid: Tensor | None) -> Bound:
        return Torchdiffeq(adjoint=False).bind(instance)


PEERS = (Torchdiffeq(adjoint=False), Torchdiffeq(adjoint=True))
