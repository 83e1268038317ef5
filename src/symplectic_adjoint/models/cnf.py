"""Continuous normalizing flows: densities from the flow of a learned differential equation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor, nn

from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.api import solve
from symplectic_adjoint.controllers import FixedGrid
from symplectic_adjoint.models.blocks import Activation, Layer, TimeMLP

if TYPE_CHECKING:
    from symplectic_adjoint.solution import Solution

Trace = Literal["hutchinson", "exact"]
Noise = Literal["rademacher", "gaussian"]
Divergence = Callable[[Tensor, Tensor, bool], Tensor]
"""Of (dx, x, create_graph): the trace of d(dx)/dx for each row, shape (n,)."""


@dataclass(frozen=True)
class SolverOptions:
    """How a model solves its equation; each field means what it means for ``solve``.

    Attributes:
        method: Name of the method; None takes the one that the gradient strategy prefers.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        gradient: Gradient strategy, by name or as an object.
        controller: Step size control; None takes the method's own.
    """

    method: str | None = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    gradient: Any = "symplectic"
    controller: Any = None


class Flow(NamedTuple):
    """Data carried to the base distribution.

    Attributes:
        z: The image of the data, shape (n, dim).
        log_det: Log |det dz/dx|, shape (n,).
        solutions: The solution of each block, in the order of the blocks.
    """

    z: Tensor
    log_det: Tensor
    solutions: tuple[Solution, ...]


class CNF(nn.Module):
    """A continuous normalizing flow with a standard normal base (FFJORD).

    Each block carries (x, l) from t = 0 to ``t1`` along dx/dt = f(t, x), dl/dt = tr(df/dx), so that
    after all blocks log p(x(0)) = log N(x(t1); 0, I) + l(t1) (Chen et al., NeurIPS 2018, equation
    8; Grathwohl et al., FFJORD, ICLR 2019, equations 3 and 4). The trace is exact, at the price of
    one product for each dimension, or Hutchinson's unbiased estimate e^T (df/dx) e with noise e
    drawn once for each solve (FFJORD, equations 7 and 8), which keeps the right-hand side
    deterministic during a solve.

    Args:
        dim: Number of dimensions of the data.
        hidden: Widths of the hidden layers of each block.
        blocks: Number of stacked blocks, each with a network and a solve of its own.
        layer: "concatsquash" or "concat".
        activation: "softplus" or "tanh".
        trace: "hutchinson" or "exact".
        noise: Distribution of the noise in Hutchinson's estimate, "rademacher" or "gaussian".
        t1: End of each block's time interval.
        solver: How the equation is solved and differentiated.

    Raises:
        UnknownNameError: An argument is none of its choices.
        ArgumentError: A number is not positive.

    Example:
        >>> flow = CNF(2, hidden=(16,), trace="exact")
        >>> x = torch.randn(5, 2)
        >>> log_prob = flow.log_prob(x)
        >>> log_prob.shape
        torch.Size([5])
        >>> (-log_prob.mean()).backward()
        >>> flow.sample(3).shape
        torch.Size([3, 2])

        The networks start as zero, so an untrained flow is the base distribution:

        >>> base = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
        >>> torch.allclose(log_prob, base, atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: Sequence[int] = (64, 64),
        blocks: int = 1,
        layer: Layer = "concatsquash",
        activation: Activation = "softplus",
        trace: Trace = "hutchinson",
        noise: Noise = "rademacher",
        t1: float = 1.0,
        solver: SolverOptions | None = None,
    ) -> None:
        super().__init__()
        if trace not in get_args(Trace):
            raise UnknownNameError("trace", trace, get_args(Trace))
        if noise not in get_args(Noise):
            raise UnknownNameError("noise", noise, get_args(Noise))
        if blocks < 1:
            raise ArgumentError(f"blocks={blocks!r} must be at least 1")
        if not 0 < t1 < math.inf:
            raise ArgumentError(f"t1={t1!r} must be positive and finite")
        self.dim = dim
        self.trace = trace
        self.noise = noise
        self.t1 = t1
        self.solver = solver or SolverOptions()
        self.networks = nn.ModuleList(
            TimeMLP(dim, hidden, layer, activation) for _ in range(blocks)
        )

    def draw_noise(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Draws the noise of Hutchinson's estimate for one pass over x.

        Args:
            x: Data, shape (n, dim); only its shape, dtype and device matter.
            generator: Source of randomness on the CPU; None takes the global one.

        Returns:
            Noise of shape (blocks, n, dim), dtype and device of x. It is drawn on the CPU, so that
            a seed gives the same noise on every device.
        """
        shape = (len(self.networks), *x.shape)
        if self.noise == "gaussian":
            drawn = torch.randn(shape, generator=generator)
        else:
            drawn = torch.randint(2, shape, generator=generator) * 2.0 - 1.0
        return drawn.to(x)

    def transform(
        self, x: Tensor, noise: Tensor | None = None, grids: Sequence[Tensor] | None = None
    ) -> Flow:
        """Carries data to the base distribution.

        Args:
            x: Data, shape (n, dim), dtype and device of the parameters.
            noise: Noise of shape (blocks, n, dim); None draws it. Ignored by the exact trace.
            grids: For each block the times of its steps, which then replace its step size control;
                a recorded ``Solution.steps`` replays that solve on a frozen grid.

        Returns:
            The image, its log-determinant and the blocks' solutions.

        Raises:
            ArgumentError: X or noise has the wrong shape, or there is not one grid for each block.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ArgumentError(f"x must have shape (n, {self.dim}), got {tuple(x.shape)}")
        if noise is None and self.trace == "hutchinson":
            noise = self.draw_noise(x)
        if noise is not None and noise.shape != (len(self.networks), *x.shape):
            raise ArgumentError(
                f"noise must have shape {(len(self.networks), *x.shape)}, got {tuple(noise.shape)}"
            )
        if grids is not None and len(grids) != len(self.networks):
            raise ArgumentError(
                f"{len(self.networks)} grids are needed, one a block, got {len(grids)}"
            )
        log_det = x.new_zeros(len(x))
        solutions = []
        for block, network in enumerate(self.networks):
            divergence = (
                exact_divergence
                if noise is None or self.trace == "exact"
                else hutchinson_divergence(noise[block])
            )
            field = _augmented(network, divergence)
            grid = None if grids is None else grids[block]
            solution = self._solve(field, (x, log_det), (0.0, self.t1), grid)
            x, log_det = (leaf[-1] for leaf in solution.y)
            solutions.append(solution)
        return Flow(x, log_det, tuple(solutions))

    def log_prob(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Log-density of the data in nats.

        Args:
            x: Data, shape (n, dim), dtype and device of the parameters.
            noise: Noise of shape (blocks, n, dim); None draws it. Ignored by the exact trace.

        Returns:
            Log-densities of shape (n,): exact up to the solver's tolerance with the exact trace,
            unbiased estimates with Hutchinson's.

        Raises:
            ArgumentError: X or noise has the wrong shape.
        """
        z, log_det, _ = self.transform(x, noise)
        return standard_normal_log_prob(z) + log_det

    @torch.no_grad()
    def sample(self, count: int, generator: Generator | None = None) -> Tensor:
        """Draws samples by carrying base samples back from ``t1`` to 0.

        Args:
            count: Number of samples.
            generator: Source of randomness on the CPU; None takes the global one.

        Returns:
            Samples of shape (count, dim), dtype and device of the parameters, without gradient.
        """
        like = next(self.parameters())
        x = torch.randn(count, self.dim, generator=generator).to(like)
        for network in reversed(self.networks):
            x = self._solve(network, x, (self.t1, 0.0), None).y[-1]
        return x

    def _solve(
        self, field: Callable[..., Any], y0: Any, interval: tuple[float, float], grid: Tensor | None
    ) -> Solution:
        options = self.solver
        times = torch.tensor(interval, dtype=torch.float64) if grid is None else grid
        return solve(
            field,
            y0,
            times,
            method=options.method,
            rtol=options.rtol,
            atol=options.atol,
            controller=options.controller if grid is None else FixedGrid(),
            gradient=options.gradient,
        )


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Log-density of the standard normal distribution, shape (n, dim) to (n,).

    Example:
        >>> round(float(standard_normal_log_prob(torch.zeros(1, 2))), 4)
        -1.8379
    """
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


def exact_divergence(dx: Tensor, x: Tensor, create_graph: bool) -> Tensor:
    """Trace of d(dx)/dx for each row, by one product for each dimension, shape (n,)."""
    total = dx.new_zeros(len(dx))
    for i in range(x.shape[1]):
        (row,) = torch.autograd.grad(
            dx[:, i].sum(), x, create_graph=create_graph, retain_graph=True
        )
        total = total + row[:, i]
    return total


def hutchinson_divergence(noise: Tensor) -> Divergence:
    """Hutchinson's estimate e^T (d(dx)/dx) e of each row's trace, with the given noise e."""

    def divergence(dx: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        (product,) = torch.autograd.grad(dx, x, noise, create_graph=create_graph)
        return (product * noise).sum(1)

    return divergence


def _augmented(
    network: nn.Module, divergence: Divergence
) -> Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """The field of (x, l): dx/dt = network(t, x), dl/dt = divergence of the network."""

    def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _ = state
        # Without a gradient to come, the inner one has a tape of its own and no graph is kept.
        differentiate = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in network.parameters())
        )
        with torch.enable_grad():
            if not (differentiate and x.requires_grad):
                x = x.detach().requires_grad_()
            dx = network(t, x)
            dl = divergence(dx, x, differentiate)
        return (dx, dl) if differentiate else (dx.detach(), dl.detach())

    return field
