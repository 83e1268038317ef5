"""Continuous normalizing flows: densities from the flow of a learned differential equation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.api import solve
from symplectic_adjoint.capture import has_tangent
from symplectic_adjoint.controllers import FixedGrid
from symplectic_adjoint.models.blocks import Activation, Layer, TimeMLP
from symplectic_adjoint.models.distribution import FlowDistribution

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
        execution: Whether to compile.
    """

    method: str | None = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    gradient: Any = "symplectic"
    controller: Any = None
    execution: str = "eager"


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


@dataclass(frozen=True)
class Layout:
    """How the state of a block comes from that of the block before, without changing volume.

    Attributes:
        shape: Shape of the block's state, without that of the batch.
        leaving: Features that leave for the base distribution before the block.
        squeeze: Whether squares of 2 x 2 pixels become 4 channels then.
    """

    shape: tuple[int, ...]
    leaving: int = 0
    squeeze: bool = False

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's state, and what leaves as rows."""
        left, x = x[:, : self.leaving], x[:, self.leaving :]
        return (pixel_unshuffle(x, 2) if self.squeeze else x), left.flatten(1)

    def back(self, x: Tensor, left: Tensor) -> Tensor:
        """Undoes ``enter``."""
        if self.squeeze:
            x = pixel_shuffle(x, 2)
        return torch.cat((left.reshape(len(x), self.leaving, *x.shape[2:]), x), dim=1)

    @property
    def left(self) -> int:
        """Number of entries that leave."""
        before = [2 * n if self.squeeze else n for n in self.shape[1:]]
        return self.leaving * math.prod(before)


class ContinuousFlow(nn.Module):
    """What continuous normalizing flows share: blocks, each with a network and a solve of its own.

    Block k carries (x, l) from t = 0 to ``t1`` along dx/dt = f_k(t, x), dl/dt = tr(df_k/dx), so
    that after all blocks log p(x(0)) = log N(x(t1); 0, I) + l(t1).

    Args:
        networks: The networks, f(t, x), or f(t, x, context) where there is a context.
        layouts: For each network, the state it carries.
        trace: "hutchinson" or "exact".
        noise: Distribution of the noise in Hutchinson's estimate, "rademacher" or "gaussian".
        t1: End of each block's time interval.
        solver: How the equation is solved and differentiated.
        context: Width of the context.

    Raises:
        UnknownNameError: An argument is none of its choices.
        ArgumentError: A number is not positive.
    """

    support: constraints.Constraint = constraints.real_vector

    def __init__(
        self,
        networks: Sequence[nn.Module],
        layouts: Sequence[Layout],
        *,
        trace: Trace = "hutchinson",
        noise: Noise = "rademacher",
        t1: float = 1.0,
        solver: SolverOptions | None = None,
        context: int = 0,
    ) -> None:
        super().__init__()
        if trace not in get_args(Trace):
            raise UnknownNameError("trace", trace, get_args(Trace))
        if noise not in get_args(Noise):
            raise UnknownNameError("noise", noise, get_args(Noise))
        if not networks:
            raise ArgumentError("blocks=0 must be at least 1")
        if not 0 < t1 < math.inf:
            raise ArgumentError(f"t1={t1!r} must be positive and finite")
        self.layouts = tuple(layouts)
        self.dim = math.prod(self.layouts[0].shape)
        self.trace = trace
        self.noise = noise
        self.t1 = t1
        self.solver = solver or SolverOptions()
        self.context = context
        self.networks = nn.ModuleList(networks)

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
        self,
        x: Tensor,
        noise: Tensor | None = None,
        grids: Sequence[Tensor] | None = None,
        context: Tensor | None = None,
    ) -> Flow:
        """Carries data to the base distribution.

        Args:
            x: Data, shape (n, dim), dtype and device of the parameters.
            noise: Noise of shape (blocks, n, dim); None draws it. Ignored by the exact trace.
            grids: For each block the times of its steps, which then replace its step size control;
                a recorded ``Solution.steps`` replays that solve on a frozen grid.
            context: What the density depends on, shape (n, context), if the flow has a context.

        Returns:
            The image, its log-determinant and the blocks' solutions.

        Raises:
            ArgumentError: X, noise or context has the wrong shape, or there is not one grid for
                each block.
        """
        self._check(x, context)
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
        x, log_det = self._prepare(x)
        solutions, latents = [], []
        for block, (network, layout) in enumerate(zip(self.networks, self.layouts, strict=True)):
            x, left = layout.enter(x)
            latents.append(left)
            divergence = (
                exact_divergence
                if noise is None or self.trace == "exact"
                else hutchinson_divergence(noise[block, :, : x[0].numel()].view_as(x))
            )
            field = _augmented(network, divergence, context)
            grid = None if grids is None else grids[block]
            solution = self._solve(field, (x, log_det), (0.0, self.t1), grid)
            x, log_det = (leaf[-1] for leaf in solution.y)
            solutions.append(solution)
        return Flow(torch.cat((*latents, x.flatten(1)), dim=1), log_det, tuple(solutions))

    def log_prob(
        self, x: Tensor, noise: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Log-density of the data in nats.

        Args:
            x: Data, shape (n, dim), dtype and device of the parameters.
            noise: Noise of shape (blocks, n, dim); None draws it. Ignored by the exact trace.
            context: What the density depends on, shape (n, context), if the flow has a context.

        Returns:
            Log-densities of shape (n,): exact up to the solver's tolerance with the exact trace,
            unbiased estimates with Hutchinson's.

        Raises:
            ArgumentError: X, noise or context has the wrong shape.
        """
        z, log_det, _ = self.transform(x, noise, context=context)
        return standard_normal_log_prob(z) + log_det

    def rsample(
        self, count: int, generator: Generator | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Draws samples that depend differentiably on the parameters and the context.

        Base samples are carried back from ``t1`` to 0, and the gradient is that of the gradient
        strategy.

        Args:
            count: Number of samples.
            generator: Source of randomness on the CPU; None takes the global one.
            context: What the density depends on, shape (count, context), if the flow has a context.

        Returns:
            Samples of shape (count, dim), dtype and device of the parameters.

        Raises:
            ArgumentError: The context has the wrong shape.
        """
        like = next(self.parameters())
        z = torch.randn(count, self.dim, generator=generator).to(like)
        self._check(z, context)
        shape = self.layouts[-1].shape
        *latents, x = z.split([*(layout.left for layout in self.layouts), math.prod(shape)], dim=1)
        x = x.reshape(count, *shape)
        for network, layout, left in reversed(
            list(zip(self.networks, self.layouts, latents, strict=True))
        ):
            field = network if context is None else _given(network, context)
            x = layout.back(self._solve(field, x, (self.t1, 0.0), None).y[-1], left)
        return self._restore(x)

    @torch.no_grad()
    def sample(
        self, count: int, generator: Generator | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Draws samples, as ``rsample`` does, without gradient."""
        return self.rsample(count, generator, context)

    def distribution(self, context: Tensor | None = None) -> FlowDistribution:
        """The flow as a distribution of torch, with what torch's distributions can do.

        Args:
            context: What the density depends on, shape (..., context), if the flow has a context;
                its leading axes are the batch of the distribution.
        """
        return FlowDistribution(self, context)

    def _prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The state before the first block, and the log-determinant of the way there."""
        return x, x.new_zeros(len(x))

    def _restore(self, x: Tensor) -> Tensor:
        """Undoes ``_prepare``."""
        return x

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ArgumentError(f"x must have shape (n, {self.dim}), got {tuple(x.shape)}")
        wanted = (len(x), self.context) if self.context else None
        given = None if context is None else tuple(context.shape)
        if given != wanted:
            raise ArgumentError(f"context must have shape {wanted}, got {given}")

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
            execution=options.execution,
        )


class CNF(ContinuousFlow):
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
        context: Width of what the density may depend on, given beside the rows.

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

        With a context it is a conditional density, and as a distribution one of torch's:

        >>> flow = CNF(2, hidden=(16,), context=3)
        >>> flow.distribution(torch.randn(5, 3)).rsample().shape
        torch.Size([5, 2])
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
        context: int = 0,
    ) -> None:
        if blocks < 1:
            raise ArgumentError(f"blocks={blocks!r} must be at least 1")
        super().__init__(
            [TimeMLP(dim, hidden, layer, activation, context) for _ in range(blocks)],
            [Layout((dim,))] * blocks,
            trace=trace,
            noise=noise,
            t1=t1,
            solver=solver,
            context=context,
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
    for i, output in enumerate(dx.flatten(1).unbind(1)):
        (row,) = torch.autograd.grad(output.sum(), x, create_graph=create_graph, retain_graph=True)
        total = total + row.flatten(1)[:, i]
    return total


def hutchinson_divergence(noise: Tensor) -> Divergence:
    """Hutchinson's estimate e^T (d(dx)/dx) e of each row's trace, with the given noise e."""

    def divergence(dx: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        (product,) = torch.autograd.grad(dx, x, noise, create_graph=create_graph)
        return (product * noise).flatten(1).sum(1)

    return divergence


def _given(network: nn.Module, context: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a field, at a context."""
    return lambda t, x: network(t, x, context)


def _augmented(
    network: nn.Module, divergence: Divergence, context: Tensor | None
) -> Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """The field of (x, l): dx/dt = network(t, x), dl/dt = divergence of the network."""

    def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, _ = state
        # Without a gradient to come, the inner one has a tape of its own and no graph is kept.
        inputs = [x, *network.parameters(), *(() if context is None else (context,))]
        differentiate = any(map(has_tangent, inputs)) or (
            torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
        )
        with torch.enable_grad():
            if not (differentiate and x.requires_grad):
                # A view, since detach() would drop the tangents of forward mode.
                x = (x.view_as(x) if differentiate else x.detach()).requires_grad_()
            dx = network(t, x) if context is None else network(t, x, context)
            dl = divergence(dx, x, differentiate)
        return (dx, dl) if differentiate else (dx.detach(), dl.detach())

    return field
