"""The asynchronous leapfrog: a reversible second-order method, its inverse and its transpose.

With ``v`` an approximation of ``f(t, y)`` carried beside the solution (Mutze 2013, arXiv
1311.6602; Zhuang et al. 2021, "MALI", arXiv 2102.04668, algorithms 2 and 3),

    y_m = y + h/2 v,    u = f(t + h/2, y_m),    v1 = 2 u - v,    y1 = y_m + h/2 v1.

Read backwards from (y1, v1) the same evaluation gives (y, v): nothing needs to be stored, and the
inverse shares its one evaluation with the transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from symplectic_adjoint._types import Time, as_float
from symplectic_adjoint.field import DetachedField, Field, RandomState, Stage
from symplectic_adjoint.steppers._base import (
    Cotangent,
    DenseCotangent,
    Reversal,
    Saved,
    Work,
    dot,
    power_slopes,
    powers,
    scaled,
)

_DENSE = torch.tensor([[1.0, -2.0, 1.0], [0.0, 3.0, -2.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
"""Cubic Hermite weights of v, u and v1, since y1 - y = h u."""


class ALFState(NamedTuple):
    """Time, solution, and the carried slope ``v`` as the value of a stage."""

    t: Time
    y: Tensor
    node: Stage


@dataclass(slots=True)
class ALFStep:
    """A step. Seen from its end, its start is unknown until the midpoint is evaluated."""

    t: Time
    t1: Time
    mid: Stage
    start: ALFState | None
    finish: ALFState | None

    @property
    def h(self) -> Time:
        return self.t1 - self.t

    @property
    def y1(self) -> Tensor:
        assert self.finish is not None
        return self.finish.y


class ALF:
    """The asynchronous leapfrog.

    Example:
        >>> ALF().order
        2
    """

    name = "alf"
    order = 2
    error_order: int | None = 2
    work = Work(inner=1, node=0)

    def begin(self, t: Time, y: Tensor) -> ALFState:
        return ALFState(t, y, Stage(t, y))

    def slope(self, field: Field, state: ALFState) -> Tensor:
        return field.value(state.node)

    def step(
        self,
        field: Field,
        state: ALFState,
        t1: Time,
        tokens: Sequence[RandomState | None] = (),
    ) -> ALFStep:
        h = t1 - state.t
        v = self.slope(field, state)
        mid = Stage(
            state.t + 0.5 * h, state.y + scaled(0.5 * h, v), None, tokens[1] if tokens else None
        )
        u = field.evaluate(mid)
        v1 = 2 * u - v
        y1 = mid.x + scaled(0.5 * h, v1)
        return ALFStep(state.t, t1, mid, state, ALFState(t1, y1, Stage(t1, y1, v1)))

    def error(self, field: Field, step: ALFStep) -> Tensor:
        """``h (u - v)``: the distance to the embedded Euler step."""
        assert step.start is not None
        assert step.mid.k is not None
        assert step.start.node.k is not None
        return (step.mid.k.detach() - step.start.node.k.detach()) * as_float(step.h)

    def end(self, step: ALFStep) -> ALFState:
        assert step.finish is not None
        return step.finish

    def stages(self, step: ALFStep) -> Sequence[Stage]:
        assert step.start is not None
        return (step.start.node, step.mid)

    def carried(self, state: ALFState) -> tuple[Tensor, ...]:
        return (state.y,) if state.node.k is None else (state.y, state.node.k)

    def resume(self, t: Time, tensors: Sequence[Tensor], token: RandomState | None) -> ALFState:
        y, *v = tensors
        return ALFState(t, y, Stage(t, y, v[0] if v else None, token))

    def interpolate(self, field: Field, step: ALFStep, theta: Tensor) -> Tensor:
        assert step.start is not None
        assert step.finish is not None
        v, v1 = step.start.node.k, step.finish.node.k
        assert v is not None
        assert v1 is not None
        u = field.value(step.mid)
        k = torch.stack([v, u, v1])
        weights = (powers(theta, 3) @ _DENSE.T).to(k)
        y: Tensor = step.start.y + scaled(step.h, torch.tensordot(weights, k, dims=1))
        return y

    # Keeping ---------------------------------------------------------------------------------

    def save(self, step: ALFStep, stages: bool) -> Saved:
        assert step.start is not None
        assert step.start.node.k is not None
        tokens = (step.start.node.token, step.mid.token)
        kept = (step.start.y, step.start.node.k)
        return Saved(kept, tokens if any(tokens) else ())

    def load(
        self, field: DetachedField, start: Time, t1: Time, saved: Saved, end: ALFState, dense: bool
    ) -> ALFStep:
        tokens = saved.tokens or (None, None)
        state = self.resume(start, saved.tensors, tokens[0])
        v = self.slope(field, state)  # evaluated where the step began anew
        y, token = state.y, tokens[1]
        h = t1 - start
        mid = Stage(start + 0.5 * h, y + (0.5 * h) * v, None, token)
        return ALFStep(start, t1, mid, state, end)

    def invert(self, start: Time, end: ALFState, token: RandomState | None) -> ALFStep:
        """The step that ends in ``end``; its start becomes known in ``transpose``."""
        h = end.t - start
        v1 = end.node.k
        assert v1 is not None
        mid = Stage(start + 0.5 * h, end.y - (0.5 * h) * v1, None, token)
        return ALFStep(start, end.t, mid, None, end)

    # Reverse ---------------------------------------------------------------------------------

    def transpose(
        self,
        reversal: Reversal,
        n: int,
        step: ALFStep,
        cotangent: Cotangent,
        dense: DenseCotangent | None,
    ) -> Cotangent:
        h = as_float(step.h)
        g_v, g_u, g_v1 = self._dense_shares(dense)
        lam = cotangent.y
        cot_v1 = 0.5 * h * lam
        if cotangent.k is not None:
            cot_v1 = cot_v1 + cotangent.k
        if dense is not None:
            cot_v1 = cot_v1 + h * g_v1
        cot_u = 2 * cot_v1
        if dense is not None:
            cot_u = cot_u + h * g_u
        times = reversal.times if reversal.wants_time(n) else None
        pulled = reversal.field.pull(step.mid, cot_u, times is not None)
        cot_m = lam + pulled.v
        cot_v = 0.5 * h * cot_m - cot_v1
        cot_y = cot_m
        if dense is not None:
            cot_v = cot_v + h * g_v
            cot_y = cot_y + dense.g.sum(0)
        v, v1 = self._ends(step, pulled.k)
        if times is not None:
            if pulled.time is not None:
                times.add_time(n, 0.5, pulled.time)
            size = 0.5 * (dot(v1, lam) + dot(v, cot_m))
            if dense is not None:
                size = size + dot(v, g_v) + dot(pulled.k, g_u) + dot(v1, g_v1)
            times.add_size(n, size)
        if dense is not None and dense.slopes is not None:
            weights = (power_slopes(dense.theta, 3) @ _DENSE.T).to(dense.slopes)
            along = torch.stack([v, pulled.k, v1]).reshape(3, v.numel())
            products = dense.g.reshape(len(dense.g), v.numel()).conj() @ along.T
            dense.slopes += h * (weights * products.real).sum(1)
        return Cotangent(cot_y, cot_v)

    def transpose_begin(
        self, reversal: Reversal, state: ALFState, cotangent: Cotangent, n: int = 0
    ) -> Tensor:
        if cotangent.k is None:
            return cotangent.y
        times = reversal.times
        wants_time = times is not None and times.wanted(n)
        pulled = reversal.field.pull(state.node, cotangent.k, wants_time)
        if times is not None and pulled.time is not None:
            times.add_time(n, 0.0, pulled.time)
        return cotangent.y + pulled.v

    @staticmethod
    def _ends(step: ALFStep, u: Tensor) -> tuple[Tensor, Tensor]:
        """``v`` and ``v1`` of a step whose ``u`` is known; completes an inverted step."""
        if step.start is None:
            assert step.finish is not None
            assert step.finish.node.k is not None
            v1 = step.finish.node.k
            v = 2 * u - v1
            y = step.mid.x - (0.5 * as_float(step.h)) * v
            step.start = ALFState(step.t, y, Stage(step.t, y, v))
            return v, v1
        v_known = step.start.node.k
        assert v_known is not None
        return v_known, 2 * u - v_known

    @staticmethod
    def _dense_shares(dense: DenseCotangent | None) -> tuple[Tensor, Tensor, Tensor]:
        if dense is None:
            empty = torch.empty(0)
            return empty, empty, empty
        weights = powers(dense.theta, 3) @ _DENSE.T
        v, u, v1 = torch.tensordot(weights.T.to(dense.g), dense.g, dims=1)
        return v, u, v1
