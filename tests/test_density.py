"""The study of density estimation in its tiny form, and all studies together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint.datasets import BENCHMARKS
from symplectic_adjoint.experiments import density as density_module
from symplectic_adjoint.experiments import pages
from symplectic_adjoint.experiments.commands import app
from symplectic_adjoint.experiments.density import RECIPES, SCALES, DensityStudy
from symplectic_adjoint.experiments.files import read_json
from symplectic_adjoint.experiments.sweep import Record

TINY = ("reproduce", "all", "--scale", "tiny")
LEFT = (
    "data-digits-symplectic",
    "method-gas-bosh3-float64-continuous",
    "frozen-gas-1e-02-float64-symplectic",
    "tolerance-gas-1e-08-float32-symplectic",
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Resuming sets the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def records(path: Path) -> dict[str, Record]:
    found = [Record(**read_json(file)) for file in (path / "cells").iterdir()]
    return {record.name: record for record in found}


def results(path: Path) -> dict[str, Any]:
    return {name: (r.status, r.message, r.result) for name, r in records(path).items()}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "straight"
    code, stdout, _ = run(*TINY, "--out", out)
    assert code == 0
    assert f"Report: {out / 'report' / 'index.md'}" in stdout
    return out


@pytest.fixture(scope="module")
def straight(everything: Path) -> Path:
    return everything / "density"


def test_exact_strategies_are_exact_in_every_cell_and_the_continuous_adjoint_in_none(
    straight: Path,
) -> None:
    found = records(straight)
    assert set(found) == {cell.name for cell in DensityStudy("tiny").cells()}
    for name, record in found.items():
        assert record.status == "ok", (name, record.message)
        assert record.result is not None
        if record.settings["kind"] == "frozen":
            continue
        error = record.result["gradient_error_float64"]
        if record.settings["strategy"] == "continuous":
            assert error > 1e-10, name
        else:
            assert error <= 1e-12, name


def test_exact_strategies_learn_the_same(straight: Path) -> None:
    found = results(straight)
    for data in ("gas", "digits"):
        ours, theirs = (found[f"data-{data}-{name}"][2] for name in ("symplectic", "backprop"))
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-5)
        assert ours["peak_memory"] < theirs["peak_memory"]
        assert ours["fingerprint"] == theirs["fingerprint"]


def test_the_report_names_stand_ins_and_shows_every_cell(everything: Path) -> None:
    report = everything / "report" / "density"
    page = (report / "index.md").read_text()
    assert "| gas (stand-in) | vectors | 1 | symplectic | yes |" in page
    assert "| digits | multi-scale conv | 3 | backprop | yes |" in page
    assert "| gas (stand-in) | vectors | 60 | 1 | 5 | 8 | 160-160-160 | 8 | 1000 | 2 |" in page
    for name, rows in (
        ("density_strategies", 6),
        ("density_methods", 4),
        ("density_frozen", 8),
        ("density_tolerances", 4),
    ):
        table = json.loads((report / f"{name}.json").read_text())
        assert len(table["rows"]) == rows
        assert {row["outcome"] for row in table["rows"]} == {"ok"}
    for name in ("density_costs", "density_methods", "density_frozen", "density_tolerances"):
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (report / f"{name}.svg").read_bytes()


def test_a_failed_training_is_reported_as_one(straight: Path) -> None:
    found = records(straight)
    name = "tolerance-gas-1e-08-float32-continuous"
    failed = replace(found[name], status="step underflow", message="too small", result=None)
    page = DensityStudy("tiny").page({**found, name: failed}).markdown()
    assert "1 of 4 failed: continuous in float32 at 1e-08 (step underflow)" in page
    assert "| failed: step underflow |" in page


def test_the_frozen_problem_is_one_and_its_reference_is_the_gradient_of_the_ode(
    straight: Path,
) -> None:
    found = {n: r.result for n, r in records(straight).items() if r.settings["kind"] == "frozen"}
    assert len({result["nll"] for result in found.values() if result}) == 1
    for name, result in found.items():
        assert result is not None
        assert result["uncertainty"] < 1e-9
        exact = "symplectic" in name
        double = "float64" in name
        assert (result["gradient_error"] < 1e-12) == (exact and double), name
        assert result["gradient_error"] < 1e-6 or not exact, name
    # What is left at a tight tolerance is the error of the solution, or of single precision.
    errors = {
        tolerance: found[f"frozen-gas-{tolerance}-float64-symplectic"]["ode_error"]  # type: ignore[index]
        for tolerance in ("1e-02", "1e-08")
    }
    assert errors["1e-08"] < 0.1 * errors["1e-02"]


def test_a_killed_run_of_all_studies_continues_bit_for_bit_and_loses_no_cell(
    everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "symplectic_adjoint.cli", *TINY, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    third = out / "density" / "cells" / "data-gas-continuous.json"
    deadline = time.monotonic() + 240
    while not third.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {path: path.read_bytes() for path in out.glob("*/cells/*.json")}
    assert {path.parts[-3] for path in before} == {"costs", "density"}
    assert not (out / "report" / "density").exists()
    # Of each kind some cells are left to do; the others are as if they had been done before.
    for cell in (everything / "density" / "cells").iterdir():
        copy = out / "density" / "cells" / cell.name
        if cell.stem not in LEFT and not copy.exists():
            before[copy] = cell.read_bytes()
            copy.write_bytes(before[copy])
    assert not {f"{name}.json" for name in LEFT} & {path.name for path in before}
    for kind in ("png", "svg"):  # the figures are drawn where all is run
        monkeypatch.setattr(pages, kind, lambda figure: b"")
    code, stdout, stderr = run(*TINY, "--out", out, "--pages", tmp_path / "pages", "--resume")
    assert code == 0, stderr
    assert f"Report: {tmp_path / 'pages' / 'index.md'}" in stdout
    assert {path: path.read_bytes() for path in before} == before
    for study in ("costs", "density", "physics"):
        assert results(out / study) == results(everything / study)


def test_the_book_states_claims_stand_ins_machine_and_time(everything: Path) -> None:
    text = (everything / "report" / "index.md").read_text()
    for study, cells in (("costs", 18), ("density", 22), ("physics", 3)):
        assert f"({study}/index.md) | tiny | {cells} | 0 |" in text
    assert text.count("**The paper's claim.**") == 8
    for claim in text.split("**The paper's claim.**")[1:]:
        assert "\n- " in claim, f"nothing was found on: {claim}"
    assert "sets named *stand-in* are generated" in text
    assert f"- torch: {torch.__version__}" in text


def test_costs_grow_as_the_table_of_strategies_says(everything: Path) -> None:
    found = {name: r.result for name, r in records(everything / "costs").items()}
    for result in found.values():
        assert result is not None

    def growth(axis: str, low: int, high: int, name: str) -> float:
        one, two = (found[f"{axis}-{value}-{name}"] for value in (low, high))
        assert one is not None
        assert two is not None
        ratio: float = two["peak_memory"] / one["peak_memory"]
        return ratio

    for axis, low, high in (("components", 1, 2), ("steps", 2, 4), ("stages", 1, 4)):
        assert growth(axis, low, high, "symplectic") < growth(axis, low, high, "backprop")
    assert growth("steps", 2, 4, "continuous") == pytest.approx(1.0, abs=0.05)
    table = json.loads((everything / "report" / "costs" / "costs_strategies.json").read_text())
    by_name = {row["strategy"]: row for row in table["rows"]}
    assert by_name["backprop"]["evaluations per use"] == 1
    assert by_name["symplectic"]["evaluations per use"] == 2
    assert by_name["symplectic"]["error in float64"] < 1e-12
    assert by_name["continuous"]["error in float64"] > 1e-6
    wanted = growth("steps", 2, 4, "backprop")
    assert by_name["backprop"]["with N"] == pytest.approx(wanted)


def test_mnist_is_run_from_its_files_and_stands_for_nothing_without() -> None:
    study = DensityStudy("reduced")
    assert not [cell for cell in study.cells() if "mnist" in cell.name]
    assert "data-digits-symplectic" in {cell.name for cell in study.cells()}
    study.folder = Path("of", "files")
    images = {cell.name: cell.settings["config"]["model"] for cell in study.cells()}
    assert images["data-mnist-symplectic"] == images["data-digits-symplectic"] == "conv"


def test_the_models_are_those_of_ffjord_and_the_paper() -> None:
    components = {name: recipe.components for name, recipe in RECIPES.items()}
    assert components == {
        "miniboone": 1,
        "gas": 5,
        "power": 5,
        "hepmass": 10,
        "bsds300": 2,
        "mnist": 6,
        "digits": 6,
    }
    for name, factor in {
        "power": 10,
        "gas": 20,
        "hepmass": 10,
        "miniboone": 20,
        "bsds300": 20,
    }.items():
        assert set(RECIPES[name].hidden) == {factor * BENCHMARKS[name].dim}
    cells = {cell.name: cell.settings["config"] for cell in DensityStudy("paper").cells()}
    assert cells["data-mnist-symplectic"]["blocks"] == 2  # at each of three scales
    assert cells["data-hepmass-mali"]["hidden"] == [210, 210]
    for dtype in ("float32", "float64"):
        for method in ("adaptive_heun", "bosh3", "dopri5", "dopri8"):
            assert cells[f"method-miniboone-{method}-{dtype}-symplectic"]["method"] == method
        for exponent in range(2, 9):
            for kind in ("frozen", "tolerance"):
                config = cells[f"{kind}-miniboone-1e-0{exponent}-{dtype}-continuous"]
                assert config["atol"] == 10**-exponent
                assert config["rtol"] == pytest.approx(100 * config["atol"])
                assert config["dtype"] == dtype


def test_files_of_the_user_are_used_and_not_called_stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).normal(size=(200, 43))
    (tmp_path / "miniboone").mkdir()
    np.save(tmp_path / "miniboone" / "data.npy", rows)
    small = replace(BENCHMARKS["miniboone"], rows=(162, 18, 20))
    monkeypatch.setitem(BENCHMARKS, "miniboone", small)
    scale = replace(SCALES["tiny"], sets=("miniboone",), sweep_set="miniboone")
    monkeypatch.setitem(density_module.SCALES, "tiny", scale)
    data = DensityStudy("tiny", tmp_path)._data("miniboone")
    assert data.name == "miniboone"
    assert [len(part) for part in (data.train, data.validation, data.test)] == [60, 10, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "no/such/folder"), "gas needs no/such/folder/gas/ethylene_CO.pickle"),
        (("--resume",), "holds no run to resume"),
    ],
)
def test_what_cannot_be_run_is_said_and_leaves_no_folder(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = run(*TINY, *arguments, "--out", tmp_path / "run")
    assert code == 2
    assert message in stderr
    assert stdout == ""
    assert not (tmp_path / "run").exists()


def test_pages_without_results_are_refused(tmp_path: Path) -> None:
    code, _, stderr = run("reproduce", "pages", tmp_path)
    assert code == 2
    assert "holds no results" in stderr


def test_physical_systems_have_scales_and_changes_of_them(tmp_path: Path) -> None:
    tiny = ("reproduce", "physics", "--scale", "tiny", "--strategies", "symplectic")
    code, _, stderr = run(*tiny, "--iterations", 1, "--out", tmp_path / "run")
    assert code == 0, stderr
    settings = read_json(tmp_path / "run" / "config.json")["settings"]
    assert settings["scale"] == "tiny, changed"
    assert settings["strategies"] == ["symplectic"]
    assert (settings["iterations"], settings["width"]) == (1, 4)
    code, _, stderr = run("reproduce", "physics", "--scale", "tine", "--out", tmp_path / "other")
    assert code == 2
    assert "did you mean 'tiny'" in stderr


def test_an_unknown_scale_is_named_with_its_neighbour() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'reduced'"):
        DensityStudy("reduce")
