"""Compiled tiers give what the eager one gives: values, gradients, steps, counts and errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from tests import problems

BOUND = 1e-12


def net(dim: int = 3, **options: Any) -> problems.Net:
    return problems.Net(dim=dim, **options)


def state(batch: int = 4, dim: int = 3, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dim, generator=draw, dtype=torch.float64)


def gradients(
    execution: str, func: Any, y0: Tensor, t: Any, **options: Any
) -> tuple[sa.Solution, list[Tensor]]:
    """A solve, and the gradients of a fixed functional of its outputs."""
    parameters = list(func.parameters()) if isinstance(func, nn.Module) else []
    y0 = y0.clone().requires_grad_()
    solution = sa.solve(func, y0, t, execution=execution, **options)
    draw = torch.Generator().manual_seed(2)
    weights = torch.randn(solution.y.shape, generator=draw, dtype=torch.float64)
    grads = torch.autograd.grad((solution.y * weights.to(y0.dtype)).sum(), [y0, *parameters])
    return solution, list(grads)


def check(func: Any, y0: Tensor, t: Any, execution: str = "loop", **options: Any) -> sa.Solution:
    """Compare a compiled tier with the eager one; returns the compiled solution."""
    compiled, grads = gradients(execution, func, y0, t, **options)
    eager, wanted = gradients("eager", func, y0, t, **options)
    assert len(compiled.steps) == len(eager.steps)
    torch.testing.assert_close(compiled.steps, eager.steps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(compiled.y, eager.y, rtol=1e-10, atol=1e-10)
    assert compiled.stats.accepted == eager.stats.accepted
    assert compiled.stats.rejected == eager.stats.rejected
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad - want).norm() <= 1e-9 * want.norm()
    return compiled


def test_the_loop_solves_as_the_eager_tier_does_with_the_same_counts() -> None:
    func, y0 = net(), state()
    compiled, _ = gradients("loop", func, y0, [0.0, 1.5], rtol=1e-6, atol=1e-8)
    eager, _ = gradients("eager", func, y0, [0.0, 1.5], rtol=1e-6, atol=1e-8)
    assert compiled.stats == eager.stats
    check(func, y0, [0.0, 1.5], rtol=1e-6, atol=1e-8)
    check(func, y0, [1.0, -0.5], rtol=1e-4, atol=1e-8)
