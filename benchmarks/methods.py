"""Every method shared with torchdiffeq, one after the other: ``python -m benchmarks methods``."""

from __future__ import annotations

import datetime
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import symplectic_adjoint as sa
from benchmarks.measure import relative_error
from benchmarks.peers import PEERS, Peer
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.suite import Report, machine, measure
from symplectic_adjoint import steppers
from symplectic_adjoint._errors import UnknownNameError

NAMES = ("ours/symplectic-stages", "torchdiffeq/backprop", "torchdiffeq/adjoint", "ours/backprop")
OPTIONS: dict[str, tuple[tuple[str, Any], ...]] = {
    # With their default, order 12, steps of this size are not stable.
    "explicit_adams": (("max_order", 5),),
    "implicit_adams": (("max_order", 5),),
}
STEPS, END = 100, 5.0
ROUNDS = 7


def shared() -> list[str]:
    """Names of the methods that torchdiffeq has and that are differentiated exactly here."""
    from torchdiffeq._impl.odeint import SOLVERS

    return [name for name in SOLVERS if _own(name)]


def _own(name: str) -> bool:
    """Whether the name is that of a method of this library, and no other name of one."""
    try:
        stepper = steppers.get(name)
    except UnknownNameError:
        return False
    return stepper.name == name and not isinstance(stepper, steppers.ScipySolver)


def problem(method: str, quick: bool) -> Problem:
    """The spiral, solved by a method with steps of one size or, where it can, to a tolerance."""
    fixed = steppers.get(method).error_order is None
    steps, end = (STEPS // 5, END / 5) if quick else (STEPS, END)
    return replace(
        PROBLEMS["spiral"],
        name=method,
        method=method,
        options=OPTIONS.get(method, ()),
        steps=steps if fixed else None,
        t1=end,
        rtol=1e-4,
        atol=1e-6,
    )


def run(rounds: int | None, quick: bool, report: Report) -> dict[str, Any]:
    """Measures every shared method, as data for JSON."""
    peers = [PEERS[name] for name in NAMES]
    count = rounds or (2 if quick else ROUNDS)
    records = {}
    for name in shared():
        each = problem(name, quick)
        # Quick: the resident memory of these solves says nothing, and takes a process each.
        records[name] = [
            {
                **record.as_json(),
                "error_solution": _solution_error(PEERS[record.peer], each)
                if record.peer in NAMES[:2]
                else None,
            }
            for record in measure(each, peers, count, True, report)
        ]
    return {
        "quick": quick,
        "when": datetime.date.today().isoformat(),
        "machine": machine(peers),
        "rounds": count,
        "title": _title(quick),
        "options": {name: dict(options) for name, options in OPTIONS.items()},
        "methods": records,
    }


def _title(quick: bool) -> str:
    each = problem("euler", quick)
    return (
        f"the network of the spiral problem, batch {each.batch}, T = {each.t1:g}, float32; methods "
        f"with an error estimate to rtol {each.rtol:g} and atol {each.atol:g}, the others in "
        f"{each.steps} equal steps"
    )


def _solution_error(peer: Peer, each: Problem) -> float | None:
    """Relative error of the final state in float64, against a solve to nearly all digits."""
    if peer.refuses(each) is not None:
        return None
    instance = each.instance(torch.float64)
    with torch.no_grad():
        forward = peer.bind(instance).forward
        assert forward is not None
        final = forward()
        return relative_error(final, _exact(each.t1))


@functools.cache
def _exact(t1: float) -> Tensor:
    """The final state, which every method approximates."""
    instance = PROBLEMS["spiral"].instance(torch.float64)
    t = torch.tensor([0.0, t1], dtype=torch.float64)
    y: Tensor = sa.odeint(instance.field, instance.y0, t, method="dopri8", rtol=1e-12, atol=1e-14)
    return y[-1]
