"""What the experiments on density estimation found: tables, figures, and sentences made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from symplectic_adjoint.experiments.config import strategy
from symplectic_adjoint.experiments.pages import Page, Section, Table, shown
from symplectic_adjoint.experiments.plots import FLOOR, MEBIBYTE, strategy_look, styled
from symplectic_adjoint.experiments.recipes import RECIPES
from symplectic_adjoint.experiments.sweep import OK, Record

_RESOLUTION = 0.01
"""Scores, in nats, closer than this are drawn as equal."""
_NEAR = 1e-3
"""A gradient this near to the exact one is near enough to compare costs."""
_FLOWS = {"mlp": "vectors", "conv": "multi-scale conv"}
_COSTS = (
    "peak memory [MiB]",
    "seconds/iteration",
    "seconds/gradient",
    "evaluations forward",
    "backward",
    "products",
    "steps",
    "gradient error",
    "in float64",
)


def density_page(settings: Mapping[str, Any], records: Mapping[str, Record]) -> Page:
    """The report of the study.

    Args:
        settings: Those of the study.
        records: All cells, by name.
    """
    by_kind: dict[str, list[Record]] = {"data": [], "method": [], "frozen": [], "tolerance": []}
    for record in records.values():
        by_kind[record.settings["kind"]].append(record)
    told = (
        "No published files were given: rows of sets named *stand-in* are generated, with the "
        "dimensions of the benchmark, and their scores say nothing about it. The digits of "
        "scikit-learn are real images; MNIST is run from its files only. "
        if settings["data"] is None
        else "The published files were used. "
    )
    return Page(
        "Density estimation",
        f"Scale: **{settings['scale']}**. {told}All strategies start from the same weights and see "
        "the same batches and noise.",
        [
            _setting(by_kind["data"]),
            _strategies(by_kind["data"]),
            _methods(by_kind["method"]),
            _frozen(by_kind["frozen"]),
            _tolerances(by_kind["tolerance"]),
        ],
    )


def _setting(records: Sequence[Record]) -> Section:
    """What was trained, beside what FFJORD and the paper train."""
    first = {r.settings["config"]["data"]: r for r in reversed(records)}
    rows = []
    for name in dict.fromkeys(r.settings["config"]["data"] for r in records):
        record, recipe = first[name], RECIPES[name]
        rows.append(
            (
                _of(record, "data") or name,
                _FLOWS[recipe.model],
                None if record.result is None else record.result["rows"][0],
                _components(record),
                recipe.components,
                _widths(_config(record, "hidden")),
                _widths(recipe.hidden),
                _config(record, "batch_size"),
                recipe.batch_size,
                _config(record, "iterations"),
                _config(record, "atol"),
            )
        )
    table = Table(
        "density_setting",
        "What was trained, beside the recipe of FFJORD and the paper",
        (
            "data",
            "flow",
            "training rows",
            "M",
            "recipe's M",
            "hidden layers",
            "recipe's hidden layers",
            "batch",
            "recipe's batch",
            "iterations",
            "atol",
        ),
        rows,
        (
            "M: stacked components; a flow of images has them spread over three scales. The "
            "relative tolerance is a hundred times the absolute one.",
        ),
    )
    return Section("What was run", tables=[table])


def _widths(hidden: Sequence[int]) -> str:
    return "-".join(map(str, hidden))


# --- strategies on every data set


def _strategies(records: Sequence[Record]) -> Section:
    rows = [
        (
            _of(record, "data") or record.settings["config"]["data"],
            _FLOWS[_config(record, "model")],
            _components(record),
            _name(record),
            "yes" if strategy(_name(record)).exact else "no",
            _of(record, "test_nll"),
            _of(record, "test_trace"),
            _of(record, "bits"),
            *_cost(record),
            _status(record),
        )
        for record in records
    ]
    table = Table(
        "density_strategies",
        "Every strategy on every data set",
        (
            "data",
            "flow",
            "M",
            "strategy",
            "exact",
            "test NLL [nats]",
            "trace",
            "bits/pixel",
            *_COSTS,
            "outcome",
        ),
        rows,
        (
            "NLL: in the coordinates in which the benchmark's scores are published; images in "
            "pixels in (0, 1), with the bits that the grey levels take.",
            "Memory, evaluations, products, steps and errors are of one gradient at the weights "
            "that were trained under the strategy. Gradient error: relative distance from float64 "
            "backpropagation through the same accepted steps, as trained and with the strategy in "
            "float64.",
            "Seconds an iteration: median wall time while training. Seconds a gradient: median of "
            "three, time of the processor where it computes, which other work on the machine "
            "touches least.",
            "mali needs a solver of its own (alf), whose steps differ from the others'.",
        ),
    )
    figures = {
        "density_costs": (
            _costs_figure(records),
            "Peak memory and time of one gradient, relative to backpropagation on the same data "
            "set, and the error of the gradient in float64 (what agrees to the last bit is drawn "
            "at 1e-17).",
        )
    }
    return Section(
        "Gradient strategies",
        "The symplectic adjoint method returns the exact gradient up to rounding, with memory "
        "proportional to the number of uses of the network plus the size of one use, and is faster "
        "than the adjoint method of Chen et al. of equal accuracy, which returns no exact "
        "gradient.",
        _strategy_findings(records),
        [table],
        figures,
    )


def _strategy_findings(records: Sequence[Record]) -> list[str]:
    found = [r for r in records if r.status == OK]
    errors = {
        exact: [_of(r, "gradient_error_float64") for r in found if _is_exact(r) is exact]
        for exact in (True, False)
    }
    lines = [
        f"In float64 the error of the gradient of {kind} is at most {max(errors[exact]):.1e}."
        for exact, kind in ((True, "exact strategies"), (False, "the continuous adjoint"))
        if errors[exact]
    ]
    for base, figure, what in (
        ("backprop", _memory, "the peak memory"),
        ("continuous", _seconds, "the time of a gradient"),
    ):
        ratios = _ratios(found, "symplectic", base, figure)
        if ratios:
            lines.append(
                f"The symplectic strategy takes between {min(ratios):.2f} and {max(ratios):.2f} "
                f"times {what} of {base}, over {len(ratios)} data sets."
            )
    failed = len(records) - len(found)
    lines.append(f"{failed} of {len(records)} trainings failed." if failed else "None failed.")
    return lines


def _ratios(
    records: Sequence[Record], name: str, base: str, figure: Callable[[Record], float]
) -> list[float]:
    """Figures of a strategy over those of another, one for each data set that has both."""
    found = {(_of(r, "data"), _name(r)): figure(r) for r in records}
    sets = dict.fromkeys(data for data, _ in found)
    return [
        found[data, name] / found[data, base]
        for data in sets
        if (data, name) in found and (data, base) in found
    ]


def _costs_figure(records: Sequence[Record]) -> Figure:
    found = [r for r in records if r.status == OK]
    sets = list(dict.fromkeys(_of(r, "data") for r in found))
    names = list(dict.fromkeys(_name(r) for r in found))
    figure = Figure(figsize=(11, 0.62 * len(sets) + 2.2), layout="constrained")
    memory, time, error = figure.subplots(1, 3, sharey=True)
    for k, name in enumerate(names):
        mine = {_of(r, "data"): r for r in found if _name(r) == name}
        bases = {_of(r, "data"): r for r in found if _name(r) == "backprop"}
        colour, marker, _ = strategy_look(name)
        shift = 0.7 * ((k + 0.5) / len(names) - 0.5)
        both = [
            (i + shift, mine[data], bases[data])
            for i, data in enumerate(sets)
            if data in mine and data in bases
        ]
        look: dict[str, Any] = {"color": colour, "marker": marker, "ls": "", "ms": 5}
        for axes, cost in ((memory, _memory), (time, _seconds)):
            ratios = [cost(ours) / cost(base) for _, ours, base in both]
            axes.plot(ratios, [place for place, _, _ in both], **look)
        every = [(i + shift, mine[s]) for i, s in enumerate(sets) if s in mine]
        error.plot(
            [max(_of(r, "gradient_error_float64"), FLOOR) for _, r in every],
            [place for place, _ in every],
            label=name,
            **look,
        )
    for axes, title in ((memory, "Peak memory"), (time, "Time of a gradient")):
        axes.set(xscale="log", xlabel="relative to backprop", title=title)
        axes.axvline(1.0, color="#888888", lw=1, ls=":")
        styled(axes.xaxis)
    error.set(xscale="log", xlabel="relative L2 error", title="Gradient error in float64")
    memory.set_yticks(range(len(sets)), sets)
    memory.set_ylim(max(1, len(sets)) - 0.5, -0.5)
    handles = error.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=max(1, len(names)))
    return figure


# --- sweeps


def _methods(records: Sequence[Record]) -> Section:
    rows = [(_config(r, "method"), *_sweep_row(r)) for r in records]
    found = [r for r in records if r.status == OK]
    memory = _span(_memory(r) for r in found if _name(r) == "symplectic")
    return Section(
        "Methods",
        "The advantage holds for methods of every order: the more stages a method has, the more "
        "memory the symplectic adjoint method saves.",
        [*_exactness(found), f"The symplectic strategy peaks at {memory} MiB over the methods."],
        [
            Table(
                "density_methods",
                f"Methods, on {_sets(records)}",
                ("method", "dtype", "strategy", "test NLL [nats]", *_COSTS, "outcome"),
                rows,
            )
        ],
        {
            "density_methods": (
                _sweep_figure(records, _method_axis(records), "method"),
                "Error of the gradient against float64 backpropagation through the same steps, "
                "score of the test rows after training, and peak memory of one gradient; markers "
                "are filled for float64, open for float32.",
            )
        },
    )


def _frozen(records: Sequence[Record]) -> Section:
    found = [r for r in records if r.result is not None]
    rows = [
        (
            _config(r, "atol"),
            _config(r, "dtype"),
            _name(r),
            *(
                _of(r, name)
                for name in (
                    "gradient_error",
                    "ode_error",
                    "accepted",
                    "evaluations",
                    "backward_evaluations",
                    "products",
                )
            ),
            _status(r),
        )
        for r in records
    ]
    table = Table(
        "density_frozen",
        f"One gradient of one trained flow, on {_sets(records)}",
        (
            "atol",
            "dtype",
            "strategy",
            "error to the computed solution's gradient",
            "error to the ODE's gradient",
            "steps",
            "evaluations forward",
            "backward",
            "products",
            "outcome",
        ),
        rows,
        (
            "Weights, rows and noise are the same throughout: a flow trained in float64 with exact "
            "gradients. The relative tolerance is a hundred times the absolute one.",
            "Error to the computed solution's gradient: relative distance from float64 "
            "backpropagation through the same accepted steps. Error to the ODE's: from dopri8 "
            "at a tolerance near rounding, float64; that changes by "
            f"{shown(max((_of(r, 'uncertainty') for r in found), default=None))} when its "
            "tolerance is a hundred times that.",
        ),
    )
    return Section(
        "Gradients at every tolerance",
        "The symplectic adjoint method returns the exact gradient up to rounding, whatever the "
        "tolerance. The adjoint method suffers from the errors of its backward integration and "
        "needs small tolerances, that is many steps, to come near.",
        [*_worst_errors(found), *_break_even(found), *_failures(records)],
        [table],
        {
            "density_frozen": (
                _frozen_figure(records),
                "One frozen problem at every tolerance. Left: distance from the exact gradient of "
                "the computed solution, which is where an optimiser sees noise (what agrees to the "
                "last bit is drawn at 1e-17). Middle: distance from the gradient of the "
                "differential equation, discretisation and all. Right: what it costs. Markers "
                "are filled for float64, open for float32.",
            )
        },
    )


def _worst_errors(found: Sequence[Record]) -> list[str]:
    """The largest distance from the exact gradient, by precision and strategy."""
    lines = []
    for dtype in dict.fromkeys(_config(r, "dtype") for r in found):
        told = []
        for name in dict.fromkeys(_name(r) for r in found):
            mine = [r for r in found if _name(r) == name and _config(r, "dtype") == dtype]
            if mine:
                worst = max(mine, key=lambda r: float(_of(r, "gradient_error")))
                error = _of(worst, "gradient_error")
                place = f" (at {_config(worst, 'atol'):.0e})" if error else ""
                told.append(f"{name} {error:.1e}{place}")
        lines.append(
            f"Largest distance from the exact gradient over all tolerances in {dtype}: "
            f"{', '.join(told)}."
        )
    return lines


def _break_even(found: Sequence[Record]) -> list[str]:
    """What the continuous adjoint spends to come as near as a symplectic gradient costs nothing."""
    lines = []
    for dtype in dict.fromkeys(_config(r, "dtype") for r in found):
        mine = [r for r in found if _name(r) == "continuous" and _config(r, "dtype") == dtype]
        near = [r for r in mine if _of(r, "gradient_error") <= _NEAR]
        if near:
            loosest = max(near, key=lambda r: float(_config(r, "atol")))
            lines.append(
                f"In {dtype} the continuous adjoint is within {_NEAR:.0e} of the exact gradient "
                f"from {_config(loosest, 'atol'):.0e} on, with {_work(loosest)} evaluations and "
                "products."
            )
        elif mine:
            lines.append(f"In {dtype} the continuous adjoint never comes within {_NEAR:.0e} of it.")
    return lines


def _work(record: Record) -> int:
    names = ("evaluations", "backward_evaluations", "products")
    return sum(int(_of(record, name)) for name in names)


def _frozen_figure(records: Sequence[Record]) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    _lines(
        panels,
        records,
        {r.name: _config(r, "atol") for r in records},
        (
            lambda r: max(_of(r, "gradient_error"), FLOOR),
            lambda r: _of(r, "ode_error"),
            _work,
        ),
    )
    titles = (
        "Error to the computed solution's",
        "Error to the differential equation's",
        "Evaluations and products",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel="absolute tolerance", xscale="log")
        axes.invert_xaxis()
    for axes in panels[:2]:
        axes.set(yscale="log", ylabel="relative L2 error of the gradient")
    panels[2].set_ylim(bottom=0)
    _legend(figure, panels[0])
    return figure


def _tolerances(records: Sequence[Record]) -> Section:
    rows = [(_config(r, "atol"), *_sweep_row(r)) for r in records]
    found = [r for r in records if r.status == OK]
    places = {r.name: _config(r, "atol") for r in records}
    return Section(
        "Training at every tolerance",
        "The adjoint method needs a tight tolerance for a gradient good enough to train with; the "
        "symplectic adjoint method is exact at every tolerance and more robust to rounding errors.",
        [*_exactness(found), *_scores(found), *_failures(records)],
        [
            Table(
                "density_tolerances",
                f"Tolerances, on {_sets(records)} (absolute; the relative one is 100 times that)",
                ("tolerance", "dtype", "strategy", "test NLL [nats]", *_COSTS, "outcome"),
                rows,
            )
        ],
        {
            "density_tolerances": (
                _sweep_figure(records, places, "absolute tolerance"),
                "As above, each point a flow trained at its tolerance; a missing marker is a "
                "training that failed.",
            )
        },
    )


def _scores(found: Sequence[Record]) -> list[str]:
    lines = []
    for name in dict.fromkeys(_name(r) for r in found):
        scores = [_of(r, "test_nll") for r in found if _name(r) == name]
        starts = [_of(r, "initial_nll") for r in found if _name(r) == name]
        lines.append(
            f"Under {name} the test NLL ends between {min(scores):.2f} and {max(scores):.2f} nats "
            f"(validation before training: {starts[0]:.2f})."
        )
    every = [_of(r, "test_nll") for r in found]
    if every:
        spread = max(every) - min(every)
        alike = ", too little to tell the strategies apart" if spread < _RESOLUTION else ""
        lines.append(f"All of these scores lie within {spread:.1e} nats{alike}.")
    return lines


def _exactness(found: Sequence[Record]) -> list[str]:
    lines = []
    for dtype in dict.fromkeys(_config(r, "dtype") for r in found):
        for name in dict.fromkeys(_name(r) for r in found):
            errors = [
                _of(r, "gradient_error")
                for r in found
                if _name(r) == name and _config(r, "dtype") == dtype
            ]
            if errors:
                lines.append(
                    f"{name} in {dtype}: errors of the gradient from {min(errors):.1e} to "
                    f"{max(errors):.1e}."
                )
    return lines


def _failures(records: Sequence[Record]) -> list[str]:
    failed = [r for r in records if r.status != OK]
    if not failed:
        return [f"None of {len(records)} failed."]
    told = "; ".join(
        f"{_name(r)} in {_config(r, 'dtype')} at {_config(r, 'atol'):.0e} ({r.status})"
        for r in failed
    )
    return [f"{len(failed)} of {len(records)} failed: {told}."]


def _method_axis(records: Sequence[Record]) -> dict[str, float]:
    order = list(dict.fromkeys(_config(r, "method") for r in records))
    return {r.name: order.index(_config(r, "method")) for r in records}


def _sweep_figure(records: Sequence[Record], places: dict[str, float], label: str) -> Figure:
    """Error, score and memory along an axis, a line for each strategy and precision."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    figures: tuple[Callable[[Record], float], ...] = (
        lambda r: max(_of(r, "gradient_error"), FLOOR),
        lambda r: _of(r, "test_nll"),
        _memory,
    )
    _lines(panels, records, places, figures)
    titles = ("Error of the gradient", "Test NLL after training [nats]", "Peak memory [MiB]")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel=label)
        _sweep_axis(axes, records, places, label)
    panels[0].set(yscale="log", ylabel="relative L2 error")
    low, high = panels[1].get_ylim()
    spare = max(0.0, _RESOLUTION - (high - low)) / 2
    panels[1].set_ylim(low - spare, high + spare)
    panels[1].ticklabel_format(axis="y", useOffset=False)
    panels[2].set(yscale="log")
    styled(panels[2].yaxis)
    _legend(figure, panels[0])
    return figure


def _lines(
    panels: Sequence[Axes],
    records: Sequence[Record],
    places: Mapping[str, float],
    figures: Sequence[Callable[[Record], float]],
) -> None:
    """A line for each strategy and precision in every panel."""
    for name in dict.fromkeys(_name(r) for r in records):
        for dtype in dict.fromkeys(_config(r, "dtype") for r in records):
            mine = [
                r
                for r in records
                if r.status == OK and _name(r) == name and _config(r, "dtype") == dtype
            ]
            colour, marker, _ = strategy_look(name)
            double = dtype == "float64"
            for axes, figure_of in zip(panels, figures, strict=True):
                axes.plot(
                    [places[r.name] for r in mine],
                    [figure_of(r) for r in mine],
                    color=colour,
                    marker=marker,
                    ls="-" if double else ":",
                    mfc=colour if double else "white",
                    ms=6,
                    lw=1.3,
                    label=f"{name}, {dtype}",
                )


def _legend(figure: Figure, axes: Axes) -> None:
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=max(1, len(handles[0]) // 2))


def _sweep_axis(
    axes: Axes, records: Sequence[Record], places: dict[str, float], label: str
) -> None:
    if label == "method":
        ticks = {places[r.name]: _config(r, "method") for r in records}
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=15)
    else:
        axes.set_xscale("log")
        axes.invert_xaxis()


def _sweep_row(record: Record) -> tuple[Any, ...]:
    return (
        _config(record, "dtype"),
        _name(record),
        _of(record, "test_nll"),
        *_cost(record),
        _status(record),
    )


# --- parts of records


def _cost(record: Record) -> tuple[Any, ...]:
    return (
        None if record.result is None else _memory(record),
        record.timing.get("iteration"),
        record.timing.get("gradient"),
        *(
            _of(record, name)
            for name in (
                "evaluations",
                "backward_evaluations",
                "products",
                "accepted",
                "gradient_error",
                "gradient_error_float64",
            )
        ),
    )


def _of(record: Record, name: str) -> Any:
    return None if record.result is None else record.result[name]


def _memory(record: Record) -> float:
    return float(_of(record, "peak_memory")) / MEBIBYTE


def _seconds(record: Record) -> float:
    return record.timing["gradient"]


def _config(record: Record, name: str) -> Any:
    return record.settings["config"][name]


def _name(record: Record) -> str:
    name: str = record.settings["strategy"]
    return name


def _is_exact(record: Record) -> bool:
    return strategy(_name(record)).exact


def _components(record: Record) -> int:
    blocks: int = _config(record, "blocks")
    return blocks if _config(record, "model") == "mlp" else 3 * blocks


def _status(record: Record) -> str:
    return record.status if record.status == OK else f"failed: {record.status}"


def _sets(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(_of(r, "data") for r in records if r.result is not None))


def _span(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:.3g} to {found[-1]:.3g}" if found else "nothing measured"
