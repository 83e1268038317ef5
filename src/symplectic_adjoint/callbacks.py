"""Functions of ``func`` that are called at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from symplectic_adjoint._errors import ArgumentError

_MOMENTS = ("step", "accept_step", "reject_step")


class Callbacks:
    """What ``func`` wants to be told of a solve, by attributes as in torchdiffeq.

    ``callback_step(t0, y0, dt)`` is called before each attempted step, ``callback_accept_step`` and
    ``callback_reject_step`` with the same arguments once it is accepted or rejected. ``t0`` and
    ``dt > 0`` are 0-dim float64 tensors on the CPU, ``y0`` the state at ``t0``. With the suffix
    ``_adjoint`` they are told of the backward pass.

    Example:
        >>> def func(t, y):
        ...     return -y
        >>> func.callback_step = lambda t0, y0, dt: print(t0.item(), y0, dt.item())
        >>> Callbacks(func)("step", 1.0, 0.5, lambda: "y0")
        1.0 y0 0.5
    """

    def __init__(self, func: Any = None, suffix: str = "") -> None:
        """Look for the attributes.

        Raises:
            ArgumentError: One of them is not callable.
        """
        found = {m: getattr(func, f"callback_{m}{suffix}", None) for m in _MOMENTS}
        for moment, call in found.items():
            if call is not None and not callable(call):
                raise ArgumentError(f"callback_{moment}{suffix} = {call!r} of func is not callable")
        self._found: dict[str, Callable[..., Any] | None] = found
        self._made = self._now = 0

    @property
    def wanted(self) -> bool:
        """Whether there is anything to tell."""
        return any(call is not None for call in self._found.values())

    def restart(self) -> None:
        """A solve starts again from its beginning: calls that were made are not repeated."""
        self._now = 0

    def renew(self) -> None:
        """Another solve begins: all calls are made."""
        self._made = self._now = 0

    def __call__(self, moment: str, t: float, t1: float, y: Callable[[], Any]) -> None:
        """Tell of a step from ``t`` to ``t1`` that starts from ``y()``."""
        call = self._found[moment]
        if call is None:
            return
        self._now += 1
        if self._now > self._made:
            self._made = self._now
            call(_number(t), y(), _number(abs(t1 - t)))


def _number(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)
