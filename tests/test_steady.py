"""Steady states are those the solution leads to, and their derivatives those of the root."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import Newton
from symplectic_adjoint.memory import peak_memory

SWITCH = torch.tensor([0.5, 0.48, 0.1, 0.2], dtype=torch.float64)


def switch(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """A protein that one enzyme modifies and another one restores."""
    u, v, j, k = p.unbind()
    return u * (1 - y) / (j + 1 - y) - v * y / (k + y)


def goldbeter_koshland(p: Tensor) -> Tensor:
    """Its steady state (Goldbeter, Koshland 1981, doi 10.1073/pnas.78.11.6840, eq. (8))."""
    u, v, j, k = p.unbind()
    b = v - u + v * j + u * k
    return 2 * u * k / (b + (b**2 - 4 * (v - u) * u * k).sqrt())


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


WAYS: dict[str, dict[str, Any]] = {
    "a matrix": {},
    "products alone": {"newton": Newton(dense_below=0)},
    "another method": {"method": "trbdf2"},
    "a tight way": {"rtol": 1e-8, "atol": 1e-10},
    "from near": {"method": None},
}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_gradient_is_that_of_the_closed_form(way: str) -> None:
    p = SWITCH.clone().requires_grad_()
    exact = goldbeter_koshland(p)
    start = zeros(1) if way != "from near" else exact.detach().reshape(1) + 0.05
    y = sa.steady_state(switch, start, args=(p,), **WAYS[way])
    (wanted,) = torch.autograd.grad(exact, p)
    (got,) = torch.autograd.grad(y.sum(), p)
    assert abs(y.item() - exact.item()) < 1e-14
    assert float((got - wanted).norm() / wanted.norm()) < 1e-12


def test_every_tensor_that_func_uses_gets_its_gradient() -> None:
    """A module's parameters, a closure's tensor and the time, against one linear solve by hand."""
    torch.manual_seed(0)
    net = nn.Linear(3, 3).double()
    drive = torch.rand(3, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(net(y)) - 2 * y + drive * (1 + t)

    y = sa.steady_state(func, zeros(3), t=t)
    inputs = [*net.parameters(), drive, t]
    g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    got = torch.autograd.grad(y, inputs, g)

    x = y.detach()
    assert float(func(t, x).detach().abs().max()) < 1e-15
    jacobian: Any = torch.autograd.functional.jacobian(lambda x: func(t, x), x)
    w = -torch.linalg.solve(jacobian.T, g)
    wanted = torch.autograd.grad(func(t, x), inputs, w)
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-13


def test_the_gradient_agrees_with_that_of_a_long_solve() -> None:
    p = SWITCH.clone().requires_grad_()
    y = sa.steady_state(switch, zeros(1), args=(p,))
    (wanted,) = torch.autograd.grad(y.sum(), p)
    errors = []
    for span in (10.0, 1000.0):
        sol = sa.solve(switch, zeros(1), [0.0, span], args=(p,), method="radauIIA5")
        (got,) = torch.autograd.grad(sol.y[-1].sum(), p)
        errors.append(float((got - wanted).norm() / wanted.norm()))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-12


def test_derivatives_are_there_in_forward_mode_and_up_to_the_order_asked_for() -> None:
    p = SWITCH.clone().requires_grad_()
    start = goldbeter_koshland(SWITCH).reshape(1) + 0.01

    def root(order: int) -> Callable[[Tensor], Tensor]:
        return lambda p: sa.steady_state(switch, start, args=(p,), method=None, order=order)

    assert torch.autograd.gradcheck(root(1), p, check_forward_ad=True)
    (got,) = torch.autograd.functional.hessian(lambda p: root(2)(p).sum(), (p,))[0]  # type: ignore[no-untyped-call]
    (wanted,) = torch.autograd.functional.hessian(lambda p: goldbeter_koshland(p), (p,))[0]  # type: ignore[no-untyped-call]
    assert float((got - wanted).norm() / wanted.norm()) < 1e-11
    with pytest.raises(sa.SecondDerivativeError, match=r"steady_state\(order=\.\.\.\)"):
        torch.autograd.functional.hessian(lambda p: root(1)(p).sum(), p)  # type: ignore[no-untyped-call]


def test_forward_mode_works_where_gradients_are_switched_off() -> None:
    p, tangent = SWITCH, torch.tensor([1.0, 0.3, -0.2, 0.1], dtype=torch.float64)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p, tangent)
        y = sa.steady_state(switch, zeros(1), args=(dual,))
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
    wanted: Any = torch.autograd.functional.jvp(goldbeter_koshland, p, tangent)[1]  # type: ignore[no-untyped-call]
    assert got is not None
    assert not got.requires_grad
    assert abs(got.item() - wanted.item()) < 1e-12 * abs(wanted.item())


def test_states_may_be_trees_and_complex() -> None:
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": rate - y["a"] ** 3, "b": y["a"].sum() - 2 * y["b"]}

    y = sa.steady_state(func, {"a": zeros(2), "b": zeros()})
    y["b"].backward()
    root = 0.7 ** (1 / 3)
    assert abs(y["b"].item() - root) < 1e-14
    assert rate.grad is not None
    assert abs(rate.grad.item() - root / (3 * 0.7)) < 1e-13

    c = torch.tensor(1.0 + 0.5j, dtype=torch.complex128, requires_grad=True)
    z = sa.steady_state(lambda t, z: c - z**2, torch.ones(1, dtype=torch.complex128))
    (z * (1 - 2j)).real.sum().backward()
    wanted = torch.autograd.grad((c.sqrt() * (1 - 2j)).real, c)[0]
    assert abs(c.grad - wanted) < 1e-14


def test_a_function_that_differentiates_inside_itself_has_a_steady_state() -> None:
    centre = torch.tensor([0.3, -0.6], dtype=torch.float64, requires_grad=True)

    def descent(t: Tensor, y: Tensor) -> Tensor:
        energy = ((y - centre) ** 4 + (y - centre) ** 2).sum()
        return -torch.autograd.grad(energy, y, create_graph=True)[0]

    y = sa.steady_state(descent, zeros(2))
    assert torch.allclose(y, centre, rtol=0, atol=1e-14)
    y[0].backward()
    assert centre.grad is not None
    assert torch.allclose(centre.grad, torch.eye(2, dtype=torch.float64)[0], atol=1e-14)


def test_a_result_of_constants_has_no_graph() -> None:
    p = SWITCH.clone().requires_grad_()
    start = zeros(1).requires_grad_()
    assert not sa.steady_state(switch, start, args=(SWITCH,)).requires_grad
    with torch.no_grad():
        assert not sa.steady_state(switch, start, args=(p,)).requires_grad
    with torch.inference_mode():
        assert abs(sa.steady_state(switch, zeros(1), args=(p,)) - goldbeter_koshland(p)) < 1e-14


@pytest.mark.parametrize(("start", "wanted"), [(0.9, 2.0), (1.1, 2.0), (0.49, 0.0), (0.51, 2.0)])
def test_of_several_steady_states_it_is_that_of_the_trajectory(start: float, wanted: float) -> None:
    y = sa.steady_state(lambda t, y: -y * (y - 0.5) * (y - 2), torch.full((1,), start).double())
    assert abs(y.item() - wanted) < 1e-14


def test_without_a_method_newton_finds_what_repels_too() -> None:
    func = lambda t, y: -y * (y - 0.5) * (y - 2)  # noqa: E731
    assert abs(sa.steady_state(func, zeros(1) + 0.52, method=None).item() - 0.5) < 1e-15
    assert sa.steady_state(func, zeros(1)).item() == 0.0  # where it stands from the beginning


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_the_unit_of_time_does_not_matter(unit: float) -> None:
    y = sa.steady_state(lambda t, y, p: unit * switch(t, y, p), zeros(1), args=(SWITCH,))
    assert abs(y - goldbeter_koshland(SWITCH)) < 1e-14


def test_single_precision_is_solved_to_its_rounding() -> None:
    p = SWITCH.float().requires_grad_()
    y = sa.steady_state(switch, torch.zeros(1), args=(p,))
    assert abs(y.item() - goldbeter_koshland(SWITCH).item()) < 1e-6
    (got,) = torch.autograd.grad(y.sum(), p)
    (wanted,) = torch.autograd.grad(goldbeter_koshland(p.double()), p)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4


def test_memory_is_that_of_one_evaluation_however_long_the_way() -> None:
    net = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16)).double()

    def gradient(rate: float) -> Callable[[], None]:
        def run() -> None:
            y = sa.steady_state(lambda t, y: rate * (0.1 * net(y) - y), zeros(16) + 5)
            y.sum().backward()
            net.zero_grad()

        return run

    gradient(1.0)()
    near = lambda: sa.steady_state(lambda t, y: 0.1 * net(y) - y, zeros(16), method=None)  # noqa: E731
    alone = peak_memory(lambda: near().sum().backward())
    assert peak_memory(gradient(1.0)) < 1.3 * alone


# What has no steady state ------------------------------------------------------------------------


def test_a_conserved_quantity_is_named() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        flux = 2 * y[0] - 0.1 * y[2]
        return torch.stack([-flux, 0.3 - y[1], flux])

    with pytest.raises(sa.SteadyStateError) as caught:
        sa.steady_state(func, torch.ones(3, dtype=torch.float64))
    text = str(caught.value)
    assert "rank 2 of 3" in text
    first, second = "1 * (y0, component 0)", "1 * (y0, component 2)"
    assert f"{first} + {second}." in text or f"{second} + {first}." in text


def test_what_does_not_come_to_rest_is_said_with_the_time() -> None:
    turn = lambda t, y: torch.stack([y[1], -y[0]])  # noqa: E731
    with pytest.raises(sa.SteadyStateError, match=r"does not come to rest.*max_steps = 100;"):
        sa.steady_state(turn, torch.ones(2, dtype=torch.float64), max_steps=100)
    with pytest.raises(sa.SteadyStateError, match=r"component 0 is .* changes at the rate 1\."):
        sa.steady_state(lambda t, y: torch.ones_like(y), zeros(1))


def test_no_step_is_attempted_beyond_their_greatest_number(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def counted(*args: Any, **options: Any) -> sa.Solution:
        attempts.append(0)
        sol = sa.solve(*args, **options)
        attempts[-1] = sol.stats.accepted + sol.stats.rejected
        return sol

    monkeypatch.setattr("symplectic_adjoint.steady.solve", counted)
    sa.steady_state(switch, zeros(1), args=(SWITCH,))
    few = attempts[:2]
    assert len(attempts) > 2
    attempts.clear()
    with pytest.raises(sa.SteadyStateError, match=f"max_steps = {sum(few)};"):
        sa.steady_state(switch, zeros(1), args=(SWITCH,), max_steps=sum(few))
    assert attempts == few


def test_a_derivative_that_products_alone_do_not_reach_is_an_error() -> None:
    """The Jacobian is singular, which no matrix shows; the start is a root already."""
    p, tangent = torch.tensor(0.0).double().requires_grad_(), torch.ones(()).double()

    def root(p: Tensor) -> Tensor:
        func = lambda t, y: torch.stack([y[1] - 2 * y[0] + p, 2 * y[0] - y[1]])  # noqa: E731
        start = torch.tensor([1.0, 2.0], dtype=torch.float64)
        y: Tensor = sa.steady_state(func, start, method=None, newton=Newton(dense_below=0))
        return y

    with pytest.raises(sa.NonlinearSolveError, match=r"the transposed linear system .* GMRES"):
        root(p).sum().backward()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(sa.NonlinearSolveError, match=r"the linear system .* GMRES"),
    ):
        root(torch.autograd.forward_ad.make_dual(p.detach(), tangent))


def test_a_root_that_newton_does_not_find_is_an_error() -> None:
    with pytest.raises(sa.SteadyStateError, match=r"Newton's method found no steady state"):
        sa.steady_state(lambda t, y: y**2 + 1, zeros(1) + 0.4, method=None)


def test_errors_of_func_and_of_the_way_come_through() -> None:
    with pytest.raises(sa.FieldOutputError, match="shape"):
        sa.steady_state(lambda t, y: y.sum(), zeros(2))
    with pytest.raises(sa.NonFiniteError):
        sa.steady_state(lambda t, y: 1 + y * math.nan, zeros(2))
    with pytest.raises(sa.NonFiniteError):
        sa.steady_state(lambda t, y: 1 + y * math.nan, zeros(2), method=None)


def test_unusable_arguments_are_refused() -> None:
    func = lambda t, y: -y  # noqa: E731
    for name in ("rtol", "atol", "max_steps", "order"):
        with pytest.raises(sa.ArgumentError, match=f"{name} = 0 must be positive"):
            sa.steady_state(func, zeros(1), **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(sa.ArgumentError, match="not callable"):
        sa.steady_state(None, zeros(1))  # type: ignore[arg-type]
    with pytest.raises(sa.ArgumentError, match=r"inside a transform of torch\.func"):
        torch.func.vmap(lambda y: sa.steady_state(func, y))(zeros(2, 1))
