"""Where ``func`` jumps the solve is two solves in a row, and the time of the jump has a gradient.

The reference solves one smooth piece after the other by the textbook, on step times that follow the
jumps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.loop import SolveShape
from tests import problems
from tests.conformance import reference
from tests.conformance.registry import label, pacing, supports
from tests.conformance.test_exactness import REVERSED, assert_close, assert_equal

JUMPS = (0.25, 0.8)


class Pieces(nn.Module):
    """A smooth field on each side of every jump; it must never be asked at a jump itself."""

    def __init__(self, jumps: Sequence[float]) -> None:
        super().__init__()
        self.net = problems.Net()
        self.gains = nn.Parameter(torch.tensor([0.5, 2.0, -1.5], dtype=torch.float64))
        self.jumps = jumps

    def piece(self, k: int, t: Tensor, y: Tensor) -> Tensor:
        return self.net(t, y, self.gains[k]) + k

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        now = float(t.detach())
        assert now not in self.jumps
        return self.piece(sum(now > jump for jump in self.jumps), t, y)


def case(times: Sequence[float], jumps: Sequence[float], wants_time: bool) -> problems.Case:
    func = Pieces(jumps)
    y0 = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor(times, dtype=torch.float64, requires_grad=wants_time)
    at = torch.tensor(jumps, dtype=torch.float64, requires_grad=True)
    return problems.Case(func, y0, t, params={**dict(func.named_parameters()), "jump_t": at})


def by_pieces(method: str, case: problems.Case, steps: Tensor) -> Tensor:
    """The solution piece by piece, every step time that is a jump being that jump."""
    func, jumps = case.func, case.params["jump_t"]
    direction = 1.0 if case.t[-1] > case.t[0] else -1.0
    order = (direction * jumps.detach()).argsort()
    ends = [case.t[0], *jumps[order], case.t[-1]]
    pieces = range(len(ends) - 1) if direction > 0 else reversed(range(len(ends) - 1))
    y, parts, waiting = case.y0, [case.y0.unsqueeze(0)], list(case.t[1:-1])
    for k, (start, end) in zip(pieces, itertools.pairwise(ends), strict=True):
        inner = [x for x in steps if (x - start) * (x - end) < 0]
        inside = [x for x in waiting if direction * (x - end) <= 0]
        waiting = waiting[len(inside) :]

        def smooth(time: Tensor, state: Tensor, k: int = k) -> Any:
            return func.piece(k, time, state)

        reached = reference.frozen(
            steppers.get(method), smooth, y, [start, *inner, end], [start, *inside, end]
        )
        parts.append(reached[1:-1])
        y = reached[-1]
    return torch.cat([*parts, y.unsqueeze(0)])


def solved(
    case: problems.Case, method: str, strategy: Strategy, dense: bool = False
) -> sa.Solution:
    _, tolerance = pacing(steppers.get(method))
    return case.solve(
        method=method,
        gradient=strategy,
        controller=sa.Adaptive(jump_t=case.params["jump_t"]),
        rtol=tolerance,
        atol=tolerance,
        dense=dense,
    )


OUTPUTS = (0.1, 0.15, 0.2, 0.8, 1.25, 1.3)
"""Two outputs in the first piece, one on a jump, one in the last step."""

PAIRS = [
    pytest.param(method, strategy, id=f"{method}-{label(strategy)}")
    for method in ("dopri5", "alf", "dopri8")
    for strategy in (REVERSED if method != "dopri8" else [sa.Symplectic()])
    if supports(strategy, method)
]
IMPLICIT = [sa.Symplectic(), sa.Symplectic("steps"), sa.Backprop(), sa.ACA()]
PAIRS += [
    pytest.param(method, strategy, id=f"{method}-{label(strategy)}")
    for method in ("trbdf2", "radauIIA5")
    for strategy in IMPLICIT
]


def compared(method: str, strategy: Strategy, decreasing: bool, wants_time: bool) -> None:
    sign = -1.0 if decreasing else 1.0
    jumps = sorted(sign * t for t in JUMPS)
    problem = case([sign * t for t in OUTPUTS], jumps, wants_time)
    sol = solved(problem, method, strategy)
    assert set(jumps) <= set(sol.steps.tolist())
    y = by_pieces(method, problem, sol.steps)
    assert_equal(problem, sol, (y, problem.gradients(y)))


@pytest.mark.parametrize("decreasing", [False, True], ids=["increasing", "decreasing"])
@pytest.mark.parametrize(("method", "strategy"), PAIRS)
def test_the_gradient_of_the_time_of_a_jump_is_exact(
    method: str, strategy: Strategy, decreasing: bool
) -> None:
    compared(method, strategy, decreasing, wants_time=False)


@pytest.mark.parametrize("strategy", REVERSED, ids=label)
def test_the_times_of_jumps_and_of_outputs_have_gradients_together(strategy: Strategy) -> None:
    compared(strategy.method or "bosh3", strategy, False, wants_time=True)


@pytest.mark.parametrize("strategy", [sa.Symplectic(), sa.Backprop()], ids=label)
def test_the_gradient_of_a_jump_can_be_differentiated_again(strategy: Strategy) -> None:
    problem = case((0.1, 1.3), JUMPS, wants_time=False)
    inputs = list(problem.inputs().values())
    sol = solved(problem, "bosh3", strategy)
    found = []
    for y in (sol.y, by_pieces("bosh3", problem, sol.steps)):
        first = torch.autograd.grad(problems.loss(y), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    names = list(problem.inputs())
    assert_close(*(dict(zip(names, grads, strict=True)) for grads in found))


def test_dense_output_across_jumps_has_the_same_gradient() -> None:
    strategies = {"symplectic": sa.Symplectic(), "backprop": sa.Backprop()}
    found = {}
    for name, strategy in strategies.items():
        problem = case((0.1, 1.3), JUMPS, wants_time=False)
        sol = solved(problem, "bosh3", strategy, dense=True)
        asked = torch.tensor([0.9, 0.2, 0.8, 1.3], dtype=torch.float64, requires_grad=True)
        problem.t = asked
        found[name] = problem.gradients(sol.dense(asked))
    assert_close(found["symplectic"], found["backprop"])


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        *((strategy.method or "rk4", strategy) for strategy in REVERSED),
        *itertools.product(("trapezoid", "sdirk2"), IMPLICIT),
        *itertools.product(("explicit_adams", "implicit_adams"), [sa.Symplectic(), sa.Backprop()]),
    ],
)
def test_every_step_of_a_perturbed_grid_begins_anew(method: str, strategy: Strategy) -> None:
    """All pieces meet at nodes of the grid; its times follow ``t``."""
    problem = case((0.1, 0.25, 0.8, 1.3), JUMPS, wants_time=True)
    sol = problem.solve(
        method=method,
        gradient=strategy,
        controller=sa.FixedGrid(perturb=True),
    )
    del problem.params["jump_t"]
    parts = [problem.y0]
    for k, (start, end) in enumerate(itertools.pairwise(problem.t)):

        def smooth(time: Tensor, state: Tensor, k: int = k) -> Any:
            return problem.func.piece(k, time, state)

        ends = [start, end]
        parts.append(reference.frozen(steppers.get(method), smooth, parts[-1], ends, ends)[-1])
    y = torch.stack(parts)
    assert_equal(problem, sol, (y, problem.gradients(y)))


def test_a_learned_grid_has_its_gradient_though_t_has_none() -> None:
    inner = torch.tensor([0.4, 0.9], dtype=torch.float64, requires_grad=True)
    problem = problems.case(times=(0.1, 0.5, 1.3))
    problem.params["grid"] = inner

    def nodes(t: Tensor) -> Tensor:
        return torch.cat([t[:1], inner, t[-1:]])

    def grid(func: Any, y0: Any, t: Tensor) -> Tensor:
        return nodes(t)

    sol = problem.solve(
        method="dopri5",
        controller=sa.FixedGrid(grid_constructor=grid),
    )
    t = list(problem.t)
    ends = [t[0], *inner, t[-1]]
    y = reference.frozen(steppers.get("dopri5"), problem.func, problem.y0, ends, t, problem.args)
    assert_equal(problem, sol, (y, problem.gradients(y)))


def test_a_named_jump_saves_the_steps_that_would_search_for_it() -> None:
    """``y' = a`` before ``tau`` and ``b y`` after it: ``y(1) = (y0 + a tau) exp(b (1 - tau))``."""
    tau = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    a, b = 2.0, -1.5

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.3, torch.full_like(y, a), b * y)

    def solve(controller: sa.Adaptive) -> sa.Solution:
        y0 = torch.ones(1, dtype=torch.float64)
        return sa.solve(func, y0, [0.0, 1.0], controller=controller, rtol=1e-9, atol=1e-9)

    named, searched = solve(sa.Adaptive(jump_t=tau)), solve(sa.Adaptive())
    attempts = [sol.stats.accepted + sol.stats.rejected for sol in (named, searched)]
    assert attempts[0] < 0.4 * attempts[1]
    end = (1 + a * 0.3) * math.exp(b * 0.7)
    assert named.y[-1].item() == pytest.approx(end, rel=1e-8)
    (slope,) = torch.autograd.grad(named.y[-1].sum(), tau)
    assert slope.item() == pytest.approx((a - b * (1 + a * 0.3)) * math.exp(b * 0.7), rel=1e-7)


@pytest.mark.parametrize(
    "continuous",
    [
        sa.Continuous(),
        sa.Continuous(controller=sa.Adaptive()),
        sa.Continuous(controller=sa.Adaptive(jump_t=[0.25, 0.6])),
        sa.Continuous(controller=sa.FixedGrid(step_size=0.03)),
        sa.Continuous(method_name="scipy_solver", rtol=1e-8, atol=1e-10),
    ],
    ids=["the forward one", "adaptive", "of other jumps", "a grid", "scipy's"],
)
def test_the_continuous_adjoint_knows_the_gradient_of_a_jump_whatever_its_steps(
    continuous: sa.Continuous,
) -> None:
    found = []
    for strategy in (sa.Symplectic(), continuous):
        problem = case((1.3, 0.1), JUMPS, wants_time=False)
        at = problem.params["jump_t"]
        sol = problem.solve(
            gradient=strategy,
            controller=sa.Adaptive(jump_t=at),
        )
        found.append(problem.gradients(sol.y))
    error, where = problems.worst(found[1], found[0])
    assert 1e-12 < error < 1e-6, where


def test_jumps_at_the_ends_are_seen_from_inside_and_those_outside_do_not_matter() -> None:
    seen: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t.detach()))
        return -y

    jumps = torch.tensor([0.0, 1.0, -3.0, 2.0], dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    sol = sa.solve(func, y0, [0.0, 1.0], controller=sa.Adaptive(jump_t=jumps))
    assert 0.0 < min(seen) < 1e-300
    assert max(seen) == math.nextafter(1.0, 0.0)
    assert sol.steps[0] == 0.0
    assert sol.steps[-1] == 1.0
    assert torch.autograd.grad(sol.y.sum(), jumps, allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_jump_is_seen_from_both_sides_in_the_precision_of_func(dtype: torch.dtype) -> None:
    seen = set()

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.add(float(t.detach()))
        return torch.where(t < 0.5, -y, y)

    y0 = torch.ones(1, dtype=dtype)
    sa.solve(func, y0, [0.0, 1.0], controller=sa.Adaptive(jump_t=[0.5]), rtol=1e-2, atol=1e-2)
    half = torch.tensor(0.5, dtype=dtype)
    below, above = (float(torch.nextafter(half, torch.tensor(x, dtype=dtype))) for x in (0.0, 1.0))
    assert {below, above} <= seen
    assert 0.5 not in seen


def test_random_numbers_are_drawn_again_on_both_sides_of_a_jump() -> None:
    """The gradient is that of the numbers that were drawn, so it is that of plain autograd."""
    found = []
    for strategy in (sa.Symplectic(), sa.Symplectic(store="steps"), sa.ACA(), sa.Backprop()):
        torch.manual_seed(3)
        rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        y0 = torch.ones(2, dtype=torch.float64)
        sol = sa.solve(
            lambda t, y, rate=rate: rate * y + torch.rand(2, dtype=torch.float64) * y,
            y0,
            [0.0, 0.45, 1.0],
            method="dopri5",
            gradient=strategy,
            controller=sa.FixedGrid(
                grid_constructor=lambda f, y, t: torch.linspace(0, 1, 5), perturb=True
            ),
        )
        found.append(torch.autograd.grad(sol.y.square().sum(), rate)[0])
    assert max(problems.relative_error(g, found[-1]) for g in found) < 1e-13


def test_a_jump_costs_one_evaluation_more_for_each_side() -> None:
    """Two solves in a row: the counts are their sums, but one step size is selected."""
    calls = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(None)
        return -y + (t > 0.5)

    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for strategy in (sa.Symplectic(), sa.Symplectic(store="steps"), sa.ACA(), sa.Backprop()):
        calls.clear()
        sol = sa.solve(
            func, y0, [0.0, 0.47, 1.0], gradient=strategy, controller=sa.Adaptive(jump_t=[0.5])
        )
        stats, work = sol.stats, steppers.get("dopri5").work
        before = int((sol.steps < 0.5).sum())
        dense = [int((sol.steps < 0.47).sum()) - 1]
        shape = SolveShape(
            stats.accepted,
            rejected=stats.rejected,
            dense=1,
            dense_ends=int(before - 1 in dense),
            adaptive=True,
            selected=1,
            solves=2,
        )
        assert stats.evaluations == len(calls) == shape.evaluations(work)
        calls.clear()
        sol.y.sum().backward()
        counted = (stats.backward_evaluations, stats.products)
        assert counted == strategy.counts(steppers.get("dopri5"), shape)
        assert len(calls) == stats.backward_evaluations


@pytest.mark.parametrize("name", ["step_t", "jump_t"])
@pytest.mark.parametrize("value", ["soon", [[0.5]], [math.nan], [0.5, 0.5], [1j]], ids=str)
def test_unusable_times_are_refused(name: str, value: Any) -> None:
    with pytest.raises(sa.ArgumentError, match=name):
        sa.Adaptive(**{name: value})


@pytest.mark.parametrize("decreasing", [False, True], ids=["increasing", "decreasing"])
def test_steps_end_at_the_times_asked_for_and_resume_their_size(decreasing: bool) -> None:
    sign = -1.0 if decreasing else 1.0
    asked = [0.62, 0.11, 5.0]
    y0 = torch.ones(1, dtype=torch.float64)

    def steps(**options: Any) -> list[float]:
        controller = sa.Adaptive(max_step=0.25, **options)
        times = [0.0, sign * 1.0]
        sol = sa.solve(lambda t, y: -0.1 * y, y0, times, controller=controller, rtol=1e-3)
        return [round(sign * t, 12) for t in sol.steps.tolist()]

    found = steps(first_step=0.25, step_t=torch.tensor([sign * t for t in asked]))
    assert found == pytest.approx([0.0, 0.11, 0.36, 0.61, 0.62, 0.87, 1.0], abs=1e-7)
