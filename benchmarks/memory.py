"""What a budget of memory costs: ``python -m benchmarks memory``, ``curve`` and ``million``."""

from __future__ import annotations

import datetime
import functools
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch

import symplectic_adjoint as sa
from benchmarks.long import Long, differentiated, measured
from benchmarks.suite import Report, machine
from symplectic_adjoint import steppers
from symplectic_adjoint.checkpoints import binomial
from symplectic_adjoint.checkpoints.rows import SLACK
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.gradients._budget import ENTRY
from symplectic_adjoint.memory import peak_memory

MIB = 2**20
ALL = 10**12  # a budget that holds everything
ROUNDS = 7
BUDGETS = (2, 4, 16, 64)
"""In MiB."""


def run(rounds: int | None, quick: bool, report: Report) -> dict[str, Any]:
    """The targets of a budget, and predictions beside what is measured."""
    count = rounds or (1 if quick else ROUNDS)
    steps = 20 if quick else 150
    return {
        **_conditions(quick),
        "rounds": count,
        "ratios": _ratios(steps, count, report),
        "peaks": _peaks(3 * steps, report),
        "plans": [_plan(name, steps, count, report) for name in PLANS],
    }


def _conditions(quick: bool) -> dict[str, Any]:
    return {"quick": quick, "when": datetime.date.today().isoformat(), "machine": machine(())}


# Ratios ------------------------------------------------------------------------------------------


def _ratios(steps: int, rounds: int, report: Report) -> dict[str, Any]:
    """Times against those of another strategy, by what is asked for."""
    backprop, fastest = sa.Backprop(), sa.Symplectic(memory="fastest")
    stages = sa.Symplectic("stages", memory=ALL)
    with tempfile.TemporaryDirectory() as folder:
        disk = sa.Disk(folder)
        pairs: dict[str, tuple[_Entry, _Entry, float]] = {
            "everything": (("eager", fastest), ("eager", backprop), 1.05),
            "everything, within a budget": (
                ("eager", sa.Symplectic(memory=ALL)),
                ("eager", backprop),
                1.05,
            ),
            "everything, compiled": (("loop", fastest), ("loop", backprop), 1.05),
            "all stages, within a budget": (("eager", stages), ("eager", backprop), 1.4),
            # Of a compiled step there is no graph that plain backpropagation could keep.
            "all stages, within a budget, compiled": (("step", stages), ("eager", backprop), 1.4),
            "states on disk": (
                ("eager", sa.Symplectic("steps", place=disk)),
                ("eager", sa.Symplectic("steps")),
                1.3,
            ),
            "stages on disk": (
                ("eager", sa.Symplectic(place=disk)),
                ("eager", sa.Symplectic()),
                1.3,
            ),
        }
        found = {}
        for batch in (16, 256):
            long = Long(steps, batch=batch)
            entries = {entry for mine, base, _ in pairs.values() for entry in (mine, base)}
            report(f"ratios, batch {batch}")
            seconds = _interleaved(
                {
                    (tier, s): functools.partial(replace(long, execution=tier).differentiate, s)
                    for tier, s in entries
                },
                rounds,
            )
            for name, (mine, base, most) in pairs.items():
                found[f"{name}, batch {batch}"] = {
                    "base": "backprop" if base[1] == backprop else "in memory",
                    "seconds": median(seconds[mine]),
                    "base_seconds": median(seconds[base]),
                    "ratio": median(seconds[mine]) / median(seconds[base]),
                    "most": most,
                }
        return found


_Entry = tuple[str, Strategy]
"""A tier of execution, and what is kept."""


def _interleaved(runs: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each run, round by round, after a warm-up; each round begins one further."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(-1, rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter()
            runs[name]()
            if index >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


# Peaks -------------------------------------------------------------------------------------------


def _peaks(steps: int, report: Report) -> list[dict[str, Any]]:
    """Measured peaks beside budgets, from the smallest one that an error names."""
    long, found = Long(steps), list[dict[str, Any]]()
    evaluation = _evaluation(long)
    for budget in (None, *(size * MIB for size in BUDGETS)):
        report(f"peak within {budget or 'the smallest budget'}")
        memory = budget or smallest(long)
        strategy = sa.Symplectic("graph", memory=memory)
        peak = peak_memory(functools.partial(long.differentiate, strategy))
        found.append(
            {
                "budget": memory,
                "smallest": budget is None,
                "peak": peak,
                "evaluation": evaluation,
                "retaken": long.differentiate(strategy)[0]["retaken"],
            }
        )
    return found


def _evaluation(long: Long) -> int:
    """Peak bytes of an evaluation with its product."""
    field, y0 = long.problem()
    t = torch.zeros((), dtype=y0.dtype)
    return peak_memory(lambda: torch.autograd.grad(field(t, y0).sum(), [y0, *field.parameters()]))


def smallest(long: Long) -> int:
    """The smallest budget with which a solve ends, as its errors name it."""
    memory = 1
    while True:
        try:
            long.differentiate(sa.Symplectic("graph", memory=memory))
        except sa.MemoryBudgetError as error:
            memory = error.needed
        else:
            return memory


# Plans -------------------------------------------------------------------------------------------

PLANS: dict[str, dict[str, Any]] = {
    "rk4, steps of one size": {"method": "rk4"},
    "dopri5, rtol 1e-8": {"method": "dopri5", "rtol": 1e-8, "atol": 1e-10},
}


def _plan(name: str, steps: int, rounds: int, report: Report) -> dict[str, Any]:
    """Predictions beside what is measured."""
    options = dict(PLANS[name])
    fixed = "rtol" not in options
    if fixed:
        options["controller"] = sa.FixedGrid(step_size=1 / steps)
    t = [0.0, 1.0 if fixed else steps / 5]
    field, y0 = Long(steps, double=not fixed).problem()
    report(f"plan: {name}")
    plan = sa.plan_memory(field, y0, t, **options)

    runs = {
        setting.name: functools.partial(
            differentiated, field, y0, t, gradient=setting.gradient, **options
        )
        for setting in plan.settings
    }
    seconds = {name: median(times) for name, times in _interleaved(runs, rounds).items()}
    fastest = min(seconds.values())
    return {
        "name": name,
        "steps": plan.steps,
        "evaluation": plan.evaluation,
        "settings": [
            {
                "name": setting.name,
                "predicted_peak": setting.peak,
                "peak": peak_memory(runs[setting.name]),
                "predicted_time": setting.time,
                "time": seconds[setting.name] / fastest,
                "seconds": seconds[setting.name],
            }
            for setting in plan.settings
        ],
    }


# The curve ---------------------------------------------------------------------------------------


def curve(rounds: int | None, quick: bool, report: Report) -> dict[str, Any]:
    """Time and memory of many steps, by what is kept of them."""
    steps = 500 if quick else 100_000
    states = Long(steps, store="steps")
    root = round(steps**0.5)
    settings = {
        "all states": states,
        "8 sqrt(N) states": replace(states, memory=within(states, 8 * root)),
        "2 sqrt(N) states": replace(states, memory=within(states, 2 * root)),
        "sqrt(N) states": replace(states, memory=within(states, root)),
        "log(N) states": replace(states, memory="least"),
    }
    points = []
    for name, long in settings.items():
        report(f"curve: {name}")
        points.append({"name": name, **measured(long), **theory(long)})
    return {**_conditions(quick), "steps": steps, "points": points}


def within(long: Long, states: int) -> int:
    """A budget for so many states."""
    _, y0 = long.problem()
    try:
        _ledger(replace(long, memory=1))
    except sa.MemoryBudgetError as error:
        held = states * (y0.nbytes + ENTRY) * SLACK / (SLACK - 1)
        return error.needed + math.ceil(held)
    raise AssertionError("a byte is enough")


def _ledger(long: Long) -> Any:
    field, y0 = long.problem()
    parameters = list(field.parameters())
    return long.gradient.ledger(steppers.get("rk4"), y0, 2, parameters, long.steps)


def theory(long: Long) -> dict[str, Any]:
    """How many states a budget holds at the end, and the fewest steps to be taken again with them.

    Griewank and Walther 2000, theorem 1; the first pass over the steps is not counted.
    """
    ledger = _ledger(long)
    if ledger is None:
        return {"slots": long.steps, "optimum": 0}
    _, y0 = long.problem()
    size = y0.nbytes + ENTRY
    ledger.settle(ledger.plan, long.steps, 0, size)
    slots = int(ledger.plan.capacity) // size
    return {
        "slots": slots,
        "optimum": binomial.advances(long.steps + 1, slots) - long.steps,
    }


# A million steps ---------------------------------------------------------------------------------


def million(rounds: int | None, quick: bool, report: Report) -> dict[str, Any]:
    """A million steps within 256 MiB, and the exactness of fewer of them."""
    # Less than the limit by what the heap holds beside it, however many the steps.
    steps, limit = (2_000, 12 * MIB) if quick else (1_000_000, 256 * MIB)
    memory = limit - 8 * MIB
    prefix = Long(min(steps, 2_000), double=True)
    report(f"exactness of {prefix.steps} steps")
    _, everything = prefix.run()
    took, thinned = replace(prefix, memory=6 * MIB).run()
    live = Long(prefix.steps, memory=4 * MIB)
    peak = peak_memory(live.run)
    report(f"{steps} steps within {limit} bytes")
    long = Long(steps, memory=memory, execution="step")
    return {
        **_conditions(quick),
        "prefix": {
            "steps": prefix.steps,
            "retaken": took["retaken"],
            "error": float((thinned - everything).norm() / everything.norm()),
            "budget": 4 * MIB,
            "peak": peak,
            "evaluation": _evaluation(live),
        },
        "long": {**measured(long), **theory(long), "limit": limit},
    }
