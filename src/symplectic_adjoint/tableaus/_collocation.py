"""Collocation: the weights of an implicit method, and of dense output, from its abscissae alone.

The polynomial whose slope takes the values ``k_j`` at the abscissae ``c_j`` has the weights
``b_j(theta) = int_0^theta l_j``, with ``l_j`` Lagrange's polynomials; those of the method are
``a_ij = b_j(c_i)`` and ``b_j = b_j(1)`` (Hairer, Norsett, Wanner I, section II.7, theorem 7.7).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from symplectic_adjoint.dense import Interpolant, Number

Row = list[Any]
"""Coefficients of a polynomial, lowest power first; exact numbers mix as the type checker cannot
say."""


def antiderivatives(nodes: Sequence[Number]) -> list[Row]:
    """``int_0^theta l_j`` for each node: the coefficients of ``theta, theta^2, ...``, exactly.

    Example:
        >>> [[str(x) for x in row] for row in antiderivatives((0, 1))]
        [['1', '-1/2'], ['0', '1/2']]
    """
    rows = []
    for j, own in enumerate(nodes):
        row: Row = [Fraction(1)]
        for i, other in enumerate(nodes):
            if i != j:
                gap: Any = Fraction(1) * (own - other)
                row = [
                    (low - other * x) / gap
                    for low, x in zip([Fraction(0), *row], [*row, Fraction(0)], strict=True)
                ]
        rows.append([x / (power + 1) for power, x in enumerate(row)])
    return rows


def value(row: Row, theta: Any) -> Any:
    """A polynomial without constant term at a place, exactly."""
    total: Any = Fraction(0)
    for x in reversed(row):
        total = (total + x) * theta
    return total


def collocation(c: Sequence[Number]) -> tuple[tuple[Row, ...], Row]:
    """Matrix ``a`` and weights ``b`` of the collocation method with abscissae ``c``."""
    rows = antiderivatives(c)
    return tuple([value(row, place) for row in rows] for place in c), [value(r, 1) for r in rows]


def interpolatory(order: int, nodes: Sequence[Number | None]) -> Interpolant:
    """The dense output whose slope takes the values of the stages at their abscissae.

    Args:
        order: Uniform order of accuracy.
        nodes: The abscissa of each stage and of the node; None for stages that take no part.

    Returns:
        The interpolant.
    """
    rows = iter(antiderivatives([x for x in nodes if x is not None]))
    degree = sum(x is not None for x in nodes)
    none: Row = [0] * degree
    return Interpolant(order=order, coefficients=[none if x is None else next(rows) for x in nodes])
