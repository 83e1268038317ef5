"""Whether a gradient can be trusted: ``check_gradient`` and ``SensitivityControl``."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.controllers import Setting
from symplectic_adjoint.field import Field, GraphField
from symplectic_adjoint.gradients import Strategy
from tests import problems
from tests.conformance import reference
from tests.conformance.registry import QUICK, label, pacing, strategies

ADAPTIVE = [name for name in QUICK if steppers.get(name).error_order is not None]
EXACT = strategies(exact=True)


class Hidden(nn.Module):
    """A decaying component, and a rotating pair that starts at rest and so never moves.

    The solution is ``(exp(-rate t), 0, 0)``; its derivative with respect to ``y0`` rotates.
    """

    def __init__(self, speed: float = 20.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0, dtype=dtype))
        self.register_buffer("turn", torch.tensor([[0.0, speed], [-speed, 0.0]], dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([-self.rate * y[:1], self.turn @ y[1:]])

    def matrix(self) -> Tensor:
        return torch.block_diag(-self.rate.reshape(1, 1), self.turn)

    @staticmethod
    def start(dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0], dtype=dtype, requires_grad=True)


WEIGHTS = torch.tensor([0.3, 0.7, -0.5], dtype=torch.float64)


def last(y: Tensor) -> Tensor:
    return (WEIGHTS.to(y) * y[-1]).sum()


def true_gradient(func: Hidden, time: float) -> Tensor:
    """With respect to ``y0``, by the matrix exponential."""
    return torch.linalg.matrix_exp(func.matrix().detach() * time).T @ WEIGHTS


def error_of(controller: sa.Adaptive, tolerance: float, speed: float, **options: Any) -> float:
    """The error of the gradient with respect to ``y0`` on the hidden rotation."""
    func, y0 = Hidden(speed), Hidden.start()
    sol = sa.solve(
        func, y0, [0.0, 1.0], rtol=tolerance, atol=tolerance, controller=controller, **options
    )
    (grad,) = torch.autograd.grad(last(sol.y), y0)
    return problems.relative_error(grad, true_gradient(func, 1.0))


# The estimate --------------------------------------------------------------------------------


def linear(t: Tensor, y: Tensor, a: Tensor) -> Tensor:
    return a @ y


def stable_matrix(dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    a = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    return (a - a.T - torch.eye(3)).to(dtype).requires_grad_()


def known_gradients(a: Tensor, y0: Tensor, time: Tensor) -> dict[str, Tensor]:
    """Of the last value, by autograd through the matrix exponential."""
    a, y0 = a.detach().requires_grad_(), y0.detach().requires_grad_()
    y = torch.linalg.matrix_exp(a * time) @ y0
    grads = torch.autograd.grad((WEIGHTS * y).sum(), [y0, a])
    return dict(zip(["y0", "args[0]"], grads, strict=True))


@pytest.mark.parametrize("method", [*QUICK, "radauIIA5"])
def test_estimates_of_a_linear_problem_are_those_that_the_matrix_exponential_gives(
    method: str,
) -> None:
    a, time = stable_matrix(), 1.0
    y0 = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64, requires_grad=True)
    stepper = steppers.get(method)
    if isinstance(stepper, sa.ExplicitAdams | sa.ImplicitAdams):
        stepper = dataclasses.replace(stepper, max_order=4)  # stable at these steps
    controller, tolerance = pacing(stepper, 0.02)
    tolerance *= 2e-4 if method == "fehlberg2" else 0.02
    check = sa.check_gradient(
        linear,
        y0,
        [0.0, time],
        args=(a,),
        method=stepper,
        controller=controller,
        rtol=tolerance,
        atol=tolerance,
        loss=last,
    )
    sol = sa.solve(
        linear,
        y0,
        [0.0, time],
        args=(a,),
        method=stepper,
        controller=controller,
        rtol=tolerance,
        atol=tolerance,
    )
    got = dict(zip(["y0", "args[0]"], torch.autograd.grad(last(sol.y), [y0, a]), strict=True))
    wanted = known_gradients(a, y0, torch.tensor(time, dtype=torch.float64))
    assert check.discretisation is not None
    assert check.solution is not None
    assert check.verdict == "exact, resolved", str(check)
    for name, error in check.discretisation.inputs.items():
        assert error == pytest.approx(problems.relative_error(got[name], wanted[name]), rel=0.1)
    truth = torch.linalg.matrix_exp(a * time) @ y0
    assert check.solution == pytest.approx(problems.relative_error(sol.y[-1], truth), rel=0.1)


def test_the_rate_at_which_errors_fall_is_that_of_the_method() -> None:
    check = sa.check_gradient(
        problems.known().func,
        torch.tensor([0.7, -0.2], dtype=torch.float64),
        [0.3, 2.3],
        method="rk4",
        controller=sa.FixedGrid(step_size=0.05),
    )
    assert check.rate == pytest.approx(16.0, rel=0.1)


@pytest.mark.parametrize("strategy", EXACT, ids=label)
def test_every_exact_strategy_is_found_exact(strategy: Strategy) -> None:
    case = problems.case(tree=True, times=(0.3, 0.1, -0.9), wants_time=True)
    tolerance = 1e-6 if strategy.method is None else 1e-4
    check = sa.check_gradient(
        case.func,
        case.y0,
        case.t,
        args=case.args,
        gradient=strategy,
        rtol=tolerance,
        atol=tolerance,
    )
    assert check.exact
    assert check.total < 1e-13
    names = {"y0[0]", "y0[1]", "y0[2]", "t", "args[0]", "func.rate"}
    assert names < check.errors.keys()
    assert check.reliable
    assert check.discretisation is not None
    assert 1e-7 < check.discretisation.total < 1e-3


def test_the_continuous_adjoint_is_found_inexact_by_as_much_as_it_is() -> None:
    case = problems.case(times=(0.0, 1.2))
    options = {"rtol": 1e-4, "atol": 1e-4, "method": "dopri5", "gradient": "continuous"}
    check = sa.check_gradient(case.func, case.y0, case.t, args=case.args, **options)
    sol = case.solve(**options)
    loss = functools.partial(_linear_loss, shape=sol.y[1:].shape)
    got = torch.autograd.grad(loss(sol.y), case.y0)[0]
    nodes = reference.adaptive_nodes(sol.steps, list(case.t))
    y = reference.frozen(steppers.get("dopri5"), case.func, case.y0, nodes, list(case.t), case.args)
    discrete = torch.autograd.grad(loss(y), case.y0)[0]
    fine = case.solve(rtol=1e-12, atol=1e-12)
    true = torch.autograd.grad(loss(fine.y), case.y0)[0]
    assert not check.exact
    assert check.verdict.startswith("inexact")
    assert check.errors["y0"] == pytest.approx(problems.relative_error(got, discrete), rel=1e-6)
    assert check.distance is not None
    assert check.discretisation is not None
    assert check.distance.inputs["y0"] == pytest.approx(
        problems.relative_error(got, true), rel=0.05
    )
    assert check.discretisation.inputs["y0"] == pytest.approx(
        problems.relative_error(discrete, true), rel=0.05
    )
    assert f"{check.distance.total:.0e} away" in str(check)


def _linear_loss(y: Tensor, shape: torch.Size) -> Tensor:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (weights * y[1:]).sum()


def test_mali_is_checked_with_its_own_method() -> None:
    case = problems.case(times=(0.0, 0.5, 1.2))
    check = sa.check_gradient(
        case.func, case.y0, case.t, args=case.args, gradient="mali", rtol=1e-3, atol=1e-3
    )
    assert check.verdict == "exact, resolved"


# The verdict on the steps --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_a_derivative_that_the_solution_does_not_show_is_warned_of(method: str) -> None:
    func, y0 = Hidden(speed=10.0), Hidden.start()
    tolerance = 1e-6
    with pytest.warns(sa.UnderResolvedWarning, match="SensitivityControl"):
        check = sa.check_gradient(
            func, y0, [0.0, 2.0], method=method, rtol=tolerance, atol=tolerance, loss=last
        )
    assert check.under_resolved
    assert check.verdict == "exact, under-resolved"
    assert "under-resolved" in str(check)
    sol = sa.solve(func, y0, [0.0, 2.0], method=method, rtol=tolerance, atol=tolerance)
    assert abs(sol.y[-1, 0].item() - math.exp(-2.0)) < 1e-5
    (grad,) = torch.autograd.grad(last(sol.y), y0)
    assert problems.relative_error(grad, true_gradient(func, 2.0)) > 1e-3


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_networks_whose_solution_moves_like_its_derivatives_are_not_warned_of(
    seed: int, dtype: torch.dtype, tolerance: float
) -> None:
    net = problems.Net(dim=4, hidden=16, seed=seed, dtype=dtype)
    y0 = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    check = sa.check_gradient(net, y0, [0.0, 0.5, 2.0], rtol=tolerance, atol=tolerance)
    assert not check.under_resolved
    assert check.reliable
    assert check.exact


def test_the_rtol_that_is_advised_resolves_the_gradient() -> None:
    func, y0 = Hidden(speed=5.0), Hidden.start()
    tolerance = 1e-4
    with pytest.warns(sa.UnderResolvedWarning, match="tighten rtol to about") as caught:
        sa.check_gradient(func, y0, [0.0, 1.0], rtol=tolerance, atol=tolerance, loss=last)
    message = str(caught[0].message)
    advised = float(message.split("rtol to about ")[1].split(",")[0])
    assert error_of(sa.Adaptive(), tolerance, 5.0) > 1e3 * tolerance
    assert error_of(sa.Adaptive(), advised, 5.0) < 30 * tolerance


def test_on_a_fixed_grid_shorter_steps_are_advised() -> None:
    func, y0 = Hidden(speed=10.0), Hidden.start()
    grid = sa.FixedGrid(step_size=0.05)
    with pytest.warns(sa.UnderResolvedWarning, match="take steps about") as caught:
        sa.check_gradient(func, y0, [0.0, 0.5], method="rk4", controller=grid, loss=last)
    times = int(str(caught[0].message).split("steps about ")[1].split()[0])
    finer = sa.FixedGrid(step_size=0.05 / times)
    check = sa.check_gradient(func, y0, [0.0, 0.5], method="rk4", controller=finer, loss=last)
    assert not check.under_resolved


def test_an_estimate_on_steps_too_long_for_convergence_is_called_unreliable() -> None:
    wild = nn.Parameter(torch.tensor(300.0, dtype=torch.float64))

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(wild * t) * torch.cos(wild * y)

    check = sa.check_gradient(
        func,
        torch.tensor([0.3], dtype=torch.float64),
        [0.0, 1.0],
        method="rk4",
        controller=sa.FixedGrid(step_size=0.25),
    )
    assert not check.reliable
    assert "does not show convergence" in str(check)


def test_without_the_estimate_nothing_is_said_of_the_steps() -> None:
    case = problems.case()
    check = sa.check_gradient(
        case.func, case.y0, case.t, args=case.args, discretisation=False, rtol=1e-3
    )
    assert check.verdict == "exact, unknown"
    assert check.discretisation is None
    assert check.distance is None
    assert not check.under_resolved
    assert "not judged" in str(check)


# Precision -----------------------------------------------------------------------------------


def closure(dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function with tensors in a closure, a list and a module, some of them constants."""
    draw = torch.Generator().manual_seed(2)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    weight, mix = tensor(3, 3).requires_grad_(), [tensor(3, 3)]
    layer = nn.Linear(3, 3, dtype=dtype)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(layer(y) @ weight @ mix[0])

    return func, [weight, mix[0], layer.weight, layer.bias]


def test_a_closure_is_checked_in_float64_and_left_as_it_was() -> None:
    func, tensors = closure(torch.float32)
    before = [x.clone() for x in tensors]
    y0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    check = sa.check_gradient(func, y0, [0.0, 1.0], rtol=1e-5, atol=1e-5)
    assert check.reference is torch.float64
    assert check.dtype is torch.float32
    assert check.verdict == "rounding, resolved"
    assert 1e-9 < check.total < 1e-5
    assert "rounding of float32" in str(check)
    for x, y in zip(tensors, before, strict=True):
        assert x.dtype is torch.float32
        assert torch.equal(x, y)
    assert func(torch.tensor(0.0), y0).dtype is torch.float32


def test_a_closure_has_the_reference_of_the_same_module() -> None:
    net = problems.Net(dtype=torch.float32)
    y0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    module = sa.check_gradient(net, y0, [0.0, 1.0], rtol=1e-5, atol=1e-5)
    wrapped = sa.check_gradient(lambda t, y: net(t, y), y0, [0.0, 1.0], rtol=1e-5, atol=1e-5)
    assert list(wrapped.errors.values()) == list(module.errors.values())


def test_where_rounding_dominates_tighter_tolerances_are_said_to_gain_nothing() -> None:
    net = problems.Net(dtype=torch.float32)
    check = sa.check_gradient(net, torch.randn(2, 3), [0.0, 1.0], rtol=1e-9, atol=1e-9)
    assert check.discretisation is not None
    assert check.discretisation.total < check.total
    assert "tighter tolerances gain nothing" in str(check)


def test_a_function_that_makes_single_precision_tensors_is_checked_in_that() -> None:
    weight = torch.eye(3).requires_grad_()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ weight @ torch.full((3, 3), 0.3, dtype=torch.float32))

    check = sa.check_gradient(func, torch.ones(2, 3), [0.0, 1.0], rtol=1e-4, atol=1e-4)
    assert check.reference is torch.float32
    assert check.exact
    assert not check.under_resolved


def test_a_tensor_that_only_its_use_reveals_is_checked_as_well() -> None:
    class Box:
        __slots__ = ("weight",)

    box = Box()
    box.weight = torch.tensor(0.7, requires_grad=True)  # type: ignore[attr-defined]

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(box.weight * y)  # type: ignore[attr-defined]

    check = sa.check_gradient(func, torch.ones(2), [0.0, 1.0], rtol=1e-4, atol=1e-4)
    assert set(check.errors) == {"y0", "found[0]"}
    assert check.exact


def test_complex_states_are_checked_in_double_precision() -> None:
    rate = torch.tensor(-0.5 + 2.0j, dtype=torch.complex64, requires_grad=True)
    y0 = torch.tensor([1.0 + 1.0j], dtype=torch.complex64)
    check = sa.check_gradient(lambda t, y: rate * y, y0, [0.0, 1.0], rtol=1e-5, atol=1e-5)
    assert check.reference is torch.complex128
    assert check.verdict == "rounding, resolved"


def test_under_autocast_the_reference_is_not_rounded() -> None:
    net = problems.Net(dtype=torch.float32)
    y0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check = sa.check_gradient(net, y0, [0.0, 1.0], rtol=1e-2, atol=1e-2)
    full = sa.check_gradient(net, y0, [0.0, 1.0], rtol=1e-2, atol=1e-2)
    assert check.reference is torch.float64
    assert check.verdict.startswith("rounding")
    assert check.total > 1e-4 > 100 * full.total


def test_a_random_function_is_checked_with_the_numbers_it_drew() -> None:
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)).double()
    y0 = torch.randn(4, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    check = sa.check_gradient(lambda t, y: net(y), y0, [0.0, 1.0], rtol=1e-2, atol=1e-2)
    assert torch.equal(torch.get_rng_state(), state)
    assert check.verdict == "exact, unknown"
    assert check.total < 1e-13


def test_a_function_whose_state_changes_between_passes_is_found_inexact() -> None:
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    noise = random.Random(0)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(weight * y) * (1 + 0.1 * noise.random())

    check = sa.check_gradient(
        func,
        torch.ones(2, dtype=torch.float64),
        [0.0, 1.0],
        method="rk4",
        controller=sa.FixedGrid(step_size=0.1),
        discretisation=False,
    )
    assert not check.exact
    assert check.total > 1e-4


# SensitivityControl --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTIVE)
def test_with_the_sensitivities_controlled_the_gradient_converges_with_the_tolerance(
    method: str,
) -> None:
    tolerances = (1e-3, 1e-4) if steppers.get(method).order < 5 else (1e-4, 1e-7)
    # The estimate of fehlberg2 is the distance to Euler's method divided by 512.
    factor = 2000 if method == "fehlberg2" else 30
    careful = [error_of(sa.SensitivityControl(), tol, 5.0, method=method) for tol in tolerances]
    for error, tolerance in zip(careful, tolerances, strict=True):
        assert error < factor * tolerance
    ratio = tolerances[0] / tolerances[1]
    assert ratio / 4 < careful[0] / careful[1] < ratio * 4
    assert error_of(sa.Adaptive(), tolerances[1], 5.0, method=method) > 10 * careful[1]


def test_the_choice_of_steps_does_not_change_what_the_gradient_is() -> None:
    case = problems.case(tree=True, times=(0.1, 0.4, 1.3), wants_time=True)
    sol = case.solve(
        rtol=1e-4,
        atol=1e-4,
        controller=sa.SensitivityControl(directions=2),
    )
    nodes = reference.adaptive_nodes(sol.steps, list(case.t))
    y = reference.frozen(steppers.get("dopri5"), case.func, case.y0, nodes, list(case.t), case.args)
    error, name = problems.worst(case.gradients(sol.y), case.gradients(y))
    assert error < 1e-12, name


@pytest.mark.parametrize("strategy", strategies(exact=True) + strategies(exact=False), ids=label)
def test_every_strategy_takes_the_same_steps_under_sensitivity_control(strategy: Strategy) -> None:
    func, y0 = Hidden(), Hidden.start()
    method = strategy.method or "bosh3"
    options: dict[str, Any] = {"method": method, "controller": sa.SensitivityControl()}
    options |= {"rtol": 1e-3, "atol": 1e-3}
    sol = sa.solve(func, y0, [0.0, 1.0], gradient=strategy, **options)
    with torch.no_grad():
        quiet = sa.solve(func, y0, [0.0, 1.0], **options)
    assert torch.equal(sol.steps, quiet.steps)
    grads = torch.autograd.grad(last(sol.y), [y0, func.rate])
    assert problems.relative_error(grads[0], true_gradient(func, 1.0)) < 0.3
    assert all(not x.grad_fn and x.grad is None for x in func.parameters())


def begun(
    controller: sa.SensitivityControl,
    func: Callable[..., Tensor],
    y0: Tensor,
    inputs: dict[str, Tensor],
    step_size: float,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The augmented state after one step, and the directions of its derivatives."""
    stepper = steppers.get("dopri5")
    field = GraphField(func, y0)
    setting = Setting(1.0, 1.0, 1e-4, 1e-4, inputs=list(inputs.items()))
    pace: Any = controller.begin(field, stepper, stepper.begin(0.0, y0.detach()), setting)
    attempt = stepper.step(pace.tangents, pace.state, step_size)
    directions = [
        {name: d for name, d in zip(inputs, parts, strict=True) if d is not None}
        for _, parts in controller._directions(setting.inputs, y0)
    ]
    return attempt.y1, directions


def moved_step(field: Field, y0: Tensor, step_size: float) -> Tensor:
    stepper = steppers.get("dopri5")
    y: Tensor = stepper.step(field, stepper.begin(0.0, y0), step_size).y1.detach()
    return y


def test_the_derivatives_are_those_of_the_step() -> None:
    """Against central differences of a step from moved inputs."""
    case = problems.case()
    inputs = {"y0": case.y0, **{f"func.{k}": x for k, x in case.params.items()}}
    inputs["args[0]"] = case.args[0]
    controller = sa.SensitivityControl(inputs=["y0", "func", "args[0]", "func.outer"])
    got, directions = begun(
        controller, lambda t, y: case.func(t, y, *case.args), case.y0, inputs, 0.3
    )
    assert [set(d) for d in directions] == [
        {"y0"},
        {f"func.{k}" for k in case.params},
        {"args[0]"},
        {"func.outer"},
    ]
    for row, direction in enumerate(directions, start=1):
        ends = []
        for move in (1e-6, -1e-6):
            at = {k: x.detach() + move * direction.get(k, 0.0) for k, x in inputs.items()}
            params = {k: at[f"func.{k}"] for k in case.params}
            field = GraphField(
                functools.partial(_called, case.func, params, at["args[0]"]), case.y0
            )
            ends.append(moved_step(field, at["y0"], 0.3))
        assert problems.relative_error(got[row], (ends[0] - ends[1]) / 2e-6) < 1e-8


def _called(module: Any, params: dict[str, Tensor], gain: Tensor, t: Tensor, y: Tensor) -> Any:
    return torch.func.functional_call(module, params, (t, y, gain))


def test_derivatives_of_complex_states_need_no_holomorphic_function() -> None:
    rate = torch.tensor(0.3 - 1.1j, dtype=torch.complex128, requires_grad=True)
    y0 = torch.tensor([1.0 + 0.5j, -0.2j], dtype=torch.complex128)
    inputs = {"y0": y0, "rate": rate}

    def func(t: Tensor, y: Tensor, rate: Tensor = rate) -> Tensor:
        return rate * y.conj() * y + rate.conj() * y

    got, directions = begun(sa.SensitivityControl(), func, y0, inputs, 0.2)
    for row, direction in enumerate(directions, start=1):
        ends = []
        for move in (1e-6, -1e-6):
            at = {k: x.detach() + move * direction.get(k, 0.0) for k, x in inputs.items()}
            ends.append(
                moved_step(GraphField(functools.partial(func, rate=at["rate"]), y0), at["y0"], 0.2)
            )
        assert problems.relative_error(got[row], (ends[0] - ends[1]) / 2e-6) < 1e-8


def test_the_entries_of_a_direction_are_as_large_as_those_of_the_tensor() -> None:
    x = torch.tensor([3.0, -4.0])
    controller = sa.SensitivityControl(inputs=["a", "b"])
    (_, (first, none)), (_, (_, second)) = controller._directions(
        [("a", x), ("b", torch.zeros(2))], x
    )
    assert none is None
    assert first is not None
    assert second is not None
    assert first.abs().tolist() == pytest.approx([12.5**0.5] * 2)
    assert second.abs().tolist() == [1.0, 1.0]


def test_only_the_inputs_that_are_named_are_watched() -> None:
    """The derivative with respect to the rate is as smooth as the solution."""
    func, y0 = Hidden(), Hidden.start()

    def steps(**options: Any) -> int:
        controller = sa.SensitivityControl(**options)
        sol = sa.solve(func, y0, [0.0, 1.0], rtol=1e-5, atol=1e-5, controller=controller)
        return sol.stats.accepted

    plain = sa.solve(func, y0, [0.0, 1.0], rtol=1e-5, atol=1e-5).stats.accepted
    assert steps(inputs=["func.rate"]) <= plain + 2
    assert steps(inputs=["y0"]) > 5 * plain
    assert steps(inputs=["func.rate", "y0"]) == steps(inputs=["y0"])
    loose = steps(sensitivity_rtol=1e-2, sensitivity_atol=1e-2)
    assert plain < loose < steps() / 2


def test_nothing_is_watched_where_nothing_requires_grad() -> None:
    func, y0 = Hidden().requires_grad_(False), Hidden.start().detach()
    plain = sa.solve(func, y0, [0.0, 1.0])
    watched = sa.solve(func, y0, [0.0, 1.0], controller=sa.SensitivityControl())
    assert torch.equal(plain.steps, watched.steps)
    assert watched.stats == plain.stats


def test_what_sensitivities_cost_is_counted() -> None:
    func, y0, calls = Hidden(), Hidden.start(), []

    def counted(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        return func(t, y)

    sol = sa.solve(
        counted, y0, [0.0, 1.0], rtol=1e-4, atol=1e-4, controller=sa.SensitivityControl()
    )
    assert sol.stats.evaluations == len(calls)
    attempts = sol.stats.accepted + sol.stats.rejected
    # Two for each stage of an attempt; the node at the start, and two to choose the first step.
    assert abs(len(calls) - 12 * attempts) <= 2 + sol.stats.rejected


@pytest.mark.parametrize("first_step", [None, 0.1])
@pytest.mark.parametrize("method", ["bosh3", "adaptive_heun", "alf"])
def test_a_random_function_takes_the_same_steps_under_every_strategy(
    method: str, first_step: float | None
) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).double()
    y0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(strategy: str) -> tuple[sa.Solution, Tensor]:
        torch.manual_seed(3)
        sol = sa.solve(
            lambda t, y: net(y),
            y0,
            [0.0, 1.0],
            rtol=0.1,
            atol=0.1,
            method=method,
            gradient=strategy,
            controller=sa.SensitivityControl(first_step=first_step, min_step=0.05),
        )
        return sol, torch.rand(1)

    def grads(sol: sa.Solution) -> Any:
        return torch.autograd.grad(sol.y[-1].square().sum(), [y0, *net.parameters()])

    sol, drawn = run("symplectic")
    plain, plain_drawn = run("backprop")
    with torch.no_grad():
        quiet, quiet_drawn = run("symplectic")
    assert torch.equal(sol.steps, plain.steps)
    assert torch.equal(sol.steps, quiet.steps)
    assert torch.equal(drawn, plain_drawn)
    assert torch.equal(drawn, quiet_drawn)
    for got, right in zip(grads(sol), grads(plain), strict=True):
        assert problems.relative_error(got, right) < 1e-12


def test_derivatives_begin_anew_where_the_solution_does() -> None:
    """Where ``f`` jumps, a step begins with a new evaluation in place of the last one's."""
    stepper = steppers.get("dopri5")
    y0 = torch.ones(2, dtype=torch.float64)
    after: list[float] = []
    field = GraphField(lambda t, y: -3.0 * y if after else torch.sin(y), y0)
    state = stepper.begin(0.0, y0)
    setting = Setting(1.0, 1.0, 0.1, 0.1, inputs=[("y0", y0)])
    pace: Any = sa.SensitivityControl().begin(field, stepper, state, setting)
    step = stepper.step(field, state, 0.1)
    assert pace.accepts(field, stepper, step, 0.0, 0.1)
    assert torch.equal(pace.state.y[0], step.y1)
    after.append(0.1)
    anew = stepper.step(field, stepper.begin(0.1, step.y1), 0.2)
    before = pace.state.y[1]
    assert pace.accepts(field, stepper, anew, 0.1, 0.2)
    assert torch.equal(pace.state.y[0], anew.y1)
    assert torch.allclose(pace.state.y[1], before * math.exp(-0.3), rtol=1e-6)


def test_a_derivative_that_is_not_finite_is_named() -> None:
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[0], y[1].abs().sqrt()])

    with pytest.raises(sa.NonFiniteError, match=r"the derivative of y0, component 1"):
        sa.solve(func, y0, [0.0, 1.0], controller=sa.SensitivityControl())


def test_wrong_options_are_named() -> None:
    y0 = torch.ones(1, requires_grad=True)
    with pytest.raises(sa.UnknownNameError, match="did you mean 'y0'"):
        sa.solve(torch.sin, y0, [0.0, 1.0], controller=sa.SensitivityControl(inputs=["y"]))
    with pytest.raises(sa.ArgumentError, match="directions = 0"):
        sa.SensitivityControl(directions=0)
    with pytest.raises(sa.ArgumentError, match="sequence of names"):
        sa.SensitivityControl(inputs="y0")
    assert isinstance(sa.SensitivityControl.pi(directions=3), sa.SensitivityControl)


@pytest.mark.parametrize(
    ("method", "controller"),
    [
        ("dopri5", sa.Adaptive(jump_t=[0.5])),
        ("dopri5", sa.SensitivityControl(jump_t=[0.5])),
        ("rk4", sa.FixedGrid(step_size=0.05, perturb=True)),
    ],
    ids=["jump_t", "jump_t under control of the sensitivities", "perturbed grid"],
)
def test_a_jump_is_seen_from_both_sides_by_the_references_too(method: str, controller: Any) -> None:
    """y' = 2 - y before t = 0.5 and -y after it."""

    def heater(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.5, 2.0 - y, -y)

    y0 = torch.zeros(1, dtype=torch.float64)
    check = sa.check_gradient(heater, y0, [0.0, 1.0], method=method, controller=controller)
    assert check.verdict == "exact, resolved"
    assert check.solution is not None
    assert check.solution < 1e-6
