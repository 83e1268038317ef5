"""The compiled loop tier: a whole solve, and its whole reverse sweep, in a few calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from symplectic_adjoint._errors import NonFiniteError
from symplectic_adjoint._tree import real_dtype
from symplectic_adjoint.controllers import Adaptive, Setting
from symplectic_adjoint.execution import Stuck
from symplectic_adjoint.execution.forward import (
    Constants,
    Method,
    Now,
    Records,
    adaptive_loop,
    grid_loop,
)
from symplectic_adjoint.execution.lift import Graph
from symplectic_adjoint.execution.reverse import Cotangents, reverse_loop
from symplectic_adjoint.execution.trace import Traced, TracedField
from symplectic_adjoint.loop import Outputs, OutputTimes, Run
from symplectic_adjoint.steppers import ExplicitRK
from symplectic_adjoint.steppers._base import centred_powers
from symplectic_adjoint.steppers.explicit_rk import RKState

T = TypeVar("T")

STEPS = 64
"""Steps in a record: the more, the fewer calls; the fewer, the less memory lies idle."""

BYTES = 2**22
"""A record of large states is shorter, so that it takes no more than about this."""

RESIDUALS = 2**24
"""The same where residuals are kept, of which there is much for little work."""


@dataclass
class Program:
    """The compiled graphs of one function with one method.

    Attributes:
        method: Both of them.
        capacity: Steps in a record.
        compiled: What was compiled so far, by what else it depends on.
    """

    method: Method
    capacity: int
    compiled: dict[Any, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        graph: Graph,
        tensors: Sequence[Tensor],
        stepper: ExplicitRK,
        y0: Tensor,
        keeps: str,
        dense: bool,
    ) -> Program:
        """The program for a solve, compiled before or, in part, on its first use.

        Args:
            graph: ``func``.
            tensors: What it depends on.
            stepper: The method.
            y0: The initial state.
            keeps: What is kept of each step: ``"residuals"``, ``"points"`` or ``"states"``.
            dense: Whether there are outputs within the steps.
        """
        wanted = tuple(x.requires_grad for x in tensors)
        threads = torch.get_num_threads()
        key = (stepper.tableau, stepper.dense, keeps, dense, wanted, threads)
        if key not in graph.programs:
            traced = _traced(graph, y0, tensors, wanted)
            linear = traced.linear if keeps == "residuals" else None
            method = Method(traced, stepper, dense, keeps != "states", linear)
            one = method.records(y0, tensors, 1)
            most = BYTES if linear is None else RESIDUALS
            size = sum(x.nbytes for x in one.tensors)
            graph.programs[key] = Program(method, _capacity(size, most))
        program: Program = graph.programs[key]
        return program

    def get(self, key: Any, compile_: Callable[[], T]) -> T:
        """What was compiled under a key."""
        if key not in self.compiled:
            self.compiled[key] = compile_()
        result: T = self.compiled[key]
        return result

    def records(self, y: Tensor, tensors: Sequence[Tensor]) -> Records:
        """Room for as many steps as one call takes."""
        return self.method.records(y, tensors, self.capacity)

    def field(self, y: Tensor, tensors: Sequence[Tensor]) -> TracedField:
        """``func``, evaluated operation by operation, for what comes before the loop."""
        return TracedField(self.method.traced, y, tensors, self.method.linear)


def _traced(graph: Graph, y0: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> Traced:
    key = ("traced", wanted)
    if key not in graph.programs:
        graph.programs[key] = Traced.of(graph, y0, tensors, wanted)
    traced: Traced = graph.programs[key]
    return traced


def _capacity(size: int, most: int) -> int:
    """A power of two, so that growing sizes do not each mean another graph."""
    steps = STEPS
    while steps > 4 and steps * size > most:
        steps //= 2
    return steps


@dataclass
class Chunk:
    """Some of the steps of a solve.

    Attributes:
        records: The steps.
        steps: How many.
        attempts: How many it took to have them.
        evaluations: How many evaluations of ``func``.
    """

    records: Records
    steps: int
    attempts: int
    evaluations: int


def adaptive(
    program: Program,
    controller: Adaptive,
    setting: Setting,
    start: tuple[float, Tensor],
    tensors: Sequence[Tensor],
) -> Iterator[Chunk]:
    """Solve adaptively.

    Args:
        program: What to run.
        controller: Chooses the step sizes.
        setting: Where to stop, and the tolerances.
        start: Time and state.
        tensors: What ``func`` depends on.

    Yields:
        One record of steps after the other.

    Raises:
        Stuck: The end cannot be reached, or the slope at the start is not finite.
    """
    t, y = start
    method, field = program.method, program.field(y, tensors)
    state = method.stepper.begin(t, y)
    try:
        pace: Any = controller.begin(field, method.stepper, state, setting)
    except NonFiniteError:
        raise Stuck from None
    carried, residuals = _begun(method, field, state, True)
    float64: Any = {"dtype": torch.float64, "device": y.device}
    constants = Constants.of(controller, setting.end, setting.direction, pace.error_order)
    vector = torch.tensor(constants, **float64)
    stops = torch.tensor([*pace.stops, setting.end], **float64)
    tolerances = pace.tolerances(y)
    records = program.records(y, tensors)
    norm = controller.norm or torch.linalg.vector_norm
    run = program.get(
        ("adaptive", norm, *(x.shape for x in tolerances)),
        functools.partial(adaptive_loop, method, y, tensors, tolerances, stops, records, norm),
    )
    others = (vector, stops, *tolerances, *tensors)
    now = Now(t, pace.h, 1.0, 1.0, 0.0, 0.0, 0.0)
    evaluations = field.evaluations
    while True:
        records.begin(now.t, carried[0], residuals)
        before = now.attempts
        out, *carried = run.call(torch.tensor(now, **float64), *carried, *others, *records.tensors)
        now = Now(*out.tolist())
        attempts = int(now.attempts - before)
        yield Chunk(records, int(now.n), attempts, evaluations + attempts * run.evaluations)
        if now.t == setting.end:
            return
        if now.n < program.capacity:
            raise Stuck
        now, evaluations = now._replace(n=0.0), 0
        residuals = _handed(method, records, program.capacity, True)
        records = program.records(y, tensors)


def on_grid(
    program: Program, grid: Sequence[float], y: Tensor, tensors: Sequence[Tensor]
) -> Iterator[Chunk]:
    """Solve on a grid; yields as ``adaptive`` does."""
    method, capacity = program.method, program.capacity
    times = torch.tensor(grid, dtype=torch.float64, device=y.device)
    zero = torch.zeros((), dtype=torch.int64, device=y.device)
    field = program.field(y, tensors)
    carried, residuals = _begun(method, field, method.stepper.begin(grid[0], y), False)
    evaluations = field.evaluations
    for first in range(0, len(grid) - 1, capacity):
        records = program.records(y, tensors)
        part = times[first : first + capacity + 1]
        records.begin(part, carried[0], residuals)
        run = program.get("grid", functools.partial(grid_loop, method, y, tensors, records))
        others = (torch.full_like(zero, len(part) - 1), records.t.clone(), *tensors)
        _, *carried = run.call(zero, *carried, *others, *records.tensors)
        steps = len(part) - 1
        residuals = _handed(method, records, steps, False)
        yield Chunk(records, steps, steps, evaluations + steps * run.evaluations)
        evaluations = 0


def _begun(
    method: Method, field: TracedField, state: RKState, adaptive: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """What the first step is handed: the state, and the slope there, if any, with its residuals."""
    if not method.carries(adaptive):
        return [state.y], []
    return [state.y, method.stepper.slope(field, state)], state.node.graph or []


def _handed(method: Method, records: Records, n: int, adaptive: bool) -> list[Tensor]:
    """The residuals of the slope at state ``n``, where it is handed on."""
    return [x[n] for x in records.kept[: len(method.residuals)]] if method.carries(adaptive) else []


@dataclass
class Recording:
    """A solve that a program has run.

    Attributes:
        program: What has run.
        records: The records of its steps.
        counts: How many steps each holds.
        run: Step times and outputs.
        attempts: How many steps were attempted.
        evaluations: How often ``func`` was evaluated in them.
    """

    program: Program
    records: list[Records]
    counts: list[int]
    run: Run
    attempts: int = 0
    evaluations: int = 0


def record(
    program: Program,
    chunks: Iterator[Chunk],
    y0: Tensor,
    times: OutputTimes,
    keep: bool,
) -> Recording:
    """Run a solve, write its outputs, and keep its records where they are wanted."""
    y = y0.new_empty((len(times.times), *y0.shape))
    y[0] = y0
    result = Run([times.times[0]], y=y)
    recording = Recording(program, [], [], result)
    for chunk in chunks:
        records, count = chunk.records, chunk.steps
        nodes = records.t[: count + 1].tolist()
        outputs = [times.take(t) for t in nodes[1:]]
        _write(program.method, records, outputs, times, y)
        result.nodes += nodes[1:]
        result.outputs += outputs
        recording.attempts += chunk.attempts
        recording.evaluations += chunk.evaluations
        result.end = records.y[count]
        if keep:
            recording.records.append(replace(records, moments=[]))
            recording.counts.append(count)
    return recording


def _write(
    method: Method, records: Records, outputs: Sequence[Outputs], times: OutputTimes, y: Tensor
) -> None:
    hits = [(n + 1, held.hit) for n, held in enumerate(outputs) if held.hit is not None]
    if hits:
        rows, places = torch.tensor(hits, device=y.device).T
        y[places] = records.y[rows]
    for within in _inside(method, records.t, outputs, times.tensor, y):
        moments = records.moments[0][within.steps].flatten(2)
        moved = torch.bmm(within.weights.unsqueeze(1), moments).view(-1, *y.shape[1:])
        y[within.outputs] = records.y[within.steps] + moved


@dataclass
class _Inside:
    """Outputs within steps: which, in which steps, and with which weights (m, degree + 1)."""

    outputs: Tensor
    steps: Tensor
    weights: Tensor


BLOCK = 2**20
"""How many numbers are gathered at a time in order to write outputs."""


def _inside(
    method: Method, t: Tensor, outputs: Sequence[Outputs], times: Tensor, like: Tensor
) -> Iterator[_Inside]:
    """The outputs within steps, in blocks of no more than ``BLOCK`` numbers."""
    degree = method.stepper.dense.degree
    rows = [n for n, held in enumerate(outputs) for _ in range(held.first, held.stop)]
    where = [i for held in outputs for i in range(held.first, held.stop)]
    if not rows:
        return
    steps = torch.tensor(rows, device=like.device)
    places = times[where].to(t)
    theta = (places - t[steps]) / (t[steps + 1] - t[steps])
    weights = centred_powers(theta, degree).to(like)
    length = max(1, BLOCK // (max(like[0].numel(), 1) * (degree + 1)))
    for a in range(0, len(rows), length):
        b = min(a + length, len(rows))
        indices = torch.tensor(where[a:b], device=like.device)
        yield _Inside(indices, steps[a:b], weights[a:b])


class Reversed(NamedTuple):
    """The cotangent of ``y0``, and how many evaluations of ``func`` and products it took."""

    lam: Tensor
    evaluations: int
    products: int


def reverse(
    recording: Recording,
    tensors: Sequence[Tensor],
    sums: Sequence[Tensor],
    g: Tensor,
    times: Tensor,
) -> Reversed:
    """The reverse sweep.

    Args:
        recording: The solve.
        tensors: What ``func`` depends on.
        sums: To which the gradients of the tensors that have one are added.
        g: Cotangents of the outputs (T, ...).
        times: Output times, float64 on the CPU.

    """
    program, method = recording.program, recording.program.method
    evaluations = products = 0
    chunks = _Chunks(recording, g, times)
    lam = chunks.end(torch.zeros_like(g[0]), tensors, sums)
    for i in reversed(range(len(recording.records))):
        records, cotangents = recording.records[i], chunks.cotangents(i)
        key = ("reverse", bool(cotangents.hits))
        run = program.get(
            key, functools.partial(reverse_loop, method, lam, tensors, records, cotangents)
        )
        steps = recording.counts[i]
        lam = run.run(steps, lam, records, cotangents, tensors, sums)
        evaluations += steps * run.body.rounds * run.compiled.evaluations
        products += steps * run.body.rounds * run.compiled.products
    return Reversed(lam + g[0], evaluations + chunks.ends, products + chunks.ends)


@dataclass
class _Chunks:
    """Cotangents of the outputs, for one record after the other."""

    recording: Recording
    g: Tensor
    times: Tensor
    ends: int = 0
    _moments: dict[int, Tensor] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        return self.recording.program.method

    def outputs(self, i: int) -> Sequence[Outputs]:
        """Those of record ``i``."""
        first = sum(self.recording.counts[:i])
        return self.recording.run.outputs[first : first + self.recording.counts[i]]

    def end(self, lam: Tensor, tensors: Sequence[Tensor], sums: Sequence[Tensor]) -> Tensor:
        """The cotangent of the last state: of the output there, and through the last slope."""
        last = len(self.recording.records) - 1
        held = self.outputs(last)[-1]
        lam = lam if held.hit is None else lam + self.g[held.hit]
        if not (held.dense and self.method.stepper.work.dense_node):
            return lam
        records, steps = self.recording.records[last], self.recording.counts[last]
        mu = self._nodes(records, self.moments(last))[steps - 1]
        t, y = records.t[steps].to(real_dtype(lam)), records.y[steps]
        self.ends += 1
        _, v, _, *parts = self.method.traced.pull(t, y, mu, *tensors)
        for total, part in zip(sums, (x for x in parts if x is not None), strict=True):
            total += part
        return lam if v is None else lam + v

    def cotangents(self, i: int) -> Cotangents:
        """What the graph of the reverse sweep takes of record ``i``."""
        records, outputs = self.recording.records[i], self.outputs(i)
        if i == len(self.recording.records) - 1:
            outputs = outputs[:-1]  # the last one is seen to by ``end``
        hits = [(n, held.hit) for n, held in enumerate(outputs) if held.hit is not None]
        result = Cotangents([], [], [])
        if hits:
            rows, places = torch.tensor(hits, device=self.g.device).T
            result.hits.append(torch.zeros_like(records.y[1:]).index_copy_(0, rows, self.g[places]))
        if self.method.dense:
            result.moments.append(self.moments(i))
            result.nodes.append(self._nodes_before(i))
        return result

    def moments(self, i: int) -> Tensor:
        """See ``DenseMoments``, for each step of a record."""
        if i not in self._moments:
            records, outputs = self.recording.records[i], self.outputs(i)
            degree = self.method.stepper.dense.degree
            shape = (len(records.t) - 1, degree + 1, *self.g.shape[1:])
            moments = self.g.new_zeros(shape)
            for within in _inside(self.method, records.t, outputs, self.times, self.g):
                shares = within.weights.view(*within.weights.shape, *[1] * (self.g.ndim - 1))
                moments.index_add_(0, within.steps, shares * self.g[within.outputs].unsqueeze(1))
            self._moments = {i: moments}
        return self._moments[i]

    def _nodes(self, records: Records, moments: Tensor) -> Tensor:
        """What the outputs within each step put on the node at its end (C, ...)."""
        stepper = self.method.stepper
        weights = stepper.node_weights.to(moments)
        sizes = records.t.diff().to(moments).view(-1, *[1] * (self.g.ndim - 1))
        weighed: Tensor = torch.tensordot(moments, weights, dims=([1], [0]))
        return sizes * weighed

    def _nodes_before(self, i: int) -> Tensor:
        """What each step of a record finds on the node at its start (C, ...)."""
        own = self._nodes(self.recording.records[i], self.moments(i))
        first = torch.zeros_like(own[:1])
        if i > 0:
            before, steps = self.recording.records[i - 1], self.recording.counts[i - 1]
            first = self._nodes(before, self.moments(i - 1))[steps - 1 : steps]
        return torch.cat([first, own[:-1]])
