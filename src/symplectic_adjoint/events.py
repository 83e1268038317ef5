"""Events: where a function of the solution changes its sign, found on the dense output of a step.

After each accepted step every event function is evaluated at the new state. Where its sign has
changed, the time of the change is located by a bracketing root finder on the continuous extension
of that step, to the resolution of the time axis. Nothing there evaluates ``func`` but the stages
that the extension itself needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, EventOutputError, NonFiniteError
from symplectic_adjoint._tree import StateSpec
from symplectic_adjoint._types import as_float
from symplectic_adjoint.capture import Capture
from symplectic_adjoint.field import Field
from symplectic_adjoint.steppers import Stepper

_START = 100.0
"""How many units of rounding after the start of a solve the signs there are read."""


@dataclass(frozen=True)
class Event:
    """Ends a solve where a function of time and state changes its sign.

    Attributes:
        func: ``(t, y, *args) -> value``, a real tensor of any shape with ``y`` like ``y0``. Each of
            its elements is an event of its own; the first to change its sign ends the solve.
        direction: +1 counts changes from negative to positive in the course of the solve, -1 those
            from positive to negative, 0 both.
        samples: At how many places inside each step the sign is examined as well. A function that
            changes its sign twice within a step shows none of it at the step's ends.

    Raises:
        ArgumentError: An attribute is unusable.

    Example:
        >>> import symplectic_adjoint as sa
        >>> ground = sa.Event(lambda t, y: y[0], direction=-1)
        >>> fall = lambda t, y: torch.stack([y[1], -torch.ones_like(y[1])])
        >>> sol = sa.solve(fall, torch.tensor([0.5, 0.0]), [0.0, 10.0], event=ground)
        >>> round(sol.event.t.item(), 4), sol.status.value
        (1.0, 'event')
    """

    func: Callable[..., Tensor]
    direction: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        if not callable(self.func):
            raise ArgumentError(
                f"event function {self.func!r} is not callable; give event(t, y) -> value"
            )
        if self.direction not in (-1, 0, 1):
            raise ArgumentError(
                f"direction = {self.direction!r} must be 1 (rising), -1 (falling) or 0 (both)"
            )
        if self.samples < 0:
            raise ArgumentError(f"samples = {self.samples!r} must not be negative")


@dataclass
class Crossing:
    """An event that ended a solve.

    Attributes:
        t: Its time: 0-dim, float64 on the CPU, on the caller's graph.
        y: The state there, like ``y0``, likewise.
        index: Which of the events it was.
        component: Which element of the event function's (raveled) value.
    """

    t: Tensor
    y: Any
    index: int = 0
    component: int = 0


def listed(event: Any) -> tuple[Event, ...]:
    """The events of a caller: None, an event function, an ``Event``, or a sequence of these.

    Raises:
        ArgumentError: It is none of them.
    """
    if event is None:
        return ()
    if isinstance(event, list | tuple):
        return tuple(each if isinstance(each, Event) else Event(each) for each in event)
    return (event if isinstance(event, Event) else Event(event),)


@dataclass(frozen=True)
class FlatEvent:
    """An event on the flat state, its value checked and raveled.

    Attributes:
        event: The caller's.
        index: Which of the caller's events it is.
        spec: How the caller's state maps onto the flat one.
        args: Further arguments of its function.
        capture: The tensors that its function depends on.
    """

    event: Event
    index: int
    spec: StateSpec
    args: Sequence[Any]
    capture: Capture

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The value at a time and a flat state, (m,).

        Raises:
            EventOutputError: It is no real floating-point tensor, or empty.
        """
        value = self.event.func(t, self.spec.unflatten(y), *self.args)
        if not isinstance(value, Tensor):
            raise EventOutputError(
                f"{self.name} must return a tensor that changes its sign, but returned "
                f"{type(value).__name__}; compute it from t and y by torch functions"
            )
        if not value.is_floating_point() or value.numel() == 0:
            raise EventOutputError(
                f"{self.name} returned dtype {value.dtype} and shape {tuple(value.shape)}; return "
                "one or more real numbers that change their sign, e.g. y[0] - 1.0 for y[0] > 1"
            )
        return value.reshape(-1)

    @property
    def name(self) -> str:
        """The event in messages."""
        return f"event {self.index} ({getattr(self.event.func, '__name__', self.event.func)})"


@dataclass(frozen=True)
class Root:
    """A sign change as it was located.

    Attributes:
        event: Whose it is.
        component: Which element of its value.
        t: Its time.
        slope: The time derivative of the dense output there.
    """

    event: FlatEvent
    component: int
    t: float
    slope: Tensor


@dataclass
class Watch:
    """Looks for sign changes while a solve runs.

    An event that is zero at the start, to rounding, does not occur there: the first signs are
    those a little later, ``y0`` moved along its slope by a hundred units of rounding.

    Attributes:
        events: What to look for.
        time: The time last examined.
        values: The values there, of all components of all events.
        signs: The last of their signs that were not zero.
        counts: How many components each event has.
    """

    events: Sequence[FlatEvent]
    time: float = 0.0
    values: Sequence[float] = ()
    signs: Sequence[float] = ()
    counts: Sequence[int] = ()

    def __call__(self, field: Field, stepper: Stepper, step: Any) -> Root | None:
        """The first event within an accepted step, or None.

        Raises:
            NonFiniteError: An event function returned NaN.
            EventOutputError: It returned something unusable.
        """
        if not self.signs:
            self._begin(field, stepper, step)
        inside = _Inside(field, stepper, step)
        for t, y in self._places(inside):
            values = self._evaluate(field, t, y)
            crossed = [i for i, value in enumerate(values) if self._crosses(i, value)]
            if crossed:
                roots = [(self._locate(inside, i, t, values[i]), i) for i in crossed]
                return self._root(inside, *min(roots, key=lambda root: abs(root[0] - self.time)))
            self.time, self.values = t, values
            self.signs = [_sign(x) or s for x, s in zip(values, self.signs, strict=True)]
        return None

    def _begin(self, field: Field, stepper: Stepper, step: Any) -> None:
        t, y = as_float(step.start.t), step.start.y.detach()
        slope = stepper.slope(field, step.start).detach()
        h = as_float(step.t1) - t
        size, speed = (float(x.abs().max()) if x.numel() else 0.0 for x in (y, slope))
        units = max(abs(t), abs(h), size / speed if speed else 0.0)
        shift = math.copysign(min(_START * torch.finfo(y.dtype).eps * units, abs(h) / 8), h)
        values = [self._value(field, event, t + shift, y + shift * slope) for event in self.events]
        self.counts = [len(value) for value in values]
        self.time, self.values = t + shift, list(itertools.chain(*values))
        self.signs = [_sign(x) for x in self.values]

    def _places(self, inside: _Inside) -> Iterator[tuple[float, Tensor]]:
        samples = max(event.event.samples for event in self.events)
        for i in range(1, samples + 1):
            t = inside.t + (inside.t1 - inside.t) * i / (samples + 1)
            yield t, inside.at(t)
        yield inside.t1, inside.step.y1.detach()

    def _evaluate(self, field: Field, t: float, y: Tensor) -> list[float]:
        values = [self._value(field, event, t, y) for event in self.events]
        for event, count, value in zip(self.events, self.counts, values, strict=True):
            if len(value) != count:
                raise EventOutputError(
                    f"{event.name} returned {len(value)} values at t = {t:.17g} and {count} "
                    "before; their number must not change"
                )
        return list(itertools.chain(*values))

    def _value(self, field: Field, event: FlatEvent, t: float, y: Tensor) -> list[float]:
        # An alias, since the function may call requires_grad_() on its argument.
        value: list[float] = event(field.time(t), y.detach()).detach().tolist()
        for i, x in enumerate(value):
            if math.isnan(x):
                raise NonFiniteError(
                    f"{event.name} returned nan in component {i} at t = {t:.17g}. Check it at this "
                    "time and state; throw=False returns the solution before this step."
                )
        return value

    def _crosses(self, i: int, value: float) -> bool:
        """Whether component ``i`` has changed its sign in a direction that counts."""
        event, _ = self._owner(i)
        before = self.signs[i]
        rises, falls = before < 0 <= value, before > 0 >= value
        return (rises and event.event.direction >= 0) or (falls and event.event.direction <= 0)

    def _owner(self, i: int) -> tuple[FlatEvent, int]:
        """The event of a component, and its number within it."""
        for event, count in zip(self.events, self.counts, strict=True):
            if i < count:
                return event, i
            i -= count
        raise IndexError(i)

    def _locate(self, inside: _Inside, i: int, t: float, value: float) -> float:
        event, component = self._owner(i)

        def height(x: float) -> float:
            return self._value(inside.field, event, x, inside.at(x))[component]

        return bracketed_root(height, self.time, self.values[i], t, value)

    def _root(self, inside: _Inside, t: float, i: int) -> Root:
        return Root(*self._owner(i), t, inside.slope(t))


class _Inside:
    """The dense output of a step, with no graph."""

    def __init__(self, field: Field, stepper: Stepper, step: Any) -> None:
        self.field = field
        self.stepper = stepper
        self.step = step
        self.t, self.t1 = as_float(step.start.t), as_float(step.t1)
        self._ready = False

    def at(self, t: float) -> Tensor:
        """The flat state at a time."""
        self._prepare()
        with torch.no_grad():
            return self.stepper.interpolate(self.field, self.step, self._place(t))[0]

    def slope(self, t: float) -> Tensor:
        """Its time derivative there."""
        self._prepare()
        place = self._place(t).requires_grad_()
        with torch.enable_grad():
            y = self.stepper.interpolate(self.field, self.step, place)
            # The derivative by theta is that of a product with y, which is linear in its factor.
            factor = torch.zeros_like(y, requires_grad=True)
            (product,) = torch.autograd.grad(y, place, factor, create_graph=True)
            (slope,) = torch.autograd.grad(product.sum(), factor)
        return slope[0] / (self.t1 - self.t)

    def _prepare(self) -> None:
        """Evaluate the stages of the interpolant, in the grad mode in which outputs need them."""
        if not self._ready:
            self.stepper.interpolate(self.field, self.step, self._place(self.t1))
            self._ready = True

    def _place(self, t: float) -> Tensor:
        return torch.tensor([(t - self.t) / (self.t1 - self.t)], dtype=torch.float64)


def bracketed_root(f: Callable[[float], float], a: float, fa: float, b: float, fb: float) -> float:
    """Where ``f`` changes its sign between ``a`` and ``b``, to the resolution of floats.

    The ITP method (Oliveira and Takahashi 2020, "An enhancement of the bisection method average
    performance preserving minmax optimality", ACM TOMS 47(1), algorithm 1, with k1 = 0.2 / (b - a),
    k2 = 2, n0 = 1): superlinear where ``f`` is smooth, and never more than one evaluation beyond
    bisection's.

    Args:
        f: A function of one number.
        a: One end.
        fa: Its value there, not zero.
        b: The other end.
        fb: Its value there, zero or of the other sign.

    Returns:
        The end of the last bracket at which ``f`` is smaller.

    Example:
        >>> abs(bracketed_root(lambda x: x**2 - 2, 0.0, -2.0, 2.0, 2.0) - 2**0.5) < 1e-15
        True
    """
    if fb == 0:
        return b
    if a > b:
        a, fa, b, fb = b, fb, a, fa
    tolerance = math.ulp(max(abs(a), abs(b)))
    budget = math.ceil(math.log2(max((b - a) / (2 * tolerance), 1.0))) + 1
    rate = 0.2 / (b - a)
    while b - a > 2 * tolerance:
        x = _between(a, fa, b, fb, rate, tolerance * 2.0**budget)
        fx = f(x)
        if fx == 0:
            return x
        if (fx > 0) == (fb > 0):
            b, fb = x, fx
        else:
            a, fa = x, fx
        budget -= 1
    return a if abs(fa) <= abs(fb) else b


def _between(a: float, fa: float, b: float, fb: float, rate: float, radius: float) -> float:
    """The next point: interpolated, truncated towards the middle, projected near it."""
    middle = a + (b - a) / 2
    straight = a + (b - a) * (fa / (fa - fb)) if math.isfinite(fa - fb) else middle
    side = math.copysign(1.0, middle - straight)
    shift = rate * (b - a) ** 2
    x = straight + side * shift if shift <= abs(middle - straight) else middle
    allowed = max(radius - (b - a) / 2, 0.0)
    if abs(x - middle) > allowed:
        x = middle - side * allowed
    return x if a < x < b else middle


def _sign(x: float) -> float:
    return 0.0 if x == 0 else math.copysign(1.0, x)
