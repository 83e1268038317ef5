"""Figures of a comparison; of matplotlib's global state only the order of its fonts is touched."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import LogLocator, NullFormatter

from symplectic_adjoint.datasets import Dataset
from symplectic_adjoint.experiments.results import Results, StrategyResult
from symplectic_adjoint.models import ContinuousFlow

MEBIBYTE = 2**20
FLOOR = 1e-17
"""A logarithmic axis has no zero: what agrees to the last bit is drawn here."""

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers say it again.
_STYLES = {
    "backprop": ("#000000", "o", "-"),
    "checkpoint": ("#E69F00", "s", (0, (6, 2))),
    "aca": ("#009E73", "^", (0, (4, 2))),
    "symplectic": ("#D55E00", "D", (0, (3, 2))),
    "symplectic-steps": ("#56B4E9", "X", (0, (5, 1))),
    "continuous": ("#0072B2", "v", (0, (2, 1))),
    "mali": ("#CC79A7", "P", (0, (1, 1))),
}
_GRID = 100
_SAMPLES = 10
_RC: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.dpi": 110,
    "legend.frameon": False,
    "svg.hashsalt": "symplectic-adjoint",
}


def figures(
    results: Results, data: Dataset, models: Mapping[str, ContinuousFlow]
) -> dict[str, bytes]:
    """Draws every figure that the results have data for.

    Args:
        results: The results.
        data: The rows.
        models: The trained flow of each strategy that finished.

    Returns:
        PNG images by name: "learning_curves", "costs" and "memory_against_steps", "densities" for
        data in the plane, "samples" for images.
    """
    drawn: dict[str, bytes] = {}
    with style():
        drawn["learning_curves"] = png(learning_curves(results))
        measured = [s for s in results.strategies if s.cost is not None]
        if measured:
            drawn["costs"] = png(costs(measured, results.config.dtype))
        if any(point.steps is not None for s in measured for point in s.sweep):
            drawn["memory_against_steps"] = png(memory_against_steps(measured))
        if models and data.dim == 2:
            drawn["densities"] = png(densities(data, models))
        if models and data.image_shape is not None:
            drawn["samples"] = png(samples(data, data.image_shape, models))
    return drawn


def style() -> AbstractContextManager[None]:
    """The settings that all figures share, for the time of a with block."""
    _prefer_bundled_fonts()
    context: AbstractContextManager[None] = matplotlib.rc_context(_RC)
    return context


@cache
def _prefer_bundled_fonts() -> None:
    # A machine's own DejaVu numbers its glyphs otherwise, and Matplotlib's list of fonts, which is
    # kept between processes, may lack the bundled ones: a figure would depend on the machine.
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for path in sorted(folder.glob("*.ttf")):
        fontManager.addfont(path)
    fontManager.ttflist.sort(key=lambda font: not Path(font.fname).is_relative_to(folder))


def png(figure: Figure) -> bytes:
    """A figure as a PNG image."""
    return _image(figure, "png", None)


def svg(figure: Figure) -> bytes:
    """A figure as an SVG image, the same bytes whenever it is drawn."""
    return _image(figure, "svg", {"Date": None})


def _image(figure: Figure, kind: str, metadata: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, bbox_inches="tight", facecolor="white", metadata=metadata)
    return buffer.getvalue()


def learning_curves(results: Results) -> Figure:
    """Validation score against iterations and against time, with the scores to judge it by."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for result in results.strategies:
        history = result.history
        if not history.validation:
            continue
        iterations = [iteration for iteration, _ in history.validation]
        scores = [score for _, score in history.validation]
        elapsed = [0.0, *itertools.accumulate(history.seconds)]
        colour, marker, dash = strategy_look(result.name)
        look: dict[str, Any] = {"color": colour, "marker": marker, "ls": dash, "ms": 4, "lw": 1.4}
        left.plot(iterations, scores, label=_label(result), **look)
        right.plot([elapsed[i] for i in iterations], scores, **look)
    gaussian = results.data.gaussian_nll
    if gaussian is not None:
        for axes in (left, right):
            axes.axhline(gaussian, color="#888888", lw=1, ls=":")
        left.annotate(
            "Gaussian with full covariance (test)",
            (0.02, gaussian),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="bottom",
            color="#666666",
            fontsize=8.5,
        )
    left.set(xlabel="iteration", ylabel="validation NLL [nats]", title="Same batches, same noise")
    right.set(xlabel="training time [s]", title="Against time")
    left.legend()
    return figure


def costs(measured: Sequence[StrategyResult], dtype: str) -> Figure:
    """Gradient error, peak memory and time of one iteration, a bar for each strategy."""
    figure = Figure(figsize=(10.5, 0.42 * len(measured) + 1.5), layout="constrained")
    error, memory, time = figure.subplots(1, 3, sharey=True)
    rows = range(len(measured))
    costs_ = [s.cost for s in measured if s.cost is not None]
    _dots(error, [c.gradient_error for c in costs_], "o", f"in {dtype}")
    if dtype != "float64":
        _dots(error, [c.gradient_error_float64 for c in costs_], "D", "in float64")
    error.set_xscale("log")
    error.set(xlabel="relative L2 error", title="Error of the gradient")
    error.xaxis.set_minor_formatter(NullFormatter())
    error.legend(fontsize=8, loc="upper left", bbox_to_anchor=(-0.02, -0.22), ncols=2)
    colours = [strategy_look(s.name)[0] for s in measured]
    _bars(memory, [c.peak_memory / MEBIBYTE for c in costs_], colours, "{:.3g}")
    memory.set(xlabel="MiB", title="Peak memory of one gradient")
    _bars(time, [s.seconds_per_iteration or 0.0 for s in measured], colours, "{:.3g}")
    time.set(xlabel="seconds", title="Time of one iteration (median)")
    error.set_yticks(list(rows), [_label(s) for s in measured])
    error.invert_yaxis()
    return figure


def memory_against_steps(measured: Sequence[StrategyResult]) -> Figure:
    """Peak memory of one gradient while the tolerance drives the number of steps."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for result in measured:
        points = [
            (point.steps, point.peak_memory / MEBIBYTE)
            for point in result.sweep
            if point.steps is not None and point.peak_memory is not None
        ]
        if points:
            colour, marker, dash = strategy_look(result.name)
            steps, memory = zip(*points, strict=True)
            axes.plot(
                steps,
                memory,
                color=colour,
                marker=marker,
                ls=dash,
                ms=6,
                lw=1.5,
                label=_label(result),
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        styled(axis)
    axes.set(
        xlabel="accepted steps, all blocks",
        ylabel="peak memory [MiB]",
        title="Memory of one gradient as the tolerance tightens (float64)",
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def densities(data: Dataset, models: Mapping[str, ContinuousFlow]) -> Figure:
    """Heat-maps of the learned densities beside the data, for data in the plane."""
    rows = data.restore(data.train)
    low, high = rows.quantile(0.002, dim=0), rows.quantile(0.998, dim=0)
    margin = 0.12 * (high - low)
    low, high = low - margin, high + margin
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    panels: list[tuple[str, Callable[[Axes], object]]] = [
        ("data", lambda axes: _histogram(axes, rows, extent))
    ]
    maps = {name: density_map(data, model, extent) for name, model in models.items()}
    peak = max(float(values.quantile(0.998)) for values in maps.values())
    for name, values in maps.items():
        panels.append((name, _heat_map(values, extent, peak)))
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2.7 * columns, 2.9 * lines), layout="constrained")
    for axes, panel in itertools.zip_longest(figure.subplots(lines, columns).flat, panels):
        if panel is None:
            axes.set_axis_off()
            continue
        title, draw = panel
        draw(axes)
        axes.set(title=title, xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_aspect("equal", adjustable="box")
    return figure


@torch.no_grad()
def density_map(
    data: Dataset, model: ContinuousFlow, extent: tuple[float, float, float, float]
) -> torch.Tensor:
    """The density in original coordinates at the centres of 100 x 100 cells, a row for each y."""
    left, right, bottom, top = extent
    centres = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
    y, x = torch.meshgrid(
        bottom + (top - bottom) * centres, left + (right - left) * centres, indexing="ij"
    )
    points = (torch.stack((x.flatten(), y.flatten()), dim=1) - data.mean) / data.scale
    trace, model.trace = model.trace, "exact"
    try:
        log_prob = model.log_prob(points.to(next(model.parameters())))
    finally:
        model.trace = trace
    return (log_prob.double().cpu() - data.log_scale).exp().reshape(_GRID, _GRID)


def samples(data: Dataset, shape: tuple[int, int], models: Mapping[str, ContinuousFlow]) -> Figure:
    """Test images beside samples of each flow, all from the same base samples."""
    rows = {"test rows": data.restore(data.test[:_SAMPLES])}
    for name, model in models.items():
        drawn = model.sample(_SAMPLES, torch.Generator().manual_seed(0)).double().cpu()
        rows[name] = data.restore(drawn)
    figure = Figure(figsize=(0.75 * _SAMPLES + 1.2, 0.8 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), _SAMPLES, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.reshape(shape).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def styled(axis: Axis) -> None:
    """Numbers written out along a logarithmic axis of few decades."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _dots(axes: Axes, values: Sequence[float], marker: str, label: str) -> None:
    # A log axis has no zero: what agrees to the last bit is drawn below all rounding.
    shown = [max(value, FLOOR) for value in values]
    axes.plot(shown, range(len(shown)), ls="", marker=marker, ms=6, label=label, color=_DOT[marker])


_DOT = {"o": "#D55E00", "D": "#0072B2"}


def _bars(axes: Axes, values: Sequence[float], colours: Sequence[str], text: str) -> None:
    bars = axes.barh(range(len(values)), values, color=colours, height=0.62)
    axes.bar_label(bars, [text.format(value) for value in values], padding=3, fontsize=9)
    axes.margins(x=0.16)
    axes.grid(False, axis="y")


def _histogram(axes: Axes, rows: torch.Tensor, extent: tuple[float, float, float, float]) -> object:
    box = [list(extent[:2]), list(extent[2:])]
    x, y = rows.T.numpy()
    return axes.hist2d(x, y, bins=_GRID * 2 // 3, range=box, cmap="magma")


def _heat_map(
    values: torch.Tensor, extent: tuple[float, float, float, float], peak: float
) -> Callable[[Axes], object]:
    def draw(axes: Axes) -> object:
        return axes.imshow(
            values.numpy(), origin="lower", extent=extent, cmap="magma", vmin=0, vmax=peak
        )

    return draw


def strategy_look(strategy: str) -> tuple[str, str, Any]:
    """Colour, marker and dashes of a strategy, the same in every figure."""
    return _STYLES.get(strategy, ("#666666", "x", "-"))


def _label(result: StrategyResult) -> str:
    solver = f" ({result.method})" if result.own_solver else ""
    return f"{result.name}{solver}" + ("" if result.exact else ", not exact")
