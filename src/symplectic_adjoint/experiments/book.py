"""The results of all studies in one folder: a page for each, and one that sums them up.

Everything is made of ``records.json`` beside each page, so that the pages can be written again
without running anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint.experiments.costs_page import costs_page
from symplectic_adjoint.experiments.density_page import density_page
from symplectic_adjoint.experiments.files import write_bytes, write_json
from symplectic_adjoint.experiments.pages import Page, Table, bullets, duration, write_page
from symplectic_adjoint.experiments.physics_page import physics_page
from symplectic_adjoint.experiments.plots import style
from symplectic_adjoint.experiments.sweep import OK, Record, Run

RECORDS = "records.json"

PAGES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Record]], Page]] = {
    "costs": costs_page,
    "density": density_page,
    "physics": physics_page,
}
"""What makes the page of each study, in their order in the book."""

_PAPER = (
    "The paper is Matsubara, Miyatake, Yaguchi, *Symplectic Adjoint Method for Exact Gradient of "
    "Neural ODE with Minimal Memory*, NeurIPS 2021, extended in IEEE Transactions on Neural "
    "Networks and Learning Systems 35(8), 2024. Its claims are given in words; every number is "
    "measured here."
)


class NoResultsError(ArgumentError):
    """A folder holds no results; the message says what makes them."""


def write_book(runs: Sequence[Run], folder: Path) -> None:
    """Writes the pages of finished runs, and one over them.

    Args:
        runs: One run for each study, in any order.
        folder: Where to; what an earlier book left there under the same names is replaced.
    """
    with style():
        for name, page in write_index(runs, folder).items():
            write_page(page, folder / name)


def write_index(runs: Sequence[Run], folder: Path) -> dict[str, Page]:
    """Writes the page over those of finished runs, and the records of each; draws no figure.

    Args:
        runs: One run for each study, in any order.
        folder: Where to; the page of each study belongs into the folder of its name there.

    Returns:
        The pages by study, in their order in the book.
    """
    ordered = sorted(runs, key=lambda run: list(PAGES).index(run.study))
    with style():
        pages = {run.study: run.on(PAGES[run.study](run.settings, run.records)) for run in ordered}
    for run in ordered:
        run.write(folder / run.study / RECORDS)
    summary = _summary(ordered, pages)
    write_json(folder / f"{summary.name}.json", summary.to_dict())
    write_bytes(folder / "index.md", _index(ordered, pages, summary).encode())
    return pages


def read_book(folder: Path) -> list[Run]:
    """The runs that a book was made of.

    Raises:
        NoResultsError: There is no book.
    """
    found = [path for name in PAGES if (path := folder / name / RECORDS).exists()]
    if not found:
        raise NoResultsError(
            f"{folder} holds no results; `symplectic-adjoint reproduce all --pages {folder}` "
            "makes them"
        )
    return [Run.read(path) for path in found]


def _index(runs: Sequence[Run], pages: Mapping[str, Page], summary: Table) -> str:
    parts = [
        "# Results",
        f"The paper's experiments, run by `symplectic-adjoint reproduce all`. {_PAPER}",
        "## What was reproduced",
        summary.markdown(),
        bullets(summary.notes),
        *(f"**{page.title}.** {page.scale}" for page in pages.values()),
        "## Claims and findings",
    ]
    for name, page in pages.items():
        for section in page.sections:
            if section.findings:
                parts += [
                    f"### [{section.title}]({name}/index.md#{section.anchor})",
                    f"**The paper's claim.** {section.claim}" if section.claim else "",
                    bullets(section.findings),
                ]
    parts += ["## Machine and versions", *_machines(runs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(runs: Sequence[Run], pages: Mapping[str, Page]) -> Table:
    rows = [
        (
            f"[{pages[run.study].title}]({run.study}/index.md)",
            run.settings["scale"],
            len(run.records),
            _failed(run.records),
            duration(pages[run.study].seconds),
            duration(pages[run.study].cpu_seconds),
        )
        for run in runs
    ]
    return Table(
        "summary",
        "What was reproduced",
        ("study", "scale", "cells", "failed", "took", "time of the processor"),
        rows,
        (
            "A cell is one training, or one measurement. On a machine that others use at the same "
            "time a study takes longer than its time of the processor says.",
        ),
    )


def _failed(records: Mapping[str, Record]) -> int:
    return sum(record.status != OK for record in records.values())


def _machines(runs: Sequence[Run]) -> list[str]:
    """Once where all studies ran on the same machine, else study by study."""
    by_machine: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    for run in runs:
        by_machine.setdefault(str(run.machine), ([], run.machine))[0].append(run.study)
    parts = []
    for studies, machine in by_machine.values():
        if len(by_machine) > 1:
            parts.append(f"**{', '.join(studies)}**")
        parts.append(bullets([f"{k}: {'-' if v is None else v}" for k, v in machine.items()]))
    return parts
