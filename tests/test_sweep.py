"""The runner of studies: every cell once, whatever happens in between."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from symplectic_adjoint._errors import StepUnderflowError
from symplectic_adjoint.experiments.compare import RunInterruptedError
from symplectic_adjoint.experiments.config import ConfigError
from symplectic_adjoint.experiments.files import RunFolderError, read_json
from symplectic_adjoint.experiments.pages import Page, Section, Table
from symplectic_adjoint.experiments.sweep import Cell, Outcome, Record, Sweep, Work
from symplectic_adjoint.experiments.train import TrainingError
from tests import markdown


class Walk:
    """A training whose every iteration depends on the one before."""

    steps = 0

    def __init__(self, seed: int, length: int, pause: float = 0.0) -> None:
        self.length = length
        self.pause = pause
        self.path = [torch.tensor(float(seed), dtype=torch.float64)]

    @property
    def iteration(self) -> int:
        return len(self.path) - 1

    @property
    def finished(self) -> bool:
        return self.iteration >= self.length

    def step(self) -> None:
        time.sleep(self.pause)
        Walk.steps += 1
        self.path.append(torch.sin(1e3 * self.path[-1]) + self.iteration)

    def state(self) -> dict[str, Any]:
        return {"path": self.path}

    def restore(self, state: dict[str, Any]) -> None:
        self.path = state["path"]


class Walks:
    """A study of four walks, one of which fails."""

    name = "walks"

    def __init__(self, length: int = 6, pause: float = 0.0) -> None:
        self.length = length
        self.pause = pause
        self.ran: list[str] = []

    def settings(self) -> dict[str, Any]:
        return {"length": self.length}

    def cells(self) -> Sequence[Cell]:
        return [Cell(f"walk-{seed}", {"seed": seed}) for seed in range(1, 5)]

    def run(self, cell: Cell, work: Work) -> Outcome:
        self.ran.append(cell.name)
        if cell.name == "walk-3":
            raise StepUnderflowError("the step size vanishes")
        walk = Walk(cell.settings["seed"], self.length, self.pause)
        work.train(walk, every=2)
        return Outcome({"end": float(walk.path[-1])}, {"seconds": time.perf_counter()})

    def page(self, records: Mapping[str, Record]) -> Page:
        rows = [(name, r.status, r.result and r.result["end"]) for name, r in records.items()]
        table = Table("ends", "Where walks end", ("walk", "status", "end"), rows, ("A note.",))
        figure = Figure()
        figure.subplots().plot([r[2] or 0.0 for r in rows])
        section = Section("Ends", "Walks end.", ["Most do."], [table], {"ends": (figure, "Ends")})
        return Page("Walks", "Four walks.", [section])


class Silent:
    def measuring(self, done: int, total: int, what: str) -> None:
        pass


def started(path: Path, study: Walks | None = None) -> Sweep:
    sweep = Sweep(study or Walks(), path)
    sweep.prepare(resume=False, overwrite=False)
    return sweep


def resumed(path: Path, study: Walks | None = None) -> Sweep:
    sweep = Sweep(study or Walks(), path)
    sweep.prepare(resume=True, overwrite=False)
    return sweep


def results(path: Path) -> dict[str, Any]:
    found = [read_json(file) for file in sorted((path / "cells").iterdir())]
    return {record["name"]: (record["status"], record["result"]) for record in found}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("straight") / "run"
    started(path).run(Silent())
    return path


@pytest.mark.parametrize("stops", [[0], [3, 2], [1, 5, 9]])
def test_a_stopped_sweep_continues_bit_for_bit(
    straight: Path, tmp_path: Path, stops: list[int]
) -> None:
    started(tmp_path)
    Walk.steps = 0
    for calls in stops:
        counter = itertools.count()
        with pytest.raises(RunInterruptedError):
            resumed(tmp_path).run(Silent(), lambda c=counter, n=calls: next(c) >= n)
    resumed(tmp_path).run(Silent())
    assert results(tmp_path) == results(straight)
    assert Walk.steps == 3 * 6, "an iteration was lost, or done twice"
    assert list(tmp_path.glob("checkpoints/*")) == []


def test_a_finished_cell_is_never_run_again(straight: Path) -> None:
    study = Walks()
    resumed(straight, study).run(Silent())
    assert study.ran == []


def test_a_failure_is_a_finding_with_its_kind_and_its_words(straight: Path) -> None:
    record = read_json(straight / "cells" / "walk-3.json")
    assert record["status"] == "step underflow"
    assert record["message"] == "the step size vanishes"
    assert record["result"] is None


def test_a_loss_that_is_not_finite_is_a_finding_too(tmp_path: Path) -> None:
    class Diverging(Walks):
        def run(self, cell: Cell, work: Work) -> Outcome:
            raise TrainingError("the loss is nan")

    records = started(tmp_path, Diverging()).run(Silent())
    assert {record.status for record in records.values()} == {"non-finite loss"}


def test_a_mistake_in_a_study_is_no_finding(tmp_path: Path) -> None:
    class Wrong(Walks):
        def run(self, cell: Cell, work: Work) -> Outcome:
            raise KeyError("seed")

    with pytest.raises(KeyError):
        started(tmp_path, Wrong()).run(Silent())
    assert not (tmp_path / "cells").exists()


def test_other_settings_are_refused_by_name(straight: Path) -> None:
    with pytest.raises(ConfigError, match="length=7 differs from the stopped run's 6"):
        resumed(straight, Walks(length=7))
    with pytest.raises(RunFolderError, match="holds a run; continue it with --resume"):
        started(straight)


def test_a_run_of_another_study_is_not_replaced(straight: Path) -> None:
    class Others(Walks):
        name = "others"

    sweep = Sweep(Others(), straight)
    with pytest.raises(RunFolderError, match="not from a run"):
        sweep.prepare(resume=False, overwrite=True)
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        sweep.prepare(resume=True, overwrite=False)


def test_the_report_holds_the_claim_the_finding_the_table_and_the_machine(straight: Path) -> None:
    report = straight / "report"
    page = (report / "index.md").read_text()
    for text in ("Walks end.", "Most do.", "| walk | status | end |", "| walk-3 | step underflow"):
        assert text in page
    assert f"- torch: {torch.__version__}" in page
    table = json.loads((report / "ends.json").read_text())
    assert table["rows"][2] == {"walk": "walk-3", "status": "step underflow", "end": None}
    assert (report / "ends.md").read_text().startswith("| walk | status | end |")
    assert (report / "ends.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (report / "ends.svg").read_bytes()


def test_a_killed_sweep_continues_bit_for_bit_and_loses_no_cell(
    straight: Path, tmp_path: Path
) -> None:
    """The process is killed in the middle of the second cell, without a chance to clean up."""
    code = (
        "import sys; from pathlib import Path; from tests.test_sweep import *\n"
        "started(Path(sys.argv[1]), Walks(pause=0.2)).run(Silent())"
    )
    path = os.pathsep.join([str(markdown.ROOT), os.environ.get("PYTHONPATH", "")])
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], env={**os.environ, "PYTHONPATH": path}
    )
    checkpoint = run / "checkpoints" / "walk-2.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    written = (run / "cells" / "walk-1.json").read_bytes()
    assert not (run / "cells" / "walk-2.json").exists()
    study = Walks()
    resumed(run, study).run(Silent())
    assert study.ran == ["walk-2", "walk-3", "walk-4"]
    assert (run / "cells" / "walk-1.json").read_bytes() == written
    assert results(run) == results(straight)
