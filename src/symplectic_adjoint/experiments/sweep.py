"""A study is a grid of independent cells; here they are run, each of them once, whatever happens.

A finished cell is a file that was written at once. A process that is killed loses at most the
iterations since the last checkpoint of the cell in progress, and continues bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from symplectic_adjoint._errors import SolveError
from symplectic_adjoint.experiments.compare import RunInterruptedError
from symplectic_adjoint.experiments.config import ConfigError
from symplectic_adjoint.experiments.files import (
    Folder,
    line,
    read_json,
    read_state,
    write_bytes,
    write_json,
    write_state,
)
from symplectic_adjoint.experiments.pages import Page, write_page
from symplectic_adjoint.experiments.parallel import ALONE, World
from symplectic_adjoint.experiments.plots import style
from symplectic_adjoint.experiments.results import environment
from symplectic_adjoint.experiments.train import TrainingError

OK = "ok"
DIVERGED = "non-finite loss"


@dataclass(frozen=True)
class Cell:
    """One unit of work, whose outcome depends on its settings alone.

    Attributes:
        name: Name of its file, once in a study.
        settings: What makes it, as values of JSON.
        together: Whether all processes of ``torchrun`` train it together; the first of them alone
            runs the others.
    """

    name: str
    settings: Mapping[str, Any]
    together: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a cell found.

    Attributes:
        result: Figures that are the same, to the last bit, whenever the cell is run.
        timing: Figures that are not.
    """

    result: Mapping[str, Any]
    timing: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A finished cell.

    Attributes:
        name: Name of the cell.
        settings: Its settings.
        status: "ok", or how it failed: the status of the solve, or "non-finite loss".
        message: What the error said; None if it did not fail.
        result: See ``Outcome``; None if it failed.
        timing: See ``Outcome``; with the seconds that the cell took, "total" and,
            of the processor, "cpu".
    """

    name: str
    settings: Mapping[str, Any]
    status: str
    message: str | None
    result: Mapping[str, Any] | None
    timing: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A finished run of a study: all that its page is made of.

    Attributes:
        study: Name of the study.
        settings: Its settings.
        machine: Versions and machine.
        records: The records by name of their cell.
    """

    study: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    records: Mapping[str, Record]

    def on(self, page: Page) -> Page:
        """A page of this run, with what it took."""
        timings = [record.timing for record in self.records.values()]
        return page.on(self.machine, *(sum(t[k] for t in timings) for k in ("total", "cpu")))

    def write(self, path: Path) -> None:
        """Writes a file of JSON, one record a line."""
        head = {"study": self.study, "settings": self.settings, "machine": self.machine}
        lines = [f"{line(name)}: {line(value)}" for name, value in head.items()]
        records = ",\n".join(line(asdict(record)) for record in self.records.values())
        text = "{\n" + ",\n".join([*lines, f'"records": [\n{records}\n]']) + "\n}\n"
        write_bytes(path, text.encode())

    @classmethod
    def read(cls, path: Path) -> Run:
        """Reads what ``write`` wrote."""
        found = read_json(path)
        records = [Record(**record) for record in found.pop("records")]
        return cls(**found, records={record.name: record for record in records})


class Study(Protocol):
    """An experiment of the paper: what is run, cell by cell, and what is said of it.

    To add a study, write a class with these members and a command of the group ``reproduce`` that
    calls ``run_study`` with it.
    """

    @property
    def name(self) -> str:
        """Name of the command."""

    def settings(self) -> dict[str, Any]:
        """What tells one run of the study from another, as values of JSON."""

    def cells(self) -> Sequence[Cell]:
        """The cells, in the order in which they are run."""

    def run(self, cell: Cell, work: Work) -> Outcome:
        """Runs one cell.

        Raises:
            SolveError: A finding as good as any other, recorded as such.
            TrainingError: Likewise.
        """

    def page(self, records: Mapping[str, Record]) -> Page:
        """Tables, figures and sentences made of the records, by name of their cell."""


class Session(Protocol):
    """A training that can be stopped after any iteration and restored bit for bit."""

    @property
    def iteration(self) -> int:
        """Number of iterations done."""

    @property
    def finished(self) -> bool:
        """Whether every iteration is done."""

    def step(self) -> None:
        """Does one iteration."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, all that a continuation needs."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what ``state`` gave."""


class Observer(Protocol):
    """Whom a run tells of its progress."""

    def measuring(self, done: int, total: int, what: str) -> None:
        """So many of the cells are done, and the next is this."""


class Work:
    """What a cell at work may ask of its runner.

    Args:
        checkpoint: Where the state of its training is kept.
        world: The processes that train it.
        tell: Is told how far it is.
        should_stop: Asked between iterations whether to save and stop.
    """

    def __init__(
        self,
        checkpoint: Path,
        world: World = ALONE,
        tell: Callable[[str], None] = lambda note: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.world = world
        self._checkpoint = checkpoint
        self._tell = tell
        self._should_stop = should_stop

    def train(self, session: Session, every: int) -> None:
        """Does the iterations that an earlier process has not done.

        Args:
            session: The training.
            every: Iterations between checkpoints.

        Raises:
            RunInterruptedError: The run was asked to stop; the state is saved.
        """
        state = read_state(self._checkpoint) if self._checkpoint.exists() else None
        if (state := self.world.agree(state)) is not None:
            session.restore(state)
        while not session.finished:
            if self.world.total(float(self._should_stop())):
                self._save(session)
                raise RunInterruptedError
            session.step()
            if session.iteration % every == 0 and not session.finished:
                self._save(session)

    def _save(self, session: Session) -> None:
        if self.world.first:
            write_state(self._checkpoint, session.state())
            self._tell(f"iteration {session.iteration}")


class Sweep:
    """One run of a study in one folder.

    Args:
        study: The study.
        path: The folder.
        world: The processes that share the work; one of them writes.
        report: Folder of the page; without, one inside.
    """

    def __init__(
        self, study: Study, path: Path, world: World = ALONE, report: Path | None = None
    ) -> None:
        self.study = study
        self.world = world
        self.folder = Folder(
            path,
            kind=f"symplectic-adjoint reproduce {study.name}",
            folders=("cells", "checkpoints", "report"),
        )
        self.report = report or path / "report"

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Starts the folder, or makes sure that it holds a run of this study to continue.

        Raises:
            RunFolderError: The folder cannot be used as asked.
            ConfigError: The stopped run has other settings.
        """
        settings = self.study.settings()
        if not resume:
            if self.world.first:
                self.folder.start(overwrite=overwrite)
                write_json(
                    self.folder.config,
                    {
                        "kind": self.folder.kind,
                        "settings": settings,
                        "environment": environment(),
                        "processes": self.world.size,
                    },
                )
            return
        self.folder.check_run()
        stored = read_json(self.folder.config)
        for name, value in settings.items():
            if (before := stored["settings"].get(name)) != value:
                raise ConfigError(
                    f"{name}={value!r} differs from the stopped run's {before!r}; give what that "
                    "run was given, or start a new one in another folder"
                )
        # How sums are split, among threads and processes, decides their last bits.
        torch.set_num_threads(stored["environment"]["threads"])
        if (size := stored["processes"]) != self.world.size:
            raise ConfigError(
                f"the stopped run had {size} processes, not {self.world.size}; the last bits of "
                f"its results depend on that. Continue with torchrun --nproc-per-node {size}"
            )

    def run(
        self, observer: Observer, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Record]:
        """Runs the cells that are not finished, and writes the report.

        Raises:
            RunInterruptedError: ``should_stop`` said so; everything done so far is saved.
            RunFolderError: Another process is writing to the folder.
        """
        if not self.world.first:
            self._run_cells(observer, should_stop)
            return {}
        with self.folder.lock():
            self._run_cells(observer, should_stop)
            run = self.finished()
            with style():  # of figures, as they are drawn and as they are written
                write_page(run.on(self.study.page(run.records)), self.report)
        return dict(run.records)

    def finished(self) -> Run:
        """The run, when every cell of it is there."""
        stored = read_json(self.folder.config)
        return Run(
            self.study.name,
            stored["settings"],
            stored["environment"] | {"processes": stored["processes"]},
            {cell.name: self.record(cell) for cell in self.study.cells()},
        )

    def record(self, cell: Cell) -> Record:
        """A finished cell."""
        return Record(**read_json(self._file(cell)))

    def _run_cells(self, observer: Observer, should_stop: Callable[[], bool]) -> None:
        cells = self.study.cells()
        finished = self.world.agree([self._file(cell).exists() for cell in cells])
        done = sum(finished)
        for cell, skip in zip(cells, finished, strict=True):
            if skip:
                continue
            if self.world.total(float(should_stop())):
                raise RunInterruptedError
            if cell.together or self.world.first:
                observer.measuring(done, len(cells), cell.name)
                self._run(cell, self._work(cell, observer, (done, len(cells)), should_stop))
            done += 1
        observer.measuring(len(cells), len(cells), "report")

    def _work(
        self,
        cell: Cell,
        observer: Observer,
        progress: tuple[int, int],
        should_stop: Callable[[], bool],
    ) -> Work:
        return Work(
            self._checkpoint(cell),
            self.world if cell.together else ALONE,
            lambda note: observer.measuring(*progress, f"{cell.name}, {note}"),
            should_stop,
        )

    def _run(self, cell: Cell, work: Work) -> None:
        begin, cpu = time.perf_counter(), time.process_time()
        status, message, outcome = OK, None, Outcome({})
        try:
            outcome = self.study.run(cell, work)
        except (SolveError, TrainingError) as error:
            if work.world.size > 1:
                raise  # it may be this process's alone, and then the others wait for it
            status = error.status.value if isinstance(error, SolveError) else DIVERGED
            message = str(error)
        if not self.world.first:
            return
        took = {"total": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
        record = Record(
            cell.name,
            dict(cell.settings),
            status,
            message,
            dict(outcome.result) or None,
            {**outcome.timing, **took},
        )
        write_json(self._file(cell), asdict(record))
        self._checkpoint(cell).unlink(missing_ok=True)

    def _file(self, cell: Cell) -> Path:
        return self.folder.path / "cells" / f"{cell.name}.json"

    def _checkpoint(self, cell: Cell) -> Path:
        return self.folder.path / "checkpoints" / f"{cell.name}.pt"
