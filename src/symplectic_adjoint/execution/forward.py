"""An adaptive solve, or one on a grid, as one compiled graph with a loop inside.

All numbers of the controller travel in one float64 vector, all its constants in another: changing
tolerances, times or limits changes no graph. Accepted steps are written to a record of a fixed
length; when it is full the loop ends, and the same graph goes on with another one. A rejected
attempt is overwritten by the next.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symplectic_adjoint._types import Norm
from symplectic_adjoint.controllers import Adaptive
from symplectic_adjoint.execution.trace import (
    Compiled,
    Input,
    Linear,
    Residual,
    Traced,
    TracedField,
    at,
    behind,
    compiled_loop,
    put,
)
from symplectic_adjoint.field import Stage
from symplectic_adjoint.steppers import ExplicitRK
from symplectic_adjoint.steppers.explicit_rk import RKState, RKStep

LONG = 8
"""Steps of more stages are reversed stage by stage."""

LARGE = 2**20
"""So are those of functions whose evaluation holds more bytes for its products."""


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
        kept: What else a method keeps of each step (C or C + 1, ...), see ``Method``.
        moments: What the solution within a step is made of (C, degree + 1, ...), where needed.
    """

    t: Tensor
    y: Tensor
    kept: list[Tensor]
    moments: list[Tensor]

    def begin(self, t: float | Tensor, y: Tensor, residuals: Sequence[Tensor]) -> None:
        """Write where the first step starts; with a grid (m,), all of its times.

        Args:
            t: The times.
            y: Solution there.
            residuals: Those of the slope there, where the method hands it on and keeps them.
        """
        self.t[: t.numel() if isinstance(t, Tensor) else 1] = t
        self.y[0] = y
        for record, x in zip(self.kept, residuals, strict=False):
            record[0] = x

    @staticmethod
    def of(tensors: Sequence[Tensor], dense: bool = False) -> Records:
        """From all their tensors, with moments or without."""
        t, y, *kept = tensors
        return Records(t, y, kept, [kept.pop()] if dense else [])

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.t, self.y, *self.kept, *self.moments]


@dataclass(frozen=True)
class Method:
    """A method at work on ``func``.

    Of each step it keeps the residuals of the stages that are pulled back, those of the start
    first, and then the points of the inner stages, (C, stages - 1, ...).

    Attributes:
        traced: ``func``.
        stepper: The method.
        dense: Whether there are outputs within the steps.
        points: Whether points are kept.
        linear: With this the residuals; otherwise none.
    """

    traced: Traced
    stepper: ExplicitRK
    dense: bool
    points: bool
    linear: Linear | None

    def carries(self, adaptive: bool) -> bool:
        """Whether the slope at the end of each step is known there, and handed to the next."""
        work = self.stepper.work
        return (adaptive and work.error_node) or (self.dense and work.dense_node)

    @property
    def residuals(self) -> Sequence[Residual]:
        """What is kept of each of the stages ``pulled``."""
        return () if self.linear is None else self.linear.residuals

    @functools.cached_property
    def pulled(self) -> Sequence[int]:
        """The stages whose residuals are kept."""
        if self.linear is None:
            return ()
        stepper = self.stepper
        later = stepper.weighed(range(1, stepper.node + 1))
        if self.dense:
            later |= {*stepper.dense_stages}
        return (0, *sorted(later - {0, stepper.node}))

    @functools.cached_property
    def stagewise(self) -> bool:
        """Whether the reverse sweep takes one stage a round, and not a step.

        That is a shorter graph, and holds one evaluation at a time where the compiler would take
        those of a step together; it takes more rounds, which matters where they are cheap.
        """
        node, columns = self.stepper.node, self.stepper.columns
        each = all(any(row <= node for _, row in columns[i]) for i in range(node))
        if not self.points or self.linear is not None or not each:
            return False
        return node > LONG or self.traced.held > LARGE

    def records(self, y0: Tensor, tensors: Sequence[Tensor], capacity: int) -> Records:
        """Room for ``capacity`` steps."""
        sizes = self.traced.sizes(y0, tensors)
        kept = [
            residual.record(capacity + (i == 0), sizes, y0.device)
            for i in self.pulled
            for residual in self.residuals
        ]
        inner = self.stepper.node - 1
        if self.points and inner:
            kept.append(y0.new_empty((capacity, inner, *y0.shape)))
        moments = [self.stepper.dense.degree + 1] if self.dense else []
        return Records(
            torch.empty(capacity + 1, dtype=torch.float64, device=y0.device),
            y0.new_empty((capacity + 1, *y0.shape)),
            kept,
            [y0.new_empty((capacity, count, *y0.shape)) for count in moments],
        )

    def inputs(self, records: Records) -> list[Input]:
        """Records as inputs of a graph."""
        state = self.traced.graph.state_dims
        after, further = behind(state, 1), behind(state, 2)
        dims = [x.dims for _ in self.pulled for x in self.residuals]
        dims += [further] * (len(records.kept) - len(dims))
        return [
            Input(records.t),
            Input(records.y, after),
            *(Input(x, own) for x, own in zip(records.kept, dims, strict=True)),
            *(Input(x, further) for x in records.moments),
        ]

    def write(
        self, field: TracedField, records: Records, n: Tensor, step: RKStep, carries: bool
    ) -> list[Tensor]:
        """Write a step as number ``n``; returns the slope at its end, where it is handed on."""
        stages, node = step.stages, self.stepper.node
        ends = [field.value(stages[node])] if carries else []
        put(records.t, n + 1, torch.as_tensor(step.t1))
        put(records.y, n + 1, step.y1)
        for moments in records.moments:
            put(moments, n, self.stepper.moments(field, step))
        kept = iter(records.kept)
        for i in self.pulled:
            handed = i == 0 and carries
            for x in stages[node if handed else i].graph:
                put(next(kept), n + 1 if handed else n, x)
        for points in kept:
            put(points, n, torch.stack([stage.x for stage in stages[1:node]]))
        return ends

    def read(
        self, field: TracedField, records: Records, n: Tensor, t: tuple[Tensor, Tensor]
    ) -> RKStep:
        """Step number ``n`` between two times, as it was kept, or taken once more."""
        y = at(records.y, n)
        start = RKState(t[0], y, Stage(t[0], y))
        if not self.points:
            return self.stepper.step(field, start, t[1])
        step = RKStep(start, t[1], t[1] - t[0], [start.node], (), self.stepper.node)
        kept = iter([at(x, n) for x in records.kept])
        graphs = {i: [next(kept) for _ in self.residuals] for i in self.pulled}
        for points in kept:
            for i, x in enumerate(points.unbind(), start=1):
                step.stages.append(Stage(self.stepper.time(step, i), x))
        for i, graph in graphs.items():
            step.stages[i].graph = graph
        step.stages.append(Stage(t[1], y))  # the node, which is not pulled back here
        return step


def adaptive_loop(
    method: Method,
    y0: Tensor,
    tensors: Sequence[Tensor],
    tolerances: tuple[Tensor, Tensor],
    stops: Tensor,
    records: Records,
    norm: Norm,
) -> Compiled:
    """Compile ``(now, y, *k, constants, stops, rtol, atol, *tensors, *records) -> (now, y, *k)``.

    With ``k`` the slope at ``y`` where the method hands it on (``Method.carries``).
    """
    vector = torch.empty(len(Now._fields), dtype=torch.float64, device=y0.device)
    constants = torch.empty(len(Constants._fields), dtype=torch.float64, device=y0.device)
    state = method.traced.graph.state_dims
    loop = _Adaptive(method, len(records.t) - 1, norm)
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
        method.inputs(records),
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
        method.inputs(records),
    )


def _like_state(x: Tensor, y0: Tensor, state: dict[int, str]) -> dict[int, str]:
    """The changing dimensions of what broadcasts against the state."""
    lead = y0.ndim - x.ndim
    return {d - lead: s for d, s in state.items() if d >= lead and x.shape[d - lead] != 1}


class _Adaptive:
    """The loop of an adaptive solve, by the rules of ``controllers.Adaptive``."""

    def __init__(self, method: Method, capacity: int, norm: Norm) -> None:
        self.method = method
        self.norm = norm
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
        field = TracedField(self.method.traced, y, tensors, self.method.linear)
        start = RKState(s.t, y, Stage(s.t, y, k[0] if k else None))
        step = self.method.stepper.step(field, start, t1)
        size = torch.maximum(y.abs(), step.y1.abs())
        scaled = self.method.stepper.error(field, step) / torch.addcmul(atol, size, rtol)
        error = self.norm(scaled).double()
        new, accepted = self._judge(s, c, t1, error)
        held = Records.of(records, self.method.dense)
        ends = [step.y1, *self.method.write(field, held, s.n.long(), step, self.carries)]
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
        field = TracedField(self.method.traced, y, tensors, self.method.linear)
        t = at(times, n)
        start = RKState(t, y, Stage(t, y, k[0] if k else None))
        step = self.method.stepper.step(field, start, at(times, n + 1))
        held = Records.of(records, self.method.dense)
        return [
            n + 1,
            step.y1.clone(),
            *self.method.write(field, held, n, step, self.carries),
        ], field


def _next_stop(stops: Tensor, t: Tensor, c: Constants) -> Tensor:
    """The nearest time ahead of ``t`` at which a step has to end."""
    ahead = (stops - t) * c.direction
    stop: Tensor = t + c.direction * torch.where(ahead > 0, ahead, torch.inf).amin()
    return stop
