"""What a problem is: what is integrated, from where, how far and how finely."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.problems.fields import Field

Prepare = Callable[[Field, torch.Generator, int], None]
Start = Callable[[torch.Generator, int, int], Tensor]


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

    @property
    def times(self) -> Tensor:
        """The start and the times at which the solution is wanted, shape (outputs + 1,)."""
        problem = self.problem
        return torch.linspace(0.0, problem.t1, problem.outputs + 1, dtype=self.y0.dtype)

    def loss(self, y: Tensor) -> Tensor:
        """Mean square of the states at the times after the start."""
        return y.square().mean()

    def clear(self) -> None:
        """Drops the gradients, so that every run allocates its own."""
        for parameter in self.field.parameters():
            parameter.grad = None

    def gradient(self) -> Tensor:
        """All parameter gradients as one float64 vector; what moves nothing has gradient zero."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.field.parameters()]
        return torch.cat([g.detach().double().flatten() for g in grads])


@dataclass(frozen=True)
class Problem:
    """What is solved; integration runs from time 0 to ``t1``.

    Attributes:
        name: Name on the command line.
        summary: One line for the reader.
        batch: Number of states solved as one system.
        sizes: Widths of the network's layers.
        t1: End time.
        start: Draws the float64 initial states from (generator, batch, first of the sizes).
        rounds: Timed rounds unless the command line says otherwise.
        network: The vector field.
        method: An adaptive method with the tolerances, or one of ``steps`` equal steps.
        rtol: Relative tolerance of an adaptive method.
        atol: Absolute tolerance of an adaptive method.
        steps: Number of fixed steps, None for an adaptive method.
        outputs: Number of equally spaced times, the last ``t1``, at which the solution is wanted.
        prepare: Changes the freshly initialised float64 field in place, drawing from (generator,
            batch), or None.
        options: Options of the method, by their names in torchdiffeq.
        omitted: Why a peer is left out, by its name or a pattern of names.
    """

    name: str
    summary: str
    batch: int
    sizes: tuple[int, ...]
    t1: float
    start: Start
    rounds: int
    network: type[Field] = Field
    method: str = "dopri5"
    rtol: float = 1e-6
    atol: float = 1e-8
    steps: int | None = None
    outputs: int = 1
    prepare: Prepare | None = None
    options: tuple[tuple[str, Any], ...] = ()
    omitted: Mapping[str, str] = field(default_factory=dict)

    def instance(self, dtype: torch.dtype = torch.float32, *, counting: bool = False) -> Instance:
        """The same weights and states on every call: drawn in float64, then rounded."""
        generator = torch.Generator().manual_seed(0)
        field = self.network(self.sizes, counting).double()
        _initialise(field, generator)
        if self.prepare is not None:
            self.prepare(field, generator, self.batch)
        y0 = self.start(generator, self.batch, self.sizes[0])
        return Instance(self, field.to(dtype), y0.to(dtype))

    def omits(self, peer: str) -> str | None:
        """Why a peer is left out, None if it is not."""
        return next((why for name, why in self.omitted.items() if fnmatch(peer, name)), None)

    def describe(self) -> str:
        """The problem in one line."""
        how = (
            f"{self.method}, rtol {self.rtol:g}, atol {self.atol:g}"
            if self.steps is None
            else f"{self.steps} fixed steps of {self.method}"
        )
        network = self.network.kind.format("-".join(map(str, self.sizes)))
        times = f", {self.outputs} output times" * (self.outputs > 1)
        size = f"batch {self.batch}, {network}, T = {self.t1:g}{times}"
        return f"{self.summary}; {size}, {how}, float32"


def _initialise(field: Field, generator: torch.Generator) -> None:
    """Weights drawn as nn.Linear and nn.Conv1d draw them, but from our generator."""
    with torch.no_grad():
        for layer in field.net:
            if isinstance(layer, nn.Linear | nn.Conv1d):
                bound = layer.weight[0].numel() ** -0.5
                assert layer.bias is not None
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)


def normal(generator: torch.Generator, batch: int, width: int) -> Tensor:
    """Standard normal states."""
    return torch.randn(batch, width, generator=generator, dtype=torch.float64)


def loosened(problem: Problem) -> Problem:
    """Tolerances for a method of order 2, which at the given ones takes 100 000 steps and more."""
    return problem if problem.steps is not None else replace(problem, rtol=1e-3, atol=1e-5)


def quick(problem: Problem) -> Problem:
    """A problem of the same kind that takes a fraction of a second."""
    problem = replace(problem, batch=min(problem.batch, 16), outputs=min(problem.outputs, 20))
    if problem.steps is not None:
        return replace(problem, steps=64, t1=64 / 512, rounds=2)
    return replace(problem, t1=problem.t1 / 10 if problem.t1 > 1 else problem.t1, rounds=2)
