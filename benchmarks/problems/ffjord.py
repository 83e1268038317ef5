"""The tabular problem as a continuous normalizing flow: the trace comes with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.problems.base import Problem, normal
from benchmarks.problems.fields import Field, Hutchinson


def draw_noise(field: Field, generator: torch.Generator, batch: int) -> None:
    """The noise of the estimate, drawn once: 1 or -1."""
    first = field.net[0]
    assert isinstance(first, nn.Linear)
    signs = torch.randint(2, (batch, first.in_features), generator=generator)
    field.register_buffer("noise", 2 * signs.double() - 1)


def without_density(generator: torch.Generator, batch: int, width: int) -> Tensor:
    """Normal states, and a zero for the logarithm of the density."""
    x = normal(generator, batch, width)
    return torch.cat([x, torch.zeros_like(x[:, :1])], 1)


PROBLEM = Problem(
    name="ffjord",
    summary="a continuous normalizing flow for tabular data, bound by arithmetic",
    batch=128,
    sizes=(43, 860, 860, 43),
    t1=1.0,
    rounds=3,
    network=Hutchinson,
    prepare=draw_noise,
    start=without_density,
)
