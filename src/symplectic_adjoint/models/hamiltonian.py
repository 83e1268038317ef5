"""Dynamics that follow from an energy: Hamiltonian systems with a learned energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from symplectic_adjoint._errors import ArgumentError

Energy = Callable[[Tensor], Tensor]
"""A function of states (..., d), one number each: (...) or (..., 1)."""


class Hamiltonian(nn.Module):
    """``dq/dt = dH/dp, dp/dt = -dH/dq`` with a learned or a given energy ``H(q, p)``.

    Greydanus, Dzamba, Yosinski, "Hamiltonian neural networks", NeurIPS 2019, equation 2. The energy
    is a constant of the motion, whatever the network.

    Args:
        energy: Maps states (..., 2 n), ``q`` before ``p``, to energies (...) or (..., 1): a
            network, or any twice differentiable function that holds no parameters.

    Shape:
        t is a scalar, y has shape (..., 2 n), the result has the shape of y.

    Raises:
        ArgumentError: In a call: the state has an odd number of components.

    Example:
        >>> field = Hamiltonian(mlp(2, 16, 1))
        >>> field(torch.tensor(0.0), torch.ones(5, 2)).shape
        torch.Size([5, 2])

        An oscillator, whose energy is known:

        >>> oscillator = Hamiltonian(lambda y: y.square().sum(-1) / 2)
        >>> oscillator(torch.tensor(0.0), torch.tensor([3.0, 4.0]))
        tensor([ 4., -3.])
    """

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The derivative of the state; see the class."""
        _check_even(y)
        dq, dp = energy_gradient(self.energy, y, self).chunk(2, -1)
        return torch.cat([dp, -dq], -1)


class SeparableHamiltonian(nn.Module):
    """The same with ``H(q, p) = T(p) + V(q)``, which explicit symplectic methods can solve.

    Args:
        kinetic: ``T``, maps momenta (..., n) to energies (...) or (..., 1).
        potential: ``V``, likewise for positions.

    Shape:
        t is a scalar, y has shape (..., 2 n), the result has the shape of y.

    Raises:
        ArgumentError: In a call: the state has an odd number of components.

    Example:
        >>> import symplectic_adjoint as sa
        >>> field = SeparableHamiltonian(mlp(1, 16, 1), mlp(1, 16, 1))
        >>> sa.solve(field, torch.ones(5, 2), torch.linspace(0, 1, 11), method="verlet").y.shape
        torch.Size([11, 5, 2])
        >>> field.energy(torch.ones(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, kinetic: Energy, potential: Energy) -> None:
        super().__init__()
        self.kinetic = kinetic
        self.potential = potential

    def energy(self, y: Tensor) -> Tensor:
        """``H`` of states (..., 2 n), of shape (...)."""
        q, p = y.chunk(2, -1)
        return each(self.kinetic, p) + each(self.potential, q)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The derivative of the state; see the class."""
        _check_even(y)
        q, p = y.chunk(2, -1)
        dq = energy_gradient(self.kinetic, p, self)
        return torch.cat([dq, -energy_gradient(self.potential, q, self)], -1)


def mlp(before: int, hidden: int | Sequence[int], after: int) -> nn.Sequential:
    """A multilayer perceptron with tanh, twice differentiable as an energy has to be.

    Args:
        before: Width of the input.
        hidden: Width of each hidden layer; a number stands for two of that width.
        after: Width of the output.

    Example:
        >>> mlp(2, 16, 1)(torch.ones(5, 2)).shape
        torch.Size([5, 1])
    """
    widths = (before, *((hidden, hidden) if isinstance(hidden, int) else hidden), after)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def each(energy: Energy, y: Tensor) -> Tensor:
    """The energy of each state: (..., d) -> (...)."""
    value = energy(y)
    return value.squeeze(-1) if value.ndim == y.ndim else value


def energy_gradient(energy: Energy, y: Tensor, module: nn.Module) -> Tensor:
    """The gradient of an energy with respect to each state, with a graph where one is wanted.

    Args:
        energy: The energy.
        y: States (..., d).
        module: Holds the parameters on which the energy depends.

    Returns:
        Of the shape of ``y``.
    """
    wanted = torch.is_grad_enabled() and (
        y.requires_grad or any(p.requires_grad for p in module.parameters())
    )
    with torch.enable_grad():
        if not y.requires_grad:
            y = y.view_as(y).requires_grad_()  # detach() would drop the tangents of forward mode
        (gradient,) = torch.autograd.grad(energy(y).sum(), y, create_graph=wanted)
    return gradient


def _check_even(y: Tensor) -> None:
    if not y.ndim or y.shape[-1] % 2:
        raise ArgumentError(
            f"a Hamiltonian state holds q and then p along its last dimension, of equal sizes, but "
            f"this one has shape {tuple(y.shape)}"
        )
