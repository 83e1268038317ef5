"""Tangents propagated forwards, for few inputs and many outputs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint.capture import graph_leaves
from symplectic_adjoint.field import RandomState, Stage
from symplectic_adjoint.gradients._base import Counts, Record, Strategy, Sweep
from symplectic_adjoint.gradients._derived import by_duals
from symplectic_adjoint.loop import SolveShape
from symplectic_adjoint.steppers import Stepper
from symplectic_adjoint.steppers._base import Saved


@dataclass(frozen=True)
class Forward(Strategy):
    """Propagates tangents through the frozen grid, one for each number that has a gradient.

    The first backward pass computes all columns of the Jacobian of the outputs; each further one
    (``retain_graph=True``) is a product with it and evaluates nothing. The memory does not grow
    with the number of steps. Meant for few inputs: say, ten parameters of a model in physics, with
    gradients of many functions of its solution.

    ``func`` has to support forward mode. What it does not use has no gradient (None).

    Attributes:
        chunk: How many tangents are propagated at a time, by one evaluation of ``func`` (where
            ``torch.vmap`` cannot see through it, one at a time); more take more memory and less
            time.
        limit: Greatest number of inputs, counted by their elements.

    Raises:
        ArgumentError: ``chunk`` or ``limit`` is not positive.

    Example:
        >>> import symplectic_adjoint as sa
        >>> rate = torch.tensor(-0.5, requires_grad=True)
        >>> t = torch.linspace(0.0, 1.0, 3)
        >>> y = sa.odeint(lambda t, y: rate * y, torch.ones(1), t, gradient="forward")
        >>> for value in y.flatten():  # t exp(rate t), for three values by one propagation
        ...     print(round(torch.autograd.grad(value, rate, retain_graph=True)[0].item(), 4))
        0.0
        0.3894
        0.6065
    """

    chunk: int = 64
    limit: int = 512
    name = "forward"

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.limit < 1:
            raise ArgumentError(f"chunk = {self.chunk} and limit = {self.limit} must be at least 1")

    def admit(self, inputs: Sequence[Tensor]) -> None:
        count = sum(map(_size, inputs))
        if count > self.limit:
            raise ArgumentError(
                f"gradient='forward' was asked for the gradients of {count} numbers, and each "
                f"takes a propagation of its own through the solve (limit = {self.limit}). Use "
                "gradient='symplectic', whose cost does not grow with their number, let fewer "
                "tensors require grad, or raise the limit: Forward(limit=...)"
            )

    def keep(self, stepper: Stepper, n: int, step: Any) -> Record:
        return Record(Saved((), stepper.save(step, stages=False).tokens))

    def reverse(self, sweep: Sweep) -> Tensor:
        if not sweep.memo:
            try:
                columns, sweep.memo["moved"] = self._jacobian(sweep)
            except NotImplementedError as error:
                raise ArgumentError(
                    "gradient='forward' needs forward-mode derivatives of all that func does: "
                    f"{str(error).splitlines()[0]} Use gradient='symplectic', which needs none"
                ) from error
            sweep.memo["columns"], sweep.memo["used"] = columns, _used(sweep, columns)
        columns, moved = sweep.memo["columns"], sweep.memo["moved"]
        g, sizes = sweep.g, _sizes(sweep)
        products = (columns.reshape(len(columns), -1).conj() @ g.flatten()).real
        parts = iter(products.split(sizes))
        state = next(parts)
        lam = _assembled(state, sweep.y0) if sweep.wants_state else torch.zeros_like(sweep.y0)
        for alias, used in zip(sweep.field.aliases, sweep.memo["used"], strict=True):
            part = _assembled(next(parts), alias)
            alias.grad = part if used else None
        if sweep.reversal.times is not None:
            sweep.reversal.times.values[_wanted(sweep)] += next(parts)
        if sweep.out_times is not None:
            sweep.out_times += (moved.conj() * g).real.reshape(len(g), -1).sum(1)
        return lam

    def counts(self, stepper: Stepper, shape: SolveShape) -> Counts:
        """Each stage once for each chunk of inputs; the products are part of the evaluations."""
        return Counts(-(-shape.scalars // self.chunk) * shape.stages(stepper.work), 0)

    def _jacobian(self, sweep: Sweep) -> tuple[Tensor, Tensor]:
        """Columns of the outputs (K, T, ...), and the slopes of the outputs in time (T, ...)."""
        nodes = torch.tensor(sweep.nodes, dtype=torch.float64)
        xs = [sweep.y0, nodes, sweep.times, *(x.detach() for x in sweep.field.aliases)]
        directions = _directions(sweep, xs)
        columns = []
        while chunk := list(itertools.islice(directions, self.chunk)):
            columns.append(self._pushed(sweep, xs, chunk))
        found = torch.cat(columns) if columns else sweep.g.new_zeros(0, *sweep.g.shape)
        if sweep.out_times is None:
            return found, found[:0]
        return found[:-1], found[-1]

    def _pushed(self, sweep: Sweep, xs: Sequence[Tensor], chunk: Sequence[Direction]) -> Tensor:
        """The tangents of the outputs along a chunk of directions."""
        # The state has a tangent along every direction, as what is added to it may have.
        moved = sorted({0, *(d.place for d in chunk)})
        stacked = [torch.stack([d.part(i, xs[i]) for d in chunk]) for i in moved]

        def outputs(*values: Tensor) -> Tensor:
            inputs = [*xs]
            for i, value in zip(moved, values, strict=True):
                inputs[i] = value
            y, field = sweep.replay(inputs)
            sweep.field.evaluations += field.evaluations
            return y

        def push(*ts: Tensor) -> Tensor:
            dy: Tensor = torch.func.jvp(outputs, tuple(xs[i] for i in moved), ts)[1]
            return dy

        if len(chunk) > 1:
            # Where func cannot be seen through, one by one.
            with contextlib.suppress(RuntimeError):
                pushed: Tensor = torch.func.vmap(push, randomness="same")(*stacked)
                return pushed
        points = [xs[i] for i in moved]
        rows = [
            by_duals(lambda duals: [outputs(*duals)], points, ts)
            for ts in zip(*stacked, strict=True)
        ]
        return torch.stack([dy for (dy,) in rows])


class Direction(NamedTuple):
    """A tangent of one of several tensors."""

    place: int
    tangent: Tensor

    def part(self, i: int, x: Tensor) -> Tensor:
        """The tangent of tensor ``i``."""
        return self.tangent if i == self.place else torch.zeros_like(x)


def _directions(sweep: Sweep, xs: Sequence[Tensor]) -> Iterator[Direction]:
    """Along y0, along captured tensors, along step times, and along all output times at once."""
    for i in (*range(sweep.wants_state), *range(3, len(xs))):
        yield from (Direction(i, tangent) for tangent in _units(xs[i]))
    for n in _wanted(sweep):
        yield Direction(1, torch.zeros_like(xs[1]).index_fill_(0, torch.tensor(n), 1.0))
    if sweep.out_times is not None:
        yield Direction(2, torch.ones_like(xs[2]))


def _units(x: Tensor) -> Iterator[Tensor]:
    """Unit tangents; of a complex tensor, real ones and then imaginary ones."""
    units: Any = (1.0, 1.0j) if x.is_complex() else (1.0,)
    for unit in units:
        for i in range(x.numel()):
            tangent = torch.zeros_like(x, memory_format=torch.contiguous_format)
            tangent.view(-1)[i] = unit
            yield tangent


def _assembled(parts: Tensor, like: Tensor) -> Tensor:
    """A gradient from the products with its unit tangents."""
    if like.is_complex():
        return torch.complex(*parts.chunk(2)).reshape(like.shape).to(like.dtype)
    return parts.reshape(like.shape).to(like.dtype)


def _size(x: Tensor) -> int:
    return x.numel() * (2 if x.is_complex() else 1)


def _sizes(sweep: Sweep) -> list[int]:
    """How many columns belong to y0, to each captured tensor, and to the step times."""
    state = _size(sweep.y0) if sweep.wants_state else 0
    return [state, *map(_size, sweep.field.aliases), len(_wanted(sweep))]


def _used(sweep: Sweep, columns: Tensor) -> list[bool]:
    """Which captured tensors move an output, or at least serve where the solve begins."""
    parts = columns.split(_sizes(sweep))[1 : 1 + len(sweep.field.aliases)]
    moves = [not x.numel() or bool(x.any()) for x in parts]
    if all(moves):
        return moves
    with RandomState(sweep.y0.device).restored():
        graph = sweep.field.graph(Stage(sweep.nodes[0], sweep.y0), False)
    serving = {id(x) for x in graph_leaves(graph.k)}
    return [
        moved or id(alias) in serving
        for moved, alias in zip(moves, sweep.field.aliases, strict=True)
    ]


def _wanted(sweep: Sweep) -> list[int]:
    """The step times that have a gradient."""
    times = sweep.reversal.times
    return [] if times is None else [n for n in range(len(sweep.nodes)) if times.wanted(n)]
