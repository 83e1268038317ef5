"""A progress meter for long solves."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO


class Meter:
    """Writes how far a solve has come, at most ten times a second.

    Example:
        >>> import io
        >>> out = io.StringIO()
        >>> with_meter = Meter(0.0, 2.0, out)
        >>> with_meter(2.0)
        >>> "100%" in out.getvalue()
        True
    """

    def __init__(self, start: float, end: float, out: TextIO | None = None) -> None:
        self._start, self._end = start, end
        self._out = sys.stderr if out is None else out
        self._begun = time.monotonic()
        self._last = 0.0
        self._steps = 0

    def __call__(self, t: float) -> None:
        """Report that the solve has reached ``t``."""
        self._steps += 1
        now = time.monotonic()
        done = t == self._end
        if not done and now - self._last < 0.1:
            return
        self._last = now
        fraction = (t - self._start) / (self._end - self._start)
        bar = "#" * int(20 * fraction)
        spent = now - self._begun
        left = spent / fraction - spent if fraction > 0 else float("inf")
        self._out.write(
            f"\r{fraction:4.0%} [{bar:<20}] t = {t:.4g}, {self._steps} steps, "
            f"{spent:.1f} s, {left:.1f} s left" + ("\n" if done else "")
        )
        self._out.flush()


def reporter(
    progress: bool | Callable[[float], None] | None, start: float, end: float
) -> Callable[[float], None] | None:
    """What to call with each time reached: the caller's own function, a meter, or nothing."""
    if callable(progress):
        return progress
    return Meter(start, end) if progress else None
