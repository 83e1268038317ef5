"""What this library set out to reach, and whether the figures reach it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from benchmarks.measure import Record, step_ratio
from benchmarks.peers import BASELINE

EAGER = (
    "torchdiffeq/*",
    "torchode/backprop",
    "TorchDiffEqPack/aca",
    "zuko/*",
)
"""Peers in eager PyTorch that take the steps of the same method."""

EXACT = ("torchdiffeq/backprop", "torchode/*")
"""Peers in PyTorch whose gradient is that of the computed solution."""

EXACT_OURS = ("ours/backprop", "ours/checkpoint", "ours/aca", "ours/symplectic-*")
LOOP = ("ours/*/loop",)

RIVALS: dict[str, tuple[str, ...]] = {
    "the fastest eager PyTorch peer": EAGER,
    "the fastest exact PyTorch peer": EXACT,
    "diffrax/recursive": ("diffrax/recursive",),
    "jax/minimal": ("jax/minimal",),
    "torchode": ("torchode/*",),
}


@dataclass(frozen=True)
class Target:
    """A bound on the time for each accepted step of our fastest entry, as a ratio to a rival's.

    Attributes:
        problem: Name of the problem.
        bound: The largest ratio that meets it.
        rival: One of :data:`RIVALS`; of several peers the fastest a step.
        ours: Names or patterns of the entries that may meet it.
        peak: The largest ratio of an entry's peak to that of backpropagation by torchdiffeq, or
            None where memory does not matter.
        stretch: Whether it is more than was set out.
    """

    problem: str
    bound: float
    rival: str
    ours: tuple[str, ...]
    peak: float | None = None
    stretch: bool = False


TARGETS = (
    *(
        target
        for problem, eager in (("spiral", 0.15), ("mid", 0.35), ("hnn", 0.35))
        for target in (
            Target(problem, eager, "the fastest eager PyTorch peer", LOOP),
            Target(problem, 1.0, "diffrax/recursive", LOOP),
            Target(problem, 0.8, "diffrax/recursive", LOOP, stretch=True),
            Target(problem, 1.4, "jax/minimal", LOOP),
        )
    ),
    *(
        target
        for problem in ("tabular", "ffjord")
        for target in (
            Target(problem, 1.0, "the fastest exact PyTorch peer", EXACT_OURS),
            Target(problem, 1.3, "the fastest exact PyTorch peer", EXACT_OURS, peak=0.3),
            Target(problem, 0.9, "diffrax/recursive", EXACT_OURS),
        )
    ),
    Target("conv", 1.0, "the fastest exact PyTorch peer", EXACT_OURS, peak=0.1),
    Target("long", 1.0, "the fastest exact PyTorch peer", EXACT_OURS, peak=0.1),
    Target("dense", 0.3, "torchode", EXACT_OURS),
)


@dataclass(frozen=True)
class Outcome:
    """A target and what was found.

    Attributes:
        target: The target.
        figure: The ratio of times for each accepted step, None where it was not measured.
        ours: Our entry that it is of.
        rival: The peer that it is to.
    """

    target: Target
    figure: float | None = None
    ours: str | None = None
    rival: str | None = None

    @property
    def met(self) -> bool:
        """Whether the figure is within the bound."""
        return self.figure is not None and self.figure <= self.target.bound

    @property
    def verdict(self) -> str:
        """``met``, or by how much it is missed."""
        if self.figure is None:
            return "not measured"
        if self.met:
            return "met"
        return f"missed by {self.figure / self.target.bound - 1:.0%}"


def outcomes(problem: str, records: Mapping[str, Record]) -> list[Outcome]:
    """The targets of one problem with the figures found."""
    return [_outcome(target, records) for target in TARGETS if target.problem == problem]


def _outcome(target: Target, records: Mapping[str, Record]) -> Outcome:
    rivals = _timed(records, RIVALS[target.rival])
    entries = [each for each in _timed(records, target.ours) if _fits(each, target, records)]
    if not rivals or not entries:
        return Outcome(target)
    rival = min(rivals, key=_step)
    figures = [(step_ratio(each, rival), each.peer) for each in entries]
    figure, ours = min((f, name) for f, name in figures if f is not None)
    return Outcome(target, figure, ours, rival.peer)


def _timed(records: Mapping[str, Record], patterns: tuple[str, ...]) -> list[Record]:
    return [
        record
        for name, record in records.items()
        if record.step is not None and any(fnmatch(name, pattern) for pattern in patterns)
    ]


def _step(record: Record) -> float:
    assert record.step is not None
    return record.step


def _fits(record: Record, target: Target, records: Mapping[str, Record]) -> bool:
    """Whether the entry keeps within the memory that the target allows."""
    if target.peak is None:
        return True
    baseline = records.get(BASELINE)
    found = ratio(record.peak, baseline.peak if baseline else None)
    return found is not None and found <= target.peak


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``, None where either is missing."""
    return None if value is None or not base else value / base
