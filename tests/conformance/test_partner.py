"""The recursion of the steppers is the paper's partner method, term by term."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import symplectic_adjoint as sa
from symplectic_adjoint import tableaus
from tests.conformance.registry import EXPLICIT
from tests.problems import Net

T0, H = 0.3, 0.4


def partner_gradient(net: Net, y: Tensor, lam: Tensor, name: str) -> tuple[Tensor, list[Tensor]]:
    """One step back with the partner tableau, as published, dividing by ``b_i``.

    With ``w_i = b_i`` where it is not zero and ``w_i = h`` otherwise, and ``l_i = -(df/dx)^T
    Lambda_i``, the cotangent stages are

        Lambda_i = lam - h sum_j w_j (a_ji / b_i) l_j     where b_i != 0,
        Lambda_i = -sum_j w_j a_ji l_j                    where b_i = 0,

    and the new cotangent is ``lam - h sum_i w_i l_i``.
    """
    exact = tableaus.get(name).butcher()
    a = [[float(x) for x in row] for row in exact.a]
    b, c = [float(x) for x in exact.b], [float(x) for x in exact.c]
    stages: list[Tensor] = []
    slopes: list[Tensor] = []
    for i in range(len(b)):
        x = y + H * sum((a[i][j] * slopes[j] for j in range(i)), start=torch.zeros_like(y))
        stages.append(x)
        slopes.append(net(torch.tensor(T0 + c[i] * H), x).detach())
    weights = [b_i if b_i != 0 else H for b_i in b]
    back: dict[int, Tensor] = {}
    grads = [torch.zeros_like(p) for p in net.parameters()]
    for i in reversed(range(len(b))):
        later = [(weights[j] * a[j][i], back[j]) for j in range(i + 1, len(b))]
        total = sum((w * x for w, x in later), start=torch.zeros_like(lam))
        stage_lam = lam - H * total / b[i] if b[i] != 0 else -total
        x = stages[i].clone().requires_grad_()
        k = net(torch.tensor(T0 + c[i] * H), x)
        pulled, *parts = torch.autograd.grad(k, [x, *net.parameters()], stage_lam)
        back[i] = -pulled
        grads = [g + H * weights[i] * part for g, part in zip(grads, parts, strict=True)]
    steps = sum((weights[i] * back[i] for i in back), start=torch.zeros_like(lam))
    return lam - H * steps, grads


@pytest.mark.parametrize("store", ["steps", "stages", "graph"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_the_transpose_is_the_partner_method_of_the_paper(method: str, store: str) -> None:
    torch.set_default_dtype(torch.float64)
    net = Net(dim=4)
    y = torch.randn(3, 4)
    lam = torch.randn(3, 4)
    expected, expected_params = partner_gradient(net, y, lam, method)

    y0 = y.clone().requires_grad_()
    gradient = sa.Symplectic(store=store)  # type: ignore[arg-type]
    grid = sa.FixedGrid()
    sol = sa.solve(net, y0, [T0, T0 + H], method=method, controller=grid, gradient=gradient)
    got, *params = torch.autograd.grad(sol.y[-1], [y0, *net.parameters()], lam)

    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)
    for p, q in zip(params, expected_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_methods_with_a_zero_weight_are_among_those_compared() -> None:
    zero = {name for name in EXPLICIT if 0 in map(float, tableaus.get(name).butcher().b)}
    assert {"midpoint", "bosh3", "dopri5", "tsit5", "dopri8"} <= zero
