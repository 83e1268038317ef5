"""Densities in the plane that are easy to look at and hard to fit with one Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor


def eight_gaussians(count: int, generator: Generator) -> Tensor:
    """Eight round Gaussians of deviation 0.3 on a circle of radius 3, rows of shape (count, 2)."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    return 3.0 * _polar(angle) + 0.3 * _normal(count, generator)


def two_spirals(count: int, generator: Generator) -> Tensor:
    """Two interleaved Archimedean spirals of one and a half turns, blurred, shape (count, 2)."""
    # The square root spreads the points evenly: an arm's length grows like the angle squared.
    angle = 3 * math.pi * _uniform(count, generator).sqrt()
    arm = (torch.randint(2, (count,), generator=generator) * 2 - 1).unsqueeze(1)
    return arm * (angle / 3).unsqueeze(1) * _polar(angle) + 0.1 * _normal(count, generator)


def checkerboard(count: int, generator: Generator) -> Tensor:
    """The dark squares of a four by four board over [-4, 4] squared, rows of shape (count, 2)."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    corner = torch.stack((column, row), dim=1)
    inside = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return 2 * (corner + inside) - 4


def pinwheel(count: int, generator: Generator) -> Tensor:
    """Five long Gaussians, each bent by a rotation that grows with the radius, shape (count, 2)."""
    blade = torch.randint(5, (count,), generator=generator)
    stretched = _normal(count, generator) * torch.tensor([0.6, 0.2], dtype=torch.float64)
    radial, tangential = (stretched + torch.tensor([2.0, 0.0], dtype=torch.float64)).unbind(1)
    angle = blade * (2 * math.pi / 5) + 0.6 * (radial - 2.0)
    along = _polar(angle)
    across = torch.stack((-along[:, 1], along[:, 0]), dim=1)
    return radial.unsqueeze(1) * along + tangential.unsqueeze(1) * across


def _normal(count: int, generator: Generator) -> Tensor:
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def _uniform(count: int, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _polar(angle: Tensor) -> Tensor:
    return torch.stack((angle.cos(), angle.sin()), dim=1)


SAMPLERS: dict[str, Callable[[int, Generator], Tensor]] = {
    "8gaussians": eight_gaussians,
    "2spirals": two_spirals,
    "checkerboard": checkerboard,
    "pinwheel": pinwheel,
}
