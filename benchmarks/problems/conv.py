"""A field on a row of points, solved with a method of high order."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.problems.base import Problem
from benchmarks.problems.fields import Convolution, Field

POINTS = 128


def enlarge(field: Field, generator: torch.Generator, batch: int) -> None:
    """Weights twice as large: a field that moves its states."""
    with torch.no_grad():
        for layer in field.net:
            if isinstance(layer, nn.Conv1d):
                layer.weight.mul_(2)


def waves(generator: torch.Generator, batch: int, width: int) -> Tensor:
    """Sums of the five longest waves with random amplitudes and phases, shape (batch, points)."""
    x = torch.arange(POINTS, dtype=torch.float64) / POINTS
    amplitude = torch.randn(batch, 5, 1, generator=generator, dtype=torch.float64)
    phase = torch.rand(batch, 5, 1, generator=generator, dtype=torch.float64)
    order = torch.arange(1, 6, dtype=torch.float64)[:, None]
    return (amplitude * torch.sin(2 * math.pi * (order * x + phase))).sum(1)


PROBLEM = Problem(
    name="conv",
    summary="convolutions and a method of order 8",
    batch=16,
    sizes=(1, 16, 16, 1),
    t1=5.0,
    method="dopri8",
    rounds=3,
    network=Convolution,
    prepare=enlarge,
    start=waves,
)
