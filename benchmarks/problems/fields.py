"""The vector fields: networks that can count their calls."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn


class TooManyEvaluationsError(RuntimeError):
    """A solve went on past the limit."""


class Field(nn.Module):
    """An autonomous vector field that can count its calls; subclasses say what it computes.

    Args:
        sizes: Widths of the layers.
        counting: Counts cost a hook an evaluation, so timed runs go without.

    Attributes:
        net: The network.
        limit: Evaluations after which a counting field raises: some solvers never end where another
            would raise.
        evaluations: Calls so far.
        products: Vector-Jacobian products taken through those calls so far.
    """

    limit = 200_000
    kind: ClassVar[str] = "{} tanh"
    """The description, with a place for the sizes."""

    def __init__(self, sizes: tuple[int, ...], counting: bool = False) -> None:
        super().__init__()
        self.net = self.network(sizes)
        self.counting = counting
        self.evaluations = 0
        self.products = 0

    def network(self, sizes: tuple[int, ...]) -> nn.Sequential:
        """Linear layers of these widths with tanh between them."""
        return _alternating([nn.Linear(m, n) for m, n in pairwise(sizes)])

    def derivative(self, y: Tensor) -> Tensor:
        """The derivative at ``y``, both of shape (batch, width)."""
        out: Tensor = self.net(y)
        return out

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The derivative at ``y``, counted if asked for."""
        out = self.derivative(y)
        if self.counting:
            self.evaluations += 1
            if self.evaluations > self.limit:
                raise TooManyEvaluationsError(f"gave up after {self.limit} evaluations")
            if out.requires_grad:
                out.register_hook(self._count_product)
        return out

    def _count_product(self, grad: Tensor) -> None:
        self.products += 1


class Hutchinson(Field):
    """(x, l) with dx/dt = net(x) and dl/dt = e^T (d net/dx) e, the estimate of the trace.

    Attributes:
        noise: e, shape (batch, width of x): the same for every peer.
    """

    kind = "{} tanh and the trace of its Jacobian by Hutchinson's estimate"
    noise: Tensor

    def derivative(self, y: Tensor) -> Tensor:
        """The derivative of x and, in the last column, of l."""
        keep, x = _leaf(y)
        with torch.enable_grad():
            x = x[:, :-1]
            dx = self.net(x)
            (row,) = torch.autograd.grad(dx, x, self.noise, create_graph=keep)
            dl = (row * self.noise).sum(1, keepdim=True)
            out = torch.cat([dx, dl], 1)
        return out if keep else out.detach()


class Hamiltonian(Field):
    """dq/dt = dH/dp, dp/dt = -dH/dq, with the energy H of (q, p) a network."""

    kind = "energy {} tanh, differentiated inside the field"

    def derivative(self, y: Tensor) -> Tensor:
        """The energy's gradient, turned by a right angle."""
        keep, x = _leaf(y)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=keep)
            q, p = gradient.chunk(2, dim=1)
            out = torch.cat([p, -q], 1)
        return out if keep else out.detach()


class Convolution(Field):
    """Periodic convolutions of a function given on a row of points."""

    kind = "periodic convolutions over 5 of 128 points, channels {}, tanh"

    def network(self, sizes: tuple[int, ...]) -> nn.Sequential:
        """Convolutions with these numbers of channels with tanh between them."""
        layers = [
            nn.Conv1d(m, n, 5, padding=2, padding_mode="circular") for m, n in pairwise(sizes)
        ]
        return _alternating(layers)

    def derivative(self, y: Tensor) -> Tensor:
        """The derivative of the values at the points, shape (batch, points)."""
        out: Tensor = self.net(y[:, None])[:, 0]
        return out


def _alternating(layers: list[nn.Linear] | list[nn.Conv1d]) -> nn.Sequential:
    """The layers with tanh between them."""
    modules: list[nn.Module] = []
    for layer in layers:
        modules += [layer, nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def _leaf(y: Tensor) -> tuple[bool, Tensor]:
    """Whether a graph is to be kept, and a state that requires grad."""
    keep = torch.is_grad_enabled()
    return keep, y if keep and y.requires_grad else y.detach().requires_grad_()
