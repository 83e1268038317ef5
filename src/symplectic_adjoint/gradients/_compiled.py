"""A solve in the compiled loop tier: what of a job it takes, and the tape it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from symplectic_adjoint._errors import (
    CompilationError,
    SolveError,
)
from symplectic_adjoint.capture import changed, detached
from symplectic_adjoint.controllers import Adaptive, LargestPart
from symplectic_adjoint.execution import Stuck
from symplectic_adjoint.execution.forward import Records
from symplectic_adjoint.execution.lift import Lifted, lift
from symplectic_adjoint.execution.loop import (
    Chunk,
    Program,
    Recording,
    adaptive,
    on_grid,
    record,
    reverse,
)
from symplectic_adjoint.execution.step import CompiledRK
from symplectic_adjoint.execution.trace import seconds_spent
from symplectic_adjoint.field import DetachedField
from symplectic_adjoint.gradients._base import Record
from symplectic_adjoint.gradients._function import Tape
from symplectic_adjoint.gradients._job import (
    Job,
    Recorded,
    execute,
    finished,
    output_times,
    tape_of,
)
from symplectic_adjoint.loop import OutputTimes, Stats
from symplectic_adjoint.solution import Solution
from symplectic_adjoint.steppers import ExplicitRK
from symplectic_adjoint.steppers._base import Saved
from symplectic_adjoint.threads import limited


class Bound:
    """A lifted function as the rest of the library knows functions and what they depend on.

    Attributes:
        tensors: What it depends on and a derivative may be wanted of.
        names: For messages.
    """

    restricted = False

    def __init__(self, lifted: Lifted, listed: Callable[[Tensor], bool]) -> None:
        """Bind a graph to tensors.

        Args:
            lifted: The function.
            listed: Whether a tensor is not to be a constant.
        """
        self.graph = lifted.graph
        self.all = [x if listed(x) else x.detach() for x in lifted.tensors]
        self._places = [i for i, x in enumerate(self.all) if x.requires_grad]
        self.tensors = [self.all[i] for i in self._places]
        self.names = [""] * len(self.tensors)
        self._now: Sequence[Tensor] = self.tensors
        constants = (x for x in self.all if not (x.requires_grad or x.is_inference()))
        self._versions = [(x, x._version) for x in constants]

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Evaluate the function, differentiably."""
        return self.graph(t, y, self.holding(self._now))

    def holding(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All tensors of the graph, with these in their places."""
        held = list(self.all)
        for i, x in zip(self._places, tensors, strict=True):
            held[i] = x
        return held

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same as compiled code takes them."""
        return [x.detach().contiguous() for x in self.holding(tensors)]

    def among(self, values: Sequence[Any]) -> list[Any]:
        """Of values for all tensors of the graph those for ``tensors``."""
        return [values[i] for i in self._places]

    @property
    def elements(self) -> int:
        """How many elements all of them have."""
        return sum(x.numel() for x in self.all)

    @contextlib.contextmanager
    def substituted(self, aliases: Sequence[Tensor]) -> Generator[None]:
        """Evaluate with others in the place of ``tensors``."""
        before, self._now = self._now, aliases
        try:
            yield
        finally:
            self._now = before

    @contextlib.contextmanager
    def resumed(self, aliases: Sequence[Tensor]) -> Generator[None]:
        """The same, for what was evaluated before.

        Raises:
            ChangedTensorError: A constant was changed in place since.
        """
        for x, version in self._versions:
            if x._version != version:
                raise changed(x)
        with self.substituted(aliases):
            yield

    def freeze(self) -> None:
        """A graph means the same ever after."""


@dataclass
class LoopTape(Tape):
    """The tape of a solve that the compiled loop has run.

    Attributes:
        recording: What the loop has written.
        bound: The function it has solved.
    """

    recording: Recording = dataclasses.field(kw_only=True)
    bound: Bound = dataclasses.field(kw_only=True)

    def release(self) -> list[Tensor]:
        """Hand over all kept tensors, so that autograd owns them."""
        kept = [records.tensors for records in self.recording.records]
        self._counts = [len(tensors) for tensors in kept]
        self.recording = replace(self.recording, records=[])
        return [x for tensors in kept for x in tensors]

    def reversed(
        self,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        y: Sequence[Tensor],
        kept: Sequence[Tensor],
        g: Tensor,
    ) -> list[Tensor | None]:
        """First derivatives, by the compiled reverse sweep."""
        before = seconds_spent()
        y0, _, times, *captured = (x.detach() for x in inputs)
        tensors = self.bound.inputs(captured)
        records, position = [], 0
        for count in self._counts:
            records.append(Records.of(kept[position : position + count]))
            position += count
        recording, evaluations = replace(self.recording, records=records), 0
        if not records:
            recording = self._again(y0, tensors, times)
            evaluations = recording.evaluations
        wanted = recording.program.method.traced.wanted
        sums = [
            self.strategy.zeros(x) if want else None
            for x, want in zip(tensors, wanted, strict=True)
        ]
        with limited(self.threads), torch.no_grad(), self.bound.resumed(captured):
            result = reverse(
                recording, tensors, [x for x in sums if x is not None], g.contiguous(), times
            )
        self.stats.compile_seconds += seconds_spent() - before
        self.stats.backward_evaluations = evaluations + result.evaluations
        self.stats.products = result.products
        pairs = zip(sums, tensors, strict=True)
        grads = [None if total is None else total.to(x.dtype) for total, x in pairs]
        return [result.lam, None, None, *self.bound.among(grads)]

    def _again(self, y0: Tensor, tensors: Sequence[Tensor], times: Tensor) -> Recording:
        """The same steps once more, where nothing was kept of them."""
        program = self.recording.program
        chunks = on_grid(program, self.nodes, y0, tensors)
        again = OutputTimes(times.tolist(), self.setting.direction, times, lambda t1: True)
        with limited(self.threads):
            return record(program, chunks, y0, again, keep=True)


def looped(job: Job, func: Any) -> tuple[Solution, SolveError | None]:
    """Solve in one compiled loop.

    Args:
        job: The solve.
        func: The user's function.

    Raises:
        CompilationError: The loop cannot run this solve.
        Stuck: It cannot reach its end.
    """
    _refuse(_common(job) | _alone(job))
    bound = _bound(job, func)
    return finished(_record(replace(job, func=bound, capture=bound)))


def stepped(job: Job, func: Any) -> tuple[Solution, SolveError | None]:
    """Solve in the eager loop, by compiled steps.

    Args:
        job: The solve.
        func: The user's function.

    Raises:
        CompilationError: The steps of this solve cannot be compiled.
    """
    _refuse(_common(job))
    before = seconds_spent()
    bound = _bound(job, func)
    stepper = CompiledRK(cast("ExplicitRK", job.stepper), bound)
    strategy = job.strategy.without_graphs()
    solution, error = execute(
        replace(job, func=bound, capture=bound, stepper=stepper, strategy=strategy)
    )
    solution.stats.compile_seconds = seconds_spent() - before
    return solution, error


TIERS = {"loop": looped, "step": stepped}
"""Each runs a job of a user's function, or raises ``CompilationError``."""


def _bound(job: Job, func: Any) -> Bound:
    return Bound(lift(job.func, func, job.problem.y0), job.capture.lists)


def _refuse(refusals: Mapping[str, bool]) -> None:
    """Refuse what a tier cannot do.

    Raises:
        CompilationError: Says what that is.
    """
    for reason, holds in refusals.items():
        if holds:
            raise CompilationError(reason, lasting=False)


def _common(job: Job) -> dict[str, bool]:
    """What no compiled tier can do."""
    y0 = job.problem.y0
    return {
        f"method {job.stepper.name!r} is no explicit Runge-Kutta method": not isinstance(
            job.stepper, ExplicitRK
        ),
        f"gradient {job.strategy.name!r} is not exact, or keeps what compiled code cannot keep": (
            job.strategy.keeps is None
        ),
        "the state is complex": y0.is_complex(),
        "the state is empty": y0.numel() == 0,
        "func jumps (jump_t or perturb)": len(job.jumps) > 0,
        "derivatives in forward mode are wanted": job.wants_tangent,
    }


def _alone(job: Job) -> dict[str, bool]:
    """What the loop cannot do, since nobody looks at its steps."""
    controller = job.controller
    return {
        "steps are kept under a schedule (memory, place)": job.strategy.keeps == "schedule",
        "there are events": bool(job.events),
        "steps are kept for dense=True": job.keep_dense,
        "a gradient of t is wanted": job.wants_time,
        "func wants to be told of steps": job.callbacks.wanted or job.adjoint_callbacks.wanted,
        "progress is reported": job.report is not None,
        "the controller is not Adaptive or FixedGrid": job.grid is None
        and type(controller) is not Adaptive,
        "the controller has a norm of its own": not isinstance(
            getattr(controller, "norm", None), LargestPart | None
        ),
    }


def _record(job: Job) -> Recorded:
    """The forward pass; of the steps is kept what the strategy asks for."""
    bound: Any = job.capture
    before = seconds_spent()
    problem, stepper = job.problem, cast("ExplicitRK", job.stepper)
    y0 = problem.y0.detach().contiguous()
    times = output_times(job, problem.t.detach())
    keeps: Any = job.strategy.keeps if job.wants_grad else "nothing"
    aliases = detached(bound.tensors)
    with limited(job.threads), torch.no_grad():
        field = DetachedField(bound, y0, aliases, None)
        whole = {"start": "points", "nothing": "states"}.get(keeps, keeps)
        program = Program.of(bound.graph, bound.all, stepper, y0, whole, _dense(job))
        chunks = _chunks(job, program, y0)
        recording = record(program, chunks, y0, times, keep=keeps not in ("start", "nothing"))
        _check_finite(recording)
    steps = len(recording.run.outputs)
    stats = Stats(
        accepted=steps,
        rejected=recording.attempts - steps,
        evaluations=recording.evaluations,
        compile_seconds=seconds_spent() - before,
    )
    run = recording.run
    run.end = stepper.resume(run.nodes[-1], (run.end.clone(),), None)
    make = functools.partial(LoopTape, recording=recording, bound=bound)
    tape = tape_of(job, field, run, stats, [Record(Saved(()))] * steps, (), make)
    return Recorded(job, run, stats, field, tape, [])


def _chunks(job: Job, program: Program, y0: Tensor) -> Iterator[Chunk]:
    bound: Any = job.capture
    tensors = bound.inputs(bound.tensors)
    if job.grid is not None:
        return on_grid(program, job.setting.grid, y0, tensors)
    start = (job.problem.times[0], y0)
    return adaptive(program, cast("Adaptive", job.controller), job.setting, start, tensors)


def _dense(job: Job) -> bool:
    """Whether outputs may lie within steps.

    Raises:
        CompilationError: They do, and take stages of their own.
    """
    grid = None if job.grid is None else set(job.grid.tolist())
    inside = job.problem.times[1:-1]
    dense = bool(inside) if grid is None else not grid.issuperset(inside)
    stepper: Any = job.stepper
    if dense and stepper.dense.extra_stages:
        raise CompilationError(
            f"outputs within the steps of {stepper.name!r} take stages of their own",
            lasting=False,
        )
    return dense


def _check_finite(recording: Recording) -> None:
    """A grid is checked once, at its end; the eager loop then finds where it went wrong.

    Raises:
        Stuck: The solution is not finite.
    """
    if not bool(torch.isfinite(recording.run.y).all()):
        raise Stuck
