"""Figures of the study of physical systems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def energies(kept: Mapping[str, Mapping[str, Any]]) -> Figure:
    """True energy along the reference and along predictions; learned against true energy.

    Args:
        kept: What ``Training.scores`` kept of each prediction, by what made it.
    """
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = [(label, k) for label, k in kept.items() if k.get("t") is not None]
    for i, (label, k) in enumerate(drawn):
        colour = _COLOURS[i % len(_COLOURS)]
        if not i:
            left.plot(k["t"], k["true_energy"], color="black", lw=2.5, label="reference")
        left.plot(k["t"], k["predicted_energy"], color=colour, lw=1.3, label=label)
        if k["learned"] is not None:
            learned = torch.tensor(k["learned"], dtype=torch.float64)
            true = torch.tensor(k["predicted_energy"], dtype=torch.float64)
            shifted = learned - learned.mean() + true.mean()
            right.plot(k["t"], shifted, color=colour, lw=1.3, label=f"learned ({label})")
            right.plot(k["t"], true, color=colour, lw=1.3, ls=":", label=f"true ({label})")
    left.set(xlabel="t", ylabel="true energy", title="True energy along each trajectory")
    right.set(
        xlabel="t", ylabel="energy, means aligned", title="Along the prediction: learned and true"
    )
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def space_time(kept: Mapping[str, Any], length: float) -> Figure:
    """Fields over space and time: the reference, a prediction, and their difference.

    Args:
        kept: What ``Training.scores`` kept.
        length: Length of the interval.
    """
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    truth, y = (torch.tensor(x, dtype=torch.float64) for x in kept["fields"])
    bound = float(truth.abs().max())
    off = float((y - truth).abs().max()) or 1.0
    extent = (0.0, float(kept["t"][-1]), 0.0, length)
    panels = (
        ("reference", truth, bound, "RdBu_r"),
        ("prediction", y, bound, "RdBu_r"),
        ("prediction - reference", y - truth, off, "PuOr_r"),
    )
    for axes, (title, field, limit, colours) in zip(
        figure.subplots(1, 3, sharey=True), panels, strict=True
    ):
        image = axes.imshow(
            field.T.numpy(),
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap=colours,
            vmin=-limit,
            vmax=limit,
        )
        axes.set(title=title, xlabel="t")
        axes.grid(False)
        figure.colorbar(image, ax=axes, shrink=0.9)
    figure.axes[0].set_ylabel("x")
    return figure
