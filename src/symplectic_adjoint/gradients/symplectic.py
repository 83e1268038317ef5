"""The symplectic adjoint method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.accumulate import Compensated, Float64, InPlace
from symplectic_adjoint.capture import Capture
from symplectic_adjoint.checkpoints import Device, Host, JobFolder, Place
from symplectic_adjoint.checkpoints.actions import What
from symplectic_adjoint.checkpoints.schedules import All, Spill, Thinning
from symplectic_adjoint.field import DetachedField, LeafField
from symplectic_adjoint.gradients._base import Counts, Keeps, Record, Strategy, Sweep, stagewise
from symplectic_adjoint.gradients._budget import Budget, parsed, settle_logarithm, settle_nothing
from symplectic_adjoint.gradients._ledger import Ledger
from symplectic_adjoint.loop import SolveShape
from symplectic_adjoint.steppers import ImplicitRK, Stepper
from symplectic_adjoint.steppers._base import Saved

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
            none of the memory. By default the stages; under a budget or ``memory="fastest"`` the
            graph, where the method has one to keep and it may lie on the state's device.
        accumulate: How the parameters' gradients are summed over the stages: ``"inplace"`` in their
            own dtype; ``"float64"``; or ``"compensated"``, in their own dtype with the rounding
            errors carried along. The latter two hold several copies of the parameters at a time.
        memory: How much memory the solve and its backward pass may take, beside one evaluation of
            the network: a number of bytes, or a size such as ``"512MiB"``. Of each step is kept the
            most that still fits, no more than ``store`` says; when the budget is used up while the
            solve is running, the oldest steps are reduced, from graphs to stages to states, and
            then the states are thinned. What is missing is computed again from the recorded times:
            the gradient stays the same. ``"auto"`` takes 0.8 of the memory that is free,
            ``"least"`` keeps about as many states as the logarithm of the number of steps,
            ``"fastest"`` and None keep what ``store`` says of every step. Compiled steps keep no
            graphs. The matrices of implicit methods come on top.
        place: Where what is kept lies: ``Device()``, ``Host()``, ``Disk(folder)`` or, inexactly,
            ``Rounded(dtype, place)``. With a budget that which does not fit goes there, and no step
            is thinned. By default everything lies on the state's device.
        folder: A ``JobFolder``, in which the solve and its backward pass are written down as they
            go: run again after their process has died, they continue to the same gradient.

    Raises:
        UnknownNameError: ``store``, ``accumulate`` or ``memory`` is none of these.
        ArgumentError: ``memory`` is no size, or ``folder`` no ``JobFolder``.

    Example:
        >>> import torch
        >>> import symplectic_adjoint as sa
        >>> y0 = torch.ones(1000, requires_grad=True)
        >>> grid = sa.FixedGrid(step_size=1e-3)
        >>> small = sa.Symplectic(memory="400KB")  # where 1000 steps have 4 MB of states
        >>> sol = sa.solve(lambda t, y: -y, y0, [0, 1], controller=grid, gradient=small)
        >>> (gradient,) = torch.autograd.grad(sol.y[-1].sum(), y0)
        >>> gradient[0], sol.stats.backward_retaken < 2000
        (tensor(0.3679), True)
    """

    store: Literal["steps", "stages", "graph"] | None = None
    accumulate: Literal["inplace", "float64", "compensated"] = "inplace"
    memory: int | str | None = None
    place: Place | None = None
    folder: JobFolder | None = None
    name = "symplectic"

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.place is None or self.place.exact

    @property
    def _limited(self) -> bool:
        """Whether steps are kept under a schedule."""
        limited = self.place is not None or parsed(self.memory) not in (None, "fastest")
        return limited or self.folder is not None

    @property
    def _store(self) -> str:
        return self.store or "stages"

    def fitted(self, stepper: Stepper) -> Symplectic:
        """Itself with the most that a method lets it keep, where it leaves that open."""
        if self.store is not None:
            return self
        held = self.place is None and self.folder is None and not isinstance(stepper, ImplicitRK)
        graphs = held and parsed(self.memory) not in (None, "least")
        return replace(self, store="graph" if graphs else "stages")

    def without_graphs(self) -> Symplectic:
        return replace(self, store="stages") if self.store == "graph" else self

    def __post_init__(self) -> None:
        parsed(self.memory)
        if self.store not in (None, *_STORES):
            raise UnknownNameError("store", self.store, _STORES)
        if self.accumulate not in _SUMS:
            raise UnknownNameError("accumulate", self.accumulate, _SUMS)
        if not isinstance(self.folder, JobFolder | None):
            raise ArgumentError(f"folder must be a JobFolder, JobFolder({self.folder!r})")

    @property
    def keeps(self) -> Keeps | None:  # type: ignore[override]
        if self.accumulate == "compensated":
            return None
        if self._limited:
            return "schedule"
        kept: dict[str, Keeps] = {"steps": "states", "stages": "points", "graph": "residuals"}
        return kept[self._store]

    def zeros(self, like: Tensor) -> Tensor:
        dtype = torch.float64 if self.accumulate == "float64" else like.dtype
        return torch.zeros_like(like, dtype=dtype)

    def check(self, stepper: Stepper) -> None:
        if not self.exact:  # a rounded place cannot do without a transpose, either
            replace(self, place=None).check(stepper)
        super().check(stepper)
        if self.folder is not None and not self.exact:
            raise ArgumentError(
                f"what place={self.place!r} has rounded cannot be found again by a process that "
                "goes on with a job; leave place= or folder= out"
            )
        if self.store == "graph" and isinstance(stepper, ImplicitRK):
            raise ArgumentError(
                f"store='graph' keeps the one evaluation of each stage, but {stepper.name!r} finds "
                "its stages by many; use Symplectic(store='stages')"
            )
        if self.store == "graph" and (self.place is not None or self.memory == "least"):
            raise ArgumentError(
                "place= and memory='least' keep states and stages, no graphs; use store='stages' "
                "with them"
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

    def ledger(
        self, stepper: Stepper, y0: Tensor, outputs: int, sums: Sequence[Tensor], steps: int = 0
    ) -> Ledger | None:
        if not self._limited:
            return None
        memory = parsed(self.memory)
        ahead = 0 if self.place is None else self.place.ahead
        settle = settle_logarithm if memory == "least" else settle_nothing
        if memory == "auto" or isinstance(memory, int):
            copies = 1 if self.accumulate == "inplace" else 3
            sums = list(sums) * copies
            settle = Budget.of(memory, stepper, y0, outputs, sums, ahead, steps).settle
            if isinstance(self.place, Host) and y0.device.type == "cpu":
                raise ArgumentError(
                    "place=Host() is the memory in which a solve on the CPU works, so that a "
                    "budget could not limit it; use place=Disk(folder), or leave memory= out"
                )
        most = What(_STORES.index(self._store))
        if self.place is None:
            return Ledger(stepper, Thinning(math.inf), [Device().open()], most, settle)
        stores = [Device().open(), self.place.open()]
        return Ledger(stepper, Spill(All(most), 0), stores, most, settle)

    def sums(self, aliases: Sequence[Tensor]) -> InPlace:
        return _SUMS[self.accumulate](aliases)

    def keep(self, stepper: Stepper, n: int, step: Any) -> Record:
        saved = stepper.save(step, stages=self._store != "steps")
        if self.store != "graph":
            return Record(saved)
        return Record(saved, [stage.graph for stage in stepper.stages(step)])

    def reverse(self, sweep: Sweep) -> Tensor:
        def load(n: int, saved: Saved, end: Any) -> Any:
            dense = sweep.outputs[n].dense
            nodes = sweep.start(n), sweep.stop(n)
            evaluates = self.store == "steps" or sweep.ledger is not None
            if evaluates:
                sweep.field.linearize(False)
            step = sweep.stepper.load(sweep.field, *nodes, saved, end, dense)
            if evaluates:
                sweep.field.linearize(True)
            for stage in sweep.stepper.stages(step)[1:]:
                stage.k = None  # has served to find the points, and is not needed any more
            return step

        def step_at(n: int, end: Any) -> Any:
            record = sweep.records[n]
            step = load(n, record.saved, end)
            for stage, graph in zip(sweep.stepper.stages(step), record.graphs, strict=False):
                stage.graph = stage.graph or graph
            record.graphs = ()
            return step

        if sweep.ledger is None:
            return stagewise(sweep, step_at)
        steps = sweep.ledger.reversing(sweep, load)
        next(steps)
        return stagewise(sweep, lambda n, end: steps.send(end))

    def counts(self, stepper: Stepper, shape: SolveShape) -> Counts:
        """Each stage once; with ``store="steps"`` most of them once more, to find the next points.

        Graphs serve one backward pass; a second one evaluates each stage, as from stored stages.
        """
        work = stepper.work
        stages = shape.stages(work)
        if self.store == "graph":
            return Counts(0, stages)
        if self._store == "stages":
            return Counts(stages, stages)
        again = shape.accepted * work.points + shape.dense * work.dense_points + shape.further
        return Counts(stages + again + shape.dense_ends * work.points_node, stages)
