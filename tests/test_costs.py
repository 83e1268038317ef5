"""What a solve costs: evaluations and products to the last one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import gradients, steppers
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.loop import SolveShape
from symplectic_adjoint.steppers import Stepper
from tests.conformance.registry import QUICK

Placing = Literal["end", "inside", "inside, none at the end", "nodes"]
"""Where the outputs are: at the end, inside steps, inside early steps only, at step ends."""

STRATEGIES: dict[str, Strategy] = {
    **{name: gradients.get(name) for name in gradients.names() if name != "symplectic"},
    **{f"symplectic, {s}": sa.Symplectic(s) for s in ("stages", "steps", "graph")},
    "forward, in chunks": sa.Forward(chunk=11),
    "continuous, other method": sa.Continuous(method_name="bosh3", rtol=1e-2, atol=1e-2),
}
PLACINGS: tuple[Placing, ...] = ("end", "inside", "inside, none at the end", "nodes")


def pairs(adaptive: bool) -> list[Any]:
    """Each method with each strategy that can reverse it."""
    return [
        pytest.param(method, strategy, id=f"{method}-{name}")
        for method in QUICK  # test_implicit.py counts what the others take
        if not adaptive or steppers.get(method).error_order is not None
        for name, strategy in STRATEGIES.items()
        if strategy.method in (None, method)
    ]


INPUTS = 24
"""Numbers in the initial state and in the parameters of the network below."""


class Counted(nn.Module):
    """A small network with a sudden change, so that steps are rejected; it counts its own use."""

    def __init__(self, sharp: float = 60.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(2, 4, dtype=torch.float64)
        self.outer = nn.Linear(4, 2, dtype=torch.float64)
        self.sharp = sharp
        self.calls = 0
        self.products = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        k: Tensor = self.outer(torch.tanh(self.inner(y))) + torch.tanh(self.sharp * (t - 0.6))
        if k.requires_grad:
            k.register_hook(self._pulled)
        return k

    def _pulled(self, cotangent: Tensor) -> None:
        self.products += 1

    def taken(self) -> tuple[int, int]:
        """Calls and products since this was last asked."""
        counts = self.calls, self.products
        self.calls = self.products = 0
        return counts


def solved(
    func: Counted, method: str, strategy: Strategy, t: Tensor, controller: Any = None
) -> sa.Solution:
    y0 = torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    return sa.solve(
        func,
        y0,
        t,
        method=method,
        gradient=strategy,
        controller=controller,
        rtol=1e-3,
        atol=1e-3,
    )


def times(placing: Placing, steps: Tensor) -> Tensor:
    """Output times placed on a known grid."""
    middles = (steps[:-1] + steps[1:]) / 2
    if placing == "end":
        return steps[[0, -1]]
    if placing == "inside":
        # Two in the first step, one in the last.
        inside = torch.cat([(steps[:1] + middles[:1]) / 2, middles[:1], middles[-1:]])
        return torch.cat([steps[:1], inside.unique(), steps[-1:]])
    if placing == "inside, none at the end":
        return torch.cat([steps[:1], middles[:-1:2], steps[-1:]])
    return torch.cat([steps[:-1:2], steps[-1:]])


def shape(solution: sa.Solution, adaptive: bool, moved: bool, strategy: Strategy) -> SolveShape:
    """The shape of a solve, worked out from its grid and its output times alone."""
    t, steps = solution.t.tolist(), solution.steps.tolist()
    ends = steps[-1:] if moved else steps  # the interior nodes are constants
    dense = [
        any(a < x <= b and not (x == b and b in ends) for x in t)
        for a, b in itertools.pairwise(steps)
    ]
    own = None
    if isinstance(strategy, sa.Continuous):
        own = SolveShape(
            accepted=solution.stats.backward_accepted,
            rejected=solution.stats.backward_rejected,
            adaptive=adaptive,
            selected=(len(t) - 1) * adaptive,
            solves=len(t) - 1,
            further=solution.stats.backward_further,
        )
    return SolveShape(
        accepted=len(dense),
        rejected=solution.stats.rejected,
        dense=sum(dense),
        dense_ends=dense[-1],
        adaptive=adaptive,
        selected=adaptive,
        moved=len(t) - 1 if moved else 0,
        adjoint=own,
        scalars=INPUTS + (1 + (2 if adaptive else len(steps)) if moved else 0),
        further=solution.stats.further,
    )


def assert_as_declared(method: str, strategy: Strategy, *, adaptive: bool, moved: bool) -> None:
    """Three ways of counting agree: the declared formulas, the statistics, and ``func`` itself."""
    func, stepper = Counted(), steppers.get(method)
    controller = sa.Adaptive() if adaptive else sa.FixedGrid(step_size=0.3)
    bounds = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=moved)
    grid = solved(func, method, strategy, bounds, controller).steps
    for placing in PLACINGS:
        t = times(placing, grid).requires_grad_(moved)
        func.taken()

        solution = solved(func, method, strategy, t, controller)
        forward, _ = func.taken()
        solution.y.square().sum().backward()
        backward, products = func.taken()

        stats = solution.stats
        seen = shape(solution, adaptive, moved, strategy)
        assert torch.equal(solution.steps, grid), placing
        assert stats.accepted == seen.accepted, placing
        assert (stats.rejected > 0) == adaptive, "the adaptive cases must hold a rejection"
        assert stats.evaluations == forward == seen.evaluations(stepper.work), placing
        declared = strategy.counts(stepper, seen)
        counted = (backward, products)
        assert (stats.backward_evaluations, stats.products) == counted == declared, placing
        assert_within_table(strategy, stepper, seen, backward + products)


def assert_within_table(
    strategy: Strategy, stepper: Stepper, seen: SolveShape, backward: int
) -> None:
    """The table of costs in docs/gradients.md, without what rejections and step selection add."""
    s = stepper.tableau.stages if isinstance(stepper, sa.ExplicitRK) else 1
    extras = stepper.work.extra + 1  # the node, too, may be needed for dense outputs alone
    cost = seen.accepted * s + seen.dense * extras + 1 + seen.further
    forward = seen.stages(stepper.work)
    assert forward <= cost
    if isinstance(strategy, sa.Continuous):
        assert seen.adjoint is not None
        own = strategy.stepper(stepper)
        own_s = own.tableau.stages if isinstance(own, sa.ExplicitRK) else 1
        attempts = seen.adjoint.accepted + seen.adjoint.rejected
        # Each interval selects its first step, and its last node may be evaluated for the error.
        cost_back = attempts * own_s + seen.adjoint.solves * 3 + seen.adjoint.further
        assert forward + backward <= cost + 2 * cost_back + seen.moved
        return
    if isinstance(strategy, sa.Forward):
        chunks = math.ceil(seen.scalars / strategy.chunk)
        assert forward + backward <= (1 + chunks) * cost
        return
    factors = {"backprop": 2, "checkpoint": 3, "aca": 3, "mali": 4, "symplectic": 3}
    if isinstance(strategy, sa.Symplectic) and strategy.store == "steps":
        factors["symplectic"] = 4
    assert forward + backward <= factors[strategy.name] * cost


@pytest.mark.parametrize(("method", "strategy"), pairs(adaptive=True))
def test_adaptive_counts_are_as_declared_and_within_the_table(
    method: str, strategy: Strategy
) -> None:
    assert_as_declared(method, strategy, adaptive=True, moved=False)


@pytest.mark.parametrize(("method", "strategy"), pairs(adaptive=False))
def test_fixed_counts_are_as_declared_and_within_the_table(method: str, strategy: Strategy) -> None:
    assert_as_declared(method, strategy, adaptive=False, moved=False)


@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
@pytest.mark.parametrize(
    ("method", "strategy"), [p for p in pairs(adaptive=True) if p.values[0] in ("dopri8", "alf")]
)
def test_counts_are_as_declared_when_times_have_gradients(
    method: str, strategy: Strategy, adaptive: bool
) -> None:
    assert_as_declared(method, strategy, adaptive=adaptive, moved=True)


def test_a_given_first_step_saves_the_evaluation_that_selects_one() -> None:
    t = torch.tensor([0.0, 1.0])
    func = Counted()
    first_step = sa.Adaptive(first_step=0.01)
    solution = solved(func, "dopri5", sa.Symplectic(), t, first_step)
    seen = shape(solution, True, False, sa.Symplectic())
    work = steppers.get("dopri5").work
    assert solution.stats.evaluations == func.calls == seen.evaluations(work) - 1


@pytest.mark.parametrize("store", ["stages", "steps", "graph"])
def test_a_second_backward_pass_is_counted_for_itself(store: Any) -> None:
    strategy, func = sa.Symplectic(store), Counted()
    solution = solved(func, "bosh3", strategy, torch.tensor([0.0, 1.0]))
    loss = solution.y.square().sum()
    stepper = steppers.get("bosh3")
    declared = strategy.counts(stepper, shape(solution, True, False, strategy))
    loss.backward(retain_graph=True)
    assert (solution.stats.backward_evaluations, solution.stats.products) == declared
    func.taken()
    loss.backward()
    # The graphs are used up by then: what follows is what stored stages cost.
    again = (declared.products, declared.products) if store == "graph" else declared
    assert (solution.stats.backward_evaluations, solution.stats.products) == again
    assert func.taken() == again


@pytest.mark.parametrize("strategy", ["symplectic", "aca", "checkpoint"])
def test_a_backward_pass_to_be_differentiated_again_counts_its_replay(strategy: str) -> None:
    func = Counted()
    solution = solved(func, "bosh3", gradients.get(strategy), torch.tensor([0.0, 1.0]))
    func.taken()
    torch.autograd.grad(solution.y.sum(), func.outer.weight, create_graph=True)
    stages = shape(solution, True, False, sa.Backprop()).stages(steppers.get("bosh3").work)
    counted = (solution.stats.backward_evaluations, solution.stats.products)
    assert counted == func.taken() == (stages, stages)


def spy(func: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[[Tensor, Tensor], Tensor], Any]:
    """The function, and a list that grows by one at each call."""
    calls: list[None] = []

    def counted(t: Tensor, y: Tensor) -> Tensor:
        calls.append(None)
        return func(t, y)

    return counted, calls


class Held:
    """Holds a tensor where a walk over the references of a function does not look."""

    rate = torch.tensor(-0.5, requires_grad=True)


def late_random(t: Tensor, y: Tensor) -> Tensor:
    """Draws from the middle of the interval on."""
    k = torch.sin(y)
    return k * (1 + 0.01 * torch.rand(())) if t > 0.5 else k


def late_hidden(t: Tensor, y: Tensor) -> Tensor:
    """Reaches a tensor through an attribute of a class, from the middle of the interval on."""
    return y * Held.rate if t > 0.5 else -y


def differentiates(t: Tensor, y: Tensor) -> Tensor:
    """Expects an argument that requires grad."""
    (slope,) = torch.autograd.grad(torch.cos(y).sum(), y, create_graph=True)
    return slope


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("inner", [late_random, late_hidden, differentiates])
def test_calls_in_attempts_that_were_given_up_are_counted(
    method: str, inner: Callable[[Tensor, Tensor], Tensor]
) -> None:
    func, calls = spy(inner)
    y0 = torch.ones(3, requires_grad=True)
    t = torch.linspace(0.0, 1.0, 5)
    solution = sa.solve(func, y0, t, method=method, rtol=1e-3, atol=1e-3)
    assert solution.stats.evaluations == len(calls)
    seen = shape(solution, method == "dopri5", False, sa.Symplectic())
    assert len(calls) > seen.evaluations(steppers.get(method).work)
    calls.clear()
    solution.y.sum().backward()
    assert solution.stats.backward_evaluations == len(calls)


def test_calls_are_counted_when_a_grid_has_to_be_checked_step_by_step() -> None:
    func, calls = spy(lambda t, y: y / (t < 0.5))
    t = torch.linspace(0.0, 1.0, 5)
    solution = sa.solve(func, torch.ones(3), t, method="rk4", throw=False)
    assert solution.status is sa.Status.NON_FINITE
    assert solution.stats.evaluations == len(calls)
