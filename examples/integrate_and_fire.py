"""Fit an integrate-and-fire neuron to the times of its spikes.

The membrane potential leaks and is driven by a current; where it reaches the threshold, the neuron
spikes and the potential is reset. The times of the spikes are differentiable, through all resets
before; their derivatives are compared with those of a formula and with finite differences.

    python examples/integrate_and_fire.py --figure docs/assets/integrate_and_fire.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import symplectic_adjoint as sa

START = 0.4
# So that what is left of the errors of derivatives is not that of the solution.
FINE: dict[str, Any] = {"method": "dopri8", "rtol": 1e-12, "atol": 1e-12}
TRUE = (0.6, 2.0)
GUESS = (0.7, 1.8)


class Neuron(nn.Module):
    """``v' = current - v / tau``, with a spike where ``v`` reaches the threshold 1."""

    def __init__(self, current: float, tau: float) -> None:
        super().__init__()
        self.current = nn.Parameter(torch.tensor(current, dtype=torch.float64))
        self.tau = nn.Parameter(torch.tensor(tau, dtype=torch.float64))

    def forward(self, t: Tensor, v: Tensor) -> Tensor:
        """The derivative of the potential."""
        return self.current - v / self.tau

    def spikes(self, count: int, horizon: float = 100.0, **options: Any) -> Tensor:
        """The times of the first spikes, (count,); the potential starts at 0.4."""
        spike = sa.Event(lambda t, v: v - 1.0, direction=1)
        end = torch.tensor(horizon, dtype=torch.float64)
        t, v, times = torch.zeros_like(end), torch.full_like(end, START), []
        for _ in range(count):
            sol = sa.solve(self, v, torch.stack([t, end]), event=spike, **options)
            if sol.event is None:
                raise RuntimeError(f"the neuron is silent after t = {t.item():.3g}")
            t, v = sol.event.t, torch.zeros_like(end)
            times.append(t)
        return torch.stack(times)

    def formula(self, count: int) -> Tensor:
        """The same without a solver, (count,)."""
        high = self.current * self.tau
        first = self.tau * torch.log((high - START) / (high - 1))
        return first + torch.arange(count) * self.tau * torch.log(high / (high - 1))

    def derivatives(self, times: Tensor) -> Tensor:
        """Of times by current and time constant, (count, 2)."""
        parameters = list(self.parameters())
        rows = [torch.autograd.grad(t, parameters, retain_graph=True) for t in times]
        return torch.stack([torch.stack(row) for row in rows])


class Fit(NamedTuple):
    """A fit: the neuron, its parameters at each iteration, and the largest misses of spikes."""

    neuron: Neuron
    way: list[tuple[float, float]]
    misses: list[float]


def fit(iterations: int = 8) -> Fit:
    """Recover a neuron from its first three spikes by Gauss-Newton steps."""
    with torch.no_grad():
        wanted = Neuron(*TRUE).spikes(3)
    neuron, way, misses = Neuron(*GUESS), [], []
    for _ in range(iterations):
        times = neuron.spikes(3)
        miss = wanted - times.detach()
        way.append((neuron.current.item(), neuron.tau.item()))
        misses.append(float(miss.abs().max()))
        moves = torch.linalg.lstsq(neuron.derivatives(times), miss).solution
        with torch.no_grad():
            for parameter, move in zip(neuron.parameters(), moves, strict=True):
                parameter.add_(move)
    return Fit(neuron, way, misses)


class Check(NamedTuple):
    """Relative errors of the derivatives of spike times, against those of the formula.

    Attributes:
        exact: Of those through the spikes.
        differences: Of central differences of computed times, by their size.
    """

    exact: float
    differences: dict[float, float]


def check(count: int = 6, sizes: Sequence[float] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)) -> Check:
    """Compare the derivatives of the first spike times by current and time constant."""
    neuron = Neuron(*TRUE)
    wanted = neuron.derivatives(neuron.formula(count))

    def error(found: Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    through = error(neuron.derivatives(neuron.spikes(count, **FINE)))
    return Check(through, {size: error(differences(count, size)) for size in sizes})


@torch.no_grad()
def differences(count: int, size: float) -> Tensor:
    """Central differences of spike times by current and time constant, (count, 2)."""
    current, tau = TRUE

    def times(current: float, tau: float) -> Tensor:
        return Neuron(current, tau).spikes(count, **FINE)

    by_current = times(current + size, tau) - times(current - size, tau)
    by_tau = times(current, tau + size) - times(current, tau - size)
    return torch.stack([by_current, by_tau], dim=1) / (2 * size)


@torch.no_grad()
def potential(neuron: Neuron, count: int) -> tuple[Tensor, Tensor]:
    """Times and potentials up to the last of some spikes, to be drawn."""
    t, v = 0.0, torch.tensor(START, dtype=torch.float64)
    times, values = [], []
    for end in neuron.spikes(count):
        within = torch.linspace(t, float(end), 30, dtype=torch.float64)
        values += [sa.solve(neuron, v, within).y, torch.zeros(1, dtype=torch.float64)]
        times += [within, within[-1:]]
        t, v = float(end), torch.zeros_like(v)
    return torch.cat(times), torch.cat(values)


def draw(found: Fit, checked: Check, path: Path) -> None:
    """Draws potentials before and after the fit, its progress, and the errors of derivatives."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    for neuron, color, style, width, label in (
        (Neuron(*TRUE), "#AAAAAA", "-", 4, "wanted"),
        (Neuron(*GUESS), "#56B4E9", "--", 1.5, "first guess"),
        (found.neuron, "#D55E00", "-", 1.5, "fitted"),
    ):
        left.plot(*potential(neuron, 3), color=color, ls=style, lw=width, label=label)
    left.axhline(1.0, color="#888888", lw=0.8)
    left.set(xlabel="time", ylabel="potential", title="three spikes", ylim=(-0.05, 1.35))
    left.legend(frameon=False, ncols=3, loc="upper center")
    middle.semilogy(range(len(found.misses)), found.misses, marker="o", color="#D55E00")
    middle.set(xlabel="Gauss-Newton step", title="largest miss of a spike")
    sizes = list(checked.differences)
    right.loglog(
        sizes,
        list(checked.differences.values()),
        marker="o",
        color="#56B4E9",
        label="central difference",
    )
    right.axhline(checked.exact, color="#D55E00", label="through the spikes")
    right.set(xlabel="size of the difference", title="error of the derivatives")
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Fit, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, help="where to draw the result")
    options = parser.parse_args()
    found, checked = fit(), check()
    current, tau = found.neuron.current.item(), found.neuron.tau.item()
    print(
        f"current {current:.4f} (true {TRUE[0]}), tau {tau:.4f} (true {TRUE[1]}), "
        f"miss {found.misses[-1]:.1e}"
    )
    print("relative error of the derivatives of spike times")
    print(f"  through the spikes        {checked.exact:.1e}")
    for size, error in checked.differences.items():
        print(f"  central difference {size:.0e}  {error:.1e}")
    if options.figure is not None:
        draw(found, checked, options.figure)


if __name__ == "__main__":
    main()
