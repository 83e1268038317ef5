"""Derivatives of derivatives by plain autograd, forward mode, and the strategy ``forward``."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import symplectic_adjoint as sa
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.memory import peak_memory
from tests import problems
from tests.conformance.registry import label, strategies

EXACT = strategies(exact=True)
PLAIN = [s for s in EXACT if getattr(s, "accumulate", "inplace") == "inplace"]

every_strategy = pytest.mark.parametrize("strategy", PLAIN, ids=label)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def net(dim: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 3), nn.Tanh(), nn.Linear(3, dim))


def solve(module: nn.Module, y0: Tensor, strategy: Any, plain: bool = False) -> Tensor:
    """Outputs inside of steps and at the end, on a grid that is the same for all strategies."""
    y: Tensor = sa.solve(
        lambda t, y: module(y) * torch.cos(t),
        y0,
        [0.0, 0.37, 1.0],
        method=strategy.method or "rk4",
        controller=sa.FixedGrid(step_size=0.3),
        gradient="backprop" if plain else strategy,
    ).y[1:]
    return y


def both(strategy: Strategy, derivative: Callable[[Callable[..., Tensor]], Any]) -> None:
    """A derivative of the solve equals that of the same solve under plain autograd."""
    module = net()
    got = derivative(lambda y0: solve(module, y0, strategy))
    wanted = derivative(lambda y0: solve(module, y0, strategy, plain=True))
    for a, b in zip(got(module), wanted(module), strict=True):
        assert problems.relative_error(a, b) <= 1e-12


# Second derivatives -----------------------------------------------------------------------------


@every_strategy
def test_hessian_vector_products_in_both_modes(strategy: Strategy) -> None:
    """Backwards twice, and forwards over backwards; for the state and for the parameters."""
    y0, v = torch.randn(3, 2).requires_grad_(), torch.randn(3, 2)

    def twice(run: Callable[..., Tensor]) -> Any:
        def derivative(module: nn.Module) -> Any:
            (g,) = torch.autograd.grad(run(y0).sin().sum(), y0, create_graph=True)
            return torch.autograd.grad(g, [y0, *module.parameters()], v)

        return derivative

    both(strategy, twice)
    module = net()
    (g,) = torch.autograd.grad(
        solve(module, y0, strategy, plain=True).sin().sum(), y0, create_graph=True
    )
    (wanted,) = torch.autograd.grad(g, y0, v)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(y0, v)
        (g,) = torch.autograd.grad(solve(module, dual, strategy).sin().sum(), dual)
        got = forward_ad.unpack_dual(g).tangent
    assert problems.relative_error(got, wanted) <= 1e-12


@every_strategy
def test_backwards_over_forwards_is_the_same(strategy: Strategy) -> None:
    y0, v = torch.randn(3, 2).requires_grad_(), torch.randn(3, 2)

    def along(run: Callable[..., Tensor]) -> Any:
        def derivative(module: nn.Module) -> Any:
            with forward_ad.dual_level():
                dual = run(forward_ad.make_dual(y0, v)).sin().sum()
                tangent = forward_ad.unpack_dual(dual).tangent
            return torch.autograd.grad(tangent, [y0, *module.parameters()])

        return derivative

    both(strategy, along)


@every_strategy
def test_first_and_second_derivatives_of_one_graph_mix(strategy: Strategy) -> None:
    """A first derivative, a penalty on it, and a first derivative again."""
    y0 = torch.randn(3, 2).requires_grad_()

    def mixed(run: Callable[..., Tensor]) -> Any:
        def derivative(module: nn.Module) -> Any:
            y, tensors = run(y0), [y0, *module.parameters()]
            first = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
            (g,) = torch.autograd.grad(y.sin().sum(), y0, create_graph=True)
            penalty = (g.norm(dim=1) - 1).square().mean() + y.square().mean()
            second = torch.autograd.grad(penalty, tensors, retain_graph=True)
            return [*first, *second, *torch.autograd.grad(y.sum(), tensors)]

        return derivative

    both(strategy, mixed)


@every_strategy
def test_a_physics_informed_loss_is_trained_through_times(strategy: Strategy) -> None:
    """The residual of an equation for the derivative of the outputs in time."""
    module = net()
    y0 = torch.randn(2).requires_grad_()

    def residual(gradient: Any) -> list[Tensor]:
        t = torch.linspace(0.0, 1.0, 4).requires_grad_()
        y = sa.solve(
            lambda t, y: module(y) * torch.cos(t),
            y0,
            t,
            method=strategy.method or "rk4",
            controller=sa.FixedGrid(step_size=0.3),
            gradient=gradient,
        ).y[:, 0]
        (slope,) = torch.autograd.grad(y.sum(), t, create_graph=True)
        return [*torch.autograd.grad((slope + y).square().sum(), [y0, t, *module.parameters()])]

    for a, b in zip(residual(strategy), residual("backprop"), strict=True):
        assert problems.relative_error(a, b) <= 1e-12


def live_bytes() -> int:
    return sum(
        x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)
    )


@every_strategy
def test_second_derivatives_leave_nothing_behind(strategy: Strategy) -> None:
    """No byte after 1000 penalties on one step, and no cycle of references to be collected."""
    module, y0 = net(), torch.randn(3, 2).requires_grad_()

    def iteration() -> None:
        y = sa.solve(
            lambda t, y: module(y),
            y0,
            [0.0, 0.1],
            method=strategy.method or "euler",
            controller=sa.FixedGrid(),
            gradient=strategy,
        ).y[-1]
        (g,) = torch.autograd.grad(y.sin().sum(), y0, create_graph=True)
        torch.autograd.grad(g.square().sum(), [y0, *module.parameters()], allow_unused=True)

    iteration()
    gc.collect()
    gc.disable()
    try:
        before = live_bytes()
        for _ in range(200 if strategy.name != "symplectic" else 1000):
            iteration()
        after = live_bytes()
    finally:
        gc.enable()
    assert after == before


# Forward mode -----------------------------------------------------------------------------------


def test_forward_mode_keeps_no_more_than_a_step() -> None:
    """Its peak does not grow with the number of steps, though the parameters require grad."""
    module, y0 = net(64), torch.randn(50, 64)
    module.requires_grad_(False)

    def peak(steps: int) -> int:
        def run() -> Tensor:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(y0, torch.ones_like(y0))
                y = sa.odeint(
                    lambda t, y: module(y),
                    dual,
                    [0.0, 1.0],
                    method="rk4",
                    options={"step_size": 1 / steps},
                )
                tangent: Tensor = forward_ad.unpack_dual(y).tangent
            return tangent

        run()
        return peak_memory(run)

    assert peak(40) <= peak(4) + 10_000


def test_the_strategy_forward_pays_once_for_every_number_and_then_nothing() -> None:
    calls: list[int] = []
    rates = torch.tensor([0.5, 0.2, 0.1]).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return rates[0] * y - rates[1] * y.square() + rates[2] * torch.cos(t)

    t = torch.linspace(0.0, 2.0, 30)
    sol = sa.solve(func, torch.ones(4), t, gradient="forward", method="rk4")
    forward = len(calls)
    rows = [torch.autograd.grad(y, rates, retain_graph=True)[0] for y in sol.y[:, 0]]
    assert len(calls) == 2 * forward
    assert sol.stats.products == 0
    for chunk in (1, 2):
        calls.clear()
        sol = sa.solve(func, torch.ones(4), t, gradient=sa.Forward(chunk=chunk), method="rk4")
        torch.autograd.grad(sol.y.sum(), rates)
        assert len(calls) == (1 + 3 // chunk + 3 % chunk) * forward
    y = sa.odeint(func, torch.ones(4), t, gradient="backprop", method="rk4")
    wanted = [torch.autograd.grad(x, rates, retain_graph=True)[0] for x in y[:, 0]]
    assert problems.relative_error(torch.stack(rows), torch.stack(wanted)) <= 1e-13


def test_the_strategy_forward_keeps_no_more_than_a_step() -> None:
    rate, y0 = torch.tensor(0.5).requires_grad_(), torch.randn(4000)

    def peak(steps: int) -> int:
        def run() -> None:
            grid = sa.FixedGrid(step_size=1 / steps)
            sol = sa.solve(
                lambda t, y: torch.sin(rate * y),
                y0,
                [0.0, 1.0],
                method="rk4",
                controller=grid,
                gradient="forward",
            )
            sol.y[-1].sum().backward()

        run()
        return peak_memory(run)

    assert peak(40) <= peak(4) + 10_000


def test_too_many_inputs_for_forward_are_refused_before_anything_is_solved() -> None:
    module = nn.Linear(30, 30)

    def func(t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("func was called")

    func.module = module  # type: ignore[attr-defined]
    with pytest.raises(sa.ArgumentError, match=r"930 numbers.*'symplectic'.*limit"):
        sa.odeint(func, torch.ones(30), [0.0, 1.0], gradient="forward")
    with pytest.raises(sa.ArgumentError, match="chunk = 0"):
        sa.Forward(chunk=0)


def test_output_times_are_one_direction_of_forward_however_many_they_are() -> None:
    t = torch.linspace(0.0, 1.0, 600, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64)
    found = []
    for gradient in ("forward", "symplectic"):
        sol = sa.solve(lambda t, y: -y * torch.cos(t), y0, t, gradient=gradient)
        found.append(torch.autograd.grad(sol.y.square().sum(), t)[0])
        if gradient == "forward":
            assert sol.stats.backward_evaluations <= sol.stats.evaluations
    assert problems.relative_error(found[0], found[1]) < 1e-12


# The compiler -----------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, gradient: str, compiled: bool) -> None:
        super().__init__()
        self.before, self.field = nn.Linear(2, 3), net(3)
        self.run: Any = torch.compile(self.field, backend="aot_eager") if compiled else self.field
        self.gradient = gradient

    def forward(self, x: Tensor) -> Tensor:
        y0 = torch.tanh(self.before(x))
        y = sa.odeint(
            lambda t, y: self.run(y), y0, [0.0, 1.0], rtol=1e-3, atol=1e-3, gradient=self.gradient
        )
        return torch.sin(y[-1]).sum()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("gradient", ["symplectic", "backprop"])
def test_a_compiled_model_breaks_its_graph_at_the_solve_alone(gradient: str) -> None:
    x = torch.randn(4, 2)
    model = Model(gradient, compiled=False)
    model(x).backward()
    wanted = [p.grad for p in model.parameters()]
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([node.name for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        model.zero_grad()
        compiled(x).backward()
        for p, g in zip(model.parameters(), wanted, strict=True):
            assert problems.relative_error(p.grad, g) <= 1e-13
    assert len(graphs) == 2, graphs  # before the solve, and after it
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    "gradient", ["symplectic", "aca", "checkpoint", "backprop", "continuous", "mali", "forward"]
)
def test_func_may_be_a_compiled_module(gradient: str) -> None:
    x = torch.randn(4, 2)
    torch.manual_seed(1)
    model = Model(gradient, compiled=False)
    model(x).backward()
    torch.manual_seed(1)
    other = Model(gradient, compiled=True)
    other(x).backward()
    for p, q in zip(other.field.parameters(), model.field.parameters(), strict=True):
        assert problems.relative_error(p.grad, q.grad) <= 1e-12
    torch._dynamo.reset()
