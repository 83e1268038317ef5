"""What each setting of memory would cost, foretold from a few steps before a long run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from symplectic_adjoint._errors import ArgumentError, MemoryBudgetError
from symplectic_adjoint._tree import StateSpec
from symplectic_adjoint.api import default_controller, resolved_stepper, solve
from symplectic_adjoint.capture import Capture, graph_leaves
from symplectic_adjoint.checkpoints.actions import (
    Advance,
    Drop,
    Keep,
    Reduce,
    Restore,
    Reverse,
    What,
)
from symplectic_adjoint.checkpoints.schedules import Sizes
from symplectic_adjoint.controllers import Controller, FixedGrid
from symplectic_adjoint.field import RandomState
from symplectic_adjoint.gradients import Backprop, Strategy, Symplectic
from symplectic_adjoint.gradients._budget import ENTRY
from symplectic_adjoint.memory import peak_memory
from symplectic_adjoint.problem import as_times
from symplectic_adjoint.steppers import ImplicitRK, Stepper

__all__ = ["MemoryPlan", "MemorySetting", "plan_memory"]

_ROUNDS = 3


@dataclass(frozen=True)
class MemorySetting:
    """A setting, and what it would cost.

    Attributes:
        name: In words.
        gradient: The strategy, to be handed to ``solve``.
        peak: Predicted peak of live bytes of a solve and its backward pass, above what was live
            before.
        time: Predicted time of both, relative to the fastest setting.
        seconds: Predicted time of both.
        retaken: How many steps the backward pass takes again.
    """

    name: str
    gradient: Strategy
    peak: int
    time: float
    seconds: float
    retaken: int


@dataclass(frozen=True)
class MemoryPlan:
    """What ``plan_memory`` has found; ``print`` it for a table.

    Attributes:
        steps: Number of steps of the solve.
        evaluation: Peak bytes of one evaluation of ``func`` with its vector-Jacobian product.
        state: Bytes that a step takes of which the state is kept, its times among them.
        stages: The same of a step of which the stages are kept.
        graph: The same of a step of which the graphs of its stages are kept; None where the
            method has none to keep.
        settings: From the most memory to the least.
    """

    steps: int
    evaluation: int
    state: int
    stages: int
    graph: int | None
    settings: tuple[MemorySetting, ...]

    def __str__(self) -> str:
        head = ("keep", "gradient", "peak", "time", "seconds", "steps retaken")
        rows = [
            (
                x.name,
                _written(x.gradient),
                _size(x.peak),
                f"{x.time:.2f}",
                f"{x.seconds:.3g}",
                str(x.retaken),
            )
            for x in self.settings
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        parts = {"state": self.state, "stages": self.stages, "graphs": self.graph}
        kept = ", ".join(f"{name} {_size(x)}" for name, x in parts.items() if x is not None)
        first = f"an evaluation with its product takes {_size(self.evaluation)}"
        return "\n".join([f"{self.steps} steps; {first}", f"kept of a step: {kept}", *lines])


def plan_memory(
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    *,
    args: Sequence[Any] = (),
    steps: int | None = None,
    method: str | Stepper | None = None,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    controller: Controller | None = None,
    budgets: Sequence[int | str] = (),
    probe: int = 32,
) -> MemoryPlan:
    """Foretell peak memory and time of a solve and its gradient, for each way to keep its steps.

    A few of the first steps are solved and differentiated with everything kept, with stages, and
    with states: what a step takes is the slope of their peaks, read from the allocator's events,
    and of their times. The schedules are then run on the whole number of steps as they will
    be, but without a solver, which says what they keep and how many steps they take again.

    The probes take about as long as twenty times ``probe`` steps. The caller's random streams and
    gradients are left as they were.

    Args:
        func: As for ``solve``.
        y0: As for ``solve``; its gradient is always among those planned for.
        t: As for ``solve``, with a finite end. Outputs are counted twice, with their cotangents.
        args: As for ``solve``.
        steps: How many steps an adaptive solve will take, where that is known; otherwise it is
            solved once without a gradient to see. On a fixed grid it is known.
        method: As for ``solve``.
        rtol: As for ``solve``.
        atol: As for ``solve``.
        controller: As for ``solve``.
        budgets: Further budgets to plan for: values of ``Symplectic(memory=...)``.
        probe: How many steps to probe with, at least 4.

    Returns:
        The settings: plain backpropagation; graphs, stages and states of all steps; a budget for
        twice the square root of the number of steps; and ``"least"``. Then those of ``budgets``.

    Raises:
        ArgumentError: An argument is unusable.
        MemoryBudgetError: A budget is too small for any schedule.
        SolveError: The end of the probes could not be reached.
        RuntimeError: On the CPU, inside of a running torch profiler.

    Example:
        >>> net = torch.nn.Linear(64, 64)
        >>> y0, grid = torch.randn(16, 64), FixedGrid(step_size=1e-5)
        >>> plan = plan_memory(lambda t, y: net(y), y0, [0.0, 1.0], method="rk4", controller=grid)
        >>> plan.steps, [setting.name for setting in plan.settings]
        (100000, ['backprop', 'graphs', 'stages', 'states', 'square root', 'logarithm'])
        >>> plan.settings[2].peak > 1000 * plan.settings[-1].peak
        True
    """
    if probe < 4 or (steps is not None and steps < 1):
        raise ArgumentError(f"probe = {probe} must be at least 4, and steps = {steps} at least 1")
    stepper = resolved_stepper(method, Symplectic())
    controller = default_controller(stepper) if controller is None else controller
    problem = _Problem(
        func, y0, as_times(t).detach(), args, stepper, controller, {"rtol": rtol, "atol": atol}
    )
    before = RandomState(problem.flat.device)
    try:
        return _plan(problem, steps, budgets, probe)
    finally:
        before.set()


def _plan(
    problem: _Problem, steps: int | None, budgets: Sequence[int | str], probe: int
) -> MemoryPlan:
    grid = problem.grid()
    if isinstance(problem.controller, FixedGrid):
        steps = len(grid) - 1
    elif steps is None:
        grid = problem.reached()
        steps = len(grid) - 1
    kept: dict[str, Strategy] = {
        "backprop": Backprop(),
        "graphs": Symplectic("graph"),
        "stages": Symplectic(),
        "states": Symplectic("steps"),
    }
    if isinstance(problem.stepper, ImplicitRK):  # has no graphs to keep
        del kept["graphs"]
    slopes = _measured(problem, kept, grid, steps, probe)
    costs = {
        name: _Cost(slope.peak(steps), steps * (slope.forward + slope.backward), 0)
        for name, slope in slopes.items()
    }
    found: dict[str, Strategy] = dict(kept)
    for name, strategy in _budgeted(problem, steps, slopes, budgets).items():
        found[name] = strategy
        costs[name] = _scheduled(problem, strategy, steps, slopes)
    outputs = 2 * max(len(problem.t) - 2, 0) * problem.flat.nbytes
    fastest = min(cost.seconds for cost in costs.values())
    return MemoryPlan(
        steps=steps,
        evaluation=problem.evaluation(),
        state=round(slopes["states"].bytes),
        stages=round(slopes["stages"].bytes),
        graph=round(slopes["graphs"].bytes) if "graphs" in slopes else None,
        settings=tuple(
            MemorySetting(
                name,
                found[name],
                round(cost.peak) + outputs,
                cost.seconds / fastest,
                cost.seconds,
                cost.retaken,
            )
            for name, cost in costs.items()
        ),
    )


@dataclass(frozen=True)
class _Problem:
    """What is planned for."""

    func: Callable[..., Any]
    y0: Any
    t: Tensor
    args: Sequence[Any]
    stepper: Stepper
    controller: Controller
    options: dict[str, Any]

    @property
    def flat(self) -> Tensor:
        return StateSpec.of(self.y0)[1].detach()

    def grid(self) -> Tensor:
        """The step times of a fixed grid; otherwise the ends of the solve."""
        if isinstance(self.controller, FixedGrid):
            return self.controller.grid(self.func, self.y0, self.t).detach()
        return self.t[[0, -1]].to("cpu", torch.float64)

    def reached(self) -> Tensor:
        """The step times of the whole solve."""
        with torch.no_grad():
            steps: Tensor = self._solved(self.y0, self.t, self.controller, Symplectic()).steps
            return steps

    def _solved(self, y0: Any, t: Tensor, controller: Controller, strategy: Strategy) -> Any:
        return solve(
            self.func,
            y0,
            t,
            args=self.args,
            method=self.stepper,
            controller=controller,
            gradient=strategy,
            **self.options,
        )

    def run(self, grid: Tensor, count: int, strategy: Strategy) -> _Run:
        """Solve about the first ``count`` steps and differentiate."""
        controller = self.controller
        if isinstance(controller, FixedGrid):
            part = grid[: count + 1]
            controller = replace(
                controller, step_size=None, grid_constructor=lambda func, y0, t: part
            )
        y0 = pytree.tree_map(lambda x: x.detach().clone().requires_grad_(), self.y0)
        started = self._now()
        solution = self._solved(y0, grid[[0, count]], controller, strategy)
        between = self._now()
        total = sum(x.abs().square().sum() for x in pytree.tree_leaves(solution.y))
        torch.autograd.grad(total, graph_leaves(total), allow_unused=True)
        stats = solution.stats
        return _Run(stats.accepted, stats.evaluations, between - started, self._now() - between)

    def _now(self) -> float:
        if self.flat.device.type == "cuda":
            torch.cuda.synchronize(self.flat.device)
        return time.perf_counter()

    def evaluation(self) -> int:
        """Peak bytes of one evaluation with its product."""
        t = torch.as_tensor(float(self.t[0]), dtype=torch.float64).to(self.flat.device)
        t = t.to(self.flat.dtype.to_real() if self.flat.is_complex() else self.flat.dtype)

        def once() -> None:
            y = pytree.tree_map(lambda x: x.detach().requires_grad_(), self.y0)
            with torch.enable_grad():
                k = pytree.tree_leaves(self.func(t, y, *self.args))
                total = sum(x.abs().sum() for x in k)
            assert isinstance(total, Tensor)
            if total.requires_grad:
                torch.autograd.grad(total, graph_leaves(total), allow_unused=True)

        return peak_memory(once, device=self.flat.device)


class _Run(NamedTuple):
    """A probe: its accepted steps and evaluations, and the seconds of both passes."""

    steps: int
    evaluations: int
    forward: float
    backward: float


class _Slope(NamedTuple):
    """What a step takes, and the bytes that do not grow with the steps."""

    fixed: float
    bytes: float
    forward: float
    backward: float
    evaluations: float

    def peak(self, steps: int) -> float:
        """Bytes of so many steps."""
        return self.fixed + self.bytes * steps


class _Cost(NamedTuple):
    """Of a whole solve and its backward pass."""

    peak: float
    seconds: float
    retaken: int


def _measured(
    problem: _Problem, kept: dict[str, Strategy], grid: Tensor, steps: int, probe: int
) -> dict[str, _Slope]:
    """What a step takes under each strategy."""
    if len(grid) == 2 < steps:  # the ends alone are known
        grid = torch.linspace(float(grid[0]), float(grid[1]), steps + 1, dtype=torch.float64)
    few, many = max(min(probe, steps) // 4, 1), min(probe, steps)
    peaks: dict[tuple[str, int], int] = {}
    runs: dict[tuple[str, int], list[_Run]] = {
        (name, count): [] for name in kept for count in (few, many)
    }
    for name, count in runs:
        peaks[name, count] = peak_memory(
            lambda name=name, count=count: problem.run(grid, count, kept[name]),  # type: ignore[misc]
            device=problem.flat.device,
        )
    for _ in range(_ROUNDS):
        for name, count in runs:
            runs[name, count].append(problem.run(grid, count, kept[name]))
    return {
        name: _slope(
            [peaks[name, count] for count in (few, many)],
            [runs[name, count] for count in (few, many)],
        )
        for name in kept
    }


def _slope(peaks: Sequence[int], runs: Sequence[Sequence[_Run]]) -> _Slope:
    few, many = (x[0].steps for x in runs)
    forward, backward = ([median(run[i] for run in x) for x in runs] for i in (2, 3))
    if few == many:  # a single step
        count = runs[1][0].evaluations / many
        return _Slope(0.0, peaks[1] / many, forward[1] / many, backward[1] / many, count)
    more = many - few
    size = (peaks[1] - peaks[0]) / more
    return _Slope(
        peaks[1] - size * many,
        size,
        max(forward[1] - forward[0], 0.0) / more,
        max(backward[1] - backward[0], 0.0) / more,
        (runs[1][0].evaluations - runs[0][0].evaluations) / more,
    )


def _budgeted(
    problem: _Problem, steps: int, slopes: dict[str, _Slope], budgets: Sequence[int | str]
) -> dict[str, Symplectic]:
    state = round(slopes["states"].bytes) + ENTRY
    try:
        problem_needs = 0
        _ledger(problem, Symplectic(memory=1), steps)
    except MemoryBudgetError as error:
        problem_needs = error.needed
    root = problem_needs + math.ceil(2.1 * math.sqrt(steps)) * state
    found = {"square root": Symplectic(memory=root), "logarithm": Symplectic(memory="least")}
    return found | {f"memory={budget!r}": Symplectic(memory=budget) for budget in budgets}


def _ledger(problem: _Problem, strategy: Symplectic, steps: int) -> Any:
    sums = [x for x in Capture(problem.func, problem.args).tensors if x.requires_grad]
    strategy = strategy.fitted(problem.stepper)
    return strategy.ledger(problem.stepper, problem.flat, len(problem.t), sums, steps)


def _scheduled(
    problem: _Problem, strategy: Symplectic, steps: int, slopes: dict[str, _Slope]
) -> _Cost:
    """Runs the schedule of a budget without a solver."""
    ledger = _ledger(problem, strategy, steps)
    if ledger is None:
        fastest = slopes.get("graphs", slopes["stages"])
        return _Cost(fastest.peak(steps), steps * (fastest.forward + fastest.backward), 0)
    states = slopes["states"]
    state = problem.flat.nbytes
    held = _Held(_bytes(state, slopes, ledger.most))
    sizes = Sizes(*(ENTRY + x for x in held.bytes))
    graphs = held.bytes[What.GRAPH] - state if len(held.bytes) > What.GRAPH else 0
    ledger.allot(0, 0, 0)
    keeping = 0 < 2 * graphs <= ledger.plan.capacity
    peak = 0
    for n in range(steps):
        if keeping:
            peak = max(peak, held.now + graphs)
        else:
            graphs, sizes = 0, sizes._replace(graph=None)
        ledger.allot(n + 1, sizes.state, graphs)
        for action in ledger.plan.took(n, sizes):
            held.follow(action)
        keeping = keeping and held.what.get(n) == What.GRAPH
    for action in ledger.plan.reverse(steps):
        held.follow(action)
    times = steps * (states.bytes - state)
    work = problem.stepper.work
    # A step taken again is neither rejected nor judged.
    again = min((work.inner + work.node) / max(states.evaluations, 1.0), 1.0)
    seconds = (steps + again * held.retaken) * states.forward + sum(
        count * slopes[name].backward
        for name, count in zip(_KEPT, held.reversed, strict=True)
        if count
    )
    seconds += held.graphs * (slopes["graphs"].forward - states.forward) if held.graphs else 0
    peak = max(peak, held.peak)
    return _Cost(states.fixed + max(times, 0.0) + peak, seconds, held.retaken)


_KEPT = ("states", "stages", "graphs")
"""The names of the slopes in the order of ``What``."""


def _bytes(state: int, slopes: dict[str, _Slope], most: What) -> list[int]:
    """What a step takes in each way to keep it, as far as ``most`` and as they differ."""
    found = [state]
    for name in _KEPT[1 : most + 1]:
        more = round(slopes[name].bytes - slopes["states"].bytes)
        found.append(max(state + more, found[-1]))
    return found if found[-1] > state else found[:1]


class _Held:
    """Carries out actions on sizes alone."""

    def __init__(self, bytes_: Sequence[int]) -> None:
        self.bytes = bytes_
        self.what: dict[int, What] = {}
        self.now = self.peak = self.retaken = self.graphs = 0
        self.reversed = [0, 0, 0]
        self.restored = What.STATE

    def follow(self, action: Any) -> None:
        """Note what an action changes."""
        match action:
            case Keep(step, what):
                self.what[step] = what
                self.graphs += what == What.GRAPH
                self.now += self.bytes[what]
                self.peak = max(self.peak, self.now)
            case Reduce(step, what):
                self.now += self.bytes[what] - self.bytes[self.what[step]]
                self.what[step] = what
            case Drop(step):
                self.now -= self.bytes[self.what.pop(step)]
            case Restore(step):
                self.restored = self.what[step]
            case Advance(first, stop):
                self.retaken += stop - first
                self.restored = What.STATE
            case Reverse():
                self.reversed[self.restored] += 1


def _written(strategy: Strategy) -> str:
    """A strategy as it is written down, its defaults left out."""
    if isinstance(strategy, Symplectic):
        memory = "" if strategy.memory is None else f"memory={strategy.memory!r}"
        store = "" if strategy.store is None else f"{strategy.store!r}"
        return f"Symplectic({memory or store})"
    return repr(strategy)


def _size(value: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
