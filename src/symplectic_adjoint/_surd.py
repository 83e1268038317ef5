"""Exact numbers ``p + q sqrt(n)``, in which the coefficients of implicit methods are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_DIGITS = 10**40


@dataclass(frozen=True)
class Surd:
    """``p + q sqrt(n)`` with rational ``p`` and ``q``; exact among those of one ``n``.

    Example:
        >>> root = Surd(0, 1, 2)
        >>> root * root == 2, float((1 + root) / 2)
        (True, 1.2071067811865475)
    """

    p: Fraction
    q: Fraction
    n: int

    def __init__(self, p: int | Fraction, q: int | Fraction, n: int) -> None:
        object.__setattr__(self, "p", Fraction(p))
        object.__setattr__(self, "q", Fraction(q))
        object.__setattr__(self, "n", n)

    def __float__(self) -> float:
        root = Fraction(math.isqrt(self.n * _DIGITS**2), _DIGITS)
        return float(self.p + self.q * root)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Surd):
            return (self.p, self.q) == (other.p, other.q) and (not self.q or self.n == other.n)
        return self.q == 0 and self.p == other

    def __hash__(self) -> int:
        return hash((self.p, self.q, self.n)) if self.q else hash(self.p)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, float):
            return float(self) + other
        x = self._same(other)
        return Surd(self.p + x.p, self.q + x.q, self.n)

    def __neg__(self) -> Surd:
        return Surd(-self.p, -self.q, self.n)

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, float):
            return float(self) * other
        x = self._same(other)
        return Surd(self.p * x.p + self.n * self.q * x.q, self.p * x.q + self.q * x.p, self.n)

    def __truediv__(self, other: Any) -> Any:
        x = self._same(other)
        norm = x.p * x.p - self.n * x.q * x.q
        return self * Surd(x.p / norm, -x.q / norm, self.n)

    def __rtruediv__(self, other: Any) -> Any:
        return self._same(other) / self

    __radd__ = __add__
    __rmul__ = __mul__

    def _same(self, other: Any) -> Surd:
        if not isinstance(other, Surd):
            return Surd(other, 0, self.n)
        if other.n != self.n:
            raise ValueError(f"sqrt({self.n}) and sqrt({other.n}) do not mix exactly")
        return other
