"""The front of the way of the data: func, y0 and t, checked and normalised once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint._tree import StateSpec
from symplectic_adjoint._types import FlatFunc, Func


@dataclass(frozen=True)
class Problem:
    """An initial value problem on a flat state.

    Attributes:
        y0: The flat initial state, attached to the caller's graph.
        t: The caller's times as a float64 tensor on the CPU, attached to the caller's graph.
        times: The same times as Python floats.
        spec: How the caller's state maps onto the flat one.
    """

    y0: Tensor
    t: Tensor
    times: tuple[float, ...]
    spec: StateSpec

    @property
    def direction(self) -> float:
        """+1.0 when time increases, -1.0 when it decreases."""
        return 1.0 if self.times[-1] > self.times[0] else -1.0

    @staticmethod
    def flat(spec: StateSpec, flat: Tensor, t: Any, endless: bool = False) -> Problem:
        """Check and normalise a caller's initial state, flat already, and times.

        Args:
            spec: How the caller's state maps onto the flat one.
            flat: The flat initial state.
            t: The caller's times.
            endless: Whether the last time may be infinite.

        Raises:
            ArgumentError: The state is not finite, or ``t`` is not a strictly monotone 1-D
                sequence of at least two finite times.
        """
        finite = torch.isfinite(flat.detach())
        if not bool(finite.all()):
            bad = (~finite).reshape(-1).nonzero()
            raise ArgumentError(
                f"y0 holds {len(bad)} non-finite value(s), the first at "
                f"{spec.locate(int(bad[0]))}; clean the initial state"
            )
        return Problem(flat, *_times(t, endless), spec)


def flat_func(func: Func, spec: StateSpec, args: Sequence[Any]) -> FlatFunc:
    """``func`` on the flat state; for a single tensor without args it is ``func`` itself."""
    if spec.tree is None:
        return (lambda t, y: func(t, y, *args)) if args else func
    return lambda t, y: spec.flatten_like(func(t, spec.unflatten(y), *args))


def as_times(t: Any) -> Tensor:
    """A caller's times as a tensor.

    Raises:
        ArgumentError: They are none.
    """
    try:
        return t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"t = {t!r} must be a 1-D tensor or list of times") from error


def _times(t: Any, endless: bool) -> tuple[Tensor, tuple[float, ...]]:
    """A caller's times as ``Problem`` has them, as a tensor and as numbers."""
    times = as_times(t)
    if times.is_complex() or times.dtype == torch.bool:
        raise ArgumentError(f"t has dtype {times.dtype}; give real times, e.g. t.double()")
    if times.ndim != 1 or len(times) < 2:
        raise ArgumentError(
            f"t must be 1-D with at least two times (where to start, where to end), but has shape "
            f"{tuple(times.shape)}"
        )
    times = times.to("cpu", torch.float64)
    # Numbers, since they are few: operations on tensors would take longer than a step.
    values = tuple(times.tolist())
    needed = values[:-1] if endless and not math.isnan(values[-1]) else values
    for i, value in enumerate(needed):
        if not math.isfinite(value):
            raise ArgumentError(f"t[{i}] = {value} is not finite; remove it")
    rises = values[-1] > values[0]
    for i, (a, b) in enumerate(itertools.pairwise(values)):
        if a == b or (a < b) != rises:
            raise ArgumentError(
                "t must be strictly increasing or strictly decreasing, but "
                f"t[{i}] = {a} and t[{i + 1}] = {b}; sort it and remove duplicates, e.g. "
                "torch.unique(t)"
            )
    return times, values
