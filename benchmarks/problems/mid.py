"""A network and a batch of a size between the others, bound by overhead and arithmetic alike."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.problems.base import Problem, normal
from benchmarks.problems.fields import Field


def enlarge(field: Field, generator: torch.Generator, batch: int) -> None:
    """Weights three times as large: a field that turns, as training would leave it."""
    with torch.no_grad():
        for layer in field.net:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(3)


PROBLEM = Problem(
    name="mid",
    summary="between overhead and arithmetic",
    batch=128,
    sizes=(8, 64, 64, 8),
    t1=5.0,
    rounds=11,
    prepare=enlarge,
    start=normal,
)
