"""One checkpoint for the whole solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from symplectic_adjoint.gradients._base import Counts, Record, Strategy, Sweep, segments
from symplectic_adjoint.loop import SolveShape
from symplectic_adjoint.steppers import Stepper
from symplectic_adjoint.steppers._base import Saved


@dataclass(frozen=True)
class Checkpoint(Strategy):
    """Keeps ``y0`` and the accepted grid; the backward pass replays the solve under autograd."""

    name = "checkpoint"
    keeps = "start"

    def keep(self, stepper: Stepper, n: int, step: Any) -> Record:
        return Record(Saved((), stepper.save(step, stages=False).tokens))

    def reverse(self, sweep: Sweep) -> Tensor:
        return segments(sweep, max(len(sweep.outputs), 1))

    def counts(self, stepper: Stepper, shape: SolveShape) -> Counts:
        """Each stage once."""
        stages = shape.stages(stepper.work)
        return Counts(stages, stages)
