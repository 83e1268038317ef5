"""Implicit methods. Those of Gauss, Radau and Lobatto are collocation, given by their abscissae.

The slope of their dense output takes the values of the stages and those at both ends of the step,
which gives one order more than the collocation polynomial and a continuous derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction as F

from symplectic_adjoint._surd import Surd
from symplectic_adjoint.dense import Interpolant, Number, hermite
from symplectic_adjoint.tableaus._collocation import collocation, interpolatory
from symplectic_adjoint.tableaus._tableau import Tableau

__all__ = [
    "gl4",
    "gl6",
    "implicit_euler",
    "implicit_midpoint",
    "radauIIA3",
    "radauIIA5",
    "sdirk2",
    "trapezoid",
    "trbdf2",
]


def implicit_euler() -> Tableau:
    """Implicit Euler: order one, L-stable."""
    a, b = _from_start(*collocation((1,)))
    return Tableau(
        name="implicit_euler",
        order=1,
        a=a,
        b=b,
        interpolant=_hermite(b, order=1),
        citation=(
            "A.-L. Cauchy, Equations differentielles ordinaires, 1824 (edited by C. Gilain, 1981); "
            f"{_HAIRER_WANNER}, section IV.3"
        ),
    )


def implicit_midpoint() -> Tableau:
    """Gauss's method of one stage: order two, A-stable, conserves quadratic invariants."""
    a, b = _from_start(*collocation((F(1, 2),)))
    return Tableau(name="implicit_midpoint", order=2, a=a, b=b, citation=_GAUSS)


def trapezoid() -> Tableau:
    """The implicit trapezoidal rule, Lobatto's method IIIA of two stages: order two, A-stable."""
    nodes = (0, 1)
    a, b = collocation(nodes)
    return Tableau(
        name="trapezoid",
        order=2,
        a=a,
        b=b,
        interpolant=interpolatory(2, (*nodes, None)),
        citation=f"{_HAIRER_WANNER}, section IV.5, table 5.7",
    )


def radauIIA3() -> Tableau:  # noqa: N802 - the name users know
    """Radau's method IIA of two stages: order three, L-stable."""
    c = (F(1, 3), 1)
    a, b = _from_start(*collocation(c))
    return Tableau(
        name="radauIIA3",
        order=3,
        a=a,
        b=b,
        interpolant=interpolatory(3, (0, *c, None)),
        citation=f"{_EHLE}; {_HAIRER_WANNER}, section IV.5, table 5.5",
    )


def radauIIA5() -> Tableau:  # noqa: N802 - the name users know
    """Radau's method IIA of three stages: order five, L-stable, with the estimate of RADAU5."""
    c = (Surd(F(4, 10), F(-1, 10), 6), Surd(F(4, 10), F(1, 10), 6), 1)
    rows, weights = collocation(c)
    a, b = _from_start(rows, weights)
    gamma = (6 + 81 ** (1 / 3) - 9 ** (1 / 3)) / 30  # the real eigenvalue of a
    # Weights of the increments z = h a k (eq. (8.18)), turned into weights of the stages.
    increments = [gamma / 3 * float(Surd(p, q, 6)) for p, q in ((-13, -7), (-13, 7), (-1, 0))]
    columns = zip(*rows, strict=True)
    error = [sum(e * float(x) for e, x in zip(increments, col, strict=True)) for col in columns]
    return Tableau(
        name="radauIIA5",
        order=5,
        a=a,
        b=b,
        error=(gamma, *error, 0),
        embedded_order=3,
        damping=gamma,
        interpolant=interpolatory(4, (0, *c, None)),
        citation=(
            f"{_EHLE}; {_HAIRER_WANNER}, section IV.5, table 5.6, and section IV.8, "
            "eq. (8.17)-(8.19) for the error estimate"
        ),
    )


def gl4() -> Tableau:
    """Gauss's method of two stages: order four, A-stable, conserves quadratic invariants."""
    c = (Surd(F(1, 2), F(-1, 6), 3), Surd(F(1, 2), F(1, 6), 3))
    a, b = _from_start(*collocation(c))
    return Tableau(
        name="gl4", order=4, a=a, b=b, interpolant=interpolatory(3, (0, *c, 1)), citation=_GAUSS
    )


def gl6() -> Tableau:
    """Gauss's method of three stages: order six, A-stable, conserves quadratic invariants."""
    c = (Surd(F(1, 2), F(-1, 10), 15), F(1, 2), Surd(F(1, 2), F(1, 10), 15))
    a, b = _from_start(*collocation(c))
    return Tableau(
        name="gl6", order=6, a=a, b=b, interpolant=interpolatory(4, (0, *c, 1)), citation=_GAUSS
    )


def sdirk2() -> Tableau:
    """Alexander's method of two stages with one diagonal entry: order two, L-stable."""
    gamma = Surd(1, F(-1, 2), 2)
    a, b = _from_start(((gamma, 0), (1 - gamma, gamma)), (1 - gamma, gamma))
    return Tableau(
        name="sdirk2",
        order=2,
        a=a,
        b=b,
        error=(0, -gamma, gamma, 0),
        embedded_order=1,
        interpolant=_hermite(b, order=2),
        citation=(
            "R. Alexander, Diagonally implicit Runge-Kutta methods for stiff O.D.E.'s, "
            "SIAM J. Numer. Anal. 14 (1977) 1006-1021, doi 10.1137/0714068; the estimate is the "
            "distance to the first-order solution of the first stage alone"
        ),
    )


def trbdf2() -> Tableau:
    """Trapezoidal rule, then BDF2: order two, L-stable, with an estimate of order three."""
    w, d = Surd(0, F(1, 4), 2), Surd(1, F(-1, 2), 2)
    b = (w, w, d)
    embedded = ((1 - w) / 3, (3 * w + 1) / 3, d / 3)
    return Tableau(
        name="trbdf2",
        order=2,
        a=((0, 0, 0), (d, d, 0), b),
        b=b,
        error=(*(x - y for x, y in zip(b, embedded, strict=True)), 0),
        embedded_order=3,
        damping=float(d),
        interpolant=_hermite(b, order=2),
        citation=(
            "R. E. Bank et al., Transient simulation of silicon devices and circuits, IEEE Trans. "
            "CAD 4 (1985) 436-451, doi 10.1109/TCAD.1985.1270142; as a Runge-Kutta pair with its "
            "estimate: M. E. Hosea, L. F. Shampine, Analysis and implementation of TR-BDF2, Appl. "
            "Numer. Math. 20 (1996) 21-37, doi 10.1016/0168-9274(95)00115-8"
        ),
    )


def _from_start(
    a: Sequence[Sequence[Number]], b: Sequence[Number]
) -> tuple[tuple[tuple[Number, ...], ...], tuple[Number, ...]]:
    """The method with ``f(t, y)`` as a stage before its own, of weight zero."""
    zero = (0,) * (len(b) + 1)
    return (zero, *((0, *row) for row in a)), (0, *b)


def _hermite(b: Sequence[Number], *, order: int) -> Interpolant:
    """Cubic Hermite for a method whose last stage is the slope at the end of the step."""
    *rows, last, node = hermite(b, order=order).coefficients
    ending = tuple(x + y for x, y in zip(last, node, strict=True))
    return Interpolant(order=order, coefficients=(*rows, ending, (0,) * len(node)))


_HAIRER_WANNER = "E. Hairer, G. Wanner, Solving Ordinary Differential Equations II, 2nd ed., 1996"

_GAUSS = (
    "J. C. Butcher, Implicit Runge-Kutta processes, Math. Comp. 18 (1964) 50-64, "
    f"doi 10.1090/S0025-5718-1964-0159424-9; {_HAIRER_WANNER}, section IV.5, tables 5.1 and 5.2"
)

_EHLE = (
    "B. L. Ehle, On Pade approximations to the exponential function and A-stable methods for the "
    "numerical solution of initial value problems, Report CSRR 2010, University of Waterloo, 1969"
)
