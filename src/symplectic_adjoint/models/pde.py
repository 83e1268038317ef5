"""Partial differential equations that follow from an energy, on a periodic domain."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.models.hamiltonian import Energy, energy_gradient

Structure = Literal["derivative", "laplacian"]


class EnergyPDE(nn.Module):
    """``du/dt = G dH/du`` on a periodic grid, with a learned or a given energy ``H``.

    ``dH/du`` is the variational derivative, the gradient of ``H`` divided by the spacing. With
    ``G`` the spatial derivative (skew-symmetric) the energy is conserved, as in the Korteweg-de
    Vries equation; with the Laplacian (negative semidefinite) it decays, as in the Cahn-Hilliard
    equation. Either way the mass, the sum of ``u``, is conserved, whatever the energy (Matsubara,
    Ishikawa, Yaguchi, "Deep energy-based modeling of discrete-time physics", NeurIPS 2020, section
    3).

    Args:
        energy: Maps fields (..., n) to energies (...) or (..., 1): a network, or any twice
            differentiable function that holds no parameters.
        structure: "derivative" or "laplacian".
        spacing: Distance of neighbouring grid points.

    Shape:
        t is a scalar, u has shape (..., n), the result has the shape of u.

    Raises:
        UnknownNameError: The structure is none of these.
        ArgumentError: The spacing is not positive.

    Example:
        >>> field = EnergyPDE(ConvEnergy(width=8, spacing=0.5), "derivative", spacing=0.5)
        >>> du = field(torch.tensor(0.0), torch.randn(5, 32))
        >>> du.shape, bool(du.sum(-1).abs().max() < 1e-4)
        (torch.Size([5, 32]), True)
    """

    def __init__(self, energy: Energy, structure: Structure, spacing: float) -> None:
        super().__init__()
        if structure not in get_args(Structure):
            raise UnknownNameError("structure", structure, get_args(Structure))
        if not spacing > 0:
            raise ArgumentError(f"spacing={spacing!r} must be positive")
        self.energy = energy
        self.structure = structure
        self.spacing = spacing

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative of the field; see the class."""
        variation = energy_gradient(self.energy, u, self) / self.spacing
        if self.structure == "derivative":
            return derivative(variation, self.spacing)
        return laplacian(variation, self.spacing)


class ConvEnergy(nn.Module):
    """A periodic convolutional energy: the integral of a learned density of ``u`` nearby.

    The density is translation invariant: a convolution over neighbouring points, and convolutions
    of width one, with tanh between them.

    Args:
        width: Channels of the hidden layers.
        spacing: Distance of neighbouring grid points.
        kernel: How many neighbouring points the density sees, an odd number.
        layers: Hidden layers.

    Shape:
        (..., n) to (...).

    Raises:
        ArgumentError: The kernel is even, or a number is not positive.

    Example:
        >>> energy, u = ConvEnergy(width=8, spacing=0.1), torch.randn(5, 32)
        >>> torch.allclose(energy(u), energy(u.roll(3, -1)), rtol=1e-4)
        True
    """

    def __init__(self, width: int, spacing: float, kernel: int = 3, layers: int = 2) -> None:
        super().__init__()
        if kernel % 2 != 1 or min(width, layers, kernel) < 1 or not spacing > 0:
            raise ArgumentError(
                f"width={width}, layers={layers} and spacing={spacing} must be positive, and "
                f"kernel={kernel} odd"
            )
        self.spacing = spacing
        self.pad = kernel // 2
        self.first = nn.Conv1d(1, width, kernel)
        self.inner = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers - 1))
        self.last = nn.Conv1d(width, 1, 1, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """The energy of each field; see the class."""
        x = u.reshape(-1, 1, u.shape[-1])
        x = torch.tanh(self.first(functional.pad(x, (self.pad, self.pad), mode="circular")))
        for layer in self.inner:
            x = torch.tanh(layer(x))
        energy: Tensor = self.last(x).sum((-2, -1)) * self.spacing
        return energy.reshape(u.shape[:-1])


def derivative(u: Tensor, spacing: float) -> Tensor:
    """The central difference on a periodic grid, skew-symmetric: (..., n) -> (..., n)."""
    return (u.roll(-1, -1) - u.roll(1, -1)) / (2 * spacing)


def laplacian(u: Tensor, spacing: float) -> Tensor:
    """The second difference on a periodic grid, symmetric and negative: (..., n) -> (..., n)."""
    return (u.roll(-1, -1) - 2 * u + u.roll(1, -1)) / spacing**2
