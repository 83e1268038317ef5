"""Find the lengths, masses and friction of a double pendulum from noisy measurements of its angles.

The pendulum is a multibody system, ``M(angles) acceleration = forces``. The parameters, and the
speeds at which it was let go, are found by L-BFGS with the exact gradient of the computed
trajectory.

    python examples/pendulum_identification.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import symplectic_adjoint as sa

GRAVITY = 9.81
NAMES = ("length 1", "length 2", "mass ratio", "friction", "speed 1", "speed 2")
TRUE = torch.tensor([1.0, 0.7, 0.5, 0.15, 0.4, -1.2], dtype=torch.float64)
GUESS = torch.tensor([1.1, 0.6, 0.6, 0.1, 0.0, 0.0], dtype=torch.float64)
ANGLES = torch.tensor([0.9, 0.5], dtype=torch.float64)
TIMES = torch.linspace(0.0, 3.0, 61, dtype=torch.float64)
NOISE = 0.01


class Fit(NamedTuple):
    """A fit: the parameters, and the root mean square misfit at each evaluation (rad)."""

    parameters: Tensor
    misfit: list[float]


def dynamics(t: Tensor, y: Tensor, parameters: Tensor) -> Tensor:
    """``y = (angle 1, angle 2, speed 1, speed 2)``; angles are from the vertical."""
    a, b, u, v = y.unbind()
    long, short, ratio, friction = parameters[:4].unbind()
    c, s = torch.cos(a - b), torch.sin(a - b)
    # The mass matrix [[m11, m12], [m12, m22]] and the forces, both divided by the first mass.
    m11, m12, m22 = (1 + ratio) * long**2, ratio * long * short * c, ratio * short**2
    f1 = -ratio * long * short * v**2 * s - (1 + ratio) * GRAVITY * long * torch.sin(a)
    f2 = ratio * long * short * u**2 * s - ratio * GRAVITY * short * torch.sin(b)
    f1, f2 = f1 - friction * (2 * u - v), f2 - friction * (v - u)
    determinant = m11 * m22 - m12**2
    du, dv = (m22 * f1 - m12 * f2) / determinant, (m11 * f2 - m12 * f1) / determinant
    return torch.stack([u, v, du, dv])


def angles(parameters: Tensor, count: int = len(TIMES), method: str = "rk4") -> Tensor:
    """The angles at the first times of measurement, (count, 2)."""
    y0 = torch.cat([ANGLES, parameters[4:]])
    sol = sa.solve(dynamics, y0, TIMES[:count], args=(parameters,), method=method)
    return sol.y[:, :2]  # type: ignore[no-any-return]


def measured(seed: int = 0) -> Tensor:
    """What a camera sees: the true angles with noise."""
    noise = torch.randn(2 * len(TIMES), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return angles(TRUE, method="dopri5") + NOISE * noise.double().reshape(-1, 2)


def fit(data: Tensor, iterations: int = 12) -> Fit:
    """Least squares by L-BFGS, over windows that grow: a long one has minima far from the truth."""
    signs = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    scale = torch.where(signs > 0, GUESS, 1.0)
    x = torch.zeros_like(GUESS)
    misfit: list[float] = []
    for window in (10, 20, 40, len(TIMES)):
        x = x.detach().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [x], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=1e-12
        )

        def closure(
            window: int = window, x: Tensor = x, optimizer: torch.optim.Optimizer = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            # Lengths, masses and friction stay positive.
            parameters = torch.where(signs > 0, scale * torch.exp(x), x)
            loss = (angles(parameters, window) - data[:window]).square().mean()
            loss.backward()
            misfit.append(float(loss.detach()) ** 0.5)
            return loss

        optimizer.step(closure)
    return Fit(torch.where(signs > 0, scale * torch.exp(x), x).detach(), misfit)


def main() -> None:
    """Fit and print."""
    found = fit(measured())
    print("            found   true")
    for name, x, true in zip(NAMES, found.parameters, TRUE, strict=True):
        print(f"{name:11} {float(x):7.4f} {float(true):7.4f}")
    print(f"misfit {found.misfit[-1]:.4f} rad, noise {NOISE} rad")


if __name__ == "__main__":
    main()
