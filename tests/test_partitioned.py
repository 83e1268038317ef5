"""Splitting methods: what they cost, what they conserve, and what they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import gradients, splitting, steppers
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.loop import SolveShape
from symplectic_adjoint.memory import peak_memory
from tests.conformance.registry import PARTITIONED, label, strategies, supports

STRATEGIES = [
    s for s in strategies(exact=True) if supports(s, "verlet") and "accumulate" not in label(s)
]
T = torch.tensor([0.0, 0.3, 0.75, 1.0], dtype=torch.float64)


class Force(nn.Module):
    """A separable network that counts its calls and products."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.v = nn.Linear(2, 2, dtype=torch.float64)
        self.g = nn.Linear(2, 2, dtype=torch.float64)
        self.calls = self.products = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        q, p = y.chunk(2, -1)
        k = torch.cat([torch.tanh(self.v(p)), torch.sin(self.g(q) + t)], -1)
        if k.requires_grad:
            k.register_hook(self._pulled)
        return k

    def _pulled(self, cotangent: Tensor) -> None:
        self.products += 1


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    q, p = y.chunk(2, -1)
    return torch.cat([p, -torch.sin(q)], -1)


def double_pendulum(t: Tensor, y: Any) -> Any:
    """Two equal pendulums in canonical coordinates: not separable."""
    q, p = y
    with torch.enable_grad():
        q, p = (x if x.requires_grad else x.detach().requires_grad_() for x in (q, p))
        c = torch.cos(q[0] - q[1])
        kinetic = (p[0] ** 2 + 2 * p[1] ** 2 - 2 * p[0] * p[1] * c) / (4 - 2 * c**2)
        h = kinetic - 2 * torch.cos(q[0]) - torch.cos(q[1])
        dh_dq, dh_dp = torch.autograd.grad(h, (q, p), create_graph=True)
    return dh_dp, -dh_dq


@pytest.mark.parametrize("strategy", STRATEGIES, ids=label)
@pytest.mark.parametrize("method", PARTITIONED)
def test_evaluations_and_products_are_counted_to_the_last_one(
    method: str, strategy: Strategy
) -> None:
    func, stepper = Force(), steppers.get(method)
    y0 = torch.tensor([[0.3, -0.2, 0.1, 0.7]], dtype=torch.float64, requires_grad=True)
    sol = sa.solve(
        func, y0, T, method=method, gradient=strategy, controller=sa.FixedGrid(step_size=0.25)
    )
    # Outputs at 0.3 and, on a node, at 0.75.
    seen = SolveShape(4, dense=1, dense_runs=1, scalars=4 + 12)
    assert sol.stats.evaluations == func.calls == seen.evaluations(stepper.work)
    func.calls = func.products = 0
    sol.y.square().sum().backward()
    counted = sol.stats.backward_evaluations, sol.stats.products
    assert (func.calls, func.products) == counted == strategy.counts(stepper, seen)


def test_a_verlet_step_takes_two_evaluations() -> None:
    func = Force()
    y0 = torch.zeros(4, dtype=torch.float64)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    sa.solve(func, y0, grid, method="verlet")
    assert func.calls == 2 * 100 + 1 + 2  # the first slope, and the check at the start


@pytest.mark.parametrize(
    ("method", "store", "states"),
    [
        # The state, and the half of a slope that is carried over, or what a move has left between.
        ("verlet", "steps", 1.5),
        ("verlet", "stages", 1.5),
        ("symplectic_euler", "steps", 1.0),
        ("symplectic_euler", "stages", 1.0),
        ("yoshida4", "steps", 1.5),
        ("yoshida4", "stages", 3.5),
    ],
)
def test_a_step_keeps_half_a_state_for_each_point_between_its_ends(
    method: str, store: Any, states: float
) -> None:
    y0 = torch.ones(4000, dtype=torch.float64, requires_grad=True)

    def kept(steps: int) -> float:
        probe, held = 1 << 28, []  # so large that the peak is where it is allocated

        def run() -> None:
            grid = sa.FixedGrid(step_size=1 / steps)
            strategy = sa.Symplectic(store)
            held.append(
                sa.solve(pendulum, y0, [0, 1], method=method, gradient=strategy, controller=grid)
            )
            torch.empty(probe, dtype=torch.uint8)

        return (peak_memory(run) - probe) / y0.nbytes

    assert (kept(20) - kept(10)) / 10 == pytest.approx(states, abs=0.01)


@pytest.mark.parametrize("method", PARTITIONED)
def test_a_step_is_symplectic(method: str) -> None:
    """The Jacobian J of the flow fulfils J^T W J = W."""
    y0 = torch.tensor([0.7, -0.4, 0.2, 1.1], dtype=torch.float64)
    grid = torch.tensor([0.0, 0.3, 0.5], dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        q, p = y.chunk(2)
        return torch.cat([p + p**3, -torch.stack([q[0] ** 3 + q[1], q[0] + torch.sin(q[1])])])

    def defect(method: str) -> float:
        flow = torch.func.jacrev(lambda y: sa.solve(func, y, grid, method=method).y[-1])
        return float((flow(y0).T @ w @ flow(y0) - w).abs().max())

    eye = torch.eye(2, dtype=torch.float64)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    w = torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)])
    assert defect(method) < 1e-13
    assert defect("rk4") > 1e-6


def test_the_energy_of_a_pendulum_stays_within_bounds_for_ever() -> None:
    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
    t = torch.linspace(0, 600, 3001, dtype=torch.float64)

    def errors(method: str) -> Tensor:
        q, p = sa.solve(pendulum, y0, t, method=method).y.unbind(-1)
        energy = p**2 / 2 - torch.cos(q)
        return (energy - energy[0]).abs()

    for method, bound in (("verlet", 2e-2), ("yoshida4", 1e-3)):
        error = errors(method)
        assert float(error[-600:].max()) < bound
        assert float(error[-600:].max()) < 1.1 * float(error[:600].max())
    error = errors("rk4")
    assert float(error[-600:].max()) > 4 * float(error[:600].max())


@pytest.mark.parametrize("method", PARTITIONED[1:])
def test_symmetric_methods_return_to_where_they_came_from(method: str) -> None:
    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64)
    t = torch.linspace(0, 2, 21, dtype=torch.float64)
    there = sa.solve(pendulum, y0, t, method=method).y[-1]
    back = sa.solve(pendulum, there, t.flip(0), method=method).y[-1]
    assert float((back - y0).abs().max()) < 1e-13


@pytest.mark.parametrize("strategy", ["symplectic", "backprop"])
def test_a_system_that_is_not_separable_is_refused_even_at_rest(strategy: str) -> None:
    q = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    y0 = (q, torch.zeros_like(q))
    with pytest.raises(sa.NotSeparableError, match=r"dp changed by .* when only p did.*gl4"):
        sa.solve(double_pendulum, y0, t, method="verlet", gradient=strategy)
    assert sa.solve(double_pendulum, y0, t, method="implicit_midpoint").stats.accepted == 10


@pytest.mark.parametrize(
    ("func", "own"),
    [
        (lambda t, y: (y[1], -y[0] - 0.01 * y[1]), "p"),
        (lambda t, y: (y[1] + 0.01 * y[0], -y[0]), "q"),
    ],
)
def test_friction_and_growth_are_refused(func: Any, own: str) -> None:
    y0 = torch.ones(1), torch.ones(1)
    with pytest.raises(sa.NotSeparableError, match=f"d{own} changed"):
        sa.solve(func, y0, [0.0, 0.1], method="symplectic_euler")


def test_a_driven_system_and_one_that_draws_random_numbers_are_separable() -> None:
    def driven(t: Tensor, y: Any) -> Any:
        return y[1] * torch.exp(-t), torch.sin(5 * t) - y[0] + 0.1 * torch.randn(3)

    q = torch.ones(3, requires_grad=True)
    sol = sa.solve(driven, (q, torch.ones(3)), [0.0, 0.1, 0.2], method="verlet")
    sol.y[0].sum().backward()
    assert sol.stats.accepted == 2
    assert q.grad is not None


@pytest.mark.parametrize(
    ("y0", "said"),
    [
        (torch.ones(3), r"shape \(3,\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        ((torch.ones(1), torch.ones(1), torch.ones(1)), "3 branches"),
        ([torch.ones(1)], "1 branches"),
    ],
)
def test_a_state_of_other_than_two_parts_is_refused(y0: Any, said: str) -> None:
    with pytest.raises(sa.ArgumentError, match=said):
        sa.solve(lambda t, y: y, y0, [0.0, 1.0], method="verlet")


def test_the_continuous_adjoint_needs_a_method_of_its_own() -> None:
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    with pytest.raises(sa.ArgumentError, match="not by 'verlet'"):
        sa.solve(pendulum, y0, t, method="verlet", gradient="continuous")
    wanted = torch.autograd.grad(sa.solve(pendulum, y0, t, method="verlet").y[-1].sum(), y0)[0]
    other = sa.Continuous(method_name="rk4")
    sol = sa.solve(pendulum, y0, t, method="verlet", gradient=other)
    (got,) = torch.autograd.grad(sol.y[-1].sum(), y0)
    assert 1e-10 < float((got - wanted).abs().max()) < 1e-4


def test_parts_of_unequal_trees_are_told_apart() -> None:
    """Branches may be trees; a tensor gives the same solution as a pair."""
    q, p = torch.rand(2, 3, dtype=torch.float64)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    whole = sa.solve(pendulum, torch.cat([q, p]), t, method="yoshida6").y

    def tree(t: Tensor, y: Any) -> Any:
        (a, b), p = y
        return (p[:1], p[1:]), -torch.sin(torch.cat([a, b]))

    (a, b), end = sa.solve(tree, ((q[:1], q[1:]), p), t, method="yoshida6").y
    assert torch.equal(torch.cat([a, b, end], -1), whole)


def test_verlet_agrees_with_its_textbook() -> None:
    q, p = 0.9, -0.3
    y = sa.solve(pendulum, torch.tensor([q, p], dtype=torch.float64), [0.0, 0.2], method="leapfrog")
    force = -torch.sin(torch.tensor(q, dtype=torch.float64))
    half = p + 0.1 * force
    q1 = q + 0.2 * half
    p1 = half - 0.1 * torch.sin(q1)
    assert float((y.y[-1] - torch.stack([q1, p1])).abs().max()) < 1e-15


@pytest.mark.parametrize("name", splitting.names())
def test_a_wrong_digit_of_a_splitting_is_found(name: str) -> None:
    right = splitting.get(name)
    assert right.citation
    moves = [(part, weight) for part, weight, _ in right.moves]
    i = len(moves) // 2
    wrong = [*moves]
    wrong[i] = (wrong[i][0], wrong[i][1] + 1e-9)
    with pytest.raises(sa.TableauError, match="sum to"):
        sa.Splitting(name, right.order, wrong)
    with pytest.raises(sa.TableauError, match=f"misses order {right.order + 1}"):
        sa.Splitting(name, right.order + 1, moves)
    with pytest.raises(sa.TableauError, match="in turn"):
        sa.Splitting(name, right.order, [moves[0], *moves])
    if len(moves) > 5:
        j = i - 2  # the same part, so that the sum stays
        wrong[i - 2] = (moves[j][0], moves[j][1] - 1e-9)
        with pytest.raises(sa.TableauError, match="misses order"):
            sa.Splitting(name, right.order, wrong)


def test_moves_of_yoshida_reach_beyond_the_step() -> None:
    assert splitting.get("verlet").reach == (0.0, 1.0)
    low, high = splitting.get("yoshida4").reach
    assert low < 0
    assert high > 1


@pytest.mark.parametrize("strategy", ["symplectic", "aca", "backprop"])
def test_the_time_of_an_event_and_values_between_steps_have_their_gradients(strategy: Any) -> None:
    """A harmonic oscillator crosses zero after a quarter of its period, whatever its amplitude."""
    stiffness = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    sol = sa.solve(
        lambda t, y: (y[1], -stiffness * y[0]),
        y0,
        [0.0, 0.123, 5.0],
        method="yoshida8",
        controller=sa.FixedGrid(step_size=0.05),
        gradient=strategy,
        event=lambda t, y: y[0],
        dense=True,
    )
    assert sol.event is not None
    quarter = torch.pi / 2 / stiffness.sqrt()
    (got,) = torch.autograd.grad(sol.event.t, stiffness, retain_graph=True)
    (wanted,) = torch.autograd.grad(quarter, stiffness, retain_graph=True)
    assert float((sol.event.t - quarter).detach().abs()) < 2e-8  # the error of Hermite's cubic
    assert float((got - wanted).abs()) < 2e-7
    between = torch.autograd.grad(sol.y[0][1].sum(), stiffness, retain_graph=True)[0]
    later = torch.autograd.grad(sol.dense(0.123)[0].sum(), stiffness)[0]
    assert float((between - later).abs()) < 1e-13


@pytest.mark.parametrize("name", ["symplectic", "checkpoint"])
def test_second_derivatives_are_those_of_backpropagation(name: str) -> None:
    def hessian(strategy: Strategy) -> Tensor:
        def energy(y: Tensor) -> Tensor:
            sol = sa.solve(pendulum, y, [0.0, 0.3, 0.6], method="verlet", gradient=strategy)
            return torch.as_tensor(sol.y[-1].square().sum())

        y0 = torch.tensor([0.4, 0.8], dtype=torch.float64)
        return torch.autograd.functional.hessian(energy, y0)  # type: ignore[no-any-return]

    got, wanted = hessian(gradients.get(name)), hessian(sa.Backprop())
    assert float((got - wanted).abs().max()) < 1e-13


def test_a_stepper_is_a_value() -> None:
    stepper = steppers.get("verlet")
    assert stepper == sa.Partitioned(splitting.get("verlet"))
    assert dataclasses.replace(stepper, size=3) != stepper  # type: ignore[type-var]
