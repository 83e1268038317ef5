"""A job that is killed goes on, to bitwise the same gradient."""

from __future__ import annotations

import dataclasses
import functools
import os
import stat
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

# How many evaluations a process lives: some to find its place again, and more to get on.
LIVES = {
    "grid": 70,
    "adaptive": 55,
    "graph": 80,
    "thinned": 35,
    "multistep": 50,
    "jumps": 40,
    "implicit": 75,
}


@pytest.mark.parametrize("job", jobs.JOBS)
def test_a_job_that_is_killed_again_and_again_gives_bitwise_the_same_gradient(
    job: str, tmp_path: Path
) -> None:
    folder = sa.JobFolder(tmp_path / "job", every=0)
    deaths, backward = 0, 0
    life = LIVES[job]
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
    assert (
        jobs.run("grid", sa.JobFolder(tmp_path / "at once", every=0), (moment, 1), tmp_path) is None
    )


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


def test_the_folder_costs_no_accuracy_and_the_run_that_is_not_killed_gives_the_same(
    tmp_path: Path,
) -> None:
    for job in jobs.JOBS:
        got, stats = jobs.gradient(job, sa.JobFolder(tmp_path / job))
        assert same(got, wanted(job))
        assert stats.resumed == stats.backward_resumed == 0


def test_how_much_is_kept_and_where_may_change_between_two_runs(tmp_path: Path) -> None:
    problem = case(times=jobs.TIMES)
    every = sa.JobFolder(tmp_path / "job", every=0)
    grid = {"method": "rk4", "controller": sa.FixedGrid(step_size=0.06)}
    (tmp_path / "disk").mkdir()
    strategies = [
        sa.Symplectic("steps"),
        sa.Symplectic(memory="least"),
        sa.Symplectic(memory="5KB"),
        sa.Symplectic("graph", memory="20KB"),
        sa.Symplectic(place=sa.Disk(tmp_path / "disk")),
    ]
    found = []
    for n, strategy in enumerate(strategies):
        for name in [*names(tmp_path / "job", "backward")][n * 3 :] if n else []:
            (tmp_path / "job" / name).unlink()
        for name in names(tmp_path / "job", "forward")[4 * (n + 1) :] if n else []:
            (tmp_path / "job" / name).unlink()
        sol = problem.solve(gradient=dataclasses.replace(strategy, folder=every), **grid)
        inputs = [*problem.inputs().values()]
        found.append(torch.autograd.grad((1 + n) * loss(sol.y) / (1 + n), inputs))
    for grads in found[1:]:
        assert same([*grads], [*found[0]])


@pytest.mark.parametrize("method", ["verlet", "alf", "explicit_adams", "gl4", "dopri8"])
def test_every_kind_of_method_goes_on(method: str, tmp_path: Path) -> None:
    separable = method == "verlet"
    problem = case(tree=True, separable=separable, times=(1.2, 0.7, 0.33, 0.0))
    options: dict[str, Any] = {"method": method, "controller": sa.FixedGrid(0.2, perturb=True)}
    inputs = [*problem.inputs().values()]
    plain = problem.solve(**options)
    expected = torch.autograd.grad(loss(plain.y), inputs)
    for store in ("steps", "stages"):
        folder = sa.JobFolder(tmp_path / store, every=0)
        for resumed, kept in ((0, 12), (6, 3), (3, 0)):  # of the steps in the folder
            sol = problem.solve(gradient=sa.Symplectic(store, folder=folder), **options)
            assert sol.stats.resumed == resumed
            assert same([*torch.autograd.grad(loss(sol.y), inputs)], [*expected])
            assert sol.stats.backward_resumed == 0
            for name in [*names(tmp_path / store, "forward")[kept:], *names(tmp_path / store, "b")]:
                (tmp_path / store / name).unlink()


def test_a_complex_state_goes_on(tmp_path: Path) -> None:
    rate = torch.tensor([0.5j, -1.0 + 2j], dtype=torch.complex128, requires_grad=True)
    y0 = torch.ones(2, dtype=torch.complex128, requires_grad=True)
    found = []
    for folder in (None, *(sa.JobFolder(tmp_path, every=0),) * 2):
        gradient = sa.Symplectic(folder=folder)
        sol = sa.solve(lambda t, y: rate * y.conj(), y0, [0.0, 0.4, 1.0], gradient=gradient)
        found.append([*torch.autograd.grad(sol.y.abs().sum(), [y0, rate])])
        for name in [*names(tmp_path, "forward")[2:], *names(tmp_path, "backward")]:
            (tmp_path / name).unlink()
    assert sol.stats.resumed == 2
    assert same(found[1], found[0])
    assert same(found[2], found[0])


# --- what the folder holds


def test_a_finished_gradient_is_used_again_until_the_folder_is_cleared(tmp_path: Path) -> None:
    folder = sa.JobFolder(tmp_path / "job")
    jobs.gradient("grid", folder)
    count = iter(range(100))
    got, stats = jobs.gradient("grid", folder, lambda: next(count) and None)
    assert same(got, wanted("grid"))
    assert stats.resumed == stats.backward_resumed == stats.accepted
    assert stats.products == stats.backward_evaluations == 0
    assert next(count) < 10  # to tell func from another one, and to see how large a step is
    (tmp_path / "job" / "notes").write_text("mine")
    folder.clear()
    assert [x for x in names(tmp_path / "job", "") if x != "notes"] == []
    assert (tmp_path / "job" / "notes").read_text() == "mine"
    (tmp_path / "job" / "notes").unlink()
    assert jobs.gradient("grid", folder)[1].resumed == 0
    sa.JobFolder(tmp_path / "never made").clear()


def test_another_loss_of_the_same_solve_goes_back_by_itself(tmp_path: Path) -> None:
    problem, folder = case(times=jobs.TIMES), sa.JobFolder(tmp_path / "job", every=0)
    inputs = [*problem.inputs().values()]
    sol = problem.solve(gradient=sa.Symplectic(folder=folder))
    plain = problem.solve()
    for weight in (1.0, 2.0, 1.0):
        got = torch.autograd.grad(weight * loss(sol.y), inputs, retain_graph=True)
        expected = torch.autograd.grad(weight * loss(plain.y), inputs, retain_graph=True)
        assert same([*got], [*expected])
        resumed = problem.solve(gradient=sa.Symplectic(folder=folder))
        assert resumed.stats.resumed == sol.stats.accepted
        assert same([*torch.autograd.grad(weight * loss(resumed.y), inputs)], [*expected])


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    jobs.gradient("grid", sa.JobFolder(tmp_path / "job", every=0))
    assert stat.S_IMODE((tmp_path / "job").stat().st_mode) == 0o700
    modes = {stat.S_IMODE(x.stat().st_mode) for x in (tmp_path / "job").iterdir()}
    assert modes == {0o600}


def test_entries_come_by_the_clock_and_not_by_the_step(tmp_path: Path) -> None:
    jobs.gradient("grid", sa.JobFolder(tmp_path / "job"))
    assert names(tmp_path / "job", "forward") == ["forward-00000000"]
    assert len(names(tmp_path / "job", "backward")) == 1


def test_writing_takes_a_small_part_of_the_time_however_slow_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    journal = Journal(sa.JobFolder(tmp_path, every=1.0), {})  # at 0
    assert journal.due()  # at 10
    journal.acquire()
    journal.write("forward", 0, Entry({}))  # from 20 to 30
    later = [journal.due() for _ in range(60)]  # from 40 on
    assert later.index(True) == (30 + 50 * 10 - 40) // 10


# --- damage


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "other", "missing"])
def test_a_damaged_entry_is_not_used(kind: str, how: str, tmp_path: Path) -> None:
    folder = sa.JobFolder(tmp_path, every=0)
    jobs.gradient("grid", folder)
    entries = [tmp_path / name for name in names(tmp_path, kind)]
    at = entries[7 if kind == "forward" else -1]
    content = bytearray(at.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "other":  # an entry, but not this one
        content = bytearray(entries[6 if kind == "forward" else 0].read_bytes())
    at.write_bytes(content[: {"truncated": len(content) - 5, "empty": 0}.get(how, len(content))])
    if how == "missing":
        at.unlink()
    if kind == "forward":
        for name in names(tmp_path, "backward"):
            (tmp_path / name).unlink()
    got, stats = jobs.gradient("grid", folder)
    assert same(got, wanted("grid"))
    if kind == "forward":
        assert stats.resumed == 7
        assert stats.backward_resumed == 0
    else:
        assert stats.resumed == stats.accepted
        assert stats.backward_resumed == stats.accepted  # all steps, but not the end


def test_nothing_of_a_folder_is_used_whose_owner_cannot_be_told(tmp_path: Path) -> None:
    folder = sa.JobFolder(tmp_path / "job")
    jobs.gradient("grid", folder)
    (tmp_path / "job" / "job").write_bytes(b"")
    with pytest.raises(sa.JobFolderError, match="damaged"):
        jobs.gradient("grid", folder)
    folder.clear()
    assert jobs.gradient("grid", folder)[1].resumed == 0


def test_reading_runs_no_code(tmp_path: Path) -> None:
    jobs.gradient("grid", sa.JobFolder(tmp_path, every=0))

    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"f": Harmful()}, tmp_path / names(tmp_path, "forward")[2])
    got, stats = jobs.gradient("grid", sa.JobFolder(tmp_path))
    assert same(got, wanted("grid")) or stats.resumed == 2
    assert not (tmp_path / "harm").exists()


# --- errors


def solved(folder: Path, problem: Any = None, **options: Any) -> sa.Solution:
    settings = {"method": "rk4", "controller": sa.FixedGrid(step_size=0.1), **options}
    job = sa.JobFolder(folder)
    return (problem or case()).solve(gradient=sa.Symplectic(folder=job), **settings)  # type: ignore[no-any-return]


def moved(problem: Any, name: str) -> Any:
    with torch.no_grad():
        {"y0": problem.y0, **problem.params}[name].view(-1)[0] += 1e-15
    return problem


OTHERS: dict[str, Any] = {
    "y0": lambda: {"problem": moved(case(), "y0")},
    "func.inner": lambda: {"problem": moved(case(), "inner")},
    "t": lambda: {"problem": case(times=(0.0, 0.5, 1.2))},
    "method": lambda: {"method": "midpoint"},
    "controller": lambda: {"controller": sa.FixedGrid(step_size=0.2)},
    "rtol": lambda: {"rtol": 1e-4},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_job_is_refused_by_name_before_anything_is_touched(
    name: str, tmp_path: Path
) -> None:
    solved(tmp_path)
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
    with pytest.raises(sa.OtherJobError, match=name.replace(".", r"\.")) as caught:
        solved(tmp_path, **OTHERS[name]())
    assert any(each.startswith(name) for each in caught.value.differences)
    assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == before
    assert "clear()" in str(caught.value)
    assert solved(tmp_path).stats.resumed == 12


@pytest.mark.parametrize(("name", "value"), [("torch", "1.0"), ("symplectic-adjoint", "0.0.1")])
def test_a_job_of_another_version_is_refused(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        if name == "torch":
            patched.setattr(torch, "__version__", value)
        else:
            patched.setattr("symplectic_adjoint.gradients._identity.version", lambda _: value)
        solved(tmp_path)
    with pytest.raises(sa.OtherJobError, match=rf"{name} \({value} there"):
        solved(tmp_path)


def test_a_function_whose_code_was_changed_is_another_job(tmp_path: Path) -> None:
    gradient = sa.Symplectic(folder=sa.JobFolder(tmp_path))
    y0 = torch.ones(2, requires_grad=True)
    sa.solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=gradient)
    with pytest.raises(sa.OtherJobError, match=r"func\(t\[0\], y0\)"):
        sa.solve(lambda t, y: -1.5 * y, y0, [0.0, 1.0], gradient=gradient)


def test_two_solves_cannot_work_in_one_folder(tmp_path: Path) -> None:
    sol = solved(tmp_path)
    with pytest.raises(sa.JobFolderError, match="another solve works"):
        solved(tmp_path)
    with pytest.raises(sa.JobFolderError, match="another solve works"):
        sa.JobFolder(tmp_path).clear()
    assert jobs.run("grid", sa.JobFolder(tmp_path), None, tmp_path / "out") == jobs.REFUSED
    loss(sol.y).backward()  # which ends it
    assert solved(tmp_path).stats.resumed == 12


def test_an_exception_in_func_leaves_the_folder_to_others(tmp_path: Path) -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            raise KeyError("broken")
        return -y

    y0 = torch.ones(2, requires_grad=True)
    options = {"gradient": sa.Symplectic(folder=sa.JobFolder(tmp_path, every=0)), "method": "rk4"}
    errors = []
    for _ in range(2):
        with pytest.raises(KeyError) as caught:
            sa.solve(broken, y0, torch.linspace(0, 1, 11), **options)
        errors.append(caught.value)  # with all frames of the solve
    assert len(names(tmp_path, "forward")) == 5


def test_a_folder_that_cannot_be_made_is_an_error_before_the_solve(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(sa.StoreError, match=r"could not be made or opened.*Not a directory"):
        solved(tmp_path / "file" / "job")


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(sa.JobFolderError, match=r"holds files that are no job's, 'thesis\.tex'"):
        solved(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path: Path) -> None:
    rate = torch.nn.Parameter(torch.linspace(-1, 1, 3000, dtype=torch.float64))
    y0 = torch.ones(3000, dtype=torch.float64, requires_grad=True)
    gradient = sa.Symplectic(folder=sa.JobFolder(tmp_path, every=0))

    def run() -> sa.Solution:
        t = torch.linspace(0, 1, 5)
        return sa.solve(lambda t, y: rate * y, y0, t, method="euler", gradient=gradient)

    with (
        file_size_limit(20_000),
        pytest.raises(sa.StoreError, match=r"written.*too large") as caught,
    ):
        run()
    prefix = caught.value.solution
    assert len(prefix.steps) == 2
    assert torch.isfinite(torch.autograd.grad(prefix.y.sum(), y0)[0]).all()
    sol = run()
    with file_size_limit(20_000), pytest.raises(sa.StoreError, match="too large"):
        sol.y.sum().backward()
    del sol
    sol = run()
    assert sol.stats.resumed == 4
    (got,) = torch.autograd.grad(sol.y.sum(), y0)
    gradient = sa.Symplectic()
    assert torch.equal(got, torch.autograd.grad(run().y.sum(), y0)[0])


REFUSED: dict[str, dict[str, Any]] = {
    "event": {"event": lambda t, y, gain: t - 0.5 + 0 * y.sum()},
    "dense": {"dense": True},
    "a gradient of t": {"problem": case(wants_time=True)},
    "SensitivityControl": {"controller": sa.SensitivityControl(), "method": "dopri5"},
    "execution='loop'": {"execution": "loop"},
    "execution='step'": {"execution": "step"},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_go_on_is_refused_before_the_solve(what: str, tmp_path: Path) -> None:
    with pytest.raises(sa.ArgumentError, match=what):
        solved(tmp_path / "job", **REFUSED[what])
    assert not (tmp_path / "job").exists()


def test_transforms_and_tangents_and_rounded_places_are_refused(tmp_path: Path) -> None:
    folder = sa.JobFolder(tmp_path / "job")
    y0 = torch.ones(2, requires_grad=True)

    def end(y0: Tensor) -> Tensor:
        gradient = sa.Symplectic(folder=folder)
        y: Tensor = sa.solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=gradient).y
        return y[-1].sum()

    with pytest.raises(sa.ArgumentError, match=r"torch\.func"):
        torch.func.grad(end)(y0)
    with (
        pytest.raises(sa.ArgumentError, match="forward mode"),
        torch.autograd.forward_ad.dual_level(),
    ):
        end(torch.autograd.forward_ad.make_dual(y0, torch.ones(2)))
    rounded = sa.Symplectic("steps", place=sa.Rounded(), folder=folder)
    with pytest.raises(sa.ArgumentError, match="rounded"):
        sa.solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=rounded)
    assert not (tmp_path / "job").exists()
    with pytest.raises(sa.ArgumentError, match=r"JobFolder\('run'\)"):
        sa.Symplectic(folder="run")  # type: ignore[arg-type]
    with pytest.raises(sa.ArgumentError, match="seconds"):
        sa.JobFolder("run", every=-1)


def test_second_derivatives_and_batches_are_refused_when_they_are_asked_for(tmp_path: Path) -> None:
    problem = case()
    sol = solved(tmp_path, problem)
    with pytest.raises(sa.SecondDerivativeError, match="first derivatives only"):
        torch.autograd.grad(loss(sol.y), problem.y0, create_graph=True)
    g = torch.ones(2, *sol.y.shape, dtype=sol.y.dtype)
    with pytest.raises(sa.SecondDerivativeError, match="no batches"):
        torch.autograd.grad(sol.y, problem.y0, g, is_grads_batched=True)


@pytest.mark.parametrize("late", [False, True])
def test_a_func_that_draws_random_numbers_is_refused(late: bool, tmp_path: Path) -> None:
    def noisy(t: Tensor, y: Tensor) -> Tensor:
        return -y + torch.randn(2) if t >= 0.5 * late else -y

    y0 = torch.ones(2, requires_grad=True)
    gradient = sa.Symplectic(folder=sa.JobFolder(tmp_path / "job"))
    with pytest.raises(sa.ArgumentError, match="draws random numbers"):
        sa.solve(noisy, y0, torch.linspace(0, 1, 5), method="rk4", gradient=gradient)
    assert (tmp_path / "job").exists() is late


def test_a_tensor_that_is_found_late_is_refused_and_never_missed(tmp_path: Path) -> None:
    hidden = torch.tensor(0.5, requires_grad=True)

    class Lookup:
        __slots__ = ("get",)

    lookup = Lookup()
    lookup.get = iter(lambda: hidden, None).__next__

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -lookup.get() * y if t >= late else -y

    y0 = torch.ones(2, requires_grad=True)
    gradient = sa.Symplectic(folder=sa.JobFolder(tmp_path / "job"))
    options: dict[str, Any] = {"method": "rk4", "gradient": gradient}
    late = 0.5
    with pytest.raises(sa.CaptureError, match="Pass it through args"):
        sa.solve(func, y0, torch.linspace(0, 1, 5), **options)
    gradient.folder.clear()  # type: ignore[union-attr]
    late = 0.0
    sol = sa.solve(func, y0, torch.linspace(0, 1, 5), **options)
    sol.y[-1].sum().backward()
    assert hidden.grad is not None
    sol = sa.solve(func, y0, torch.linspace(0, 1, 5), **options)
    assert sol.stats.resumed == 4
    assert torch.equal(torch.autograd.grad(sol.y[-1].sum(), hidden)[0], hidden.grad)


def test_a_solve_that_cannot_reach_its_end_goes_on_to_the_same_end(tmp_path: Path) -> None:
    problem = case()
    options = {"method": "dopri5", "controller": sa.Adaptive(max_steps=7), "throw": False}
    found = []
    for folder in (sa.JobFolder(tmp_path, every=0),) * 2:
        sol = problem.solve(gradient=sa.Symplectic(folder=folder), **options)
        assert sol.status is sa.Status.STEP_LIMIT
        found.append((sol.steps, torch.autograd.grad(loss(sol.y), problem.y0)[0]))
    assert sol.stats.resumed == sol.stats.accepted == len(sol.steps) - 1 > 3
    assert same([*found[0]], [*found[1]])


def test_a_solve_without_a_gradient_leaves_its_states_to_one_with_a_gradient(
    tmp_path: Path,
) -> None:
    with torch.no_grad():
        jobs.solution("grid", sa.JobFolder(tmp_path, every=0))
    got, stats = jobs.gradient("grid", sa.JobFolder(tmp_path))
    assert stats.resumed == stats.accepted
    assert same(got, wanted("grid"))
