"""Plain autograd through the whole solve."""

from __future__ import annotations

from dataclasses import dataclass

from symplectic_adjoint.gradients._base import Strategy


@dataclass(frozen=True)
class Backprop(Strategy):
    """Autograd through every operation of the solver: the reference, and the most memory."""

    name = "backprop"
