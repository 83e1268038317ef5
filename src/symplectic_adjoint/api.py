"""The front door: ``solve`` and ``odeint``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint import gradients, steppers
from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint._types import FlatFunc, Func, Time
from symplectic_adjoint.capture import Capture, detached
from symplectic_adjoint.controllers import (
    Adaptive,
    Controller,
    FixedGrid,
    GridPace,
    Setting,
)
from symplectic_adjoint.dense import linear
from symplectic_adjoint.field import DetachedField, Field, GraphField, RandomState, Rediscovered
from symplectic_adjoint.gradients import Backprop, Strategy, Symplectic
from symplectic_adjoint.gradients._base import Record
from symplectic_adjoint.gradients._function import Autocast, Tape, attach
from symplectic_adjoint.loop import Outputs, OutputTimes, Run, Stats, integrate, run
from symplectic_adjoint.problem import Problem, flat_func
from symplectic_adjoint.progress import reporter
from symplectic_adjoint.solution import Solution
from symplectic_adjoint.steppers import ExplicitRK, Stepper
from symplectic_adjoint.steppers._base import Saved


def solve(
    func: Func,
    y0: Any,
    t: Any,
    *,
    args: Sequence[Any] = (),
    method: str | Stepper | None = None,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    controller: Controller | None = None,
    gradient: str | Strategy = "symplectic",
    params: Sequence[Tensor] | None = None,
    throw: bool = True,
    dense: bool = False,
    progress: bool | Callable[[float], None] | None = None,
) -> Solution:
    """Solve ``dy/dt = func(t, y, *args)`` from ``y(t[0]) = y0``, differentiably.

    The gradient is the exact derivative of the computed solution with the accepted steps held
    fixed, for ``y0``, ``args``, every tensor that ``func`` depends on, and ``t``.

    Args:
        func: Gives the derivative of the state, like ``y0`` in structure, shape, dtype and device.
            It receives ``t`` as a 0-dim tensor. Modules, functions, closures and partials work
            alike.
        y0: Initial state: a floating-point or complex tensor, or a pytree of such.
        t: Times at which the solution is wanted, (T,), strictly monotone; the solve starts at
            ``t[0]`` and ends at ``t[-1]``.
        args: Passed on to ``func``.
        method: Name of a method (``steppers.names()``) or a stepper; "dopri5" by default.
        rtol: Relative tolerance, a number or a tensor that broadcasts against the state.
        atol: Absolute tolerance, likewise.
        controller: ``Adaptive(...)`` or ``FixedGrid(...)``. By default adaptive where the method
            estimates its error; otherwise the grid is ``t``.
        gradient: A strategy or its name (``gradients.names()``).
        params: When given, gradients go to ``y0``, ``t`` and these tensors only.
        throw: Whether a solve that cannot reach ``t[-1]`` raises; otherwise the valid prefix is
            returned with its status.
        dense: Keep every step, so that ``solution.dense(t)`` works.
        progress: True for a progress meter, or a function called with each time reached.

    Returns:
        The solution; ``solution.y`` has shape (T, ...).

    Raises:
        ArgumentError: An argument is unusable.
        FieldOutputError: ``func`` returned no derivative of the state.
        CaptureError: ``func`` depends on a tensor whose gradient would be lost.
        SolveError: ``t[-1]`` could not be reached (``NonFiniteError``, ``StepUnderflowError``,
            ``StepLimitError``); its ``solution`` holds the valid prefix.

    Example:
        >>> import torch
        >>> rate = torch.tensor(-0.5, requires_grad=True)
        >>> sol = solve(lambda t, y: rate * y, torch.ones(1), [0.0, 1.0])
        >>> sol.y[-1].sum().backward()
        >>> round(rate.grad.item(), 4)  # the derivative of exp(rate)
        0.6065
    """
    strategy = gradients.get(gradient)
    stepper = resolved_stepper(method, strategy)
    strategy.check(stepper)
    problem = Problem.of(y0, t)
    if controller is None:
        controller = FixedGrid() if stepper.error_order is None else Adaptive()
    arguments = list(args)
    job = _Job(
        func=flat_func(func, problem.spec, arguments),
        capture=Capture(func, arguments, params),
        problem=problem,
        grid=_grid(controller, func, y0, problem),
        stepper=stepper,
        controller=controller,
        strategy=strategy,
        rtol=rtol,
        atol=atol,
        report=reporter(progress, problem.times[0], problem.times[-1]),
        keep_dense=dense,
    )
    solution, error = _retried(job)
    solution.t = (t if isinstance(t, Tensor) else problem.t)[: len(solution.t)]
    if error is not None:
        solution.status, solution.message = error.status, str(error)
        if throw:
            error.solution = solution
            raise error
    return solution


def odeint(
    func: Func,
    y0: Any,
    t: Any,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    gradient: str | Strategy = "symplectic",
    params: Sequence[Tensor] | None = None,
) -> Any:
    """Solve an initial value problem with torchdiffeq's signature.

    Args:
        func: Gives the derivative: ``func(t, y)``.
        y0: Initial state: a tensor or a pytree of tensors.
        t: Output times (T,), strictly monotone.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        method: Name of a method; "dopri5" by default.
        options: For methods with an error estimate ``first_step``, ``safety``, ``ifactor``,
            ``dfactor``, ``max_num_steps``, ``min_step``, ``max_step``, ``norm``; for the others
            ``step_size``, ``grid_constructor`` and ``interp`` ("linear" or "cubic").
        gradient: A strategy or its name.
        params: When given, gradients go to ``y0``, ``t`` and these tensors only.

    Returns:
        The solution at ``t``: (T, ...), or a pytree like ``y0`` with such leaves.

    Raises:
        ArgumentError: An argument is unusable.
        SolveError: ``t[-1]`` could not be reached.

    Example:
        >>> import torch
        >>> y = odeint(lambda t, y: -y, torch.ones(3), torch.linspace(0.0, 1.0, 5))
        >>> y.shape
        torch.Size([5, 3])
    """
    stepper = resolved_stepper(method, gradients.get(gradient))
    stepper, controller = _from_options(stepper, options or {})
    return solve(
        func,
        y0,
        t,
        method=stepper,
        rtol=rtol,
        atol=atol,
        controller=controller,
        gradient=gradient,
        params=params,
    ).y


_ADAPTIVE_OPTIONS = {
    "first_step": "first_step",
    "safety": "safety",
    "ifactor": "factor_max",
    "dfactor": "factor_min",
    "max_num_steps": "max_steps",
    "min_step": "min_step",
    "max_step": "max_step",
    "norm": "norm",
}
_FIXED_OPTIONS = ("step_size", "grid_constructor", "interp")


def _from_options(stepper: Stepper, options: Mapping[str, Any]) -> tuple[Stepper, Controller]:
    adaptive = stepper.error_order is not None
    valid = tuple(_ADAPTIVE_OPTIONS) if adaptive else _FIXED_OPTIONS
    for name in options:
        if name not in valid:
            raise UnknownNameError(f"option of method {stepper.name!r}", name, valid)
    if adaptive:
        return stepper, Adaptive(**{_ADAPTIVE_OPTIONS[k]: v for k, v in options.items()})
    grid = {k: v for k, v in options.items() if k != "interp"}
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise UnknownNameError("interp", interp, ("linear", "cubic"))
    if interp == "linear" and isinstance(stepper, ExplicitRK):
        stepper = ExplicitRK(stepper.tableau, linear(stepper.tableau.b))
    return stepper, FixedGrid(**grid)


def resolved_stepper(method: str | Stepper | None, strategy: Strategy) -> Stepper:
    """The stepper asked for; by default the one that the strategy needs, or dopri5."""
    if method is None:
        method = strategy.method or "dopri5"
    return steppers.get(method) if isinstance(method, str) else method


def _grid(controller: Controller, func: Func, y0: Any, problem: Problem) -> Tensor | None:
    if not isinstance(controller, FixedGrid):
        return None
    return controller.grid(func, y0, problem.t)


@dataclass
class _Job:
    """A solve with all its arguments resolved."""

    func: FlatFunc
    capture: Capture
    problem: Problem
    grid: Tensor | None
    stepper: Stepper
    controller: Controller
    strategy: Strategy
    rtol: float | Tensor
    atol: float | Tensor
    report: Callable[[float], None] | None
    keep_dense: bool

    @property
    def setting(self) -> Setting:
        return Setting(
            end=self.problem.times[-1],
            direction=self.problem.direction,
            rtol=self.rtol,
            atol=self.atol,
            grid=() if self.grid is None else self.grid.tolist(),
        )

    @property
    def wants_time(self) -> bool:
        return torch.is_grad_enabled() and self.problem.t.requires_grad

    @property
    def wants_grad(self) -> bool:
        inputs = (self.problem.y0, self.problem.t, *self.capture.tensors)
        return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    def hits(self, t1: float) -> bool:
        """Whether an output at the end of a step is the step time itself, however ``t`` moves.

        Any other output that happens to lie there is interpolated, so that its own time moves it.
        """
        if not self.wants_time or self.grid is self.problem.t:
            return True
        constructed = isinstance(self.controller, FixedGrid) and self.controller.grid_constructor
        return t1 == self.problem.times[-1] and not constructed

    def nodes(self, reached: Sequence[float]) -> Tensor:
        """Step times on the graph of ``t``, where they follow it."""
        if self.grid is not None:
            return self.grid[: len(reached)]
        nodes = torch.tensor(reached, dtype=torch.float64)
        if not self.wants_time or len(reached) < 2:
            return nodes
        t = self.problem.t
        last = t[-1:] if reached[-1] == self.problem.times[-1] else nodes[-1:]
        return torch.cat([t[:1], nodes[1:-1], last])


def _retried(job: _Job) -> tuple[Solution, Any]:
    """Solve; start again when a dependency of ``func`` was found on the way."""
    before = RandomState(job.problem.y0.device)
    while True:
        try:
            return _backprop(job) if _plain_autograd(job) else _recorded(job)
        except Rediscovered:
            before.set()


def _plain_autograd(job: _Job) -> bool:
    return isinstance(job.strategy, Backprop) and job.wants_grad


def _backprop(job: _Job) -> tuple[Solution, Any]:
    field = GraphField(job.func, job.problem.y0)
    nodes = job.grid if job.grid is not None else job.problem.t[[0, -1]]
    knots = {}
    if job.wants_time:
        knots = dict(zip(nodes.tolist(), nodes.unbind(), strict=True))
    times = _output_times(job, job.problem.t if job.wants_time else job.problem.t.detach())
    steps: list[Any] = []
    keep = (lambda n, step, outputs: steps.append(step)) if job.keep_dense else _nothing
    with job.capture.substituted(job.capture.tensors):
        result, stats = _run(job, field, knots, times, keep, graph=True)
    dense = _GraphDense(job, field, steps) if job.keep_dense else None
    return _solution(job, result, stats, result.y, dense), result.error


def _recorded(job: _Job) -> tuple[Solution, Any]:
    """The forward pass with no graph, then its outputs attached to the caller's graph."""
    wants_grad = job.wants_grad
    aliases = detached(job.capture.tensors)
    y0 = job.problem.y0
    records: list[Record] = []
    saved: list[Saved] = []

    def keep(n: int, step: Any, outputs: Outputs) -> None:
        if n == 0:
            records.clear()
            saved.clear()
        if wants_grad:
            records.append(job.strategy.keep(job.stepper, n, step))
        if job.keep_dense:
            saved.append(job.stepper.save(step, stages=True))

    with torch.enable_grad(), job.capture.substituted(aliases):
        strategy = job.strategy if wants_grad else Symplectic()
        field = strategy.forward_field(job.func, y0.detach(), aliases, job.capture, job.wants_time)
        times = _output_times(job, job.problem.t.detach())
        result, stats = _run(job, field, {}, times, keep, graph=False)
    tape = _tape(job, field, result, stats, records, aliases)
    y = result.y
    nodes = job.nodes(result.nodes)
    dense = _RecordedDense(job, tape, saved, nodes, wants_grad) if job.keep_dense else None
    if wants_grad:
        y = attach(tape, y, y0, nodes, job.problem.t[: len(y)])
    return _solution(job, result, stats, y, dense), result.error


def _run(
    job: _Job,
    field: Field,
    knots: Mapping[float, Tensor],
    times: OutputTimes,
    keep: Callable[[int, Any, Outputs], None],
    graph: bool,
    checked: bool = False,
) -> tuple[Run, Stats]:
    """Integrate. A fixed grid is read back once, at the end; if that fails, step by step."""
    stats = Stats()
    field.locate = job.problem.spec.locate
    t0 = job.problem.times[0]
    y0 = job.problem.y0 if graph else job.problem.y0.detach()
    start: Time = knots.get(t0, t0)
    state = job.stepper.begin(start, y0)
    before = RandomState(field.device)
    pace = job.controller.begin(field, job.stepper, state, job.setting)
    if isinstance(pace, GridPace):
        pace.checked = checked
    steps = integrate(field, job.stepper, pace, state, job.problem.times[-1], knots, stats)
    result = run(field, job.stepper, steps, state, times, keep, graph, job.report)
    stats.evaluations = field.evaluations
    if isinstance(pace, GridPace) and not checked and not bool(torch.isfinite(result.y).all()):
        before.set()
        field.evaluations = 0
        return _run(job, field, knots, replace(times, next=1), keep, graph, checked=True)
    return result, stats


def _output_times(job: _Job, t: Tensor) -> OutputTimes:
    return OutputTimes(job.problem.times, job.problem.direction, t, job.hits)


def _nothing(n: int, step: Any, outputs: Outputs) -> None:
    """Keeps nothing of a step."""


def _tape(
    job: _Job,
    field: Any,
    result: Run,
    stats: Stats,
    records: list[Record],
    aliases: Sequence[Tensor],
) -> Tape:
    keeps_graph = any(record.graphs for record in records)
    return Tape(
        func=job.func,
        capture=job.capture,
        aliases=aliases if keeps_graph else (),
        stepper=job.stepper,
        strategy=job.strategy,
        controller=job.controller,
        setting=job.setting,
        nodes=result.nodes,
        wanted=_wanted(job, len(result.nodes) - 1),
        outputs=result.outputs,
        records=records,
        end=job.stepper.carried(result.end),
        end_token=result.end.node.token,
        stats=stats,
        autocast=Autocast(field.device),
        leafy=field.leafy,
    )


def _wanted(job: _Job, last: int) -> Callable[[int], bool]:
    """Which step times may have a gradient."""
    if job.grid is not None:
        return lambda n: True
    return lambda n: n in (0, last)


def _solution(
    job: _Job, result: Run, stats: Stats, y: Tensor, dense: Callable[[Tensor], Any] | None
) -> Solution:
    return Solution(
        t=job.problem.t[: len(y)],
        y=job.problem.spec.unflatten(y),
        steps=torch.tensor(result.nodes, dtype=torch.float64),
        stats=stats,
        _dense=dense,
    )


class _Dense:
    """Dense output after the solve: sorts times into steps, whatever their order."""

    def __init__(self, job: _Job, nodes: Sequence[float]) -> None:
        self.job = job
        self.nodes = torch.tensor(nodes, dtype=torch.float64)

    def __call__(self, t: Tensor) -> Any:
        flat, order = (t.reshape(-1) * self.job.problem.direction).sort()
        times = flat * self.job.problem.direction
        y = self.at(times)[order.argsort()]
        return self.job.problem.spec.unflatten(y.reshape(*t.shape, *y.shape[1:]))

    def at(self, times: Tensor) -> Tensor:
        raise NotImplementedError

    def bins(self, times: Tensor) -> list[Outputs]:
        """The outputs that each step holds; those at the start belong to the first step."""
        direction = self.job.problem.direction
        edges = torch.searchsorted(times.detach() * direction, self.nodes * direction, side="right")
        edges[0] = 0
        stops = edges.tolist()
        return [Outputs(a, b, None) for a, b in itertools.pairwise(stops)]


class _GraphDense(_Dense):
    def __init__(self, job: _Job, field: Field, steps: list[Any]) -> None:
        super().__init__(job, [float(job.problem.times[0]), *(float(s.t1) for s in steps)])
        self.field = field
        self.steps = steps

    def at(self, times: Tensor) -> Tensor:
        parts = []
        with self.job.capture.substituted(self.job.capture.tensors):
            for step, (first, stop, _) in zip(self.steps, self.bins(times), strict=True):
                if stop > first:
                    theta = (times[first:stop] - step.start.t) / (step.t1 - step.start.t)
                    parts.append(self.job.stepper.interpolate(self.field, step, theta))
        return torch.cat(parts)


class _RecordedDense(_Dense):
    """Evaluates the stages of the steps asked for again, and attaches the outputs like a solve."""

    def __init__(
        self, job: _Job, tape: Tape, saved: list[Saved], step_times: Tensor, wants_grad: bool
    ) -> None:
        super().__init__(job, tape.nodes)
        self.tape = tape
        self.end = tape.end
        self.saved = saved
        self.step_times = step_times
        self.wants_grad = wants_grad

    def at(self, times: Tensor) -> Tensor:
        # The initial state comes first, as in every solve.
        outputs = [Outputs(a + 1, b + 1, None) for a, b, _ in self.bins(times)]
        times = torch.cat([self.nodes[:1], times])
        y = self._values(outputs, times.detach())
        if self.wants_grad and torch.is_grad_enabled():
            y = attach(self._tape(outputs), y, self.job.problem.y0, self.step_times, times)
        return y[1:]

    def _values(self, outputs: Sequence[Outputs], times: Tensor) -> Tensor:
        job, stepper = self.job, self.job.stepper
        aliases = detached(job.capture.tensors)
        y0 = job.problem.y0.detach()
        parts = [y0.unsqueeze(0)]
        with torch.enable_grad(), job.capture.substituted(aliases), self.tape.autocast.restored():
            field = DetachedField(job.func, y0, aliases, None)
            field.random, field.leafy = False, self.tape.leafy
            for n, (first, stop, _) in enumerate(outputs):
                if stop == first:
                    continue
                t, t1 = self.tape.nodes[n : n + 2]
                step = stepper.load(field, t, t1, self.saved[n], self._end(n), dense=True)
                theta = (times[first:stop] - t) / (t1 - t)
                parts.append(stepper.interpolate(field, step, theta))
        return torch.cat(parts)

    def _end(self, n: int) -> Any:
        last = n + 1 == len(self.saved)
        tensors = self.end if last else self.saved[n + 1].tensors
        tokens = () if last else self.saved[n + 1].tokens
        token = self.tape.end_token if last else tokens[0] if tokens else None
        return self.job.stepper.resume(self.tape.nodes[n + 1], tensors, token)

    def _tape(self, outputs: Sequence[Outputs]) -> Tape:
        strategy = Symplectic() if self.job.strategy.exact else self.job.strategy
        return replace(
            self.tape,
            strategy=strategy,
            aliases=(),
            outputs=outputs,
            records=[Record(saved) for saved in self.saved],
            end=self.end,
            stats=Stats(),
        )
