"""Step sizes from the error estimate: I, PI and PID control in one formula."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from symplectic_adjoint._errors import (
    ArgumentError,
    NonFiniteError,
    NonlinearSolveError,
    StepLimitError,
    StepUnderflowError,
)
from symplectic_adjoint._types import Norm, as_float
from symplectic_adjoint.controllers._base import Pace, Setting, finite, no_times, non_finite, number
from symplectic_adjoint.field import Field, Stage
from symplectic_adjoint.steppers import Stepper

_NUMBERS = (
    *("pcoeff", "icoeff", "dcoeff", "safety", "factor_min", "factor_max"),
    *("min_step", "max_step", "first_step"),
)


@dataclass(frozen=True)
class LargestPart:
    """A norm: the largest root mean square of the parts that a flat state is made of.

    Attributes:
        sizes: Number of elements of each part.

    Example:
        >>> LargestPart((2, 1))(torch.tensor([3.0, 3.0, -4.0]))
        tensor(4.)
    """

    sizes: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of a state (n,)."""
        parts = [part for part in x.split(self.sizes) if part.numel()]
        means = [torch.linalg.vector_norm(part) / math.sqrt(part.numel()) for part in parts]
        return torch.stack(means).max() if means else x.real.sum()


@dataclass(frozen=True)
class Adaptive:
    """Accepts a step whose scaled error is at most 1 and derives the next size from it.

    With ``e_n`` the norm of the error estimate over ``atol + rtol max(|y|, |y1|)`` and ``q`` the
    order of the estimate, the factor between step sizes is

        safety * e_n^(-(p + i + d)/q) * e_{n-1}^((p + 2 d)/q) * e_{n-2}^(-d/q)

    with p, i, d = ``pcoeff, icoeff, dcoeff`` (Soderlind 2003, "Digital filters in adaptive
    time-stepping", ACM TOMS 29, section 3; Hairer, Norsett, Wanner I, section II.4, for the I
    controller and the choice of the first step). The defaults, an I controller, are torchdiffeq's.

    Attributes:
        pcoeff: Proportional coefficient; ``Adaptive.pi()`` is a good PI choice.
        icoeff: Integral coefficient.
        dcoeff: Derivative coefficient.
        safety: Safety factor.
        factor_min: Least factor after a rejected step; an accepted step never shrinks the next.
        factor_max: Greatest factor.
        min_step: Steps this small are accepted whatever their error.
        max_step: Greatest step size.
        max_steps: Greatest number of attempted steps.
        first_step: Size of the first step; chosen from two evaluations where None.
        norm: Norm of the scaled error; root mean square where None.
        step_t: Times (K,) at which a step shall end, such as kinks of ``func``; in any order. Those
            outside of the interval do not matter.
        jump_t: Times (J,) at which ``func`` jumps, likewise. There the step before sees ``func`` as
            it was, and the step after begins with a new evaluation just past the jump. A tensor
            that requires grad receives its gradient.

    Example:
        >>> Adaptive(max_step=0.1).max_step
        0.1
    """

    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float = 10.0
    min_step: float = 0.0
    max_step: float = math.inf
    max_steps: int = 2**31 - 1
    first_step: float | None = None
    norm: Norm | None = None
    step_t: Tensor | Sequence[float] | None = None
    jump_t: Tensor | Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            if (value := getattr(self, name)) is not None and type(value) is not float:
                object.__setattr__(self, name, number(name, value))
        if type(self.max_steps) is not int:
            object.__setattr__(self, "max_steps", int(number("max_steps", self.max_steps)))
        if self.norm is not None and not callable(self.norm):
            raise ArgumentError(f"norm = {self.norm!r} must be a function of the state")
        checks = {
            "safety": 0 < self.safety <= 1,
            "factor_min": 0 < self.factor_min < 1,
            "factor_max": self.factor_max >= 1,
            "min_step": 0 <= self.min_step < math.inf,
            "max_step": self.max_step > self.min_step,
            "max_steps": self.max_steps >= 1,
            "first_step": self.first_step is None or 0 < self.first_step < math.inf,
        }
        for f in fields(self):
            if not checks.get(f.name, True):
                raise ArgumentError(
                    f"{f.name} = {getattr(self, f.name)} is out of range; needed: 0 < safety <= 1, "
                    "0 < factor_min < 1 <= factor_max, 0 <= min_step < max_step, max_steps >= 1, "
                    "first_step > 0"
                )
        stops = torch.cat([_times("step_t", self.step_t), _times("jump_t", self.jump_t)]).tolist()
        repeated = [t for t, count in collections.Counter(stops).items() if count > 1]
        if repeated:
            raise ArgumentError(
                f"step_t and jump_t name t = {repeated[0]} more than once; remove the repetition"
            )

    @classmethod
    def pi(cls, **options: Any) -> Self:
        """A PI controller (p = 0.4, i = 0.3), smoother than the I controller on stiff stretches."""
        return cls(**{"pcoeff": 0.4, "icoeff": 0.3, **options})

    @classmethod
    def pid(cls, **options: Any) -> Self:
        """A PID controller (p = 0.3, i = 0.3, d = 0.1)."""
        return cls(**{"pcoeff": 0.3, "icoeff": 0.3, "dcoeff": 0.1, **options})

    def begin(self, field: Field, stepper: Stepper, state: Any, setting: Setting) -> Pace:
        """Start pacing a solve, choosing the first step.

        Raises:
            ArgumentError: The method estimates no error, or a tolerance is unusable.
        """
        if stepper.error_order is None:
            raise ArgumentError(
                f"method {stepper.name!r} has no error estimate, so its steps cannot adapt; use "
                "FixedGrid(step_size=...) or a method such as 'dopri5'"
            )
        _check_tolerances(setting)
        pace = AdaptivePace(self, setting, stepper.error_order)
        pace.stops.extend(self._stops(as_float(state.t), setting))
        pace.h = self._first(field, stepper, state, pace)
        return pace

    def jumps(self, start: float, end: float) -> Tensor:
        """The times from start to end at which ``func`` jumps, float64 on the graph of ``jump_t``.

        Example:
            >>> Adaptive(jump_t=[0.7, 2.0, 0.2]).jumps(1.0, 0.0).tolist()
            [0.7, 0.2]
        """
        if self.jump_t is None:
            return no_times()
        times = _times("jump_t", self.jump_t)
        return times[(times.detach() - start) * (times.detach() - end) <= 0]

    def _stops(self, start: float, setting: Setting) -> list[float]:
        """Where steps have to end before the last one, in their order."""
        given = {*_times("step_t", self.step_t).tolist(), *setting.jumps}
        inside = [t for t in given if (t - start) * (t - setting.end) < 0]
        return sorted(inside, reverse=setting.direction < 0)

    def _first(self, field: Field, stepper: Stepper, state: Any, pace: AdaptivePace) -> float:
        if self.first_step is not None:
            return min(self.first_step, self.max_step)
        t = as_float(state.t)
        span = abs(pace.next_stop(t) - t)
        return min(
            max(_select_first_step(field, stepper, state, pace, span), self.min_step), self.max_step
        )


@dataclass
class AdaptivePace:
    """An adaptive controller at work: the current size, the last errors, where to stop."""

    controller: Adaptive
    setting: Setting
    error_order: int
    h: float = 0.0
    attempts: int = 0
    errors: tuple[float, float] = (1.0, 1.0)
    history: collections.deque[tuple[float, float, float]] = field(
        default_factory=lambda: collections.deque(maxlen=5)
    )
    failed: NonFiniteError | NonlinearSolveError | None = None
    _tolerances: tuple[Tensor, Tensor] | None = None
    stops: collections.deque[float] = field(default_factory=collections.deque)

    def propose(self, t: float) -> float:
        if self.attempts >= self.controller.max_steps:
            raise StepLimitError(
                f"max_steps = {self.controller.max_steps} attempted steps did not reach t = "
                f"{self.setting.end:.17g}; stopped at t = {t:.17g}. {self._recent()} Loosen "
                "rtol/atol, raise max_steps, or use a stiffer method if the steps keep shrinking."
            )
        self.attempts += 1
        stop = self.next_stop(t)
        if self.h >= abs(stop - t) * (1 - 1e-10):
            return stop
        t1 = t + self.setting.direction * self.h
        if t1 == t:
            if self.failed is not None:
                raise self.failed
            raise StepUnderflowError(
                f"the step size {self.h:.3g} vanishes at t = {t:.17g}. {self._recent()} The "
                "problem is stiff or singular there, or the tolerances are below rounding: loosen "
                "rtol/atol, or use float64."
            )
        return t1

    def saved(self) -> dict[str, Any]:
        """What is known after an accepted step, as plain values."""
        return {
            "h": self.h,
            "attempts": self.attempts,
            "errors": self.errors,
            "history": list(self.history),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``saved`` has given."""
        self.h, self.attempts = saved["h"], saved["attempts"]
        last, before = saved["errors"]
        self.errors = (last, before)
        self.history.extend((t, h, error) for t, h, error in saved["history"])

    def next_stop(self, t: float) -> float:
        """Where the step from ``t`` has to end at the latest."""
        while self.stops and (self.stops[0] - t) * self.setting.direction <= 0:
            self.stops.popleft()
        return self.stops[0] if self.stops else self.setting.end

    def accepts(self, field: Field, stepper: Stepper, step: Any, t: float, t1: float) -> bool:
        # Not abs(t1 - t) alone, which rounds: a rejected size has to shrink at every attempt.
        h = min(self.h, abs(t1 - t))
        error = float(self.norm(stepper.error(field, step), step.start.y, step.y1))
        self.history.append((t, h, error))
        if not math.isfinite(error):
            self._reject_non_finite(field, stepper, step, t, h)
            return False
        accepted = error <= 1.0 or h <= self.controller.min_step
        size = h * self._factor(error, accepted)
        if accepted:
            # A step that was cut short says nothing against the size it would have had.
            size = max(size, self.h)
            self.errors = (max(error, 1e-10), self.errors[0])
            self.failed = None
        self.h = min(max(size, self.controller.min_step), self.controller.max_step)
        return accepted

    def fail(self, error: NonlinearSolveError, t: float, t1: float) -> None:
        h = min(self.h, abs(t1 - t))
        self.history.append((t, h, math.inf))
        self.failed = error
        if h <= self.controller.min_step:
            raise error
        self.h = max(h * self.controller.factor_min, self.controller.min_step)

    def norm(self, error: Tensor, y: Tensor, y1: Tensor) -> Tensor:
        """The norm of an error scaled by the tolerances."""
        size = torch.maximum(y.detach().abs(), y1.detach().abs())
        return self.scaled(error, size)

    def scaled(self, x: Tensor, size: Tensor) -> Tensor:
        """The norm of ``x`` where the solution has magnitude ``size``."""
        rtol, atol = self.tolerances(size)
        norm: Norm = self.controller.norm or torch.linalg.vector_norm
        return norm(x / torch.addcmul(atol, size, rtol))

    def tolerances(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """``rtol`` and ``atol`` as tensors beside the state: scaling an error is two operations.

        The root of the mean in the default norm is taken into them.
        """
        if self._tolerances is None:
            self._tolerances = self._beside(size)
        return self._tolerances

    def _beside(self, size: Tensor) -> tuple[Tensor, Tensor]:
        factor = 1.0 if self.controller.norm is not None else math.sqrt(max(size.numel(), 1))

        def beside(x: float | Tensor) -> Tensor:
            if isinstance(x, Tensor):
                return x.to(size.device, size.dtype) * factor
            return torch.full((), x * factor, dtype=size.dtype, device=size.device)

        return beside(self.setting.rtol), beside(self.setting.atol)

    def _factor(self, error: float, accepted: bool) -> float:
        c, q = self.controller, self.error_order
        if error == 0.0:
            return c.factor_max
        last, before = self.errors
        factor = (
            c.safety
            * math.pow(error, -(c.pcoeff + c.icoeff + c.dcoeff) / q)
            * math.pow(last, (c.pcoeff + 2 * c.dcoeff) / q)
            * math.pow(before, -c.dcoeff / q)
        )
        return min(max(factor, 1.0 if accepted else c.factor_min), c.factor_max)

    def _reject_non_finite(
        self, field: Field, stepper: Stepper, step: Any, t: float, h: float
    ) -> None:
        """A smaller step may avoid the value, unless ``f`` is not finite where the step starts."""
        signed = h * self.setting.direction
        self.failed = non_finite(field, stepper.stages(step), t, signed, step.y1)
        if not finite(stepper.slope(field, step.start)) or h <= self.controller.min_step:
            raise self.failed
        self.h = max(h * self.controller.factor_min, self.controller.min_step)

    def _recent(self) -> str:
        steps = "; ".join(f"t = {t:.6g}, h = {h:.3g}, error {e:.3g}" for t, h, e in self.history)
        return f"Last attempts (error relative to the tolerance): {steps}."


def _select_first_step(
    field: Field, stepper: Stepper, state: Any, pace: AdaptivePace, span: float
) -> float:
    """Hairer, Norsett, Wanner I, section II.4, "starting step size"."""
    t, y = as_float(state.t), state.y.detach()
    slope = stepper.slope(field, state).detach()
    size = y.abs()
    d0, d1 = torch.stack([pace.scaled(y, size), pace.scaled(slope, size)]).tolist()
    if not math.isfinite(d1):
        stage = Stage(t, y)
        stage.k = slope
        raise non_finite(field, [stage], t, 0.0, y)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, span)
    probe = Stage(t + pace.setting.direction * h0, y + (pace.setting.direction * h0) * slope)
    change = field.evaluate(probe).detach() - slope
    d2 = float(pace.scaled(change, size)) / h0
    if not math.isfinite(d2):
        return h0
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = max(1e-6, h0 * 1e-3)
    else:
        h1 = (0.01 / max(d1, d2)) ** (1.0 / pace.error_order)
    return min(100 * h0, h1, span)


def _times(name: str, times: Tensor | Sequence[float] | None) -> Tensor:
    """Times as a float64 tensor on the CPU, on the caller's graph.

    Raises:
        ArgumentError: They are no 1-D sequence of finite real numbers.
    """
    if times is None:
        return no_times()
    try:
        result = times if isinstance(times, Tensor) else torch.tensor(times, dtype=torch.float64)
        if result.is_complex() or result.dtype == torch.bool:
            raise TypeError
        result = result.to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} = {times!r} must be a 1-D tensor or list of times") from error
    if result.ndim != 1 or not bool(torch.isfinite(result.detach()).all()):
        raise ArgumentError(
            f"{name} must be a 1-D tensor or list of finite times, e.g. torch.tensor([0.5]), but "
            f"is {times!r}"
        )
    return result


def _check_tolerances(setting: Setting) -> None:
    for name, value in (("rtol", setting.rtol), ("atol", setting.atol)):
        low = float(value.min()) if isinstance(value, Tensor) else value
        if not 0 <= low < math.inf:
            raise ArgumentError(f"{name} = {value} must be non-negative and finite")
    if not any(isinstance(x, Tensor) or x > 0 for x in (setting.rtol, setting.atol)):
        raise ArgumentError("rtol and atol are both zero; give at least one tolerance")
