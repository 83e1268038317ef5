"""Continuous extensions of Runge-Kutta steps, as polynomial weights on the stages of a step.

Inside a step of size ``h`` from ``(t, y)`` the solution is linear in ``y`` and in the stages,

    y(t + theta h) = y + h sum_i b_i(theta) k_i,        0 <= theta <= 1,

so an interpolant is nothing but one polynomial ``b_i`` for each stage, with ``b_i(0) = 0`` (Hairer,
Norsett, Wanner, *Solving Ordinary Differential Equations I*, 2nd ed., section II.6, eq. (6.1)).
Stages are numbered as everywhere in this package: stage ``0`` is ``f(t, y)``, stages ``1 ...
s - 1`` are the inner stages, stage ``s`` is the node ``f(t + h, y_new)`` and stages ``s + 1, ...``
are extra ones that only the interpolant needs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from symplectic_adjoint._surd import Surd

__all__ = ["Interpolant", "Number", "hermite", "linear"]

Number = int | float | Fraction | Surd
"""An exact number or a float; coefficients are written as either."""

_ROW_SUM_TOLERANCE = 1e-12


@dataclass(frozen=True, init=False)
class Interpolant:
    """A continuous extension ``y(t + theta h) = y + h sum_i b_i(theta) k_i``.

    The weights are ``b_i(theta) = sum_p coefficients[i][p] theta^(p + 1)``. Coefficients may be
    given as integers, fractions or floats and are stored as floats.

    Args:
        order: Uniform order of accuracy ``p``: the error at any ``theta`` of one step is
            ``O(h^(p + 1))``.
        coefficients: One row of polynomial coefficients, lowest power (``theta``) first, for each
            of the ``s + 1 + len(a)`` stages. All rows have the same length, the degree.
        a: Weights of the extra stages on the stages before them; row ``e`` has ``s + 1 + e``
            weights.
        c: Abscissae of the extra stages, the row sums of ``a``.

    Raises:
        ValueError: The shapes disagree, a number is not finite, or a row of ``a`` does not sum to
            its ``c``.

    Example:
        >>> straight = Interpolant(order=1, coefficients=((1,), (0,)))
        >>> straight.weights(0.25)
        (0.25, 0.0)
        >>> straight.weight_slopes(0.25)
        (1.0, 0.0)
    """

    order: int
    coefficients: tuple[tuple[float, ...], ...]
    a: tuple[tuple[float, ...], ...] = ()
    c: tuple[float, ...] = ()

    def __init__(
        self,
        order: int,
        coefficients: Iterable[Iterable[Number]],
        a: Iterable[Iterable[Number]] = (),
        c: Iterable[Number] = (),
    ) -> None:
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "coefficients", as_floats(coefficients))
        object.__setattr__(self, "a", as_floats(a))
        object.__setattr__(self, "c", tuple(map(float, c)))
        self._check_coefficients()
        self._check_extra_stages()

    @property
    def stages(self) -> int:
        """Number of stages that carry a weight: ``s + 1`` and the extra ones."""
        return len(self.coefficients)

    @property
    def extra_stages(self) -> int:
        """Number of evaluations that a step needs only where it holds an output."""
        return len(self.a)

    @property
    def degree(self) -> int:
        """Degree of the weights as polynomials in ``theta``."""
        return len(self.coefficients[0])

    @functools.cached_property
    def centred(self) -> tuple[tuple[float, ...], ...]:
        """The weights in powers of ``2 theta - 1``, constant term first: the form to compute with.

        Powers of ``theta`` cancel: where the degree is seven they lose two to three digits more.

        Example:
            >>> hermite((1,)).centred
            ((0.625, 0.625, -0.125, -0.125), (-0.125, -0.125, 0.125, 0.125))
        """
        return tuple(
            tuple(
                float(
                    sum(
                        Fraction(x) * math.comb(power, q) / 2**power
                        for power, x in enumerate((0.0, *row))
                    )
                )
                for q in range(self.degree + 1)
            )
            for row in self.coefficients
        )

    def weights(self, theta: float) -> tuple[float, ...]:
        """Weights ``b_i(theta)`` of all stages.

        Args:
            theta: Place within the step, ``0`` at its start and ``1`` at its end.

        Returns:
            One float for each stage.

        Example:
            >>> hermite((1,)).weights(0.5)
            (0.625, -0.125)
        """
        return tuple(theta * _horner(row, theta) for row in self.coefficients)

    def weight_slopes(self, theta: float) -> tuple[float, ...]:
        """Slopes ``d b_i / d theta`` of all stages, so that ``dy/dt = sum_i b_i'(theta) k_i``.

        Args:
            theta: Place within the step, ``0`` at its start and ``1`` at its end.

        Returns:
            One float for each stage.

        Example:
            >>> hermite((1,)).weight_slopes(0.0)
            (1.0, 0.0)
        """
        return tuple(
            _horner([(power + 1) * x for power, x in enumerate(row)], theta)
            for row in self.coefficients
        )

    def _check_coefficients(self) -> None:
        if self.order < 1:
            raise ValueError(f"an interpolant has order 1 at least, got order={self.order}")
        degrees = {len(row) for row in self.coefficients}
        if len(degrees) != 1 or 0 in degrees:
            raise ValueError(
                "coefficients must be rows of one common length >= 1 (the degree), "
                f"got lengths {[len(row) for row in self.coefficients]}"
            )
        if not all(math.isfinite(x) for row in self.coefficients for x in row):
            raise ValueError("coefficients must be finite")

    def _check_extra_stages(self) -> None:
        if len(self.a) != len(self.c):
            raise ValueError(
                f"a has {len(self.a)} rows of extra stages but c has {len(self.c)} abscissae"
            )
        first = self.stages - len(self.a)
        for extra, (row, c) in enumerate(zip(self.a, self.c, strict=True)):
            if len(row) != first + extra:
                raise ValueError(
                    f"row {extra} of a must weigh the {first + extra} stages before it, "
                    f"got {len(row)} weights"
                )
            # Written so that a NaN is refused too.
            if not abs(math.fsum(row) - c) <= _ROW_SUM_TOLERANCE * (1 + max(map(abs, row))):
                raise ValueError(f"row {extra} of a sums to {math.fsum(row)!r}, not to c = {c!r}")


def linear(b: Sequence[Number], *, order: int = 1) -> Interpolant:
    """Straight line between the two ends of the step, ``b_i(theta) = theta b_i``.

    Args:
        b: Weights of the step, ``s`` numbers.
        order: Uniform order of accuracy, ``1`` for every consistent method.

    Returns:
        The interpolant, on ``s + 1`` stages; the node carries no weight.

    Example:
        >>> linear((0, 1)).weights(0.5)
        (0.0, 0.5, 0.0)
    """
    return Interpolant(order=order, coefficients=(*((x,) for x in b), (0,)))


def hermite(b: Sequence[Number], *, order: int = 3) -> Interpolant:
    """Cubic Hermite interpolation from the values and slopes at both ends of the step.

    With ``y_new = y + h sum_i b_i k_i`` and the slopes ``k_0`` and ``k_s``, the weights are

        b_i(theta) = (3 theta^2 - 2 theta^3) b_i
                     + [i = 0] (theta - 2 theta^2 + theta^3) + [i = s] (theta^3 - theta^2)

    (Hairer, Norsett, Wanner I, section II.6, eq. (6.7)). The solution is continuously
    differentiable from step to step.

    Args:
        b: Weights of the step, ``s`` numbers.
        order: Uniform order of accuracy: the least of ``3`` and the order of the method.

    Returns:
        The interpolant, on ``s + 1`` stages.

    Example:
        >>> hermite((1,)).weights(1.0)
        (1.0, 0.0)
    """
    rows: list[list[Number]] = [[0, 3 * x, -2 * x] for x in (*b, 0)]
    for stage, slope in ((0, (1, -2, 1)), (-1, (0, -1, 1))):
        rows[stage] = [x + y for x, y in zip(rows[stage], slope, strict=True)]
    return Interpolant(order=order, coefficients=rows)


def _horner(row: Sequence[float], theta: float) -> float:
    value = 0.0
    for coefficient in reversed(row):
        value = value * theta + coefficient
    return value


def as_floats(rows: Iterable[Iterable[Number]]) -> tuple[tuple[float, ...], ...]:
    """Rows of numbers as tuples of floats."""
    return tuple(tuple(map(float, row)) for row in rows)
