"""Compiled tiers give what the eager one gives: values, gradients, steps, counts and errors.

Most tests share one function, one shape and one method, so that they share what was compiled.
"""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.codegen.cpp import CppVecOverrides

import symplectic_adjoint as sa
from symplectic_adjoint.execution import forward
from symplectic_adjoint.execution.lift import lift
from symplectic_adjoint.execution.passes import rational_tanh
from symplectic_adjoint.execution.trace import Input, compiled
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.models.cnf import CNF, SolverOptions
from tests import problems

OPTIONS: dict[str, Any] = {"method": "bosh3", "rtol": 1e-4, "atol": 1e-6}
TIERS = ["step", "loop"]


def net() -> problems.Net:
    return problems.Net(dim=3, hidden=5)


def state(batch: int = 4, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, generator=draw, dtype=torch.float64)


def gradients(
    execution: str, func: Any, y0: Any, t: Any, **options: Any
) -> tuple[sa.Solution, list[Tensor]]:
    """A solve, and the gradients of a fixed functional of its outputs."""
    parameters = list(func.parameters()) if isinstance(func, nn.Module) else []
    y0 = y0.clone().requires_grad_()
    solution = sa.solve(func, y0, t, execution=execution, **{**OPTIONS, **options})
    draw = torch.Generator().manual_seed(2)
    weights = torch.randn(solution.y.shape, generator=draw, dtype=torch.float64)
    inputs = [x for x in (y0, *parameters, t) if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad((solution.y * weights).sum(), inputs)
    return solution, list(grads)


def check(execution: str, func: Any, y0: Tensor, t: Any, **options: Any) -> sa.Solution:
    """Compare a compiled tier with the eager one; returns the compiled solution.

    Steps are chosen from estimated errors, which amplify rounding; so steps agree to 1e-9 and all
    that follows from them.
    """
    compiled, grads = gradients(execution, func, y0, t, **options)
    eager, wanted = gradients("eager", func, y0, t, **options)
    assert len(compiled.steps) == len(eager.steps)
    torch.testing.assert_close(compiled.steps, eager.steps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(compiled.y, eager.y, rtol=1e-9, atol=1e-9)
    assert compiled.stats.accepted == eager.stats.accepted
    assert compiled.stats.rejected == eager.stats.rejected
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad - want).norm() <= 1e-8 * want.norm()
    return compiled


STRATEGIES: list[Strategy] = [
    sa.Symplectic(),
    sa.Symplectic(store="steps"),
    sa.Symplectic(store="graph"),
    sa.Symplectic(accumulate="float64"),
    sa.ACA(),
    sa.Checkpoint(),
    sa.Backprop(),
]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_a_compiled_gradient_is_exact_on_its_own_steps(strategy: Strategy, tier: str) -> None:
    func, y0 = net(), state()
    solution, grads = gradients(tier, func, y0, [0.0, 1.5], gradient=strategy)
    # The steps that were taken, as a grid, under plain autograd.
    grid = sa.FixedGrid(grid_constructor=lambda f, y, t: solution.steps)
    replayed, wanted = gradients(
        "eager", func, y0, [0.0, 1.5], gradient="backprop", controller=grid
    )
    torch.testing.assert_close(solution.y, replayed.y, rtol=1e-13, atol=1e-13)
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad - want).norm() <= 1e-12 * want.norm()


class Mixed(nn.Module):
    """Residuals of many kinds: of softmax, of normalization, of views, of t, of a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6, dtype=torch.float64)
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.last = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        x = self.first(torch.cat([y, t.expand(len(y), 1)], 1))
        gates, values = self.norm(x).unflatten(1, (2, 3)).unbind(1)
        mixed = torch.softmax(gates, 1) * torch.nn.functional.silu(values) * self.scale**2
        return self.last(mixed) - y * torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64) * y.sin()


@pytest.mark.parametrize(
    ("method", "t", "steps", "again"),
    [
        ("bosh3", [0.0, 1.5], None, 0),  # the slope at the end is handed on
        ("bosh3", [1.0, 0.11, -0.4999, -0.5], None, 1),  # outputs within steps, and in the last
        ("midpoint", [0.0, 1.0, 2.0], 0.01, 0),  # each step begins anew; several records
    ],
)
def test_residuals_that_the_loop_keeps_save_all_evaluations(
    method: str, t: list[float], steps: float | None, again: int
) -> None:
    func = Mixed()
    options: dict[str, Any] = {"method": method, "gradient": sa.Symplectic(store="graph")}
    if steps is not None:
        options["controller"] = grid(steps)
    for batch in (4, 6, 5):
        solution, grads = gradients("loop", func, state(batch), t, **options)
        taken = sa.FixedGrid(grid_constructor=lambda f, y, t, steps=solution.steps: steps)
        own = {**options, "gradient": "backprop", "controller": taken}
        _, wanted = gradients("eager", func, state(batch), t, **own)
        for grad, want in zip(grads, wanted, strict=True):
            assert (grad - want).norm() <= 1e-12 * want.norm()
        assert solution.stats.backward_evaluations == again
        assert solution.stats.products > solution.stats.accepted
    assert solution.stats.compile_seconds == 0  # for the third batch size


@pytest.mark.parametrize(
    ("method", "t", "steps"),
    [("bosh3", [1.0, 0.11, 0.1, -0.5], None), ("rk4", [0.0, 1.0, 2.0], 0.02)],
)
def test_a_reverse_sweep_stage_by_stage_is_exact(
    method: str, t: list[float], steps: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Long(problems.Net):
        """Read for the first time here."""

    monkeypatch.setattr(forward, "LONG", 2)
    func = Long(dim=3, hidden=5)
    options: dict[str, Any] = {"method": method}
    if steps is not None:
        options["controller"] = grid(steps)
    for batch in (4, 6):
        solution, grads = gradients("loop", func, state(batch), t, **options)
        taken = sa.FixedGrid(grid_constructor=lambda f, y, t, steps=solution.steps: steps)
        own = {**options, "controller": taken}
        _, wanted = gradients("eager", func, state(batch), t, **{**own, "gradient": "backprop"})
        for grad, want in zip(grads, wanted, strict=True):
            assert (grad - want).norm() <= 1e-12 * want.norm()
        eager, _ = gradients("eager", func, state(batch), t, **own)
        assert solution.stats.products == eager.stats.products


@pytest.mark.parametrize("tier", TIERS)
def test_what_func_depends_on_may_have_any_strides(tier: str) -> None:
    weights = torch.randn(3, 6, dtype=torch.float64).T[::2].requires_grad_()
    row = torch.randn(1, 3, dtype=torch.float64).requires_grad_()

    def solved(batch: int, execution: str) -> list[Tensor]:
        forces = torch.linspace(0, 1, 3 * batch, dtype=torch.float64).view(3, batch).T
        rows = row.expand(batch, 3)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ weights + forces) * rows

        y0 = state(batch)
        options: dict[str, Any] = {"method": "midpoint", "controller": grid(0.25)}
        y = sa.solve(func, y0, [0.0, 1.0], execution=execution, **options).y[-1]
        return [y, *torch.autograd.grad(y.square().sum(), [weights, row])]

    for batch in (4, 6, 5):
        for ours, theirs in zip(solved(batch, tier), solved(batch, "eager"), strict=True):
            assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_a_function_that_writes_into_its_own_tensors_is_evaluated_again() -> None:
    func = net()

    def writing(t: Tensor, y: Tensor) -> Tensor:
        k = func(t, y)
        k.mul_(2.0).add_(y)
        return k

    options: dict[str, Any] = {"gradient": sa.Symplectic(store="graph"), "method": "midpoint"}
    results = [
        gradients(tier, writing, state(), [0.0, 1.0], controller=grid(0.1), **options)
        for tier in ("loop", "eager")
    ]
    assert results[0][0].stats.backward_evaluations == results[0][0].stats.products
    for grad, want in zip(*(grads for _, grads in results), strict=True):
        assert (grad - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("tier", TIERS)
def test_compiled_solves_evaluate_func_as_often_as_eager_ones(tier: str) -> None:
    func, y0 = net(), state()
    compiled, _ = gradients(tier, func, y0, [0.0, 1.5])
    eager, _ = gradients("eager", func, y0, [0.0, 1.5])
    assert compiled.stats == eager.stats
    assert compiled.stats.rejected > 0


@pytest.mark.parametrize("tier", TIERS)
def test_time_may_decrease(tier: str) -> None:
    check(tier, net(), state(), [1.0, -0.5])


@pytest.mark.parametrize("tier", TIERS)
def test_outputs_within_steps_are_interpolated(tier: str) -> None:
    func, y0 = net(), state()
    # Two in a step, steps without any, one just before the end.
    check(tier, func, y0, [0.0, 0.11, 0.12, 0.9, 1.4999, 1.5])
    check(tier, func, y0, torch.linspace(1.0, -0.5, 201))


def test_steps_beyond_a_record_go_on_in_another_one() -> None:
    func, y0 = net(), state()
    check("loop", func, y0, [0.0, 1.5])
    solution = check("loop", func, y0, [0.0, 30.0], rtol=1e-5)
    assert solution.stats.accepted > 2 * 64
    assert solution.stats.compile_seconds == 0


@pytest.mark.parametrize("tier", TIERS)
def test_fixed_grids_are_followed(tier: str) -> None:
    func, y0 = net(), state()
    compiled, grads = gradients(tier, func, y0, torch.linspace(0, 2, 70), method="midpoint")
    eager, wanted = gradients("eager", func, y0, torch.linspace(0, 2, 70), method="midpoint")
    assert torch.equal(compiled.steps, eager.steps)
    assert compiled.stats == eager.stats
    torch.testing.assert_close(compiled.y, eager.y, rtol=1e-13, atol=1e-13)
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad - want).norm() <= 1e-12 * want.norm()


def test_only_a_change_of_shape_compiles_again_and_a_second_one_does_not() -> None:
    func = net()
    controller = sa.Adaptive(max_steps=500, safety=0.8)
    first = check("loop", func, state(), [0.0, 1.5])
    again = [
        check("loop", func, state(seed=5), [0.3, 1.7], rtol=1e-3, atol=1e-5),
        check("loop", func, state(), [0.0, 1.0], controller=controller),
        check("loop", net(), state(), [0.0, 1.0], controller=sa.Adaptive.pi(first_step=0.1)),
    ]
    with torch.no_grad():
        func.inner += 0.1
    again.append(check("loop", func, state(), [0.0, 1.5]))
    assert [solution.stats.compile_seconds for solution in again] == [0] * 4
    changed = check("loop", func, state(batch=6), [0.0, 1.5])
    others = [check("loop", func, state(batch=n), [0.0, 1.5]) for n in (7, 3, 9)]
    assert changed.stats.compile_seconds > 0
    assert [solution.stats.compile_seconds for solution in others] == [0] * 3
    assert first.stats.accepted > 5


def test_step_times_may_be_asked_for_in_the_loop() -> None:
    controller = sa.Adaptive(step_t=[0.4, 1.1])
    solution = check("loop", net(), state(), [0.0, 1.5], controller=controller)
    assert {0.4, 1.1} <= set(solution.steps.tolist())


def test_functions_made_for_each_call_share_what_was_compiled() -> None:
    def solve(rate: Tensor) -> sa.Solution:
        return sa.solve(
            lambda t, y: -rate * y, torch.ones(2), [0.0, 1.0], execution="loop", **OPTIONS
        )

    rates = [torch.tensor([x, 2.0], requires_grad=True) for x in (0.5, 1.5)]
    solutions = [solve(rate) for rate in rates]
    for rate, solution in zip(rates, solutions, strict=True):
        solution.y[-1].sum().backward()
        torch.testing.assert_close(rate.grad, -torch.exp(-rate.detach()), rtol=1e-3, atol=1e-3)
    assert solutions[0].stats.compile_seconds > 0
    assert solutions[1].stats.compile_seconds == 0


@pytest.mark.parametrize("tier", TIERS)
def test_func_may_differentiate_inside_itself(tier: str) -> None:
    class Hamiltonian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Parameter(0.5 * torch.randn(6, 4, dtype=torch.float64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                y = y.detach().requires_grad_() if not y.requires_grad else y
                energy = torch.tanh(y @ self.inner.T).sum()
                (slope,) = torch.autograd.grad(energy, y, create_graph=True)
            return torch.cat([slope[:, 2:], -slope[:, :2]], 1)

    torch.manual_seed(0)
    y0 = torch.randn(3, 4, dtype=torch.float64)
    check(tier, Hamiltonian(), y0, [0.0, 1.0], method="midpoint", controller=grid(0.1))


def grid(step_size: float) -> sa.FixedGrid:
    return sa.FixedGrid(step_size=step_size)


@pytest.mark.parametrize("tier", TIERS)
def test_a_state_may_be_a_pytree(tier: str) -> None:
    func = net()

    def coupled(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": func(t, y["a"]) * y["b"], "b": -y["b"] * y["a"].mean()}

    results = []
    for execution in (tier, "eager"):
        y0 = {"a": state().requires_grad_(), "b": torch.ones((), dtype=torch.float64)}
        y = sa.solve(
            coupled, y0, [0.0, 0.5], method="midpoint", controller=grid(0.1), execution=execution
        ).y
        loss = y["a"].square().sum() + y["b"].sum()
        results.append([y["a"], *torch.autograd.grad(loss, [y0["a"], *func.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("tier", TIERS)
def test_flows_of_several_components_chain(tier: str) -> None:
    parts = [problems.Net(dim=3, hidden=5, seed=seed) for seed in (0, 1)]
    grads = []
    for execution in (tier, "eager"):
        y = y0 = state().requires_grad_()
        for part in parts:
            y = sa.solve(part, y, [0.0, 1.0], execution=execution, **OPTIONS).y[-1]
        inputs = [y0, *(p for part in parts for p in part.parameters())]
        grads.append(torch.autograd.grad(y.square().sum(), inputs))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm()


@pytest.mark.parametrize("tier", TIERS)
def test_autocast_holds_inside_compiled_code(tier: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 3)
    seen = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(linear(y))

    for execution in (tier, "eager"):
        y0 = state().float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = sa.solve(
                func, y0, [0.0, 1.0], method="midpoint", controller=grid(0.25), execution=execution
            ).y[-1]
        seen.append((y, *torch.autograd.grad(y.sum(), [y0, linear.weight])))
    exact = sa.solve(func, state().float(), [0.0, 1.0], method="midpoint", controller=grid(0.25)).y[
        -1
    ]
    for ours, theirs in zip(*seen, strict=True):
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
    # That precision is lost shows that products were taken in bfloat16.
    assert (seen[0][0] - exact).norm() > 1e-4 * exact.norm()


@pytest.mark.parametrize("tier", TIERS)
def test_errors_are_those_of_the_eager_tier(tier: str) -> None:
    def blows_up(t: Tensor, y: Tensor) -> Tensor:
        return y * y

    def solve(execution: str, **options: Any) -> sa.SolveError:
        with pytest.raises(sa.SolveError) as caught:
            sa.solve(
                blows_up,
                torch.ones(2, dtype=torch.float64),
                [0.0, 2.0],
                execution=execution,
                **{**OPTIONS, **options},
            )
        return caught.value

    for options in ({}, {"controller": sa.Adaptive(max_steps=7)}):
        compiled, eager = solve(tier, **options), solve("eager", **options)
        assert type(compiled) is type(eager)
        assert str(compiled)[:13] == str(eager)[:13]
        assert compiled.solution.status is eager.solution.status
        # The very last steps before the singularity are a matter of rounding.
        assert abs(len(compiled.solution.steps) - len(eager.solution.steps)) <= 2
    grids = {"method": "midpoint", "controller": grid(0.01)}
    compiled, eager = solve(tier, **grids), solve("eager", **grids)
    assert type(compiled) is type(eager) is sa.NonFiniteError
    assert str(compiled) == str(eager)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("throw", [True, False])
def test_a_start_that_is_not_finite_is_told_as_by_the_eager_tier(tier: str, throw: bool) -> None:
    def solve(execution: str) -> tuple[str, sa.Solution]:
        y0, options = state(), {"throw": throw, **OPTIONS}
        try:
            found = sa.solve(lambda t, y: y / t, y0, [0.0, 1.0], execution=execution, **options)
        except sa.NonFiniteError as error:
            return str(error), error.solution
        return found.message, found

    compiled, eager = solve(tier), solve("eager")
    assert compiled[0] == eager[0] != ""
    assert compiled[1].status is eager[1].status is sa.Status.NON_FINITE
    assert torch.equal(compiled[1].y, eager[1].y)


class Counting(nn.Module):
    """Counts its evaluations, which a compiled loop would not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.count = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.count += 1
        return self.net(t, y)


class Buffered(nn.Module):
    """Writes into a buffer."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.total.add_(1.0)
        return -y


def noisy(t: Tensor, y: Tensor) -> Tensor:
    return -y + 1e-3 * torch.randn_like(y)


def printing(t: Tensor, y: Tensor) -> Tensor:
    if y.sum().item() > 1e9:
        raise ValueError
    return -y


@pytest.mark.parametrize(
    ("func", "reason"),
    [
        (Counting, "func assigns to 'count'"),
        (Buffered, "in place"),
        (lambda: noisy, "random"),
        (lambda: printing, "printing|item|Data-dependent|data-dependent"),
    ],
    ids=["counter", "buffer", "random", "branch"],
)
def test_auto_falls_back_with_one_warning_that_says_why(
    func: Callable[[], Any], reason: str
) -> None:
    y0 = state()
    made = func()
    with pytest.raises(sa.CompilationError, match=reason):
        sa.solve(made, y0, [0.0, 0.3], execution="loop", **OPTIONS)
    torch.manual_seed(0)
    with pytest.warns(sa.ExecutionWarning, match=reason):
        auto = sa.solve(made, y0, [0.0, 0.3], execution="auto", **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        again = sa.solve(func(), y0, [0.0, 0.3], execution="auto", **OPTIONS)
    assert torch.equal(auto.y, again.y)
    if isinstance(made, Counting):
        assert made.count == auto.stats.evaluations


def test_what_the_loop_cannot_do_the_step_tier_does() -> None:
    func, y0 = net(), state()

    def event(t: Tensor, y: Tensor) -> Tensor:
        return t - 0.77

    t = torch.tensor([0.0, 1.5], dtype=torch.float64)
    cases: list[dict[str, Any]] = [{"event": event}, {"dense": True}, {"progress": lambda t: None}]
    for case in cases:
        with pytest.raises(sa.CompilationError, match="loop"):
            sa.solve(func, y0, t, execution="loop", **OPTIONS, **case)
        with pytest.warns(sa.ExecutionWarning, match="loop"):
            auto, grads = gradients("auto", func, y0, t, **case)
        eager, wanted = gradients("eager", func, y0, t, **case)
        torch.testing.assert_close(auto.y, eager.y, rtol=1e-9, atol=1e-9)
        for grad, want in zip(grads, wanted, strict=True):
            assert (grad - want).norm() <= 1e-8 * want.norm()
    at = torch.tensor([0.2, 0.9])
    with_dense = [
        sa.solve(func, y0, t, dense=True, execution=execution, **OPTIONS).dense(at)
        for execution in ("step", "eager")
    ]
    torch.testing.assert_close(*with_dense, rtol=1e-9, atol=1e-9)


def test_gradients_of_times_are_those_of_the_eager_tier() -> None:
    t = torch.tensor([0.0, 0.7, 1.5], dtype=torch.float64, requires_grad=True)
    with pytest.raises(sa.CompilationError, match="gradient of t"):
        sa.solve(net(), state(), t, execution="loop", **OPTIONS)
    check("step", net(), state(), t)


def test_jumps_run_eagerly() -> None:
    func, y0, options = net(), state(), {**OPTIONS, "controller": sa.Adaptive(jump_t=[0.5])}
    with pytest.raises(sa.CompilationError, match="jumps"):
        sa.solve(func, y0, [0.0, 1.0], execution="step", **options)
    with pytest.warns(sa.ExecutionWarning, match="jumps"):
        auto = sa.solve(func, y0, [0.0, 1.0], execution="auto", **options)
    assert torch.equal(auto.y, sa.solve(func, y0, [0.0, 1.0], **options).y)


@pytest.mark.parametrize("tier", TIERS)
def test_second_derivatives_replay_the_compiled_steps(tier: str) -> None:
    func, curvatures = net(), []
    for execution in (tier, "eager"):
        y0 = state().requires_grad_()
        y = sa.solve(func, y0, [0.0, 1.5], execution=execution, **OPTIONS).y[-1]
        (slope,) = torch.autograd.grad(y.square().sum(), y0, create_graph=True)
        curvatures.append(torch.autograd.grad(slope.square().sum(), [y0, *func.parameters()]))
    for ours, theirs in zip(*curvatures, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm()


@pytest.mark.parametrize("tier", TIERS)
def test_a_second_backward_pass_gives_the_same_gradient(tier: str) -> None:
    func, y0 = net(), state().requires_grad_()
    y = sa.solve(func, y0, [0.0, 1.5], execution=tier, **OPTIONS).y[-1]
    first, second = (
        torch.autograd.grad(y.sum(), [y0, *func.parameters()], retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tier", TIERS)
def test_only_listed_tensors_receive_gradients(tier: str) -> None:
    func, y0 = net(), state().requires_grad_()
    solution = sa.solve(func, y0, [0.0, 1.5], params=[func.bias], execution=tier, **OPTIONS)
    solution.y[-1].sum().backward()
    assert func.bias.grad is not None
    assert y0.grad is not None
    assert func.inner.grad is None


@pytest.mark.parametrize("tier", TIERS)
def test_a_constant_that_is_changed_in_place_is_noticed(tier: str) -> None:
    scale, y0 = torch.ones(3, dtype=torch.float64), state().requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -scale * y

    options: dict[str, Any] = {"method": "midpoint", "controller": grid(0.25)}
    y = sa.solve(func, y0, [0.0, 1.0], execution=tier, **options).y[-1]
    scale.mul_(2.0)
    with pytest.raises(sa.ChangedTensorError, match="changed in place"):
        y.sum().backward()


def test_odeint_and_modules_pass_the_tier_on() -> None:
    func, y0 = net(), state()
    options = {"method": "bosh3", "rtol": 1e-4, "atol": 1e-6}
    t = torch.tensor([0.0, 1.5])
    wanted = sa.odeint(func, y0, t, **options)
    for solve in (sa.odeint, sa.odeint_adjoint):
        y = solve(func, y0, t, execution="loop", **options)
        torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
    module = sa.NeuralODE(func, (0.0, 1.5), execution="loop", **options)
    torch.testing.assert_close(module(y0), wanted[-1], rtol=1e-9, atol=1e-9)


def test_the_norm_of_a_tuple_by_its_parts_is_compiled() -> None:
    func = net()

    def coupled(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return func(t, y[0]), 0.1 * y[0].sum(1)

    results = []
    for execution in ("loop", "eager"):
        y0 = (state().requires_grad_(), torch.zeros(4, dtype=torch.float64))
        t = torch.tensor([0.0, 1.5])
        options: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6, "method": "bosh3"}
        y, total = sa.odeint(coupled, y0, t, execution=execution, **options)
        results.append([y, total, *torch.autograd.grad(total[-1].sum() + y.sum(), y0[0])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_that_is_asked_for_inside_a_transform_is_refused(tier: str) -> None:
    def last(y0: Tensor) -> Tensor:
        return sa.solve(net(), y0, [0.0, 0.5], execution=tier, **OPTIONS).y[-1].sum()

    with pytest.raises(sa.CompilationError, match=r"torch\.func"):
        torch.func.grad(last)(state())


def test_an_unknown_tier_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(sa.ArgumentError, match="did you mean 'loop'"):
        sa.solve(net(), state(), [0.0, 1.0], execution="lop")


def test_the_compiler_is_loaded_only_when_it_is_asked_for() -> None:
    code = (
        "import sys, torch, symplectic_adjoint as sa\n"
        "sa.solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0])\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
        "assert 'symplectic_adjoint.execution.trace' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_first_step_and_limits_of_steps_hold_in_the_loop() -> None:
    controller = sa.Adaptive(first_step=0.05, max_step=0.1, min_step=1e-3)
    solution = check("loop", net(), state(), [0.0, 1.5], controller=controller)
    sizes = solution.steps.diff()
    assert math.isclose(float(sizes[0]), 0.05, rel_tol=1e-12)
    assert float(sizes.max()) <= 0.1 * (1 + 1e-12)


def test_a_size_that_func_makes_a_constant_is_no_symbol() -> None:
    class Own(problems.Net):
        """Read for the first time here."""

    sizes = []
    for batch, width in ((5, 2), (4, 2), (4, 3), (4, 4)):
        func = Own(dim=width, hidden=5)
        y0 = torch.zeros(batch, width, dtype=torch.float64)
        sizes.append(sorted(lift(func, func, y0).graph.state_dims))
    # The batch has changed once; the width means other weights, whatever it is.
    assert sizes == [[], [0], [0], [0]]


def test_code_that_holds_for_one_size_alone_is_refused() -> None:
    like = Input(torch.zeros(4, 2), {0: "batch"})
    with pytest.raises(sa.CompilationError, match="a size that changes"):
        compiled(lambda x: [x * int(x.shape[0])], [like])


def test_a_flow_with_a_divergence_inside_is_compiled() -> None:
    results = []
    for execution in ("loop", "eager"):
        torch.manual_seed(0)
        solver = SolverOptions(method="bosh3", execution=execution)
        flow = CNF(2, hidden=(4,), solver=solver).double()
        for parameter in flow.parameters():
            nn.init.normal_(parameter, std=0.5)  # the identity that it begins with tells nothing
        x, noise = (torch.randn(*shape, 3, 2, dtype=torch.float64) for shape in ((), (1,)))
        loss = flow.log_prob(x, noise).sum()
        results.append([loss, *torch.autograd.grad(loss, list(flow.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


def test_compiled_steps_are_thinned_and_taken_again_exactly() -> None:
    func, y0 = net(), state(batch=40)
    (everything, wanted), (thinned, grads) = (
        gradients("step", func, y0, [0.0, 3.0], gradient=sa.Symplectic(memory=memory), rtol=1e-6)
        for memory in (None, "least")
    )
    assert torch.equal(thinned.y, everything.y)
    assert thinned.stats.backward_retaken > 10
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad - want).norm() <= 1e-14 * want.norm()
    with pytest.raises(sa.CompilationError, match="schedule"):
        sa.solve(func, y0, [0.0, 1.0], execution="loop", gradient=sa.Symplectic(memory="least"))


def test_tanh_in_float32_is_accurate_to_rounding_and_that_of_torch_in_float64() -> None:
    sizes = (1e-30, 1e-6, 1e-3, 0.1, 1.0, 5.0, 50.0)
    x = torch.cat([size * torch.randn(10**5) for size in sizes])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan, 0.0])])
    for dtype, bound in ((torch.float32, 4e-7), (torch.float64, 4e-16)):
        given = x.to(dtype)
        (found,) = compiled(lambda x: [x.tanh()], [Input(given)]).call(given)
        wanted = given.double().tanh()
        assert float((found / wanted - 1).abs().nan_to_num().max()) <= bound
        assert float(found.abs().nan_to_num().max()) == 1.0
        assert found[-4:].tolist()[:2] == [1.0, -1.0]
        assert math.isnan(found[-2])
        assert float(found[-1]) == 0.0


def test_tanh_of_other_threads_and_after_compiling_is_the_compilers_own() -> None:
    class Name(str):
        dtype = torch.float32

    def written() -> str:
        return str(CppVecOverrides.tanh(Name("x")))

    own = written()
    with rational_tanh(), ThreadPoolExecutor(1) as pool:
        assert written() != own
        assert pool.submit(written).result() == own
    assert written() == own


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(128, 64, 8), (64, 128, 2), (20, 50, 43), (8, 64, 64), (5, 3, 1)]
)
def test_products_of_narrow_matrices_are_the_same_and_as_contiguous(
    rows: int, inner: int, columns: int
) -> None:
    a, b = torch.randn(rows, inner).double(), torch.randn(inner, columns).double()
    for dims in ({}, {0: "batch"}):
        run = compiled(
            lambda a, b: [a @ b, (a @ b).tanh() @ b.T, 2 * (a @ b).T],
            [Input(a, dims), Input(b)],
        )
        for given in [a, torch.cat([a, a])] if dims else [a]:
            found = run.call(given, b)
            wanted = [given @ b, (given @ b).tanh() @ b.T, 2 * (given @ b).T]
            assert [x.stride() for x in found[:2]] == [x.stride() for x in wanted[:2]]
            for x, y in zip(found, wanted, strict=True):
                assert torch.allclose(x, y, rtol=1e-13, atol=1e-13)
