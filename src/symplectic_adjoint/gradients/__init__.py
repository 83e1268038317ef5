"""Gradient strategies, one a file, and the autograd function that executes them."""

from __future__ import annotations

from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.gradients._base import Strategy
from symplectic_adjoint.gradients.aca import ACA
from symplectic_adjoint.gradients.backprop import Backprop
from symplectic_adjoint.gradients.checkpoint import Checkpoint
from symplectic_adjoint.gradients.continuous import Continuous
from symplectic_adjoint.gradients.forward import Forward
from symplectic_adjoint.gradients.mali import MALI
from symplectic_adjoint.gradients.symplectic import Symplectic

__all__ = [
    "ACA",
    "MALI",
    "Backprop",
    "Checkpoint",
    "Continuous",
    "Forward",
    "Strategy",
    "Symplectic",
    "get",
    "names",
]

_STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls for cls in (Symplectic, Backprop, Checkpoint, ACA, Continuous, MALI, Forward)
}


def names() -> tuple[str, ...]:
    """Names of all strategies."""
    return tuple(_STRATEGIES)


def get(gradient: str | Strategy) -> Strategy:
    """A strategy from its name, or itself.

    Raises:
        UnknownNameError: No strategy has this name.
        ArgumentError: The argument is neither a name nor a strategy.

    Example:
        >>> get("symplectic")
        Symplectic(store=None, accumulate='inplace', memory=None, place=None, folder=None)
    """
    if isinstance(gradient, Strategy):
        return gradient
    if not isinstance(gradient, str):
        raise ArgumentError(
            f"gradient must be a name or a strategy such as Symplectic(), not {gradient!r}"
        )
    if gradient not in _STRATEGIES:
        raise UnknownNameError("gradient", gradient, names())
    return _STRATEGIES[gradient]()
