"""The results as text: plain for the terminal, Markdown for the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import Record, step_ratio, time_ratio
from benchmarks.peers import BASELINE
from benchmarks.targets import LOOP, Outcome, outcomes, ratio
from benchmarks.text import conditions, markdown_table, number, plain_table, seconds, size

MISSED = Path(__file__).parent / "missed"
"""Texts on missed targets, one a problem: ``NAME.md``."""

_HEAD = (
    "peer",
    "time",
    "ratio",
    "a step",
    "ratio",
    "cores",
    "peak",
    "peak ratio",
    "resident",
    "steps",
    "evaluations",
    "products",
    "error",
    "in float64",
    "to the ODE",
    "compile",
)
_METHODS_HEAD = (
    "method",
    "steps",
    "theirs",
    "ms a step",
    "backprop's",
    "adjoint's",
    "ratio to backprop",
    "to adjoint",
    "our backprop to theirs",
    "evaluations",
    "backprop's",
    "adjoint's",
    "error of the solution",
    "theirs",
    "error of the gradient",
    "backprop's",
    "adjoint's",
)
_TARGET_HEAD = ("problem", "target", "of", "at most", "figure", "verdict", "ours", "theirs")


def plain(results: dict[str, Any]) -> str:
    """All tables for the terminal."""
    parts = ["Quick run on small problems."] if results["quick"] else []
    for problem in results["problems"]:
        records = records_of(problem)
        parts.append(f"{problem['name']}: {problem['title']} ({problem['rounds']} rounds)")
        parts.append(conditions(problem))
        parts.append(plain_table(_HEAD, _rows(records)))
        parts += [f"  {note}" for note in _notes(records)]
    if not results["quick"]:  # the targets are about the full problems
        parts.append(plain_table(_TARGET_HEAD, _target_rows(results)))
    return "\n\n".join(parts)


def markdown(results: dict[str, Any]) -> str:
    """The page of the documentation."""
    parts = [_INTRODUCTION, "## Targets", markdown_table(_TARGET_HEAD, _target_rows(results))]
    parts += missed(results)
    for problem in results["problems"]:
        records = records_of(problem)
        parts.append(f"## {problem['name']}")
        parts.append(
            f"{problem['title'][0].upper()}{problem['title'][1:]}; {problem['rounds']} rounds."
        )
        parts.append(conditions(problem))
        parts.append(f"![Time and memory of each peer on {problem['name']}]({figure(problem)})")
        parts.append(markdown_table(_HEAD, _rows(records)))
        parts.append("\n".join(f"- {note}" for note in _notes(records)))
    if "methods" in results:
        parts.append(_methods_section(results["methods"]))
    parts.append(_METHOD)
    return "\n\n".join(part for part in parts if part) + "\n"


def figure(problem: dict[str, Any]) -> str:
    """Where the figure of a problem is, from the folder of the page."""
    return f"assets/benchmarks/{problem['name']}.svg"


def plain_methods(results: dict[str, Any]) -> str:
    """The table of methods for the terminal."""
    table = plain_table(_METHODS_HEAD, _method_rows(results))
    return "\n\n".join([conditions(results), f"{results['title']}.", table])


def _methods_section(results: dict[str, Any]) -> str:
    options = ", ".join(
        f"`{name}` with {', '.join(f'{k} = {v}' for k, v in chosen.items())}"
        for name, chosen in results["options"].items()
    )
    told = f"{results['title'][0].upper()}{results['title'][1:]}; {results['rounds']} rounds."
    table = markdown_table(_METHODS_HEAD, _method_rows(results))
    return "\n\n".join(
        [_METHODS, f"{told} {options[0].upper()}{options[1:]}.", conditions(results), table]
    )


def _method_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    return [_method_row(name, records) for name, records in results["methods"].items()]


def _method_row(name: str, found: list[dict[str, Any]]) -> tuple[str, ...]:
    solution = [number(record["error_solution"], ".1e") for record in found[:2]]
    records = [
        Record(**{k: x for k, x in record.items() if k != "error_solution"}) for record in found
    ]
    ours, backprop, adjoint, plain = records
    return (
        name,
        *(number(r.steps, "d") for r in (ours, backprop)),
        *(number(_per_step(r, ours), ".3f") for r in records[:3]),
        *(number(step_ratio(ours, r), ".2f") for r in (backprop, adjoint)),
        number(step_ratio(plain, backprop), ".2f"),
        *(f"{r.forward} + {r.backward}" for r in records[:3]),
        *solution,
        *(number(r.error_ode, ".1e") for r in records[:3]),
    )


def _per_step(record: Record, ours: Record) -> float | None:
    """Milliseconds a step; torchdiffeq's adjoint takes the forward steps of its backprop."""
    steps = record.steps or ours.steps
    return None if record.time is None or not steps else 1000 * record.time / steps


def records_of(problem: dict[str, Any]) -> dict[str, Record]:
    """The records of a problem by peer."""
    return {record["peer"]: Record(**record) for record in problem["records"]}


def _rows(records: dict[str, Record]) -> list[tuple[str, ...]]:
    baseline = records.get(BASELINE)
    if baseline is None or baseline.refused is not None:
        baseline = Record(BASELINE)
    return [_row(record, baseline) for record in records.values() if record.refused is None]


def _row(record: Record, baseline: Record) -> tuple[str, ...]:
    return (
        record.peer,
        seconds(record.time),
        number(time_ratio(record, baseline), ".2f"),
        seconds(record.step),
        number(step_ratio(record, baseline), ".2f"),
        number(record.cores, ".1f"),
        size(record.peak),
        number(ratio(record.peak, baseline.peak), ".3f"),
        size(record.resident),
        number(record.steps, "d"),
        "-" if record.forward is None else f"{record.forward} + {record.backward}",
        number(record.products, "d"),
        number(record.error, ".1e"),
        number(record.error_float64, ".1e"),
        number(record.error_ode, ".1e"),
        "-" if record.compile is None else f"{record.compile:.1f} s",
    )


def _notes(records: dict[str, Record]) -> list[str]:
    notes = [f"{r.peer}: {r.remark}." for r in records.values() if r.refused is None and r.remark]
    return notes + [f"{r.peer}: not measured, {r.refused}." for r in records.values() if r.refused]


def _target_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    return [_target_row(outcome) for outcome in _outcomes(results)]


def _outcomes(results: dict[str, Any]) -> list[Outcome]:
    return [
        outcome
        for problem in results["problems"]
        for outcome in outcomes(problem["name"], records_of(problem))
    ]


def missed(results: dict[str, Any]) -> list[str]:
    """What is written of the problems with a missed target: why, and what was tried."""
    names = {o.target.problem for o in _outcomes(results) if o.verdict.startswith("missed")}
    files = [MISSED / f"{problem['name']}.md" for problem in results["problems"]]
    return [
        file.read_text(encoding="utf-8").strip()
        for file in files
        if file.stem in names and file.exists()
    ]


def _target_row(outcome: Outcome) -> tuple[str, ...]:
    target = outcome.target
    loop = ", loop tier" * (target.ours == LOOP)
    memory = "" if target.peak is None else f", at {target.peak:g} of backpropagation's peak"
    return (
        target.problem,
        f"time a step{loop}{memory}" + ", stretch" * target.stretch,
        target.rival,
        f"{target.bound:g}",
        number(outcome.figure, ".2f"),
        outcome.verdict,
        outcome.ours or "-",
        outcome.rival or "-",
    )


_INTRODUCTION = """\
<!-- Written by `python -m benchmarks --write-docs`; its text is in benchmarks/tables.py. -->

# Benchmarks

This library under each of its gradient strategies and in each tier of execution, and the packages
that do the same job, on problems bound by overhead, by arithmetic and by memory. An entry
`ours/STRATEGY` runs eagerly, `ours/STRATEGY/step` compiles a step and its transpose,
`ours/STRATEGY/loop` the whole solve and the whole sweep. `jax/minimal` is a symplectic adjoint of
some two hundred lines in this repository, without output times, events or checks: the limit to
compare with. Every figure on this page was printed by

```
python -m benchmarks --write-docs
```

with the extra `bench` installed; anyone can run it again. Named problems alone are measured anew
(`python -m benchmarks spiral --write-docs`), and the page keeps what it says of the others."""

_METHODS = """\
## Every method shared with torchdiffeq

This library with its default strategy, torchdiffeq's `odeint` with backpropagation, and its
`odeint_adjoint`: time of forward and backward pass for each accepted step of the forward solve, the
ratios of these (below 1: this library is faster), that of `gradient="backprop"` here to
backpropagation there among them, network evaluations in forward + backward pass, and errors against
the differential equation: of the final state, in float64, and of the gradient of all parameters, in
float32. Where time goes into calls and not into arithmetic, as here, the default strategy pays for
its memory by evaluating each stage again, which shows most where the solver itself has least to do:
on fixed grids. Printed by `python -m benchmarks methods --write-docs`."""

_METHOD = f"""\
## How it is measured

**Time** is that of one forward solve, loss (mean square of the states at the output times, which is
the final one where nothing else is said) and backward pass: the median of rounds in which all peers
of a table run one after the other in one process, each round beginning one peer further. The
**ratio** beside it is the median of the ratios to {BASELINE} within the rounds, which slow changes
of the machine do not touch. **A step** is the time divided by the accepted steps, with its ratio:
peers choose different steps at the same tolerance. **Cores** is the processor time of all rounds
in their whole time: where PyTorch was held to one thread, XLA was, too; below one, other processes
were at work. A dash stands where this was not measured; there XLA had all cores. **Compile** is by
how much the first run of what is compiled took longer than later ones, with empty caches. It counts
in no other column.

**Peak** is the largest number of bytes that tensors held at one time during forward and backward,
above what was live before: the allocator's own events, read by `symplectic_adjoint.peak_memory`.
Gradients count; parameters and initial states, live before, do not. JAX does not tell its
allocations: there the figure is what XLA has laid out for the compiled program (its memory
analysis: arguments, results and all temporary buffers), with room for 4096 steps in diffrax and for
the next power of two above the steps taken in jax/minimal. **Resident** is by how much
forward and backward raised the peak resident memory of a fresh process.

**Evaluations** are calls of the network in the forward + backward pass, and **products**
vector-Jacobian products through it, both counted by the network itself (of compiled entries of this
library, by the solver; of torchode/compiled, by the same solver uncompiled). Rejected steps and the
choice of the first step are included.

**Error** is the relative L2 error of the float32 gradient of all parameters against the exact
gradient of the computed solution. For this library the exact gradient is plain autograd in float64
over the very steps that were accepted, and so it is for diffrax/recursive and jax/minimal, whose
methods have the same coefficients; with many output times diffrax's interpolation is another one,
and there is no such reference. For zuko it is the same with its own step function.
torchdiffeq, torchode and TorchDiffEqPack do not take a list of steps: their reference is autograd
through their own solver in float64, which may choose other steps, so that their column holds the
difference of the steps as well. **In float64** is the same error when the solve itself runs in
float64: where a method is exact, only rounding is left. **To the ODE** is the error of the float32
gradient against the gradient of the differential equation (float64, dopri8, rtol 1e-11): it holds
the error of the discretisation, which no way of differentiating can avoid, and all others."""
