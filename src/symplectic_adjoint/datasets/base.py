"""What a data set is: rows split into train, validation and test, in standardised coordinates."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symplectic_adjoint.datasets.errors import DataError

MIN_ROWS = 50
"""Fewer rows leave a test split of less than five, whose mean says nothing."""


@dataclass(frozen=True)
class Dataset:
    """Rows for density estimation in three splits, in coordinates fit for training.

    Those that ``make_dataset`` makes are split 8:1:1 and standardised by the training rows;
    benchmarks come in their published splits and coordinates.

    Attributes:
        name: Name of the data set, or the path of its file.
        train: Training rows, float64, shape (n_train, dim).
        validation: Validation rows, float64, shape (n_validation, dim).
        test: Test rows, float64, shape (n_test, dim).
        mean: What was taken off the original coordinates, shape (dim,).
        scale: What they were divided by then, shape (dim,).
        image_shape: Height and width if a row is an image.

    Example:
        >>> data = make_dataset("noise", torch.rand(100, 3, dtype=torch.float64), seed=0)
        >>> data.dim, len(data.train), len(data.validation), len(data.test)
        (3, 80, 10, 10)
        >>> torch.allclose(data.restore(data.train).mean(0), data.mean)
        True
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    mean: Tensor
    scale: Tensor
    image_shape: tuple[int, int] | None = None

    @property
    def dim(self) -> int:
        """Number of columns."""
        return self.train.shape[1]

    @property
    def log_scale(self) -> float:
        """Sum of log scale: what the score in nats gains in the original coordinates."""
        return float(self.scale.log().sum())

    def restore(self, rows: Tensor) -> Tensor:
        """Maps standardised rows of shape (n, dim) to the original coordinates."""
        return rows * self.scale.to(rows) + self.mean.to(rows)

    def unscaled(self) -> Dataset:
        """The same rows in their original coordinates."""
        train, validation, test = (
            self.restore(part) for part in (self.train, self.validation, self.test)
        )
        mean, scale = torch.zeros_like(self.mean), torch.ones_like(self.scale)
        return replace(self, train=train, validation=validation, test=test, mean=mean, scale=scale)

    def fingerprint(self) -> str:
        """SHA-256 of all rows in order: equal fingerprints mean the same data, split alike."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


def make_dataset(
    name: str, rows: Tensor, *, seed: int, image_shape: tuple[int, int] | None = None
) -> Dataset:
    """Shuffles rows with a seed, splits them 8:1:1 and standardises them by the training rows.

    Args:
        name: Name for messages and reports.
        rows: Finite float64 rows of shape (n, dim) in their original coordinates.
        seed: Seed of the split.
        image_shape: Height and width if a row is an image.

    Returns:
        The split data.

    Raises:
        DataError: Fewer than ``MIN_ROWS`` rows, no column, or a column without variance.
    """
    if len(rows) < MIN_ROWS:
        raise DataError(
            f"{name}: {len(rows)} rows are too few for an 8:1:1 split; "
            f"at least {MIN_ROWS} are needed"
        )
    if rows.shape[1] == 0:
        raise DataError(f"{name}: the rows have no columns")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows = rows[order]
    tenth = len(rows) // 10
    train, validation, test = torch.split(rows, [len(rows) - 2 * tenth, tenth, tenth])
    mean, scale = train.mean(0), train.std(0)
    flat = (scale <= 1e-12 * (1 + mean.abs())).nonzero().flatten().tolist()
    if flat:
        raise DataError(
            f"{name}: column {flat[0] + 1} is constant over the training rows (value "
            f"{float(mean[flat[0]]):g}); a density has no finite maximum there. Remove the column"
        )
    return Dataset(
        name=name,
        train=(train - mean) / scale,
        validation=(validation - mean) / scale,
        test=(test - mean) / scale,
        mean=mean,
        scale=scale,
        image_shape=image_shape,
    )


def dequantised(levels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Grey levels with uniform noise added, in (0, 1).

    Their density then bounds the likelihood of the levels (Theis, van den Oord, Bethge, ICLR 2016,
    equation 3).

    Args:
        levels: Whole numbers below ``count``, of any shape.
        count: Number of grey levels.
        generator: Source of the noise.

    Example:
        >>> x = dequantised(torch.tensor([0, 3]), 4, torch.Generator().manual_seed(0))
        >>> (x * 4).floor().tolist()
        [0.0, 3.0]
    """
    noise = torch.rand(levels.shape, generator=generator, dtype=torch.float64)
    return (levels + noise) / count
