"""How a solve and its backward pass are written to a job folder, and go on from there."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import (
    ArgumentError,
    CaptureError,
    SecondDerivativeError,
    StoreError,
)
from symplectic_adjoint.accumulate import InPlace
from symplectic_adjoint.checkpoints.folder import Entry, Journal
from symplectic_adjoint.controllers import Adaptive, FixedGrid
from symplectic_adjoint.field import Field, RandomState, Rediscovered, Stage
from symplectic_adjoint.gradients._identity import checksum, identity
from symplectic_adjoint.gradients._ledger import Ledger
from symplectic_adjoint.loop import OutputTimes, Run, Stats
from symplectic_adjoint.steppers._base import Cotangent, Saved, SlopeCotangent
from symplectic_adjoint.threads import limited

if TYPE_CHECKING:
    from symplectic_adjoint.gradients._job import Job

_COUNTED = ("accepted", "rejected", "further")
_EVALUATED = ("evaluations", "solver_evaluations", "solver_products", "products")

_RANDOM = (
    "func draws random numbers, which a process that goes on with a job could not draw again: "
    "leave folder= out, or let func take its noise from a tensor that is drawn before the solve"
)
_LATE = (
    "func depends on a tensor that only its use has shown, and not its first one: a process that "
    "goes on later would miss it. Pass it through args, or hold it in the module that is func, so "
    "that it is known from the start; or leave folder= out"
)


def check(job: Job) -> None:
    """Refuse what cannot go on in another process.

    Raises:
        ArgumentError: There is something of that kind.
    """
    refused = {
        "event=...": bool(job.events),
        "dense=True": job.keep_dense,
        "a gradient of t, of jump_t or of a grid": job.wants_time,
        "derivatives in forward mode": job.wants_tangent,
        f"controller={job.controller!r}": type(job.controller) not in (Adaptive, FixedGrid),
    }
    for what, present in refused.items():
        if present:
            raise ArgumentError(
                f"{what} cannot be written to a job folder; leave it out, or leave folder= out of "
                f"gradient={job.strategy!r}"
            )


def opened(job: Job, field: Field, ledger: Ledger | None) -> SolveLog | None:
    """The log of a solve, as far as its folder holds it already; None where there is no folder.

    Args:
        job: The solve.
        field: The field of its forward pass; ``f`` is evaluated once, to be told from another.
        ledger: Who keeps its steps, if a gradient is wanted.

    Raises:
        ArgumentError: The solve cannot go on in another process.
        OtherJobError: The folder holds another job.
        JobFolderError: The folder cannot be used.
        StoreError: It cannot be made or written.
    """
    if job.strategy.folder is None:
        return None
    check(job)
    drawn = RandomState(field.device)
    t0 = job.setting.starting(job.problem.times[0])
    with limited(job.threads):
        slope = field.evaluate(Stage(t0, job.problem.y0.detach()))
    if job.random or not drawn.same(RandomState(field.device)):
        raise ArgumentError(_RANDOM)
    accumulate = getattr(job.strategy, "accumulate", "")
    journal = job.strategy.folder.open(identity(job, slope, accumulate))
    try:
        return SolveLog(job, journal, field, ledger)
    except BaseException:
        journal.release()
        raise


@contextlib.contextmanager
def guarded(job: Job, log: SolveLog | None) -> Generator[None]:
    """Leave the folder to others on an exception, whose traceback may outlive the solve.

    Raises:
        ArgumentError: It was learned that ``func`` draws random numbers.
        CaptureError: It was learned late what ``func`` depends on.
    """
    try:
        yield
    except BaseException as error:
        if log is None:
            raise
        log.journal.release()
        if isinstance(error, Rediscovered):
            raise ArgumentError(_RANDOM) if job.random else CaptureError(_LATE) from None
        raise


class SolveLog:
    """Writes down a forward pass; what was written before is read when it is made.

    An entry holds what is new since the one before: step times, outputs, the states at jumps. Of
    all other states it holds the one that was reached, and nothing more: from these few, the ledger
    and the backward pass get at the others.
    """

    def __init__(self, job: Job, journal: Journal, field: Field, ledger: Ledger | None) -> None:
        self.journal = journal
        self.stepper, self.setting = job.stepper, job.setting
        self.t0, self.y0 = job.problem.times[0], job.problem.y0.detach()
        self.field, self.ledger = field, ledger
        self.stats = Stats()
        self.pace: Any = None
        self._forget()
        self._load()

    def _forget(self) -> None:
        # Steps and outputs that are in the folder, where y0 is an output; number of the next entry.
        self.steps, self.reached, self.number = 0, 1, 0
        # Of further steps: how many stages they took, where that varies, and the states at jumps.
        self.stages: list[int] = []
        self.ends: list[tuple[int, Sequence[Tensor]]] = []
        self.last: Entry | None = None  # until the solve goes on from it, as the next two
        self.nodes: list[Tensor] = []
        self.outputs: list[Tensor] = []

    # What was written ------------------------------------------------------------------------

    def _load(self) -> None:
        """Read the entries up to the first that is missing or damaged."""
        device = self.y0.device
        while (entry := self.journal.read("forward", self.number, device)) is not None:
            if self.ledger is not None:
                self._found(self.ledger, entry)
            self.nodes += _tensors(entry, "nodes")
            self.outputs += _tensors(entry, "outputs")
            self.steps, self.reached = entry.values["steps"], entry.values["reached"]
            self.number += 1
            self.last = entry
        for number in self.journal.numbers("forward"):
            if number >= self.number:
                self.journal.drop("forward", number)

    def _found(self, ledger: Ledger, entry: Entry) -> None:
        """Let the ledger know the state where an entry begins, and those at its jumps."""
        if self.last is None:
            # A step, taken to see how large what can be kept of one is.
            state = self.stepper.resume(self.setting.starting(self.t0), (self.y0,), None)
            t1 = self.setting.ending(float(_tensors(entry, "nodes")[0][0]))
            step = self.stepper.step(self.field, state, t1)
            self.sizes = ledger.sizes(step)
            tensors = [self.y0]
        else:
            tensors = _tensors(self.last, "state")
            if self.setting.cuts(self._t):
                tensors = tensors[:1]
        for n, count in enumerate(entry.values["stages"], start=self.steps):
            ledger.tokens[n] = (None,) * count
        ledger.found(self.steps, Saved(tensors, ledger.tokens.get(self.steps, ())), self.sizes)
        ends = iter(_tensors(entry, "ends"))
        for n, count in entry.values["ends"]:
            ledger.cut(n, Saved([next(ends) for _ in range(count)], (None,)))

    @property
    def _t(self) -> float:
        """The time that was reached."""
        return float(self.nodes[-1][-1])

    @property
    def _end(self) -> Any:
        """The state there."""
        assert self.last is not None
        return self.stepper.resume(self.setting.ending(self._t), _tensors(self.last, "state"), None)

    def resumed(self, first: Any, stats: Stats) -> Any:
        """The state from which to go on, ``first`` where nothing is in the folder."""
        self.stats = stats
        if self.last is None:
            return first
        counts = self.last.values["counts"]
        for name in _COUNTED:
            setattr(stats, name, counts[name])
        for name in _EVALUATED:
            setattr(self.field, name, getattr(self.field, name) + counts[name])
        stats.resumed = self.steps
        end = self._end
        if self.setting.cuts(self._t):
            return self.stepper.begin(self.setting.starting(self._t), end.y)
        return end

    def restore(self, run: Run, y: Tensor, times: OutputTimes) -> None:
        """Fill in the steps and the outputs that are in the folder."""
        if self.last is None:
            return
        for t in torch.cat(self.nodes).tolist():
            run.nodes.append(t)
            run.outputs.append(run.shared(times.take(t)))
        y[1 : self.reached] = torch.cat(self.outputs)
        run.end = self._end

    def attend(self, pace: Any) -> None:
        """Let the controller go on from what it knew."""
        self.pace = pace
        if self.last is not None:
            pace.restore(self.last.values["pace"])
        self.last, self.nodes, self.outputs = None, [], []

    # What is written -------------------------------------------------------------------------

    def note(self, run: Run, step: Any, y: Tensor, reached: int) -> None:
        """Write an entry, if it is time.

        Raises:
            StoreError: It cannot be written; those before are still there.
        """
        if self.stepper.work.varies:
            self.stages.append(len(self.stepper.stages(step)))
        if self.setting.cuts(run.nodes[-1]):
            self.ends.append((len(run.outputs) - 1, self.stepper.carried(run.end)))
        if self.journal.due():
            self._write(run, y, reached)

    def finish(self, run: Run) -> None:
        """Write what is missing; after an error, leave what is there to another attempt."""
        try:
            if run.error is None and len(run.outputs) > self.steps:
                self._write(run, run.y, len(run.y))
        except StoreError as error:
            run.error = error
        if run.error is not None or self.ledger is None:  # there will be no backward pass
            self.journal.release()

    def restart(self) -> None:
        """The solve begins again."""
        for number in self.journal.numbers("forward"):
            self.journal.drop("forward", number)
        self._forget()

    def _write(self, run: Run, y: Tensor, reached: int) -> None:
        steps = len(run.nodes) - 1
        values = {
            "steps": steps,
            "reached": reached,
            "pace": self.pace.saved(),
            "counts": {name: getattr(self.stats, name) for name in _COUNTED}
            | {name: getattr(self.field, name) for name in _EVALUATED},
            "stages": self.stages,
            "ends": [(n, len(tensors)) for n, tensors in self.ends],
        }
        tensors = {
            "nodes": [torch.tensor(run.nodes[self.steps + 1 :], dtype=torch.float64)],
            "outputs": [y[self.reached : reached]],
            "state": self.stepper.carried(run.end),
            "ends": [x for _, tensors in self.ends for x in tensors],
        }
        self.journal.write("forward", self.number, Entry(values, tensors))
        self.steps, self.reached, self.number = steps, reached, self.number + 1
        self.stages.clear()
        self.ends.clear()

    # The backward pass -----------------------------------------------------------------------

    def gradient(self, g: Tensor) -> list[Tensor | None] | None:
        """The gradient that the folder holds for the outputs' cotangent ``g``, if it does."""
        if torch._C._functorch.is_legacy_batchedtensor(g):
            plain(self)
        self.journal.acquire()
        entry = _latest(self.journal, _kind(g), g.device)
        if entry is None or "gradient" not in entry.tensors:
            return None
        self.journal.release()
        return list(entry.tensors["gradient"])

    def sweep(self, g: Tensor, nodes: Sequence[float], sums: InPlace) -> SweepWriter:
        """The log of the backward pass for ``g``, as far as the folder holds it.

        Args:
            g: The cotangent of the outputs.
            nodes: All step times.
            sums: The sums of the parameters' gradients, which go on, too.
        """
        return SweepWriter(self, g, nodes, sums)


class SweepWriter:
    """Writes down a backward pass. Each entry holds all of it, and the last two are kept."""

    def __init__(self, log: SolveLog, g: Tensor, nodes: Sequence[float], sums: InPlace) -> None:
        self.journal, self.kind = log.journal, _kind(g)
        self.stepper, self.setting = log.stepper, log.setting
        self.nodes, self.sums = nodes, sums
        self.entry = _latest(self.journal, self.kind, g.device)
        numbers = self.journal.numbers(self.kind)
        self.number = numbers[-1] + 1 if numbers else 0
        self._remaining: int | None = None
        if self.entry is not None:
            self._remaining = self.entry.values["remaining"]
            sums.restore(self.entry.tensors["sums"])

    def remaining(self) -> int | None:
        return self._remaining

    def begin(self) -> tuple[Any, Cotangent]:
        entry, self.entry = self.entry, None
        assert entry is not None
        y, k, *past = entry.tensors["cotangent"]
        assert y is not None
        t = self.setting.starting(self.nodes[entry.values["remaining"]])
        end = self.stepper.resume(t, _tensors(entry, "end"), None)
        return end, Cotangent(y, k, past=[SlopeCotangent(x) for x in past])

    def note(self, remaining: int, end: Any, cotangent: Cotangent) -> None:
        """Write an entry, if it is time.

        Raises:
            StoreError: It cannot be written; those before are still there.
        """
        if not self.journal.due():
            return
        tensors = {
            "end": self.stepper.carried(end),
            "cotangent": [cotangent.y, cotangent.k, *(slope.k for slope in cotangent.past)],
            "sums": self.sums.saved(),
        }
        self._write(Entry({"remaining": remaining}, tensors))

    def finish(self, gradient: Sequence[Tensor | None]) -> None:
        """Write the finished gradient.

        Raises:
            StoreError: It cannot be written.
        """
        self._write(Entry({}, {"gradient": gradient}))
        self.journal.release()

    def _write(self, entry: Entry) -> None:
        self.journal.write(self.kind, self.number, entry)
        self.journal.drop(self.kind, self.number - 2)
        self.number += 1


def plain(log: SolveLog | None) -> None:
    """Refuse a derivative that is not the first.

    Raises:
        SecondDerivativeError: The solve is written to a job folder.
    """
    if log is not None:
        raise SecondDerivativeError(
            "a job folder holds first derivatives only, and no batches of them: leave folder= out "
            "for create_graph=True, is_grads_batched=True and torch.func"
        )


def _kind(g: Tensor) -> str:
    """Under which name a backward pass is written down; another cotangent is another one."""
    return f"backward-{checksum(g)}"


def _latest(journal: Journal, kind: str, device: torch.device) -> Entry | None:
    """The last entry that is not damaged."""
    entries = (journal.read(kind, n, device) for n in reversed(journal.numbers(kind)))
    return next((entry for entry in entries if entry is not None), None)


def _tensors(entry: Entry, name: str) -> list[Tensor]:
    return [x for x in entry.tensors[name] if x is not None]
