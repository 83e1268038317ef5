"""Events by torchdiffeq's functions: the meaning its documentation gives them, exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa

INTERFACES = [sa.odeint, sa.odeint_adjoint]


class Growth(nn.Module):
    """``y' = rate y``, which reaches ``level`` at ``t0 + log(level / y0) / rate``."""

    def __init__(self, rate: float = 0.5, level: float = 2.0) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64))
        self.level = nn.Parameter(torch.tensor(level, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y

    def event(self, t: Tensor, y: Tensor) -> Tensor:
        return y - self.level


@pytest.mark.parametrize("interface", INTERFACES)
def test_the_event_time_and_state_have_their_derivatives(interface: Any) -> None:
    model = Growth()
    y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    t0 = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    t, y = sa.odeint_event(
        model, y0, t0, event_fn=model.event, odeint_interface=interface, rtol=1e-11, atol=1e-13
    )
    assert t.shape == ()
    assert y.shape == (2, 1)
    assert y[0].item() == 1.0
    assert t.item() == pytest.approx(0.3 + 2 * math.log(2), rel=1e-10)
    assert y[1].item() == pytest.approx(2.0, rel=1e-14)
    inputs = [y0, t0, model.rate, model.level]
    times = torch.autograd.grad(t, inputs, retain_graph=True)
    assert [x.item() for x in times] == pytest.approx([-2, 1, -4 * math.log(2), 1], rel=1e-9)
    ends = torch.autograd.grad(y[1, 0], inputs)
    assert [x.item() for x in ends] == pytest.approx([0, 0, 0, 1], abs=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "bosh3"}, {"method": "rk4", "options": {"step_size": 0.01, "interp": "cubic"}}],
)
def test_time_may_run_either_way(options: dict[str, Any], reverse: bool) -> None:
    model = Growth(level=0.5 if reverse else 2.0)
    y0 = torch.ones(1, dtype=torch.float64)
    t, y = sa.odeint_event(model, y0, 1.0, event_fn=model.event, reverse_time=reverse, **options)
    sign = -1.0 if reverse else 1.0
    assert t.item() == pytest.approx(1 + sign * 2 * math.log(2), rel=1e-6)
    (grad,) = torch.autograd.grad(t, model.rate)
    assert grad.item() == pytest.approx(-sign * 4 * math.log(2), rel=1e-6)
    assert torch.allclose(y[1], model.level)


def test_odeint_ignores_where_t_ends_and_keeps_its_dtype() -> None:
    y0 = (torch.ones(2), torch.zeros(()))

    def func(t: Tensor, y: Any) -> Any:
        return y[0], torch.ones(())

    def event(t: Tensor, y: Any) -> Tensor:
        return torch.stack([y[0].sum() - 20.0, y[1] - 0.7])

    for interface in INTERFACES:
        t, y = interface(func, y0, torch.tensor([0.0, 0.1]), event_fn=event)
        assert t.dtype is torch.float32
        assert t.item() == pytest.approx(0.7, rel=1e-6)
        assert [x.shape for x in y] == [(2, 2), (2,)]
        assert y[1][1].item() == pytest.approx(0.7, rel=1e-6)
    t, _ = sa.odeint(func, y0, [0.0, -0.1], event_fn=lambda t, y: y[1] + 0.25)
    assert t.item() == pytest.approx(-0.25, rel=1e-6)


def test_no_event_is_an_error_with_a_remedy() -> None:
    model = Growth(level=-1.0)
    y0 = torch.ones(1, dtype=torch.float64)
    with pytest.raises(sa.EventNotFoundError, match=r"no event within 30 steps.*max_num_steps"):
        sa.odeint_event(model, y0, 0.0, event_fn=model.event, options={"max_num_steps": 30})
    with pytest.raises(sa.ArgumentError, match=r"options=\{'step_size': ...\}"):
        sa.odeint_event(model, y0, 0.0, event_fn=model.event, method="rk4")


def test_bad_times_are_refused_as_without_an_event() -> None:
    model = Growth()
    with pytest.raises(sa.ArgumentError, match="strictly increasing or strictly decreasing"):
        sa.odeint(model, torch.ones(1), [1.0, 1.0], event_fn=model.event)
    with pytest.raises(sa.ArgumentError, match="at least two times"):
        sa.odeint(model, torch.ones(1), [1.0], event_fn=model.event)
