"""Fit an integrate-and-fire neuron to the times of its spikes.

The membrane potential leaks and is driven by a current; where it reaches the threshold, the neuron
spikes and the potential is reset. The times of the spikes are differentiable.

    python examples/integrate_and_fire.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import symplectic_adjoint as sa


class Neuron(nn.Module):
    """``v' = current - v / tau``, with a spike where ``v`` reaches the threshold 1."""

    def __init__(self, current: float, tau: float) -> None:
        super().__init__()
        self.current = nn.Parameter(torch.tensor(current, dtype=torch.float64))
        self.tau = nn.Parameter(torch.tensor(tau, dtype=torch.float64))

    def forward(self, t: Tensor, v: Tensor) -> Tensor:
        """The derivative of the potential."""
        return self.current - v / self.tau

    def spikes(self, count: int, horizon: float = 100.0) -> Tensor:
        """The times of the first spikes, (count,); the potential starts at 0.4."""
        spike = sa.Event(lambda t, v: v - 1.0, direction=1)
        end = torch.tensor(horizon, dtype=torch.float64)
        t, v, times = torch.zeros_like(end), torch.full_like(end, 0.4), []
        for _ in range(count):
            sol = sa.solve(self, v, torch.stack([t, end]), event=spike)
            if sol.event is None:
                raise RuntimeError(f"the neuron is silent after t = {t.item():.3g}")
            t, v = sol.event.t, torch.zeros_like(end)
            times.append(t)
        return torch.stack(times)


def fit(iterations: int = 8) -> tuple[Neuron, list[float]]:
    """Recover a neuron from its spikes by Gauss-Newton steps; returns it and the largest misses."""
    with torch.no_grad():
        wanted = Neuron(current=0.6, tau=2.0).spikes(3)
    neuron = Neuron(current=0.7, tau=1.8)
    parameters = list(neuron.parameters())
    misses = []
    for _ in range(iterations):
        times = neuron.spikes(3)
        rows = [torch.autograd.grad(x, parameters, retain_graph=True) for x in times]
        jacobian = torch.stack([torch.stack(row) for row in rows])
        miss = wanted - times.detach()
        misses.append(float(miss.abs().max()))
        with torch.no_grad():
            for parameter, move in zip(
                parameters, torch.linalg.lstsq(jacobian, miss).solution, strict=True
            ):
                parameter.add_(move)
    return neuron, misses


def main() -> None:
    """Fit and print."""
    neuron, misses = fit()
    current, tau = neuron.current.item(), neuron.tau.item()
    print(f"current {current:.4f} (true 0.6), tau {tau:.4f} (true 2.0), miss {misses[-1]:.1e}")


if __name__ == "__main__":
    main()
