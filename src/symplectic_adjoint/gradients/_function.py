"""The one autograd function: a solve that has been run, attached to the caller's graph."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import SecondDerivativeError
from symplectic_adjoint._tree import StateSpec
from symplectic_adjoint._types import FlatFunc, Time
from symplectic_adjoint.callbacks import Callbacks
from symplectic_adjoint.capture import Capture, detached, has_tangent, transformed, varies
from symplectic_adjoint.controllers import Controller, Setting
from symplectic_adjoint.field import DetachedField, Field, GraphField, TangentField
from symplectic_adjoint.gradients._base import Grid, Record, Strategy, Sweep, replay
from symplectic_adjoint.gradients._derived import Pull, Push, Shelf, Value, derived, tangents_like
from symplectic_adjoint.gradients._resume import SolveLog, plain
from symplectic_adjoint.loop import Outputs, Stats
from symplectic_adjoint.steppers import Stepper
from symplectic_adjoint.steppers._base import Reversal, TimeCotangents
from symplectic_adjoint.threads import limited


@dataclass
class Tape:
    """A solve that has been run, ready to be reversed.

    Attributes:
        func: The flat function.
        capture: The tensors it depends on.
        aliases: What stood for them, where graphs down to them were kept; otherwise empty.
        stepper: The method.
        strategy: What is stored and how it is reversed.
        controller: The step-size controller of the forward pass.
        setting: Its setting.
        nodes: Step times, N + 1 floats.
        wanted: Which step times may have a gradient.
        outputs: The outputs that each step holds.
        records: What was kept of each step.
        end: The tensors of the last state.
        end_token: Random state of the node there.
        stats: Counts, completed by the backward pass.
        autocast: Autocast state of the forward pass.
        threads: How many threads the solve uses; None for as many as PyTorch.
        leafy: Whether ``func`` needs an argument that requires grad.
        callbacks: What ``func`` wants to be told of backward passes.
        spec: How the caller's state maps onto the flat one.
        ledger: What was kept where the strategy keeps steps under a schedule; it owns all tensors
            but those of the last state.
        log: Writes backward passes to a job folder, where one was given.
        memo: What the strategy remembers from one backward pass to the next.
    """

    func: FlatFunc
    capture: Capture
    aliases: Sequence[Tensor]
    stepper: Stepper
    strategy: Strategy
    controller: Controller
    setting: Setting
    nodes: Sequence[float]
    wanted: Callable[[int], bool]
    outputs: Sequence[Outputs]
    records: Sequence[Record]
    end: Sequence[Tensor]
    end_token: Any
    stats: Stats
    autocast: Autocast
    threads: int | None
    leafy: bool
    callbacks: Callbacks
    spec: StateSpec
    ledger: Any = None
    log: SolveLog | None = None
    memo: dict[str, Any] = dataclasses.field(default_factory=dict)

    def release(self) -> list[Tensor]:
        """Hand over all kept tensors, so that autograd owns them."""
        tensors = [*self.end]
        counts = [len(tensors)]
        self.end = ()
        for record in () if self.ledger is not None else self.records:
            for part in record.tensors:
                tensors += part
                counts.append(len(part))
            emptied = record.holding((), ())
            record.saved, record.end = emptied.saved, emptied.end
        self._counts = counts
        return tensors

    def restored(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Record]]:
        """The last state and the records with their tensors."""
        if self.ledger is not None:
            return tensors, self.records
        position, parts = 0, []
        for count in self._counts:
            parts.append(tensors[position : position + count])
            position += count
        records = [
            record.holding(saved, end)
            for saved, end, record in zip(parts[1::2], parts[2::2], self.records, strict=True)
        ]
        for record in self.records:
            record.graphs = ()
        return parts[0], records

    def reversed(
        self,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        y: Sequence[Tensor],
        kept: Sequence[Tensor],
        g: Tensor,
    ) -> list[Tensor | None]:
        """First derivatives, by the strategy.

        Args:
            inputs: y0, step times, output times, and what ``func`` depends on.
            needs: Which of them need one.
            y: The outputs, where the strategy keeps them.
            kept: The tensors that ``release`` gave.
            g: The cotangents of the outputs.
        """
        return _reversed(self, inputs, needs, y, kept, g)


class Autocast:
    """The autocast state of a device, to be restored where a stage is recomputed."""

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.enabled = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type)
        self.cache = torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def restored(self) -> Generator[None]:
        """Compute as under the recorded state."""
        with torch.autocast(
            self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=self.cache
        ):
            yield


def attach(tape: Tape, y: Tensor, y0: Tensor, nodes: Tensor, times: Tensor) -> Tensor:
    """The outputs of a finished solve on the caller's graph.

    Args:
        tape: The solve.
        y: Its outputs (T, ...).
        y0: The initial state.
        nodes: Step times (N + 1,), float64 on the CPU, attached to ``t`` where they follow it.
        times: Output times (T,), likewise.

    Returns:
        ``y`` with a gradient with respect to ``y0``, ``nodes``, ``times`` and every captured
        tensor.
    """
    apply: Callable[..., Tensor] = _Solve.apply
    # In a list, y is an output alone and no view of an input: the caller may change it in place.
    return apply(tape, [y], y0, nodes, times, *tape.capture.tensors)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        y: list[Tensor],
        y0: Tensor,
        nodes: Tensor,
        times: Tensor,
        *captured: Tensor,
    ) -> Tensor:
        ctx.tape = tape
        ctx.inputs = 3 + len(captured)
        outputs = y if tape.strategy.keeps_outputs else []
        ctx.outputs = len(outputs)
        ctx.save_for_backward(y0, nodes, times, *captured, *outputs, *tape.release())
        ctx.save_for_forward(y0, nodes, times, *captured)
        return y[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, rest = saved[: ctx.inputs], saved[ctx.inputs :]
        y, kept = rest[: ctx.outputs], rest[ctx.outputs :]
        needs = tuple(ctx.needs_input_grad[2:])
        recording = _Recording(ctx.tape, inputs, y, kept)
        # Cotangents in a batch, or with tangents: a rule for either is needed.
        if transformed() or any(map(has_tangent, (*inputs, g))):
            plain(ctx.tape.log)
            grads = iter(derived(Pull(Value(), needs), Shelf(recording), _FIRST, [*inputs, g]))
            return (None, None, *(next(grads) if need else None for need in needs))
        if torch.is_grad_enabled():
            plain(ctx.tape.log)
            return (None, None, *_differentiable(recording, needs, g))
        return (None, None, *recording.pull(g, needs))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        inputs = ctx.saved_tensors
        recording = _Recording(ctx.tape, inputs, (), ())
        ts = tangents_like(inputs, tangents[2:])
        (dy,) = derived(Push(Value(), len(inputs)), Shelf(recording), _FIRST, [*inputs, *ts])
        return dy


_FIRST = torch.tensor(0)


@dataclass
class _Recording:
    """A tape with its inputs and with what it has kept."""

    tape: Tape
    inputs: Sequence[Tensor]
    y: Sequence[Tensor]
    kept: Sequence[Tensor]

    def value(self) -> Tensor:
        raise NotImplementedError

    def pull(self, g: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        return self.tape.reversed(self.inputs, needs, self.y, self.kept, g)

    def replay(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [replayed(self.tape, xs)[0]]

    def refuse(self) -> None:
        refuse(self.tape.strategy)


def refuse(strategy: Strategy) -> None:
    """Raise where a strategy's gradient cannot be differentiated again.

    Raises:
        SecondDerivativeError: The strategy is not exact.
    """
    if not strategy.exact:
        raise SecondDerivativeError(
            f"gradient={strategy.name!r} does not give the gradient of the computed solution, "
            "which cannot be differentiated again; use 'symplectic' or another exact strategy"
        )


def _reversed(
    tape: Tape,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    y: Sequence[Tensor],
    kept: Sequence[Tensor],
    g: Tensor,
) -> list[Tensor | None]:
    """First derivatives, by the tape's strategy."""
    if tape.log is not None and (gradient := tape.log.gradient(g)) is not None:
        _write_stats(tape.stats, Field(tape.func, g[0]), Stats(backward_resumed=len(tape.outputs)))
        return [gradient[0], None, None, *gradient[1:]]
    y0, _, times, *captured = inputs
    end, records = tape.restored(kept)
    aliases = list(tape.aliases) or detached(captured)
    with (
        limited(tape.threads),
        torch.enable_grad(),
        tape.capture.resumed(aliases),
        tape.autocast.restored(),
    ):
        field = DetachedField(tape.func, y0, aliases, None)
        field.leafy = tape.leafy
        field.linearize(True)
        field.sums = tape.strategy.sums(aliases)
        sweep = Sweep(
            field=field,
            stepper=tape.stepper,
            nodes=tape.nodes,
            times=times.detach(),
            outputs=tape.outputs,
            records=records,
            y0=y0.detach(),
            y=y[0].detach() if y else None,
            end=end,
            end_token=tape.end_token,
            g=g,
            reversal=Reversal(field, _time_cotangents(tape, needs[1], y0)),
            out_times=_zeros(len(times), y0) if needs[2] else None,
            setting=tape.setting,
            controller=tape.controller,
            wants_state=needs[0],
            replay=functools.partial(replayed, tape),
            memo=tape.memo,
            ledger=tape.ledger,
            log=None if tape.log is None else tape.log.sweep(g, tape.nodes, field.sums),
            callbacks=tape.callbacks,
            spec=tape.spec,
        )
        tape.callbacks.renew()
        lam = tape.strategy.reverse(sweep)
    sweep.own.backward_resumed = len(tape.outputs) - sweep.remaining
    _write_stats(tape.stats, field, sweep.own)
    if tape.ledger is not None:
        tape.stats.backward_retaken = tape.ledger.retaken
    grads = field.sums.totals()
    reversal = sweep.reversal.times
    node_grads = None if reversal is None else reversal.values.cpu()
    time_grads = None if sweep.out_times is None else sweep.out_times.cpu()
    if sweep.log is not None:
        sweep.log.finish([lam, *grads])
    return [lam, node_grads, time_grads, *grads]


def replayed(tape: Tape, inputs: Sequence[Tensor]) -> tuple[Tensor, Field]:
    """The outputs once more, by operations on ``inputs`` (y0, nodes, times, *captured).

    Returns:
        The outputs, and the field, which counts what they take.
    """
    y0, nodes, times, *captured = inputs
    with limited(tape.threads), tape.capture.resumed(captured), tape.autocast.restored():
        graph = any(x.requires_grad for x in inputs)
        field = GraphField(tape.func, y0) if graph else TangentField(tape.func, y0)
        field.corrections = 3  # a second derivative may be three derivatives of the replay
        field.leafy = tape.leafy
        tokens = [record.saved.tokens for record in tape.records]
        knots: list[Time] = list(tape.nodes)
        if varies(nodes):
            knots = [nodes[n] if tape.wanted(n) else t for n, t in enumerate(knots)]
        grid = Grid(knots, tape.nodes, tape.setting)
        state = tape.stepper.resume(grid.start(0), (y0,), tokens[0][0] if any(tokens) else None)
        _, parts = replay(field, tape.stepper, state, grid, tape.outputs, tokens, times)
    return torch.cat([y0.unsqueeze(0), *(part for _, part in parts)]), field


def _differentiable(recording: _Recording, needs: Sequence[bool], g: Tensor) -> list[Tensor | None]:
    """First derivatives that can be differentiated again: the frozen grid under autograd."""
    recording.refuse()
    # Views, so that an input that appears twice is told apart.
    views = [x.view_as(x) for x in recording.inputs]
    wanted = [i for i, need in enumerate(needs) if need]
    y, field = replayed(recording.tape, views)
    grads = torch.autograd.grad(
        y, [views[i] for i in wanted], g, create_graph=True, allow_unused=True
    )
    field.products += field.evaluations - field.solver_evaluations
    _write_stats(recording.tape.stats, field, Stats())
    result: list[Tensor | None] = [None] * len(views)
    for i, grad in zip(wanted, grads, strict=True):
        result[i] = grad
    return result


def _write_stats(stats: Stats, field: Field, own: Stats) -> None:
    stats.backward_evaluations, stats.products = field.evaluations, field.products
    stats.backward_accepted, stats.backward_rejected = own.accepted, own.rejected
    stats.backward_further = own.further
    stats.backward_resumed = own.backward_resumed
    stats.backward_solver_evaluations = field.solver_evaluations
    stats.backward_solver_products = field.solver_products


def _time_cotangents(tape: Tape, wanted: bool, y0: Tensor) -> TimeCotangents | None:
    if not wanted:
        return None
    return TimeCotangents(_zeros(len(tape.nodes), y0), tape.wanted)


def _zeros(count: int, like: Tensor) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device=like.device)
