"""Data for density estimation: real, simulated, or from the user's own file."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from symplectic_adjoint.datasets.base import Dataset, make_dataset
from symplectic_adjoint.datasets.benchmarks import BENCHMARKS, load_benchmark
from symplectic_adjoint.datasets.bundled import breast_cancer, digits
from symplectic_adjoint.datasets.errors import DataError, DataNotFoundError
from symplectic_adjoint.datasets.files import SUFFIXES, read_table
from symplectic_adjoint.datasets.standins import stand_in
from symplectic_adjoint.datasets.toy import SAMPLERS

__all__ = [
    "BENCHMARKS",
    "DataError",
    "DataNotFoundError",
    "Dataset",
    "load",
    "load_benchmark",
    "names",
    "stand_in",
]

TOY_ROWS = 10_000


def names() -> tuple[str, ...]:
    """Names that ``load`` knows besides paths of files."""
    return ("digits", "breast_cancer", *SAMPLERS)


def load(source: str, *, seed: int = 0) -> Dataset:
    """Loads a data set by name, or a table by the path of a .npy or .csv file.

    The same source and seed give the same rows in the same splits, on every machine.

    Args:
        source: One of ``names()``, or a path.
        seed: Seed of the split, of the dequantisation and of simulated rows.

    Returns:
        The rows, split 8:1:1 and standardised by the training rows.

    Raises:
        DataNotFoundError: Neither a known name nor an existing file.
        DataError: The table cannot be used; the message says why and where.
        MissingExtraError: The data need a package that is not installed.

    Example:
        >>> data = load("pinwheel", seed=1)
        >>> data.dim, tuple(data.train.shape)
        (2, (8000, 2))
    """
    if source == "digits":
        return make_dataset(source, digits(seed), seed=seed, image_shape=(8, 8))
    if source == "breast_cancer":
        return make_dataset(source, breast_cancer(), seed=seed)
    if source in SAMPLERS:
        rows = SAMPLERS[source](TOY_ROWS, torch.Generator().manual_seed(seed))
        return make_dataset(source, rows, seed=seed)
    path = Path(source).expanduser()
    if not path.exists() and path.suffix.lower() not in SUFFIXES:
        near = difflib.get_close_matches(source, names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataNotFoundError(
            f"no data set and no file is called {source!r}; {hint}"
            f"Known: {', '.join(names())}, or the path of a {' or '.join(SUFFIXES)} file"
        )
    return make_dataset(source, read_table(path), seed=seed)
