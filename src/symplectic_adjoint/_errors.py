"""Typed errors. Each message says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable
from typing import Any


class Status(enum.Enum):
    """How a solve ended."""

    SUCCESS = "success"
    NON_FINITE = "non-finite value"
    STEP_UNDERFLOW = "step underflow"
    STEP_LIMIT = "step limit"
    EVENT = "event"
    NO_EVENT = "no event"
    NO_CONVERGENCE = "no convergence"
    NO_MEMORY = "no memory"
    NO_STORE = "no store"


class SymplecticAdjointError(Exception):
    """Base class of every error of this library."""


class ArgumentError(SymplecticAdjointError, ValueError):
    """An argument is unusable; raised before anything is computed."""


class JobFolderError(ArgumentError):
    """A job folder cannot be used: another process works in it, or its files are no job's."""


class OtherJobError(JobFolderError):
    """A job folder holds another job; nothing in it was touched.

    Attributes:
        differences: What is different.
    """

    def __init__(self, message: str, differences: Iterable[str]) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class UnknownNameError(ArgumentError):
    """A method, strategy or option is unknown; the message names the nearest valid one.

    Example:
        >>> print(UnknownNameError("method", "dopri6", ["dopri5", "euler"]))
        unknown method 'dopri6'; did you mean 'dopri5'? Valid: 'dopri5', 'euler'
    """

    def __init__(self, kind: str, name: object, valid: Iterable[str]) -> None:
        names = sorted(valid)
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        super().__init__(f"unknown {kind} {name!r}{hint} Valid: {', '.join(map(repr, names))}")


class NotSeparableError(ArgumentError):
    """A splitting method was asked to solve a system whose parts do not move each other alone."""


class TableauError(SymplecticAdjointError, ValueError):
    """The coefficients of a method contradict its declared shape, order or sums."""


class FieldOutputError(SymplecticAdjointError, TypeError):
    """``func`` returned something that is not a derivative of the state."""


class CaptureError(SymplecticAdjointError, RuntimeError):
    """``func`` depends on a tensor that requires grad and that could not be found."""


class ChangedTensorError(SymplecticAdjointError, RuntimeError):
    """A tensor that ``func`` reads was changed in place between forward and backward pass."""


class EventOutputError(SymplecticAdjointError, TypeError):
    """An event function returned something that has no sign."""


class EventGradientError(SymplecticAdjointError, RuntimeError):
    """An event function has slope zero where it changes its sign: the time has no derivative."""


class SteadyStateError(SymplecticAdjointError, RuntimeError):
    """No steady state was reached, or one that is not isolated and so has no derivative."""


class SecondDerivativeError(SymplecticAdjointError, RuntimeError):
    """A second derivative was asked of a strategy that cannot give the right one."""


class CompilationError(SymplecticAdjointError, RuntimeError):
    """A solve cannot be compiled as asked; ``execution="eager"`` runs anything.

    Attributes:
        lasting: Whether ``func`` is the reason, and not what else was asked for.
    """

    def __init__(self, message: str, lasting: bool = True) -> None:
        super().__init__(message)
        self.lasting = lasting


class ExecutionWarning(UserWarning):
    """``execution="auto"`` runs a solve in a slower tier, because a faster one cannot."""


class UnderResolvedWarning(UserWarning):
    """The steps resolve the solution, but not its derivatives; see ``check_gradient``."""


class ConvergenceWarning(UserWarning):
    """An iteration within a step ended before it reached its tolerance."""


class SolveError(SymplecticAdjointError, RuntimeError):
    """A solve could not reach the end of its interval.

    Attributes:
        status: Why the solve stopped.
        solution: The ``Solution`` up to where it is valid; None when there is none.
    """

    status: Status
    solution: Any = None


class NonFiniteError(SolveError):
    """NaN or infinity came out of ``func`` or entered the state."""

    status = Status.NON_FINITE


class StepUnderflowError(SolveError):
    """The step size fell below what the time axis resolves."""

    status = Status.STEP_UNDERFLOW


class StepLimitError(SolveError):
    """More steps were needed than ``max_steps`` allows."""

    status = Status.STEP_LIMIT


class EventNotFoundError(SolveError):
    """An event without which a solve has no end did not occur within the limit of steps."""

    status = Status.NO_EVENT


class NonlinearSolveError(SolveError):
    """The equations of an implicit step, or of its transpose, were not solved."""

    status = Status.NO_CONVERGENCE


class MemoryBudgetError(SolveError):
    """What has to be kept of a solve exceeds its budget.

    Attributes:
        needed: The least budget, in bytes, that would do.
    """

    status = Status.NO_MEMORY

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


class StoreError(SolveError):
    """A store could not be opened, written or read; what was kept before is still there."""

    status = Status.NO_STORE
