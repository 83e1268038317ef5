"""What a gradient strategy is, and the reverse sweep that the stage-wise ones share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint._tree import StateSpec
from symplectic_adjoint._types import Time
from symplectic_adjoint.accumulate import InPlace
from symplectic_adjoint.callbacks import Callbacks
from symplectic_adjoint.capture import Capture
from symplectic_adjoint.checkpoints import JobFolder
from symplectic_adjoint.controllers import Setting
from symplectic_adjoint.field import DetachedField, Field, StageGraph
from symplectic_adjoint.loop import Outputs, SolveShape, Stats
from symplectic_adjoint.steppers import ScipySolver, Stepper
from symplectic_adjoint.steppers._base import (
    Cotangent,
    DenseCotangent,
    Reversal,
    Saved,
    TimeCotangents,
)

Keeps: TypeAlias = Literal["residuals", "points", "states", "start", "schedule"]
"""What products with transposed Jacobians read, all stages where they were evaluated, the states
between the steps, the first state alone, or what a schedule says, which only compiled steps can
follow."""


@dataclass
class Record:
    """What is kept of one step.

    Attributes:
        saved: Tensors and random states.
        graphs: The stages on the autograd tape, where they are kept; emptied when used.
        end: The state at its end, where the next step begins anew; otherwise None.
    """

    saved: Saved
    graphs: Sequence[StageGraph | None] = ()
    end: Saved | None = None

    @property
    def tensors(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What is kept of the step, and of the state at its end."""
        return self.saved.tensors, () if self.end is None else self.end.tensors

    def holding(self, saved: Sequence[Tensor], end: Sequence[Tensor]) -> Record:
        """The same with others in the place of ``tensors``."""
        return Record(
            self.saved._replace(tensors=saved),
            self.graphs,
            None if self.end is None else self.end._replace(tensors=end),
        )


class SweepLog(Protocol):
    """Writes down a backward pass while it runs, so that it can go on in another process."""

    def remaining(self) -> int | None:
        """How many steps are yet to be reversed, where it goes on; None where it begins."""
        ...

    def begin(self) -> tuple[Any, Cotangent]:
        """Where it goes on: the state at the end of the last of these steps, and its cotangent."""
        ...

    def note(self, remaining: int, end: Any, cotangent: Cotangent) -> None:
        """Write down where it is, if it is time."""
        ...

    def finish(self, gradient: Sequence[Tensor | None]) -> None:
        """Write down the gradient of ``y0`` and those of the captured tensors."""
        ...


@dataclass
class Sweep:
    """Everything a backward pass works on.

    Attributes:
        field: The field, with aliases that require grad.
        stepper: The method of the forward pass.
        nodes: Step times, N + 1 floats.
        times: Output times, float64 on the CPU, detached.
        outputs: The outputs that each step holds.
        records: What was kept of each step.
        y0: The initial state, detached.
        y: The outputs of the forward pass, detached, as far as they were kept.
        end: The tensors of the last state.
        end_token: Random state of the node there.
        g: Cotangents of the outputs.
        reversal: Shared by the transposes; says which step times need a cotangent.
        out_times: Accumulates the cotangents of output times, float64; None where not needed.
        wants_state: Whether the gradient of ``y0`` is wanted.
        replay: From (y0, step times, output times, *captured), the outputs once more by operations
            on the frozen grid, and how many evaluations they took.
        memo: What the strategy remembers from one backward pass to the next.
        ledger: What was kept where the strategy keeps steps under a schedule; otherwise None.
        own: Counts the steps of a backward pass that solves an equation of its own.
        log: Writes the sweep down where a job folder was given; otherwise None.
    """

    field: DetachedField
    stepper: Stepper
    nodes: Sequence[float]
    times: Tensor
    outputs: Sequence[Outputs]
    records: Sequence[Record]
    y0: Tensor
    y: Tensor | None
    end: Sequence[Tensor]
    end_token: Any
    g: Tensor
    reversal: Reversal
    out_times: Tensor | None
    setting: Setting
    controller: Any
    wants_state: bool
    callbacks: Callbacks
    spec: StateSpec
    replay: Callable[[Sequence[Tensor]], tuple[Tensor, Field]]
    memo: dict[str, Any]
    ledger: Any = None
    log: SweepLog | None = None
    own: Stats = dataclasses.field(default_factory=Stats)
    _pending: list[tuple[int, Outputs, DenseCotangent]] = dataclasses.field(default_factory=list)

    @property
    def remaining(self) -> int:
        """How many steps there are to reverse."""
        found = None if self.log is None else self.log.remaining()
        return len(self.outputs) if found is None else found

    def begin(self) -> tuple[Any, Cotangent]:
        """The state at the end of the last of them, and its cotangent."""
        if self.log is not None and self.log.remaining() is not None:
            return self.log.begin()
        end = self.stepper.resume(self.setting.ending(self.nodes[-1]), self.end, self.end_token)
        return end, Cotangent(torch.zeros_like(self.y0))

    def start(self, n: int) -> Time:
        """Where step ``n`` starts."""
        return self.setting.starting(self.nodes[n])

    def stop(self, n: int) -> Time:
        """Where step ``n`` ends."""
        return self.setting.ending(self.nodes[n + 1])

    def tell(self, n: int, y: Tensor, lam: Tensor, moment: str) -> None:
        """Tell ``func`` of the reversal of step ``n``, from ``y`` and its cotangent at its end."""

        def state() -> tuple[Any, ...]:
            shares = (
                torch.zeros_like(x) if x.grad is None else x.grad.clone()
                for x in self.field.aliases
            )
            zero = y.new_zeros((), dtype=self.field.time_dtype)
            return (zero, self.spec.unflatten(y), self.spec.unflatten(lam), *shares)

        self.callbacks(moment, self.nodes[n + 1], self.nodes[n], state)

    def place(self, n: int) -> Tensor:
        """Places of the dense outputs within step ``n``."""
        first, stop, _ = self.outputs[n]
        return (self.times[first:stop] - self.nodes[n]) / (self.nodes[n + 1] - self.nodes[n])

    def dense(self, n: int) -> DenseCotangent | None:
        """Cotangents of the outputs inside step ``n``."""
        outputs = self.outputs[n]
        if not outputs.dense:
            return None
        g = self.g[outputs.first : outputs.stop]
        dense = DenseCotangent(self.place(n), g)
        if self.out_times is not None or self.reversal.times is not None:
            dense.slopes = torch.zeros(len(g), dtype=torch.float64, device=g.device)
            self._pending.append((n, outputs, dense))
        return dense

    def finish_times(self) -> None:
        """Turn the cotangents of places into those of output times and step times."""
        for n, outputs, dense in self._pending:
            assert dense.slopes is not None
            slope = dense.slopes / (self.nodes[n + 1] - self.nodes[n])
            if self.out_times is not None:
                self.out_times[outputs.first : outputs.stop] += slope
            if (times := self.reversal.times) is not None:
                theta = dense.theta.to(slope.device, non_blocking=True)
                times.values[n] += ((theta - 1) * slope).sum()
                times.values[n + 1] -= (theta * slope).sum()
        self._pending.clear()


class Counts(NamedTuple):
    """What a backward pass costs: evaluations of ``f``, and vector-Jacobian products."""

    evaluations: int
    products: int


class Strategy:
    """What is stored of a forward pass, and how a step is reversed.

    Subclasses are frozen dataclasses: their fields are their options.

    Attributes:
        name: Name in ``gradient="..."``.
        exact: Whether the gradient is that of the computed solution, up to rounding.
        method: The only method that the strategy works with, or None.
        folder: Where solves are written down, so that they can go on in another process; or None.
        keeps_outputs: Whether the backward pass needs the solution at the output times.
        keeps: What compiled tiers keep of a solve; None where they do not run the strategy.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    method: ClassVar[str | None] = None
    folder: JobFolder | None = None
    keeps_outputs: ClassVar[bool] = False
    keeps: Keeps | None = None

    def check(self, stepper: Stepper) -> None:
        """Refuse a method that the strategy cannot reverse.

        Raises:
            ArgumentError: The method is not the one the strategy needs, or has no exact gradient.
        """
        if self.exact and isinstance(stepper, ScipySolver):
            raise ArgumentError(
                f"gradient {self.name!r} is exact for the steps of this library, but "
                f"{stepper.name!r} takes scipy's, which cannot be differentiated; choose "
                "gradient='continuous', whose error follows rtol and atol, or another method"
            )
        if self.method is not None and stepper.name != self.method:
            raise ArgumentError(
                f"gradient {self.name!r} works with method {self.method!r} only, not with "
                f"{stepper.name!r}; leave method out, or choose gradient='symplectic'"
            )

    def fitted(self, stepper: Stepper) -> Strategy:
        """Itself, with what it leaves open decided for a method."""
        return self

    def without_graphs(self) -> Strategy:
        """Itself, or what is nearest to it, for steps of which no graph can be kept."""
        return self

    def admit(self, inputs: Sequence[Tensor]) -> None:
        """Refuse inputs of which the strategy cannot give gradients.

        Raises:
            ArgumentError: There are too many of them.
        """

    def forward_field(
        self,
        func: Any,
        like: Tensor,
        aliases: Sequence[Tensor],
        capture: Capture | None,
        time: bool,
    ) -> DetachedField:
        """The field of the forward pass; ``time`` says whether times need gradients."""
        return DetachedField(func, like, aliases, capture)

    def sums(self, aliases: Sequence[Tensor]) -> InPlace:
        """How the gradients of captured tensors are summed over the products."""
        return InPlace(aliases)

    def zeros(self, like: Tensor) -> Tensor:
        """Where the compiled loop begins to sum the gradients of a captured tensor."""
        return torch.zeros_like(like)

    def ledger(
        self, stepper: Stepper, y0: Tensor, outputs: int, sums: Sequence[Tensor], steps: int = 0
    ) -> Any:
        """Who keeps the steps, where that follows a schedule; otherwise None.

        Args:
            stepper: The method.
            y0: The initial state.
            outputs: Number of output times.
            sums: What the captured tensors' gradients are like, for those that have one.
            steps: How many steps will be taken at least, as far as that is known beforehand.

        Raises:
            MemoryBudgetError: There is less memory than any schedule needs.
            StoreError: A store cannot be opened.
        """
        return None

    def keep(self, stepper: Stepper, n: int, step: Any) -> Record:
        """What is kept of step ``n``."""
        raise NotImplementedError

    def reverse(self, sweep: Sweep) -> Tensor:
        """The cotangent of ``y0``; those of captured tensors go to the aliases' ``.grad``."""
        raise NotImplementedError

    def counts(self, stepper: Stepper, shape: SolveShape) -> Counts:
        """What the backward pass of a solve costs, exactly."""
        raise NotImplementedError


def stagewise(sweep: Sweep, step_at: Callable[[int, Any], Any]) -> Tensor:
    """The reverse sweep by the transpose of each step.

    Args:
        sweep: The backward pass.
        step_at: ``(n, end) -> step``, a step ready to be transposed, from the state at its end.

    Returns:
        The cotangent of ``y0``.
    """
    stepper = sweep.stepper
    end, cotangent = sweep.begin()
    for n in reversed(range(sweep.remaining)):
        if (kept := sweep.records[n].end) is not None and n + 1 < len(sweep.outputs):
            cotangent = Cotangent(_begun(sweep, n + 1, kept.tensors[0], end, cotangent))
            end = stepper.resume(sweep.stop(n), kept.tensors, *kept.tokens)
        hit = sweep.outputs[n].hit
        if hit is not None:
            cotangent.y = cotangent.y + sweep.g[hit]
        told = functools.partial(sweep.tell, n, end.y, cotangent.y)
        told("step")
        step = step_at(n, end)
        cotangent = stepper.transpose(sweep.reversal, n, step, cotangent, sweep.dense(n))
        told("accept_step")
        end = step.start
        del step  # so that its stages are freed before the next ones are computed again
        if sweep.log is not None:
            sweep.log.note(n, end, cotangent)
    lam = _begun(sweep, 0, sweep.y0, end, cotangent)
    sweep.finish_times()
    return lam + sweep.g[0]


def _begun(sweep: Sweep, n: int, y: Tensor, state: Any, cotangent: Cotangent) -> Tensor:
    """The cotangent of ``y``, with which step ``n`` began anew, from that of the state there."""
    tokens = sweep.records[n].saved.tokens if sweep.records else ()
    begin = sweep.stepper.resume(sweep.start(n), (y,), tokens[0] if tokens else None)
    begin.node.graph = state.node.graph
    return sweep.stepper.transpose_begin(sweep.reversal, begin, cotangent, n)


@dataclass(frozen=True)
class Grid:
    """Recorded steps, to be taken again.

    Attributes:
        times: Step times; those that carry a graph as 0-dim tensors.
        values: The same as floats.
        setting: Where ``f`` jumps.
    """

    times: Sequence[Time]
    values: Sequence[float]
    setting: Setting

    def start(self, n: int) -> Time:
        """Where step ``n`` starts."""
        return self.setting.starting(self.times[n], self.values[n])

    def stop(self, n: int) -> Time:
        """Where step ``n`` ends."""
        return self.setting.ending(self.times[n + 1], self.values[n + 1])

    def cut(self, n: int) -> bool:
        """Whether the step after step ``n`` begins anew."""
        return self.setting.cuts(self.values[n + 1])


def replay(
    field: Field,
    stepper: Stepper,
    state: Any,
    grid: Grid,
    outputs: Sequence[Outputs],
    tokens: Sequence[Sequence[Any]],
    times: Tensor,
) -> tuple[Any, list[tuple[int, Tensor]]]:
    """Take recorded steps again, on the graph of ``state``, ``grid`` and ``times``.

    Args:
        field: The field that keeps graphs.
        stepper: The method.
        state: Where to start.
        grid: Which steps.
        outputs: The outputs that each step holds.
        tokens: Random states of each step's stages.
        times: Output times, float64 on the CPU.

    Returns:
        The last state, and the outputs as (index of the first, values (m, ...)).
    """
    parts = []
    for n, (held, drawn) in enumerate(zip(outputs, tokens, strict=True)):
        if drawn:  # the node between two steps may have been evaluated after the first was kept
            state.node.token = drawn[0]
        step = stepper.step(field, state, grid.stop(n), drawn)
        if held.dense:
            theta = (times[held.first : held.stop] - step.start.t) / (step.t1 - step.start.t)
            parts.append((held.first, stepper.interpolate(field, step, theta)))
        if held.hit is not None:
            parts.append((held.hit, step.y1.unsqueeze(0)))
        state = stepper.end(step)
        if grid.cut(n):
            state = stepper.begin(grid.start(n + 1), state.y)
    return state, parts


def segments(sweep: Sweep, length: int) -> Tensor:
    """The reverse sweep by autograd over ``length`` steps at a time.

    The first step of each segment must have been kept.

    Returns:
        The cotangent of ``y0``.
    """
    field = sweep.field.on_graph()
    cotangent: list[Tensor | None] = []
    bounds = range(0, len(sweep.outputs), length)
    for first in reversed(bounds):
        last = min(first + length, len(sweep.outputs))
        cotangent = _segment(sweep, field, first, last, cotangent)
    lam = sweep.g[0]
    if cotangent and cotangent[0] is not None:
        lam = lam + cotangent[0]
    sweep.field.evaluations += field.evaluations
    sweep.field.products += field.products + field.evaluations - field.solver_evaluations
    sweep.field.solver_evaluations += field.solver_evaluations
    sweep.field.solver_products += field.solver_products
    return lam


def _segment(
    sweep: Sweep, field: Field, first: int, last: int, cotangent: list[Tensor | None]
) -> list[Tensor | None]:
    stepper, records = sweep.stepper, sweep.records[first:last]
    nodes, time_leaves = _time_leaves(sweep, first, last)
    times = sweep.times.detach().requires_grad_(sweep.out_times is not None)
    saved = records[0].saved
    # A step that began anew depends on the solution alone, and not on all that it then carried.
    begun = first == 0 or sweep.records[first - 1].end is not None
    starting = (saved.tensors[:1] if first else (sweep.y0,)) if begun else saved.tensors
    kept = [x.detach().requires_grad_() for x in starting]
    tokens = [r.saved.tokens for r in records]
    grid = Grid(nodes, sweep.nodes[first : last + 1], sweep.setting)
    state = stepper.resume(grid.start(0), kept, tokens[0][0] if tokens[0] else None)
    end, parts = replay(field, stepper, state, grid, sweep.outputs[first:last], tokens, times)
    pairs = list(zip(stepper.carried(end), cotangent, strict=False))
    pairs += [(y, sweep.g[i : i + len(y)]) for i, y in parts]
    pairs = [(y, g) for y, g in pairs if g is not None and y.requires_grad]
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
    for n, leaf in time_leaves:
        if leaf.grad is not None and sweep.reversal.times is not None:
            sweep.reversal.times.values[n] += leaf.grad
    if times.grad is not None and sweep.out_times is not None:
        sweep.out_times += times.grad
    return [x.grad for x in kept]


def _time_leaves(
    sweep: Sweep, first: int, last: int
) -> tuple[list[Time], list[tuple[int, Tensor]]]:
    """Step times of a segment: those whose gradient is wanted as leaves."""
    nodes: list[Time] = list(sweep.nodes[first : last + 1])
    leaves = []
    times: TimeCotangents | None = sweep.reversal.times
    if times is not None:
        for n in range(first, last + 1):
            if times.wanted(n):
                leaf = torch.tensor(sweep.nodes[n], dtype=torch.float64, requires_grad=True)
                nodes[n - first] = leaf
                leaves.append((n, leaf))
    return nodes, leaves
