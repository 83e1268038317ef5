"""Interpolants: polynomial weights on the stages of a step."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symplectic_adjoint.dense import Interpolant, hermite, linear
from symplectic_adjoint.tableaus import Tableau, get, names

THETAS = (0.0, 0.1, 0.25, 0.5, 0.8, 1.0)


@pytest.fixture(params=names())
def tableau(request: pytest.FixtureRequest) -> Tableau:
    return get(request.param)


def test_the_step_starts_at_its_old_value(tableau: Tableau) -> None:
    assert tableau.interpolant.weights(0.0) == (0.0,) * tableau.interpolant.stages


def test_the_step_ends_at_its_new_value(tableau: Tableau) -> None:
    extras = tableau.interpolant.extra_stages
    scale = max(abs(x) for row in tableau.interpolant.coefficients for x in row)
    expected = (*tableau.b, 0.0, *[0.0] * extras)
    assert tableau.interpolant.weights(1.0) == pytest.approx(expected, abs=4e-15 * scale)


def test_every_registered_interpolant_is_continuously_differentiable(tableau: Tableau) -> None:
    interpolant = tableau.interpolant
    scale = max(abs(x) for row in interpolant.coefficients for x in row)
    last = interpolant.coefficients[tableau.stages - 1]
    # The last stage of a stiffly accurate method is the slope at the node, so it may stand for it.
    ending = tableau.stages - (tableau.implicit and tableau.a[-1] == tableau.b and any(last))
    for theta, stage in ((0.0, 0), (1.0, ending)):
        slopes = interpolant.weight_slopes(theta)
        assert slopes == pytest.approx(unit(stage, interpolant.stages), abs=2e-14 * scale)


@pytest.mark.parametrize("theta", THETAS)
def test_slopes_are_the_derivatives_of_the_weights(tableau: Tableau, theta: float) -> None:
    h = 1e-4
    interpolant = tableau.interpolant
    scale = max(abs(x) for row in interpolant.coefficients for x in row)
    # The five-point formula, exact to O(h^4).
    points = [interpolant.weights(theta + k * h) for k in (-2, -1, 1, 2)]
    numeric = [(a - 8 * b + 8 * c - d) / (12 * h) for a, b, c, d in zip(*points, strict=True)]
    assert interpolant.weight_slopes(theta) == pytest.approx(numeric, abs=1e-10 * max(scale, 1))


@given(
    coefficients=st.lists(st.floats(-10, 10), min_size=4, max_size=4),
    theta=st.floats(0, 1),
)
def test_hermite_reproduces_every_cubic(coefficients: list[float], theta: float) -> None:
    """Simpson's weights integrate the slope of a cubic exactly, so dense output is exact too."""
    simpson = get("rk4_classic")
    slope = derivative(coefficients)
    stages = [value(slope, c) for c in (*simpson.c, 1.0)]
    weights = hermite(simpson.b).weights(theta)
    got = coefficients[0] + math.fsum(w * k for w, k in zip(weights, stages, strict=True))
    assert got == pytest.approx(value(coefficients, theta), abs=1e-12)


@given(
    b=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    theta=st.floats(0, 1),
)
def test_linear_scales_the_weights_of_the_step(b: list[float], theta: float) -> None:
    interpolant = linear(b)
    assert interpolant.weights(theta) == (*(theta * x for x in b), 0.0)
    assert interpolant.weight_slopes(theta) == (*b, 0.0)
    assert (interpolant.order, interpolant.degree, interpolant.extra_stages) == (1, 1, 0)


def test_exact_numbers_become_floats() -> None:
    interpolant = Interpolant(
        order=1,
        coefficients=[[Fraction(1, 3)], [1], [0.5]],
        a=[[0, Fraction(1, 2)]],
        c=[Fraction(1, 2)],
    )
    assert interpolant.coefficients == ((1 / 3,), (1.0,), (0.5,))
    assert interpolant.a == ((0.0, 0.5),)
    assert interpolant.c == (0.5,)
    assert all(type(x) is float for x in (*interpolant.a[0], *interpolant.c))


def test_an_interpolant_is_frozen_and_hashable() -> None:
    interpolant = hermite((1,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        interpolant.order = 2  # type: ignore[misc]
    assert hash(interpolant) == hash(hermite((1,)))
    assert interpolant == hermite((1,))
    assert interpolant != linear((1,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": 0, "coefficients": ((1,),)}, "order=0"),
        ({"order": 1, "coefficients": ()}, "common length"),
        ({"order": 1, "coefficients": ((),)}, "common length"),
        ({"order": 1, "coefficients": ((1,), (1, 2))}, r"lengths \[1, 2\]"),
        ({"order": 1, "coefficients": ((math.nan,),)}, "finite"),
        ({"order": 1, "coefficients": ((1,), (0,)), "a": ((1,),)}, "0 abscissae"),
        ({"order": 1, "coefficients": ((1,), (0,)), "a": ((1, 1),), "c": (1,)}, "got 2 weights"),
        ({"order": 1, "coefficients": ((1,), (0,)), "a": ((1,),), "c": (0.9,)}, "sums to 1.0"),
        ({"order": 1, "coefficients": ((1,), (0,)), "a": ((math.nan,),), "c": (1,)}, "sums to nan"),
    ],
)
def test_bad_data_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interpolant(**arguments)  # type: ignore[arg-type]


def unit(stage: int, stages: int) -> tuple[float, ...]:
    return tuple(float(i == stage) for i in range(stages))


def value(coefficients: list[float], x: float) -> float:
    return math.fsum(c * x**power for power, c in enumerate(coefficients))


def derivative(coefficients: list[float]) -> list[float]:
    return [power * c for power, c in enumerate(coefficients)][1:]
