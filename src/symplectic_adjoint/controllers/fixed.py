"""Fixed time grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, NonlinearSolveError
from symplectic_adjoint._types import Func
from symplectic_adjoint.controllers._base import Setting, finite, non_finite, number
from symplectic_adjoint.field import Field
from symplectic_adjoint.steppers import Stepper


@dataclass(frozen=True)
class FixedGrid:
    """Steps on a grid that is known before the solve.

    Attributes:
        step_size: Size of all steps but the last, which ends at ``t[-1]``. The grid starts at
            ``t[0]``. Without it, and without ``grid_constructor``, the grid is ``t`` itself.
        grid_constructor: ``(func, y0, t) -> grid``, a 1-D tensor from ``t[0]`` to ``t[-1]``. Where
            it is computed from ``t`` differentiably, gradients with respect to ``t`` follow it.
        perturb: Evaluate ``func`` just after the time at which each step starts and just before the
            time at which it ends, so that a jump of ``func`` may lie on the grid.

    Example:
        >>> t = torch.tensor([0.0, 1.0])
        >>> FixedGrid(step_size=0.4).grid(None, None, t).tolist()
        [0.0, 0.4, 0.8, 1.0]
    """

    step_size: float | None = None
    grid_constructor: Callable[[Func, Any, Tensor], Tensor] | None = None
    perturb: bool = False

    def __post_init__(self) -> None:
        if self.step_size is not None and self.grid_constructor is not None:
            raise ArgumentError("give step_size or grid_constructor, not both")
        if self.step_size is not None:
            object.__setattr__(self, "step_size", number("step_size", self.step_size))
        if self.grid_constructor is not None and not callable(self.grid_constructor):
            raise ArgumentError(
                f"grid_constructor = {self.grid_constructor!r} must be a function of (func, y0, t)"
            )
        if self.perturb not in (False, True):
            raise ArgumentError(f"perturb = {self.perturb!r} must be True or False")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ArgumentError(f"step_size = {self.step_size} must be positive and finite")

    def grid(self, func: Any, y0: Any, t: Tensor) -> Tensor:
        """The step times, float64 on the CPU, attached to the graph of ``t``.

        Raises:
            ArgumentError: A constructed grid does not run monotonically from t[0] to t[-1].
        """
        if self.grid_constructor is not None:
            grid = self.grid_constructor(func, y0, t).to("cpu", torch.float64)
            _check_grid(grid.detach(), t.detach().to("cpu", torch.float64))
            return grid
        t = t.to("cpu", torch.float64)
        if self.step_size is None:
            return t
        span = float(t.detach()[-1] - t.detach()[0])
        # A last step shorter than rounding explains is merged into the one before.
        count = max(1, math.ceil(abs(span) / self.step_size - 1e-9))
        offsets = torch.arange(count, dtype=torch.float64) * math.copysign(self.step_size, span)
        return torch.cat([t[0] + offsets, t[-1:]])

    def begin(self, field: Field, stepper: Stepper, state: Any, setting: Setting) -> GridPace:
        """Follow ``setting.grid``, which ``grid`` gave."""
        return GridPace(setting.grid)


@dataclass
class GridPace:
    """Follows given times; ``checked`` reads every step back and stops at a non-finite one."""

    times: Sequence[float]
    checked: bool = False
    taken: int = 0

    def propose(self, t: float) -> float:
        return self.times[self.taken + 1]

    def accepts(self, field: Field, stepper: Stepper, step: Any, t: float, t1: float) -> bool:
        self.taken += 1
        stages = stepper.stages(step)
        if self.checked and not (
            finite(step.y1) and all(finite(s.k) for s in stages if s.k is not None)
        ):
            raise non_finite(field, stages, t, t1 - t, step.y1)
        return True

    def fail(self, error: NonlinearSolveError, t: float, t1: float) -> None:
        raise error

    def saved(self) -> dict[str, Any]:
        """What is known after a step, as plain values."""
        return {"taken": self.taken}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``saved`` has given."""
        self.taken = saved["taken"]


def _check_grid(grid: Tensor, t: Tensor) -> None:
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != t[0] or grid[-1] != t[-1]:
        raise ArgumentError(
            "grid_constructor must return a 1-D grid from t[0] to t[-1]: "
            f"t runs from {float(t[0])} to {float(t[-1])}, the grid is {grid}"
        )
    if not bool((grid.diff() * (t[-1] - t[0]).sign() > 0).all()):
        raise ArgumentError("grid_constructor must return a strictly monotone grid")
