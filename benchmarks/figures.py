"""Figures of the results, as SVG, drawn without touching matplotlib's global state."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from benchmarks.measure import Record

# Okabe and Ito's palette, which colour-blind readers can tell apart, a package each.
_COLOURS = {
    "torchdiffeq": "#000000",
    "torchode": "#E69F00",
    "TorchDiffEqPack": "#CC79A7",
    "zuko": "#56B4E9",
    "diffrax": "#0072B2",
    "jax": "#009E73",
    "ours": "#D55E00",
}
_MARKERS = "osDv^P*Xh<>pd8H"
_RC: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.hashsalt": "benchmarks",  # the same figures give the same file
}


def costs(title: str, records: Mapping[str, Record]) -> bytes:
    """Time a step against peak memory, each peer a point.

    Args:
        title: Name of the problem.
        records: Its records by peer; those without a time or a peak, and those of another method,
            whose steps are not to be compared, are left out.
    """
    points = [r for r in records.values() if r.step is not None and r.peak and not r.other_method]
    looks = styles(r.peer for r in points)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        for record in points:
            look = {**looks[record.peer], "linestyle": "none", "label": record.peer}
            axes.plot(record.peak or 0, record.step or 0, markersize=7, **look)
        axes.set_title(f"{title}: lower left is better; filled: compiled")
        axes.set_xlabel("peak memory")
        axes.set_ylabel("time of forward and backward, a step")
        _logarithmic(axes, "B", "s")
        figure.legend(loc="outside right center", fontsize=8)
        return _svg(figure)


def curves(title: str, label: str, series: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Time and peak memory against a size, each peer a line.

    Args:
        title: What grows.
        label: Of the horizontal axis.
        series: By peer its points, with ``"x"``, ``"seconds"`` and ``"peak"``.
    """
    looks = styles(series)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, quantity, unit, name in zip(
            panels, ("seconds", "peak"), "sB", ("forward and backward", "peak memory"), strict=True
        ):
            for peer, points in series.items():
                found = [(p["x"], p[quantity]) for p in points if p[quantity]]
                label_of = peer if axes is panels[0] else None
                x, y = [each for each, _ in found], [each for _, each in found]
                axes.plot(x, y, label=label_of, linewidth=1.2, markersize=5, **looks[peer])
            axes.set_title(f"{title}: {name}")
            axes.set_xlabel(label)
            _logarithmic(axes, "", unit)
        figure.legend(loc="outside right center", fontsize=8)
        return _svg(figure)


def budgets(title: str, points: Sequence[Mapping[str, Any]]) -> bytes:
    """Time of a solve and its gradient against the memory it took.

    Args:
        title: What was solved.
        points: With ``"name"``, ``"resident"``, and the seconds that it took (``"measured"``), that
            it should have taken with its steps taken again (``"expected"``), and with the fewest
            possible of them (``"fewest"``).
    """
    x = [p["resident"] for p in points]
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        measured, expected, fewest = (
            [p[name] for p in points] for name in ("measured", "expected", "fewest")
        )
        axes.plot(x, measured, "o", color=_COLOURS["ours"], label="measured")
        axes.plot(x, expected, "_", markersize=16, color="#000000", label="by the steps retaken")
        axes.plot(x, fewest, color="#777777", linewidth=1.0, label="by the fewest possible")
        for p in points:
            place = p["resident"], p["measured"]
            side = "right" if p["resident"] == max(x) else "left"
            axes.annotate(p["name"], place, (0, 8), textcoords="offset points", ha=side)
        axes.set_title(f"{title}: time against memory")
        axes.set_xlabel("growth of resident memory")
        axes.set_ylabel("forward and backward")
        axes.set_xscale("log")
        axes.set_ylim(0, 1.12 * max(measured))  # the label of the highest lies below the title
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(EngFormatter(unit="s"))
        axes.legend()
        return _svg(figure)


def styles(peers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour by package and marker within it; entries that are compiled are filled."""
    used: dict[str, int] = {}
    found = {}
    for peer in peers:
        package = peer.partition("/")[0]
        index = used[package] = used.get(package, -1) + 1
        colour = _COLOURS.get(package, "#777777")
        eager = package not in ("diffrax", "jax") and not peer.endswith(
            ("/compiled", "/step", "/loop")
        )
        found[peer] = {
            "color": colour,
            "marker": _MARKERS[index % len(_MARKERS)],
            "markerfacecolor": "white" if eager else colour,
        }
    return found


def _logarithmic(axes: Axes, x_unit: str, y_unit: str) -> None:
    """Both axes logarithmic, their ticks with units."""
    for axis, unit in ((axes.xaxis, x_unit), (axes.yaxis, y_unit)):
        if axis is axes.xaxis:
            axes.set_xscale("log")
        else:
            axes.set_yscale("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
        axis.set_major_formatter(EngFormatter(unit=unit))
        axis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
