"""Generated rows in the shape of a benchmark, for machines that do not have its files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint.datasets.base import Dataset, dequantised
from symplectic_adjoint.datasets.benchmarks import Benchmark, benchmark

_CLUSTERS = 4
_STROKES = 3
_CHUNK = 2048


def stand_in(name: str, *, rows: tuple[int, int, int] | None = None, seed: int = 0) -> Dataset:
    """Generates rows with the dimensions and sizes of a benchmark.

    A table's rows come from a few bent, skewed clusters of correlated columns, an image from a few
    blurred strokes. They show what training costs and whether it works; their scores say nothing
    about the benchmark, so the name says what they are.

    Args:
        name: Name of the benchmark.
        rows: Rows of the training, validation and test splits; the published sizes if None.
        seed: Seed of the rows.

    Returns:
        The rows, called ``name (stand-in)``: tables standardised by the training rows, images as
        dequantised pixels in (0, 1).

    Raises:
        UnknownNameError: There is no such benchmark.
        ArgumentError: A split has fewer than two rows.

    Example:
        >>> data = stand_in("gas", rows=(80, 10, 10))
        >>> data.name, data.dim, tuple(data.train.shape)
        ('gas (stand-in)', 8, (80, 8))
    """
    like = benchmark(name)
    sizes = rows or like.rows
    if min(sizes) < 2:
        raise ArgumentError(f"rows={sizes} must give every split at least two rows")
    digest = hashlib.sha256(f"{name}/{seed}".encode()).digest()
    generator = Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    make: Callable[[Benchmark, int, Generator], Tensor] = (
        _table if like.image_shape is None else _images
    )
    drawn = make(like, sum(sizes), generator)
    train, validation, test = drawn.split(sizes)
    if like.image_shape is None:
        mean, scale = train.mean(0), train.std(0)
    else:
        mean, scale = torch.zeros_like(train[0]), torch.ones_like(train[0])
    train, validation, test = ((part - mean) / scale for part in (train, validation, test))
    name = f"{name} (stand-in)"
    return Dataset(name, train, validation, test, mean, scale, like.image_shape)


def _table(like: Benchmark, count: int, generator: Generator) -> Tensor:
    dim = like.dim
    centres = 2.0 * _normal((_CLUSTERS, dim), generator)
    # The columns of a mixing matrix have lengths that fall off, as the spectrum of real data does.
    lengths = torch.arange(1, dim + 1, dtype=torch.float64).rsqrt()
    mixing = _normal((_CLUSTERS, dim, dim), generator) / math.sqrt(dim) * lengths
    mixing = mixing + 0.2 * torch.eye(dim, dtype=torch.float64)
    skew = 0.4 * _normal((dim,), generator)
    cluster = torch.randint(_CLUSTERS, (count,), generator=generator)
    rows = torch.empty(count, dim, dtype=torch.float64)
    for k in range(_CLUSTERS):
        mine = cluster == k
        rows[mine] = _normal((int(mine.sum()), dim), generator) @ mixing[k].T + centres[k]
    return rows + skew * rows.square() / (1 + rows.abs())


def _images(like: Benchmark, count: int, generator: Generator) -> Tensor:
    height, width = like.image_shape or (0, 0)
    levels = like.levels or 0
    lines, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (height, width))
    y, x = torch.meshgrid(lines, columns, indexing="ij")
    pixels = torch.stack((x.flatten(), y.flatten()), dim=1)
    parts = []
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        ends = 0.2 + 0.6 * torch.rand(2, size, _STROKES, 2, generator=generator).double()
        ink = _strokes(pixels, ends).amax(1)
        grey = (ink * (levels - 1)).round()
        parts.append(dequantised(grey, levels, generator))
    return torch.cat(parts)


def _strokes(pixels: Tensor, ends: Tensor) -> Tensor:
    """Ink of each stroke at each pixel, (n, strokes, pixels), in [0, 1]."""
    start, along = ends[0].unsqueeze(2), (ends[1] - ends[0]).unsqueeze(2)
    offset = pixels - start
    nearest = (offset * along).sum(-1) / along.square().sum(-1).clamp_min(1e-9)
    distance = (offset - nearest.clamp(0, 1).unsqueeze(-1) * along).norm(dim=-1)
    return torch.exp(-0.5 * (distance / 0.05).square())


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
