"""A job that is killed goes on, to bitwise the same gradient."""

from __future__ import annotations

import functools
import gc
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import symplectic_adjoint as sa
from symplectic_adjoint.checkpoints.folder import Entry, Journal
from tests import jobs
from tests.problems import case, loss
from tests.test_stores import file_size_limit


def same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(got) == len(wanted) and all(map(torch.equal, got, wanted))


@functools.cache
def wanted(job: str) -> list[Tensor]:
    """What a job gives without a folder."""
    return jobs.gradient(job, None)[0]


def names(folder: Path, kind: str = "") -> list[str]:
    return sorted(x.name for x in folder.iterdir() if x.name.startswith(kind or ("f", "b", "j")))


# --- killed


@pytest.mark.parametrize("job", jobs.JOBS)
def test_a_job_that_is_killed_again_and_again_gives_bitwise_the_same_gradient(
    job: str, tmp_path: Path
) -> None:
    folder = sa.JobFolder(tmp_path / "job", every=0)
    deaths, backward = 0, 0
    # Enough evaluations to get on by a few steps.
    life = {"implicit": 160, "multistep": 55}.get(job, 35)
    while (result := jobs.run(job, folder, ("evaluation", life), tmp_path / "out")) is None:
        deaths += 1
        backward += bool(names(tmp_path / "job", "backward"))
        assert deaths < 60
    assert deaths - backward >= 1
    assert backward >= 2
    assert result["stats"]["resumed"] == result["stats"]["accepted"]
    assert 0 < result["stats"]["backward_resumed"] < result["stats"]["accepted"]
    assert same(result["tensors"], wanted(job))


@pytest.mark.parametrize("moment", ["rename", "written", "torn"])
def test_a_job_that_is_killed_while_it_writes_gives_bitwise_the_same_gradient(
    moment: str, tmp_path: Path
) -> None:
    folder = sa.JobFolder(tmp_path / "job", every=0)
    deaths = 0
    while (result := jobs.run("grid", folder, (moment, 9), tmp_path / "out")) is None:
        deaths += 1
        assert deaths < 30
    assert deaths >= 3
    assert same(result["tensors"], wanted("grid"))
    assert not names(tmp_path / "job", ".f")  # nothing half-written is left
    assert jobs.run("grid", sa.JobFolder(tmp_path / "at once", every=0), (moment, 1), tmp_path) is None


def test_a_job_that_is_killed_from_outside_between_entries_far_apart_goes_on(
    tmp_path: Path,
) -> None:
    folder = sa.JobFolder(tmp_path / "job", every=0.004)
    killed = [
        jobs.killed_after("adaptive", folder, 0.02 + 0.015 * i, tmp_path / "out") for i in range(6)
    ]
    assert any(killed)
    result = jobs.run("adaptive", folder, None, tmp_path / "out")
    assert same(result["tensors"], wanted("adaptive"))


def test_what_is_left_out_of_the_folder_is_found_again(tmp_path: Path) -> None:
    every = sa.JobFolder(tmp_path, every=0)
    jobs.gradient("grid", every)
    forward = names(tmp_path, "forward")
    for name in [*forward[10:], *names(tmp_path, "backward")]:
        (tmp_path / name).unlink()
    # No entry is due any more, and of the first ten steps only the states are there.
    got, stats = jobs.gradient("grid", sa.JobFolder(tmp_path))
    assert same(got, wanted("grid"))
    assert stats.resumed == 10
    assert len(names(tmp_path, "forward")) == 11
    for name in names(tmp_path, "backward"):
        (tmp_path / name).unlink()
    got, stats = jobs.gradient("grid", sa.JobFolder(tmp_path))
    assert same(got, wanted("grid"))
    assert stats.resumed == stats.accepted
    assert stats.backward_retaken == stats.accepted - 11  # those whose states are not there
