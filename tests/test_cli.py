"""The command line: what it prints, how it exits, and that nothing stops it from being resumed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from symplectic_adjoint.experiments import files
from symplectic_adjoint.experiments.commands import app
from symplectic_adjoint.experiments.compare import Comparison
from symplectic_adjoint.experiments.config import CompareConfig
from symplectic_adjoint.experiments.console import print_results
from symplectic_adjoint.experiments.files import RunFolder
from symplectic_adjoint.experiments.measure import Cost
from symplectic_adjoint.experiments.results import (
    DataSummary,
    Results,
    StrategyResult,
    version,
)
from symplectic_adjoint.experiments.train import History

TINY = (
    *("--strategies", "backprop,symplectic", "--rtol", "1e-3", "--atol", "1e-3"),
    *("--blocks", "1", "--hidden", "8", "--batch-size", "32", "--sweep", "1e-2"),
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Resuming sets the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("symplectic_adjoint.experiments.compare.figures", lambda *_: {})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "table.npy"
    np.save(path, np.random.default_rng(0).normal(size=(120, 2)))
    return str(path)


def _run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def _state(folder: RunFolder, strategy: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = files.read_state(folder.checkpoint(strategy))["model"]
    return state


def _start(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "symplectic_adjoint.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_compare_trains_prints_the_table_and_writes_the_report(table: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, stdout, stderr = _run("compare", "--data", table, "--iterations", 3, *TINY, "--out", out)
    assert code == 0
    assert "symplectic" in stdout
    assert "test NLL" in stdout
    assert f"Report: {out / 'report.html'}" in stdout
    assert "backprop    3/3 NLL" in stderr
    assert (out / "report.html").exists()
    assert files.read_json(out / "results.json")["config"]["iterations"] == 3


def test_a_killed_and_an_interrupted_run_continue_bit_for_bit(table: str, tmp_path: Path) -> None:
    settings = ("--data", table, "--iterations", 30, "--checkpoint-every", 2, *TINY)
    straight, stopped = RunFolder(tmp_path / "straight"), RunFolder(tmp_path / "stopped")
    assert _run("compare", *settings, "--out", straight.path)[0] == 0

    killed = _start("compare", *settings, "--out", stopped.path)
    _wait_for(stopped.checkpoint("symplectic"), killed)
    killed.kill()
    killed.communicate()
    assert not stopped.results.exists()
    done = len(files.read_state(stopped.checkpoint("symplectic"))["history"]["nll"])
    assert 2 <= done < 30

    before = stopped.checkpoint("backprop").read_bytes()
    interrupted = _start("compare", "--resume", "--out", stopped.path)
    deadline = time.monotonic() + 120
    while stopped.checkpoint("backprop").read_bytes() == before and time.monotonic() < deadline:
        time.sleep(0.02)
    interrupted.send_signal(signal.SIGINT)
    _, stderr = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 130
    assert f"symplectic-adjoint compare --resume --out {stopped.path}" in stderr
    assert not stopped.results.exists()

    code, stdout, _ = _run("compare", "--resume", "--out", stopped.path)
    assert code == 0
    assert "Report:" in stdout
    for strategy in ("backprop", "symplectic"):
        expected, found = _state(straight, strategy), _state(stopped, strategy)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    results = [files.read_json(folder.results)["strategies"] for folder in (straight, stopped)]
    for ours, theirs in zip(*results, strict=True):
        assert ours["test_nll"] == theirs["test_nll"]
        assert ours["history"]["nll"] == theirs["history"]["nll"]
        assert ours["cost"] == theirs["cost"]


def test_an_existing_run_is_kept_replaced_or_resumed_as_told(table: str, tmp_path: Path) -> None:
    settings = ("compare", "--data", table, "--iterations", 1, *TINY, "--out", tmp_path)
    assert _run(*settings)[0] == 0
    written = (tmp_path / "results.json").stat().st_mtime_ns
    code, _, stderr = _run(*settings)
    assert code == 2
    assert "--resume" in stderr
    assert "--overwrite" in stderr
    assert (tmp_path / "results.json").stat().st_mtime_ns == written
    code, stdout, _ = _run("compare", "--resume", "--out", tmp_path)
    assert code == 0
    assert "symplectic" in stdout
    assert _run(*settings, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", 1), "--seed 1 differs from the stopped run's 0"),
        (("--hidden", "9"), "--hidden 9 differs from the stopped run's [8]"),
        (("--overwrite",), "--overwrite cannot be combined with --resume"),
        (("--epochs", 2), "--epochs cannot be combined with --resume"),
    ],
)
def test_a_resumed_run_keeps_its_settings(
    table: str, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    config = CompareConfig(data=table, hidden=(8,))
    Comparison.start(config, tmp_path)
    code, _, stderr = _run("compare", "--resume", "--out", tmp_path, *arguments)
    assert code == 2
    assert message in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "no/such/file.csv"), "no such file: no/such/file.csv"),
        (("--data", "digit"), "did you mean 'digits'?"),
        (("--strategies", "symplectik"), "did you mean 'symplectic'?"),
        (("--strategies", ","), "at least one strategy"),
        (("--method", "dopri"), "unknown method 'dopri'"),
        (("--hidden", "8,x"), "hidden='8,x' must be numbers separated by commas"),
        (("--rtol", 0), "rtol=0.0 must be positive"),
        (("--epochs", 1, "--iterations", 1), "give one"),
        (("--resume",), "holds no run to resume"),
    ],
)
def test_bad_arguments_exit_with_a_message_and_leave_no_folder(
    tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "run"
    code, stdout, stderr = _run("compare", *arguments, "--out", out)
    assert code == 2
    assert message in stderr
    assert stdout == ""
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_an_error_not_a_traceback(
    table: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    code, _, stderr = _run("compare", "--data", table, "--iterations", 1, *TINY, "--out", out)
    assert code == 1
    assert f"error: [Errno 20] Not a directory: '{out}'" in stderr


def test_a_run_without_a_single_result_fails(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from symplectic_adjoint.experiments.train import Session, TrainingError

    def fail(self: Session) -> None:
        raise TrainingError("the loss is nan [bold]")

    monkeypatch.setattr(Session, "step", fail)
    code, stdout, stderr = _run("compare", "--data", table, *TINY, "--out", tmp_path)
    assert code == 1
    assert "symplectic stopped early: the loss is nan [bold]" in stderr
    assert "symplectic stopped early: the loss is nan [bold]" in stdout


@pytest.mark.parametrize(("width", "tables"), [(130, 1), (80, 2)])
def test_a_table_too_wide_for_the_terminal_is_cut_in_two(width: int, tables: int) -> None:
    cost = Cost(1.2e-7, 3.4e-16, 28_000_000, 40, 36, 36, 6, 0)
    result = StrategyResult(
        *("symplectic-steps", "dopri5", False, True, None, 70.123, "exact", 0.123),
        *(cost, (), History()),
    )
    data = DataSummary("digits", (80, 10, 10), 2, "", 0.0, 3.0, None)
    results = Results(CompareConfig(), data, {}, "backprop", (result,))
    console = Console(width=width, record=True, file=io.StringIO())
    print_results(console, results)
    lines = console.export_text().splitlines()
    assert sum(line.strip().startswith("symplectic-steps") for line in lines) == tables
    assert all(len(line) <= width for line in lines)
    assert all(cell in "\n".join(lines) for cell in ("26.70 MiB", "70.123", "1.2e-07", "36"))


def test_help_lists_every_option() -> None:
    code, stdout, _ = _run("compare", "--help")
    assert code == 0
    for option in ("--data", "--strategies", "--rtol", "--trace", "--epochs", "--resume"):
        assert option in stdout


def test_the_version_is_printed() -> None:
    assert _run("--version")[1].strip() == version("symplectic-adjoint")


def test_a_missing_extra_is_named_with_its_command() -> None:
    code = "import sys; sys.modules['typer'] = None; from symplectic_adjoint import cli; cli.main()"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'symplectic-adjoint[cli]'" in result.stderr
    assert "Traceback" not in result.stderr
