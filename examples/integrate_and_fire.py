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


def fit(iterations: int = 12) -> tuple[Neuron, float]:
    """Recover a neuron from its spikes; returns it and the loss."""
    with torch.no_grad():
        wanted = Neuron(current=0.6, tau=2.0).spikes(3)
    neuron = Neuron(current=1.0, tau=1.5)
    optimizer = torch.optim.LBFGS(
        neuron.parameters(), max_iter=iterations, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (neuron.spikes(3) - wanted).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return neuron, closure().item()


def main() -> None:
    """Fit and print."""
    neuron, loss = fit()
    current, tau = neuron.current.item(), neuron.tau.item()
    print(f"current {current:.4f} (true 0.6), tau {tau:.4f} (true 2.0), loss {loss:.1e}")


if __name__ == "__main__":
    main()
