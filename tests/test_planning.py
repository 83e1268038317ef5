"""What a solve will take is foretold from a few of its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint.memory import peak_memory

NET = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)).double()
FIELD = sa.Autonomous(NET)
Y0 = torch.linspace(-1, 1, 512, dtype=torch.float64).reshape(64, 8)
FIXED: dict[str, Any] = {"method": "rk4", "controller": sa.FixedGrid(step_size=1 / 150)}
ADAPTIVE: dict[str, Any] = {"method": "dopri5", "rtol": 1e-10, "atol": 1e-12}
IMPLICIT: dict[str, Any] = {
    "method": "implicit_midpoint",
    "controller": sa.FixedGrid(step_size=0.05),
}


def measured(setting: sa.MemorySetting, t: list[float], options: dict[str, Any]) -> tuple[int, int]:
    """The peak of a solve and its gradient, and how many steps it took again."""
    retaken = []

    def run() -> None:
        y0 = Y0.clone().requires_grad_()
        sol = sa.solve(FIELD, y0, t, gradient=setting.gradient, **options)
        torch.autograd.grad(sol.y.square().sum(), [y0, *NET.parameters()])
        retaken.append(sol.stats.backward_retaken)

    return peak_memory(run), retaken[0]


@pytest.mark.parametrize(
    ("options", "t"),
    [(FIXED, [0.0, 0.4, 1.0]), (ADAPTIVE, [0.0, 20.0]), (IMPLICIT, [0.0, 1.0])],
    ids=["fixed", "adaptive", "implicit"],
)
def test_predicted_peaks_are_measured_to_a_fifth(options: dict[str, Any], t: list[float]) -> None:
    budgets = () if options is IMPLICIT else ("500KB",)
    plan = sa.plan_memory(FIELD, Y0, t, budgets=budgets, probe=16, **options)
    names = [setting.name for setting in plan.settings]
    assert ("graphs" in names) == (options is not IMPLICIT)
    for setting in plan.settings:
        peak, retaken = measured(setting, t, options)
        assert setting.peak == pytest.approx(peak, rel=0.2), setting.name
        # Adaptive steps need not be foretold to the last one.
        assert setting.retaken == pytest.approx(retaken, abs=1), setting.name
    assert plan.settings[-1 if not budgets else -2].retaken > 0


def test_the_sizes_are_those_of_one_evaluation_and_of_the_parts_of_a_step() -> None:
    plan = sa.plan_memory(FIELD, Y0, [0.0, 1.0], probe=8, **FIXED)

    def evaluate() -> None:
        y = Y0.clone().requires_grad_()
        torch.autograd.grad(NET(y).sum(), [y, *NET.parameters()])

    assert plan.evaluation == pytest.approx(peak_memory(evaluate), rel=0.2)
    assert Y0.nbytes <= plan.state < Y0.nbytes + 48
    assert 4 * Y0.nbytes <= plan.stages < 4 * Y0.nbytes + 48
    assert plan.graph is not None
    assert plan.graph > plan.stages
    assert plan.steps == 150


def test_the_fastest_setting_takes_time_one_and_the_table_names_each_strategy() -> None:
    plan = sa.plan_memory(FIELD, Y0, [0.0, 1.0], probe=4, **FIXED)
    assert min(setting.time for setting in plan.settings) == 1.0
    text = str(plan)
    assert text.startswith("150 steps; an evaluation")
    for words in ("Backprop()", "Symplectic('graph')", "Symplectic()", "Symplectic('steps')"):
        assert words in text
    assert text.count("\n") == 2 + len(plan.settings)


def test_planning_leaves_gradients_and_random_numbers_as_they_were() -> None:
    noisy = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).double()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sa.plan_memory(lambda t, y: noisy(y), Y0, [0.0, 1.0], probe=4, **FIXED)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(x.grad is None for x in noisy.parameters())
    assert not Y0.requires_grad


def test_the_number_of_adaptive_steps_may_be_given() -> None:
    calls: list[Tensor] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        return -y

    plan = sa.plan_memory(func, Y0, [0.0, 1.0], steps=10**4, probe=4, rtol=1e-6)
    assert plan.steps == 10**4
    assert max(map(float, calls)) < 0.5


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(sa.ArgumentError, match="probe = 1"):
        sa.plan_memory(FIELD, Y0, [0.0, 1.0], probe=1)
    with pytest.raises(sa.MemoryBudgetError, match="too few"):
        sa.plan_memory(FIELD, Y0, [0.0, 1.0], budgets=["1KB"], probe=4, **FIXED)
