"""Two processes, each with half of the batch, get the gradients of one with all of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import markdown, ranks

BOUND = 1e-12


def torchrun(*args: str) -> str:
    """What two processes print; they must not live long."""
    path = os.pathsep.join([str(markdown.ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            *args,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=markdown.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path: Path = tmp_path_factory.mktemp("ranks") / "figures.json"
    torchrun("-m", "tests.ranks", str(path))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert found.keys() == ranks.cases().keys()
    return found


def of(figures: dict[str, Any], kind: str) -> dict[str, Any]:
    chosen = {name: x for name, x in figures.items() if name.startswith(kind + " ")}
    assert chosen
    return chosen


@pytest.mark.xdist_group("torchrun")
def test_data_parallel_gradients_are_those_of_the_joined_batch(figures: dict[str, Any]) -> None:
    for name, found in of(figures, "parallel").items():
        assert found["error"] <= BOUND, name
        assert found["hooks"] == [found["iterations"]], f"{name}: not once per backward pass"


@pytest.mark.xdist_group("torchrun")
def test_gradients_accumulate_without_synchronisation(figures: dict[str, Any]) -> None:
    for name, found in of(figures, "accumulated").items():
        assert found["error"] <= BOUND, name
        assert found["apart"] > 1e-3, f"{name}: synchronised inside of no_sync"


@pytest.mark.xdist_group("torchrun")
def test_sharded_gradients_are_those_of_the_joined_batch(figures: dict[str, Any]) -> None:
    for name, found in of(figures, "sharded").items():
        assert found["error"] <= BOUND, name
        assert found["shards"] == "DTensor", name
        assert found["stepped"] <= BOUND, name


@pytest.mark.xdist_group("torchrun")
def test_what_a_sharded_field_cannot_do_is_said(figures: dict[str, Any]) -> None:
    found = of(figures, "refused")
    assert "mixed precision" in found["refused mixed precision"]["message"]
    assert "reshard()" in found["refused gathered"]["message"]


@pytest.mark.xdist_group("torchrun")
def test_two_processes_train_the_flow_that_one_trains(figures: dict[str, Any]) -> None:
    """Up to rounding: all take the steps that one would take with all rows."""
    for name, found in of(figures, "trained").items():
        assert found["error"] <= BOUND, name
        assert found["steps"][0] == found["steps"][1], name
        assert found["moved"] > 0.05, f"{name}: nothing was learned"


@pytest.mark.xdist_group("torchrun")
def test_two_processes_learn_the_energy_that_one_learns(figures: dict[str, Any]) -> None:
    for name, found in of(figures, "learned").items():
        assert found["error"] <= BOUND, name
        assert found["steps"][0] == found["steps"][1], name
        assert found["moved"] > 0.05, f"{name}: nothing was learned"


@pytest.mark.xdist_group("torchrun")
def test_a_study_is_shared_by_the_processes_and_resumed_by_as_many(
    figures: dict[str, Any],
) -> None:
    found = figures["studied"]
    assert found["all"] == {"ranks": 3.0}
    assert found["one"] == {"ranks": 1.0}
    assert "the stopped run had 2 processes, not 1" in found["message"]


def test_the_example_learns_on_two_processes() -> None:
    printed = torchrun("examples/train_distributed.py", "--iterations", "60")
    losses = re.search(r"first iteration ([\d.]+), of the last ([\d.]+)", printed)
    assert losses is not None, printed
    assert float(losses[2]) < 0.5 * float(losses[1])
