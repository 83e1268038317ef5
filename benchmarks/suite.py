"""Runs peers on problems and gathers the figures as plain data."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import symplectic_adjoint as sa
from benchmarks.measure import Record, examine, interleave, resident_growth
from benchmarks.peers import Bound, Peer
from benchmarks.problems import Problem
from symplectic_adjoint._errors import CompilationError

Report = Callable[[str], None]


def run_suite(
    problems: Sequence[Problem],
    peers: Sequence[Peer],
    rounds: int | None,
    quick: bool,
    report: Report,
) -> dict[str, Any]:
    """Measures every peer on every problem.

    Args:
        problems: What is solved.
        peers: Who solves it.
        rounds: Timed rounds; None takes each problem's own number.
        quick: Recorded with the figures; also leaves out the figures that need a process each.
        report: Told the progress.

    Returns:
        The results as JSON has them.
    """
    return {
        "quick": quick,
        "problems": [
            {
                "name": problem.name,
                "title": problem.describe(),
                "rounds": rounds or problem.rounds,
                "when": datetime.date.today().isoformat(),
                "machine": machine(peers),
                "records": [
                    record.as_json()
                    for record in measure(problem, peers, rounds or problem.rounds, quick, report)
                ],
            }
            for problem in problems
        ],
    }


def merged(old: dict[str, Any], new: dict[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """The new results, and the old ones of what was not measured again."""
    problems = {p["name"]: p for p in (*old["problems"], *new["problems"])}
    return {**old, **new, "problems": [problems[name] for name in order if name in problems]}


def measure(
    problem: Problem, peers: Sequence[Peer], rounds: int, quick: bool, report: Report
) -> list[Record]:
    """The records of all peers on one problem; who cannot run it has the reason in its record."""
    records, bounds = prepare(problem, peers, report)
    if problem.steps is not None and not quick:
        for name in bounds:
            report(f"{problem.name}: {name}, resident memory")
            records[name].resident = resident_growth(name, problem)
    times = interleave(bounds, rounds, lambda text: report(f"{problem.name}: {text}"))
    for name, (seconds, cores) in times.items():
        records[name].seconds, records[name].cores = seconds, cores
    return list(records.values())


def prepare(
    problem: Problem, peers: Sequence[Peer], report: Report
) -> tuple[dict[str, Record], dict[str, Bound]]:
    """All but the times: a record for each peer, and a bound solver for each that can be timed."""
    truth = ode_gradient(problem)
    records = {peer.name: Record(peer.name, refused=peer.refuses(problem)) for peer in peers}
    bounds: dict[str, Bound] = {}
    for peer in peers:
        if records[peer.name].refused is None:
            report(f"{problem.name}: {peer.name}")
            try:
                bound = peer.bind(problem.instance())
                records[peer.name] = examine(peer, problem, bound, truth)
                bounds[peer.name] = bound
            except Exception as error:  # a peer's defect is a finding, not the end of the run
                records[peer.name].refused = failure(error)
    return records, bounds


def failure(error: Exception) -> str:
    """Why a peer has no figures: what cannot be compiled is no failure, all else is."""
    if isinstance(error, CompilationError):
        return f"cannot be compiled: {brief(error)}"
    return f"fails: {type(error).__name__}: {brief(error)}"


def brief(error: Exception) -> str:
    """The first sentence or so of a message, in one line."""
    return textwrap.shorten(str(error), 200, placeholder=" ...")


def ode_gradient(problem: Problem) -> Tensor:
    """The gradient of the ODE itself, near enough: float64, dopri8, rtol 1e-11, autograd."""
    instance = problem.instance(torch.float64)
    solution = sa.solve(
        instance.field,
        instance.y0,
        instance.times,
        method="dopri8",
        rtol=1e-11,
        atol=1e-13,
        gradient="backprop",
    )
    torch.autograd.backward(instance.loss(solution.y[1:]))
    return instance.gradient()


def machine(peers: Iterable[Peer]) -> dict[str, Any]:
    """What the figures were taken on and with."""
    packages = {"torch", *(peer.package for peer in peers)} - {"symplectic-adjoint"}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in sorted(packages, key=str.lower)},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def save(results: dict[str, Any], path: Path) -> None:
    """Writes results as JSON."""
    write_atomically(path, json.dumps(results, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Reads what :func:`save` wrote."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results
