"""One-step methods: each has ``step`` and, beside it in the same file, ``transpose``."""

from __future__ import annotations

from symplectic_adjoint import tableaus
from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint.steppers._base import Stepper
from symplectic_adjoint.steppers.alf import ALF
from symplectic_adjoint.steppers.explicit_rk import ExplicitRK

__all__ = ["ALF", "ExplicitRK", "Stepper", "get", "names"]


def names() -> tuple[str, ...]:
    """Names of all methods."""
    return (*tableaus.names(), ALF.name)


def get(name: str) -> Stepper:
    """The stepper of a method's name.

    Raises:
        UnknownNameError: No method has this name.

    Example:
        >>> get("dopri5").order
        5
    """
    if name == ALF.name:
        return ALF()
    if name not in names():
        raise UnknownNameError("method", name, names())
    return ExplicitRK(tableaus.get(name))
