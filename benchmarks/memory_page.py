"""What a budget of memory costs, as text and a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import figures
from benchmarks.text import conditions, markdown_table, plain_table, seconds, size

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]
FIGURE = "assets/budgets/curve.svg"
EXACT = 1e-12


def plain(results: dict[str, Any]) -> str:
    """Tables for the terminal, of whichever part was measured."""
    return "\n\n".join(_parts({_name(results): results}, plain_table, "{}"))


def markdown(results: dict[str, Any]) -> str:
    """The page of the documentation, from the results of all parts."""
    return "\n\n".join([_INTRODUCTION, *_parts(results, markdown_table, "## {}")]) + "\n"


def images(results: dict[str, Any]) -> dict[str, bytes]:
    """The figure by its place, from the folder of the page."""
    if "curve" not in results:
        return {}
    found = results["curve"]
    base = found["points"][0]
    points = [
        {
            **p,
            "measured": p["forward"] + p["backward"],
            "expected": base["forward"] + expected(p, base),
            "fewest": base["forward"] + expected({**p, "retaken": p["optimum"]}, base),
        }
        for p in found["points"]
    ]
    return {FIGURE: figures.budgets(f"{found['steps']} steps", points)}


def _name(results: dict[str, Any]) -> str:
    return "curve" if "points" in results else "million" if "long" in results else "memory"


def _parts(results: dict[str, Any], table: Table, heading: str) -> list[str]:
    parts = []
    for name, write in (("memory", _memory), ("curve", _curve), ("million", _million)):
        if name in results:
            parts += write(results[name], table, heading)
    return parts


def _memory(found: dict[str, Any], table: Table, heading: str) -> list[str]:
    parts = [
        heading.format("What was asked for"),
        conditions(found),
        f"Forward and backward, medians of {found['rounds']} interleaved rounds.",
        table(("kept", "time", "against", "ratio", "at most", ""), list(map(_ratio, _each(found)))),
        _EAGER,
        heading.format("The peak within a budget"),
        table(
            ("budget", "peak", "budget and an evaluation", "steps retaken", ""),
            [_peak(row) for row in found["peaks"]],
        ),
    ]
    for plan in found["plans"]:
        parts += [
            heading.format(f"Predictions: {plan['name']}"),
            f"{plan['steps']} steps; an evaluation with its product takes "
            f"{size(plan['evaluation'])}. Times are relative to the fastest.",
            table(
                ("keep", "predicted peak", "peak", "off by", "predicted time", "time", "off by"),
                [_predicted(row) for row in plan["settings"]],
            ),
        ]
    return parts


def _each(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(found["ratios"].items())


def _ratio(item: tuple[str, dict[str, Any]]) -> tuple[str, ...]:
    name, row = item
    return (
        name,
        seconds(row["seconds"]),
        f"{row['base']}: {seconds(row['base_seconds'])}",
        f"{row['ratio']:.2f}",
        f"{row['most']:g}",
        _met(row["ratio"] <= row["most"]),
    )


def _peak(row: dict[str, Any]) -> tuple[str, ...]:
    most = row["budget"] + row["evaluation"]
    smallest = " (the smallest)" if row["smallest"] else ""
    return (
        size(row["budget"]) + smallest,
        size(row["peak"]),
        size(most),
        str(row["retaken"]),
        _met(row["peak"] <= most),
    )


def _predicted(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        size(row["predicted_peak"]),
        size(row["peak"]),
        f"{row['predicted_peak'] / row['peak'] - 1:+.0%}",
        f"{row['predicted_time']:.2f}",
        f"{row['time']:.2f}",
        f"{row['predicted_time'] / row['time'] - 1:+.0%}",
    )


def _curve(found: dict[str, Any], table: Table, heading: str) -> list[str]:
    points = found["points"]
    parts = [heading.format("Time against memory"), conditions(found)]
    if table is markdown_table:
        parts.append(f"![Time against resident memory of {found['steps']} steps]({FIGURE})")
    counts = ("states held", "steps retaken", "the fewest possible")
    head = ("kept", *counts, "forward", "backward", "expected backward", "resident")
    rows = [
        (
            p["name"],
            str(p["slots"]),
            str(p["retaken"]),
            str(p["optimum"]),
            seconds(p["forward"]),
            seconds(p["backward"]),
            seconds(expected(p, points[0])),
            size(p["resident"]),
        )
        for p in points
    ]
    return [*parts, f"{found['steps']} steps of rk4.", table(head, rows)]


def expected(point: dict[str, Any], base: dict[str, Any]) -> float:
    """Seconds of a backward pass from that of another, and from how many steps it takes again."""
    again: float = base["forward"] / base["steps"]
    backward: float = base["backward"]
    retaken: int = point["retaken"]
    return backward + retaken * again


def _million(found: dict[str, Any], table: Table, heading: str) -> list[str]:
    long, prefix = found["long"], found["prefix"]
    rows = [
        ("budget", size(long["memory"]), ""),
        (
            "growth of the resident memory",
            size(long["resident"]),
            _met(long["resident"] <= long["limit"]),
        ),
        ("forward", seconds(long["forward"]), ""),
        ("backward", seconds(long["backward"]), ""),
        ("steps retaken", f"{long['retaken']} (the fewest: {long['optimum']})", ""),
        (
            f"error of the gradient, {prefix['steps']} steps in float64, "
            f"{prefix['retaken']} of them retaken",
            f"{prefix['error']:.1e}",
            _met(prefix["error"] <= EXACT),
        ),
        (
            f"peak of live bytes, as many steps within {size(prefix['budget'])}",
            size(prefix["peak"]),
            _met(prefix["peak"] <= prefix["budget"] + prefix["evaluation"]),
        ),
    ]
    return [
        heading.format(f"{long['steps']} steps within {size(long['limit'])}"),
        conditions(found),
        'Compiled steps (`execution="step"`), float32, in a process of its own, whose resident '
        f"memory was {size(long['interpreter'])} before.",
        table(("", "measured", ""), rows),
    ]


def _met(holds: bool) -> str:
    return "met" if holds else "missed"


_EAGER = """\
In eager mode a stage is a call of autograd's engine and some lines of Python here, where plain
backpropagation calls the engine once for the whole solve; under a budget the books of each step
come on top. Compiled code has neither."""

_INTRODUCTION = """\
<!-- Written by `python -m benchmarks memory|curve|million --write-docs`; text in
benchmarks/memory_page.py. -->

# What a budget of memory costs

Steps of a 64-256-64 network on a batch of 16 where nothing else is said, on the CPU. How a budget
works is said in [Memory](memory.md). Peaks are of live bytes, from the allocator's events; resident
memory is that of a process of its own, above what it took when the solve began."""
