"""The time of an event, the state there and the outputs before it: equal to autograd's to 1e-12.

The reference replays the frozen grid by the textbook and solves ``g(tau, Y(tau)) = 0`` by a Newton
step on the graph.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.steppers import ExplicitRK
from tests import problems
from tests.conformance import reference
from tests.conformance.registry import METHODS, label, pacing, strategies

BOUND = 1e-12

EXACT = [s for s in strategies(exact=True) if "accumulate" not in label(s)]
PAIRS = [
    pytest.param(method, strategy, id=f"{method}-{label(strategy)}")
    for method in ("dopri5", "tsit5", "dopri8", "bosh3", "rk4", "alf")
    for strategy in EXACT
    if strategy.method in (None, method)
]


def height(level: Tensor) -> Any:
    """A function of time, of every leaf of the state, of ``gain`` and of a parameter of its own."""

    def event(t: Tensor, y: Any, gain: Tensor) -> Tensor:
        total = sum(torch.sin(x).sum() for x in pytree.tree_leaves(y))
        return total * gain - level * torch.exp(0.3 * t)

    return event


def problem(tree: bool, decreasing: bool) -> tuple[problems.Case, Tensor]:
    """A case that ends at 1.9, whose event lies at about 1, and the event's level."""
    times = (0.1, 0.3, 0.35, 0.8, 1.9)
    sign = -1.0 if decreasing else 1.0
    case = problems.case(tree=tree, times=[sign * t for t in times], wants_time=True)
    with torch.no_grad():
        middle = torch.tensor([sign * 0.1, sign * 1.0], dtype=torch.float64)
        at = sa.solve(case.func, case.y0, middle, args=case.args)
        y = pytree.tree_map(lambda x: x[-1], at.y)
        zero = torch.zeros((), dtype=torch.float64)
        value = height(zero)(middle[-1], y, *case.args) * torch.exp(-0.3 * middle[-1])
    level = value.detach().requires_grad_()
    case.params = {**case.params, "level": level}
    return case, level


def solved(case: problems.Case, level: Tensor, method: str, strategy: Strategy) -> sa.Solution:
    controller, tolerance = pacing(steppers.get(method), 0.23)
    return case.solve(
        method=method,
        controller=controller,
        gradient=strategy,
        rtol=tolerance,
        atol=tolerance,
        event=height(level),
    )


def frozen(
    case: problems.Case, level: Tensor, method: str, sol: sa.Solution, fixed: bool
) -> dict[str, Any]:
    """What the solution holds, by the textbook."""
    t = list(case.t)
    if fixed:
        nodes = [*(t[0] + (sol.steps - sol.steps[0])).unbind()]
    else:
        nodes = [t[0], *sol.steps[1:].unbind()]
    before = t[: len(sol.t)]
    replay = functools.partial(
        reference.frozen, steppers.get(method), case.func, case.y0, nodes, args=case.args
    )
    assert sol.event is not None
    start = sol.event.t.detach().clone().requires_grad_()
    ends = pytree.tree_map(lambda x: x[-1], replay([*before, start]))
    value = height(level)(start, ends, *case.args)
    (slope,) = torch.autograd.grad(value, start, retain_graph=True)
    assert abs(value.item() / slope.item()) < 1e-14
    tau = start.detach() - (value - value.detach()) / slope
    y = replay([*before, tau])
    return {
        "t": tau,
        "end": pytree.tree_map(lambda x: x[-1], y),
        "y": pytree.tree_map(lambda x: x[:-1], y),
    }


def joined(parts: dict[str, Any]) -> dict[str, Any]:
    """What is differentiated: everything at once."""
    return {**parts, "t": parts["t"].reshape(1), "square": parts["t"].square().reshape(1)}


@pytest.mark.parametrize(
    ("tree", "decreasing"),
    [pytest.param(False, False, id="tensor"), pytest.param(True, True, id="pytree, decreasing")],
)
@pytest.mark.parametrize(("method", "strategy"), PAIRS)
def test_an_event_is_differentiated_exactly_with_all_outputs_before_it(
    method: str, strategy: Strategy, tree: bool, decreasing: bool
) -> None:
    case, level = problem(tree, decreasing)
    sol = solved(case, level, method, strategy)
    assert sol.status is sa.Status.EVENT
    assert sol.event is not None
    assert sol.stats.accepted > 2
    assert len(sol.t) == 4
    fixed = steppers.get(method).error_order is None
    wanted = frozen(case, level, method, sol, fixed)
    got = {"t": sol.event.t, "end": sol.event.y, "y": sol.y}

    pairs = zip(*(pytree.tree_leaves(x) for x in (got, wanted)), strict=True)
    assert max(problems.relative_error(a, b) for a, b in pairs) <= 1e-13
    error, where = problems.worst(case.gradients(joined(got)), case.gradients(joined(wanted)))
    assert error <= BOUND, f"the gradient of {where} is off by {error:.1e}"


@pytest.mark.parametrize("strategy", EXACT, ids=label)
def test_second_derivatives_of_an_event_are_those_of_the_textbook(strategy: Strategy) -> None:
    """Two Newton steps on the graph are exact to second order."""
    case, level = problem(tree=False, decreasing=False)
    sol = solved(case, level, "alf", strategy)
    assert sol.event is not None
    t = list(case.t)
    nodes = [t[0], *sol.steps[1:].unbind()]
    stepper = steppers.get("alf")

    def at(time: Tensor) -> Any:
        return reference.frozen(stepper, case.func, case.y0, nodes, [t[0], time], case.args)[-1]

    tau = sol.event.t.detach().clone().requires_grad_()
    for _ in range(2):
        value = height(level)(tau, at(tau), *case.args)
        (slope,) = torch.autograd.grad(value, tau, create_graph=True)
        tau = tau - value / slope

    def second(time: Tensor, end: Tensor) -> dict[str, Tensor | None]:
        inputs = case.inputs()
        scalar = time.sin() + problems.loss(end) * time
        first = torch.autograd.grad(scalar, list(inputs.values()), create_graph=True)
        grads = torch.autograd.grad(problems.loss(list(first)), list(inputs.values()))
        return dict(zip(inputs, grads, strict=True))

    error, where = problems.worst(second(sol.event.t, sol.event.y), second(tau, at(tau)))
    assert error <= BOUND, f"the second derivative of {where} is off by {error:.1e}"


@pytest.mark.parametrize("method", METHODS)
def test_the_state_at_an_event_of_time_moves_along_the_dense_output(method: str) -> None:
    """Every method: the time follows the parameter of the event, the state the dense output."""
    case = problems.case(times=(0.1, 1.3))
    controller, tolerance = pacing(steppers.get(method), 0.23)
    place = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    sol = case.solve(
        method=method,
        controller=controller,
        rtol=tolerance,
        atol=tolerance,
        dense=True,
        event=lambda t, y, gain: t - place,
    )
    assert sol.event is not None
    assert abs(sol.event.t.item() - 0.7) < 1e-15
    (slope,) = torch.autograd.grad(sol.event.t, place, retain_graph=True)
    assert slope.item() == 1.0
    time = sol.event.t.detach().requires_grad_()
    case.params = {**case.params, "place": place}
    along = case.gradients(sol.dense(time))
    (along["place"],) = torch.autograd.grad(problems.loss(sol.dense(time)), time)
    error, where = problems.worst(case.gradients(sol.event.y), along)
    assert error <= BOUND, f"the gradient of {where} is off by {error:.1e}"


@pytest.mark.parametrize("method", ["rk4", "dopri8"])
def test_steps_after_an_event_cost_nothing(method: str) -> None:
    """The backward pass of a solve that an event ends is that of a solve to the same step."""
    case, level = problem(tree=False, decreasing=False)
    sol = solved(case, level, method, sa.Symplectic())
    assert sol.event is not None
    (sol.event.t + problems.loss(sol.event.y)).backward()
    stepper = steppers.get(method)
    assert isinstance(stepper, ExplicitRK)
    steps, work = len(sol.steps) - 1, stepper.work
    # The outputs before the event lie in steps of their own or not; the node past it is not used.
    assert sol.stats.accepted == steps
    most = 1 + steps * (work.inner + work.node + work.extra)
    assert sol.stats.products <= most
    assert sol.steps[-2] < sol.event.t < sol.steps[-1]
