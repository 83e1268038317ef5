"""Reports as Markdown pages, with tables as JSON and Markdown and figures as PNG and SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from symplectic_adjoint.experiments.files import write_bytes, write_json
from symplectic_adjoint.experiments.plots import png, svg

_MISSING = "-"


@dataclass(frozen=True)
class Table:
    """A table of numbers and words.

    Attributes:
        name: Name of its files.
        title: What it shows.
        columns: Headings.
        rows: One entry for each column: words, whole numbers, or floats of which four digits are
            shown; None where there is nothing.
        notes: What a reader must know to read it rightly.

    Example:
        >>> print(Table("t", "Squares", ("x", "x x"), ((2, 4.0), (3, None))).markdown())
        | x | x x |
        | --- | --- |
        | 2 | 4 |
        | 3 | - |
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(shown, line))} |" for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """The table as values of JSON, every digit kept."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}


@dataclass(frozen=True)
class Section:
    """A claim, and what the figures say of it.

    Attributes:
        title: Heading.
        claim: What the paper says, in words.
        findings: What was found, in sentences made of the figures.
        tables: Tables.
        figures: Figures by name, each with its caption.
    """

    title: str
    claim: str = ""
    findings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Mapping[str, tuple[Figure, str]] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        """Where the heading is, in an address.

        Example:
            >>> Section("Prediction: kdv, long").anchor
            'prediction-kdv-long'
        """
        return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", self.title).strip().lower())


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: Heading.
        scale: What was reproduced, and at what scale.
        sections: The sections.
        machine: Versions and machine.
        seconds: How long it took.
        cpu_seconds: Time of the processor in that.
    """

    title: str
    scale: str
    sections: Sequence[Section]
    machine: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def on(self, machine: Mapping[str, Any], seconds: float, cpu_seconds: float) -> Page:
        """The page of a run that took so long on a machine."""
        return replace(self, machine=machine, seconds=seconds, cpu_seconds=cpu_seconds)

    def markdown(self) -> str:
        """The page in Markdown; figures are files beside it."""
        parts = [f"# {self.title}", self.scale]
        for section in self.sections:
            parts += _section(section)
        parts += [
            "## Machine and versions",
            f"All cells together took {duration(self.seconds)}, of which the processor was at work "
            f"for {duration(self.cpu_seconds)}.",
            bullets([f"{name}: {shown(value)}" for name, value in self.machine.items()]),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def write_page(page: Page, folder: Path) -> None:
    """Writes ``index.md``, the tables and the figures of a page.

    Args:
        page: The page.
        folder: Where to; what an earlier page left there under the same names is replaced.
    """
    for section in page.sections:
        for table in section.tables:
            write_json(folder / f"{table.name}.json", table.to_dict())
            write_bytes(folder / f"{table.name}.md", (table.markdown() + "\n").encode())
        for name, (figure, _) in section.figures.items():
            write_bytes(folder / f"{name}.png", png(figure))
            write_bytes(folder / f"{name}.svg", svg(figure))
    write_bytes(folder / "index.md", page.markdown().encode())


def shown(value: Any) -> str:
    """A value for people: four digits of a float, a dash for nothing.

    Example:
        >>> shown(0.000123456), shown(1234567), shown(None), shown("a|b")
        ('0.0001235', '1234567', '-', 'a\\\\|b')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def duration(seconds: float) -> str:
    """A span of time for people.

    Example:
        >>> duration(5.24), duration(200), duration(9000)
        ('5.2 s', '3.3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _section(section: Section) -> list[str]:
    parts = [f"## {section.title}"]
    if section.claim:
        parts.append(f"**The paper's claim.** {section.claim}")
    if section.findings:
        parts += ["**Found here.**", bullets(section.findings)]
    for table in section.tables:
        title = f"**{table.title}** ([JSON]({table.name}.json))"
        parts += [title, table.markdown(), bullets(table.notes)]
    for name, (_, caption) in section.figures.items():
        parts += [f"![{caption}]({name}.png)", f"*{caption}* ([SVG]({name}.svg))"]
    return parts


def bullets(lines: Sequence[str]) -> str:
    """Lines as a list of Markdown."""
    return "\n".join(f"- {line}" for line in lines)
