"""Rounding: the stage-wise gradient is as good as backpropagation's in the same precision."""

from __future__ import annotations

import statistics

import pytest
import torch

import symplectic_adjoint as sa
from tests.problems import Net

TOLERANCES = [1e-2, 1e-4, 1e-6, 1e-8, 1e-10]
SEEDS = range(7)


def float32_error(gradient: sa.Symplectic | sa.Backprop, tolerance: float, seed: int) -> float:
    """Relative error of a float32 gradient against float64 backprop on the same steps."""
    net = Net(dim=4, hidden=16, seed=seed, dtype=torch.float32)
    y0 = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    check = sa.check_gradient(
        net,
        y0,
        [0.0, 0.5],
        rtol=tolerance,
        atol=tolerance,
        gradient=gradient,
        discretisation=False,
    )
    assert check.reference is torch.float64
    return check.total


@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_symplectic_gradients_round_no_worse_than_backprop_in_float32(tolerance: float) -> None:
    """The median over problems of the ratio of errors on the same steps; they scatter around 1."""
    ratios = [
        float32_error(sa.Symplectic(), tolerance, seed)
        / float32_error(sa.Backprop(), tolerance, seed)
        for seed in SEEDS
    ]
    assert statistics.median(ratios) <= 1.1, ratios


def test_float64_and_compensated_sums_lose_less_than_sums_in_place() -> None:
    """Thousands of equal parts are added: rounding of the sum dominates every other error."""

    def error(accumulate: str) -> float:
        weight = torch.tensor(0.1, requires_grad=True)
        sol = sa.solve(
            lambda t, y: weight * torch.ones_like(y),
            torch.zeros(1),
            torch.linspace(0.0, 1.0, 4001),
            method="euler",
            gradient=sa.Symplectic(accumulate=accumulate),  # type: ignore[arg-type]
        )
        (grad,) = torch.autograd.grad(sol.y[-1].sum(), weight)
        return abs(grad.double().item() - 1.0)

    in_place = error("inplace")
    assert in_place > 1e-6
    assert error("float64") < 0.1 * in_place
    assert error("compensated") < 0.1 * in_place


@pytest.mark.parametrize("seminorm", [True, False])
def test_the_continuous_adjoint_converges_to_the_exact_gradient(seminorm: bool) -> None:
    net = Net(dim=3)
    y0 = torch.randn(4, 3, dtype=torch.float64)
    errors = [
        sa.check_gradient(
            net,
            y0,
            [0.0, 2.0],
            rtol=tol,
            atol=tol,
            gradient=sa.Continuous(seminorm=seminorm),
            discretisation=False,
        ).total
        for tol in (1e-4, 1e-7, 1e-10)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-7
