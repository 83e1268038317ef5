"""Jumps, events, dense output and step control used together have the gradient of backprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint.gradients import Strategy
from tests import problems
from tests.conformance.registry import label, strategies

EXACT = [s for s in strategies(exact=True) if s.method is None and s.name != "backprop"]
TIGHT = {"rtol": 1e-4, "atol": 1e-4}
INSIDE = torch.tensor([0.1, 0.49, 0.5, 0.51, 0.6], dtype=torch.float64)


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        value: Tensor = self.net(y) + torch.where(t < 0.5, 1.0, -1.0)
        return value


def late(t: Tensor, y: Tensor) -> Tensor:
    return t - 0.8 + 0.01 * y.sum()


def event_and_jump(control: Any, **options: Any) -> Callable[..., Tensor]:
    def loss(func: nn.Module, y0: Tensor, jump: Tensor, strategy: Any) -> Tensor:
        sol = sa.solve(
            func,
            y0,
            [0.0, 0.2, 2.0],
            controller=control(jump_t=jump),
            event=late,
            gradient=strategy,
            **options,
            **TIGHT,
        )
        assert sol.event is not None
        total: Tensor = sol.event.t + sol.event.y.square().sum() + sol.y.sum()
        return total + (sol.dense(INSIDE).square().sum() if "dense" in options else 0.0)

    return loss


@pytest.mark.parametrize("strategy", EXACT, ids=label)
@pytest.mark.parametrize(
    "loss",
    [
        event_and_jump(sa.Adaptive),
        event_and_jump(sa.Adaptive, dense=True),
        event_and_jump(sa.SensitivityControl),
    ],
    ids=["event after a jump", "and dense output", "under control of the sensitivities"],
)
def test_the_gradient_is_that_of_backprop(strategy: Strategy, loss: Callable[..., Tensor]) -> None:
    func, jump = Switched(), torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    y0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    inputs = {"y0": y0, "jump_t": jump, **dict(func.named_parameters())}

    def gradients(strategy: Any) -> dict[str, Tensor | None]:
        found = torch.autograd.grad(loss(func, y0, jump, strategy), list(inputs.values()))
        return dict(zip(inputs, found, strict=True))

    error, where = problems.worst(gradients(strategy), gradients("backprop"))
    assert error <= 1e-12, f"{where} is off by {error:.1e}"
