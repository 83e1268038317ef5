"""zuko: the augmented adjoint equation integrated backwards, one step between two stored states."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from benchmarks.peers.base import Bound, Peer, attached, final_alone
from benchmarks.problems import Instance, Problem

_STAGES = 7  # evaluations of an attempted step, the last at its end

_FINEST = 1e-6
"""Finest relative tolerance that its error estimate, the largest component, can meet in float32.

Below, rounding alone exceeds the tolerance, no step is ever accepted and the solve does not end.
"""


class Zuko(Peer):
    """``zuko.utils.odeint``; its Dormand-Prince method is the only one."""

    name = "zuko/adjoint"
    package = "zuko"
    reference_note = "its own step function under autograd in float64 on the steps it accepted"

    def lacks(self, problem: Problem) -> str | None:
        if problem.method != "dopri5":
            return f"zuko has no {problem.method}"
        return final_alone("zuko", problem)

    def remark(self, problem: Problem) -> str | None:
        if problem.rtol >= _FINEST:
            return None
        return (
            f"rtol {_FINEST:g}: at {problem.rtol:g} it accepts no step in float32 and does not end"
        )

    def bind(self, instance: Instance) -> Bound:
        from zuko.utils import odeint

        problem, field, y0 = instance.problem, instance.field, instance.y0
        seen: list[float] = []
        accepted: list[float] = []

        def recorded(t: Tensor, y: Tensor) -> Tensor:
            seen.append(float(t))
            return cast(Tensor, field(t, y))

        def forward() -> Tensor:
            seen.clear()
            func = recorded if field.counting else field
            final: Tensor = odeint(
                func,
                y0,
                0.0,
                problem.t1,
                phi=field.parameters(),
                atol=problem.atol,
                rtol=max(problem.rtol, _FINEST),
            )
            accepted[:] = _accepted(seen) if seen else []
            return final

        return attached(
            instance,
            forward,
            steps=lambda: len(accepted) - 1 if accepted else None,
            grid=lambda: torch.tensor(accepted, dtype=torch.float64) if accepted else None,
        )

    def reference(self, instance: Instance, grid: Tensor | None) -> Bound | None:
        from zuko.utils import dopri45

        if grid is None:
            return None

        def forward() -> Tensor:
            y = instance.y0
            for start, end in pairwise(grid):
                y = dopri45(instance.field, y, start, end - start)
            return y

        return attached(instance, forward)


def _accepted(seen: list[float]) -> list[float]:
    """The accepted times: where an attempt was rejected, the next begins at the same time."""
    starts, ends = seen[::_STAGES], seen[_STAGES - 1 :: _STAGES]
    following = [*starts[1:], ends[-1]]
    return [starts[0]] + [end for end, start in zip(ends, following, strict=False) if end == start]


PEERS = (Zuko(),)
