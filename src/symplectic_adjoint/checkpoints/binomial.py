"""How many steps checkpoints can reverse, at which cost, and where the first of them lies.

Griewank and Walther 2000, "Algorithm 799: revolve", doi 10.1145/347837.347846.
"""

from __future__ import annotations

import math


def longest(slots: int, sweeps: int) -> int:
    """The most steps that ``slots`` checkpoints reverse, none of them taken over ``sweeps`` times.

    Equation (2) there: ``beta(c, r) = (c + r)! / (c! r!)``. The state at the start is one of the
    checkpoints; the evaluation that a step's own reversal takes is not counted.

    Example:
        >>> longest(3, 2)
        10
    """
    return math.comb(slots + sweeps, slots) if sweeps >= 0 else 0


def sweeps(steps: int, slots: int) -> int:
    """How often a step has to be taken at most: the least ``r`` with ``longest(c, r) >= steps``.

    Example:
        >>> sweeps(10, 3), sweeps(11, 3)
        (2, 3)
    """
    low, high = 0, 1
    while longest(slots, high) < steps:
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        if longest(slots, middle) >= steps:
            high = middle
        else:
            low = middle + 1
    return low


def advances(steps: int, slots: int) -> int:
    """The least number of steps taken to reverse ``steps`` of them with ``slots`` checkpoints.

    Theorem 1 there: ``t(l, c) = r l - beta(c + 1, r - 1)``, the first pass included.

    Example:
        >>> advances(10, 3), advances(10, 1)
        (15, 45)
    """
    r = sweeps(steps, slots)
    return r * steps - longest(slots + 1, r - 1)


def split(steps: int, slots: int) -> int:
    """How many steps after the first checkpoint the second one lies in an optimal schedule.

    Both parts have to be optimal with the ``sweeps`` that are left: ``beta(c, r - 2) <= m <=
    beta(c, r - 1)`` and ``beta(c - 1, r - 1) <= l - m <= beta(c - 1, r)``.

    Args:
        steps: At least 2.
        slots: At least 2.
    """
    r = sweeps(steps, slots)
    return max(longest(slots, r - 2), steps - longest(slots - 1, r), 1)
