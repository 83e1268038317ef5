"""Methods of order one to four, all with cubic Hermite dense output."""

from __future__ import annotations

from fractions import Fraction as F

from symplectic_adjoint.tableaus._tableau import Tableau

__all__ = [
    "adaptive_heun",
    "bosh3",
    "euler",
    "fehlberg2",
    "heun2",
    "heun3",
    "midpoint",
    "ralston",
    "rk4",
    "rk4_classic",
    "ssprk3",
]


def euler() -> Tableau:
    """Explicit Euler."""
    return Tableau(
        name="euler",
        order=1,
        a=((),),
        b=(1,),
        citation="L. Euler, Institutionum calculi integralis I, 1768, section 650",
    )


def midpoint() -> Tableau:
    """Explicit midpoint rule."""
    return Tableau(
        name="midpoint",
        order=2,
        a=((), (F(1, 2),)),
        b=(0, 1),
        citation=(
            "C. Runge, Ueber die numerische Aufloesung von Differentialgleichungen, "
            "Math. Ann. 46 (1895) 167-178"
        ),
    )


def heun2() -> Tableau:
    """Heun's method of order two, the explicit trapezoidal rule."""
    return Tableau(
        name="heun2",
        order=2,
        a=((), (1,)),
        b=(F(1, 2), F(1, 2)),
        citation=_HEUN,
    )


def heun3() -> Tableau:
    """Heun's method of order three."""
    return Tableau(
        name="heun3",
        order=3,
        a=((), (F(1, 3),), (0, F(2, 3))),
        b=(F(1, 4), 0, F(3, 4)),
        citation=_HEUN,
    )


def ralston() -> Tableau:
    """Ralston's method of order two, the one with the least bound on the local error."""
    return Tableau(
        name="ralston",
        order=2,
        a=((), (F(2, 3),)),
        b=(F(1, 4), F(3, 4)),
        citation=(
            "A. Ralston, Runge-Kutta methods with minimum error bounds, "
            "Math. Comp. 16 (1962) 431-437, doi 10.1090/S0025-5718-1962-0150954-0"
        ),
    )


def ssprk3() -> Tableau:
    """Strong-stability-preserving method of order three in three stages."""
    return Tableau(
        name="ssprk3",
        order=3,
        a=((), (1,), (F(1, 4), F(1, 4))),
        b=(F(1, 6), F(1, 6), F(2, 3)),
        citation=(
            "C.-W. Shu, S. Osher, Efficient implementation of essentially non-oscillatory "
            "shock-capturing schemes, J. Comput. Phys. 77 (1988) 439-471, "
            "doi 10.1016/0021-9991(88)90177-5"
        ),
    )


def rk4() -> Tableau:
    """Kutta's 3/8 rule of order four."""
    return Tableau(
        name="rk4",
        order=4,
        a=((), (F(1, 3),), (F(-1, 3), 1), (1, -1, 1)),
        b=(F(1, 8), F(3, 8), F(3, 8), F(1, 8)),
        citation=_KUTTA,
    )


def rk4_classic() -> Tableau:
    """The classical method of order four."""
    return Tableau(
        name="rk4_classic",
        order=4,
        a=((), (F(1, 2),), (0, F(1, 2)), (0, 0, 1)),
        b=(F(1, 6), F(1, 3), F(1, 3), F(1, 6)),
        citation=_KUTTA,
    )


def adaptive_heun() -> Tableau:
    """Heun's method of order two with an embedded method of order one."""
    return Tableau(
        name="adaptive_heun",
        order=2,
        a=((), (1,)),
        b=(F(1, 2), F(1, 2)),
        error=(F(1, 2), F(-1, 2), 0),
        embedded_order=1,
        citation=_HEUN,
    )


def fehlberg2() -> Tableau:
    """Fehlberg's RK1(2), which here, as usual, advances with its solution of order two."""
    return Tableau(
        name="fehlberg2",
        order=2,
        a=((), (F(1, 2),), (F(1, 256), F(255, 256))),
        b=(F(1, 512), F(255, 256), F(1, 512)),
        c=(0, F(1, 2), 1),
        error=(F(-1, 512), 0, F(1, 512), 0),
        embedded_order=1,
        citation=(
            "E. Fehlberg, Low-order classical Runge-Kutta formulas with stepsize control and "
            "their application to some heat transfer problems, NASA TR R-315, 1969"
        ),
    )


def bosh3() -> Tableau:
    """Bogacki and Shampine's pair 3(2), FSAL."""
    return Tableau(
        name="bosh3",
        order=3,
        a=((), (F(1, 2),), (0, F(3, 4))),
        b=(F(2, 9), F(1, 3), F(4, 9)),
        c=(0, F(1, 2), F(3, 4)),
        error=(F(-5, 72), F(1, 12), F(1, 9), F(-1, 8)),
        embedded_order=2,
        fsal=True,
        citation=(
            "P. Bogacki, L. F. Shampine, A 3(2) pair of Runge-Kutta formulas, "
            "Appl. Math. Lett. 2 (1989) 321-325, doi 10.1016/0893-9659(89)90079-7"
        ),
    )


_HEUN = (
    "K. Heun, Neue Methoden zur approximativen Integration der Differentialgleichungen einer "
    "unabhaengigen Veraenderlichen, Z. Math. Phys. 45 (1900) 23-38"
)

_KUTTA = (
    "W. Kutta, Beitrag zur naeherungsweisen Integration totaler Differentialgleichungen, "
    "Z. Math. Phys. 46 (1901) 435-453"
)
