"""The scaling curves as text and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import figures
from benchmarks.text import conditions, markdown_table, number, plain_table, seconds, size

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
BOUND = 4.0
"""How many times the forward pass our backward pass may take with 50 thousand parameters."""


def plain(results: dict[str, Any]) -> str:
    """All tables for the terminal."""
    return "\n\n".join(_parts(results, plain_table, "{}", with_figures=False))


def markdown(results: dict[str, Any]) -> str:
    """The page of the documentation."""
    parts = [_INTRODUCTION, conditions(results)]
    return "\n\n".join(parts + _parts(results, markdown_table, "## {}", with_figures=True)) + "\n"


def images(results: dict[str, Any]) -> dict[str, bytes]:
    """The figures by their places, from the folder of the page."""
    return {
        figure(axis): figures.curves(axis["name"], axis["label"], axis["points"])
        for axis in results["axes"]
    }


def figure(axis: dict[str, Any]) -> str:
    """Where the figure of an axis is, from the folder of the page."""
    return f"assets/scaling/{axis['name']}.svg"


def _parts(results: dict[str, Any], table: Table, heading: str, with_figures: bool) -> list[str]:
    parts = []
    for axis in results["axes"]:
        first = axis["title"]
        parts += [heading.format(axis["name"]), f"The first size: {first}."]
        if with_figures:
            parts.append(f"![Time and memory against the {axis['label']}]({figure(axis)})")
        parts.append(table(*_table(axis)))
        parts += _failures(axis)
        if axis["name"] == "parameters":
            parts.append(verdict(axis))
    return parts


def _table(axis: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    values = sorted({point["x"] for points in axis["points"].values() for point in points})
    rows = []
    for peer, points in axis["points"].items():
        at = {point["x"]: point for point in points}
        rows.append([peer, *(_cell(at.get(value)) for value in values)])
    return [axis["label"], *map(str, values)], rows


def _cell(point: dict[str, Any] | None) -> str:
    if point is None or point["seconds"] is None:
        return "-"
    back = point["backward_to_forward"]
    ratio = "" if back is None else f" (x{number(back, '.1f')})"
    return f"{seconds(point['seconds'])}{ratio}, {size(point['peak'])}"


def _failures(axis: dict[str, Any]) -> list[str]:
    found = [
        f"- {peer} at {point['x']}: fails: {point['fails']}"
        for peer, points in axis["points"].items()
        for point in points
        if point.get("fails")
    ]
    return ["\n".join(found)] if found else []


def verdict(axis: dict[str, Any]) -> str:
    """Whether our backward passes stay within the bound at 50 thousand parameters."""
    found = {
        peer: point["backward_to_forward"]
        for peer, points in axis["points"].items()
        for point in points
        if peer.startswith("ours/") and point["x"] == 50_000 and point["backward_to_forward"]
    }
    if not found:
        return "With 50000 parameters: not measured."
    worst = max(found, key=lambda peer: found[peer])
    told = "met" if found[worst] <= BOUND else f"missed by {found[worst] / BOUND - 1:.0%}"
    return (
        f"With 50000 parameters our backward pass shall take at most {BOUND:g} times the forward "
        f"pass: {told}, the most is {found[worst]:.2f} ({worst})."
    )


_INTRODUCTION = """\
<!-- Written by `python -m benchmarks scaling --write-docs`; text in benchmarks/scaling_page.py. -->

# How cost grows

Time of a forward and backward pass, and its peak memory, while one size of a problem grows and the
others stay. In the tables: the time; in parentheses how many times the forward pass the backward
pass takes, where they are two calls; the peak. What each of them is, and that JAX's memory is
another measure, is said in [Benchmarks](benchmarks.md#how-it-is-measured). A dash is where an entry
does not do what is asked for. Printed by `python -m benchmarks scaling --write-docs`."""
