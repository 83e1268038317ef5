"""A budget of memory changes what is kept of a solve, never its gradient."""

from __future__ import annotations

import functools
import gc
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.checkpoints import Device
from symplectic_adjoint.checkpoints.actions import What
from symplectic_adjoint.checkpoints.schedules import Thinning
from symplectic_adjoint.field import Stage
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.gradients._budget import ENTRY, STEP, settle_nothing
from symplectic_adjoint.gradients._ledger import Ledger
from symplectic_adjoint.memory import peak_memory
from symplectic_adjoint.steppers.explicit_rk import RKState, RKStep
from tests.problems import Case, case, loss, worst
from tests.test_stores import file_size_limit, open_files

STEPS = 23
GRID = sa.FixedGrid(step_size=1.2 / STEPS)


def gradients(problem: Case, strategy: Strategy, **options: Any) -> tuple[list[Any], int]:
    """Gradients of two backward passes of one solve, and how many steps the first took again."""
    solution = problem.solve(gradient=strategy, **options)
    inputs, found, again = problem.inputs(), [], []
    for _ in range(2):
        grads = torch.autograd.grad(
            loss(solution.y), list(inputs.values()), retain_graph=True, allow_unused=True
        )
        found.append(dict(zip(inputs, grads, strict=True)))
        again.append(solution.stats.backward_retaken)
    return found, again[0]


def smallest(run: Callable[[sa.Symplectic], Any], store: str = "stages") -> int:
    """The least budget of a solve, as its error says."""
    with pytest.raises(sa.MemoryBudgetError) as caught:
        run(sa.Symplectic(store, memory=1))  # type: ignore[arg-type]
    return caught.value.needed


def budgets(least: int, state: int) -> Iterable[int]:
    """From the least room there may be to room for everything."""
    return [least + (state + ENTRY) * more for more in (1, 6, 1000)]


@pytest.mark.parametrize(
    ("method", "store"),
    [
        ("rk4", "steps"),
        ("rk4", "stages"),
        ("dopri5", "stages"),
        ("dopri5", "graph"),
        ("euler", "graph"),
        ("alf", "stages"),
        ("explicit_adams", "stages"),
        ("implicit_adams", "steps"),
        ("implicit_midpoint", "stages"),
    ],
)
def test_the_gradient_is_the_same_within_every_budget(method: str, store: str) -> None:
    problem = case(times=(0.0, 0.31, 0.7, 0.71, 1.2), wants_time=True)
    run = functools.partial(gradients, problem, method=method, controller=GRID)
    (wanted, _), _ = run(sa.Symplectic(store))  # type: ignore[arg-type]
    state = 6 * 8 * (2 if method == "alf" else 13 if "adams" in method else 1)
    retaken = []
    settings = [*budgets(smallest(run, store), state), "least" if store != "graph" else "100MB"]
    for memory in settings:
        found, again = run(sa.Symplectic(store, memory=memory))  # type: ignore[arg-type]
        assert worst(found[0], wanted)[0] <= 1e-12
        assert worst(found[1], wanted)[0] <= 1e-12
        retaken.append(again)
    assert retaken[0] > retaken[1] > retaken[2] == 0
    assert retaken[3] == 0 if store == "graph" else STEPS / 3 < retaken[3] < 2 * STEPS


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "implicit_midpoint"])
def test_the_budget_that_an_error_on_a_fixed_grid_names_is_the_least_that_does(method: str) -> None:
    problem = case(times=(0.0, 0.31, 1.2))
    run = functools.partial(gradients, problem, method=method, controller=GRID)
    (wanted, _), _ = run(sa.Symplectic())
    least = smallest(run)
    found, again = run(sa.Symplectic(memory=least))
    assert worst(found[0], wanted)[0] <= 1e-12
    assert again == STEPS * (STEPS - 1) // 2  # from the one state that fits
    with pytest.raises(sa.MemoryBudgetError, match=f"after {STEPS} steps") as caught:
        run(sa.Symplectic(memory=least - 1))
    assert caught.value.needed == least


def test_an_event_may_come_before_a_budget_is_used_up_by_the_steps_of_a_grid() -> None:
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def run(strategy: Strategy) -> sa.Solution:
        grid = sa.FixedGrid(step_size=1e-4)
        event = lambda t, y: t - 9e-4  # noqa: E731
        return sa.solve(
            lambda t, y: -y, y0, [0.0, 1.0], controller=grid, event=event, gradient=strategy
        )

    assert run(sa.Symplectic(memory=smallest(run) + 10 * STEP)).status is sa.Status.EVENT


@pytest.mark.parametrize("method", ["euler", "implicit_midpoint", "explicit_adams"])
def test_steps_without_stages_of_their_own_are_kept_elsewhere(method: str, tmp_path: Path) -> None:
    problem = case(times=(0.0, 0.31, 1.2))
    run = functools.partial(gradients, problem, method=method, controller=GRID)
    (wanted, _), _ = run(sa.Symplectic())
    found, again = run(sa.Symplectic("stages", place=sa.Disk(tmp_path)))
    assert again == 0
    assert worst(found[0], wanted)[0] == worst(found[1], wanted)[0] == 0


@pytest.mark.parametrize("place", ["disk", "host", "device"])
def test_the_gradient_is_the_same_wherever_steps_are_kept(place: str, tmp_path: Path) -> None:
    where = {"disk": sa.Disk(tmp_path), "host": sa.Host(), "device": sa.Device()}[place]
    problem = case(times=(0.0, 0.31, 1.2))
    run = functools.partial(gradients, problem, method="dopri5", controller=GRID)
    (wanted, _), _ = run(sa.Symplectic())
    found, again = run(sa.Symplectic(place=where))
    assert again == 0
    assert worst(found[0], wanted)[0] == worst(found[1], wanted)[0] == 0
    if place != "disk":
        return
    least = smallest(lambda s: run(sa.Symplectic(s.store, memory=s.memory, place=where)))
    for memory in budgets(least, 6 * 8):
        found, again = run(sa.Symplectic(memory=memory, place=where))
        assert again == 0
        assert worst(found[0], wanted)[0] == worst(found[1], wanted)[0] == 0


def test_an_adaptive_solve_with_jumps_outputs_and_an_event_is_thinned_exactly() -> None:
    problem = case(tree=True, times=(0.0, 0.3, 0.9, 1.2))

    def run(strategy: Strategy) -> tuple[list[Any], Any]:
        return gradients(
            problem,
            strategy,
            controller=sa.Adaptive(jump_t=[0.25, 0.8]),
            rtol=1e-11,
            atol=1e-11,
            event=lambda t, y, gain: t - 1.1 + 0 * y["fast"].sum(),
        )

    (wanted, _), _ = run(sa.Symplectic())
    counts = []
    for memory in budgets(smallest(run) + (24 + STEPS) * STEP, 9 * 8):
        found, again = run(sa.Symplectic(memory=memory))
        assert worst(found[0], wanted)[0] <= 1e-12
        assert worst(found[1], wanted)[0] <= 1e-12
        counts.append(again)
    assert counts[0] > counts[1] > 0 == counts[2]


@pytest.mark.parametrize(("method", "tolerance"), [("dopri5", 1e-9), ("alf", 1e-5)])
def test_steps_that_are_taken_again_begin_anew_where_func_jumps(
    method: str, tolerance: float
) -> None:
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(20, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return rate * torch.sin(3 * y) + torch.where(t < 0.5, 1.0, -2.0) * torch.cos(y)

    def run(strategy: Strategy) -> tuple[Tensor, int]:
        # The jump, at a step's end, lies between two of the few states that are kept.
        controller = sa.Adaptive(jump_t=[0.5])
        options: dict[str, Any] = {"method": method, "controller": controller}
        options |= {"rtol": tolerance, "atol": tolerance}
        sol = sa.solve(func, y0, [0.0, 1.0], gradient=strategy, **options)
        grads = torch.autograd.grad(sol.y[-1].sum(), [y0, rate])
        steps.append(sol.stats.accepted)
        return torch.cat([g.reshape(-1) for g in grads]), sol.stats.backward_retaken

    steps: list[int] = []
    wanted, _ = run(sa.Symplectic())
    room = steps[0] * STEP + 6 * (y0.nbytes + ENTRY)
    found, again = run(sa.Symplectic("steps", memory=smallest(run) + room))
    assert again > 5
    assert torch.equal(found, wanted)


def test_random_numbers_are_drawn_again_when_steps_are_taken_again() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4)).double()
    y0 = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)

    def run(strategy: Strategy) -> tuple[Tensor, int]:
        torch.manual_seed(0)
        sol = sa.solve(
            lambda t, y: net(y), y0, [0.0, 1.2], method="rk4", controller=GRID, gradient=strategy
        )
        (grad,) = torch.autograd.grad(sol.y.square().sum(), y0)
        return grad, sol.stats.backward_retaken

    wanted, _ = run(sa.Symplectic())
    tokens = STEPS * 4 * torch.get_rng_state().nbytes
    found, again = run(sa.Symplectic(memory=smallest(run) + tokens + 4 * ENTRY))
    assert again > STEPS / 2
    assert torch.equal(found, wanted)
    with pytest.raises(sa.MemoryBudgetError, match=r"too few.*after \d+ steps"):
        run(sa.Symplectic(memory=smallest(run) + tokens // 2))


def test_recomputation_takes_recorded_steps_and_never_a_rejected_one() -> None:
    calls: list[float] = []
    y0 = torch.ones(5, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(float(t))
        return -y * (1 + 5 * torch.tanh(200 * (t - 0.5)))

    sol = sa.solve(
        func, y0, [0.0, 1.0], method="bosh3", rtol=1e-6, gradient=sa.Symplectic(memory="least")
    )
    assert sol.stats.rejected >= 3
    calls.clear()
    sol.y.sum().backward()
    stages = set()
    for t, t1 in zip(sol.steps[:-1].tolist(), sol.steps[1:].tolist(), strict=True):
        stages |= {t, t + 0.5 * (t1 - t), t + 0.75 * (t1 - t), t1}
    assert sol.stats.backward_retaken > 0
    assert all(min(abs(t - s) for s in stages) < 1e-12 for t in set(calls))
    assert len(calls) == sol.stats.backward_evaluations


BATCH, DIM = 64, 8


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, width, dtype=torch.float64)
        self.outer = nn.Linear(width, DIM, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        k: Tensor = self.outer(torch.tanh(self.inner(y)))
        return k


def one_evaluation(net: nn.Module) -> int:
    """Peak memory of one evaluation and its vector-Jacobian product."""
    y = torch.ones(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    return peak_memory(
        lambda: torch.autograd.grad(net(torch.zeros(()), y).sum(), [y, *net.parameters()])
    )


@pytest.mark.parametrize(
    ("method", "width", "store"),
    [
        ("euler", 8, "stages"),
        ("rk4", 256, "stages"),
        ("dopri8", 8, "stages"),
        ("alf", 256, "stages"),
        ("rk4", 32, "graph"),
        ("dopri5", 256, "graph"),
    ],
)
def test_the_measured_peak_stays_within_the_budget_and_one_evaluation(
    method: str, width: int, store: Any
) -> None:
    net = Net(width)
    y0 = torch.ones(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    grid = sa.FixedGrid(step_size=1 / 40)

    def run(strategy: Strategy) -> int:
        sol = sa.solve(net, y0, [0.0, 0.4, 1.0], method=method, controller=grid, gradient=strategy)
        torch.autograd.grad(sol.y.sum(), [y0, *net.parameters()])
        return sol.stats.backward_retaken

    least = smallest(run) + y0.nbytes
    room = one_evaluation(net)
    more = [5, 90] if store == "stages" else [90, 8 * width, 20 * width]
    for memory in [least, *(least + states * y0.nbytes for states in more)]:
        peak = peak_memory(lambda: run(sa.Symplectic(store, memory=memory)))  # noqa: B023
        assert peak <= memory + room
        # The budget is used where it is needed.
        if run(sa.Symplectic(store, memory=memory)):
            assert peak >= 0.5 * memory


def test_the_books_of_steps_that_come_and_go_take_no_more_than_is_counted() -> None:
    y, stepper = torch.zeros(8), steppers.get("euler")
    stage = Stage(0.0, y)
    step = RKStep(RKState(0.0, y, stage), 1.0, 1.0, [stage, stage], (), 1)

    def peak(slots: int) -> float:
        schedule = Thinning(slots * (ENTRY + y.nbytes))
        ledger = Ledger(stepper, schedule, [Device().open()], What.STATE, settle_nothing)
        tracemalloc.start()
        for n in range(8 * slots):
            ledger.took(n, step, None)
        found = tracemalloc.get_traced_memory()[1] / slots
        tracemalloc.stop()
        assert len(ledger.where) == slots
        return found

    peak(10)  # loads what is loaded once
    assert ENTRY / 2 < peak(1400) < ENTRY


def test_the_dial_begins_with_graphs_wherever_they_can_be_kept() -> None:
    problem = case(times=(0.0, 0.31, 1.2))

    def evaluations(strategy: sa.Symplectic, **options: Any) -> int:
        sol = problem.solve(gradient=strategy, controller=GRID, **options)
        loss(sol.y).backward()
        return sol.stats.backward_evaluations

    stages = evaluations(sa.Symplectic())
    assert stages > 3 * STEPS
    for memory in ("fastest", "auto", "1GB"):
        assert evaluations(sa.Symplectic(memory=memory)) == 0
        assert evaluations(sa.Symplectic("stages", memory=memory)) == stages
        # Compiled steps keep no graphs; steps of implicit methods have none.
        assert evaluations(sa.Symplectic(memory=memory), execution="step") == stages
        implicit = {"method": "implicit_midpoint"}
        assert evaluations(sa.Symplectic(memory=memory), **implicit) == evaluations(
            sa.Symplectic(), **implicit
        )


def test_graphs_are_kept_as_far_as_they_fit_and_save_their_evaluations() -> None:
    problem = case(times=(0.0, 0.31, 1.2), hidden=50, batch=20)
    evaluations = []
    for memory in ("80KB", "150KB", "600KB", "1GB"):
        strategy = sa.Symplectic("graph", memory=memory)
        solution = problem.solve(gradient=strategy, method="rk4", controller=GRID)
        found = problem.gradients(solution.y)
        evaluations.append(solution.stats.backward_evaluations)
        wanted = problem.gradients(problem.solve(method="rk4", controller=GRID).y)
        assert worst(found, wanted)[0] <= 1e-12
    assert evaluations[0] > evaluations[1] > evaluations[2] > evaluations[3] == 0


def test_a_budget_too_small_is_refused_before_anything_is_computed() -> None:
    calls = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        return -y

    y0 = torch.ones(1000, dtype=torch.float64, requires_grad=True)

    def run(memory: int) -> sa.Solution:
        return sa.solve(func, y0, [0.0, 1.0], gradient=sa.Symplectic(memory=memory))

    with pytest.raises(sa.MemoryBudgetError, match="memory=100000 bytes are too few") as caught:
        run(100_000)
    assert not calls
    assert caught.value.solution is None
    solution = run(caught.value.needed + 100 * STEP)
    assert solution.status is sa.Status.SUCCESS


@pytest.mark.parametrize("memory", [None, 1_910_000])
def test_a_disk_that_fills_up_leaves_a_valid_prefix_with_its_gradient(
    memory: int | None, tmp_path: Path
) -> None:
    y0 = torch.ones(1000, dtype=torch.float64, requires_grad=True)

    def run(throw: bool, stop: float = 1.0) -> sa.Solution:
        t = torch.linspace(0, stop, round(stop * 100) + 1, dtype=torch.float64)
        strategy = sa.Symplectic("steps", memory=memory, place=sa.Disk(tmp_path, ahead=2))
        return sa.solve(lambda t, y: -t * y, y0, t, method="rk4", gradient=strategy, throw=throw)

    with file_size_limit(160_000), pytest.raises(sa.StoreError, match="make room") as caught:
        run(True)
    prefix = caught.value.solution
    assert prefix is not None
    count = len(prefix.y)
    assert 18 <= count <= 32
    (found,) = torch.autograd.grad(prefix.y.sum(), y0)
    (wanted,) = torch.autograd.grad(run(True, (count - 1) / 100).y.sum(), y0)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)
    with file_size_limit(160_000):
        assert run(False).status is sa.Status.NO_STORE


def test_a_rounded_place_is_inexact_and_says_so() -> None:
    problem = case()
    (wanted, _), _ = gradients(problem, sa.Symplectic(), method="rk4", controller=GRID)
    for dtype, unit in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        strategy = sa.Symplectic(place=sa.Rounded(dtype))
        assert not strategy.exact
        (found, _), _ = gradients(problem, strategy, method="rk4", controller=GRID)
        assert 1e-3 * unit < worst(found, wanted)[0] < unit
        y = problem.solve(gradient=strategy).y
        with pytest.raises(sa.SecondDerivativeError, match="does not give the gradient"):
            torch.autograd.grad(y.sum(), problem.y0, create_graph=True)
    assert sa.Symplectic(place=sa.Device()).exact


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"memory": "much"}, sa.UnknownNameError, "memory 'much'"),
        ({"memory": "12 cows"}, sa.UnknownNameError, "512MiB"),
        ({"memory": 0}, sa.ArgumentError, "positive"),
        ({"memory": 1.5}, sa.ArgumentError, "a number of bytes"),
        ({"memory": True}, sa.ArgumentError, "a number of bytes"),
    ],
)
def test_sizes_that_are_none_are_refused(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        sa.Symplectic(**options)


def test_what_cannot_be_had_together_is_refused(tmp_path: Path) -> None:
    problem = case()
    for options in ({"memory": "least"}, {"place": sa.Disk(tmp_path)}):
        with pytest.raises(sa.ArgumentError, match="store='stages'"):
            problem.solve(gradient=sa.Symplectic("graph", **options))  # type: ignore[arg-type]
    with pytest.raises(sa.ArgumentError, match="dense=True keeps every step"):
        problem.solve(gradient=sa.Symplectic(memory="1MB"), dense=True)
    with pytest.raises(sa.ArgumentError, match="on the CPU"):
        problem.solve(gradient=sa.Symplectic(memory="1MB", place=sa.Host()))
    with pytest.raises(sa.StoreError, match="nowhere"):
        problem.solve(gradient=sa.Symplectic(place=sa.Disk(tmp_path / "nowhere")))


def test_an_exception_in_func_closes_the_file_though_its_traceback_lives(tmp_path: Path) -> None:
    y0 = torch.ones(10, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        if float(t) > 0.5:
            raise KeyError("half-way")
        assert len(open_files(tmp_path)) == 1
        return -y

    with pytest.raises(KeyError) as caught:
        sa.solve(func, y0, [0.0, 1.0], gradient=sa.Symplectic(place=sa.Disk(tmp_path)))
    assert caught.tb is not None
    assert not open_files(tmp_path)


def test_the_file_lives_as_long_as_the_graph_that_needs_it(tmp_path: Path) -> None:
    y0 = torch.ones(10, requires_grad=True)
    sol = sa.solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=sa.Symplectic(place=sa.Disk(tmp_path)))
    y = sol.y
    del sol
    gc.collect()
    assert len(open_files(tmp_path)) == 1
    y.sum().backward()
    del y
    gc.collect()
    assert not open_files(tmp_path)
