"""The symplectic adjoint method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.accumulate import Compensated, Float64, InPlace
from symplectic_adjoint.capture import Capture
from symplectic_adjoint.field import DetachedField, LeafField
from symplectic_adjoint.gradients._base import Counts, Keeps, Record, Strategy, Sweep, stagewise
from symplectic_adjoint.loop import SolveShape
from symplectic_adjoint.steppers import ImplicitRK, Stepper

_STORES = ("steps", "stages", "graph")
_SUMS: dict[str, type[InPlace]] = {
    "inplace": InPlace,
    "float64": Float64,
    "compensated": Compensated,
}


@dataclass(frozen=True)
class Symplectic(Strategy):
    """Transposes each step stage by stage, with one network evaluation on the tape at a time.

    Matsubara, Miyatake, Yaguchi 2021, arXiv 2102.09750, algorithms 1 and 2; 2024, doi
    10.1109/TNNLS.2023.3242345.

    Attributes:
        store: ``"steps"`` keeps the state at each step, as in the paper, and computes the
            stages again; ``"stages"`` keeps the stages as well, which saves one evaluation a stage;
            ``"graph"`` keeps the autograd graph of every stage, which saves all evaluations and
            none of the memory.
        accumulate: How the parameters' gradients are summed over the stages: ``"inplace"`` in their
            own dtype; ``"float64"``; or ``"compensated"``, in their own dtype with the rounding
            errors carried along. The latter two cost one more copy of the parameters.

    Raises:
        UnknownNameError: ``store`` or ``accumulate`` is none of these.
    """

    store: Literal["steps", "stages", "graph"] = "stages"
    accumulate: Literal["inplace", "float64", "compensated"] = "inplace"
    name = "symplectic"

    def __post_init__(self) -> None:
        if self.store not in _STORES:
            raise UnknownNameError("store", self.store, _STORES)
        if self.accumulate not in _SUMS:
            raise UnknownNameError("accumulate", self.accumulate, _SUMS)

    @property
    def keeps(self) -> Keeps | None:  # type: ignore[override]
        if self.accumulate == "compensated":
            return None
        return "states" if self.store == "steps" else "points"

    def zeros(self, like: Tensor) -> Tensor:
        dtype = torch.float64 if self.accumulate == "float64" else like.dtype
        return torch.zeros_like(like, dtype=dtype)

    def check(self, stepper: Stepper) -> None:
        super().check(stepper)
        if self.store == "graph" and isinstance(stepper, ImplicitRK):
            raise ArgumentError(
                f"store='graph' keeps the one evaluation of each stage, but {stepper.name!r} finds "
                "its stages by many; use Symplectic(store='stages')"
            )

    def forward_field(
        self,
        func: Any,
        like: Tensor,
        aliases: Sequence[Tensor],
        capture: Capture | None,
        time: bool,
    ) -> DetachedField:
        if self.store == "graph":
            return LeafField(func, like, aliases, capture, time)
        return DetachedField(func, like, aliases, capture)

    def sums(self, aliases: Sequence[Tensor]) -> InPlace:
        return _SUMS[self.accumulate](aliases)

    def keep(self, stepper: Stepper, n: int, step: Any) -> Record:
        saved = stepper.save(step, stages=self.store != "steps")
        if self.store != "graph":
            return Record(saved)
        return Record(saved, [stage.graph for stage in stepper.stages(step)])

    def reverse(self, sweep: Sweep) -> Tensor:
        def step_at(n: int, end: Any) -> Any:
            record = sweep.records[n]
            dense = sweep.outputs[n].dense
            nodes = sweep.start(n), sweep.stop(n)
            if self.store == "steps":
                sweep.field.linearize(False)
            step = sweep.stepper.load(sweep.field, *nodes, record.saved, end, dense)
            if self.store == "steps":
                sweep.field.linearize(True)
            stages = sweep.stepper.stages(step)
            for stage in stages[1:]:
                stage.k = None  # has served to find the points, and is not needed any more
            for stage, graph in zip(stages, record.graphs, strict=False):
                stage.graph = stage.graph or graph
            record.graphs = ()
            return step

        return stagewise(sweep, step_at)

    def counts(self, stepper: Stepper, shape: SolveShape) -> Counts:
        """Each stage once; with ``store="steps"`` most of them once more, to find the next points.

        Graphs serve one backward pass; a second one evaluates each stage, as from stored stages.
        """
        work = stepper.work
        stages = shape.stages(work)
        if self.store == "graph":
            return Counts(0, stages)
        if self.store == "stages":
            return Counts(stages, stages)
        again = shape.accepted * work.points + shape.dense * work.dense_points + shape.further
        return Counts(stages + again + shape.dense_ends * work.points_node, stages)
