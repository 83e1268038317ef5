"""The results in the documentation: those of the studies as they are, and written from records."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
from matplotlib.font_manager import findfont, fontManager

from symplectic_adjoint.experiments import plots
from symplectic_adjoint.experiments.book import PAGES, NoResultsError, read_book, write_book
from symplectic_adjoint.experiments.config import strategy
from symplectic_adjoint.experiments.costs import CostsStudy
from symplectic_adjoint.experiments.density import DensityStudy
from symplectic_adjoint.experiments.physics import SCALES
from symplectic_adjoint.experiments.sweep import Study
from tests import markdown

RESULTS = markdown.ROOT / "docs" / "results"
IMAGE = re.compile(r'xlink:href="data:image/png;base64,[^"]*"')
"""A picture in a drawing, whose bytes depend on who compressed them."""


def files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def test_pages_tables_and_figures_are_those_that_the_records_give(tmp_path: Path) -> None:
    write_book(read_book(RESULTS), tmp_path)
    written, committed = files(tmp_path), files(RESULTS)
    assert written.keys() == committed.keys()
    for name, path in committed.items():
        if path.suffix == ".svg":
            new, old = (IMAGE.sub("", p.read_text()) for p in (written[name], path))
            assert new == old, name
        elif path.suffix != ".png":
            assert written[name].read_bytes() == path.read_bytes(), name


@pytest.mark.parametrize("name", ["backprop", "symplectic", "continuous", "all"])
def test_pages_are_made_and_say_so_where_a_strategy_failed_throughout(name: str) -> None:
    for run in read_book(RESULTS):
        records = dict(run.records)
        for cell, record in records.items():
            if name in (record.settings["strategy"], "all"):
                records[cell] = replace(record, status="underflow", result=None, timing={})
        failed = sum(record.result is None for record in records.values())
        page = PAGES[run.study](run.settings, records)
        rows = [row for section in page.sections for t in section.tables for row in t.rows]
        if run.study == "costs":
            told = [row for row in rows if len(row) == 10 and row[4] is None]  # no peak memory
            assert ("relative to backprop" in page.markdown()) == (
                name in ("symplectic", "continuous")
            )
        else:
            told = [row for row in rows if str(row[-1]).endswith("underflow")]
        assert len(told) == failed > 0, run.study


@pytest.mark.parametrize("study", [CostsStudy(), DensityStudy(), SCALES["reduced"]])
def test_results_are_of_the_studies_as_they_are(study: Study) -> None:
    run = next(run for run in read_book(RESULTS) if run.study == study.name)
    assert run.settings == study.settings()
    cells = {cell.name: cell.settings for cell in study.cells()}
    assert {name: dict(record.settings) for name, record in run.records.items()} == cells


def test_every_exact_gradient_in_the_results_is_exact() -> None:
    checked = 0
    for run in read_book(RESULTS):
        for name, record in run.records.items():
            if "gradient_error_float64" in (record.result or {}):
                assert record.result is not None
                if strategy(record.settings["strategy"]).exact:
                    assert record.result["gradient_error_float64"] <= 1e-12, name
                    checked += 1
    assert checked > 50


def test_stand_ins_are_named_in_every_table_that_holds_them() -> None:
    run = next(run for run in read_book(RESULTS) if run.study == "density")
    assert run.settings["data"] is None
    sets = {r.result["data"] for r in run.records.values() if r.result is not None}
    assert sets == {
        *(f"{name} (stand-in)" for name in ("miniboone", "gas", "power", "hepmass", "bsds300")),
        "digits",
    }
    page = (RESULTS / "density" / "index.md").read_text()
    for name in ("miniboone", "gas", "power", "hepmass", "bsds300"):
        assert not re.search(rf"\b{name}\b(?! \(stand-in\))", page), name


def test_where_there_are_no_results_it_is_said_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(NoResultsError, match="reproduce all --pages"):
        read_book(tmp_path)


def test_figures_take_the_fonts_that_come_with_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = Path(matplotlib.get_data_path(), "fonts", "ttf")
    machines = shutil.copy(bundled / "DejaVuSans.ttf", tmp_path)
    monkeypatch.setattr(fontManager, "ttflist", [])
    fontManager.addfont(machines)
    assert findfont("DejaVu Sans") == machines
    plots._prefer_bundled_fonts.cache_clear()
    with plots.style():
        assert findfont("DejaVu Sans") == str(bundled / "DejaVuSans.ttf")
    plots._prefer_bundled_fonts.cache_clear()  # the machine's list comes back
