"""Gradients equal those of plain autograd on the frozen grid, to 1e-12 in float64.

"Plain autograd" is a textbook replay of the accepted steps (``reference.py``) that shares nothing
with the package but the coefficients of the methods.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils import _pytree as pytree

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.dense import linear
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.steppers import ExplicitRK, Stepper
from tests import problems
from tests.conformance import reference
from tests.conformance.drawn import Drawn, drawn_cases
from tests.conformance.registry import (
    IMPLICIT,
    PARTITIONED,
    QUICK,
    label,
    pacing,
    pairs,
    strategies,
    supports,
)

BOUND = 1e-12

EXACT = strategies(exact=True)
# How parameter gradients are summed is an option apart from how steps are reversed.
SUMMED = [s for s in EXACT if "accumulate" in label(s)]
TANGENT = [s for s in EXACT if s.name == "forward"]
REVERSED = [s for s in EXACT if s not in (*SUMMED, *TANGENT)]
EVERYWHERE = [s for s in EXACT if s.method is None]

OUTPUTS = {
    "end": (0.1, 1.3),
    # Two in one step, some steps without any, one just before the end.
    "dense": (0.1, 0.21, 0.23, 0.7, 1.28, 1.3),
}
# Steps of unequal size, but not so unequal that the weights of Adams methods amplify rounding.
GRID = (0.1, 0.21, 0.33, 0.7, 1.0, 1.3)


def times(outputs: str, decreasing: bool) -> tuple[float, ...]:
    values = GRID if outputs == "grid" else OUTPUTS[outputs]
    return tuple(-t for t in values) if decreasing else values


def replayed(
    case: problems.Case,
    method: str | Stepper,
    nodes: Callable[[Sequence[Tensor]], list[Tensor]],
    tolerance: float = 1e-4,
) -> tuple[Any, dict[str, Tensor | None]]:
    """The reference solution of a case, and its gradients."""
    t = list(case.t)
    stepper = steppers.get(method) if isinstance(method, str) else method
    y = reference.frozen(
        stepper, case.func, case.y0, nodes(t), t, case.args, tolerance=(tolerance, tolerance)
    )
    return y, case.gradients(y)


def assert_equal(
    case: problems.Case, sol: sa.Solution, wanted: tuple[Any, dict[str, Tensor | None]]
) -> None:
    y, gradients = wanted
    flat = zip(*(pytree.tree_leaves(x) for x in (sol.y, y)), strict=True)
    assert max(problems.relative_error(a, b) for a, b in flat) <= 1e-13
    assert_close(case.gradients(sol.y), gradients)


def assert_close(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    error, where = problems.worst(got, wanted)
    assert error <= BOUND, f"the gradient of {where} is off by {error:.1e}"


@functools.cache
def expected(
    method: str,
    steps: tuple[float, ...],
    fixed: bool,
    problem: tuple[tuple[str, Any], ...],
    tolerance: float,
) -> tuple[Any, dict[str, Tensor | None]]:
    """The reference solution of a problem and its gradients, once for all strategies."""
    nodes = reference.uniform_nodes if fixed else reference.adaptive_nodes
    frozen = torch.tensor(steps, dtype=torch.float64)
    case = problems.case(**dict(problem))
    y, gradients = replayed(case, method, functools.partial(nodes, frozen), tolerance)
    return pytree.tree_map(torch.Tensor.detach, y), gradients


def solve(
    case: problems.Case,
    method: str | Stepper,
    strategy: Any,
    controller: Any,
    tolerance: float = 1e-4,
) -> sa.Solution:
    return case.solve(
        method=method,
        controller=controller,
        gradient=strategy,
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("wants_time", [False, True], ids=["t-fixed", "t-differentiated"])
@pytest.mark.parametrize("decreasing", [False, True], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("tree", [False, True], ids=["tensor", "pytree"])
@pytest.mark.parametrize(("method", "strategy"), pairs(REVERSED, QUICK))
def test_gradient_equals_that_of_autograd_on_the_frozen_grid(
    method: str, strategy: Strategy, tree: bool, outputs: str, decreasing: bool, wants_time: bool
) -> None:
    problem = {
        "tree": tree,
        "separable": method in PARTITIONED,
        "times": times(outputs, decreasing),
        "wants_time": wants_time,
    }
    case = problems.case(**problem)
    controller, tolerance = pacing(steppers.get(method))
    sol = solve(case, method, strategy, controller, tolerance)
    assert sol.stats.accepted > 2
    fixed = isinstance(controller, sa.FixedGrid)
    wanted = expected(method, tuple(sol.steps.tolist()), fixed, tuple(problem.items()), tolerance)
    assert_equal(case, sol, wanted)


@pytest.mark.parametrize(
    ("tree", "outputs", "decreasing", "wants_time"),
    [(False, "dense", False, True), (True, "dense", True, False)],
)
@pytest.mark.parametrize(("method", "strategy"), pairs(REVERSED, IMPLICIT))
def test_gradient_of_implicit_steps_equals_that_of_autograd_on_the_frozen_grid(
    method: str, strategy: Strategy, tree: bool, outputs: str, decreasing: bool, wants_time: bool
) -> None:
    test_gradient_equals_that_of_autograd_on_the_frozen_grid(
        method, strategy, tree, outputs, decreasing, wants_time
    )


@pytest.mark.parametrize(
    ("tree", "outputs", "decreasing", "wants_time"),
    [(False, "dense", False, True), (True, "end", False, True), (True, "dense", True, False)],
)
@pytest.mark.parametrize(
    ("method", "strategy"),
    pairs(REVERSED, ["symplectic_euler", "verlet"]) + pairs(TANGENT, ["verlet"]),
)
def test_gradient_of_partitioned_steps_equals_that_of_autograd_on_the_frozen_grid(
    method: str, strategy: Strategy, tree: bool, outputs: str, decreasing: bool, wants_time: bool
) -> None:
    test_gradient_equals_that_of_autograd_on_the_frozen_grid(
        method, strategy, tree, outputs, decreasing, wants_time
    )


@pytest.mark.parametrize(("method", "strategy"), pairs(REVERSED, PARTITIONED[2:]))
def test_gradient_of_composed_partitioned_steps_is_exact(method: str, strategy: Strategy) -> None:
    test_gradient_equals_that_of_autograd_on_the_frozen_grid(
        method, strategy, tree=True, outputs="dense", decreasing=False, wants_time=True
    )


@pytest.mark.parametrize(("method", "strategy"), pairs(SUMMED, QUICK))
def test_gradient_is_exact_however_it_is_summed(method: str, strategy: Strategy) -> None:
    test_gradient_equals_that_of_autograd_on_the_frozen_grid(
        method, strategy, tree=True, outputs="dense", decreasing=True, wants_time=True
    )


@pytest.mark.parametrize(("method", "strategy"), pairs(TANGENT, QUICK))
def test_gradient_is_exact_where_no_step_is_reversed(method: str, strategy: Strategy) -> None:
    test_gradient_equals_that_of_autograd_on_the_frozen_grid(
        method, strategy, tree=True, outputs="dense", decreasing=False, wants_time=True
    )


@pytest.mark.parametrize(("method", "strategy"), pairs(TANGENT, ["sdirk2", "radauIIA3"]))
def test_tangents_of_implicit_steps_are_exact(method: str, strategy: Strategy) -> None:
    case = problems.case(times=(0.0, 0.2), wants_time=True, batch=1, dim=2, hidden=1)
    sol = solve(case, method, strategy, sa.FixedGrid())
    assert_equal(case, sol, replayed(case, method, list))


@pytest.mark.parametrize("decreasing", [False, True], ids=["increasing", "decreasing"])
@pytest.mark.parametrize(
    ("method", "strategy"),
    pairs(REVERSED, (*QUICK, "symplectic_euler", "yoshida4"))
    + pairs([sa.Symplectic(), sa.ACA()], IMPLICIT),
)
def test_every_time_of_a_grid_that_is_t_has_its_gradient(
    method: str, strategy: Strategy, decreasing: bool
) -> None:
    separable = method in PARTITIONED
    case = problems.case(times=times("grid", decreasing), wants_time=True, separable=separable)
    sol = solve(case, method, strategy, sa.FixedGrid())
    assert torch.equal(sol.steps, case.t.detach())
    assert_equal(case, sol, replayed(case, method, list))


@pytest.mark.parametrize("strategy", EVERYWHERE, ids=label)
@pytest.mark.parametrize("method", ["midpoint", "rk4", "dopri5", "dopri8"])
def test_a_constructed_grid_hands_its_gradient_to_t(method: str, strategy: Strategy) -> None:
    """Some outputs lie on nodes that follow them, some on nodes that follow others."""

    def halved(func: Any, y0: Any, t: Tensor) -> Tensor:
        middles = (t[1:] + t[:-1]) / 2
        return torch.cat([torch.stack([t[:-1], middles], dim=1).flatten(), t[-1:]])

    case = problems.case(times=(0.0, 0.5, 0.8, 1.3), wants_time=True)
    sol = solve(case, method, strategy, sa.FixedGrid(grid_constructor=halved))

    def nodes(t: Sequence[Tensor]) -> list[Tensor]:
        middles = [(a + b) / 2 for a, b in itertools.pairwise(t)]
        return [x for pair in zip(t, middles, strict=False) for x in pair] + [t[-1]]

    assert_equal(case, sol, replayed(case, method, nodes))


@pytest.mark.parametrize("strategy", EVERYWHERE, ids=label)
def test_on_a_constant_grid_all_outputs_move_along_the_interpolant(strategy: Strategy) -> None:
    case = problems.case(times=(0.0, 0.5, 0.8, 1.3), wants_time=True)
    constant = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.3], dtype=torch.float64)
    sol = solve(case, "dopri5", strategy, sa.FixedGrid(grid_constructor=lambda f, y, t: constant))
    assert_equal(case, sol, replayed(case, "dopri5", lambda t: list(constant)))


@pytest.mark.parametrize("wants_time", [False, True], ids=["t-fixed", "t-differentiated"])
@pytest.mark.parametrize("strategy", EXACT, ids=label)
@pytest.mark.parametrize("method", ["euler", "rk4", "tsit5", "alf"])
def test_an_output_on_a_node_of_a_uniform_grid_moves_along_the_interpolant(
    method: str, strategy: Strategy, wants_time: bool
) -> None:
    if not supports(strategy, method):
        pytest.skip("the strategy has a method of its own")
    case = problems.case(times=(0.0, 0.25, 0.6, 0.75, 1.0), wants_time=wants_time)
    sol = solve(case, method, strategy, sa.FixedGrid(step_size=0.25))
    assert sol.steps.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    nodes = functools.partial(reference.uniform_nodes, sol.steps)
    assert_equal(case, sol, replayed(case, method, nodes))


@pytest.mark.parametrize("wants_time", [False, True], ids=["t-fixed", "t-differentiated"])
@pytest.mark.parametrize("strategy", EXACT, ids=label)
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8", "alf"])
def test_an_output_on_an_accepted_step_moves_along_the_interpolant(
    method: str, strategy: Strategy, wants_time: bool
) -> None:
    if not supports(strategy, method):
        pytest.skip("the strategy has a method of its own")
    controller, tolerance = pacing(steppers.get(method))
    case = problems.case(times=(0.0, 1.3), wants_time=wants_time)
    steps = solve(case, method, strategy, controller, tolerance).steps.tolist()
    case = problems.case(times=(0.0, steps[2], steps[-2], 1.3), wants_time=wants_time)
    sol = solve(case, method, strategy, controller, tolerance)
    assert sol.steps.tolist() == steps
    nodes = functools.partial(reference.adaptive_nodes, sol.steps)
    assert_equal(case, sol, replayed(case, method, nodes))


@pytest.mark.parametrize("strategy", EVERYWHERE, ids=label)
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_linear_interpolation_is_differentiated_as_well(method: str, strategy: Strategy) -> None:
    case = problems.case(times=(0.0, 0.13, 0.21, 1.0), wants_time=True)
    stepper = steppers.get(method)
    assert isinstance(stepper, ExplicitRK)
    y = sa.odeint(
        lambda t, y: case.func(t, y, *case.args),
        case.y0,
        case.t,
        method=method,
        options={"step_size": 0.25},
        gradient=strategy,
    )
    t = list(case.t)
    nodes = reference.uniform_nodes(torch.linspace(0, 1, 5, dtype=torch.float64), t)
    straight = linear(stepper.tableau.b)
    wanted = reference.frozen(stepper, case.func, case.y0, nodes, t, case.args, straight)
    assert_close(case.gradients(y), case.gradients(wanted))


@pytest.mark.parametrize("strategy", EXACT, ids=label)
def test_dense_output_after_the_solve_has_the_same_gradient(strategy: Strategy) -> None:
    """Times out of order and repeated, an end of the interval and a node among them."""
    method = strategy.method or "tsit5"
    controller, tolerance = pacing(steppers.get(method))
    case = problems.case(times=(0.0, 1.3), tree=True)
    sol = case.solve(
        method=method,
        controller=controller,
        rtol=tolerance,
        atol=tolerance,
        gradient=strategy,
        dense=True,
    )
    asked = torch.tensor(
        [0.9, 0.05, 1.3, 0.0, 0.9, float(sol.steps[2])], dtype=torch.float64, requires_grad=True
    )
    order = asked.detach().argsort()
    ends = [torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)]
    t = list(asked)
    sorted_times = [ends[0], *(t[i] for i in order.tolist())]
    nodes = reference.adaptive_nodes(sol.steps, ends)
    stepper = steppers.get(method)
    y = reference.frozen(stepper, case.func, case.y0, nodes, sorted_times, case.args)
    wanted = pytree.tree_map(lambda x: x[1:][order.argsort()], y)
    case.t = asked
    assert_close(case.gradients(sol.dense(asked)), case.gradients(wanted))


@pytest.mark.parametrize("strategy", EVERYWHERE, ids=label)
@given(drawn=drawn_cases(QUICK))
def test_gradient_equals_that_of_autograd_on_drawn_problems(
    strategy: Strategy, drawn: Drawn
) -> None:
    """A gradient is a sum over the stages; its rounding is measured by the size of the terms."""
    case, method, nodes = drawn.case, drawn.method, drawn.nodes
    sol = solve(case, method, strategy, drawn.controller, drawn.tolerance)
    split = reference.Split(case.func, case.params)
    t = list(case.t)
    y = reference.frozen(
        steppers.get(method),
        split,
        case.y0,
        nodes(sol.steps, t),
        t,
        case.args,
        tolerance=(drawn.tolerance, drawn.tolerance),
    )
    sizes = split.sizes(problems.loss(y))
    got, wanted = case.gradients(sol.y), case.gradients(y)
    for name, right in wanted.items():
        scale = max(sizes.get(name, 0.0), problems.size(right))
        assert problems.distance(got[name], right) <= BOUND * scale, name
