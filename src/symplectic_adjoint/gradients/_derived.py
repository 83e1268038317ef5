"""Derivatives of every order of a solve that has been run, as maps of tensors.

A derivative is a chain of two operations on the solution ``R: xs -> y``: ``Pull`` multiplies with
the transposed Jacobian, ``Push`` with the Jacobian itself. The gradient is ``Pull`` of the
solution; what differentiates it again is ``Pull`` or ``Push`` of that. The first ``Pull`` is the
sweep of the gradient strategy; every further derivative replays the frozen grid under autograd.

One autograd function computes them all. Its own derivatives are again such maps, and its rule for a
batch is a loop, so that the transforms of ``torch.func`` go through it in any order. It knows the
solves of a batch by *tickets*: numbers that are tensors, and so are batched like all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

Map = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Tensors to tensors, by operations that autograd can differentiate."""


class Recording(Protocol):
    """A solve that has been run."""

    def value(self) -> Tensor:
        """Its outputs."""
        ...

    def pull(self, g: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """The gradients of the inputs that need one, by the strategy; None for the others."""
        ...

    def replay(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs, as one item, by operations on the frozen grid."""
        ...

    def refuse(self) -> None:
        """Raise where the strategy's gradient is not that of the replay.

        Raises:
            SecondDerivativeError: The strategy is not exact.
        """
        ...


class Shelf:
    """Recordings by their tickets; unlike a list, it goes through transforms untouched."""

    def __init__(self, *recordings: Recording) -> None:
        self.recordings = [*recordings]

    def put(self, recording: Recording) -> Tensor:
        """Keep a recording; gives its ticket."""
        self.recordings.append(recording)
        return torch.tensor(len(self.recordings) - 1)

    def get(self, ticket: Tensor) -> Recording:
        """The recording of a ticket."""
        return self.recordings[int(ticket)]


class Plan:
    """A derivative of a solve, of some order."""

    def map(self, solution: Map, duals: bool) -> Map:
        """The derivative as a map of its inputs.

        Args:
            solution: The solution as a map.
            duals: Whether forward mode is free to be used; it cannot be nested.
        """
        raise NotImplementedError

    def evaluate(self, recording: Recording, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Its value, by the cheapest way."""
        return self.map(recording.replay, True)(xs)


@dataclass(frozen=True)
class Value(Plan):
    """The solution itself."""

    def map(self, solution: Map, duals: bool) -> Map:
        return solution

    def evaluate(self, recording: Recording, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [recording.value()]


@dataclass(frozen=True)
class Pull(Plan):
    """``(xs, gs) -> J(xs)^T gs``, as far as needed, for the map of another plan."""

    plan: Plan
    needs: tuple[bool, ...]

    def map(self, solution: Map, duals: bool) -> Map:
        inner, count = self.plan.map(solution, duals), len(self.needs)

        def pulled(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            xs, gs = _variables(tensors[:count]), tensors[count:]
            wanted = [x for x, need in zip(xs, self.needs, strict=True) if need]
            return _transposed(inner(xs), wanted, gs)

        return pulled

    def evaluate(self, recording: Recording, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        if isinstance(self.plan, Value):
            grads = recording.pull(xs[-1], self.needs)
            return [
                torch.zeros_like(x) if grad is None else grad
                for x, grad, need in zip(xs, grads, self.needs, strict=False)
                if need
            ]
        recording.refuse()
        return super().evaluate(recording, xs)


@dataclass(frozen=True)
class Push(Plan):
    """``(xs, ts) -> J(xs) ts`` for the map of another plan."""

    plan: Plan
    count: int

    def map(self, solution: Map, duals: bool) -> Map:
        inner = self.plan.map(solution, False)

        def pushed(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            xs, ts = tensors[: self.count], tensors[self.count :]
            return by_duals(inner, xs, ts) if duals else _by_transposing_twice(inner, xs, ts)

        return pushed

    def evaluate(self, recording: Recording, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        if not isinstance(self.plan, Value):
            recording.refuse()
        return super().evaluate(recording, xs)


def derived(plan: Plan, shelf: Shelf, ticket: Tensor, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A derivative of recorded solves, itself differentiable, batched like its inputs.

    Args:
        plan: Which derivative.
        shelf: The solves.
        ticket: Which of them, a number that may be batched.
        xs: The inputs of the plan.
    """
    apply: Callable[..., tuple[Tensor, ...]] = _Derived.apply
    return apply(plan, shelf, ticket, *xs)


def samples(info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Iterator[list[Any]]:
    """The arguments of an autograd function for each sample of a batch."""
    for i in range(info.batch_size):
        pairs = zip(args, in_dims, strict=True)
        yield [x if dim is None else x.select(dim, i) for x, dim in pairs]


class _Derived(torch.autograd.Function):
    @staticmethod
    def forward(plan: Plan, shelf: Shelf, ticket: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            results = plan.evaluate(shelf.get(ticket), [x.detach() for x in xs])
        return tuple(x.detach() for x in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan, ctx.shelf, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        ticket, *xs = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[3:])
        grads = iter(derived(Pull(ctx.plan, needs), ctx.shelf, ticket, [*xs, *gs]))
        return (None, None, None, *(next(grads) if need else None for need in needs))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        ticket, *xs = ctx.saved_tensors
        ts = tangents_like(xs, tangents[3:])
        return derived(Push(ctx.plan, len(xs)), ctx.shelf, ticket, [*xs, *ts])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        apply: Callable[..., tuple[Tensor, ...]] = _Derived.apply
        rows = [apply(*sample) for sample in samples(info, in_dims, args)]
        columns = list(zip(*rows, strict=True))
        return tuple(torch.stack(column) for column in columns), (0,) * len(columns)


def tangents_like(xs: Sequence[Tensor], ts: Sequence[Tensor | None]) -> list[Tensor]:
    """Tangents, zero where there is none."""
    return [torch.zeros_like(x) if t is None else t for x, t in zip(xs, ts, strict=True)]


def _variables(xs: Sequence[Tensor]) -> list[Tensor]:
    """Views that require grad, on the graph and with the tangents of what they show."""
    return [x.view_as(x).requires_grad_() for x in xs]


def _transposed(
    ys: Sequence[Tensor], xs: Sequence[Tensor], gs: Sequence[Tensor]
) -> Sequence[Tensor]:
    pairs = [(y, g) for y, g in zip(ys, gs, strict=True) if y.requires_grad]
    if not pairs or not xs:
        return [torch.zeros_like(x) for x in xs]
    return torch.autograd.grad(
        [y for y, _ in pairs],
        xs,
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def by_duals(inner: Map, xs: Sequence[Tensor], ts: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """``J(xs) ts`` in forward mode, for ``xs`` without tangents of their own."""
    # A level that the caller has entered can be used, since nothing here carries its tangents.
    own = forward_ad._current_level < 0
    with forward_ad.dual_level() if own else contextlib.nullcontext():
        duals = [
            x if t is None else forward_ad.make_dual(x, t) for x, t in zip(xs, ts, strict=True)
        ]
        parts = [forward_ad.unpack_dual(y) for y in inner(duals)]
    return [torch.zeros_like(y) if dy is None else dy for y, dy in parts]


def _by_transposing_twice(
    inner: Map, xs: Sequence[Tensor], ts: Sequence[Tensor]
) -> Sequence[Tensor]:
    """``J t`` as the derivative of ``J^T u`` with respect to ``u``, along ``t``."""
    with torch.enable_grad():
        xs = _variables(xs)
        ys = inner(xs)
        us = [torch.zeros_like(y).requires_grad_() for y in ys]
        return _transposed(_transposed(ys, xs, us), us, ts)
