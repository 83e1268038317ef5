"""Plain autograd through the whole solve."""

from __future__ import annotations

from dataclasses import dataclass

from symplectic_adjoint.gradients._base import Counts, Strategy
from symplectic_adjoint.loop import SolveShape
from symplectic_adjoint.steppers import Stepper


@dataclass(frozen=True)
class Backprop(Strategy):
    """Autograd through every operation of the solver: the reference, and the most memory."""

    name = "backprop"
    keeps = "residuals"

    def counts(self, stepper: Stepper, shape: SolveShape) -> Counts:
        """No evaluation: the graph holds all of them."""
        return Counts(0, shape.stages(stepper.work))
