"""One checkpoint a step: adaptive checkpoint adjoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from symplectic_adjoint.gradients._base import Counts, Record, Strategy, Sweep, segments
from symplectic_adjoint.loop import SolveShape
from symplectic_adjoint.steppers import Stepper


@dataclass(frozen=True)
class ACA(Strategy):
    """Keeps the state at each step, and replays one step at a time under autograd.

    Zhuang et al. 2020, "Adaptive checkpoint adjoint method for gradient estimation in neural ODE",
    arXiv 2006.02493, algorithm 2.
    """

    name = "aca"
    keeps = "states"

    def keep(self, stepper: Stepper, n: int, step: Any) -> Record:
        return Record(stepper.save(step, stages=False))

    def reverse(self, sweep: Sweep) -> Tensor:
        return segments(sweep, 1)

    def counts(self, stepper: Stepper, shape: SolveShape) -> Counts:
        """Each stage once; a node that dense outputs weigh, in the step after it once more."""
        work = stepper.work
        stages = shape.stages(work)
        if work.dense_node:
            stages += work.node * (shape.dense - shape.dense_ends)
        return Counts(stages, stages)
