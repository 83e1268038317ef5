"""Every stepper's transpose is the adjoint of its linearised step: <lam, S d> = <S^T lam, d>."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from symplectic_adjoint import steppers
from symplectic_adjoint.field import DetachedField, GraphField
from symplectic_adjoint.steppers._base import Cotangent, DenseCotangent, Reversal
from tests.conformance.registry import METHODS, PARTITIONED
from tests.problems import Net

T0, T1 = 0.2, 0.7


def step_map(
    stepper: Any, net: Net, theta: Tensor
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The step as a function of the state (y, k) that it starts from: (y1, k1, dense outputs)."""

    def run(y: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        field = GraphField(net, y)
        state = stepper.begin(T0, y)
        state.node.k = k
        step = stepper.step(field, state, T1)
        dense = stepper.interpolate(field, step, theta)
        end = stepper.end(step)
        return end.y, stepper.slope(field, end), dense

    return run


@pytest.mark.parametrize("stored", [True, False], ids=["stages stored", "stages recomputed"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense outputs", "end only"])
@pytest.mark.parametrize("method", [*METHODS, *PARTITIONED])
def test_a_transposed_step_keeps_the_product_of_cotangent_and_tangent(
    method: str, dense: bool, stored: bool
) -> None:
    torch.set_default_dtype(torch.float64)
    stepper, net = steppers.get(method), Net(dim=4).requires_grad_(False)
    y, dy, lam, mu = torch.randn(4, 3, 4)
    k, dk = net(torch.tensor(T0), y), torch.randn(3, 4)
    if method != "alf":
        dk = torch.func.jvp(lambda x: net(torch.tensor(T0), x), (y,), (dy,))[1]
    theta = torch.tensor([0.25, 0.6, 0.9])
    g = torch.randn(3, 3, 4) if dense else torch.zeros(3, 3, 4)

    with forward_ad.dual_level():
        duals = forward_ad.make_dual(y, dy), forward_ad.make_dual(k, dk)
        outputs = step_map(stepper, net, theta)(*duals)
        tangent = [forward_ad.unpack_dual(x).tangent for x in outputs]
    forward = sum((a * b).sum() for a, b in zip(tangent, (lam, mu, g), strict=True))

    field = DetachedField(net, y, [], None)
    state = stepper.begin(T0, y)
    state.node.k = k
    step = stepper.step(field, state, T1)
    if dense:
        stepper.interpolate(field, step, theta)
    end = stepper.end(step)
    loaded = stepper.load(field, T0, T1, stepper.save(step, stages=stored), end, dense)
    places = DenseCotangent(theta, g) if dense else None
    back = stepper.transpose(Reversal(field), 0, loaded, Cotangent(lam, mu), places)
    mu_start = torch.zeros_like(dk) if back.k is None else back.k  # not all methods use f(t, y)
    backward = (back.y * dy).sum() + (mu_start * dk).sum()

    scale = back.y.norm() * dy.norm() + mu_start.norm() * dk.norm()
    assert abs(forward - backward) <= 1e-14 * scale


def test_the_start_of_a_solve_is_transposed_too() -> None:
    torch.set_default_dtype(torch.float64)
    net = Net(dim=4).requires_grad_(False)
    y, dy, lam, mu = torch.randn(4, 3, 4)
    dk = torch.func.jvp(lambda x: net(torch.tensor(T0), x), (y,), (dy,))[1]
    for method in (*METHODS, *PARTITIONED):
        stepper = steppers.get(method)
        field = DetachedField(net, y, [], None)
        back = stepper.transpose_begin(Reversal(field), stepper.begin(T0, y), Cotangent(lam, mu))
        assert abs((lam * dy).sum() + (mu * dk).sum() - (back * dy).sum()) < 1e-13
