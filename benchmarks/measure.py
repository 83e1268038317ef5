"""What is measured of one peer on one problem, and how."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Bound, Peer
from benchmarks.problems import Instance, Problem
from symplectic_adjoint.memory import peak_memory

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
        peak: Peak live bytes of one forward and backward.
        resident: Growth of the process's peak resident bytes over the same, in a process of its
            own.
        error: Relative L2 error of the float32 gradient against ``reference``.
        error_float64: The same error when the peer runs in float64.
        error_ode: Relative L2 error of the float32 gradient against that of the ODE itself.
        reference: What the errors are measured against.
        seconds: Times of the rounds.
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
    seconds: list[float | None] = field(default_factory=list)

    @property
    def time(self) -> float | None:
        """Median seconds of one forward and backward."""
        times = [s for s in self.seconds if s is not None]
        return median(times) if times else None

    def as_json(self) -> dict[str, Any]:
        """The record as plain data."""
        return asdict(self)


def run(instance: Instance, forward: Callable[[], Tensor]) -> None:
    """One forward and backward; gradients are left in the parameters."""
    torch.autograd.backward(instance.loss(forward()))


def gradient(instance: Instance, forward: Callable[[], Tensor]) -> Tensor:
    """The parameter gradient of one run as a float64 vector."""
    instance.clear()
    run(instance, forward)
    result = instance.gradient()
    instance.clear()
    return result


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in L2."""
    return float((value - truth).norm() / truth.norm())


def examine(peer: Peer, problem: Problem, ode_gradient: Tensor) -> Record:
    """All that one peer shows outside the timed rounds."""
    record = Record(peer.name, remark=peer.remark(problem), reference=peer.reference_note)
    value, grid = _count(peer, problem, record)
    record.error_ode = relative_error(value, ode_gradient)
    record.error = _against_reference(peer, problem, value, grid)
    value, grid = _float64(peer, problem)
    record.error_float64 = _against_reference(peer, problem, value, grid)
    record.peak = _peak(peer, problem)
    return record


def _count(peer: Peer, problem: Problem, record: Record) -> tuple[Tensor, Tensor | None]:
    """Fills in the counts of a float32 run; gives its gradient and its accepted grid."""
    instance = problem.instance(counting=True)
    bound = peer.bind(instance)
    y1 = bound.forward()
    record.steps, grid = bound.steps(), bound.grid()
    record.forward = instance.field.evaluations
    torch.autograd.backward(instance.loss(y1))
    record.backward = instance.field.evaluations - record.forward
    record.products = instance.field.products
    return instance.gradient(), grid


def _float64(peer: Peer, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Gradient and accepted grid of the peer's own run in float64."""
    instance = problem.instance(torch.float64, counting=True)
    bound = peer.bind(instance)
    y1 = bound.forward()
    grid = bound.grid()
    torch.autograd.backward(instance.loss(y1))
    return instance.gradient(), grid


def _against_reference(
    peer: Peer, problem: Problem, value: Tensor, grid: Tensor | None
) -> float | None:
    instance = problem.instance(torch.float64)
    forward = peer.reference(instance, grid)
    return None if forward is None else relative_error(value, gradient(instance, forward))


def _peak(peer: Peer, problem: Problem) -> int:
    instance = problem.instance()
    bound = peer.bind(instance)
    return peak_memory(lambda: run(instance, bound.forward))


def resident_growth(peer: Peer, problem: Problem) -> int | None:
    """By how much one run raises the peak resident bytes of a process, None off Linux."""
    command = [sys.executable, "-m", "benchmarks.resident", problem.name, peer.name]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    return int(answer.stdout) if answer.returncode == 0 else None


def interleave(
    bounds: Mapping[str, tuple[Instance, Bound]], rounds: int, report: Callable[[str], None]
) -> dict[str, list[float | None]]:
    """Times one forward and backward of every peer, round by round.

    Each round begins one peer further, so that no peer always runs after the same one.

    Args:
        bounds: Instance and bound solver by peer.
        rounds: Timed rounds, after one warm-up of each peer.
        report: Told the progress.

    Returns:
        Seconds by peer and round; None in the rounds that a slow peer sat out.
    """
    warm = {name: _timed(*bound) for name, bound in bounds.items()}
    names = list(bounds)
    seconds: dict[str, list[float | None]] = {name: [] for name in names}
    for index in range(rounds):
        report(f"round {index + 1} of {rounds}")
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            out = warm[name] > SLOW and index > 0
            seconds[name].append(None if out else _timed(*bounds[name]))
    return seconds


def _timed(instance: Instance, bound: Bound) -> float:
    instance.clear()
    gc.collect()
    start = time.perf_counter()
    run(instance, bound.forward)
    return time.perf_counter() - start


def time_ratio(record: Record, baseline: Record) -> float | None:
    """Median over the rounds of the peer's time divided by the baseline's in the same round."""
    pairs = zip(record.seconds, baseline.seconds, strict=True)
    ratios = [mine / theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    return median(ratios) if ratios else None
