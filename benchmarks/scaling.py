"""How time and memory grow with each size of a problem: ``python -m benchmarks scaling``."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from benchmarks.measure import interleave, split
from benchmarks.peers import PEERS, Bound, Peer
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.suite import Report, brief, machine

ENTRIES = (
    "torchdiffeq/backprop",
    "torchdiffeq/adjoint",
    "ours/symplectic-stages",
    "ours/symplectic-stages/loop",
    "ours/symplectic-steps",
)
ROUNDS = 3


@dataclass(frozen=True)
class Axis:
    """A size that grows.

    Attributes:
        name: On the page.
        label: Of the axis of the figures.
        values: The sizes.
        problem: The problem of a size.
    """

    name: str
    label: str
    values: tuple[int, ...]
    problem: Callable[[int], Problem]


_SPIRAL, _MID = PROBLEMS["spiral"], PROBLEMS["mid"]


def _parameters(value: int) -> Problem:
    """A network of about ``value`` parameters, its width from w^2 + 6 w + 2."""
    width = round((7 + value) ** 0.5 - 3)
    return replace(_SPIRAL, sizes=(2, width, width, 2), t1=2.0)


AXES = (
    Axis(
        "steps",
        "length of the interval (the steps go with it)",
        (1, 3, 10, 30),
        lambda value: replace(_SPIRAL, t1=float(value)),
    ),
    Axis(
        "state",
        "width of the state",
        (2, 16, 128, 1024),
        lambda value: replace(_MID, sizes=(value, 64, 64, value), prepare=None),
    ),
    Axis(
        "width",
        "width of the network",
        (16, 64, 256, 512),
        lambda value: replace(_MID, sizes=(8, value, value, 8), prepare=None),
    ),
    Axis(
        "batch",
        "batch",
        (1, 16, 256, 4096),
        lambda value: replace(_MID, batch=value, t1=1.0),
    ),
    Axis(
        "outputs",
        "output times",
        (1, 10, 100, 1000),
        lambda value: replace(PROBLEMS["dense"], t1=2.0, outputs=value),
    ),
    Axis(
        "parameters",
        "parameters, at a state of two dimensions",
        (1_000, 10_000, 50_000, 250_000),
        _parameters,
    ),
)


def run(rounds: int | None, quick: bool, report: Report) -> dict[str, Any]:
    """Measures every size, as data for JSON."""
    peers = [PEERS[name] for name in ENTRIES if name in PEERS]
    count = rounds or (1 if quick else ROUNDS)
    return {
        "quick": quick,
        "when": datetime.date.today().isoformat(),
        "machine": machine(peers),
        "rounds": count,
        "axes": [_axis(axis, peers, count, quick, report) for axis in AXES],
    }


def _axis(
    axis: Axis, peers: Sequence[Peer], rounds: int, quick: bool, report: Report
) -> dict[str, Any]:
    values = axis.values[:2] if quick else axis.values
    points: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for value in values:
        report(f"{axis.name}: {value}")
        for name, point in _points(axis.problem(value), peers, rounds).items():
            points[name].append({"x": value, **point})
    return {
        "name": axis.name,
        "label": axis.label,
        "title": axis.problem(values[0]).describe(),
        "points": {name: found for name, found in points.items() if found},
    }


def _points(problem: Problem, peers: Sequence[Peer], rounds: int) -> dict[str, dict[str, Any]]:
    """Time and peak of each peer on one problem; those that refuse it are left out."""
    bounds: dict[str, Bound] = {}
    points: dict[str, dict[str, Any]] = {}
    for peer in peers:
        if peer.refuses(problem) is None:
            bound = peer.bind(problem.instance())
            try:
                bound.run()  # compiles
                bound.clear()
                points[peer.name] = {"steps": bound.steps(), "peak": bound.peak()}
                bounds[peer.name] = bound
            except Exception as error:  # a peer's defect is a finding, not the end of the run
                points[peer.name] = {"steps": None, "peak": None, "fails": brief(error)}
    timed = interleave(bounds, rounds, lambda text: None)
    for name, point in points.items():
        times = [s for s in timed[name].seconds if s is not None] if name in timed else []
        parts = [split(bounds[name]) for _ in range(rounds)] if name in bounds else []
        phases = [part for part in parts if part is not None]
        point["seconds"] = median(times) if times else None
        point["backward_to_forward"] = median(b / f for f, b in phases) if phases else None
    return points
