"""Many cheap steps, bound by overhead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.problems.base import Problem
from benchmarks.problems.fields import Field


def fit(field: Field, generator: torch.Generator, batch: int) -> None:
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


def annulus(generator: torch.Generator, batch: int, width: int) -> Tensor:
    """Points at distance 1 to 2 from the origin."""
    points = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    radius = 1 + torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    distance = torch.linalg.vector_norm(points, dim=1, keepdim=True)
    scaled: Tensor = radius * points / distance
    return scaled


PROBLEM = Problem(
    name="spiral",
    summary="many cheap steps, bound by overhead: a small network fitted to a planar spiral",
    batch=20,
    sizes=(2, 50, 50, 2),
    t1=10.0,
    rtol=1e-7,
    atol=1e-9,
    rounds=5,
    prepare=fit,
    start=annulus,
)
