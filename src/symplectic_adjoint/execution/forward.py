"""An adaptive solve, or one on a grid, as one compiled graph with a loop inside.

All numbers of the controller travel in one float64 vector, all its constants in another: changing
tolerances, times or limits changes no graph. Accepted steps are written to a record of a fixed
length; when it is full the loop ends, and the same graph goes on with another one. A rejected
attempt is overwritten by the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symplectic_adjoint.controllers import Adaptive
from symplectic_adjoint.execution.trace import (
    Compiled,
    Input,
    Traced,
    TracedField,
    at,
    compiled_loop,
    put,
)
from symplectic_adjoint.field import Stage
from symplectic_adjoint.steppers import ExplicitRK
from symplectic_adjoint.steppers.explicit_rk import RKState, RKStep


class Now(NamedTuple):
    """Where the loop stands: numbers of one vector, as floats or as 0-dim tensors."""

    t: Any
    h: Any
    last: Any  # the error of the last accepted step, and the one before
    before: Any
    n: Any  # steps in the record
    attempts: Any
    stuck: Any  # 1 where no smaller step is left to try


class Constants(NamedTuple):
    """What a controller and an interval are, likewise."""

    end: Any
    direction: Any
    safety: Any
    factor_min: Any
    factor_max: Any
    min_step: Any
    max_step: Any
    max_steps: Any
    power: Any  # of the error of this step, the last one and the one before
    power_last: Any
    power_before: Any

    @staticmethod
    def of(controller: Adaptive, end: float, direction: float, order: int) -> Constants:
        """Those of a controller, for an error of some order."""
        c = controller
        return Constants(
            end,
            direction,
            c.safety,
            c.factor_min,
            c.factor_max,
            c.min_step,
            c.max_step,
            float(c.max_steps),
            -(c.pcoeff + c.icoeff + c.dcoeff) / order,
            (c.pcoeff + 2 * c.dcoeff) / order,
            -c.dcoeff / order,
        )


@dataclass
class Records:
    """Accepted steps, up to a fixed number C.

    Attributes:
        t: Step times (C + 1,), float64.
        y: Solution there (C + 1, ...).
        points: For each inner stage where it was evaluated (C, ...), where these are kept.
        moments: What the solution within a step is made of (C, degree + 1, ...), where needed.
    """

    t: Tensor
    y: Tensor
    points: list[Tensor]
    moments: list[Tensor]

    @staticmethod
    def empty(y0: Tensor, capacity: int, points: int, moments: int) -> Records:
        """Room for ``capacity`` steps."""
        return Records(
            torch.empty(capacity + 1, dtype=torch.float64, device=y0.device),
            y0.new_empty((capacity + 1, *y0.shape)),
            [y0.new_empty((capacity, *y0.shape)) for _ in range(points)],
            [y0.new_empty((capacity, moments, *y0.shape))] if moments else [],
        )

    def begin(self, t: float | Tensor, y: Tensor) -> None:
        """Write where the first step starts; with a grid (m,), all of its times."""
        self.t[: t.numel() if isinstance(t, Tensor) else 1] = t
        self.y[0] = y

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Records:
        """Records without moments, from their tensors."""
        t, y, *points = tensors
        return Records(t, y, points, [])

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.t, self.y, *self.points, *self.moments]

    def inputs(self, state: Mapping[int, str]) -> list[Input]:
        """All of them as inputs of a graph, beside a state with these changing dimensions."""
        after = {d + 1: name for d, name in state.items()}
        further = {d + 2: name for d, name in state.items()}
        one = [Input(x, after) for x in (self.y, *self.points)]
        return [Input(self.t), *one, *(Input(x, further) for x in self.moments)]


@dataclass(frozen=True)
class Method:
    """A method at work on ``func``.

    Attributes:
        traced: ``func``.
        stepper: The method.
        dense: Whether there are outputs within the steps.
    """

    traced: Traced
    stepper: ExplicitRK
    dense: bool

    def carries(self, adaptive: bool) -> bool:
        """Whether the slope at the end of each step is known there, and handed to the next."""
        work = self.stepper.work
        return (adaptive and work.error_node) or (self.dense and work.dense_node)

    def step(self, field: TracedField, start: RKState, t1: Tensor) -> RKStep:
        """A step from a state to ``t1``."""
        return self.stepper.step(field, start, t1)

    def end(self, field: TracedField, step: RKStep, carries: bool) -> list[Tensor]:
        """The slope at the end, where it is handed on."""
        return [field.value(step.stages[self.stepper.node])] if carries else []

    def write(self, field: TracedField, records: Sequence[Tensor], n: Tensor, step: RKStep) -> None:
        """Write a step as number ``n``: what ``Records`` holds."""
        (times, ys, *rest) = records
        put(times, n + 1, torch.as_tensor(step.t1))
        put(ys, n + 1, step.y1)
        inner = [s.x for i, s in enumerate(step.stages) if i not in (0, self.stepper.node)]
        if self.dense:
            put(rest.pop(), n, self.stepper.moments(field, step))
        for record, x in zip(rest, inner, strict=False):
            put(record, n, x)


def adaptive_loop(
    method: Method,
    y0: Tensor,
    tensors: Sequence[Tensor],
    tolerances: tuple[Tensor, Tensor],
    stops: Tensor,
    records: Records,
) -> Compiled:
    """Compile ``(now, y, *k, constants, stops, rtol, atol, *tensors, *records) -> (now, y, *k)``.

    With ``k`` the slope at ``y`` where the method hands it on (``Method.carries``).
    """
    vector = torch.empty(len(Now._fields), dtype=torch.float64, device=y0.device)
    constants = torch.empty(len(Constants._fields), dtype=torch.float64, device=y0.device)
    state = method.traced.graph.state_dims
    loop = _Adaptive(method, len(records.t) - 1)
    return compiled_loop(
        loop.goes_on,
        loop.attempt,
        [Input(vector), *(Input(y0, state) for _ in range(1 + loop.carries))],
        [
            Input(constants),
            Input(stops, {0: "stops"}),
            *(Input(x, _like_state(x, y0, state)) for x in tolerances),
            *method.traced.inputs(tensors),
        ],
        records.inputs(state),
    )


def grid_loop(method: Method, y0: Tensor, tensors: Sequence[Tensor], records: Records) -> Compiled:
    """Compile ``(n, y, *k, steps, t, *tensors, *records) -> (n, y, *k)``.

    From step n to step ``steps`` of the grid t (C + 1,).
    """
    count = torch.empty((), dtype=torch.int64, device=y0.device)
    state = method.traced.graph.state_dims
    loop = _Grid(method)
    return compiled_loop(
        loop.goes_on,
        loop.step,
        [Input(count), *(Input(y0, state) for _ in range(1 + loop.carries))],
        [Input(count), Input(records.t), *method.traced.inputs(tensors)],
        records.inputs(state),
    )


def _like_state(x: Tensor, y0: Tensor, state: dict[int, str]) -> dict[int, str]:
    """The changing dimensions of what broadcasts against the state."""
    lead = y0.ndim - x.ndim
    return {d - lead: s for d, s in state.items() if d >= lead and x.shape[d - lead] != 1}


class _Adaptive:
    """The loop of an adaptive solve, by the rules of ``controllers.Adaptive``."""

    def __init__(self, method: Method, capacity: int) -> None:
        self.method = method
        self.capacity = capacity
        self.carries = method.carries(True)
        order = method.stepper.error_order
        assert order is not None
        self.order = order

    def goes_on(self, carried: Sequence[Tensor], constants: Sequence[Tensor]) -> Tensor:
        s, c = Now(*carried[0].unbind()), Constants(*constants[0].unbind())
        within = (s.n < self.capacity) & (s.attempts < c.max_steps)
        going: Tensor = (s.t != c.end) & within & (s.stuck == 0)
        return going

    def attempt(
        self, carried: Sequence[Tensor], constants: Sequence[Tensor], records: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], TracedField]:
        now, y, *k = carried
        vector, stops, rtol, atol, *tensors = constants
        s, c = Now(*now.unbind()), Constants(*vector.unbind())
        stop = _next_stop(stops, s.t, c)
        last = s.h >= (stop - s.t).abs() * (1 - 1e-10)
        t1 = torch.where(last, stop, s.t + c.direction * s.h)
        field = TracedField(self.method.traced, y, tensors)
        step = self.method.step(field, RKState(s.t, y, Stage(s.t, y, k[0] if k else None)), t1)
        size = torch.maximum(y.abs(), step.y1.abs())
        error = _norm(self.method.stepper.error(field, step), size, (rtol, atol))
        new, accepted = self._judge(s, c, t1, error)
        self.method.write(field, records, s.n.long(), step)
        ends = [step.y1, *self.method.end(field, step, self.carries)]
        chosen = (torch.where(accepted, x1, x) for x1, x in zip(ends, (y, *k), strict=True))
        return [new, *chosen], field

    def _judge(self, s: Now, c: Constants, t1: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """As ``AdaptivePace.accepts``; where no smaller step is left, the loop is stuck."""
        h = torch.minimum(s.h, (t1 - s.t).abs())
        finite, least = torch.isfinite(error), h <= c.min_step
        accepted = finite & ((error <= 1.0) | least) & (t1 != s.t)
        factor = c.safety * error**c.power * s.last**c.power_last * s.before**c.power_before
        factor = torch.where(error == 0, c.factor_max, factor)
        low = torch.where(accepted, 1.0, c.factor_min)
        size = h * torch.clamp(factor, low, c.factor_max)
        # A step that was cut short says nothing against the size it would have had.
        size = torch.where(accepted, torch.maximum(size, s.h), size)
        shrunk = torch.maximum(h * c.factor_min, c.min_step)
        size = torch.where(finite, torch.clamp(size, c.min_step, c.max_step), shrunk)
        stuck = (t1 == s.t) | (~finite & least)
        new = Now(
            t=torch.where(accepted, t1, s.t),
            h=size,
            last=torch.where(accepted, torch.clamp(error, min=1e-10), s.last),
            before=torch.where(accepted, s.last, s.before),
            n=s.n + accepted,
            attempts=s.attempts + 1,
            stuck=stuck.double(),
        )
        return torch.stack([*new]), accepted


class _Grid:
    """The loop over the steps of a given grid."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.carries = method.carries(False)

    def goes_on(self, carried: Sequence[Tensor], constants: Sequence[Tensor]) -> Tensor:
        return carried[0] < constants[0]

    def step(
        self, carried: Sequence[Tensor], constants: Sequence[Tensor], records: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], TracedField]:
        n, y, *k = carried
        _, times, *tensors = constants
        field = TracedField(self.method.traced, y, tensors)
        t = at(times, n)
        step = self.method.step(
            field, RKState(t, y, Stage(t, y, k[0] if k else None)), at(times, n + 1)
        )
        self.method.write(field, records, n, step)
        return [n + 1, step.y1.clone(), *self.method.end(field, step, self.carries)], field


def _next_stop(stops: Tensor, t: Tensor, c: Constants) -> Tensor:
    """The nearest time ahead of ``t`` at which a step has to end."""
    ahead = (stops - t) * c.direction
    stop: Tensor = t + c.direction * torch.where(ahead > 0, ahead, torch.inf).amin()
    return stop


def _norm(x: Tensor, size: Tensor, tolerances: tuple[Tensor, Tensor]) -> Tensor:
    rtol, atol = tolerances
    norm: Tensor = torch.linalg.vector_norm(x / torch.addcmul(atol, size, rtol))
    return norm.double()
