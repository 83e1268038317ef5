"""Figures and tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def conditions(problem: dict[str, Any]) -> str:
    """What the figures were taken on and with."""
    machine = problem["machine"]
    found = {name: version for name, version in machine["packages"].items() if version}
    parts = [
        machine["processor"],
        f"{machine['cores']} cores",
        f"threads of torch: {machine['threads']}",
        f"Python {machine['python']}",
        *(f"{name} {version}" for name, version in found.items()),
        problem["when"],
    ]
    return ", ".join(part for part in parts if part) + "."


def number(value: float | None, form: str) -> str:
    """A number in a format, a dash for None."""
    return "-" if value is None else format(value, form)


def seconds(value: float | None) -> str:
    """A duration with a unit."""
    if value is None:
        return "-"
    if value >= 1:
        return f"{value:.2f} s"
    if value < 1e-3:
        return f"{1e6 * value:.0f} us"
    return f"{1e3 * value:.{0 if value >= 0.1 else 2}f} ms"


def size(value: int | None) -> str:
    """Bytes with a unit."""
    if value is None:
        return "-"
    if value < 1e3:
        return f"{value} B"
    return f"{value / 1e3:.0f} kB" if value < 1e6 else f"{value / 1e6:.1f} MB"


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        first, *others = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([f"{first.strip():<{widths[0]}}", *others]))
    return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
