"""What a solve returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, Status
from symplectic_adjoint.events import Crossing
from symplectic_adjoint.loop import Stats


@dataclass
class Solution:
    """A solved initial value problem.

    Attributes:
        t: Output times reached (T,), in the caller's order.
        y: Solution there: (T, ...), or a pytree like ``y0`` with such leaves.
        steps: Accepted grid (N + 1,), float64 on the CPU, from ``t[0]`` to the time reached; the
            last step runs past an event that it holds.
        stats: Counts of steps and evaluations; the backward pass fills in its own.
        status: How the solve ended; anything but ``Status.SUCCESS`` and ``Status.EVENT`` only with
            ``throw=False``.
        message: What went wrong, or an empty string.
        event: The event that ended the solve, or None where none did.
    """

    t: Tensor
    y: Any
    steps: Tensor
    stats: Stats
    status: Status = Status.SUCCESS
    message: str = ""
    event: Crossing | None = None
    _dense: Callable[[Tensor], Any] | None = field(default=None, repr=False)

    def dense(self, t: Any) -> Any:
        """The solution at any times within the interval, with the same exact gradients.

        Args:
            t: A time or a 1-D tensor of times, in any order, within the interval solved.

        Returns:
            Of shape ``(*t.shape, *y0.shape)``, or a pytree like ``y0`` with such leaves.

        Raises:
            ArgumentError: The solve was not asked to keep its steps (``dense=True``), or a time
                lies outside the interval.
        """
        if self._dense is None:
            raise ArgumentError("the steps were not kept; call solve(..., dense=True)")
        times = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        end = self.steps[-1] if self.event is None else self.event.t.detach()
        low, high = sorted((float(self.steps[0]), float(end)))
        values = times.detach()
        if values.numel() and not (low <= float(values.min()) and float(values.max()) <= high):
            raise ArgumentError(
                f"dense output was asked at times from {float(values.min())} to "
                f"{float(values.max())}, outside the solved interval [{low}, {high}]"
            )
        return self._dense(times)
