"""Recover the initial field of a chaotic equation from sparse observations (4D-Var).

The Kuramoto-Sivashinsky equation ``u_t = -u u_x - u_xx - u_xxxx`` on a periodic interval is
observed at every fourth grid point, now and then, with noise. The initial field is found by
minimising the misfit to all observations with L-BFGS, whose gradient is the exact one of the
computed trajectory.

    python examples/data_assimilation.py
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import symplectic_adjoint as sa

POINTS, LENGTH = 32, 22.0
TIMES = torch.linspace(0.0, 20.0, 21, dtype=torch.float64)
EVERY, NOISE = 4, 0.05
STEP = 0.25
LEG = 5  # outputs of one solve: exp(-GROWTH t) has to stay finite

WAVES = 2 * math.pi / LENGTH * torch.arange(POINTS // 2 + 1, dtype=torch.float64)
KEPT = WAVES[-1] * 2 / 3 >= WAVES  # shorter waves are left out, so that products are exact
GROWTH = torch.where(KEPT, WAVES**2 - WAVES**4, 0.0)


class Analysis(NamedTuple):
    """What was found: fields (times, points) before and after, and the misfit at each iteration."""

    truth: Tensor
    first_guess: Tensor
    found: Tensor
    misfit: list[float]

    def errors(self) -> tuple[Tensor, Tensor]:
        """Root mean square error at each time, before and after, relative to the field."""
        size = self.truth.square().mean().sqrt()
        before, after = self.first_guess - self.truth, self.found - self.truth
        return before.square().mean(-1).sqrt() / size, after.square().mean(-1).sqrt() / size


def dynamics(t: Tensor, v: Tensor) -> Tensor:
    """``v_t``, where ``u`` has the Fourier coefficients ``exp(GROWTH t) v``.

    The linear part, stiff, is solved exactly by this change of variables: an explicit method then
    sees the rest alone.
    """
    factor = torch.exp(GROWTH * t)
    u = torch.fft.irfft(v * factor, POINTS)
    slope: Tensor = -0.5j * WAVES * KEPT * torch.fft.rfft(u**2) / factor
    return slope


def trajectory(u0: Tensor, count: int = len(TIMES)) -> Tensor:
    """Fields at the first times, (count, points); the change of variables begins anew at times."""
    v = torch.fft.rfft(u0) * KEPT
    fields = [torch.fft.irfft(v, POINTS).unsqueeze(0)]
    for first in range(0, count - 1, LEG):
        t = TIMES[first : min(first + LEG + 1, count)] - TIMES[first]
        grid = sa.FixedGrid(step_size=STEP)
        sol = sa.solve(dynamics, v, t, method="rk4", controller=grid)
        waves = sol.y * torch.exp(GROWTH * t.unsqueeze(-1))
        fields.append(torch.fft.irfft(waves[1:], POINTS))
        v = waves[-1]
    return torch.cat(fields)


def truth() -> Tensor:
    """A trajectory on the attractor."""
    x = torch.arange(POINTS, dtype=torch.float64) * LENGTH / POINTS
    u = torch.cos(2 * math.pi * x / LENGTH) * (1 + torch.sin(4 * math.pi * x / LENGTH))
    with torch.no_grad():
        for _ in range(4):
            u = trajectory(u)[-1]
        return trajectory(u)


def smoothed(x: Tensor) -> Tensor:
    """The control variable as a field: short waves, which the flow forgets at once, are small."""
    u: Tensor = torch.fft.irfft(torch.fft.rfft(x) / (1 + (WAVES / 1.5) ** 4), POINTS)
    return u


def assimilate(iterations: int = 15, seed: int = 0) -> Analysis:
    """Find the initial field, from that of no information: zero."""
    true = truth()
    noise = torch.randn(true[1:, ::EVERY].shape, generator=torch.Generator().manual_seed(seed))
    observed = true[1:, ::EVERY] + NOISE * noise.double()
    x = torch.zeros(POINTS, dtype=torch.float64)
    # A window that grows, since the misfit over a long one has many minima.
    misfit: list[float] = []
    for window in (3, 8, len(TIMES) - 1):
        x = _minimised(x, observed[:window], iterations, misfit)
    with torch.no_grad():
        return Analysis(true, trajectory(torch.zeros_like(x)), trajectory(smoothed(x)), misfit)


def _minimised(x: Tensor, observed: Tensor, iterations: int, misfit: list[float]) -> Tensor:
    x = x.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=1e-10
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        fields = trajectory(smoothed(x), len(observed) + 1)[1:, ::EVERY]
        # The field's own size is known, too: a weak prior keeps what no one observes small.
        loss = (fields - observed).square().mean() + 1e-5 * x.square().mean()
        loss.backward()
        misfit.append(float(loss.detach()) ** 0.5)
        return loss

    optimizer.step(closure)
    return x.detach()


def main() -> None:
    """Assimilate and print."""
    analysis = assimilate()
    before, after = analysis.errors()
    print(f"misfit {analysis.misfit[0]:.3f} -> {analysis.misfit[-1]:.3f}, noise {NOISE}")
    print(f"error of the initial field {before[0]:.3f} -> {after[0]:.3f}")
    print(f"error at the end {before[-1]:.3f} -> {after[-1]:.3f}")


if __name__ == "__main__":
    main()
