"""Observed orders: every method, through ``solve``, on grids that are refined."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from tests import problems
from tests.conformance.registry import METHODS as GENERAL
from tests.conformance.registry import PARTITIONED

# The orders of Adams methods are an option.
ADAMS: dict[str, Any] = {
    **{f"explicit_adams, {m}": sa.ExplicitAdams(max_order=m) for m in (2, 3, 4, 5)},
    **{f"implicit_adams, {m}": sa.ImplicitAdams(max_order=m) for m in (2, 3, 4, 5)},
    "explicit_adams, 6, from dopri5": sa.ExplicitAdams(max_order=6, start="dopri5"),
    "implicit_adams, 6, from dopri5": sa.ImplicitAdams(max_order=6, start="dopri5"),
    "implicit_adams, 8, from dopri8": sa.ImplicitAdams(max_order=8, start="dopri8"),
}
METHODS: dict[str, Any] = {
    **{name: steppers.get(name) for name in GENERAL if "adams" not in name},
    **ADAMS,
    **{name: steppers.get(name) for name in PARTITIONED},
}
STOP, ROUNDING = 1e-11, 1e-13


def error(method: Any, grid: Sequence[float]) -> float:
    """The greatest error at the step times of a grid."""
    known = problems.known_separable() if isinstance(method, sa.Partitioned) else problems.known()
    t = torch.tensor(grid, dtype=torch.float64)
    y0, controller = known.solution(t[:1])[0], sa.FixedGrid()
    sol = sa.solve(known.func, y0, t, method=method, controller=controller, rtol=1e-12, atol=1e-14)
    assert torch.equal(sol.steps, t)
    return float((sol.y - known.solution(t)).abs().max())


def equal(steps: int) -> list[float]:
    return unequal(steps, (1.0,))


def unequal(steps: int, sizes: Sequence[float] = (2.0, 3.0)) -> list[float]:
    """Step sizes in turn."""
    first, last = problems.known().span
    turns = itertools.islice(itertools.cycle(sizes), steps)
    ends = list(itertools.accumulate(turns, initial=0.0))
    return [first + (last - first) * x / ends[-1] for x in ends]


def observed(method: Any, grid: Callable[[int], list[float]]) -> float:
    """The rate between the two finest grids on which the error stands clear of rounding."""
    errors = []
    for steps in (8, 16, 32, 64, 128, 256):
        errors.append(error(method, grid(steps)))
        if errors[-1] < STOP:
            break
    coarse, fine = [e for e in errors if e > ROUNDING][-2:]
    return math.log2(coarse / fine)


@pytest.mark.filterwarnings("ignore::symplectic_adjoint.ConvergenceWarning")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_error_shrinks_with_the_order(method: Any) -> None:
    assert observed(method, equal) == pytest.approx(method.order, abs=0.2)


@pytest.mark.filterwarnings("ignore::symplectic_adjoint.ConvergenceWarning")
@pytest.mark.parametrize("method", ADAMS.values(), ids=ADAMS)
def test_adams_methods_keep_their_order_on_unequal_steps(method: Any) -> None:
    assert observed(method, unequal) == pytest.approx(method.order, abs=0.2)
