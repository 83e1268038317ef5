"""Butcher tableaus: what they prove of themselves, and whether their methods do what they prove."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import pytest

from symplectic_adjoint import TableauError, UnknownNameError
from symplectic_adjoint.dense import Interpolant, linear
from symplectic_adjoint.tableaus import Tableau, get, names
from symplectic_adjoint.tableaus._conditions import (
    Condition,
    conditions,
    density,
    nodes,
    rooted_trees,
)

PROMISED = {
    "adaptive_heun": (2, 1),
    "bosh3": (3, 2),
    "dopri5": (5, 4),
    "dopri8": (8, 7),
    "euler": (1, None),
    "fehlberg2": (2, 1),
    "heun2": (2, None),
    "heun3": (3, None),
    "midpoint": (2, None),
    "ralston": (2, None),
    "rk4": (4, None),
    "rk4_classic": (4, None),
    "ssprk3": (3, None),
    "tsit5": (5, 4),
    "vern7": (7, 6),
    "gl4": (4, None),
    "gl6": (6, None),
    "implicit_euler": (1, None),
    "implicit_midpoint": (2, None),
    "radauIIA3": (3, None),
    "radauIIA5": (5, 3),
    "sdirk2": (2, 1),
    "trapezoid": (2, None),
    "trbdf2": (2, 3),
}

# Published in digits, not in exact numbers.
ROUNDED = {"dopri8", "tsit5"}


@pytest.fixture(params=names())
def tableau(request: pytest.FixtureRequest) -> Tableau:
    return get(request.param)


# --- what a tableau says of itself ---------------------------------------------------


def test_the_promised_methods_are_there_with_their_orders() -> None:
    found = {name: (get(name).order, get(name).embedded_order) for name in names()}
    assert PROMISED.items() <= found.items()


def test_a_tableau_carries_its_name_and_its_source(tableau: Tableau) -> None:
    assert get(tableau.name) is tableau
    assert len(tableau.citation) > 20
    assert tableau.adaptive == (tableau.error is not None)


def test_the_stage_counts_leave_the_node_out() -> None:
    stages = {name: get(name).stages for name in ("euler", "bosh3", "dopri5", "tsit5", "dopri8")}
    assert stages == {"euler": 1, "bosh3": 3, "dopri5": 6, "tsit5": 6, "dopri8": 13}


def test_only_first_same_as_last_pairs_let_the_node_into_the_error(tableau: Tableau) -> None:
    assert tableau.error_needs_node == tableau.fsal


def test_interpolants_keep_the_order_of_the_method(tableau: Tableau) -> None:
    """One order less is enough: a step errs by one power of h more than the solution.

    Gauss's methods of many stages are an exception: their stages do not know as much.
    """
    least = 4 if tableau.name == "gl6" else tableau.order - 1
    assert tableau.interpolant.order >= least


def test_the_published_tableau_has_the_fsal_stage() -> None:
    a, b, c = get("dopri5").butcher()
    assert len(a) == len(b) == len(c) == 7
    assert a[6] == b
    assert b[6] == 0
    assert c[6] == 1
    assert a[1] == (Fraction(1, 5), 0, 0, 0, 0, 0, 0)
    assert b[2] == Fraction(500, 1113)


def test_the_published_tableau_is_square_and_agrees_with_the_floats(tableau: Tableau) -> None:
    a, b, c = tableau.butcher()
    unused = tableau.stages + tableau.fsal - len(b)  # f(t, y), before an implicit method's own
    assert unused == (tableau.implicit and tableau.name not in ("trapezoid", "trbdf2"))
    assert [len(row) for row in a] == [len(b)] * len(b)
    for row, floats in zip(a, tableau.a[unused:], strict=False):
        assert tuple(map(float, row))[: len(floats)] == floats[unused:]
    assert tuple(map(float, b[: tableau.stages])) == tableau.b[unused:]
    assert tuple(map(float, c[: tableau.stages])) == tableau.c[unused:]


def test_a_tableau_is_frozen_and_hashable(tableau: Tableau) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tableau.order = 1  # type: ignore[misc]
    assert hash(tableau) == hash(dataclasses.replace(tableau))
    assert tableau == dataclasses.replace(tableau)


def test_an_unknown_name_is_met_with_the_nearest_one() -> None:
    with pytest.raises(UnknownNameError, match=r"'dorpi5'; did you mean 'dopri5'\?"):
        get("dorpi5")


# --- order conditions ----------------------------------------------------------------


def test_rooted_trees_are_counted_as_by_cayley() -> None:
    assert [len(rooted_trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    assert all(nodes(tree) == n for n in range(1, 9) for tree in rooted_trees(n))


def test_densities_of_the_tall_and_of_the_bushy_tree() -> None:
    tall: Any = ()
    for height in range(2, 8):
        tall = (tall,)
        assert density(tall) == math.factorial(height)
        assert density(((),) * (height - 1)) == height


@pytest.mark.parametrize("name", sorted({*names()} - ROUNDED))
def test_exact_tableaus_fulfil_their_conditions_exactly(name: str) -> None:
    tableau = get(name)
    a, b, c = tableau.butcher()
    assert all(sum(row) == x for row, x in zip(a, c, strict=True))
    for condition in conditions(a if tableau.implicit else lower(a), tableau.order):
        assert condition.left(b) == Fraction(1, condition.density)


def test_no_order_is_declared_too_low(tableau: Tableau) -> None:
    """Method, estimate and interpolant each miss some tree of the next order."""
    interpolant = tableau.interpolant
    rows = (*tableau.a, tableau.b, *interpolant.a)

    def next_order(order: int) -> Iterator[Condition]:
        return (x for x in conditions(rows, order + 1) if x.order == order + 1)

    assert any(abs(x.left(tableau.b) - 1 / x.density) > 1e-7 for x in next_order(tableau.order))
    if tableau.error is not None and tableau.embedded_order is not None:
        embedded = [b - e for b, e in zip((*tableau.b, 0.0), tableau.error, strict=True)]
        assert any(
            abs(x.left(embedded) - 1 / x.density) > 1e-7 for x in next_order(tableau.embedded_order)
        )
    # Not in the middle, where some are better.
    inside = interpolant.weights(0.25)
    assert any(
        abs(x.left(inside) - 0.25**x.order / x.density) > 1e-9
        for x in next_order(interpolant.order)
    )


def test_a_wrong_digit_anywhere_is_refused(tableau: Tableau) -> None:
    unnoticed = [where for where, build in perturbed(tableau, 1e-6) if accepted(build)]
    assert unnoticed == []


@pytest.mark.parametrize("name", ["heun3", "rk4", "bosh3", "ssprk3", "dopri5", "tsit5", "vern7"])
def test_a_wrong_row_with_the_right_sum_is_refused(name: str) -> None:
    tableau = get(name)
    for stage in range(2, tableau.stages):
        row = list(tableau.a[stage])
        row[0] += 1e-6
        row[1] -= 1e-6
        wrong = (*tableau.a[:stage], tuple(row), *tableau.a[stage + 1 :])
        with pytest.raises(TableauError, match=f"{name}: .* misses .*order"):
            dataclasses.replace(tableau, a=wrong)


EULER: dict[str, Any] = {"name": "mine", "order": 1, "a": ((),), "b": (1,)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": 0, "interpolant": linear((1,))}, "order must be at least 1"),
        ({"b": ()}, "at least one stage"),
        ({"a": ((), ())}, r"a needs rows of 0 ... 0 weights, .*, got \[0, 0\]"),
        ({"a": ((1, 0), (0, 1)), "b": (0, 1)}, "row 0 of a must be zero"),
        ({"damping": -1.0}, "damping = -1.0 must be"),
        ({"c": (0, 1)}, "c must have 1 entries, got 2"),
        ({"c": (0.5,)}, r"c\[0\] is not the sum of row 0 of a: got 0.0 instead of 0.5"),
        ({"error": (1, -1)}, "belong together"),
        ({"embedded_order": 1}, "belong together"),
        ({"error": (1,), "embedded_order": 1}, "error must weigh 1 stages and the node"),
        ({"error": (1, 0), "embedded_order": 1}, r"error misses embedded order 1 on the tree \(\)"),
        ({"b": (math.nan,), "interpolant": linear((1,))}, "b misses order 1"),
        ({"error": (math.nan, 0), "embedded_order": 1}, "error misses .*: got nan"),
        ({"b": (0.9,)}, r"mine: b misses order 1 on the tree \(\): got 0.9 instead of 1.0"),
        ({"interpolant": linear((1, 0))}, "beside those it weighs 3 stages"),
        ({"interpolant": linear((1,), order=2)}, "interpolant misses order 2"),
        ({"interpolant": linear((0.9,))}, "interpolant misses order 1"),
        (
            {"interpolant": Interpolant(order=1, coefficients=((0,), (1,)))},
            "theta = 1 does not weigh stage 0 as y_new does",
        ),
    ],
)
def test_bad_data_is_refused_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TableauError, match=message):
        Tableau(**{**EULER, **changes})


# --- the methods at work -------------------------------------------------------------


def test_the_error_inside_a_step_shrinks_with_the_order_of_the_interpolant(
    tableau: Tableau,
) -> None:
    """The error at any place of one step is O(h^(order + 1))."""
    coarse, fine = (dense_error(tableau, h) for h in dense_steps(tableau))
    observed = math.log2(coarse / fine) - 1
    assert observed > tableau.interpolant.order - 0.2


@pytest.mark.parametrize("name", [name for name in names() if get(name).adaptive])
def test_the_error_estimate_shrinks_with_the_embedded_order(name: str) -> None:
    tableau = get(name)
    assert tableau.error is not None
    assert tableau.embedded_order is not None
    h = 0.05 if tableau.embedded_order < 6 else 0.25
    coarse, fine = (largest_estimate(tableau, tableau.error, step) for step in (h, h / 2))
    observed = math.log2(coarse / fine) - 1
    assert observed == pytest.approx(min(tableau.order, tableau.embedded_order), abs=0.3)


def test_the_interpolant_of_dopri8_is_the_least_norm_solution_it_claims_to_be() -> None:
    torch = pytest.importorskip("torch")
    tableau = get("dopri8")
    interpolant = tableau.interpolant
    for extra, order in enumerate((5, 6, 6, 6)):
        rows = (*tableau.a, tableau.b, *interpolant.a[:extra])
        c = interpolant.c[extra]
        asked = list(conditions(rows, order))
        matrix = torch.tensor([x.stages for x in asked], dtype=torch.float64)
        right = torch.tensor([c**x.order / x.density for x in asked], dtype=torch.float64)
        row = torch.linalg.pinv(matrix, rtol=1e-9) @ right
        assert row.tolist() == pytest.approx(interpolant.a[extra], abs=1e-7)


@pytest.mark.parametrize("name", ["adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8"])
def test_pairs_agree_with_torchdiffeq(name: str) -> None:
    """The same weights and the same error estimate, so that accepted steps can agree."""
    odeint = pytest.importorskip("torchdiffeq._impl.odeint")
    peer = odeint.SOLVERS[name].tableau
    tableau = get(name)
    a, b, c = tableau.butcher()
    stages = len(b)
    for row, weights in zip(lower(a)[1:], peer.beta, strict=False):
        assert list(map(float, row)) == pytest.approx(weights.tolist(), abs=1e-15)
    assert list(map(float, b)) == pytest.approx(peer.c_sol.tolist()[:stages], abs=1e-15)
    assert list(map(float, c[1:])) == pytest.approx(peer.alpha.tolist()[: stages - 1], abs=1e-15)
    errors = peer.c_error.tolist()
    padded = errors + [0.0] * (tableau.stages + 1 - len(errors))
    assert tableau.error == pytest.approx(padded, abs=1e-15)


def test_dopri5_is_dense_as_in_torchdiffeq() -> None:
    odeint = pytest.importorskip("torchdiffeq._impl.odeint")
    middle = odeint.SOLVERS["dopri5"].mid.tolist()
    assert get("dopri5").interpolant.weights(0.5) == pytest.approx(middle, abs=1e-15)


# --- tools ---------------------------------------------------------------------------


def lower(a: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    return [row[:stage] for stage, row in enumerate(a)]


def perturbed(tableau: Tableau, by: float) -> Iterator[tuple[str, Callable[[], Tableau]]]:
    """Every way to change one number of a tableau."""

    def with_(**changes: Any) -> Callable[[], Tableau]:
        return lambda: dataclasses.replace(tableau, **changes)

    def with_interpolant(**changes: Any) -> Callable[[], Tableau]:
        return lambda: dataclasses.replace(
            tableau, interpolant=dataclasses.replace(tableau.interpolant, **changes)
        )

    for field in ("a", "b", "c", "error"):
        for where, changed in nudged(getattr(tableau, field) or (), by):
            yield f"{field}{where}", with_(**{field: changed})
    for field in ("coefficients", "a", "c"):
        for where, changed in nudged(getattr(tableau.interpolant, field), by):
            yield f"interpolant.{field}{where}", with_interpolant(**{field: changed})


def accepted(build: Callable[[], Tableau]) -> bool:
    try:
        build()
    except ValueError:
        return False
    return True


def nudged(numbers: Sequence[Any], by: float) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for i, entry in enumerate(numbers):
        if isinstance(entry, tuple):
            for where, changed in nudged(entry, by):
                yield f"[{i}]{where}", (*numbers[:i], changed, *numbers[i + 1 :])
        else:
            yield f"[{i}]", (*numbers[:i], entry + by, *numbers[i + 1 :])


def dot(weights: Sequence[Any], stages: Sequence[Any]) -> Any:
    return sum((w * k for w, k in zip(weights, stages, strict=False) if w), start=0 * stages[0])


def evaluate(tableau: Tableau, f: Callable[[Any, Any], Any], t: Any, y: Any, h: Any) -> list[Any]:
    """All the stages of a step: the method's, the node and the interpolant's."""
    rows = (*tableau.a, tableau.b, *tableau.interpolant.a)
    abscissae = (*tableau.c, 1.0, *tableau.interpolant.c)
    stages = coupled(tableau.a, tableau.c, f, t, y, h) if tableau.implicit else []
    for row, c in list(zip(rows, abscissae, strict=True))[len(stages) :]:
        stages.append(f(t + c * h, y + h * dot(row, stages) if stages else y))
    return stages


def coupled(a: Any, c: Any, f: Callable[[Any, Any], Any], t: Any, y: Any, h: Any) -> list[Any]:
    """The stages of an implicit method by fixed-point iteration, as long as they move."""
    before, stages = [], [f(t, y)] * len(c)
    for _ in range(200):
        if stages == before:
            break
        before = stages
        stages = [f(t + x * h, y + h * dot(row, stages)) for row, x in zip(a, c, strict=True)]
    return stages


def bend(t: float, y: float) -> float:
    return y * y * math.cos(t)


def bent(t: float) -> float:
    """The solution of y' = bend(t, y) from y(0) = 1 / 2."""
    return 1 / (2 - math.sin(t))


def largest_estimate(tableau: Tableau, error: Sequence[float], h: float) -> float:
    """Over several steps, so that an estimate that happens to vanish does not count."""
    starts = (0.1 * k for k in range(30))
    estimates: list[float] = [
        h * dot(error, evaluate(tableau, bend, t, bent(t), h)) for t in starts
    ]
    return max(map(abs, estimates))


def dense_steps(tableau: Tableau) -> tuple[float, float]:
    """Small enough to show the order, large enough to keep above rounding."""
    coarse = 2.0 ** -max(1, 7 - tableau.interpolant.order)
    return coarse, coarse / 2


def dense_error(tableau: Tableau, h: float) -> float:
    t, y = 0.3, bent(0.3)
    stages = evaluate(tableau, bend, t, y, h)
    errors: list[float] = [
        y + h * dot(tableau.interpolant.weights(k / 16), stages) - bent(t + h * k / 16)
        for k in range(1, 17)
    ]
    return max(map(abs, errors))
