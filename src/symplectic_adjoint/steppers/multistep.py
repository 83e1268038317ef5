"""Adams methods on any grid, and their transposes.

With ``k_j = f(t_j, y_j)`` the slopes at the last ``m`` step times, the Adams-Bashforth step
integrates the polynomial through them, the Adams-Moulton step the one that also passes through the
slope at the new time (Hairer, Norsett, Wanner, *Solving Ordinary Differential Equations I*, 2nd
ed., section III.1, and section III.5 for steps of unequal size):

    y_{n+1} = y_n + sum_j w_j k_{n-j},        w_j = int_{t_n}^{t_{n+1}} l_j(t) dt,

with ``l_j`` the Lagrange polynomials of the times. The weights are computed from the times of each
step, so that the order does not depend on equal steps.

A step is linear in ``y_n`` and in the slopes. Its transpose adds ``w_j lam`` to the cotangent of
each slope, and the state carries these cotangents backwards beside that of ``y``: a slope is pulled
back once, when all the steps that weigh it have been transposed. Functional iteration is a chain of
such sums, reversed iteration by iteration.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from symplectic_adjoint import tableaus
from symplectic_adjoint._errors import ArgumentError, ConvergenceWarning, UnknownNameError
from symplectic_adjoint._types import Time, as_float
from symplectic_adjoint.dense import hermite, linear
from symplectic_adjoint.field import DetachedField, Field, RandomState, Stage
from symplectic_adjoint.steppers._base import (
    Cotangent,
    DenseCotangent,
    Reversal,
    Saved,
    SlopeCotangent,
    Work,
    dot,
    power_slopes,
    powers,
    scaled,
)
from symplectic_adjoint.steppers.explicit_rk import ExplicitRK, RKState, RKStep

_MOST = 12
"""Greatest order; beyond it the regions of stability are too small to be of use."""

_BETWEEN = {
    "linear": torch.tensor([[1.0]], dtype=torch.float64),
    "cubic": torch.tensor(
        [[0.0, 3.0, -2.0], [1.0, -2.0, 1.0], [0.0, -1.0, 1.0]], dtype=torch.float64
    ),
}
"""Weights, in powers of theta, of ``y1 - y`` and of ``h`` times the slopes at both ends."""


# The weights -----------------------------------------------------------------------------------


def adams_weights(times: Sequence[Any], explicit: bool) -> list[Any]:
    """Weights of the slopes in the integral of their polynomial over the newest step.

    Args:
        times: Step times from the newest, where the step ends, to the oldest: floats, fractions or
            0-dim tensors, with which the weights are computed.
        explicit: Whether the polynomial passes through the slopes at ``times[1:]``
            (Adams-Bashforth) or at all ``times`` (Adams-Moulton).

    Returns:
        A weight for each of these slopes.

    Example:
        >>> from fractions import Fraction
        >>> times = [Fraction(t) for t in (1, 0, -1, -2)]
        >>> [str(w) for w in adams_weights(times, explicit=True)]
        ['23/12', '-4/3', '5/12']
        >>> [str(w) for w in adams_weights(times, explicit=False)]
        ['3/8', '19/24', '-5/24', '1/24']
    """
    nodes = times[explicit:]
    h = times[0] - times[1]
    places = tuple((nodes[0] - t) / h for t in nodes)
    floats = all(isinstance(x, float) for x in places)
    return [h * w for w in (_unit_weights if floats else _vandermonde)(places, explicit)]


def _vandermonde(places: Sequence[Any], explicit: bool) -> list[Any]:
    """The weights that integrate all powers, by Bjorck and Pereyra 1970, Math. Comp. 24.

    ``places`` are distances from the newest slope in units of the step, which lies at -1 ... 0
    (explicit) or 0 ... 1. Ordered so, all rounding errors stay small.
    """
    x, n = places, len(places)
    one = x[0] * 0 + 1
    w = [(-one if explicit and q % 2 else one) / (q + 1) for q in range(n)]
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            w[i] = w[i] - x[k] * w[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            w[i] = w[i] / (x[i] - x[i - k - 1])
        for i in range(k, n - 1):
            w[i] = w[i] - w[i + 1]
    return w


_unit_weights = functools.lru_cache(maxsize=4096)(_vandermonde)


def weight_slopes(times: Sequence[float], explicit: bool) -> list[list[float]]:
    """Derivatives of the weights with respect to the times: one row for each weight.

    With ``p`` the polynomial through given slopes, moving the end of the integral changes it by
    ``p`` there, and moving the node ``t_i`` of ``p`` changes ``p`` by ``-p'(t_i) l_i``.
    """
    nodes = times[explicit:]
    weights = adams_weights(times, explicit)
    scales = [1.0] * len(nodes)
    for i, j in itertools.permutations(range(len(nodes)), 2):
        scales[i] /= nodes[i] - nodes[j]
    rows = []
    for j, node in enumerate(nodes):
        row = [_lagrange(nodes, j, times[0]), -_lagrange(nodes, j, times[1])]
        row += [0.0] * (len(times) - 2)
        for i, other in enumerate(nodes):
            if i == j:
                slope = sum(1.0 / (node - x) for x in nodes if x != node)
            else:
                slope = scales[j] / (scales[i] * (other - node))
            row[i + explicit] -= weights[i] * slope
        rows.append(row)
    return rows


def _lagrange(nodes: Sequence[float], j: int, t: float) -> float:
    value = 1.0
    for i, node in enumerate(nodes):
        if i != j:
            value *= (t - node) / (nodes[j] - node)
    return value


# States and steps ------------------------------------------------------------------------------


class Slope(NamedTuple):
    """A slope and its time; ``k`` is None where only the time is known."""

    t: Time
    k: Tensor | None


class AdamsState(NamedTuple):
    """Time, solution, the stage there, and the slopes before it, newest first."""

    t: Time
    y: Tensor
    node: Stage
    past: tuple[Slope, ...] = ()

    @property
    def times(self) -> tuple[Time, ...]:
        """The times of all slopes, newest first."""
        return (self.t, *(slope.t for slope in self.past))

    @property
    def alone(self) -> RKState:
        """What a one-step method sees."""
        return RKState(self.t, self.y, self.node)


@dataclass(slots=True)
class AdamsStep:
    """A step: the stages from its start over those of the iteration to its end.

    Attributes:
        start: The state it starts from.
        t1: Where it ends.
        stages: Its stages.
        starting: The step of the one-step method, where the slopes are still too few.
    """

    start: AdamsState
    t1: Time
    stages: list[Stage]
    starting: RKStep | None = None

    @property
    def h(self) -> Time:
        return self.t1 - self.start.t

    @property
    def node(self) -> Stage:
        return self.stages[-1 if self.starting is None else self.starting.node]

    @property
    def y1(self) -> Tensor:
        return self.node.x

    @property
    def further(self) -> int:
        """Stages between the ends."""
        return len(self.stages) - 2 if self.starting is None else self.starting.node - 1


@dataclass
class _Adams:
    """What the two methods share."""

    max_order: int = _MOST
    start: str = "rk4"
    interp: Literal["cubic", "linear"] = "cubic"
    name: str = field(init=False, repr=False)
    order: int = field(init=False, repr=False)
    error_order: int | None = field(init=False, repr=False, default=None)
    work: Work = field(init=False, repr=False)
    starter: ExplicitRK = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 2 <= self.max_order <= _MOST:
            raise ArgumentError(
                f"max_order = {self.max_order} is out of range; {self.name!r} takes 2 to {_MOST}"
            )
        if self.interp not in _BETWEEN:
            raise UnknownNameError("interp", self.interp, _BETWEEN)
        tableau = tableaus.get(self.start)
        cubic = self.interp == "cubic"
        between = hermite(tableau.b, order=min(3, tableau.order)) if cubic else linear(tableau.b)
        self.starter = ExplicitRK(tableau, between)
        self.work = Work(inner=0, dense_node=cubic, varies=True)

    # Forward ---------------------------------------------------------------------------------

    def begin(self, t: Time, y: Tensor) -> AdamsState:
        return AdamsState(t, y, Stage(t, y))

    def slope(self, field: Field, state: AdamsState) -> Tensor:
        return field.value(state.node)

    def step(
        self, field: Field, state: AdamsState, t1: Time, tokens: Sequence[RandomState | None] = ()
    ) -> AdamsStep:
        if self._starts(state):
            starting = self.starter.step(field, state.alone, t1, tokens)
            return AdamsStep(state, t1, starting.stages, starting)
        step = AdamsStep(state, t1, [state.node])
        self._advance(field, step, tokens)
        return step

    def _starts(self, state: AdamsState) -> bool:
        """Whether there are too few slopes to be as good as the one-step method."""
        return len(state.past) + 2 < min(self.starter.order, self.max_order)

    def _advance(self, field: Field, step: AdamsStep, tokens: Sequence[RandomState | None]) -> None:
        """Find the points of a step."""
        raise NotImplementedError

    def _increments(self, field: Field, step: AdamsStep) -> Iterator[Tensor]:
        """``d`` of the points ``y + d``, each found from ``f`` at the point before it."""
        raise NotImplementedError

    def _slopes(self, field: Field, state: AdamsState) -> list[Tensor]:
        slopes = [field.value(state.node)]
        for slope in state.past:
            assert slope.k is not None
            slopes.append(slope.k)
        return slopes

    def error(self, field: Field, step: AdamsStep) -> Tensor:
        raise NotImplementedError("Adams methods estimate no error")

    def end(self, step: AdamsStep) -> AdamsState:
        past = (Slope(step.start.t, step.stages[0].k), *step.start.past)
        return AdamsState(step.t1, step.y1, step.node, past[: self.max_order - 2])

    def stages(self, step: AdamsStep) -> Sequence[Stage]:
        return step.stages

    def carried(self, state: AdamsState) -> tuple[Tensor, ...]:
        """The solution and, once there are any, the times of the slopes before it, and these."""
        if not state.past:
            return (state.y,)
        return (state.y, _stacked(state.past), *(s.k for s in state.past if s.k is not None))

    def resume(self, t: Time, tensors: Sequence[Tensor], token: RandomState | None) -> AdamsState:
        y, *rest = tensors
        past: tuple[Slope, ...] = ()
        if rest:
            # Tensors where the time of the state is one, too: then their gradients are wanted.
            times = rest[0].unbind() if isinstance(t, Tensor) else rest[0].tolist()
            past = tuple(map(Slope, times, rest[1:]))
        return AdamsState(t, y, Stage(t, y, None, token), past)

    def interpolate(self, field: Field, step: AdamsStep, theta: Tensor) -> Tensor:
        if step.starting is not None:
            return self.starter.interpolate(field, step.starting, theta)
        y = step.start.y
        basis = _BETWEEN[self.interp]
        parts = [step.y1 - y]
        if len(basis) > 1:
            ends = (step.stages[0], step.node)
            parts += [scaled(step.h, field.value(stage)) for stage in ends]
        weights = (powers(theta, basis.shape[1]) @ basis.T).to(y)
        between: Tensor = y + torch.tensordot(weights, torch.stack(parts), dims=1)
        return between

    # Keeping ---------------------------------------------------------------------------------

    def save(self, step: AdamsStep, stages: bool) -> Saved:
        tokens = tuple(stage.token for stage in step.stages)
        if not stages:
            return Saved(self.carried(step.start), tokens)
        points = (stage.x for stage in step.stages[1 : 1 + step.further])
        return Saved((step.start.y, _stacked(step.start.past), *points), tokens, stages=True)

    def load(
        self,
        field: DetachedField,
        start: Time,
        t1: Time,
        saved: Saved,
        end: AdamsState,
        dense: bool,
    ) -> AdamsStep:
        tokens = saved.tokens
        if saved.stages:
            y, times, *points = saved.tensors
            past = tuple(Slope(t, None) for t in times.tolist())
            state = AdamsState(start, y, Stage(start, y, None, tokens[0]), past)
        else:
            points = []
            state = self.resume(start, saved.tensors, tokens[0])
        if self._starts(state):
            kept = Saved((state.y, *points), tokens)
            starting = self.starter.load(field, start, t1, kept, end.alone, dense)
            state = state._replace(node=starting.start.node)
            return AdamsStep(state, t1, starting.stages, starting)
        step = AdamsStep(state, t1, [state.node])
        again = (state.y + d for d in self._increments(field, step))
        for token, x in zip(tokens[1:-1], points if saved.stages else again, strict=False):
            step.stages.append(Stage(t1, x, None, token))
        step.stages.append(end.node)
        return step

    # Reverse ---------------------------------------------------------------------------------

    def transpose(
        self,
        reversal: Reversal,
        n: int,
        step: AdamsStep,
        cotangent: Cotangent,
        dense: DenseCotangent | None,
    ) -> Cotangent:
        newest, *past = cotangent.past or [SlopeCotangent()]
        if step.starting is not None:
            end = Cotangent(cotangent.y, cotangent.k, cotangent.on_value)
            back = self.starter.transpose(reversal, n, step.starting, end, dense)
            newest.add(back.k, *back.on_value)
            return Cotangent(back.y, newest.k, newest.on_value, past)
        sweep = _Transpose(reversal, n, step, dense, self.interp)
        lam = sweep.pull_node(cotangent)
        slopes = [newest, *past]
        slopes += (SlopeCotangent() for _ in range(len(step.start.times) - len(slopes)))
        lam = self._reverse(sweep, lam, slopes)
        newest.add(*sweep.start_share())
        return Cotangent(lam + sweep.y_share(), newest.k, newest.on_value, slopes[1:])

    def _reverse(self, sweep: _Transpose, lam: Tensor, slopes: list[SlopeCotangent]) -> Tensor:
        """Reverse ``_advance``: from the cotangent of ``y1`` to those of the slopes and ``y``."""
        raise NotImplementedError

    def transpose_begin(
        self, reversal: Reversal, state: AdamsState, cotangent: Cotangent, n: int = 0
    ) -> Tensor:
        return self.starter.transpose_begin(reversal, state.alone, cotangent, n)


@dataclass
class ExplicitAdams(_Adams):
    """The Adams-Bashforth method, on a fixed grid.

    Its order is one less than ``max_order``, which counts the corrector as torchdiffeq's does, and
    at most that of the one-step method that starts it, whose steps are taken until ``min(max_order,
    order of start) - 1`` slopes are known. From there on each step weighs one slope more, up to
    ``max_order - 1``.

    Args:
        max_order: Order of the predictor-corrector pair whose predictor this is, 2 to 12.
        start: Name of the explicit Runge-Kutta method of the first steps.
        interp: Values inside a step: "cubic" (Hermite, order 3) or "linear".

    Raises:
        ArgumentError: ``max_order`` is out of range.

    Example:
        >>> ExplicitAdams(max_order=4).order, ExplicitAdams().order
        (3, 4)
        >>> ExplicitAdams(max_order=9, start="dopri8").order
        8
    """

    def __post_init__(self) -> None:
        self.name = "explicit_adams"
        super().__post_init__()
        self.order = min(self.max_order - 1, self.starter.order)

    def _advance(self, field: Field, step: AdamsStep, tokens: Sequence[RandomState | None]) -> None:
        x = step.start.y + next(self._increments(field, step))
        step.stages.append(Stage(step.t1, x, None, tokens[1] if tokens else None))

    def _increments(self, field: Field, step: AdamsStep) -> Iterator[Tensor]:
        slopes = self._slopes(field, step.start)
        yield _sum(adams_weights((step.t1, *step.start.times), explicit=True), slopes)

    def _reverse(self, sweep: _Transpose, lam: Tensor, slopes: list[SlopeCotangent]) -> Tensor:
        sweep.scatter(lam, slopes, explicit=True)
        return lam


@dataclass
class ImplicitAdams(_Adams):
    """The Adams-Moulton method, on a fixed grid: P(EC)^m E with the Adams-Bashforth predictor.

    The corrector is iterated until an iteration changes no element of the increment ``d = y1 - y``
    by more than ``atol + rtol |d|``, at most ``max_iters`` times; the gradient is that of the
    iterations made. The order is ``max_order``, and at most one more than that of the one-step
    method that starts it, whose steps are taken until ``min(max_order, order of start) - 1`` slopes
    are known.

    Args:
        max_order: Order of the corrector, 2 to 12.
        start: Name of the explicit Runge-Kutta method of the first steps.
        interp: Values inside a step: "cubic" (Hermite, order 3) or "linear".
        max_iters: Greatest number of iterations in a step.
        rtol: Relative tolerance of the iteration; that of the solve where None.
        atol: Absolute tolerance of the iteration; that of the solve where None.

    Raises:
        ArgumentError: ``max_order`` or ``max_iters`` is out of range.

    Example:
        >>> ImplicitAdams(max_order=4).order, ImplicitAdams().order
        (4, 5)
    """

    max_iters: int = 4
    rtol: float | Tensor | None = None
    atol: float | Tensor | None = None

    def __post_init__(self) -> None:
        self.name = "implicit_adams"
        super().__post_init__()
        if self.max_iters < 1:
            raise ArgumentError(f"max_iters = {self.max_iters} must be at least 1")
        self.order = min(self.max_order, self.starter.order + 1)

    def within(self, rtol: float | Tensor, atol: float | Tensor) -> ImplicitAdams:
        """The method, iterating to these tolerances unless it has its own."""
        return replace(
            self,
            rtol=rtol if self.rtol is None else self.rtol,
            atol=atol if self.atol is None else self.atol,
        )

    def _advance(self, field: Field, step: AdamsStep, tokens: Sequence[RandomState | None]) -> None:
        increments = self._increments(field, step)
        d = next(increments)
        for token in tokens[1:-1] or [None] * self.max_iters:
            step.stages.append(Stage(step.t1, step.start.y + d, None, token))
            last, d = d, next(increments)
            if not tokens and self._converged(last, d):
                break
        else:
            if not tokens:
                warnings.warn(_SLOW, ConvergenceWarning, stacklevel=2)
        token = tokens[-1] if tokens else None
        step.stages.append(Stage(step.t1, step.start.y + d, None, token))

    def _increments(self, field: Field, step: AdamsStep) -> Iterator[Tensor]:
        times, slopes = (step.t1, *step.start.times), self._slopes(field, step.start)
        yield _sum(adams_weights(times, explicit=True), slopes)
        first, *weights = adams_weights(times, explicit=False)
        known = _sum(weights, slopes)
        while True:
            yield known + scaled(first, field.evaluate(step.stages[-1]))

    def _converged(self, last: Tensor, d: Tensor) -> bool:
        last, d = last.detach(), d.detach()
        size = torch.maximum(last.abs(), d.abs())
        allowed = size * (self.rtol or 0.0) + (self.atol or 0.0)
        return bool(((d - last).abs() <= allowed).all())

    def _reverse(self, sweep: _Transpose, lam: Tensor, slopes: list[SlopeCotangent]) -> Tensor:
        total = torch.zeros_like(lam)
        for i in range(sweep.step.further, 0, -1):
            total += lam
            lam = sweep.pull(i, lam)
        sweep.scatter(total, slopes, explicit=False)
        sweep.scatter(lam, slopes, explicit=True)
        return total + lam


_SLOW = (
    "functional iteration of implicit_adams did not reach rtol and atol in max_iters iterations; "
    "the solution is that of the iterations made. Take smaller steps, raise max_iters, loosen rtol "
    "and atol, or use another implicit method if the problem is stiff"
)


class _Transpose:
    """The reverse recursion through one step."""

    def __init__(
        self,
        reversal: Reversal,
        n: int,
        step: AdamsStep,
        dense: DenseCotangent | None,
        interp: str,
    ) -> None:
        self.field = reversal.field
        self.n = n
        self.step = step
        self.h = as_float(step.h)
        self.times = tuple(map(as_float, (step.t1, *step.start.times)))
        span = range(n + 2 - len(self.times), n + 2)
        self.span = slice(span.start, span.stop)
        wanted = reversal.times is not None and any(map(reversal.times.wanted, span))
        self.cotangents = reversal.times if wanted else None
        self.dense = dense
        self.basis = _BETWEEN[interp]
        self.shares = self._dense_shares()
        # Asked for again by every iteration of the corrector.
        self._weights = functools.cache(functools.partial(adams_weights, self.times))
        device = reversal.field.device
        self._moved = functools.cache(functools.partial(_moved_weights, self.times, device))

    def pull_node(self, cotangent: Cotangent) -> Tensor:
        """The cotangent of ``y1``, its slope pulled back."""
        lam = cotangent.y if self.dense is None else cotangent.y + self.shares[0]
        k = cotangent.k
        if len(self.shares) > 1:
            own = self.h * self.shares[2]
            k = own if k is None else k + own
        if k is None:
            return lam
        pulled = self.field.pull(self.step.node, k, self.cotangents is not None)
        for report in cotangent.on_value:
            report(pulled.k)
        if len(self.shares) > 1:
            self._report_end(2, pulled.k)
        if self.cotangents is not None and pulled.time is not None:
            self.cotangents.add_time(self.n, 1.0, pulled.time)
        return lam + pulled.v

    def pull(self, i: int, lam: Tensor) -> Tensor:
        """The cotangent of the point of iteration ``i`` from that of the next point."""
        weight = self._weights(False)[0]
        pulled = self.field.pull(self.step.stages[i], lam * weight, self.cotangents is not None)
        if self.cotangents is not None:
            self._report_slope(self._moved(False)[0], lam, pulled.k)
            if pulled.time is not None:
                self.cotangents.add_time(self.n, 1.0, pulled.time)
        return pulled.v

    def scatter(self, lam: Tensor, slopes: Sequence[SlopeCotangent], explicit: bool) -> None:
        """Add the weights' share of ``lam`` to the cotangents of all known slopes."""
        weights = self._weights(explicit)[0 if explicit else 1 :]
        for slope, weight in zip(slopes, weights, strict=True):
            slope.add_scaled(lam, weight)
        if self.cotangents is not None:
            rows = self._moved(explicit)[0 if explicit else 1 :]
            for slope, row in zip(slopes, rows, strict=True):
                slope.on_value.append(functools.partial(self._report_slope, row, lam))

    def start_share(self) -> tuple[Any, ...]:
        """What outputs inside the step put on the slope at its start, and who wants its value."""
        if len(self.shares) < 2:
            return (None,)
        return self.h * self.shares[1], functools.partial(self._report_end, 1)

    def y_share(self) -> Tensor | float:
        """What outputs inside the step put on ``y``."""
        if self.dense is None:
            return 0.0
        if self.dense.slopes is not None:
            rise = self.step.y1 - self.step.start.y
            self.dense.slopes += self._along(0, rise)
        share: Tensor = self.dense.g.sum(0) - self.shares[0]
        return share

    def _report_slope(self, row: Tensor, lam: Tensor, k: Tensor) -> None:
        """With a slope known: what its weight's dependence on the step times contributes."""
        assert self.cotangents is not None
        self.cotangents.values[self.span] += dot(k, lam) * row

    def _report_end(self, share: int, k: Tensor) -> None:
        """With the slope at an end known: cotangents of the step size and of ``theta``."""
        dense = self.dense
        assert dense is not None
        if self.cotangents is not None:
            self.cotangents.add_size(self.n, dot(k, self.shares[share]))
        if dense.slopes is not None:
            dense.slopes += self.h * self._along(share, k)

    def _along(self, share: int, x: Tensor) -> Tensor:
        """Slopes in ``theta`` of one part of the outputs, along their cotangents."""
        assert self.dense is not None
        g, row = self.dense.g, self.basis[share]
        slopes = (power_slopes(self.dense.theta, len(row)) @ row).to(g.device)
        return slopes * (g.reshape(len(g), -1).conj() @ x.reshape(-1)).real

    def _dense_shares(self) -> Sequence[Tensor]:
        if self.dense is None:
            return ()
        weights = powers(self.dense.theta, self.basis.shape[1]) @ self.basis.T
        shares: Tensor = torch.tensordot(weights.T.to(self.dense.g), self.dense.g, dims=1)
        return shares.unbind()


def _moved_weights(times: Sequence[float], device: torch.device, explicit: bool) -> Tensor:
    """Derivatives of the weights with respect to the step times, oldest first."""
    return torch.tensor(weight_slopes(times, explicit), dtype=torch.float64).flip(1).to(device)


def _sum(weights: Sequence[Time], slopes: Sequence[Tensor]) -> Tensor:
    """``sum_j w_j k_j``."""
    if any(isinstance(w, Tensor) for w in weights):
        parts = [scaled(w, k) for w, k in zip(weights, slopes, strict=True)]
        return sum(parts[1:], start=parts[0])
    total = torch.mul(slopes[0], weights[0])
    for weight, k in zip(weights[1:], slopes[1:], strict=True):
        total.add_(k, alpha=as_float(weight))
    return total


def _stacked(past: Sequence[Slope]) -> Tensor:
    """The times of slopes as a float64 tensor on the CPU."""
    times = [slope.t for slope in past]
    if any(isinstance(t, Tensor) for t in times):
        return torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in times])
    return torch.tensor(times, dtype=torch.float64)
