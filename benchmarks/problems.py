"""The problems: what is integrated, from where, how far and how finely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class TooManyEvaluationsError(RuntimeError):
    """A solve went on past the limit."""


class Field(nn.Module):
    """An autonomous vector field, a tanh network of the state, that can count its calls.

    Args:
        sizes: Widths of the layers, from the state to the state.
        counting: Counts cost a hook an evaluation, so timed runs go without.

    Attributes:
        limit: Evaluations after which a counting field raises: some solvers never end where another
            would raise.
        evaluations: Calls so far.
        products: Vector-Jacobian products taken through those calls so far.
    """

    limit = 200_000

    def __init__(self, sizes: tuple[int, ...], counting: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1])
        self.counting = counting
        self.evaluations = 0
        self.products = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The derivative at ``y``, shape (batch, width)."""
        out: Tensor = self.net(y)
        if self.counting:
            self.evaluations += 1
            if self.evaluations > self.limit:
                raise TooManyEvaluationsError(f"gave up after {self.limit} evaluations")
            if out.requires_grad:
                out.register_hook(self._count_product)
        return out

    def _count_product(self, grad: Tensor) -> None:
        self.products += 1


@dataclass(frozen=True)
class Instance:
    """A problem in one precision, with a field and leaves of its own.

    Attributes:
        problem: The problem it belongs to.
        field: The vector field, the only holder of parameters.
        y0: Initial states, shape (batch, width).
    """

    problem: Problem
    field: Field
    y0: Tensor

    def loss(self, y1: Tensor) -> Tensor:
        """Mean square of the final state."""
        return y1.square().mean()

    def clear(self) -> None:
        """Drops the gradients, so that every run allocates its own."""
        for parameter in self.field.parameters():
            parameter.grad = None

    def gradient(self) -> Tensor:
        """All parameter gradients as one float64 vector."""
        grads = [p.grad for p in self.field.parameters()]
        return torch.cat([g.detach().double().flatten() for g in grads if g is not None])


@dataclass(frozen=True)
class Problem:
    """What is solved; integration runs from time 0 to ``t1``.

    Attributes:
        name: Name on the command line.
        summary: One line for the reader.
        batch: Number of states solved as one system.
        sizes: Widths of the network's layers.
        t1: End time.
        method: ``"dopri5"`` with the tolerances, or ``"rk4"`` with ``steps`` equal steps.
        rtol: Relative tolerance of an adaptive method.
        atol: Absolute tolerance of an adaptive method.
        steps: Number of fixed steps, None for an adaptive method.
        prepare: Changes the freshly initialised float64 network in place, or None.
        start: Draws the float64 initial states from (generator, batch, width).
        options: Options of the method, by their names in torchdiffeq.
        rounds: Timed rounds unless the command line says otherwise.
    """

    name: str
    summary: str
    batch: int
    sizes: tuple[int, ...]
    t1: float
    method: str
    rtol: float
    atol: float
    steps: int | None
    rounds: int
    prepare: Callable[[Field, torch.Generator], None] | None
    start: Callable[[torch.Generator, int, int], Tensor]
    options: tuple[tuple[str, Any], ...] = ()

    def instance(self, dtype: torch.dtype = torch.float32, *, counting: bool = False) -> Instance:
        """The same weights and states on every call: drawn in float64, then rounded."""
        generator = torch.Generator().manual_seed(0)
        field = Field(self.sizes, counting).double()
        _initialise(field, generator)
        if self.prepare is not None:
            self.prepare(field, generator)
        y0 = self.start(generator, self.batch, self.sizes[0])
        return Instance(self, field.to(dtype), y0.to(dtype))


def _initialise(field: Field, generator: torch.Generator) -> None:
    """Weights drawn as nn.Linear draws them, but from our generator."""
    with torch.no_grad():
        for layer in field.net:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)


def _fit_spiral(field: Field, generator: torch.Generator) -> None:
    """Fits the last layer to the spiral dy/dt = A y: a field as training would leave it."""
    spiral = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
    points = torch.rand(4000, 2, generator=generator, dtype=torch.float64) * 4.4 - 2.2
    last = field.net[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        hidden = field.net[:-1](points)
        features = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
        gram = features.T @ features / len(points) + 1e-4 * torch.eye(
            features.shape[1], dtype=torch.float64
        )
        weights = torch.linalg.solve(gram, features.T @ (points @ spiral) / len(points))
        last.weight.copy_(weights[:-1].T)
        last.bias.copy_(weights[-1])


def _annulus(generator: torch.Generator, batch: int, width: int) -> Tensor:
    """Points at distance 1 to 2 from the origin."""
    points = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    radius = 1 + torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    distance = torch.linalg.vector_norm(points, dim=1, keepdim=True)
    scaled: Tensor = radius * points / distance
    return scaled


def _normal(generator: torch.Generator, batch: int, width: int) -> Tensor:
    return torch.randn(batch, width, generator=generator, dtype=torch.float64)


_SPIRAL = Problem(
    name="spiral",
    summary="many cheap steps, bound by overhead: a small network fitted to a planar spiral",
    batch=20,
    sizes=(2, 50, 50, 2),
    t1=25.0,
    method="dopri5",
    rtol=1e-7,
    atol=1e-9,
    steps=None,
    rounds=7,
    prepare=_fit_spiral,
    start=_annulus,
)

_TABULAR = Problem(
    name="tabular",
    summary="few expensive steps, bound by arithmetic: a network of the size used for tabular data",
    batch=256,
    sizes=(43, 860, 860, 43),
    t1=1.0,
    method="dopri5",
    rtol=1e-6,
    atol=1e-8,
    steps=None,
    rounds=15,
    prepare=None,
    start=_normal,
)

_LONG = Problem(
    name="long",
    summary="a long fixed grid, bound by memory",
    batch=64,
    sizes=(64, 256, 64),
    t1=4000 / 512,  # steps of a power of two: no peer's grid arithmetic rounds to one step more
    method="rk4",
    rtol=1e-6,
    atol=1e-8,
    steps=4000,
    rounds=3,
    prepare=None,
    start=_normal,
)

PROBLEMS: dict[str, Problem] = {p.name: p for p in (_SPIRAL, _TABULAR, _LONG)}


def loosened(problem: Problem) -> Problem:
    """Tolerances for a method of order 2, which at the given ones takes 100 000 steps and more."""
    return problem if problem.steps is not None else replace(problem, rtol=1e-3, atol=1e-5)


def quick(problem: Problem) -> Problem:
    """A problem of the same kind that takes a fraction of a second."""
    problem = replace(problem, batch=min(problem.batch, 16))
    if problem.steps is not None:
        return replace(problem, steps=64, t1=64 / 512, rounds=2)
    return replace(problem, t1=problem.t1 / 25 if problem.t1 > 1 else problem.t1, rounds=2)
