"""What is measured of one peer on one problem, and how."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peers import Bound, Peer
from benchmarks.problems import Problem

SLOW = 30.0
"""Seconds; a peer whose warm-up takes longer is timed in the first round only."""


@dataclass
class Record:
    """The figures of one peer on one problem; None where a figure does not exist.

    Attributes:
        peer: Name of the peer.
        refused: Why it did not run; all other figures are None then.
        remark: In what its run differs from the problem as stated.
        steps: Accepted steps.
        forward: Network evaluations of the forward solve.
        backward: Network evaluations of the backward pass.
        products: Vector-Jacobian products of the backward pass.
        peak: Peak live bytes of one forward and backward; for JAX what XLA has laid out.
        resident: Growth of the process's peak resident bytes over the same, in a process of its
            own.
        error: Relative L2 error of the float32 gradient against ``reference``.
        error_float64: The same error when the peer runs in float64.
        error_ode: Relative L2 error of the float32 gradient against that of the ODE itself.
        reference: What the errors are measured against.
        first: Seconds of the first run, which compiles; None for what is not compiled.
        seconds: Times of the rounds.
        cores: Processor time of all rounds in their whole time: how many cores were at work.
    """

    peer: str
    refused: str | None = None
    remark: str | None = None
    steps: int | None = None
    forward: int | None = None
    backward: int | None = None
    products: int | None = None
    peak: int | None = None
    resident: int | None = None
    error: float | None = None
    error_float64: float | None = None
    error_ode: float | None = None
    reference: str | None = None
    first: float | None = None
    seconds: list[float | None] = field(default_factory=list)
    cores: float | None = None

    @property
    def time(self) -> float | None:
        """Median seconds of one forward and backward."""
        times = [s for s in self.seconds if s is not None]
        return median(times) if times else None

    @property
    def step(self) -> float | None:
        """Median seconds of one forward and backward for each accepted step."""
        return None if self.time is None or not self.steps else self.time / self.steps

    @property
    def compile(self) -> float | None:
        """Seconds by which the first run was longer than the others."""
        if self.first is None or self.time is None:
            return None
        return max(0.0, self.first - self.time)

    @property
    def failed(self) -> bool:
        """Whether it raised, other than a peer that does not take part."""
        return self.refused is not None and self.refused.startswith("fails")

    @property
    def other_method(self) -> bool:
        """Whether its steps are those of another method than the problem states."""
        return self.remark is not None and self.remark.startswith("another method")

    def as_json(self) -> dict[str, Any]:
        """The record as plain data."""
        return asdict(self)


def gradient(bound: Bound) -> Tensor:
    """The parameter gradient of one run as a float64 vector."""
    bound.clear()
    bound.run()
    result = bound.gradient()
    bound.clear()
    return result


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in L2."""
    return float((value - truth).norm() / truth.norm())


def examine(peer: Peer, problem: Problem, bound: Bound, ode_gradient: Tensor) -> Record:
    """All that one peer shows outside the timed rounds.

    Args:
        peer: Who is examined.
        problem: What it solves.
        bound: The peer bound as it will be timed; has not run yet.
        ode_gradient: The gradient of the differential equation.
    """
    record = Record(peer.name, remark=peer.remark(problem), reference=peer.reference_note)
    if peer.compiled:
        record.first, _ = _timed(bound)
    value, grid = count(peer, problem, record)
    if peer.compiled:
        value = bound.gradient()
    record.error_ode = relative_error(value, ode_gradient)
    record.error = _against_reference(peer, problem, value, grid)
    if peer.doubled:
        value, grid = _float64(peer, problem)
        record.error_float64 = _against_reference(peer, problem, value, grid)
    bound.clear()
    record.peak = bound.peak()
    bound.clear()
    return record


def count(peer: Peer, problem: Problem, record: Record) -> tuple[Tensor, Tensor | None]:
    """Fills in the counts of a float32 run; gives its gradient and its accepted grid."""
    bound = peer.bind(problem.instance(counting=peer.counted))
    bound.run()
    record.steps, grid, counts = bound.steps(), bound.grid(), bound.counts()
    if counts is not None:
        record.forward, record.backward, record.products = counts
    return bound.gradient(), grid


def _float64(peer: Peer, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Gradient and accepted grid of the peer's own run in float64."""
    bound = peer.bind(problem.instance(torch.float64, counting=peer.counted))
    bound.run()
    return bound.gradient(), bound.grid()


def _against_reference(
    peer: Peer, problem: Problem, value: Tensor, grid: Tensor | None
) -> float | None:
    reference = peer.reference(problem.instance(torch.float64), grid)
    return None if reference is None else relative_error(value, gradient(reference))


def resident_growth(peer: str, problem: Problem) -> int | None:
    """By how much one run raises the peak resident bytes of a process, None off Linux."""
    command = [sys.executable, "-m", "benchmarks.resident", problem.name, peer]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    return int(answer.stdout) if answer.returncode == 0 else None


class Times(NamedTuple):
    """Seconds of each round, None in those that a slow peer sat out; and how many cores worked."""

    seconds: list[float | None]
    cores: float


def interleave(
    bounds: Mapping[str, Bound], rounds: int, report: Callable[[str], None]
) -> dict[str, Times]:
    """Times one solve, loss and gradient of every peer, round by round.

    Each round begins one peer further, so that no peer always runs after the same one.

    Args:
        bounds: Bound solver by peer.
        rounds: Timed rounds, after one warm-up of each peer.
        report: Told the progress.

    Returns:
        The times by peer.
    """
    warm = {name: _timed(bound)[0] for name, bound in bounds.items()}
    names = list(bounds)
    seconds: dict[str, list[float | None]] = {name: [] for name in names}
    worked = dict.fromkeys(names, 0.0)
    for index in range(rounds):
        report(f"round {index + 1} of {rounds}")
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            if warm[name] > SLOW and index > 0:
                seconds[name].append(None)
                continue
            took, work = _timed(bounds[name])
            seconds[name].append(took)
            worked[name] += work
    return {
        name: Times(times, worked[name] / sum(s for s in times if s is not None))
        for name, times in seconds.items()
    }


def _timed(bound: Bound) -> tuple[float, float]:
    """Seconds of one run, and of the processor."""
    bound.clear()
    gc.collect()
    start, worked = time.perf_counter(), time.process_time()
    bound.run()
    return time.perf_counter() - start, time.process_time() - worked


def split(bound: Bound) -> tuple[float, float] | None:
    """Seconds of the forward and of the backward pass; None where they are one program."""
    if bound.forward is None:
        return None
    bound.clear()
    gc.collect()
    start = time.perf_counter()
    value = bound.forward().square().mean()
    between = time.perf_counter()
    torch.autograd.backward(value)
    return between - start, time.perf_counter() - between


def time_ratio(record: Record, baseline: Record) -> float | None:
    """Median over the rounds of the peer's time divided by the baseline's in the same round."""
    pairs = zip(record.seconds, baseline.seconds, strict=False)
    ratios = [mine / theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    return median(ratios) if ratios else None


def step_ratio(record: Record, baseline: Record) -> float | None:
    """The time ratio for each accepted step, as peers choose different steps."""
    paired = time_ratio(record, baseline)
    if paired is None or not record.steps or not baseline.steps:
        return None
    return paired * baseline.steps / record.steps
