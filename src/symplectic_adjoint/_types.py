"""Aliases shared by every layer."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

Time: TypeAlias = float | Tensor
"""A time inside the loop: a Python float, or a 0-dim tensor where its gradient is wanted."""

Func: TypeAlias = Callable[..., Any]
"""The user's ``func(t, y, *args)``."""

FlatFunc: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``f(t, y)`` on the flat state: one tensor in, one tensor of its shape out."""

Norm: TypeAlias = Callable[[Tensor], Tensor]
"""A norm of the flat state, giving a 0-dim tensor."""


class _OneSided(float):
    """A time with a side."""

    __slots__ = ("side",)
    side: float


def as_float(t: Time) -> float:
    """The value of a time as a Python float (reads the device when it is a tensor)."""
    return float(t.detach() if isinstance(t, Tensor) else t)


def one_sided(t: Time, side: float) -> Time:
    """A time at which ``f`` jumps, as seen from below (``side`` -1.0) or from above (+1.0).

    What is computed from it, such as a step size, has no side.

    Example:
        >>> t = one_sided(0.5, -1.0)
        >>> t == 0.5, side_of(t), side_of(t + 1.0)
        (True, -1.0, 0.0)
    """
    marked: Any = t.view_as(t) if isinstance(t, Tensor) else _OneSided(t)
    marked.side = side
    return marked  # type: ignore[no-any-return]


def side_of(t: Time) -> float:
    """The side from which a time is seen, or 0.0."""
    return getattr(t, "side", 0.0)


def code_of(func: Any) -> Any:
    """What tells functions apart: their code, or the class of callable objects."""
    if isinstance(func, functools.partial):
        return ("partial", code_of(func.func))
    if isinstance(func, types.MethodType):
        func = func.__func__
    return getattr(func, "__code__", None) or type(func)
