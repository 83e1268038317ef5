"""The only integration loop, and what is written down while it runs."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from symplectic_adjoint._errors import NonlinearSolveError, SolveError
from symplectic_adjoint._types import Time, as_float
from symplectic_adjoint.controllers import Pace, Setting
from symplectic_adjoint.field import Field
from symplectic_adjoint.steppers import Stepper
from symplectic_adjoint.steppers._base import Work


@dataclass(frozen=True)
class SolveShape:
    """What, beside the method, decides how often ``f`` is evaluated in a solve that succeeds.

    Attributes:
        accepted: Accepted steps.
        rejected: Rejected attempts.
        dense: Accepted steps that hold dense outputs.
        dense_ends: Solves whose last step does.
        dense_runs: In how many runs of consecutive steps they come.
        adaptive: Whether errors are estimated.
        selected: First step sizes that are selected by an evaluation.
        solves: Number of solves in a row, each of which starts anew; the counts are their sums.
        moved: Output times whose own gradient is wanted.
        adjoint: The solves of the backward pass, where it solves an equation of its own.
        scalars: How many numbers a gradient is wanted of: elements of tensors, times of steps, and
            one for all output times.
        further: Further stages of its steps, where the method's ``work`` varies.
    """

    accepted: int
    rejected: int = 0
    dense: int = 0
    dense_ends: int = 0
    dense_runs: int = 0
    adaptive: bool = False
    selected: int = 0
    solves: int = 1
    moved: int = 0
    adjoint: SolveShape | None = None
    scalars: int = 0
    further: int = 0

    @staticmethod
    def of(outputs: Sequence[Outputs], last: Collection[int], further: int = 0) -> SolveShape:
        """The shape of accepted steps alone, from the outputs that each holds.

        Args:
            outputs: Those of each step.
            last: The steps with which a solve ends.
            further: Further stages.
        """
        dense = [held.dense for held in outputs]
        before = [False, *(held and n not in last for n, held in enumerate(dense))]
        return SolveShape(
            len(dense),
            dense=sum(dense),
            dense_ends=sum(dense[n] for n in last),
            dense_runs=sum(now and not x for x, now in zip(before, dense, strict=False)),
            solves=len(last),
            further=further,
        )

    def stages(self, work: Work) -> int:
        """Evaluations on which the solution depends: each takes one product in reverse."""
        nodes = self.accepted - self.solves + self._last_nodes(work)
        count = self.solves * work.start + self.accepted * work.inner + nodes * work.node
        if work.dense_node and not work.node:
            count += self.dense_runs
        return count + self.dense * work.extra + self.further

    def evaluations(self, work: Work) -> int:
        """Evaluations of the forward pass, for a method whose steps take ``work``."""
        count = self.stages(work) + self.rejected * work.inner + self.selected + work.checks
        if self.adaptive:
            count += (self.accepted + self.rejected) * work.error
            if work.error_node:
                count += self.rejected + self.solves - self._last_nodes(work)
        return count

    def _last_nodes(self, work: Work) -> int:
        return self.dense_ends * work.dense_node


@dataclass
class Stats:
    """Counts of one solve.

    Attributes:
        accepted: Accepted steps.
        rejected: Rejected attempts.
        evaluations: Calls of ``func`` in the forward pass, all included.
        backward_evaluations: Calls of ``func`` in the last backward pass.
        products: Vector-Jacobian products in the last backward pass.
        backward_accepted: Accepted steps of the last backward pass, where it solves an equation of
            its own.
        backward_rejected: Its rejected attempts.
        backward_retaken: Steps that the last backward pass took again, to get back at states that
            were not kept.
        resumed: Of the accepted steps, those that were in a job folder and not taken again.
        backward_resumed: Steps that the last backward pass did not reverse again, for the same
            reason.
        further: Of the evaluations, those of iterations and starting steps in accepted steps.
        backward_further: The same, of the last backward pass, where it solves an equation of its
            own.
        solver_evaluations: Those of ``evaluations`` that only served to solve the equations of
            implicit steps: all but one a stage.
        solver_products: Products with Jacobians that solving them took in the forward pass.
        backward_solver_evaluations: Those of ``backward_evaluations`` that only served to solve
            equations again.
        backward_solver_products: Those of ``products`` that served to solve equations, the
            transposed ones among them.
        compile_seconds: How long the solve, and its last backward pass, compiled: 0 where all of
            it had been compiled before.
    """

    accepted: int = 0
    rejected: int = 0
    evaluations: int = 0
    backward_evaluations: int = 0
    products: int = 0
    backward_accepted: int = 0
    backward_rejected: int = 0
    backward_retaken: int = 0
    resumed: int = 0
    backward_resumed: int = 0
    further: int = 0
    backward_further: int = 0
    solver_evaluations: int = 0
    solver_products: int = 0
    backward_solver_evaluations: int = 0
    backward_solver_products: int = 0
    compile_seconds: float = field(default=0.0, compare=False)


def integrate(
    field: Field,
    stepper: Stepper,
    pace: Pace,
    state: Any,
    setting: Setting,
    knots: Mapping[float, Tensor],
    stats: Stats,
    told: Callable[[str, float, float, Any], None] = lambda moment, t, t1, state: None,
) -> Iterator[Any]:
    """Yield the accepted steps from ``state`` to ``setting.end``.

    Args:
        field: The vector field.
        stepper: The method.
        pace: Proposes where steps end and judges them.
        state: Where to start.
        setting: Where to stop, and where ``f`` jumps; steps end exactly there.
        knots: Times that carry a graph, as tensors, by their value.
        stats: Counts accepted and rejected steps.
        told: Called with ("step" | "accept_step" | "reject_step", t, t1, state).

    Raises:
        SolveError: The end cannot be reached; all steps yielded before are valid.
    """
    t = as_float(state.t)
    while t != setting.end:
        t1 = pace.propose(t)
        told("step", t, t1, state)
        try:
            step = stepper.step(field, state, setting.ending(knots.get(t1, t1)))
        except NonlinearSolveError as error:
            pace.fail(error, t, t1)
            stats.rejected += 1
            told("reject_step", t, t1, state)
            continue
        if pace.accepts(field, stepper, step, t, t1):
            stats.accepted += 1
            told("accept_step", t, t1, state)
            if stepper.work.varies:
                stats.further += step.further
            yield step
            state, t = stepper.end(step), t1
            if setting.cuts(t):
                state = stepper.begin(setting.starting(state.t), state.y)
        else:
            stats.rejected += 1
            told("reject_step", t, t1, state)
        del step  # so that its stages are freed before the next ones are made


class Outputs(NamedTuple):
    """Which output times a step holds.

    Attributes:
        first: Index of the first one strictly inside.
        stop: One past the index of the last one strictly inside.
        hit: Index of the one at the step's end, or None.
    """

    first: int
    stop: int
    hit: int | None

    @property
    def dense(self) -> bool:
        """Whether the interpolant is needed."""
        return self.stop > self.first


@dataclass
class OutputTimes:
    """Sorts the output times into steps.

    Attributes:
        times: The output times, from ``t[0]`` to ``t[-1]``.
        direction: +1.0 when time increases, -1.0 when it decreases.
        tensor: The same times, float64 on the CPU, on the caller's graph.
        hits: Whether an output at the end ``t1`` of a step is the state there; otherwise it is
            interpolated, and moves with a time of its own.
    """

    times: Sequence[float]
    direction: float
    tensor: Tensor
    hits: Callable[[float], bool]
    next: int = 1

    def take(self, t1: float) -> Outputs:
        """The outputs up to and including ``t1`` that were not yet taken."""
        first = self.next
        while self.next < len(self.times) and (t1 - self.times[self.next]) * self.direction >= 0:
            self.next += 1
        stop = self.next
        if stop > first and self.times[stop - 1] == t1 and self.hits(t1):
            return Outputs(first, stop - 1, stop - 1)
        return Outputs(first, stop, None)

    def places(self, outputs: Outputs, t: Time, t1: Time) -> Tensor:
        """Places ``theta`` of a step's dense outputs within it, float64 on the CPU."""
        return (self.tensor[outputs.first : outputs.stop] - t) / (t1 - t)

    def stop(self, t: float) -> None:
        """Let ``t`` be the last output time, a constant that is interpolated wherever it lies."""
        count = sum((t - time) * self.direction >= 0 for time in self.times)
        self.times = (*self.times[:count], t)
        self.tensor = torch.cat([self.tensor[:count], self.tensor.new_tensor([t])])
        self.hits = lambda t1: False


@dataclass
class Run:
    """A finished forward pass.

    Attributes:
        nodes: Step times, N + 1 floats of eight bytes each.
        outputs: The outputs that each step holds.
        y: Solution at the output times reached, (T', ...).
        end: The last state.
        error: Why the solve stopped early, or None.
        event: What ended it before its end, or None; the last output is the solution there.
    """

    nodes: MutableSequence[float]
    outputs: list[Outputs] = field(default_factory=list)
    y: Tensor = field(default_factory=lambda: torch.empty(0))
    end: Any = None
    error: SolveError | None = None
    event: Any = None

    def shared(self, outputs: Outputs) -> Outputs:
        """The same; most steps hold none: one object for all of them."""
        return self.outputs[-1] if self.outputs and outputs == self.outputs[-1] else outputs


class Log(Protocol):
    """Writes down a solve while it runs, so that it can go on in another process."""

    def restore(self, run: Run, y: Tensor, times: OutputTimes) -> None:
        """Fill in what was done before: steps and outputs; ``times`` goes on after these."""
        ...

    def note(self, run: Run, step: Any, y: Tensor, reached: int) -> None:
        """Write down where it is after a step, if it is time; ``reached`` outputs are in ``y``."""
        ...


def run(
    field: Field,
    stepper: Stepper,
    steps: Iterator[Any],
    state: Any,
    output_times: OutputTimes,
    keep: Callable[[int, Any, Outputs], None],
    graph: bool,
    report: Callable[[float], None] | None = None,
    watch: Callable[[Field, Stepper, Any], Any] | None = None,
    log: Log | None = None,
) -> Run:
    """Drive a solve: write the outputs, and hand each step to ``keep``.

    Args:
        field: The vector field, for extra stages of the interpolant.
        stepper: The method.
        steps: The accepted steps.
        state: The first state.
        output_times: Where to write outputs.
        keep: Called with (n, step, outputs) for each accepted step.
        graph: Whether outputs stay on the graph.
        report: Called with each time reached.
        watch: Called with (field, stepper, step) for each accepted step; what it returns, if
            anything, happens at a time ``.t`` within the step and ends the solve there.
        log: Writes the solve down, where outputs are not on a graph.
    """
    result = Run(array("d", [as_float(state.t)]), end=state)
    count = len(output_times.times) + (watch is not None)
    writer = _GraphWriter(state.y) if graph else _Writer(state.y, count)
    if log is not None:
        log.restore(result, writer.y, output_times)
    reached = output_times.next
    try:
        for step in steps:
            t1 = as_float(step.t1)
            if watch is not None and (event := watch(field, stepper, step)) is not None:
                result.event = event
                output_times.stop(event.t)
            outputs = result.shared(output_times.take(t1))
            if outputs.dense:
                theta = output_times.places(outputs, step.start.t, step.t1)
                writer.write(outputs.first, stepper.interpolate(field, step, theta))
            if outputs.hit is not None:
                writer.write(outputs.hit, step.y1.unsqueeze(0))
            keep(len(result.outputs), step, outputs)
            result.nodes.append(t1)
            result.outputs.append(outputs)
            reached = output_times.next
            result.end = stepper.end(step)
            if report is not None:
                report(t1)
            if log is not None:
                log.note(result, step, writer.y, reached)
            del step
            if result.event is not None:
                break
    except SolveError as error:
        result.error = error
    result.y = writer.result(reached)
    return result


class _Writer:
    """Outputs in one preallocated tensor."""

    def __init__(self, y0: Tensor, count: int) -> None:
        self.y = y0.new_empty((count, *y0.shape))
        self.y[0] = y0

    def write(self, first: int, y: Tensor) -> None:
        self.y[first : first + len(y)] = y

    def result(self, reached: int) -> Tensor:
        # Not a view where it can be helped, so that the caller may change it in place.
        return self.y if reached == len(self.y) else self.y[:reached].clone()


class _GraphWriter:
    """Outputs that stay on the graph."""

    def __init__(self, y0: Tensor) -> None:
        self.y = y0
        self.parts = [y0.unsqueeze(0)]

    def write(self, first: int, y: Tensor) -> None:
        self.parts.append(y)

    def result(self, reached: int) -> Tensor:
        return torch.cat(self.parts)
