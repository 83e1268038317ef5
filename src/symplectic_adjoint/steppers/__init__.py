"""Methods: each has ``step`` and, beside it in the same file, ``transpose``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from symplectic_adjoint import splitting, tableaus
from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint._tree import StateSpec
from symplectic_adjoint.field import Field
from symplectic_adjoint.steppers._base import Stepper
from symplectic_adjoint.steppers.alf import ALF
from symplectic_adjoint.steppers.explicit_rk import ExplicitRK
from symplectic_adjoint.steppers.implicit_rk import NEWTON_OPTIONS, ImplicitRK
from symplectic_adjoint.steppers.multistep import ExplicitAdams, ImplicitAdams
from symplectic_adjoint.steppers.partitioned import Partitioned
from symplectic_adjoint.steppers.scipy_solver import ScipySolver

__all__ = [
    "ALF",
    "ExplicitAdams",
    "ExplicitRK",
    "ImplicitAdams",
    "ImplicitRK",
    "Partitioned",
    "ScipySolver",
    "Stepper",
    "admit",
    "fitted",
    "get",
    "names",
    "options_of",
    "within",
]

_OTHERS: dict[str, Callable[[], Stepper]] = {
    "alf": ALF,
    "explicit_adams": ExplicitAdams,
    "implicit_adams": ImplicitAdams,
}
_ALIASES = {"fixed_adams": "implicit_adams", "leapfrog": "verlet"}
_SCIPY = "scipy_solver"


def names() -> tuple[str, ...]:
    """Names of all methods of this library; with scipy there is "scipy_solver" as well."""
    return (*tableaus.names(), *_OTHERS, *splitting.names())


def get(name: str) -> Stepper:
    """The stepper of a method's name.

    Raises:
        UnknownNameError: No method has this name.
        MissingExtraError: "scipy_solver" without scipy.

    Example:
        >>> get("dopri5").order
        5
    """
    name = _ALIASES.get(name, name)
    if name in _OTHERS:
        return _OTHERS[name]()
    if name in splitting.names():
        return Partitioned(splitting.get(name))
    if name == _SCIPY:
        return ScipySolver()
    if name not in names():
        raise UnknownNameError("method", name, (*names(), *_ALIASES, _SCIPY))
    return _of_tableau(name)


@functools.cache
def _of_tableau(name: str) -> Stepper:
    tableau = tableaus.get(name)
    return ImplicitRK(tableau) if tableau.implicit else ExplicitRK(tableau)


def within(stepper: Stepper, rtol: float | Tensor, atol: float | Tensor) -> Stepper:
    """The method with the tolerances of a solve, which one that iterates within its steps needs."""
    bound: Callable[..., Stepper] | None = getattr(stepper, "within", None)
    return stepper if bound is None else bound(rtol, atol)


def fitted(stepper: Stepper, spec: StateSpec) -> Stepper:
    """The method for states of a form, which one that tells their parts apart needs to know.

    Raises:
        ArgumentError: The method does not solve such states.
    """
    fit: Callable[..., Stepper] | None = getattr(stepper, "fitted", None)
    return stepper if fit is None else fit(spec)


def admit(stepper: Stepper, field: Field, state: Any, grid: Sequence[float]) -> None:
    """Let a method that is not for every system look at this one, near the start of its grid.

    Raises:
        NotSeparableError: It is not for this one.
    """
    look: Callable[..., None] | None = getattr(stepper, "admit", None)
    if look is not None:
        look(field, state, grid[1])


def options_of(stepper: Stepper) -> tuple[str, ...]:
    """The options of a method that torchdiffeq knows, and those that go with them."""
    if isinstance(stepper, ImplicitRK):
        return NEWTON_OPTIONS
    if isinstance(stepper, ScipySolver):
        return ("solver", "min_step", "max_step")
    options = ("max_order", "max_iters")
    return tuple(name for name in options if hasattr(stepper, name))
