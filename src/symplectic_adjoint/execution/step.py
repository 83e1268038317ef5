"""The compiled step tier: each step is one compiled call, as is its transpose.

Python loops over them, so that everything that looks at steps from outside, such as events, works
as it does without a compiler.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._types import Time, as_float
from symplectic_adjoint.execution.forward import Method
from symplectic_adjoint.execution.loop import Program
from symplectic_adjoint.execution.trace import Compiled, Input, TracedField, behind, compiled
from symplectic_adjoint.field import DetachedField, Field, RandomState, Stage
from symplectic_adjoint.steppers import ExplicitRK
from symplectic_adjoint.steppers._base import (
    Cotangent,
    DenseCotangent,
    DenseMoments,
    Reversal,
    Saved,
    centred_powers,
)
from symplectic_adjoint.steppers.explicit_rk import RKState, RKStep


@dataclass(slots=True)
class CompiledStep(RKStep):
    """A step, and the estimate of its error."""

    estimate: Tensor | None = None


class CompiledRK(ExplicitRK):
    """A Runge-Kutta method whose steps and transposes are compiled for one function.

    Where a graph is to be kept, or a gradient of times is wanted, it steps as it always does.
    """

    def __init__(self, stepper: ExplicitRK, bound: Any) -> None:
        """Compile what is not compiled yet when it is first used.

        Args:
            stepper: The method.
            bound: The function, a ``gradients._compiled.Bound``.
        """
        super().__init__(stepper.tableau, stepper.dense)
        self.plain = stepper
        self.bound = bound

    def step(
        self, field: Field, state: RKState, t1: Time, tokens: Sequence[RandomState | None] = ()
    ) -> RKStep:
        if type(field) is not DetachedField or isinstance(t1, Tensor):
            return super().step(field, state, t1, tokens)
        k = field.value(state.node)
        tensors = self.bound.inputs(field.aliases)
        program = self._program(state.y)
        run = program.get("step", functools.partial(_step, program.method, state.y, tensors))
        out = run.call(_time(state.t, k), _time(t1, k), state.y, k, *tensors)
        field.evaluations += run.evaluations
        step = CompiledStep(state, t1, t1 - state.t, [state.node], (), self.node)
        values = iter(out)
        for i in range(1, self.node + 1):
            stage = Stage(self.time(step, i), next(values))
            step.stages.append(stage)
            if _valued(self, i):
                stage.k = next(values)
        step.estimate = next(values, None)
        return step

    def error(self, field: Field, step: RKStep) -> Tensor:
        estimate = step.estimate if isinstance(step, CompiledStep) else None
        return super().error(field, step) if estimate is None else estimate

    def load(
        self, field: DetachedField, start: Time, t1: Time, saved: Saved, end: RKState, dense: bool
    ) -> RKStep:
        if len(saved.tensors) > 1 or self.node == 1:
            return super().load(field, start, t1, saved, end, dense)
        y = saved.tensors[0]
        step = self.step(field, RKState(start, y, Stage(start, y)), t1)
        step.stages[self.node] = end.node
        if dense:
            self._extend(field, step, len(self.rows))
        return step

    def transpose(
        self,
        reversal: Reversal,
        n: int,
        step: RKStep,
        cotangent: Cotangent,
        dense: DenseCotangent | DenseMoments | None,
    ) -> Cotangent:
        slopes = dense.slopes if isinstance(dense, DenseCotangent) else None
        if reversal.wants_time(n) or cotangent.on_value or slopes is not None:
            return super().transpose(reversal, n, step, cotangent, dense)
        moments = [] if dense is None else [self._moments(dense)]
        field, y = reversal.field, step.start.y
        tensors = self.bound.inputs(field.aliases)
        program = self._program(y)
        points = [stage.x for stage in step.stages[1:]]
        optional = ([] if cotangent.k is None else [cotangent.k], moments)
        key = ("transpose", *map(len, (points, *optional)))
        run = program.get(
            key, functools.partial(_transpose, program.method, y, tensors, len(points), optional)
        )
        wanted = program.method.traced.wanted
        aliases = self.bound.holding(field.aliases)
        sums = [_sum(x) for x, want in zip(aliases, wanted, strict=True) if want]
        times = _time(step.start.t, y), _time(step.t1, y)
        given = (cotangent.y, *optional[0], *optional[1])
        lam, mu = run.call(*times, y, *points, *given, *tensors, *sums)
        field.evaluations += run.evaluations
        field.products += run.products
        field.sums.collect()
        return Cotangent(lam, mu)

    def _moments(self, dense: DenseCotangent | DenseMoments) -> Tensor:
        if isinstance(dense, DenseMoments):
            return dense.moments
        weights = centred_powers(dense.theta, self.dense.degree).T
        moments: Tensor = torch.tensordot(weights.to(dense.g), dense.g, dims=1)
        return moments

    def _program(self, y: Tensor) -> Program:
        return Program.of(self.bound.graph, self.bound.all, self.plain, y, "states", False)


def _valued(method: ExplicitRK, i: int) -> bool:
    """Whether a step evaluates its stage ``i`` in order to be made and judged."""
    error = method.error_order is not None and method.work.error_node
    return i < method.node or error


def _time(t: Time, like: Tensor) -> Tensor:
    return torch.full((), as_float(t), dtype=torch.float64, device=like.device)


def _sum(alias: Tensor) -> Tensor:
    """Where the gradient of what an alias stands for is summed."""
    if alias.grad is None:
        alias.grad = torch.zeros_like(alias, memory_format=torch.contiguous_format)
    return alias.grad


def _step(method: Method, y0: Tensor, tensors: Sequence[Tensor]) -> Compiled:
    """Compile ``(t, t1, y, k, *tensors)`` -> points, values and the error estimate of a step."""
    counts: list[Field] = []
    stepper = method.stepper

    def run(t: Tensor, t1: Tensor, y: Tensor, k: Tensor, *own: Tensor) -> Sequence[Tensor]:
        field = TracedField(method.traced, y, own)
        counts.append(field)
        step = stepper.step(field, RKState(t, y, Stage(t, y, k)), t1)
        estimate = [] if stepper.error_order is None else [stepper.error(field, step)]
        out = []
        for i, stage in enumerate(step.stages[1:], start=1):
            out.append(stage.x)
            if _valued(stepper, i):
                out.append(field.value(stage))
        return [*out, *estimate]

    time, state = _example_time(y0), Input(y0, method.traced.graph.state_dims)
    result = compiled(run, [time, time, state, state, *method.traced.inputs(tensors)])
    return replace(result, evaluations=counts[0].evaluations)


def _transpose(
    method: Method,
    y0: Tensor,
    tensors: Sequence[Tensor],
    points: int,
    optional: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> Compiled:
    """Compile ``(t, t1, y, *points, lam, *mu, *moments, *tensors, *sums) -> (lam, mu)``."""
    counts: list[Field] = []
    stepper, (mus, moments) = method.stepper, optional
    bounds = [0, points, points + 1, points + 1 + len(mus), points + 1 + len(mus) + len(moments)]

    def run(t: Tensor, t1: Tensor, y: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        xs, (lam,), mu, dense = (rest[a:b] for a, b in itertools.pairwise(bounds))
        own = rest[bounds[-1] : bounds[-1] + len(tensors)]
        field = TracedField(method.traced, y, own)
        counts.append(field)
        step = RKStep(RKState(t, y, Stage(t, y)), t1, t1 - t, [Stage(t, y)], (), stepper.node)
        for i, x in enumerate(xs, start=1):
            step.stages.append(Stage(stepper.time(step, i), x))
        cotangent = Cotangent(lam, mu[0] if mu else None)
        reversal: Any = Reversal(field)  # type: ignore[arg-type]
        held = DenseMoments(dense[0]) if dense else None
        start = stepper.transpose(reversal, 0, step, cotangent, held)
        assert start.k is not None
        for total, part in zip(rest[bounds[-1] + len(tensors) :], field.parts, strict=True):
            if part is not None:
                total.add_(part)
        return [start.y, start.k]

    time, dims = _example_time(y0), method.traced.graph.state_dims
    state = Input(y0, dims)
    further = behind(dims, 1)
    inputs = method.traced.inputs(tensors)
    sums = [x for x, want in zip(inputs, method.traced.wanted, strict=True) if want]
    states = [state] * (1 + points + 1 + len(mus))
    result = compiled(
        run, [time, time, *states, *(Input(x, further) for x in moments), *inputs, *sums]
    )
    return replace(result, evaluations=counts[0].evaluations, products=counts[0].products)


def _example_time(y0: Tensor) -> Input:
    return Input(torch.empty((), dtype=torch.float64, device=y0.device))
