"""scipy's solvers as a method: one step from start to end, of which only scipy knows more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import (
    ArgumentError,
    NonFiniteError,
    StepUnderflowError,
    UnknownNameError,
)
from symplectic_adjoint._extras import require
from symplectic_adjoint._tree import as_real, as_state
from symplectic_adjoint._types import Time, as_float
from symplectic_adjoint.field import DetachedField, Field, RandomState, Stage
from symplectic_adjoint.steppers._base import (
    Cotangent,
    DenseCotangent,
    Reversal,
    Saved,
    Work,
)
from symplectic_adjoint.steppers.explicit_rk import RKState

_SOLVERS = ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")


@dataclass(slots=True)
class ScipyStep:
    """What scipy returned, and how often it called ``f``."""

    start: RKState
    t1: Time
    node: Stage
    solution: Any
    further: int

    @property
    def y1(self) -> Tensor:
        return self.node.x


@dataclass
class ScipySolver:
    """``scipy.integrate.solve_ivp`` on the state as one real vector in float64 on the CPU.

    ``func`` is called in the state's own dtype and on its device. scipy chooses its steps and does
    not say what it does in them, so their exact gradient does not exist: the gradient is the
    continuous adjoint's, solved with scipy, too.

    Args:
        solver: "RK23", "RK45", "DOP853", "Radau", "BDF" or "LSODA".
        min_step: Least step size; "LSODA" alone knows one.
        max_step: Greatest step size.
        rtol: Relative tolerance; that of the solve where None.
        atol: Absolute tolerance; that of the solve where None.

    Raises:
        MissingExtraError: scipy is not installed.
        UnknownNameError: scipy has no such solver.
        ArgumentError: The solver knows no least step size.

    Example:
        >>> import symplectic_adjoint as sa
        >>> t = torch.tensor([0.0, 1.0])
        >>> y = sa.solve(lambda t, y: -50 * y, torch.ones(1), t, method=ScipySolver("BDF")).y
        >>> bool(y[-1].abs() < 1e-6)
        True
    """

    solver: str = "LSODA"
    min_step: float = 0.0
    max_step: float = math.inf
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        self.name = "scipy_solver"
        self.order = 1
        self.error_order: int | None = None
        self.work = Work(inner=0, node=0, varies=True)
        if self.solver not in _SOLVERS:
            raise UnknownNameError("solver", self.solver, _SOLVERS)
        if self.min_step and self.solver != "LSODA":
            raise ArgumentError(
                f"scipy's {self.solver} knows no least step size; leave min_step out, or use LSODA"
            )
        self._integrate = require("scipy.integrate", extra="scipy")

    def within(self, rtol: float | Tensor, atol: float | Tensor) -> ScipySolver:
        """The method with these tolerances, unless it has its own.

        Raises:
            ArgumentError: A tolerance is no number.
        """
        rtol, atol = (
            _number(name, given if own is None else own)
            for name, given, own in (("rtol", rtol, self.rtol), ("atol", atol, self.atol))
        )
        return replace(self, rtol=rtol, atol=atol)

    def begin(self, t: Time, y: Tensor) -> RKState:
        return RKState(t, y, Stage(t, y))

    def slope(self, field: Field, state: RKState) -> Tensor:
        return field.value(state.node)

    def step(
        self, field: Field, state: RKState, t1: Time, tokens: Sequence[RandomState | None] = ()
    ) -> ScipyStep:
        y, t, end = state.y.detach(), as_float(state.t), as_float(t1)
        before = field.evaluations

        ends = {t: state.t, end: t1}  # which know their side of a jump

        def slope(time: float, x: Any) -> Any:
            stage = Stage(ends.get(float(time), float(time)), _shaped(x, y))
            return _flat(field.evaluate(stage)).numpy()

        options = {"min_step": self.min_step} if self.min_step else {}
        found = self._integrate.solve_ivp(
            slope,
            (t, end),
            _flat(y).numpy(),
            method=self.solver,
            dense_output=True,
            max_step=self.max_step,
            **{name: x for name, x in (("rtol", self.rtol), ("atol", self.atol)) if x is not None},
            **options,
        )
        y1 = _shaped(found.y[:, -1], y)
        self._check(found, y1)
        # Every evaluation but the one that the state is counted for.
        return ScipyStep(state, t1, Stage(t1, y1), found.sol, field.evaluations - before - 1)

    def _check(self, found: Any, y1: Tensor) -> None:
        reached = float(found.t[-1])
        if not bool(torch.isfinite(y1).all()):
            raise NonFiniteError(
                f"scipy's {self.solver} left a solution that is not finite before t = "
                f"{reached:.17g}. Check func, or shorten the interval if the solution grows "
                "without bound."
            )
        if not found.success:
            raise StepUnderflowError(
                f"scipy's {self.solver} stopped at t = {reached:.17g}: {found.message} Loosen rtol "
                "and atol, or choose another solver, such as 'Radau' where the problem is stiff."
            )

    def error(self, field: Field, step: ScipyStep) -> Tensor:
        raise NotImplementedError("scipy keeps its error estimates for itself")

    def end(self, step: ScipyStep) -> RKState:
        return RKState(step.t1, step.y1, step.node)

    def stages(self, step: ScipyStep) -> Sequence[Stage]:
        return (step.start.node, step.node)

    def carried(self, state: RKState) -> tuple[Tensor, ...]:
        return (state.y,)

    def resume(self, t: Time, tensors: Sequence[Tensor], token: RandomState | None) -> RKState:
        return RKState(t, tensors[0], Stage(t, tensors[0], None, token))

    def interpolate(self, field: Field, step: ScipyStep, theta: Tensor) -> Tensor:
        t, t1 = as_float(step.start.t), as_float(step.t1)
        return _shaped(step.solution((t + (t1 - t) * theta.detach()).numpy()).T, step.y1)

    def save(self, step: ScipyStep, stages: bool) -> Saved:
        return Saved(())

    def load(
        self, field: DetachedField, start: Time, t1: Time, saved: Saved, end: RKState, dense: bool
    ) -> ScipyStep:
        raise NotImplementedError("scipy's steps cannot be taken again")

    def transpose(
        self,
        reversal: Reversal,
        n: int,
        step: ScipyStep,
        cotangent: Cotangent,
        dense: DenseCotangent | None,
    ) -> Cotangent:
        raise NotImplementedError("scipy's steps cannot be transposed")

    def transpose_begin(
        self, reversal: Reversal, state: RKState, cotangent: Cotangent, n: int = 0
    ) -> Tensor:
        raise NotImplementedError("scipy's steps cannot be transposed")


def _flat(x: Tensor) -> Tensor:
    """A state as a real float64 vector on the CPU."""
    return as_real(x.detach(), 0).to("cpu", torch.float64).resolve_neg()


def _shaped(x: Any, like: Tensor) -> Tensor:
    """States (*lead, N) back from numpy, in memory of their own."""
    return as_state(torch.tensor(x, dtype=torch.float64), like).to(like.device, like.dtype)


def _number(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ArgumentError(
            f"{name} has shape {tuple(value.shape)}; scipy_solver takes one number for the state"
        )
    return float(value)
