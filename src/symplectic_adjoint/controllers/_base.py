"""What the loop asks of a step-size controller."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, NonFiniteError, NonlinearSolveError
from symplectic_adjoint._types import Time, as_float, one_sided
from symplectic_adjoint.field import Field, Stage
from symplectic_adjoint.steppers import Stepper


@dataclass(frozen=True)
class Setting:
    """What a controller may know of a solve.

    Attributes:
        end: The last time.
        direction: +1.0 when time increases, -1.0 when it decreases.
        rtol: Relative tolerance, a number or a tensor that broadcasts against the flat state.
        atol: Absolute tolerance, likewise.
        grid: The step times where they are known beforehand, otherwise empty.
        inputs: What requires grad, by name: ``"y0"``, and what stands during the solve for each
            tensor that ``f`` depends on.
        jumps: Times at which ``f`` jumps. A step that ends there sees ``f`` as it was before, and
            the next one begins anew.
    """

    end: float
    direction: float
    rtol: float | Tensor
    atol: float | Tensor
    grid: Sequence[float] = ()
    inputs: Sequence[tuple[str, Tensor]] = ()
    jumps: Collection[float] = frozenset()

    def starting(self, t: Time, value: float | None = None) -> Time:
        """A time (and its value) as the start of a step, which sees ``f`` after a jump."""
        return one_sided(t, self.direction) if self._jumps_at(t, value) else t

    def ending(self, t: Time, value: float | None = None) -> Time:
        """A time (and its value) as the end of a step, which sees ``f`` before a jump."""
        return one_sided(t, -self.direction) if self._jumps_at(t, value) else t

    def _jumps_at(self, t: Time, value: float | None) -> bool:
        return bool(self.jumps) and (as_float(t) if value is None else value) in self.jumps

    def cuts(self, t: float) -> bool:
        """Whether the step after the one that ends at ``t`` begins anew."""
        return t != self.end and t in self.jumps


class Pace(Protocol):
    """A controller at work on one solve: it proposes times and judges attempts."""

    def propose(self, t: float) -> float:
        """Where the step from ``t`` shall end.

        Raises:
            SolveError: There is no further step to take.
        """
        ...

    def accepts(self, field: Field, stepper: Stepper, step: Any, t: float, t1: float) -> bool:
        """Whether an attempted step counts.

        Raises:
            NonFiniteError: It holds a non-finite value that no smaller step would avoid.
        """
        ...

    def fail(self, error: NonlinearSolveError, t: float, t1: float) -> None:
        """The equations of an attempted step could not be solved.

        Raises:
            NonlinearSolveError: No smaller step may be tried.
        """
        ...


class Controller(Protocol):
    """Values only; ``begin`` makes the pace of one solve."""

    def begin(self, field: Field, stepper: Stepper, state: Any, setting: Setting) -> Pace:
        """Start pacing a solve from ``state``."""
        ...


def number(name: str, value: Any) -> float:
    """An option that is a number, as a float.

    Raises:
        ArgumentError: It is none, or a tensor that requires grad.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise ArgumentError(
            f"{name} requires grad, but step-size control is not differentiated; detach it"
        )
    try:
        if isinstance(value, str | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} = {value!r} must be a number") from error


def no_times() -> Tensor:
    """No times at all."""
    return torch.empty(0, dtype=torch.float64)


def non_finite(
    field: Field, stages: Sequence[Stage], t: float, h: float, y1: Tensor
) -> NonFiniteError:
    """The error that names the first non-finite value of a step."""
    for stage in stages:
        if stage.k is not None and (where := _first_bad(stage.k)) is not None:
            value, index = where
            return NonFiniteError(
                f"func returned {value} at t = {as_float(stage.t):.17g} for {field.locate(index)}, "
                f"in the step from t = {t:.17g} with h = {h:.3g}. Check func at this time and "
                "state; if the solution grows without bound, shorten the interval; "
                "throw=False returns the valid prefix."
            )
    value, index = _first_bad(y1) or ("a non-finite value", 0)
    return NonFiniteError(
        f"the solution became {value} at t = {t + h:.17g} in {field.locate(index)}, in the step "
        f"from t = {t:.17g} with h = {h:.3g}. Take smaller steps, or shorten the interval if the "
        "solution grows without bound; throw=False returns the valid prefix."
    )


def finite(x: Tensor) -> bool:
    """Whether all elements are finite (reads the device)."""
    return bool(torch.isfinite(x).all())


def _first_bad(x: Tensor) -> tuple[str, int] | None:
    bad = (~torch.isfinite(x.detach().reshape(-1))).nonzero()
    if not len(bad):
        return None
    index = int(bad[0])
    return str(x.detach().reshape(-1)[index].item()), index
