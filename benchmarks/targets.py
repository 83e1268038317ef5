"""What this library set out to reach, and whether the figures reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.measure import Record
from benchmarks.peers import BASELINE


@dataclass(frozen=True)
class Target:
    """A bound on a ratio to the baseline peer.

    Attributes:
        problem: Name of the problem.
        peer: Whose figure it is.
        quantity: ``"time"`` or ``"peak"``.
        bound: The largest ratio that meets it.
    """

    problem: str
    peer: str
    quantity: Literal["time", "peak"]
    bound: float


TARGETS = (
    Target("spiral", "ours/symplectic-stages", "time", 0.8),
    Target("tabular", "ours/symplectic-stages", "time", 1.45),
    Target("tabular", "ours/symplectic-stages", "peak", 0.25),
    Target("long", "ours/symplectic-steps", "peak", 0.07),
)


@dataclass(frozen=True)
class Outcome:
    """A target and the figure found; ``figure`` is None where it was not measured."""

    target: Target
    figure: float | None

    @property
    def verdict(self) -> str:
        """``met``, or by how much it is missed."""
        if self.figure is None:
            return "not measured"
        if self.figure <= self.target.bound:
            return "met"
        return f"missed by {self.figure / self.target.bound - 1:.0%}"


def outcomes(problem: str, records: dict[str, Record]) -> list[Outcome]:
    """The targets of one problem with the figures found."""
    baseline = records.get(BASELINE)
    found = []
    for target in TARGETS:
        if target.problem == problem:
            record = records.get(target.peer)
            figure = None
            if record is not None and baseline is not None:
                figure = ratio(getattr(record, target.quantity), getattr(baseline, target.quantity))
            found.append(Outcome(target, figure))
    return found


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``, None where either is missing."""
    return None if value is None or not base else value / base
