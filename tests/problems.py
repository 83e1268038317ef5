"""Initial value problems that several tests solve, and the gradients they ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import symplectic_adjoint as sa


class Net(nn.Module):
    """A smooth non-autonomous network with bounded solutions.

    ``dy/dt = gain W2 tanh(W1 y + b1 + drive sin(2 t)) - y / 2`` on states of shape (batch, dim).
    """

    def __init__(
        self,
        dim: int = 3,
        hidden: int = 5,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def parameter(*shape: int, scale: float) -> nn.Parameter:
            value = torch.randn(shape, generator=draw, dtype=torch.float64)
            return nn.Parameter((scale * value).to(dtype))

        self.inner = parameter(hidden, dim, scale=strength * dim**-0.5)
        self.bias = parameter(hidden, scale=0.5)
        self.drive = parameter(hidden, scale=1.0)
        self.outer = parameter(dim, hidden, scale=strength * hidden**-0.5)

    def forward(self, t: Tensor, y: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        hidden = torch.tanh(y @ self.inner.T + self.bias + self.drive * torch.sin(2 * t))
        return gain * (hidden @ self.outer.T) - 0.5 * y


class Separable(nn.Module):
    """``dq/dt = v(t, p)``, ``dp/dt = g(t, q)`` on states (batch, dim) of q and p side by side."""

    def __init__(self, dim: int = 4, hidden: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.v = Net(dim // 2, hidden, seed)
        self.g = Net(dim // 2, hidden, seed + 1)

    def forward(self, t: Tensor, y: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        q, p = y.chunk(2, -1)
        return torch.cat([self.v(t, p, gain), self.g(t, q)], -1)


class SeparableTree(nn.Module):
    """The same on a pytree state ``{"q": (batch, dim), "p": [(batch, dim), ()]}``."""

    def __init__(self, dim: int = 4, hidden: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.v = Net(dim, hidden, seed)
        self.g = Net(dim, hidden, seed + 1)

    def forward(self, t: Tensor, state: Any, gain: Tensor | float = 1.0) -> Any:
        p, level = state["p"]
        dp = [self.g(t, state["q"]), torch.cos(t + state["q"].sum())]
        return {"q": self.v(t, p, gain) * torch.sigmoid(level), "p": dp}


class Coupled(nn.Module):
    """The same network on a dict state ``{"fast": (batch, dim), "slow": [(), (2,)]}``."""

    def __init__(self, dim: int = 3, hidden: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.net = Net(dim, hidden, seed)
        self.rate = nn.Parameter(torch.tensor([0.3, -0.7], dtype=torch.float64))

    def forward(self, t: Tensor, state: Any, gain: Tensor | float = 1.0) -> Any:
        fast, (level, pair) = state["fast"], state["slow"]
        return {
            "fast": self.net(t, fast, gain) * torch.sigmoid(level),
            "slow": [torch.tanh(fast.mean()) - 0.5 * level, self.rate * pair * torch.sin(level)],
        }


class Product(torch.autograd.Function):
    """A product whose backward pass is written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


@dataclass
class Case:
    """A problem and what to differentiate.

    Attributes:
        func: ``func(t, y, *args)``.
        y0: Initial state; its leaves require grad.
        t: Output times.
        args: Extra arguments of ``func``.
        params: Tensors that ``func`` holds, by name.
    """

    func: Callable[..., Any]
    y0: Any
    t: Tensor
    args: tuple[Any, ...] = ()
    params: dict[str, Tensor] = field(default_factory=dict)

    def solve(self, **options: Any) -> sa.Solution:
        """Its solution."""
        return sa.solve(self.func, self.y0, self.t, args=self.args, **options)

    def inputs(self) -> dict[str, Tensor]:
        """Every tensor whose gradient is asked for, by name."""
        leaves, _ = pytree.tree_flatten(self.y0)
        named = {f"y0[{i}]": leaf for i, leaf in enumerate(leaves)}
        named |= {f"args[{i}]": arg for i, arg in enumerate(self.args)}
        named |= self.params
        named["t"] = self.t
        return {name: x for name, x in named.items() if x.requires_grad}

    def gradients(self, y: Any) -> dict[str, Tensor | None]:
        """Gradients of a fixed random linear function of the solution."""
        inputs = self.inputs()
        grads = torch.autograd.grad(loss(y), list(inputs.values()), allow_unused=True)
        return dict(zip(inputs, grads, strict=True))

    def gradients_of(self, run: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
        """Gradients of a function of all inputs by name, by plain autograd."""
        inputs = self.inputs()
        grads = torch.autograd.grad(run(inputs), list(inputs.values()), materialize_grads=True)
        return dict(zip(inputs, grads, strict=True))


def case(
    *,
    tree: bool = False,
    separable: bool = False,
    times: Sequence[float] = (0.0, 1.2),
    wants_time: bool = False,
    batch: int = 2,
    dim: int = 3,
    hidden: int = 5,
    seed: int = 0,
) -> Case:
    """A network problem in float64, with gradients for the state, parameters, args and times."""
    draw = torch.Generator().manual_seed(1000 + seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    dim += dim % 2 if separable else 0
    kinds: dict[bool, Callable[..., nn.Module]] = {False: Net, True: Coupled}
    if separable:
        kinds = {False: Separable, True: SeparableTree}
    module = kinds[tree](dim, hidden, seed)
    y0: Any = leaf(batch, dim)
    if tree and separable:
        y0 = {"q": y0, "p": [leaf(batch, dim), leaf()]}
    elif tree:
        y0 = {"fast": y0, "slow": [leaf(), leaf(2)]}
    gain = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(times, dtype=torch.float64, requires_grad=wants_time)
    return Case(module, y0, t, (gain,), dict(module.named_parameters()))


def loss(y: Any) -> Tensor:
    """A linear function with fixed random weights, of every element of every leaf."""
    draw = torch.Generator().manual_seed(7)
    leaves, _ = pytree.tree_flatten(y)
    return torch.stack(
        [
            (torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) * x).sum()
            for x in leaves
        ]
    ).sum()


def precise(x: Tensor) -> Tensor:
    """The values in double precision."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float64))


def size(x: Tensor | None) -> float:
    """L2 norm; that of no gradient at all is zero."""
    return 0.0 if x is None else float(torch.linalg.vector_norm(precise(x)))


def distance(got: Tensor | None, wanted: Tensor | None) -> float:
    """L2 distance; infinite where only one of the two is there."""
    if got is None or wanted is None:
        return 0.0 if got is wanted else math.inf
    return size(precise(got) - precise(wanted))


def relative_error(got: Tensor | None, wanted: Tensor | None) -> float:
    """Distance relative to the size of what is wanted."""
    return distance(got, wanted) / (size(wanted) or 1.0)


def worst(got: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> tuple[float, str]:
    """The largest relative error over all gradients, and whose it is."""
    assert got.keys() == wanted.keys()
    return max((relative_error(got[name], wanted[name]), name) for name in wanted)


@dataclass(frozen=True)
class Known:
    """A non-autonomous problem with a known solution.

    Attributes:
        func: The field.
        solution: ``t (T,) -> (T, 2)``, all in float64.
        span: Where to solve it.
    """

    func: Callable[[Tensor, Tensor], Tensor]
    solution: Callable[[Tensor], Tensor]
    span: tuple[float, float]


def known() -> Known:
    """Rotation at a speed, and growth at a rate, that change with time.

    The angle is ``5/2 t + 3/4 sin t``, and the squared radius solves the logistic equation ``r' =
    3/5 sin(t) r (1 - r)``. The leading error of every method shows before rounding does.
    """

    def func(t: Tensor, y: Tensor) -> Tensor:
        growth = 0.3 * torch.sin(t) * (1 - y.square().sum())
        speed = 2.5 + 0.75 * torch.cos(t)
        return torch.stack([growth * y[0] - speed * y[1], speed * y[0] + growth * y[1]])

    def solution(t: Tensor) -> Tensor:
        radius = (1 + 0.5 * torch.exp(0.6 * torch.cos(t))) ** -0.5
        angle = 2.5 * t + 0.75 * torch.sin(t)
        return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)

    return Known(func, solution, (0.3, 2.3))


def known_separable() -> Known:
    """``q' = v(t, p)``, ``p' = g(t, q)``, both non-linear and driven so that the solution is known.

    ``q = sin 2t + 1/4 t``, ``p = cos t - 1/2 t``.
    """

    def func(t: Tensor, y: Tensor) -> Tensor:
        q, p = solution(t.unsqueeze(0))[0].unbind()
        moved = torch.tanh(y[1]) - torch.tanh(p) + 2 * torch.cos(2 * t) + 0.25
        pushed = 2 * (torch.sin(q) - torch.sin(y[0])) - torch.sin(t) - 0.5
        return torch.stack([moved, pushed])

    def solution(t: Tensor) -> Tensor:
        return torch.stack([torch.sin(2 * t) + 0.25 * t, torch.cos(t) - 0.5 * t], dim=-1)

    return Known(func, solution, (0.3, 2.3))
