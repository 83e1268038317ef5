"""Reconstruct and extrapolate time series that are seen at irregular times, with a latent ODE.

python examples/latent_ode.py --figure docs/assets/latent_ode.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import symplectic_adjoint as sa

HORIZON = 1.5
"""Series are seen until t = 1 and predicted until here."""
NOISE = 0.05


class Series(NamedTuple):
    """Series of one number, each seen at times of its own.

    Attributes:
        t: All times at which any series is seen, and those of the prediction, (T,), increasing.
        x: Noisy values, (n, T), zero where nothing is seen.
        seen: Where a value is seen, (n, T).
        truth: Values without noise, (n, T).
    """

    t: Tensor
    x: Tensor
    seen: Tensor
    truth: Tensor


def oscillations(count: int, seed: int, length: int = 40, each: int = 15) -> Series:
    """Decaying oscillations of various frequency and phase; put your own data here."""
    draw = torch.Generator().manual_seed(seed)
    t = torch.cat((torch.zeros(1), torch.rand(length - 2, generator=draw).sort().values))
    t = torch.cat((t, torch.linspace(1.0, HORIZON, 11)))
    frequency, phase = torch.rand(2, count, 1, generator=draw)
    truth = torch.exp(-0.7 * t) * torch.sin((5 + 3 * frequency) * t + 6.28 * phase)
    rank = torch.rand(count, len(t), generator=draw).masked_fill(t > 1, 2.0).argsort(1).argsort(1)
    seen = rank < each
    x = (truth + NOISE * torch.randn(truth.shape, generator=draw)) * seen
    return Series(t, x, seen, truth)


class LatentODE(nn.Module):
    """A recurrent encoder backwards in time, an ODE of the latent state, and a linear decoder.

    The model of Chen et al., NeurIPS 2018, section 5, and Rubanova et al., NeurIPS 2019: the values
    of a series are those of a latent trajectory, whose initial state is inferred from what is seen.
    """

    def __init__(self, latent: int = 6, hidden: int = 24, gradient: str = "symplectic") -> None:
        super().__init__()
        self.encoder = nn.GRUCell(3, hidden)
        self.posterior = nn.Linear(hidden, 2 * latent)
        field = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, latent))
        self.flow = sa.NeuralODE(sa.Autonomous(field), rtol=1e-3, atol=1e-3, gradient=gradient)
        self.decoder = nn.Linear(latent, 1)

    def infer(self, series: Series) -> tuple[Tensor, Tensor]:
        """Mean and log deviation of the initial latent state, each ``(n, latent)``."""
        state = series.x.new_zeros(len(series.x), self.encoder.hidden_size)
        later = torch.ones(len(series.x))
        for i in reversed(range(len(series.t))):
            seen = series.seen[:, i]
            now = series.t[i].expand(len(later))
            given = torch.stack((series.x[:, i], later - now, now), dim=1)
            state = torch.where(seen.unsqueeze(1), self.encoder(given, state), state)
            later = torch.where(seen, now, later)
        mean, log_scale = self.posterior(state).chunk(2, dim=1)
        return mean, log_scale

    def decode(self, z0: Tensor, t: Tensor) -> Tensor:
        """The values at times ``(T,)`` of the trajectories from ``(n, latent)``, ``(n, T)``."""
        values: Tensor = self.decoder(self.flow.trajectory(z0, t)).squeeze(-1).T
        return values

    def bound(self, series: Series) -> Tensor:
        """The negative evidence lower bound for each value that is seen, a scalar."""
        mean, log_scale = self.infer(series)
        z0 = mean + log_scale.exp() * torch.randn_like(mean)
        misses = ((self.decode(z0, series.t) - series.x) / NOISE).square() * series.seen
        divergence = 0.5 * (mean**2 + (2 * log_scale).exp() - 1) - log_scale
        return (0.5 * misses.sum() + divergence.sum()) / series.seen.sum()


def train(iterations: int = 400, gradient: str = "symplectic") -> tuple[LatentODE, list[float]]:
    """Trains; returns the model and the bound of every iteration."""
    torch.manual_seed(0)
    series = oscillations(128, seed=0)
    model = LatentODE(gradient=gradient)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    bounds = []
    for iteration in range(iterations):
        optimizer.zero_grad()
        bound = model.bound(series)
        bound.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        bounds.append(bound.item())
        if iteration % 100 == 0 or iteration == iterations - 1:
            print(f"iteration {iteration:4d}   negative bound {bounds[-1]:.2f}")
    return model, bounds


@torch.no_grad()
def errors(model: LatentODE, series: Series) -> tuple[float, float]:
    """Root mean square errors against the truth, where series are seen and beyond."""
    misses = (model.decode(model.infer(series)[0], series.t) - series.truth).square()
    beyond = series.t > 1
    return float(misses[:, ~beyond].mean().sqrt()), float(misses[:, beyond].mean().sqrt())


def draw(model: LatentODE, path: Path) -> None:
    """Draws four new series: what is seen, the truth, and trajectories of the posterior."""
    from matplotlib.figure import Figure

    series = oscillations(4, seed=1)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    with torch.no_grad():
        mean, log_scale = model.infer(series)
        drawn = [
            model.decode(mean + log_scale.exp() * torch.randn_like(mean), series.t)
            for _ in range(10)
        ]
    for i, axes in enumerate(figure.subplots(2, 2, sharex=True, sharey=True).flat):
        for k, values in enumerate(drawn):
            label = "drawn from the posterior" if k == 0 else None
            axes.plot(series.t, values[i], color="#0072B2", alpha=0.35, lw=1, label=label)
        axes.plot(series.t, series.truth[i], color="black", ls="--", lw=1.2, label="truth")
        seen = series.seen[i]
        axes.plot(series.t[seen], series.x[i, seen], "o", color="#D55E00", ms=5, label="seen")
        axes.axvline(1.0, color="#888888", lw=1, ls=":")
        if i >= 2:
            axes.set_xlabel("time")
        if i % 2 == 0:
            axes.set_ylabel("value")
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--gradient", default="symplectic", help="a strategy, e.g. backprop")
    parser.add_argument("--figure", type=Path, help="where to draw the result")
    options = parser.parse_args()
    trained, _ = train(options.iterations, options.gradient)
    within, outside = errors(trained, oscillations(64, seed=2))
    print(f"new series: error {within:.3f} where they are seen, {outside:.3f} beyond")
    if options.figure is not None:
        draw(trained, options.figure)
