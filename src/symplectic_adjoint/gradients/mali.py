"""Memory-efficient asynchronous leapfrog integration: nothing stored, every step inverted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from symplectic_adjoint.gradients._base import Counts, Record, Strategy, Sweep, stagewise
from symplectic_adjoint.loop import SolveShape
from symplectic_adjoint.steppers import Stepper
from symplectic_adjoint.steppers._base import Saved
from symplectic_adjoint.steppers.alf import ALF


@dataclass(frozen=True)
class MALI(Strategy):
    """Keeps the last state alone and inverts the asynchronous leapfrog step by step.

    Zhuang et al. 2021, "MALI: a memory efficient and reverse accurate integrator for neural ODEs",
    arXiv 2102.04668, algorithm 4. Exact up to the rounding of the inversion, which grows with the
    number of steps. Works with ``method="alf"``.
    """

    name = "mali"
    method = "alf"

    def keep(self, stepper: Stepper, n: int, step: Any) -> Record:
        return Record(Saved((), stepper.save(step, stages=False).tokens))

    def reverse(self, sweep: Sweep) -> Tensor:
        stepper = sweep.stepper
        assert isinstance(stepper, ALF)

        def step_at(n: int, end: Any) -> Any:
            tokens = sweep.records[n].saved.tokens
            return stepper.invert(sweep.nodes[n], end, tokens[1] if tokens else None)

        return stagewise(sweep, step_at)

    def counts(self, stepper: Stepper, shape: SolveShape) -> Counts:
        """Each stage once: the evaluation that inverts a step is the one pulled back."""
        stages = shape.stages(stepper.work)
        return Counts(stages, stages)
