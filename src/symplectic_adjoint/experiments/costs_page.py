"""What the measured costs say: the table of strategies, and memory along M, N and s."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from symplectic_adjoint.experiments.config import strategy
from symplectic_adjoint.experiments.pages import Page, Section, Table
from symplectic_adjoint.experiments.plots import FLOOR, MEBIBYTE, strategy_look, styled
from symplectic_adjoint.experiments.sweep import Record

_ALIKE = 2.0
"""Errors of rounding whose ratio is less than this are alike."""
_AXES = {
    "components": ("M", "components M"),
    "steps": ("N", "steps N"),
    "stages": ("s", "stages s"),
}
_THEORY = {
    "backprop": "M N s L",
    "checkpoint": "M states + N s L",
    "aca": "M N states + s L",
    "symplectic": "M N s states + L",
    "symplectic-steps": "(M N + s) states + L",
    "continuous": "M states + L",
    "mali": "M states + L",
}
"""As in the paper's table, in words; the library keeps the states of all stages unless told to."""


def costs_page(settings: Mapping[str, Any], records: Mapping[str, Record]) -> Page:
    """The report of the study.

    Args:
        settings: Those of the study.
        records: All cells, by name.
    """
    cells = list(records.values())
    config = cells[0].settings["config"]
    return Page(
        "What a gradient costs",
        f"Scale: **{settings['scale']}**. One gradient of a flow with fixed steps and untrained "
        f"weights, on {config['batch_size']} generated rows of the dimensions of "
        f"{config['data'].upper()} (a stand-in; memory does not depend on the values). Hidden "
        f"layers are {'-'.join(map(str, config['hidden']))} wide. One of M, N and s grows, the "
        "others stay as they are.",
        [_table(cells), _memory(cells), _rounding(cells)],
    )


def _table(records: Sequence[Record]) -> Section:
    rows = [
        (
            name,
            "yes" if strategy(name).exact else "no",
            _THEORY.get(name),
            *(_growth(records, name, axis) for axis in _AXES),
            *_per_use(records, name),
            _relative(records, name),
            *(
                max(
                    (r.result[error] for r in records if r.result and _name(r) == name),
                    default=None,
                )
                for error in ("gradient_error_float64", "gradient_error")
            ),
        )
        for name in _names(records)
    ]
    spans = ", ".join(
        f"{short} from {low} to {high}"
        for short, low, high in (
            (short, *_ends(records, axis)) for axis, (short, _) in _AXES.items()
        )
    )
    table = Table(
        "costs_strategies",
        "Every strategy",
        (
            "strategy",
            "exact",
            "memory in theory",
            "memory grows with M",
            "with N",
            "with s",
            "evaluations per use",
            "products per use",
            "time / backprop's",
            "error in float64",
            "error in float32",
        ),
        rows,
        (
            "L is the memory of one evaluation of the network and its vector-Jacobian product, "
            "states are those of the differential equation. To all of them the gradient itself is "
            "added, and an autograd graph that leads from component to component.",
            "symplectic-steps keeps what the paper's scheme keeps; symplectic, the default here, "
            "keeps the states of all stages and saves an evaluation for each.",
            f"Memory grows: peak memory at the largest over that at the smallest, {spans}.",
            "Per use, and time: at the largest number of steps; a use is one stage of one step of "
            "one component. Time: median of a few gradients, of the processor where it computes, "
            "which other work on the machine touches least. mali takes steps of one evaluation.",
            "Errors: the largest over all cells, against float64 backpropagation through the same "
            "steps.",
        ),
    )
    return Section(
        "Strategies",
        "The symplectic adjoint method obtains the exact gradient, up to rounding, with memory "
        "proportional to the number of uses plus the network size, much less than naive "
        "backpropagation and checkpointing schemes.",
        [_exactness(records), *_work(records)],
        [table],
    )


def _exactness(records: Sequence[Record]) -> str:
    errors = {
        exact: max(
            (
                r.result["gradient_error_float64"]
                for r in records
                if r.result and strategy(_name(r)).exact is exact
            ),
            default=math.nan,
        )
        for exact in (True, False)
    }
    return (
        f"In float64 the gradients of the exact strategies are off by at most {errors[True]:.1e}, "
        f"that of the continuous adjoint by up to {errors[False]:.1e}."
    )


def _work(records: Sequence[Record]) -> list[str]:
    high, memory = _last(records, "peak_memory")
    base = memory.pop("backprop", None)
    if base is None:
        return []
    told = ", ".join(f"{name} {peak / base:.3f}" for name, peak in memory.items())
    return [f"At N = {high} steps peak memory, relative to backprop's: {told}."]


def _memory(records: Sequence[Record]) -> Section:
    rows = [
        (
            *(r.settings[key] for key in ("M", "N", "method", "strategy")),
            None if r.result is None else r.result["peak_memory"] / MEBIBYTE,
            r.timing.get("gradient"),
            *(
                None if r.result is None else r.result[name]
                for name in ("evaluations", "backward_evaluations", "products", "gradient_error")
            ),
        )
        for r in records
    ]
    table = Table(
        "costs_memory",
        "All cells",
        (
            "M",
            "N",
            "method",
            "strategy",
            "peak memory [MiB]",
            "seconds",
            "evaluations forward",
            "backward",
            "products",
            "gradient error",
        ),
        rows,
    )
    return Section(
        "Memory against components, steps and stages",
        "Memory of the symplectic adjoint method hardly grows with the number of stages and steps, "
        "as it holds the graph of one use of the network at a time.",
        [_grown(records, axis) for axis in _AXES],
        figures={
            "costs_memory": (
                _memory_figure(records),
                "Peak memory of one gradient while one number grows. Both axes are logarithmic: "
                "what is proportional has slope one.",
            )
        },
        tables=[table],
    )


def _rounding(records: Sequence[Record]) -> Section:
    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots()
    _lines(axes, records, "steps", lambda r: max(float((r.result or {})["gradient_error"]), FLOOR))
    axes.set(xlabel="steps N", ylabel="relative L2 error", title="Gradient error in float32")
    axes.set(xscale="log", yscale="log")
    styled(axes.yaxis)
    _ticks(axes, records, "steps")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return Section(
        "Rounding",
        "The symplectic adjoint method is more robust to rounding errors.",
        _errors(records),
        figures={
            "costs_rounding": (
                figure,
                "Distance of the gradient in float32 from float64 backpropagation through the same "
                "fixed steps. That of the continuous adjoint includes the error of its backward "
                "solve.",
            )
        },
    )


def _errors(records: Sequence[Record]) -> list[str]:
    """Errors in float32 at the largest number of steps, and how far apart they are."""
    high, errors = _last(records, "gradient_error")
    if not errors:
        return []
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    ratio = max(errors.values()) / min(errors.values())
    alike = (
        ": at this scale rounding does not tell the strategies apart, which neither confirms the "
        "claim nor refutes it"
        if ratio < _ALIKE
        else ""
    )
    return [
        f"Error of the gradient in float32 after {high} steps: {told}.",
        f"The largest is {ratio:.1f} times the smallest{alike}.",
    ]


def _grown(records: Sequence[Record], axis: str) -> str:
    low, high = _ends(records, axis)
    told = ", ".join(
        f"{name} {growth:.2f}"
        for name in _names(records)
        if (growth := _growth(records, name, axis)) is not None
    )
    return f"From {_AXES[axis][0]} = {low} to {high} memory grows by the factors: {told}."


def _memory_figure(records: Sequence[Record]) -> Figure:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, len(_AXES), sharey=True)
    for axes, (axis, (_, label)) in zip(panels, _AXES.items(), strict=True):
        _lines(axes, records, axis, lambda r: (r.result or {})["peak_memory"] / MEBIBYTE)
        axes.set(xscale="log", yscale="log", xlabel=label)
        _ticks(axes, records, axis)
    styled(panels[0].yaxis)
    panels[0].set_ylabel("peak memory [MiB]")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]))
    return figure


def _ticks(axes: Any, records: Sequence[Record], axis: str) -> None:
    """Ticks where values are."""
    ticks = sorted({_value(r) for r in records if r.settings["axis"] == axis})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()


def _lines(
    axes: Any, records: Sequence[Record], axis: str, figure_of: Callable[[Record], float]
) -> None:
    for name in _names(records):
        mine = [r for r in records if _name(r) == name and r.settings["axis"] == axis and r.result]
        if mine:
            colour, marker, dash = strategy_look(name)
            axes.plot(
                [_value(r) for r in mine],
                [figure_of(r) for r in mine],
                color=colour,
                marker=marker,
                ls=dash,
                ms=5,
                lw=1.4,
                label=name,
            )


# --- parts of records


def _name(record: Record) -> str:
    name: str = record.settings["strategy"]
    return name


def _value(record: Record) -> int:
    value: int = record.settings["value"]
    return value


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(_name(r) for r in records))


def _ends(records: Sequence[Record], axis: str) -> tuple[int, int]:
    values = [_value(r) for r in records if r.settings["axis"] == axis]
    return min(values), max(values)


def _at(records: Sequence[Record], name: str, axis: str, value: int) -> Record | None:
    return next(
        (
            r
            for r in records
            if _name(r) == name
            and r.settings["axis"] == axis
            and _value(r) == value
            and r.result is not None
        ),
        None,
    )


def _last(records: Sequence[Record], figure: str) -> tuple[int, dict[str, float]]:
    """The largest number of steps, and a figure of every strategy there."""
    high = _ends(records, "steps")[1]
    found = {name: _at(records, name, "steps", high) for name in _names(records)}
    return high, {name: r.result[figure] for name, r in found.items() if r and r.result}


def _growth(records: Sequence[Record], name: str, axis: str) -> float | None:
    first, last = (_at(records, name, axis, value) for value in _ends(records, axis))
    if first is None or last is None or not first.result or not last.result:
        return None
    return float(last.result["peak_memory"] / first.result["peak_memory"])


def _per_use(records: Sequence[Record], name: str) -> tuple[float | None, float | None]:
    """Evaluations and products of both passes for each stage, at the largest number of steps."""
    high = _ends(records, "steps")[1]
    record = _at(records, name, "steps", high)
    base = _at(records, "backprop", "steps", high)
    if record is None or base is None or not record.result or not base.result:
        return None, None
    uses = record.settings["N"] if name == "mali" else base.result["products"]
    both = record.result["evaluations"] + record.result["backward_evaluations"]
    return both / uses, record.result["products"] / uses


def _relative(records: Sequence[Record], name: str) -> float | None:
    high = _ends(records, "steps")[1]
    pair = [_at(records, n, "steps", high) for n in (name, "backprop")]
    times = [None if r is None else r.timing.get("gradient") for r in pair]
    if times[0] is None or times[1] is None:
        return None
    return times[0] / times[1]
