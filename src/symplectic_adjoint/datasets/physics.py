"""Physical systems whose equations are known, and trajectories that keep their invariants.

Every system follows from an energy, by the same modules that learn one (``models.Hamiltonian``,
``models.EnergyPDE``), so that a learned energy can be held against the true one.

Mechanical systems are integrated by symplectic methods of order six, in steps so small
that the energy is kept to about ten digits. The partial differential equations are integrated by
the average vector field method (Quispel and McLaren, "A new class of energy-preserving numerical
integration methods", J. Phys. A 41 (2008) 045206, equation 1.2),

    (u1 - u0) / h = G int_0^1 dH/du (u0 + s (u1 - u0)) ds,

which keeps the energy of the Korteweg-de Vries equation and lets that of the Cahn-Hilliard equation
decay, whatever the step; the mass is kept by either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint.api import solve
from symplectic_adjoint.controllers import FixedGrid
from symplectic_adjoint.datasets.errors import DataError
from symplectic_adjoint.models.hamiltonian import Hamiltonian, SeparableHamiltonian
from symplectic_adjoint.models.pde import EnergyPDE, Structure, derivative, laplacian

_ITERATIONS = 200


@dataclass(frozen=True)
class Trajectories:
    """Solutions of a system at equally spaced times.

    Attributes:
        t: Times (T,), float64.
        y: States (T, count, d), float64.
    """

    t: Tensor
    y: Tensor


@dataclass(frozen=True)
class Mechanics:
    """A Hamiltonian system on ``q`` and ``p``.

    Attributes:
        name: Its name.
        field: The true dynamics, ``field(t, y)``; ``field.energy(y)`` is the true energy.
        draw: ``(count, generator) -> (count, 2 n)``, initial states in float64.
        method: The symplectic method that integrates it.
        step: Its steps.
        interval: Time between snapshots.
    """

    name: str
    field: Any
    draw: Callable[[int, Generator], Tensor]
    method: str
    step: float
    interval: float

    def energy(self, y: Tensor) -> Tensor:
        """The true energy of states (..., d), of shape (...)."""
        value: Tensor = self.field.energy(y)
        return value

    def simulate(self, count: int, snapshots: int, seed: int = 0) -> Trajectories:
        """Trajectories from random initial states.

        Args:
            count: How many.
            snapshots: Times, ``t = 0`` included.
            seed: Seed of the initial states.
        """
        y0 = self.draw(count, Generator().manual_seed(seed))
        t = torch.arange(snapshots, dtype=torch.float64) * self.interval
        with torch.no_grad():
            y = solve(
                self.field, y0, t, method=self.method, controller=FixedGrid(step_size=self.step)
            ).y
        return Trajectories(t, y)


@dataclass(frozen=True)
class FieldEquation:
    """A partial differential equation on a periodic interval, ``du/dt = G dH/du``.

    Attributes:
        name: Its name.
        structure: ``G``: "derivative" or "laplacian".
        points: Grid points.
        length: Length of the interval.
        density: The true energy density at each point, from fields (..., n) and the spacing.
        linear: The linear part of ``dH/du``, likewise; the step is implicit in it.
        nonlinear: The rest of it, a polynomial of degree three at most.
        draw: ``(count, x (n,), generator) -> (count, n)``, initial fields in float64.
        step: Steps of the reference solver.
        interval: Time between snapshots.
    """

    name: str
    structure: Structure
    points: int
    length: float
    density: Callable[[Tensor, float], Tensor]
    linear: Callable[[Tensor, float], Tensor]
    nonlinear: Callable[[Tensor], Tensor]
    draw: Callable[[int, Tensor, Generator], Tensor]
    step: float
    interval: float

    @property
    def spacing(self) -> float:
        """Distance of neighbouring grid points."""
        return self.length / self.points

    @property
    def x(self) -> Tensor:
        """The grid (n,), float64."""
        return torch.arange(self.points, dtype=torch.float64) * self.spacing

    @property
    def field(self) -> EnergyPDE:
        """The true dynamics."""
        return EnergyPDE(self.energy, self.structure, self.spacing)

    def energy(self, u: Tensor) -> Tensor:
        """The true energy of fields (..., n), of shape (...)."""
        return self.density(u, self.spacing).sum(-1) * self.spacing

    def mass(self, u: Tensor) -> Tensor:
        """The integral of fields (..., n), of shape (...)."""
        return u.sum(-1) * self.spacing

    def simulate(self, count: int, snapshots: int, seed: int = 0) -> Trajectories:
        """Trajectories from random initial fields.

        Args:
            count: How many.
            snapshots: Times, ``t = 0`` included.
            seed: Seed of the initial fields.

        Raises:
            DataError: The equation of a step could not be solved.
        """
        u = self.draw(count, self.x, Generator().manual_seed(seed))
        inner = max(1, round(self.interval / self.step))
        advance = _AverageVectorField(self, self.interval / inner)
        fields = [u]
        for _ in range(snapshots - 1):
            for _ in range(inner):
                u = advance(u)
            fields.append(u)
        t = torch.arange(snapshots, dtype=torch.float64) * self.interval
        return Trajectories(t, torch.stack(fields))


System = Mechanics | FieldEquation


class _AverageVectorField:
    """Steps of a size: linear part solved directly, the rest by iteration to rounding.

    The average of a polynomial of degree three is exact with Gauss's two points.
    """

    def __init__(self, system: FieldEquation, h: float) -> None:
        eye = torch.eye(system.points, dtype=torch.float64)
        operator = derivative if system.structure == "derivative" else laplacian
        self.h = h
        # Matrices that are applied to fields from the right.
        self.g = operator(eye, system.spacing)
        half = 0.5 * h * system.linear(eye, system.spacing) @ self.g
        self.explicit = eye + half
        self.inverse = torch.linalg.inv(eye - half)
        self.nonlinear = system.nonlinear
        self.name = system.name

    def __call__(self, u: Tensor) -> Tensor:
        known, scale = u @ self.explicit, float(u.abs().max())
        places = [0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6]
        after, change = u, math.inf
        for _ in range(_ITERATIONS):
            last = change
            early, late = (self.nonlinear(u + s * (after - u)) for s in places)
            average = (early + late) / 2
            new: Tensor = (known + self.h * average @ self.g) @ self.inverse
            change, after = float((new - after).abs().max()), new
            if change <= 1e-12 * scale and change >= last / 2:  # no longer shrinking: rounding
                return after
        raise DataError(
            f"a step of size {self.h:.3g} of {self.name} was not found in {_ITERATIONS} "
            "iterations; take smaller steps"
        )


def names() -> tuple[str, ...]:
    """Names of all systems.

    Example:
        >>> names()[:3]
        ('mass-spring', 'pendulum', 'double-pendulum')
    """
    return tuple(_SYSTEMS)


def get(name: str) -> System:
    """The system of a name.

    Raises:
        UnknownNameError: There is none.

    Example:
        >>> pendulum = get("pendulum")
        >>> data = pendulum.simulate(count=2, snapshots=11)
        >>> data.y.shape
        torch.Size([11, 2, 2])
        >>> energy = pendulum.energy(data.y)
        >>> bool((energy - energy[0]).abs().max() < 1e-9)
        True
    """
    if name not in _SYSTEMS:
        raise UnknownNameError("system", name, names())
    return _SYSTEMS[name]()


def mass_spring() -> Mechanics:
    """A unit mass on a unit spring, ``H = (p^2 + q^2) / 2``."""
    half = _half_square
    return Mechanics("mass-spring", SeparableHamiltonian(half, half), _ring, "yoshida6", 0.05, 0.2)


def pendulum() -> Mechanics:
    """A pendulum of unit mass and length, ``H = p^2 / 2 + g (1 - cos q)`` with ``g = 3``.

    The convention of Greydanus et al. 2019, section 4, in units of their ``p``.
    """
    field = SeparableHamiltonian(_half_square, lambda q: 3 * (1 - torch.cos(q)).sum(-1))
    return Mechanics("pendulum", field, _ring, "yoshida6", 0.025, 0.2)


def double_pendulum() -> Mechanics:
    """Two pendulums of unit masses and lengths, one hung on the other, in a field of strength one.

    Its kinetic energy depends on the angles: it is not separable.
    """

    def energy(y: Tensor) -> Tensor:
        a, b, p, r = y.unbind(-1)
        c = torch.cos(a - b)
        kinetic = (p**2 + 2 * r**2 - 2 * p * r * c) / (4 - 2 * c**2)
        return kinetic - 2 * torch.cos(a) - torch.cos(b)

    def draw(count: int, generator: Generator) -> Tensor:
        angles = 1.6 * torch.rand(count, 2, generator=generator, dtype=torch.float64) - 0.8
        return torch.cat([angles, torch.zeros_like(angles)], -1)

    return Mechanics("double-pendulum", Hamiltonian(energy), draw, "gl6", 0.025, 0.2)


def two_body() -> Mechanics:
    """Two unit masses that attract each other, in the plane: ``H = |p|^2 / 2 - 1 / |q_1 - q_2|``.

    The state is ``(q_1, q_2, p_1, p_2)``; orbits are nearly circular, about a resting centre, as in
    Greydanus et al. 2019, section 5.
    """

    def potential(q: Tensor) -> Tensor:
        distance: Tensor = torch.linalg.vector_norm(q[..., :2] - q[..., 2:], dim=-1)
        return -1 / distance

    def draw(count: int, generator: Generator) -> Tensor:
        radius, angle, factor = torch.rand(3, count, 1, generator=generator, dtype=torch.float64)
        radius = 0.6 + 0.4 * radius
        angle = 2 * math.pi * angle
        q = radius * torch.cat([torch.cos(angle), torch.sin(angle)], -1)
        speed = (0.9 + 0.2 * factor) * 0.5 * radius**-0.5
        p = speed * torch.cat([-torch.sin(angle), torch.cos(angle)], -1)
        return torch.cat([q, -q, p, -p], -1)

    field = SeparableHamiltonian(_half_square, potential)
    return Mechanics("two-body", field, draw, "yoshida6", 0.025, 0.2)


def henon_heiles() -> Mechanics:
    """A star in a galaxy's plane, ``H = |p|^2 / 2 + |q|^2 / 2 + x^2 y - y^3 / 3``, below escape.

    Henon and Heiles, "The applicability of the third integral of motion", Astron. J. 69 (1964),
    equation 4. Energies are at most 1/8, where orbits are regular and chaotic side by side.
    """

    def potential(q: Tensor) -> Tensor:
        x, y = q.unbind(-1)
        return (x**2 + y**2) / 2 + x**2 * y - y**3 / 3

    def draw(count: int, generator: Generator) -> Tensor:
        q = 0.5 * (torch.rand(count, 2, generator=generator, dtype=torch.float64) - 0.5)
        angle, level = torch.rand(2, count, 1, generator=generator, dtype=torch.float64)
        energy = 1 / 12 + level / 24
        speed = torch.sqrt(2 * (energy - potential(q).unsqueeze(-1)))
        angle = 2 * math.pi * angle
        return torch.cat([q, speed * torch.cos(angle), speed * torch.sin(angle)], -1)

    field = SeparableHamiltonian(_half_square, potential)
    return Mechanics("henon-heiles", field, draw, "yoshida6", 0.05, 0.4)


def korteweg_de_vries(points: int = 50, length: float = 10.0) -> FieldEquation:
    """Waves in shallow water, ``u_t + 6 u u_x + u_xxx = 0``: solitons that pass through each other.

    ``H = int (u_x^2 / 2 - u^3) dx``, ``G`` the spatial derivative. Fields begin as the sum of two
    solitons ``c / 2 sech^2(sqrt(c) / 2 (x - d))``, which a grid of this spacing resolves.

    Args:
        points: Grid points.
        length: Length of the interval.
    """

    def density(u: Tensor, dx: float) -> Tensor:
        slope = (u.roll(-1, -1) - u) / dx
        return slope**2 / 2 - u**3

    def draw(count: int, x: Tensor, generator: Generator) -> Tensor:
        c, d = torch.rand(2, count, 2, 1, generator=generator, dtype=torch.float64)
        c = 0.5 + 2.0 * c
        away = (x - d * length + length / 2) % length - length / 2
        u: Tensor = (c / 2 / torch.cosh(torch.sqrt(c) / 2 * away) ** 2).sum(-2)
        return u

    return FieldEquation(
        "kdv",
        "derivative",
        points,
        length,
        density,
        lambda u, dx: -laplacian(u, dx),
        lambda u: -3 * u**2,
        draw,
        step=0.002,
        interval=0.1,
    )


def cahn_hilliard(points: int = 50, length: float = 1.0, gamma: float = 5e-4) -> FieldEquation:
    """Two fluids that separate, ``u_t = (u^3 - u - gamma u_xx)_xx``.

    ``H = int ((u^2 - 1)^2 / 4 + gamma u_x^2 / 2) dx``, ``G`` the Laplacian: the energy decays and
    the mass stays. Fields begin as a mean and a few random waves.

    Args:
        points: Grid points.
        length: Length of the interval.
        gamma: Square of the width of an interface.
    """

    def density(u: Tensor, dx: float) -> Tensor:
        slope = (u.roll(-1, -1) - u) / dx
        return (u**2 - 1) ** 2 / 4 + gamma * slope**2 / 2

    def draw(count: int, x: Tensor, generator: Generator) -> Tensor:
        mean = 0.2 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 0.1
        size, phase = torch.rand(2, count, 4, 1, generator=generator, dtype=torch.float64)
        modes = torch.arange(1, 5, dtype=torch.float64).unsqueeze(-1)
        waves = (size - 0.5) * torch.cos(2 * math.pi * (modes * x / length + phase))
        u: Tensor = mean + 0.4 * waves.sum(-2)
        return u

    return FieldEquation(
        "cahn-hilliard",
        "laplacian",
        points,
        length,
        density,
        lambda u, dx: -u - gamma * laplacian(u, dx),
        lambda u: u**3,
        draw,
        step=2e-5,
        interval=1e-3,
    )


_SYSTEMS: dict[str, Callable[[], System]] = {
    "mass-spring": mass_spring,
    "pendulum": pendulum,
    "double-pendulum": double_pendulum,
    "two-body": two_body,
    "henon-heiles": henon_heiles,
    "kdv": korteweg_de_vries,
    "cahn-hilliard": cahn_hilliard,
}


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum(-1) / 2


def _ring(count: int, generator: Generator) -> Tensor:
    """States of one position and one momentum, at a distance of 0.2 to 1 from the origin."""
    radius, angle = torch.rand(2, count, generator=generator, dtype=torch.float64)
    radius = 0.2 + 0.8 * radius
    angle = 2 * math.pi * angle
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
