"""Dormand and Prince's pair 5(4)."""

from __future__ import annotations

from fractions import Fraction as F

from symplectic_adjoint.dense import Interpolant, Number, hermite
from symplectic_adjoint.tableaus._tableau import Tableau

__all__ = ["dopri5"]


def dopri5() -> Tableau:
    """Pair 5(4), FSAL, with Shampine's error estimate and dense output of order four."""
    b = (F(35, 384), 0, F(500, 1113), F(125, 192), F(-2187, 6784), F(11, 84))
    return Tableau(
        name="dopri5",
        order=5,
        a=(
            (),
            (F(1, 5),),
            (F(3, 40), F(9, 40)),
            (F(44, 45), F(-56, 15), F(32, 9)),
            (F(19372, 6561), F(-25360, 2187), F(64448, 6561), F(-212, 729)),
            (F(9017, 3168), F(-355, 33), F(46732, 5247), F(49, 176), F(-5103, 18656)),
        ),
        b=b,
        c=(0, F(1, 5), F(3, 10), F(4, 5), F(8, 9), 1),
        error=(
            b[0] - F(1951, 21600),
            0,
            b[2] - F(22642, 50085),
            b[3] - F(451, 720),
            b[4] + F(12231, 42400),
            b[5] - F(649, 6300),
            F(-1, 60),
        ),
        embedded_order=4,
        interpolant=_quartic(b),
        fsal=True,
        citation=(
            "J. R. Dormand, P. J. Prince, A family of embedded Runge-Kutta formulae, "
            "J. Comput. Appl. Math. 6 (1980) 19-26, doi 10.1016/0771-050X(80)90013-3 (RK5(4)7M); "
            "error estimate and dense output: L. F. Shampine, Some practical Runge-Kutta formulas, "
            "Math. Comp. 46 (1986) 135-150, doi 10.1090/S0025-5718-1986-0815836-3; E. Hairer, "
            "S. P. Norsett, G. Wanner, Solving Ordinary Differential Equations I, section II.6"
        ),
    )


def _quartic(b: tuple[Number, ...]) -> Interpolant:
    """Cubic Hermite plus ``theta^2 (1 - theta)^2`` times Shampine's number for each stage."""
    numbers: tuple[Number, ...] = (
        F(-12715105075, 11282082432),
        0,
        F(87487479700, 32700410799),
        F(-10690763975, 1880347072),
        F(701980252875, 199316789632),
        F(-1453857185, 822651844),
        F(69997945, 29380423),
    )
    bubble = (0, 1, -2, 1)
    cubic = hermite(b).coefficients
    return Interpolant(
        order=4,
        coefficients=tuple(
            tuple(x + float(d) * y for x, y in zip((*row, 0.0), bubble, strict=True))
            for row, d in zip(cubic, numbers, strict=True)
        ),
    )
