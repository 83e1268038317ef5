"""Sensitivities of the steady state of a signalling cascade, and why not to unroll the way there.

Three proteins in a row, each switched on by the one before and off by an enzyme of its own, as in
the MAPK cascade. The steady state is known in closed form, so that errors of its sensitivities can
be measured: of the implicit function theorem, and of a gradient through the solution up to a time.

    python examples/steady_state.py --figure docs/assets/steady_state.png
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import symplectic_adjoint as sa
from symplectic_adjoint.memory import peak_memory

TIERS = 3
# Rates of activation and of inactivation, and the constants at which the two enzymes saturate.
RATES = torch.tensor(
    [[1.0, 2.0, 2.0], [0.5, 1.0, 1.0], [0.1, 0.1, 0.1], [0.1, 0.1, 0.1]], dtype=torch.float64
)
STIMULUS = 0.49  # near the threshold, where the response is steep and the way to it slow
SPANS = (3.0, 10.0, 30.0, 100.0, 300.0)
RTOLS = (1e-3, 1e-5, 1e-7)


calls: Counter[str] = Counter()


def cascade(t: Tensor, active: Tensor, stimulus: Tensor, rates: Tensor) -> Tensor:
    """How fast the active fractions (..., 3) change, for stimuli (...)."""
    calls["cascade"] += 1
    on, off, k_on, k_off = rates.unbind()
    drive = torch.cat([stimulus.unsqueeze(-1), active[..., :-1]], dim=-1) * on
    return drive * (1 - active) / (k_on + 1 - active) - off * active / (k_off + active)


def closed_form(stimulus: Tensor, rates: Tensor) -> Tensor:
    """The steady state: one tier after the other (Goldbeter, Koshland, PNAS 1981, eq. (8))."""
    drive, active = stimulus, []
    for on, off, k_on, k_off in rates.unbind(-1):
        drive = drive * on
        b = off - drive + off * k_on + drive * k_off
        drive = 2 * drive * k_off / (b + (b**2 - 4 * (off - drive) * drive * k_off).sqrt())
        active.append(drive)
    return torch.stack(active, dim=-1)


def implicit(stimulus: Tensor, rates: Tensor) -> Tensor:
    """The steady state by the implicit function theorem."""
    start = torch.zeros(*stimulus.shape, TIERS, dtype=rates.dtype)
    y: Tensor = sa.steady_state(cascade, start, args=(stimulus, rates))
    return y


def unrolled(stimulus: Tensor, rates: Tensor, span: float, rtol: float, gradient: str) -> Tensor:
    """The solution at a time, with the gradient of all steps up to there."""
    start = torch.zeros(*stimulus.shape, TIERS, dtype=rates.dtype)
    sol = sa.solve(
        cascade,
        start,
        [0.0, span],
        args=(stimulus, rates),
        rtol=rtol,
        atol=1e-2 * rtol,
        gradient=gradient,
    )
    y: Tensor = sol.y[-1]
    return y


State = Callable[[Tensor, Tensor], Tensor]
"""Gives the active fractions (..., 3) from stimuli (...) and rates."""


class Row(NamedTuple):
    """One way to the gradient of the last tier: how far it is off, and what it takes.

    Attributes:
        way: "implicit", or the strategy of the solve.
        rtol: Relative tolerance of the solve.
        span: Up to which time was solved.
        error: Of the gradient by stimulus and rates, relative, against the closed form.
        memory: Peak live bytes of forward and backward pass.
        calls: Evaluations of the cascade, in both passes.
    """

    way: str
    rtol: float
    span: float
    error: float
    memory: int
    calls: int


def measure(way: str, state: State, rtol: float = 0.0, span: float = 0.0) -> Row:
    """What the gradient takes, and how far it is off."""
    found: list[Tensor] = []
    calls.clear()
    memory = peak_memory(lambda: found.extend(gradients(state)))
    exact = torch.cat(gradients(closed_form))
    error = float((torch.cat(found) - exact).norm() / exact.norm())
    return Row(way, rtol, span, error, memory, calls.total())


def compare(spans: Sequence[float] = SPANS, rtols: Sequence[float] = RTOLS) -> list[Row]:
    """The implicit function theorem first, then solves up to some times with some tolerances.

    Strategies differ in memory alone, which is measured at the last tolerance.
    """
    rows = [measure("implicit", implicit)]
    ways = [("symplectic", rtol) for rtol in rtols] + [("backprop", rtols[-1])]
    for gradient, rtol in ways:
        for span in spans:
            state = functools.partial(unrolled, span=span, rtol=rtol, gradient=gradient)
            rows.append(measure(gradient, state, rtol, span))
    return rows


def gradients(state: State) -> tuple[Tensor, Tensor]:
    """Of the last tier: by the stimulus (1,), and by the rates (12,)."""
    stimulus = torch.tensor([STIMULUS], dtype=torch.float64, requires_grad=True)
    rates = RATES.clone().requires_grad_()
    last = state(stimulus, rates)[..., -1].sum()
    found = torch.autograd.grad(last, [stimulus, rates])
    return found[0], found[1].reshape(-1)


def difference(index: int, size: float = 1e-6) -> float:
    """A central difference of the last tier by a rate, to compare with."""
    step = torch.zeros(RATES.numel(), dtype=torch.float64)
    step[index] = size
    step = step.view_as(RATES)
    stimulus = torch.tensor([STIMULUS], dtype=torch.float64)
    high, low = implicit(stimulus, RATES + step), implicit(stimulus, RATES - step)
    return float((high - low)[0, -1]) / (2 * size)


def response(points: int = 41) -> tuple[Tensor, Tensor, Tensor]:
    """Stimuli (n,), the steady states (n, 3), and the response d log x3 / d log stimulus (n,).

    All stimuli are one state: no sample moves another, so one product gives all slopes.
    """
    stimuli = torch.linspace(0.3, 0.7, points, dtype=torch.float64).requires_grad_()
    states = implicit(stimuli, RATES)
    (slopes,) = torch.autograd.grad(states[:, -1].sum(), stimuli)
    return stimuli.detach(), states.detach(), slopes * stimuli.detach() / states[:, -1].detach()


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the response, and error, memory and cost by the time up to which is solved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    (states, error), (memory, cost) = figure.subplots(2, 2)
    draw_response(states)
    best, colors = rows[0], ("#56B4E9", "#009E73", "#D55E00")
    rtols = sorted({row.rtol for row in rows[1:]}, reverse=True)
    for axes, what in ((error, "error"), (cost, "calls")):
        for rtol, color in zip(rtols, colors, strict=False):
            own = [row for row in rows if row.way == "symplectic" and row.rtol == rtol]
            values = [getattr(row, what) for row in own]
            label = f"unrolled, rtol {rtol:.0e}"
            axes.loglog([row.span for row in own], values, color=color, marker="o", label=label)
        axes.axhline(getattr(best, what), color="black", label="implicit")
    for way, color in (("backprop", "#56B4E9"), ("symplectic", "#D55E00")):
        own = [row for row in rows if row.way == way and row.rtol == rtols[-1]]
        values = [row.memory / 1e3 for row in own]
        label = f"unrolled, {way}"
        memory.loglog([row.span for row in own], values, color=color, marker="o", label=label)
    memory.axhline(best.memory / 1e3, color="black", label="implicit")
    error.set(xlabel="time solved", title="relative error of the gradient")
    memory.set(xlabel="time solved", title=f"peak memory [kB] at rtol {rtols[-1]:.0e}")
    cost.set(xlabel="time solved", title="evaluations, both passes")
    for axes in (error, memory, cost):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def draw_response(axes: Any) -> None:
    """Draws the steady state over the stimulus, and the slope of the last tier."""
    stimuli, states, slopes = response()
    for i, color in enumerate(("#56B4E9", "#009E73", "#D55E00")):
        axes.plot(stimuli, states[:, i], color=color, label=f"tier {i + 1}")
    axes.axvline(STIMULUS, color="#888888", lw=0.8)
    axes.set(xlabel="stimulus", ylabel="active fraction", title="the steady state")
    axes.legend(frameon=False, loc="upper left")
    twin = axes.twinx()
    twin.plot(stimuli, slopes, color="black", ls=":")
    twin.set_ylabel("d log (tier 3) / d log stimulus, dotted")


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, help="where to draw the result")
    options = parser.parse_args()
    rows = compare()
    print("way            rtol  time   error of gradient   peak memory     calls")
    for row in rows:
        rtol, span = (f"{row.rtol:.0e}", f"{row.span:g}") if row.span else ("", "")
        memory = f"{row.memory / 1e3:.1f} kB"
        print(f"{row.way:11} {rtol:>7} {span:>5} {row.error:19.1e} {memory:>13} {row.calls:9}")
    _, slopes = gradients(implicit)
    index = int(slopes.abs().argmax())
    print(f"largest: {float(slopes[index]):.8f}, by a central difference {difference(index):.8f}")
    if options.figure is not None:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
