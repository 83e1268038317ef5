"""Every method, and its dense output, converges with the order it declares."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.steppers import ExplicitRK
from tests import problems
from tests.conformance.registry import METHODS

KNOWN = problems.known()
INSIDE = torch.tensor([0.17, 0.5, 0.83], dtype=torch.float64)


def global_error(method: str, steps: int, inside: bool, decreasing: bool = False) -> float:
    """The largest error at all nodes of a uniform grid, or within all of its steps."""
    nodes = torch.linspace(*KNOWN.span, steps + 1, dtype=torch.float64)
    if decreasing:
        nodes = nodes.flip(0)
    between = nodes[:-1, None] + nodes.diff()[:, None] * INSIDE
    return largest_error(method, nodes, between.flatten() if inside else nodes[1:])


def local_error(method: str, parts: int) -> float:
    """The largest error inside one step, a part of 1, from the exact solution."""
    start = torch.tensor(KNOWN.span[:1], dtype=torch.float64)
    return largest_error(method, torch.cat([start, start + 1 / parts]), start + INSIDE / parts)


def largest_error(method: str, nodes: Tensor, at: Tensor) -> float:
    grid = sa.FixedGrid(grid_constructor=lambda func, y0, t: nodes)
    t = torch.cat([nodes[:1], at, nodes[-1:]])
    t = t if t[-1] != t[-2] else t[:-1]
    sol = sa.solve(KNOWN.func, KNOWN.solution(t[:1])[0], t, method=method, controller=grid)
    return float((sol.y - KNOWN.solution(t))[1 : len(at) + 1].norm(dim=-1).max())


def observed_order(error: Callable[[int], float], first: int, most: int) -> float:
    """The slope of the error as steps shrink, measured just above rounding."""
    n, coarse = first, error(first)
    order = math.nan
    while n < most and coarse > 1e-10:
        finer = math.ceil(1.5 * n)
        fine = error(finer)
        order = math.log(coarse / fine) / math.log(finer / n)
        n, coarse = finer, fine
    return order


@pytest.mark.parametrize("decreasing", [False, True], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("method", METHODS)
def test_global_error_shrinks_with_the_order_of_the_method(method: str, decreasing: bool) -> None:
    order = observed_order(lambda n: global_error(method, n, False, decreasing), 12, 60)
    assert order == pytest.approx(steppers.get(method).order, abs=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_dense_output_of_a_solve_is_of_the_order_of_the_method_or_its_own(method: str) -> None:
    stepper = steppers.get(method)
    dense = stepper.dense.order + 1 if isinstance(stepper, ExplicitRK) else stepper.order
    order = observed_order(lambda n: global_error(method, n, True), 12, 60)
    assert order == pytest.approx(min(stepper.order, dense), abs=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_error_inside_a_step_shrinks_with_the_order_of_the_interpolant(method: str) -> None:
    stepper = steppers.get(method)
    uniform = stepper.dense.order if isinstance(stepper, ExplicitRK) else stepper.order
    order = observed_order(lambda n: local_error(method, n), 2, 40)
    assert order == pytest.approx(uniform + 1, abs=0.2)


@pytest.mark.parametrize("method", [m for m in METHODS if steppers.get(m).error_order])
def test_a_hundredth_of_the_tolerance_gives_a_twentieth_of_the_error_at_most(method: str) -> None:
    t = torch.tensor(KNOWN.span, dtype=torch.float64)
    exact = KNOWN.solution(t)

    def error(tolerance: float) -> float:
        sol = sa.solve(KNOWN.func, exact[0], t, method=method, rtol=tolerance, atol=tolerance)
        return float((sol.y[-1] - exact[-1]).norm())

    assert error(1e-5) < error(1e-3) / 20
