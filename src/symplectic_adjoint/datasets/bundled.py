"""Real data that ships with scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor

from symplectic_adjoint._extras import require
from symplectic_adjoint.datasets.base import dequantised

DIGITS_LEVELS = 17
"""Grey levels of a pixel of the digits."""


def digits(seed: int) -> Tensor:
    """The 1797 handwritten digits of 8 x 8 pixels, dequantised to (0, 1).

    A pixel is an integer from 0 to 16; see ``dequantised``.

    Args:
        seed: Seed of the dequantisation noise.

    Returns:
        float64 rows of shape (1797, 64).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    pixels = torch.from_numpy(require("sklearn.datasets").load_digits().data).to(torch.float64)
    return dequantised(pixels, DIGITS_LEVELS, torch.Generator().manual_seed(seed))


def breast_cancer() -> Tensor:
    """The Wisconsin diagnostic measurements, float64 rows of shape (569, 30).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    table = require("sklearn.datasets").load_breast_cancer().data
    return torch.from_numpy(table).to(torch.float64)
