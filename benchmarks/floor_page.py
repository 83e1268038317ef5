"""The floor as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.floor import LEAST, tier, unit, work
from benchmarks.measure import Record
from benchmarks.text import conditions, markdown_table, number, plain_table, seconds

_HEAD = (
    "entry",
    "evaluations",
    "products",
    "time",
    "its own work",
    "time / work",
    "the least work",
    "time / least",
    "overhead a step",
)
_UNITS_HEAD = ("called", "evaluation", "product", "product / evaluation")
Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def plain(results: dict[str, Any]) -> str:
    """All tables for the terminal."""
    return "\n\n".join(_parts(results, plain_table, "{}"))


def markdown(results: dict[str, Any]) -> str:
    """The page of the documentation."""
    parts = [_INTRODUCTION, conditions(results), *_parts(results, markdown_table, "## {}")]
    return "\n\n".join(parts) + "\n"


def _parts(results: dict[str, Any], table: Table, heading: str) -> list[str]:
    parts = []
    for problem in results["problems"]:
        records = {r["peer"]: Record(**r) for r in problem["records"]}
        title = problem["title"]
        parts += [
            heading.format(problem["name"]),
            f"{title[0].upper()}{title[1:]}; {results['rounds']} rounds.",
            table(_UNITS_HEAD, [_unit_row(problem["units"], t) for t in ("eager", "compiled")]),
            table(_HEAD, [row(r, records[LEAST], problem["units"]) for r in _able(records)]),
        ]
        if refused := [r for r in records.values() if r.refused]:
            parts.append("\n".join(f"- {r.peer}: not measured, {r.refused}." for r in refused))
    return parts


def _able(records: dict[str, Record]) -> list[Record]:
    return [record for record in records.values() if record.refused is None]


def _unit_row(units: dict[str, list[float]], kind: str) -> tuple[str, ...]:
    evaluation, product = unit(units, kind)
    how = {"eager": "from Python, eagerly", "compiled": "in a compiled loop"}[kind]
    return how, seconds(evaluation), seconds(product), f"{product / evaluation:.1f}"


def row(record: Record, least: Record, units: dict[str, list[float]]) -> tuple[str, ...]:
    """What is said of one entry."""
    own = work(record, *unit(units, tier(record.peer)))
    floor = work(least, *unit(units, tier(record.peer)))
    over = None
    if record.time is not None and own is not None and record.steps:
        over = (record.time - own) / record.steps
    return (
        record.peer,
        "-" if record.forward is None else f"{record.forward} + {record.backward}",
        number(record.products, "d"),
        seconds(record.time),
        seconds(own),
        _ratio(record.time, own),
        seconds(floor),
        _ratio(record.time, floor),
        "-" if over is None else f"{1e6 * over:.0f} us",
    )


def _ratio(time: float | None, base: float | None) -> str:
    return "-" if time is None or not base else f"{time / base:.2f}"


_INTRODUCTION = """\
<!-- Written by `python -m benchmarks floor --write-docs`; text in benchmarks/floor_page.py. -->

# What a gradient must cost

An exact gradient takes an evaluation of the network at every stage, and a vector-Jacobian product
through each of them. Here both are counted for each of the problems of
[Benchmarks](benchmarks.md) and measured alone: the same network called again and again with the
states of the problem, from Python without a graph, or with the graph of that call and its product;
and in a loop that is compiled as a whole (by XLA), where nothing is called from Python. What they
cost together is the floor under the time of a solve and its gradient; all above it is step control,
sums of stages, storing, the autograd engine and calls.

**Its own work** is what the evaluations and products of an entry cost by themselves, those that
evaluate stages again to save memory among them; **the least work** is that without them, of plain
backpropagation. Eager entries are compared with the calls from Python and compiled ones with the
compiled loop. A ratio below 1 is possible: the calls measured alone take their gradient with
respect to the state as well, which the first stage of a solve does not need, and do so one after
the other with other data in the caches. Printed by
`python -m benchmarks floor --write-docs`."""
