"""Solves inside the transforms of ``torch.func``.

A solve reads values back, which the tensors of a transform cannot give. So it is lifted out of all
transforms: an autograd function receives ``y0``, ``t`` and every tensor that ``func`` depends on,
runs the solve on plain tensors (in a batch, each sample for itself, with steps of its own) and
keeps a recording of each. Outputs and derivatives are then ``_derived`` from the recordings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint._tree import StateSpec
from symplectic_adjoint.capture import Capture, HiddenTensor, varies
from symplectic_adjoint.field import RandomState, Rediscovered
from symplectic_adjoint.gradients._derived import Shelf, Value, derived, samples
from symplectic_adjoint.gradients._function import refuse
from symplectic_adjoint.gradients._job import Job, Recorded, record, settled
from symplectic_adjoint.gradients.backprop import Backprop
from symplectic_adjoint.gradients.checkpoint import Checkpoint
from symplectic_adjoint.loop import Stats
from symplectic_adjoint.solution import Solution


def solve_lifted(
    make: Callable[[Tensor, Tensor, Capture], Job],
    spec: StateSpec,
    y0: Tensor,
    t: Tensor,
    capture: Capture,
) -> Solution:
    """Solve where a transform is at work.

    Args:
        make: The solve of plain tensors, from ``y0``, ``t`` and a capture that holds such.
        spec: How the state is flattened.
        y0: The flat initial state.
        t: The output times.
        capture: What ``func`` depends on.

    Returns:
        The solution. Of the steps of a batch, shorter rows are filled up with NaN; ``stats``
        are sums over the batch.

    Raises:
        SolveError: A solve could not reach ``t[-1]``, whatever ``throw`` says.
    """
    before = RandomState(y0.device)
    moves, keep = varies(t), torch.is_grad_enabled()
    while True:
        inputs = [y0, t, *capture.tensors]
        lifted = _Lifted(make, capture, moves, keep)
        apply: Callable[..., tuple[Tensor, Tensor]] = _Record.apply
        try:
            ticket, steps = apply(lifted, *(x.detach() for x in inputs))
            break
        except Rediscovered:
            before.set()
    (y,) = derived(Value(), lifted.shelf, ticket, lifted.variables(inputs))
    return Solution(t=t, y=spec.unflatten(y), steps=steps, stats=lifted.stats)


@dataclass
class _Lifted:
    """Runs solves of plain tensors.

    Attributes:
        make: Makes the job.
        capture: What ``func`` depends on, in the transform.
        moves: Whether ``t`` may have a derivative.
        keep: Whether gradients may be asked for.
        shelf: The solves that were run.
        stats: Sums over all of them.
    """

    make: Callable[[Tensor, Tensor, Capture], Job]
    capture: Capture
    moves: bool
    keep: bool
    shelf: Shelf = field(default_factory=Shelf)
    stats: Stats = field(default_factory=Stats)

    def variables(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Those that may have a derivative."""
        return [x for i, x in enumerate(inputs) if _continuous(x) and (i != 1 or self.moves)]

    def record(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run a solve; gives its ticket and its steps."""
        y0, t, *captured = map(_plain, inputs)
        for x in self.variables([y0, t, *captured]):
            x.requires_grad_()
        capture = self.capture.holding(captured)
        known = len(capture.tensors)
        try:
            with capture.guarded(), capture.substituted(capture.tensors):
                job = self.make(y0, t, capture)
            if not self.keep or isinstance(job.strategy, Backprop):
                job = replace(job, strategy=Checkpoint())
            with capture.guarded():
                recorded = settled(job, record)
        except HiddenTensor as hidden:
            self.capture.extend([hidden.tensor])
            raise Rediscovered from None
        if found := capture.tensors[known:]:
            self.capture.extend(found)
            raise Rediscovered
        if recorded.result.error is not None:
            raise recorded.result.error
        _add(self.stats, recorded.stats, _FORWARD)
        leaves = self.variables([y0, t, *capture.tensors])
        ticket = self.shelf.put(_Recording(recorded, leaves, self.moves, self.stats))
        return ticket, torch.tensor(recorded.result.nodes, dtype=torch.float64)


@dataclass
class _Recording:
    """A solve with the leaves of its graph."""

    recorded: Recorded
    leaves: Sequence[Tensor]
    moves: bool
    stats: Stats

    def __post_init__(self) -> None:
        with torch.enable_grad():
            self.y = self.recorded.attached()

    def value(self) -> Tensor:
        return self.y

    def pull(self, g: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        wanted = [i for i, need in enumerate(needs) if need]
        found = torch.autograd.grad(
            self.y, [self.leaves[i] for i in wanted], g, retain_graph=True, allow_unused=True
        )
        stats = self.recorded.tape.stats
        _add(self.stats, stats, _BACKWARD)
        grads = dict(zip(wanted, found, strict=True))
        return [grads.get(i) for i in range(len(needs))]

    def replay(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        y0, *rest = xs
        t, captured = (rest[0], rest[1:]) if self.moves else (self.recorded.job.problem.t, rest)
        return [self.recorded.replayed(y0, t.to("cpu", torch.float64), captured)]

    def refuse(self) -> None:
        refuse(self.recorded.job.strategy)


class _Record(torch.autograd.Function):
    @staticmethod
    def forward(lifted: _Lifted, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(mode=False), torch.enable_grad():
            return lifted.record(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        draws = _Draws(info.randomness, args[1].device)
        apply: Callable[..., tuple[Tensor, Tensor]] = _Record.apply
        tickets, steps = [], []
        for sample in samples(info, in_dims, args):
            with draws.sample():
                ticket, nodes = apply(*sample)
            tickets.append(ticket)
            steps.append(nodes)
        return (torch.stack(tickets), _padded(steps)), (0, 0)


class _Draws:
    """What the ``randomness`` of ``vmap`` means for samples that are solved one after the other."""

    def __init__(self, randomness: str, device: torch.device) -> None:
        self.randomness = randomness
        self.start = RandomState(device)

    @contextlib.contextmanager
    def sample(self) -> Generator[None]:
        """Solve a sample inside.

        Raises:
            ArgumentError: It drew random numbers, and nobody said how.
        """
        if self.randomness == "same":
            self.start.set()
        yield
        if self.randomness == "error" and not self.start.same(RandomState(self.start.device)):
            raise ArgumentError(
                "func draws random numbers under vmap; say whether the samples shall share them: "
                "torch.func.vmap(..., randomness='same') or randomness='different'"
            )


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows (..., n) of several lengths, the shorter ones filled up with NaN."""
    longest = max(row.shape[-1] for row in rows)
    pad = torch.nn.functional.pad
    return torch.stack([pad(row, (0, longest - row.shape[-1]), value=torch.nan) for row in rows])


def _continuous(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _plain(x: Tensor) -> Tensor:
    """A leaf of its own."""
    return x.clone() if x.is_inference() else x.detach()


_BACKWARD = [f.name for f in fields(Stats) if f.name == "products" or f.name.startswith("backward")]
_FORWARD = [f.name for f in fields(Stats) if f.name not in _BACKWARD]


def _add(total: Stats, part: Stats, names: Sequence[str]) -> None:
    for name in names:
        setattr(total, name, getattr(total, name) + getattr(part, name))
