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
from typing import NamedTuple

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
SPANS = (1.0, 3.0, 10.0, 30.0, 100.0)


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


def unrolled(stimulus: Tensor, rates: Tensor, span: float, gradient: str) -> Tensor:
    """The solution at a time, with the gradient of all steps up to there."""
    start = torch.zeros(*stimulus.shape, TIERS, dtype=rates.dtype)
    sol = sa.solve(
        cascade, start, [0.0, span], args=(stimulus, rates), rtol=1e-6, atol=1e-8, gradient=gradient
    )
    y: Tensor = sol.y[-1]
    return y


State = Callable[[Tensor, Tensor], Tensor]
"""Gives the active fractions (..., 3) from stimuli (...) and rates."""


class Row(NamedTuple):
    """One way to the gradient of the last tier: how far it is off, and what it takes.

    Attributes:
        way: "implicit", or the strategy of the solve.
        span: Up to which time was solved; zero where that does not matter.
        error: Of the gradient by stimulus and rates, relative, against the closed form.
        memory: Peak live bytes of forward and backward pass.
        calls: Evaluations of the cascade, in both passes.
    """

    way: str
    span: float
    error: float
    memory: int
    calls: int


def compare(spans: Sequence[float] = SPANS) -> list[Row]:
    """Measure the implicit function theorem, and solves up to some times under two strategies."""
    ways: list[tuple[str, float, State]] = [("implicit", 0.0, implicit)]
    for gradient in ("backprop", "symplectic"):
        for span in spans:
            solve = functools.partial(unrolled, span=span, gradient=gradient)
            ways.append((gradient, span, solve))
    exact = torch.cat(gradients(closed_form))
    rows = []
    for way, span, state in ways:
        found: list[Tensor] = []
        calls.clear()
        memory = peak_memory(lambda state=state, found=found: found.extend(gradients(state)))
        error = float((torch.cat(found) - exact).norm() / exact.norm())
        rows.append(Row(way, span, error, memory, calls.total()))
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


def response(points: int = 25) -> tuple[Tensor, Tensor, Tensor]:
    """Stimuli (n,), the steady states (n, 3), and the response d log x3 / d log stimulus (n,).

    All stimuli are one state: no sample moves another, so one product gives all slopes.
    """
    stimuli = torch.linspace(0.3, 0.7, points, dtype=torch.float64).requires_grad_()
    states = implicit(stimuli, RATES)
    (slopes,) = torch.autograd.grad(states[:, -1].sum(), stimuli)
    return stimuli.detach(), states.detach(), slopes * stimuli.detach() / states[:, -1].detach()


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the response, and error and memory by the time up to which is solved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.4), layout="constrained")
    left, middle, right, last = figure.subplots(1, 4)
    stimuli, states, slopes = response()
    for i, color in enumerate(("#56B4E9", "#009E73", "#D55E00")):
        left.plot(stimuli, states[:, i], color=color, label=f"tier {i + 1}")
    left.set(xlabel="stimulus", ylabel="active fraction", title="the steady state")
    twin = left.twinx()
    twin.plot(stimuli, slopes, color="black", ls=":", label="d log x3 / d log stimulus")
    twin.set_ylabel("response of tier 3 (dotted)")
    left.legend(frameon=False)
    best = next(row for row in rows if row.way == "implicit")
    styles = {"backprop": ("#56B4E9", "o"), "symplectic": ("#D55E00", "s")}
    for way, (color, marker) in styles.items():
        own = [row for row in rows if row.way == way]
        spans = [row.span for row in own]
        label = f"unrolled, {way}"
        middle.loglog(spans, [row.error for row in own], color=color, marker=marker, label=label)
        right.loglog(spans, [row.memory / 1e3 for row in own], color=color, marker=marker)
        last.loglog(spans, [row.calls for row in own], color=color, marker=marker)
    middle.axhline(best.error, color="black", label="implicit")
    right.axhline(best.memory / 1e3, color="black")
    last.axhline(best.calls, color="black")
    middle.set(xlabel="time solved", title="relative error of the gradient")
    right.set(xlabel="time solved", title="peak memory [kB]")
    last.set(xlabel="time solved", title="evaluations, both passes")
    middle.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, help="where to draw the result")
    options = parser.parse_args()
    rows = compare()
    print("way         time solved   error of gradient   peak memory     calls")
    for row in rows:
        span = f"{row.span:g}" if row.span else "-"
        print(
            f"{row.way:11} {span:>11} {row.error:19.1e} {row.memory / 1e3:10.1f} kB {row.calls:9}"
        )
    _, slopes = gradients(implicit)
    index = int(slopes.abs().argmax())
    print(f"largest: {float(slopes[index]):.8f}, by a central difference {difference(index):.8f}")
    if options.figure is not None:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
