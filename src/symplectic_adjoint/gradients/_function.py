"""The one autograd function: a solve that has been run, attached to the caller's graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import SecondDerivativeError
from symplectic_adjoint._types import FlatFunc, Time
from symplectic_adjoint.capture import Capture, detached
from symplectic_adjoint.controllers import Controller, Setting
from symplectic_adjoint.field import DetachedField, Field, GraphField
from symplectic_adjoint.gradients._base import Record, Strategy, Sweep, replay
from symplectic_adjoint.loop import Outputs, Stats
from symplectic_adjoint.steppers import Stepper
from symplectic_adjoint.steppers._base import Reversal, TimeCotangents


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
        leafy: Whether ``func`` needs an argument that requires grad.
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
    leafy: bool

    def release(self) -> list[Tensor]:
        """Hand over all kept tensors, so that autograd owns them."""
        tensors = [*self.end]
        counts = [len(tensors)]
        self.end = ()
        for record in self.records:
            tensors += record.saved.tensors
            counts.append(len(record.saved.tensors))
            record.saved = record.saved._replace(tensors=())
        self._counts = counts
        return tensors

    def restored(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Record]]:
        """The last state and the records with their tensors."""
        position, parts = 0, []
        for count in self._counts:
            parts.append(tensors[position : position + count])
            position += count
        records = [
            Record(record.saved._replace(tensors=part), record.graphs)
            for part, record in zip(parts[1:], self.records, strict=True)
        ]
        for record in self.records:
            record.graphs = ()
        return parts[0], records


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
        return y[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, rest = saved[: ctx.inputs], saved[ctx.inputs :]
        y, kept = rest[: ctx.outputs], rest[ctx.outputs :]
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return (None, None, *_replayed(ctx.tape, inputs, needs, g))
        return (None, None, *_reversed(ctx.tape, inputs, needs, y, kept, g))


def _reversed(
    tape: Tape,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    y: Sequence[Tensor],
    kept: Sequence[Tensor],
    g: Tensor,
) -> list[Tensor | None]:
    """First derivatives, by the tape's strategy."""
    y0, _, times, *captured = inputs
    end, records = tape.restored(kept)
    aliases = list(tape.aliases) or detached(captured)
    with torch.enable_grad(), tape.capture.substituted(aliases), tape.autocast.restored():
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
            reversal=Reversal(field, torch.zeros_like(y0), _time_cotangents(tape, needs[1], y0)),
            out_times=_zeros(len(times), y0) if needs[2] else None,
            setting=tape.setting,
            controller=tape.controller,
        )
        lam = tape.strategy.reverse(sweep)
    _write_stats(tape.stats, field, sweep.own)
    grads = field.sums.totals()
    reversal = sweep.reversal.times
    node_grads = None if reversal is None else reversal.values.cpu()
    time_grads = None if sweep.out_times is None else sweep.out_times.cpu()
    return [lam, node_grads, time_grads, *grads]


def _replayed(
    tape: Tape, inputs: Sequence[Tensor], needs: Sequence[bool], g: Tensor
) -> list[Tensor | None]:
    """First derivatives that can be differentiated again: the frozen grid under autograd."""
    if not tape.strategy.exact:
        raise SecondDerivativeError(
            f"gradient={tape.strategy.name!r} does not give the gradient of the computed solution, "
            "which cannot be differentiated again; use 'symplectic' or another exact strategy"
        )
    # Views, so that an input that appears twice is told apart.
    y0, nodes, times, *captured = views = [x.view_as(x) for x in inputs]
    with tape.capture.substituted(captured), tape.autocast.restored():
        field = GraphField(tape.func, y0)
        field.leafy = tape.leafy
        tokens = [record.saved.tokens for record in tape.records]
        knots: list[Time] = [
            nodes[n] if needs[1] and tape.wanted(n) else t for n, t in enumerate(tape.nodes)
        ]
        state = tape.stepper.resume(knots[0], (y0,), tokens[0][0] if any(tokens) else None)
        output_times = times if needs[2] else times.detach()
        _, parts = replay(field, tape.stepper, state, knots, tape.outputs, tokens, output_times)
        y = torch.cat([y0.unsqueeze(0), *(part for _, part in parts)])
    field.products = field.evaluations
    _write_stats(tape.stats, field, Stats())
    wanted = [i for i, need in enumerate(needs) if need]
    grads = torch.autograd.grad(
        y, [views[i] for i in wanted], g, create_graph=True, allow_unused=True
    )
    result: list[Tensor | None] = [None] * len(views)
    for i, grad in zip(wanted, grads, strict=True):
        result[i] = grad
    return result


def _write_stats(stats: Stats, field: Field, own: Stats) -> None:
    stats.backward_evaluations, stats.products = field.evaluations, field.products
    stats.backward_accepted, stats.backward_rejected = own.accepted, own.rejected
    stats.backward_further = own.further


def _time_cotangents(tape: Tape, wanted: bool, y0: Tensor) -> TimeCotangents | None:
    if not wanted:
        return None
    return TimeCotangents(_zeros(len(tape.nodes), y0), tape.wanted)


def _zeros(count: int, like: Tensor) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device=like.device)
