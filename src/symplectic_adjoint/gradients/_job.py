"""A solve with all its arguments resolved, and its execution under a strategy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from symplectic_adjoint._errors import ArgumentError, SolveError, Status
from symplectic_adjoint._types import FlatFunc, as_float, floats, tensor_of
from symplectic_adjoint.callbacks import Callbacks
from symplectic_adjoint.capture import detached, has_tangent, varies
from symplectic_adjoint.controllers import Controller, FixedGrid, GridPace, Setting
from symplectic_adjoint.events import Crossing, FlatEvent, Watch
from symplectic_adjoint.field import (
    DetachedField,
    Field,
    GraphField,
    RandomState,
    Rediscovered,
)
from symplectic_adjoint.gradients._base import Counts, Record, Strategy
from symplectic_adjoint.gradients._dense import GraphDense, RecordedDense
from symplectic_adjoint.gradients._event import Located
from symplectic_adjoint.gradients._function import Autocast, Tape, attach, replayed
from symplectic_adjoint.gradients._ledger import Ledger
from symplectic_adjoint.gradients._resume import SolveLog, guarded, opened
from symplectic_adjoint.gradients.backprop import Backprop
from symplectic_adjoint.gradients.checkpoint import Checkpoint
from symplectic_adjoint.loop import Outputs, OutputTimes, Run, SolveShape, Stats, integrate, run
from symplectic_adjoint.problem import Problem
from symplectic_adjoint.solution import Solution
from symplectic_adjoint.steppers import Stepper, admit
from symplectic_adjoint.steppers._base import Saved
from symplectic_adjoint.threads import limited, suited

Result = TypeVar("Result")


@dataclass
class Job:
    """A solve with all its arguments resolved, and what was learned by attempting it.

    ``regrid`` gives the fixed grid for other times. ``random`` says that ``func`` draws random
    numbers, ``spent`` counts its calls in the attempts that were given up.
    """

    func: FlatFunc
    capture: Any  # Capture, or what else knows what func depends on
    problem: Problem
    grid: Tensor | None
    regrid: Callable[[Tensor], Tensor | None]
    jumps: Tensor
    stepper: Stepper
    controller: Controller
    strategy: Strategy
    rtol: float | Tensor
    atol: float | Tensor
    report: Callable[[float], None] | None
    keep_dense: bool
    events: Sequence[FlatEvent] = ()
    callbacks: Callbacks = dataclasses.field(default_factory=Callbacks)
    adjoint_callbacks: Callbacks = dataclasses.field(default_factory=Callbacks)
    random: bool = False
    spent: int = 0

    @functools.cached_property
    def setting(self) -> Setting:
        return Setting(
            end=self.problem.times[-1],
            direction=self.problem.direction,
            rtol=self.rtol,
            atol=self.atol,
            grid=() if self.grid is None else floats(self.grid),
            jumps=frozenset(self.jumps.tolist()),
        )

    @property
    def threads(self) -> int | None:
        """How many threads the solve uses; None for as many as PyTorch."""
        return suited(self.problem.y0, self.capture.elements)

    @property
    def inputs(self) -> list[Tensor]:
        """What derivatives may be wanted of."""
        return [self.problem.y0, *self._times, *self.capture.tensors]

    @property
    def _times(self) -> list[Tensor]:
        given = [] if self.grid is None or self.grid is self.problem.t else [self.grid]
        return [self.problem.t, self.jumps, *given]

    @property
    def wants_time(self) -> bool:
        wanted = torch.is_grad_enabled()
        return any(has_tangent(x) or (wanted and varies(x)) for x in self._times)

    @property
    def wants_grad(self) -> bool:
        inputs = [*self.inputs, *(x for event in self.events for x in event.capture.tensors)]
        return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    @property
    def wants_tangent(self) -> bool:
        return any(has_tangent(x) for x in self.inputs)

    def hits(self, t1: float) -> bool:
        """Whether an output at the end of a step is the step time itself, however ``t`` moves.

        Any other output that happens to lie there is interpolated, so that its own time moves it.
        """
        if self.grid is self.problem.t or not self.wants_time:
            return True
        constructed = isinstance(self.controller, FixedGrid) and self.controller.grid_constructor
        return t1 == self.problem.times[-1] and not constructed

    def output_times(self, result: Run) -> Tensor:
        """The output times reached, on the graph of ``t``; that of an event is a constant."""
        t = self.problem.t
        if result.event is None:
            return t[: len(result.y)]
        return torch.cat([t[: len(result.y) - 1], t.detach().new_tensor([result.event.t])])

    def at(self, t: Tensor) -> Job:
        """The same with other times, for a replay on its grid."""
        return replace(self, problem=replace(self.problem, t=t), grid=self.regrid(t))

    def nodes(self, reached: Sequence[float]) -> Tensor:
        """Step times on the graph of ``t``, where they follow it."""
        if self.grid is not None:
            return self.grid[: len(reached)]
        nodes = tensor_of(reached)
        knots = self.knots()
        moving = [n for n, t in enumerate(reached) if t in knots]
        if not moving:
            return nodes
        moved = torch.stack([knots[reached[n]] for n in moving])
        return nodes.index_copy(0, torch.tensor(moving), moved)

    def knots(self) -> dict[float, Tensor]:
        """The step times that have a gradient, by their value; a jump at an end moves nothing."""
        if not self.wants_time:
            return {}
        if self.grid is not None:
            return dict(zip(self.grid.tolist(), self.grid.unbind(), strict=True))
        t, times = self.problem.t, self.problem.times
        found = {times[0]: t[0], times[-1]: t[-1]} if varies(t) else {}
        if varies(self.jumps):
            jumps = zip(self.jumps.tolist(), self.jumps.unbind(), strict=True)
            found |= {value: jump for value, jump in jumps if value not in (times[0], times[-1])}
        return found


def execute(job: Job) -> tuple[Solution, SolveError | None]:
    """Solve; start again when a dependency or a random draw of ``func`` was found on the way.

    Returns:
        The solution as far as it is valid, and why it is no longer.
    """
    if torch.is_inference_mode_enabled():
        return _inferred(job)
    if _plain_autograd(job):
        if job.capture.restricted:
            # Backprop alone would not notice a tensor that must be made a constant.
            before = RandomState(job.problem.y0.device)
            explored = replace(
                job, strategy=Checkpoint(), report=None, keep_dense=False, callbacks=Callbacks()
            )
            job.spent = settled(explored, record).job.spent
            before.set()
        return settled(job, _backprop)
    return settled(job, _recorded)


def settled(job: Job, attempt: Callable[[Job], Result]) -> Result:
    """Attempt a solve until nothing new is learned about ``func`` on the way."""
    before = RandomState(job.problem.y0.device)
    while True:
        try:
            result = attempt(job)
            job.capture.freeze()
            return result
        except Rediscovered:
            before.set()


def _inferred(job: Job) -> tuple[Solution, SolveError | None]:
    """The solve outside of inference mode, in which ``func`` cannot differentiate inside itself."""
    with torch.inference_mode(mode=False), torch.no_grad():
        problem = replace(job.problem, y0=job.problem.y0.clone())
        return execute(replace(job, problem=problem))


def _plain_autograd(job: Job) -> bool:
    return isinstance(job.strategy, Backprop) and torch.is_grad_enabled()


def _backprop(job: Job) -> tuple[Solution, SolveError | None]:
    field = GraphField(job.func, job.problem.y0)
    times = output_times(job, job.problem.t if job.wants_time else job.problem.t.detach())
    steps: list[Any] = []
    records: list[Record] = []
    drawn = RandomState(field.device)

    def keep(n: int, step: Any, outputs: Outputs) -> None:
        if job.keep_dense:
            steps.append(step)
        if job.events:
            records.append(Checkpoint().keep(job.stepper, n, step))

    with job.capture.substituted(job.capture.tensors):
        result, stats = _run(job, field, job.knots(), times, keep, graph=True)
    dense = (
        GraphDense(job.problem, job.stepper, job.capture, field, steps) if job.keep_dense else None
    )
    if result.y.requires_grad:
        counts = job.strategy.counts(job.stepper, _shape(job, result, stats))
        result.y.register_hook(functools.partial(_write_counts, stats, counts, field))
    y, crossing = result.y, None
    if result.event is not None:
        tape = tape_of(job, field, result, stats, records, ())
        random = not drawn.same(RandomState(field.device))
        y, crossing = _crossing(job, field, result, tape, y, random)
    return _solution(job, result, stats, y, dense, crossing), result.error


def _shape(job: Job, result: Run, stats: Stats) -> SolveShape:
    setting, final = job.setting, len(result.outputs) - 1
    last = [n for n, t in enumerate(result.nodes[1:]) if n == final or setting.cuts(t)]
    return SolveShape.of(result.outputs, last, stats.further)


def _write_counts(stats: Stats, counts: Counts, field: Field, g: Tensor) -> None:
    """Plain autograd counts nothing, but reverses each stage once; solvers count for themselves."""
    stats.backward_evaluations, stats.products = counts
    stats.backward_solver_products = 0
    field.backward = stats


@dataclass
class Recorded:
    """A solve that has been run with no graph.

    Attributes:
        job: What was solved.
        result: The steps and the outputs.
        stats: Counts.
        field: The field it was solved with.
        tape: What its derivatives need.
        saved: The steps, where dense outputs may be asked for.
    """

    job: Job
    result: Run
    stats: Stats
    field: Field
    tape: Tape
    saved: list[Record]

    def attached(self) -> Tensor:
        """The outputs on the graph of the job's y0, t and captured tensors."""
        job, result = self.job, self.result
        nodes, times = job.nodes(result.nodes), job.output_times(result)
        return attach(self.tape, result.y, job.problem.y0, nodes, times)

    def replayed(self, y0: Tensor, t: Tensor, captured: Sequence[Tensor]) -> Tensor:
        """The outputs once more, by operations on the frozen grid."""
        nodes = self.job.at(t).nodes(self.tape.nodes)
        y, _ = replayed(self.tape, [y0, nodes, t[: len(self.result.y)], *captured])
        return y


def _recorded(job: Job) -> tuple[Solution, SolveError | None]:
    """The forward pass with no graph, then its outputs attached to the caller's graph."""
    return finished(record(job))


def finished(recorded: Recorded) -> tuple[Solution, SolveError | None]:
    """A recorded solve with its outputs attached to the caller's graph."""
    job, result, tape = recorded.job, recorded.result, recorded.tape
    wanted, dense = job.wants_grad or job.wants_tangent, None
    if job.keep_dense:
        nodes = job.nodes(result.nodes)
        dense = RecordedDense(job.problem, tape, recorded.saved, nodes, wanted)
    y = recorded.attached() if wanted else result.y
    y, crossing = _crossing(job, recorded.field, result, tape, y, job.random)
    return _solution(job, result, recorded.stats, y, dense, crossing), result.error


def record(job: Job) -> Recorded:
    """The forward pass with no graph; of each step is kept what the strategy asks for."""
    wants_grad = job.wants_grad
    # Tangents need no more than the grid.
    strategy = job.strategy if wants_grad else Checkpoint()
    if wants_grad:
        tensors = [x for x in (job.problem.y0, *job.capture.tensors) if x.requires_grad]
        strategy.admit([*tensors, *job.knots().values()])
    # Where no derivative can be asked for, none can be missed.
    asked = torch.is_grad_enabled() or forward_ad._current_level >= 0
    capture = job.capture if asked else None
    aliases = detached(job.capture.tensors)
    y0 = job.problem.y0
    records: list[Record] = []
    dense_records: list[Record] = []
    drawn = RandomState(y0.device)
    wanted = wants_grad or job.wants_tangent
    recomputes = wanted or job.keep_dense
    setting = job.setting
    ledger = _ledger(job) if wants_grad else None

    def keep(n: int, step: Any, outputs: Outputs) -> None:
        if recomputes and not job.random and not drawn.same(RandomState(y0.device)):
            job.random = True
            raise Rediscovered
        if n == 0:
            records.clear()
            dense_records.clear()
        end = _cut(job.stepper, step) if setting.cuts(as_float(step.t1)) else None
        if ledger is not None:
            ledger.took(n, step, end)
        elif wanted:
            kept = strategy.keep(job.stepper, n, step)
            kept.end = end
            records.append(kept)
        if job.keep_dense:
            dense_records.append(Record(job.stepper.save(step, stages=True), end=end))

    guard = contextlib.nullcontext() if ledger is None else ledger.guarded()
    with guard, torch.enable_grad(), job.capture.substituted(aliases):
        field = strategy.forward_field(job.func, y0.detach(), aliases, capture, job.wants_time)
        field.random = job.random
        if ledger is not None:
            ledger.use(field)
        times = output_times(job, job.problem.t.detach())
        log = opened(job, field, ledger)
        with guarded(job, log):
            result, stats = _run(job, field, {}, times, keep, graph=False, log=log)
    # A grid that had to be checked step by step may have got further before.
    del records[len(result.outputs) :], dense_records[len(result.outputs) :]
    tape = tape_of(job, field, result, stats, records, aliases)
    if ledger is not None:
        ledger.until(len(result.outputs))
        tape.records, tape.ledger = ledger, ledger
        tape.aliases = aliases if ledger.graphs else ()
        tape.log = log if result.error is None else None
    return Recorded(job, result, stats, field, tape, dense_records)


def _ledger(job: Job) -> Ledger | None:
    """Who keeps the steps, where that follows a schedule.

    Raises:
        ArgumentError: Every step is to be kept, and not to be.
    """
    sums = [x for x in job.capture.tensors if x.requires_grad]
    y0, outputs = job.problem.y0.detach(), len(job.problem.times)
    # An event may end a solve before the end of its grid.
    steps = 0 if job.grid is None or job.events else len(job.grid) - 1
    ledger: Ledger | None = job.strategy.ledger(job.stepper, y0, outputs, sums, steps)
    if ledger is not None and job.keep_dense:
        raise ArgumentError(
            f"dense=True keeps every step, which gradient={job.strategy!r} is not to do; leave one "
            "of them out"
        )
    return ledger


def _cut(stepper: Stepper, step: Any) -> Saved:
    """The state at the end of a step, of which the next one takes the solution alone."""
    end = stepper.end(step)
    return Saved(stepper.carried(end), (end.node.token,))


def _run(
    job: Job,
    field: Field,
    knots: Mapping[float, Tensor],
    times: OutputTimes,
    keep: Callable[[int, Any, Outputs], None],
    graph: bool,
    checked: bool = False,
    log: SolveLog | None = None,
) -> tuple[Run, Stats]:
    """Integrate. A fixed grid is read back once, at the end; if that fails, step by step."""
    stats = Stats()
    field.locate = job.problem.spec.locate
    t0 = job.problem.times[0]
    y0 = job.problem.y0 if graph else job.problem.y0.detach()
    setting = job.setting
    start = setting.starting(knots.get(t0, t0))
    state = job.stepper.begin(start, y0)
    resumed = state if log is None else log.resumed(state, stats)
    before = RandomState(field.device)

    watch = Watch(job.events) if job.events else None
    job.callbacks.restart()

    def told(moment: str, t: float, t1: float, at: Any) -> None:
        job.callbacks(moment, t, t1, lambda: job.problem.spec.unflatten(at.y.detach()))

    def steps() -> Iterator[Any]:
        # Begun here, so that a solve that fails while it chooses its first step has a prefix, too.
        own = replace(setting, inputs=_inputs(job, field))
        pace = job.controller.begin(field, job.stepper, state, own)
        if isinstance(pace, GridPace):
            pace.checked = checked or watch is not None
            admit(job.stepper, field, state, setting.grid)
        if log is not None:
            log.attend(pace)
        yield from integrate(field, job.stepper, pace, resumed, setting, knots, stats, told)

    try:
        with limited(job.threads):
            result = run(
                field, job.stepper, steps(), state, times, keep, graph, job.report, watch, log
            )
    except Rediscovered:
        job.spent += field.evaluations
        raise
    stats.evaluations = job.spent + field.evaluations
    stats.solver_evaluations = field.solver_evaluations
    stats.solver_products = field.solver_products
    unchecked = job.grid is not None and watch is None and not checked
    if unchecked and not bool(torch.isfinite(result.y).all()):
        before.set()
        if log is not None:
            log.restart()
        return _run(job, field, knots, replace(times, next=1), keep, graph, checked=True, log=log)
    if log is not None:
        log.finish(result)
    return result, stats


def _inputs(job: Job, field: Field) -> list[tuple[str, Tensor]]:
    """What requires grad, as it stands during the solve."""
    captured = field.aliases if isinstance(field, DetachedField) else job.capture.tensors
    y0 = job.problem.y0
    state = [("y0", y0.detach())] if y0.requires_grad else []
    return [*state, *zip(job.capture.names, captured, strict=True)]


def output_times(job: Job, t: Tensor) -> OutputTimes:
    return OutputTimes(job.problem.times, job.problem.direction, t, job.hits)


def tape_of(
    job: Job,
    field: Any,
    result: Run,
    stats: Stats,
    records: list[Record],
    aliases: Sequence[Tensor],
    make: Callable[..., Tape] = Tape,
) -> Tape:
    keeps_graph = any(record.graphs for record in records)
    return make(
        func=job.func,
        capture=job.capture,
        aliases=aliases if keeps_graph else (),
        stepper=job.stepper,
        strategy=job.strategy,
        controller=job.controller,
        setting=job.setting,
        nodes=result.nodes,
        wanted=_wanted(job, result.nodes),
        outputs=result.outputs,
        records=records,
        end=job.stepper.carried(result.end),
        end_token=result.end.node.token,
        stats=stats,
        autocast=Autocast(field.device),
        threads=job.threads,
        leafy=field.leafy,
        callbacks=job.adjoint_callbacks,
        spec=job.problem.spec,
    )


def _wanted(job: Job, nodes: Sequence[float]) -> Callable[[int], bool]:
    """Which step times may have a gradient."""
    knots = job.knots()
    return frozenset(n for n, t in enumerate(nodes) if t in knots).__contains__


def _crossing(
    job: Job, field: Field, result: Run, tape: Tape, y: Tensor, random: bool
) -> tuple[Tensor, Crossing | None]:
    """The outputs before the event, and the event, if there is one."""
    root = result.event
    if root is None:
        return y, None
    located = Located(root, field, tape, random)
    tau, end = located.attach(y[-1], job.problem.y0, job.nodes(result.nodes))
    end = job.problem.spec.unflatten(end)
    return y[:-1].clone(), Crossing(tau, end, root.event.index, root.component)


def _solution(
    job: Job,
    result: Run,
    stats: Stats,
    y: Tensor,
    dense: Callable[[Tensor], Any] | None,
    event: Crossing | None,
) -> Solution:
    return Solution(
        t=job.problem.t[: len(y)],
        y=job.problem.spec.unflatten(y),
        steps=tensor_of(result.nodes),
        stats=stats,
        status=Status.SUCCESS if event is None else Status.EVENT,
        event=event,
        _dense=dense,
    )
