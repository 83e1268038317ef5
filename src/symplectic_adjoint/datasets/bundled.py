"""Real data that ships with scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor

from symplectic_adjoint._extras import require


def digits(seed: int) -> Tensor:
    """The 1797 handwritten digits of 8 x 8 pixels, dequantised to (0, 1).

    A pixel is an integer from 0 to 16. Adding uniform noise from [0, 1) makes the likelihood of the
    integers bounded by the density (Theis, van den Oord, Bethge, ICLR 2016, equation 3).

    Args:
        seed: Seed of the dequantisation noise.

    Returns:
        float64 rows of shape (1797, 64).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    pixels = torch.from_numpy(require("sklearn.datasets").load_digits().data).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(pixels.shape, generator=generator, dtype=torch.float64)
    return (pixels + noise) / 17


def breast_cancer() -> Tensor:
    """The Wisconsin diagnostic measurements, float64 rows of shape (569, 30).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    table = require("sklearn.datasets").load_breast_cancer().data
    return torch.from_numpy(table).to(torch.float64)
