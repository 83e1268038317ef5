"""The reverse sweep over a record of steps, as one compiled graph with a loop inside.

Each round transposes one step and pulls back the stage at its start, where the step meets what the
one before has put on its node. So there is one product a stage, and none more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint.execution.forward import Method, Records
from symplectic_adjoint.execution.trace import (
    Compiled,
    Input,
    TracedField,
    at,
    compiled_loop,
)
from symplectic_adjoint.field import Stage
from symplectic_adjoint.steppers._base import DenseMoments, Reversal
from symplectic_adjoint.steppers.explicit_rk import RKState, RKStep


@dataclass
class Cotangents:
    """Cotangents of the outputs of a record of steps.

    Attributes:
        hits: Those of the solution at the end of each step (C, ...), where there are any.
        moments: For each step, those of the outputs within it (C, degree + 1, ...), where there
            are any; see ``DenseMoments``.
        nodes: What each step's outputs put on the node at its start, by the step before (C, ...).
    """

    hits: list[Tensor]
    moments: list[Tensor]
    nodes: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.hits, *self.moments, *self.nodes]


def reverse_loop(
    method: Method,
    y0: Tensor,
    tensors: Sequence[Tensor],
    records: Records,
    cotangents: Cotangents,
) -> Compiled:
    """Compile ``(steps, lam, t, y, *points, *cotangents, *tensors, *sums) -> (0, lam)``.

    The gradients of the tensors that need one are added to ``sums``.
    """
    state = method.traced.graph.state_dims
    after = {d + 1: name for d, name in state.items()}
    further = {d + 2: name for d, name in state.items()}
    pairs = list(zip(method.traced.inputs(tensors), method.traced.wanted, strict=True))
    loop = _Reverse(method, len(records.points), cotangents)
    return compiled_loop(
        loop.goes_on,
        loop.transpose,
        [Input(torch.empty((), dtype=torch.int64, device=y0.device)), Input(y0, state)],
        [
            Input(records.t),
            *(Input(x, after) for x in (records.y, *records.points, *cotangents.hits)),
            *(Input(x, further) for x in cotangents.moments),
            *(Input(x, after) for x in cotangents.nodes),
            *(x for x, _ in pairs),
        ],
        [x for x, want in pairs if want],
    )


class _Reverse:
    def __init__(self, method: Method, points: int, cotangents: Cotangents) -> None:
        self.method = method
        counts = (
            1,
            1,
            points,
            len(cotangents.hits),
            len(cotangents.moments),
            len(cotangents.nodes),
        )
        self.bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]

    def goes_on(self, carried: Sequence[Tensor], constants: Sequence[Tensor]) -> Tensor:
        return carried[0] > 0

    def transpose(
        self, carried: Sequence[Tensor], constants: Sequence[Tensor], sums: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], TracedField]:
        after, lam = carried
        n = after - 1
        parts = [constants[a:b] for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        (times,), (ys,), points, hits, moments, nodes = parts
        y = at(ys, n)
        field = TracedField(self.method.traced, y, constants[self.bounds[-1] :])
        step = self._step(field, at(times, n), at(times, after), y, [at(x, n) for x in points])
        lam = sum((at(g, n) for g in hits), start=lam)
        dense = DenseMoments(at(moments[0], n)) if moments else None
        mu = at(nodes[0], n) if nodes else None
        stepper = self.method.stepper
        whole: Any = field  # it pulls back, and Reversal asks for no more
        lam = stepper.transpose_alone(Reversal(whole), 0, step, lam, dense, mu)
        for total, part in zip(sums, field.parts, strict=True):
            if part is not None:
                total.add_(part)
        return [n.clone(), lam], field

    def _step(
        self, field: TracedField, t: Tensor, t1: Tensor, y: Tensor, points: Sequence[Tensor]
    ) -> RKStep:
        """The step, with its stages where they were kept or computed again."""
        start = RKState(t, y, Stage(t, y))
        if not points:
            return self.method.step(field, start, t1)
        method = self.method.stepper
        step = RKStep(start, t1, t1 - t, [start.node], (), method.node)
        for i, x in enumerate(points, start=1):
            step.stages.append(Stage(method._time(step, i), x))
        step.stages.append(Stage(t1, y))  # the node, which is not pulled back here
        return step
