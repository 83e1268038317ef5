"""Aliases shared by every layer."""

from __future__ import annotations

import functools
import types
from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
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


def floats(x: Tensor) -> array[float]:
    """The elements of a 1-D tensor, eight bytes each: a quarter of what a list of them takes.

    Example:
        >>> floats(torch.tensor([0.5, 2.0]))
        array('d', [0.5, 2.0])
    """
    values = array("d", bytes(8 * len(x)))
    if values:
        torch.frombuffer(values, dtype=torch.float64).copy_(x.detach())
    return values


def tensor_of(values: Sequence[float]) -> Tensor:
    """One or more floats as a tensor (N,), float64 on the CPU."""
    packed = values if isinstance(values, array) else array("d", values)
    return torch.frombuffer(packed, dtype=torch.float64).clone()


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
