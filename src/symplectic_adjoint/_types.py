"""Aliases shared by every layer."""

from __future__ import annotations

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


def as_float(t: Time) -> float:
    """The value of a time as a Python float (reads the device when it is a tensor)."""
    return float(t.detach()) if isinstance(t, Tensor) else t
