"""Draw the figures of the documentation's page on inverse problems from the examples beside this.

python examples/figures.py docs/assets
"""

from __future__ import annotations

import sys
from pathlib import Path

import data_assimilation as assimilation
import pendulum_identification as pendulum
import torch
from matplotlib.figure import Figure


def pendulum_figure() -> Figure:
    """Measured angles, those of the first guess, and those that were fitted."""
    data = pendulum.measured()
    found = pendulum.fit(data)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    with torch.no_grad():
        before, after = pendulum.angles(pendulum.GUESS), pendulum.angles(found.parameters)
    for i, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        axes.plot(pendulum.TIMES, data[:, i], ".", ms=4, color="black", label="measured")
        axes.plot(pendulum.TIMES, before[:, i], "--", color="#56B4E9", label="first guess")
        axes.plot(pendulum.TIMES, after[:, i], color="#D55E00", label="fitted")
        axes.set(xlabel="t [s]", title=f"angle {i + 1}")
    figure.axes[0].set_ylabel("rad")
    figure.axes[0].legend(frameon=False)
    return figure


def assimilation_figure() -> Figure:
    """Fields over space and time: truth with observations, what was found, and the error."""
    analysis = assimilation.assimilate()
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    extent = (0.0, float(assimilation.TIMES[-1]), 0.0, assimilation.LENGTH)
    for panel, (title, field) in zip(
        axes[:2],
        (("truth, observed at the dots", analysis.truth), ("found", analysis.found)),
        strict=True,
    ):
        image = panel.imshow(
            field.T, origin="lower", aspect="auto", extent=extent, cmap="RdBu_r", vmin=-3, vmax=3
        )
        panel.set(title=title, xlabel="t", ylabel="x")
    figure.colorbar(image, ax=axes[1])
    spacing = assimilation.LENGTH / assimilation.POINTS
    x = torch.arange(0, assimilation.POINTS, assimilation.EVERY) * spacing
    t = assimilation.TIMES[1:]
    axes[0].plot(t.repeat_interleave(len(x)), x.repeat(len(t)), "k.", ms=2)
    before, after = analysis.errors()
    axes[2].semilogy(assimilation.TIMES, before, "--", color="#56B4E9", label="no information")
    axes[2].semilogy(assimilation.TIMES, after, color="#D55E00", label="found")
    axes[2].set(xlabel="t", title="relative error of the field")
    axes[2].legend(frameon=False)
    return figure


def main() -> None:
    """Draw all."""
    folder = Path(sys.argv[1])
    for name, draw in (("pendulum", pendulum_figure), ("assimilation", assimilation_figure)):
        draw().savefig(folder / f"{name}.png", dpi=100, facecolor="white")
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
