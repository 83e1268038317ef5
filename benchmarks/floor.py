"""What a gradient must cost: its evaluations and products measured alone, and our time over that.

``python -m benchmarks floor``.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.measure import Record, count, interleave
from benchmarks.peers import PEERS, Bound, Peer
from benchmarks.peers.jax_base import arguments, function
from benchmarks.problems import PROBLEMS, Instance, Problem, quick
from benchmarks.suite import Report, failure, machine

ENTRIES = (
    "ours/backprop",
    "ours/symplectic-stages",
    "ours/symplectic-stages/step",
    "ours/symplectic-stages/loop",
    "ours/symplectic-steps",
    "ours/symplectic-steps/step",
    "ours/symplectic-steps/loop",
    "jax/minimal",
)
LEAST = "ours/backprop"
"""The entry whose counts are the least: every stage evaluated once and multiplied once."""

ROUNDS = 7
BUDGET = 0.2
"""Seconds, about, that a series of evaluations or products takes."""


def run(rounds: int | None, small: bool, report: Report) -> dict[str, Any]:
    """Measures every problem, as data for JSON."""
    peers = [PEERS[name] for name in ENTRIES if name in PEERS]
    problems = [quick(problem) if small else problem for problem in PROBLEMS.values()]
    repeats = rounds or (2 if small else ROUNDS)
    return {
        "quick": small,
        "when": datetime.date.today().isoformat(),
        "machine": machine(peers),
        "rounds": repeats,
        "problems": [_one(problem, peers, repeats, report) for problem in problems],
    }


def _one(problem: Problem, peers: Sequence[Peer], rounds: int, report: Report) -> dict[str, Any]:
    records, bounds = _prepare(problem, peers, report)
    series = _series(problem)
    every = {**bounds, **{name: bound for name, (bound, _) in series.items()}}
    times = interleave(every, rounds, lambda text: report(f"{problem.name}: {text}"))
    units = {
        name: [s / calls for s in times[name].seconds if s is not None]
        for name, (_, calls) in series.items()
    }
    for name in bounds:
        records[name].seconds = times[name].seconds
    return {
        "name": problem.name,
        "title": problem.describe(),
        "units": units,
        "records": [record.as_json() for record in records.values()],
    }


def _prepare(
    problem: Problem, peers: Sequence[Peer], report: Report
) -> tuple[dict[str, Record], dict[str, Bound]]:
    """The counts of each peer, and a bound solver for each that can be timed."""
    records, bounds = {}, {}
    for peer in peers:
        report(f"{problem.name}: {peer.name}")
        record = records[peer.name] = Record(peer.name, refused=peer.refuses(problem))
        if record.refused is None:
            try:
                bound = peer.bind(problem.instance())
                bound.run()  # compiles
                count(peer, problem, record)
                bounds[peer.name] = bound
            except Exception as error:  # is told on the page
                record.refused = failure(error)
    return records, bounds


def work(record: Record, evaluation: float, product: float) -> float | None:
    """Seconds that the record's evaluations and products take by themselves."""
    if record.forward is None or record.backward is None or record.products is None:
        return None
    return (record.forward + record.backward) * evaluation + record.products * product


def unit(units: dict[str, list[float]], tier: str) -> tuple[float, float]:
    """Seconds of an evaluation, and of a product without the evaluation that it starts from."""
    evaluation = median(units[f"{tier} evaluation"])
    both = [
        together - alone
        for together, alone in zip(
            units[f"{tier} evaluation and product"], units[f"{tier} evaluation"], strict=True
        )
    ]
    return evaluation, median(both)


def tier(peer: str) -> str:
    """Which of the series a peer's work is to be compared with."""
    return "compiled" if peer.endswith(("/step", "/loop", "jax/minimal")) else "eager"


def _series(problem: Problem) -> dict[str, tuple[Bound, int]]:
    """What is called in a loop, and how often, by name."""
    instance = problem.instance()
    found = {
        "eager evaluation": _evaluations(instance),
        "eager evaluation and product": _products(instance),
        **_compiled(instance),
    }
    return {name: _repeated(call) for name, call in found.items()}


def _evaluations(instance: Instance) -> Callable[[int], object]:
    t = torch.tensor(0.0)

    def call(times: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                instance.field(t, instance.y0)

    return call


def _products(instance: Instance) -> Callable[[int], object]:
    t, params = torch.tensor(0.0), list(instance.field.parameters())
    y = instance.y0.clone().requires_grad_()

    def call(times: int) -> None:
        for _ in range(times):
            out = instance.field(t, y)
            torch.autograd.grad(out, [y, *params], torch.ones_like(out), allow_unused=True)

    return call


def _compiled(instance: Instance) -> dict[str, Callable[[int], object]]:
    """The same in a loop compiled by XLA, in which nothing is called from Python."""
    import jax

    params, y0 = arguments(instance)
    func = function(instance.field)

    def evaluations(times: int, params: Any, y: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, y: y + 1e-6 * func(params, y), y)

    def products(times: int, params: Any, y: Any) -> Any:
        def step(_: int, carry: Any) -> Any:
            y, total = carry
            out, pullback = jax.vjp(func, params, y)
            grads, v = pullback(1e-6 * y)  # not constant: nothing is hoisted out of the loop
            return y + 1e-6 * v + 1e-9 * out, [a + b for a, b in zip(total, grads, strict=True)]

        return jax.lax.fori_loop(0, times, step, (y, [0 * p for p in params]))

    def called(body: Callable[..., Any]) -> Callable[[int], object]:
        program = jax.jit(body)  # the number of times is an argument: compiled once
        return lambda times: jax.block_until_ready(program(times, params, y0))

    return {
        "compiled evaluation": called(evaluations),
        "compiled evaluation and product": called(products),
    }


def _repeated(call: Callable[[int], object]) -> tuple[Bound, int]:
    """A series that takes about :data:`BUDGET`, and its length."""
    times = _length(call)
    return (
        Bound(
            run=lambda: call(times),
            gradient=lambda: torch.zeros(0),
            clear=lambda: None,
            peak=lambda: 0,
        ),
        times,
    )


def _length(call: Callable[[int], object]) -> int:
    call(2)
    times = 1
    while True:
        start = time.perf_counter()
        call(times)
        taken = time.perf_counter() - start
        if taken > BUDGET / 4:
            return max(2, int(times * BUDGET / taken))
        times *= 2
