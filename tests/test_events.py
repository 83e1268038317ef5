"""Events: found where the sign changes, to rounding, once, and never by mistake."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import symplectic_adjoint as sa
from symplectic_adjoint import api, steppers
from symplectic_adjoint.events import bracketed_root
from symplectic_adjoint.loop import SolveShape

PI = math.pi


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one(t: Tensor, y: Any) -> Tensor:
    return torch.ones_like(y)


def rotate(t: Tensor, y: Tensor) -> Tensor:
    """(cos t, sin t) from (1, 0)."""
    return torch.stack([-y[1], y[0]])


def found(sol: sa.Solution) -> sa.Crossing:
    assert sol.status is sa.Status.EVENT
    assert sol.event is not None
    return sol.event


# Bouncing ball -----------------------------------------------------------------------------------


def bounces(
    gravity: Tensor, restitution: Tensor, height: Tensor, speed: Tensor, count: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """The time of the last bounce and the upward speed after it."""

    def fall(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -gravity])

    t, y = torch.zeros((), dtype=torch.float64), torch.stack([height, speed])
    for _ in range(count):
        times = torch.stack([t, torch.full_like(t, 100.0)])
        bounce = found(sa.solve(fall, y, times, event=lambda t, y: y[0], **options))
        t, y = bounce.t, torch.stack([bounce.y[0], -restitution * bounce.y[1]])
    return t, y[1]


def bounces_exactly(
    gravity: Tensor, restitution: Tensor, height: Tensor, speed: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    impact = (speed.square() + 2 * gravity * height).sqrt()
    t, up = (speed + impact) / gravity, restitution * impact
    for _ in range(count - 1):
        t, up = t + 2 * up / gravity, restitution * up
    return t, up


@pytest.mark.parametrize("gradient", ["symplectic", "backprop"])
def test_ten_bounces_of_a_ball_and_their_gradient_are_those_of_the_formula(gradient: str) -> None:
    inputs = [x.requires_grad_() for x in f64(9.81, 0.8, 10.0, 0.3)]
    got = bounces(*inputs, 10, gradient=gradient)
    wanted = bounces_exactly(*inputs, 10)
    for a, b in zip(got, wanted, strict=True):
        assert abs(a / b - 1).item() < 1e-13
        grads = [torch.autograd.grad(x, inputs, retain_graph=True) for x in (a, b)]
        for x, y in zip(*grads, strict=True):
            # Ten bounces amplify rounding, in backpropagation as well.
            assert abs(x / y - 1).item() < 1e-11


def test_a_ball_in_float32_bounces_too() -> None:
    inputs = torch.tensor([9.81, 0.8, 10.0, 0.3]).requires_grad_().unbind()
    got = bounces(*inputs, 10)
    wanted = bounces_exactly(*(x.detach().double() for x in inputs), 10)
    assert got[0].dtype is torch.float64
    assert got[1].dtype is torch.float32
    assert abs(got[0] / wanted[0] - 1).item() < 1e-5
    assert abs(got[1] / wanted[1] - 1).item() < 1e-5


# What is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "end", "time"),
    [(0, 9.0, PI / 2), (-1, 9.0, PI / 2), (1, 9.0, 1.5 * PI), (1, -9.0, -1.5 * PI)],
)
def test_only_changes_in_the_direction_asked_for_count(
    direction: int, end: float, time: float
) -> None:
    event = sa.Event(lambda t, y: y[0], direction=direction)
    sol = sa.solve(rotate, f64(1, 0), [0.0, end], rtol=1e-12, atol=1e-12, event=event)
    assert abs(found(sol).t.item() - time) < 1e-10
    assert abs(found(sol).y[0].item()) < 1e-14


def test_output_times_before_the_event_are_reached_and_those_after_it_are_not() -> None:
    t = f64(0.0, 1.0, 1.5, 1.6, 2.0, 9.0)
    sol = sa.solve(rotate, f64(1, 0), t, event=lambda t, y: y[0])
    assert torch.equal(sol.t, t[:3])
    assert sol.y.shape == (3, 2)
    assert torch.allclose(sol.y[:, 0], sol.t.cos(), atol=1e-6)
    assert sol.steps[-2] < PI / 2 < sol.steps[-1]


def test_a_horizon_without_an_event_gives_the_whole_solution_and_says_so() -> None:
    t = f64(0.0, 0.5, 1.0)
    sol = sa.solve(rotate, f64(1, 0), t, event=lambda t, y: y[0])
    assert sol.event is None
    assert sol.status is sa.Status.SUCCESS
    assert torch.equal(sol.t, t)
    assert torch.equal(sol.y, sa.solve(rotate, f64(1, 0), t).y)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_of_several_events_within_a_step_wins(sign: float) -> None:
    levels = sign * f64(0.7, 0.3, 0.5)

    def solve(event: Any) -> sa.Crossing:
        sol = sa.solve(one, f64(0)[0], [0.0, sign], method="rk4", event=event)
        assert sol.stats.accepted == 1
        return found(sol)

    several = solve([lambda t, y, level=level: y - level for level in levels])
    assert (several.index, several.component) == (1, 0)
    assert abs(several.t.item() - sign * 0.3) < 1e-15
    vector = solve(lambda t, y: (levels - y).reshape(3, 1))
    assert (vector.index, vector.component) == (0, 1)
    assert abs(vector.t.item() - sign * 0.3) < 1e-15


@pytest.mark.parametrize("wants_time", [False, True])
def test_an_event_exactly_at_the_end_of_a_step_is_found_there(wants_time: bool) -> None:
    t = f64(0.0, 0.25, 0.5, 1.0).requires_grad_(wants_time)
    y0 = f64(0)[0].requires_grad_()
    sol = sa.solve(one, y0, t, method="euler", event=lambda t, y: y - 0.5)
    assert found(sol).t.item() == 0.5
    assert sol.steps.tolist() == [0.0, 0.25, 0.5]
    assert sol.y.tolist() == [0.0, 0.25, 0.5]
    inputs = [y0, t] if wants_time else [y0]
    grads = torch.autograd.grad(found(sol).t, inputs)
    assert grads[0].item() == -1.0
    if wants_time:  # the event does not move with the step that ends there
        assert grads[1].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_an_event_exactly_at_the_last_time_is_an_event() -> None:
    sol = sa.solve(one, f64(0)[0], [0.0, 0.5, 1.0], method="euler", event=lambda t, y: y - 1.0)
    assert found(sol).t.item() == 1.0
    assert sol.y.tolist() == [0.0, 0.5, 1.0]


def test_a_zero_that_is_touched_in_the_other_direction_is_none() -> None:
    event = sa.Event(lambda t, y: 0.5 - y, direction=1)
    sol = sa.solve(one, f64(0)[0], [0.0, 0.25, 0.5, 1.0], method="euler", event=event)
    assert sol.event is None


def test_samples_find_changes_that_undo_each_other_within_a_step() -> None:
    def solve(samples: int) -> sa.Solution:
        event = sa.Event(lambda t, y: (y - 0.4) * (y - 0.6), samples=samples)
        return sa.solve(one, f64(0)[0], [0.0, 1.0], method="rk4", event=event)

    assert solve(0).event is None
    assert abs(found(solve(1)).t.item() - 0.4) < 1e-15
    assert abs(found(solve(4)).t.item() - 0.4) < 1e-15


def test_a_steep_event_is_located_to_the_resolution_of_time() -> None:
    sol = sa.solve(
        one, f64(0)[0], [0.0, 1.0], method="rk4", event=lambda t, y: torch.tanh(1e9 * (y - 0.3))
    )
    assert abs(found(sol).t.item() - 0.3) < 1e-15


def test_an_event_of_a_stiff_solution_is_located_to_the_resolution_of_time() -> None:
    """Relaxation at rate 1000 onto cos t: the level is crossed in the transient."""
    event = lambda t, y: y - 0.5  # noqa: E731
    stiff = lambda t, y: -1000.0 * (y - torch.cos(t))  # noqa: E731
    crossing = found(sa.solve(stiff, f64(0)[0], [0.0, 1.0], rtol=1e-11, atol=1e-13, event=event))
    # y = (1e6 cos t + 1e3 sin t - 1e6 exp(-1e3 t)) / (1e6 + 1), solved for 1/2 by Newton.
    t = math.log(2) / 1000
    for _ in range(5):
        y = (1e6 * math.cos(t) + 1e3 * math.sin(t) - 1e6 * math.exp(-1e3 * t)) / (1e6 + 1)
        t -= (y - 0.5) / (1e3 * math.exp(-1e3 * t))
    assert abs(crossing.t.item() / t - 1) < 1e-10
    assert abs(crossing.y.item() - 0.5) < 1e-14


def test_an_event_function_sees_the_state_as_func_does_with_its_args() -> None:
    y0 = {"a": torch.zeros(2), "b": (torch.zeros(()),)}
    rate = torch.tensor(2.0, requires_grad=True)

    def func(t: Tensor, y: Any, rate: Tensor) -> Any:
        return {"a": rate.expand(2), "b": (rate / 2,)}

    def event(t: Tensor, y: Any, rate: Tensor) -> Tensor:
        return y["a"].sum() + y["b"][0] + rate - 7.0

    crossing = found(sa.solve(func, y0, [0.0, 3.0], args=(rate,), event=event))
    assert crossing.t.item() == pytest.approx(1.0, rel=1e-6)
    assert crossing.y["a"].shape == (2,)
    assert crossing.y["b"][0].item() == pytest.approx(1.0, rel=1e-6)
    # 5/2 rate t + rate = 7
    assert torch.autograd.grad(crossing.t, rate)[0].item() == pytest.approx(-0.7, rel=1e-6)


def test_locating_an_event_evaluates_func_no_more_than_its_dense_output_does() -> None:
    for method in ("bosh3", "dopri5", "dopri8", "vern7"):
        sol = sa.solve(rotate, f64(1, 0), [0.0, 9.0], method=method, event=lambda t, y: y[0])
        shape = SolveShape(
            accepted=sol.stats.accepted,
            rejected=sol.stats.rejected,
            dense=1,
            dense_ends=True,
            adaptive=True,
            selected=True,
        )
        assert sol.stats.evaluations == shape.evaluations(steppers.get(method).work), method


# Starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 1e-15, -1e-15])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_an_event_that_is_zero_at_the_start_does_not_occur_there(method: str, start: float) -> None:
    """A parabola thrown upwards from the ground, in one step: it must be seen to come down."""

    def thrown(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -2 * torch.ones_like(y[1])])

    controller = sa.FixedGrid() if method == "rk4" else sa.Adaptive(first_step=5.0)
    sol = sa.solve(
        thrown,
        f64(start, 1.0),
        [0.0, 5.0],
        method=method,
        controller=controller,
        event=lambda t, y: y[0],
    )
    assert abs(found(sol).t.item() - 1.0) < 1e-13
    assert sol.stats.accepted == 1


def test_a_solve_that_starts_at_rest_on_an_event_never_meets_it() -> None:
    sol = sa.solve(lambda t, y: 0 * y, f64(0.0), [0.0, 1.0], event=lambda t, y: y)
    assert sol.event is None


def test_an_event_of_time_alone_does_not_occur_again_where_it_ended_the_last_solve() -> None:
    times, t, y = [], f64(0.0), f64(1, 0)
    for _ in range(4):
        sol = sa.solve(
            rotate, y, torch.cat([t, f64(9.0)]), event=lambda t, y: torch.sin(PI * t / 1.7)
        )
        t, y = found(sol).t.reshape(1), found(sol).y
        times.append(t.item())
    assert times == pytest.approx([1.7, 3.4, 5.1, 6.8], rel=1e-14)


# Without a horizon -----------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_an_event_may_end_a_solve_that_has_no_end(method: str, sign: float) -> None:
    controller = sa.FixedGrid(step_size=0.1) if method == "rk4" else None
    event = lambda t, y: y[0]  # noqa: E731
    t = f64(0.0, sign * math.inf)
    sol = sa.solve(rotate, f64(1, 0), t, method=method, controller=controller, event=event)
    assert found(sol).t.item() == pytest.approx(sign * PI / 2, rel=1e-5)
    assert sol.t.tolist() == [0.0]


def test_an_endless_solve_without_an_event_ends_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    event = lambda t, y: y[0] + 2.0  # noqa: E731
    options = {"controller": sa.Adaptive(max_steps=50), "event": event}
    with pytest.raises(sa.EventNotFoundError, match=r"no event within 50 steps.*max_steps") as info:
        sa.solve(rotate, f64(1, 0), [0.0, math.inf], **options)
    assert info.value.solution.steps[-1] > 1.0
    sol = sa.solve(rotate, f64(1, 0), [0.0, math.inf], throw=False, **options)
    assert sol.status is sa.Status.NO_EVENT
    assert api.EVENT_STEPS == 20_000
    monkeypatch.setattr(api, "EVENT_STEPS", 100)
    with pytest.raises(sa.EventNotFoundError, match="no event within 100 steps"):
        sa.solve(rotate, f64(1, 0), [0.0, math.inf], event=event)
    with pytest.raises(sa.EventNotFoundError, match="no event within 100 steps"):
        sa.solve(one, f64(0), [0.0, math.inf], controller=sa.FixedGrid(step_size=1.0),
                 method="euler", event=lambda t, y: y + 1)  # fmt: skip


def test_what_else_ends_an_endless_solve_is_named() -> None:
    with pytest.raises(sa.StepUnderflowError):
        sa.solve(lambda t, y: y**2, f64(1), [0.0, math.inf], event=lambda t, y: y + 1)
    with pytest.raises(sa.ArgumentError, match="needs steps of a known size"):
        sa.solve(one, f64(0), [0.0, math.inf], method="rk4", event=lambda t, y: y - 1)
    with pytest.raises(sa.ArgumentError, match=r"t\[1\] = inf is not finite"):
        sa.solve(one, f64(0), [0.0, math.inf])


# Bad event functions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (lambda t, y: float(y[0]), r"event 0 \(<lambda>\) must return a tensor.*returned float"),
        (lambda t, y: y[0] > 1, r"returned dtype torch.bool.*e.g. y\[0\] - 1.0 for y\[0\] > 1"),
        (lambda t, y: y.to(torch.int64), "returned dtype torch.int64"),
        (lambda t, y: y + 1j, "returned dtype torch.complex128"),
        (lambda t, y: y[:0], r"shape \(0,\); return one or more real numbers"),
        (lambda t, y: y if t < 0.1 else y[:1], "returned 1 values at t = .* and 2 before"),
    ],
)
def test_an_event_function_without_a_sign_is_refused(event: Any, message: str) -> None:
    with pytest.raises(sa.EventOutputError, match=message):
        sa.solve(rotate, f64(1, 0), [0.0, 1.0], event=event)


def test_an_event_function_that_returns_nan_is_named() -> None:
    def broken(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[0] + 2, (0.5 - t).sqrt() + 1])

    options = {"method": "rk4", "event": [lambda t, y: y[0] + 3, broken]}
    t = f64(0.0, 0.25, 0.5, 0.75, 1.0)
    with pytest.raises(sa.NonFiniteError, match=r"event 1 \(broken\) returned nan in component 1"):
        sa.solve(rotate, f64(1, 0), t, **options)
    sol = sa.solve(rotate, f64(1, 0), t, throw=False, **options)
    assert sol.status is sa.Status.NON_FINITE
    assert torch.equal(sol.t, t[:3])


def test_non_finite_values_of_func_are_blamed_on_func() -> None:
    with pytest.raises(sa.NonFiniteError, match="func returned"):
        sa.solve(
            lambda t, y: (0.5 - t).sqrt() * y,
            f64(1, 0),
            f64(0.0, 0.4, 0.8, 1.2),
            method="rk4",
            event=lambda t, y: y[0] + 9,
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sa.Event(1), "event function 1 is not callable"),  # type: ignore[arg-type]
        (lambda: sa.Event(one, direction=2), r"direction = 2 must be 1 \(rising\), -1"),
        (lambda: sa.Event(one, samples=-1), "samples = -1 must not be negative"),
        (lambda: sa.solve(one, f64(0), [0.0, 1.0], event="y"), "event function 'y' is not"),
    ],
)
def test_unusable_events_are_refused(make: Any, message: str) -> None:
    with pytest.raises(sa.ArgumentError, match=message):
        make()


# Gradients -------------------------------------------------------------------------------------


def test_a_parameter_of_the_event_function_that_no_walk_finds_has_its_gradient() -> None:
    level = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    shelf = [level, *[0.0] * 5000]
    sol = sa.solve(one, f64(0), [0.0, 1.0], event=lambda t, y: y - shelf[0])
    assert torch.autograd.grad(found(sol).t, level)[0].item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_parameter_that_cannot_be_lifted_is_named_as_the_events() -> None:
    linear = torch.nn.Linear(1, 1, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.fill_(-0.5)
    traced = torch.jit.trace(linear, f64(0))
    with pytest.raises(sa.CaptureError, match=r"in event 0 \(<lambda>\): func depends on"):
        sa.solve(one, f64(0), [0.0, 1.0], event=lambda t, y: traced(y))


def test_params_leaves_out_parameters_of_the_event_function_that_are_not_listed() -> None:
    a, b = (x.requires_grad_() for x in (f64(0.3)[0].clone(), f64(0.1)[0].clone()))
    y0 = f64(0).requires_grad_()
    sol = sa.solve(one, y0, [0.0, 1.0], event=lambda t, y: y - a - b, params=[a])
    grads = torch.autograd.grad(found(sol).t, [a, b, y0], allow_unused=True)
    assert grads[0] is not None
    assert grads[0].item() == pytest.approx(1.0)
    assert grads[1] is None
    assert grads[2] is not None
    assert grads[2].item() == pytest.approx(-1.0)


def test_an_event_function_may_differentiate_inside_itself() -> None:
    def event(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.requires_grad_()
            return torch.autograd.grad((y**3).sum(), y, create_graph=True)[0] - 0.75

    y0 = f64(0).requires_grad_()
    crossing = found(sa.solve(one, y0, [0.0, 1.0], event=event))
    assert crossing.t.item() == pytest.approx(0.5, abs=1e-14)
    assert torch.autograd.grad(crossing.t, y0)[0].item() == pytest.approx(-1.0, abs=1e-12)


def test_a_jump_is_an_event_whose_time_has_no_derivative() -> None:
    y0 = f64(0).requires_grad_()
    sol = sa.solve(one, y0, [0.0, 1.0], event=lambda t, y: torch.where(y > 0.4, 1.0, -1.0))
    assert found(sol).t.item() == pytest.approx(0.4, abs=1e-14)
    with pytest.raises(sa.EventGradientError, match=r"at t = 0.4.*slope 0.0 along the solution"):
        torch.autograd.grad(found(sol).t, y0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("carrier", ["state", "event"])
def test_forward_mode_through_an_event_is_refused(mode: Any, carrier: str) -> None:
    with forward_ad.dual_level(), mode():
        dual = forward_ad.make_dual(f64(0.25), f64(1.0))
        y0, level = (dual, f64(0.5)) if carrier == "state" else (f64(0.0), dual)
        with pytest.raises(sa.ArgumentError, match="use reverse mode"):
            sa.solve(one, y0, [0.0, 1.0], event=lambda t, y: y - level)


def test_dense_output_ends_at_the_event() -> None:
    y0 = f64(1, 0).requires_grad_()
    sol = sa.solve(rotate, y0, [0.0, 9.0], event=lambda t, y: y[0], dense=True)
    crossing = found(sol)
    assert torch.allclose(sol.dense(crossing.t), crossing.y, atol=1e-14)
    (ours,) = torch.autograd.grad(crossing.y[1], y0, retain_graph=True)
    assert torch.allclose(torch.autograd.grad(sol.dense(crossing.t)[1], y0)[0], ours, atol=1e-13)
    with pytest.raises(sa.ArgumentError, match="outside the solved interval"):
        sol.dense(crossing.t.detach() + 1e-3)


def test_the_continuous_adjoint_meets_events_to_its_tolerance_and_once_only() -> None:
    def gradients(gradient: str) -> Tensor:
        rate = f64(1.3)[0].clone().requires_grad_()
        crossing = found(
            sa.solve(lambda t, y: rate * rotate(t, y), f64(1, 0), [0.0, 9.0], gradient=gradient,
                     event=lambda t, y: y[0] - 0.2 * t, rtol=1e-9, atol=1e-11)
        )  # fmt: skip
        (grad,) = torch.autograd.grad(crossing.t + crossing.y[1], rate, retain_graph=True)
        if gradient == "continuous":
            with pytest.raises(sa.SecondDerivativeError):
                torch.autograd.grad(crossing.t, rate, create_graph=True)
        return grad

    assert torch.allclose(gradients("continuous"), gradients("symplectic"), rtol=1e-7)


def test_changing_an_event_parameter_in_place_before_the_backward_pass_raises() -> None:
    level = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    sol = sa.solve(one, f64(0), [0.0, 1.0], event=lambda t, y: y - level)
    with torch.no_grad():
        level.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found(sol).t.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_events_are_found_where_no_gradient_is_wanted(mode: Any) -> None:
    level = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with mode():
        sol = sa.solve(one, f64(0), [0.0, 1.0], event=lambda t, y: y - level)
        assert found(sol).t.item() == pytest.approx(0.3)
        assert not found(sol).t.requires_grad
        sol.y.add_(1.0)
        found(sol).y.add_(1.0)


def test_outputs_and_the_event_may_be_changed_in_place() -> None:
    y0 = f64(0).requires_grad_()
    sol = sa.solve(one, y0, [0.0, 0.1, 1.0], event=lambda t, y: y - 0.5)
    sol.y.mul_(2.0)
    end = found(sol).y.mul_(3.0)
    (sol.y.sum() + end.sum() + found(sol).t).backward()
    assert y0.grad is not None
    assert y0.grad.item() == pytest.approx(2 * 2 + 0 - 1)


# The root finder -------------------------------------------------------------------------------


@given(
    a=st.floats(-10, 10),
    width=st.floats(1e-3, 10),
    place=st.floats(0.001, 0.999),
    shape=st.sampled_from([lambda x: x, lambda x: x**3, lambda x: math.expm1(30 * x),
                           lambda x: math.copysign(1.0, x), lambda x: x / (1e-12 + abs(x)) ** 0.7]),
    flip=st.booleans(),
)  # fmt: skip
def test_a_root_is_found_to_rounding_with_few_more_evaluations_than_bisection(
    a: float, width: float, place: float, shape: Any, flip: bool
) -> None:
    b, root, calls = a + width, a + width * place, 0

    def f(x: float) -> float:
        nonlocal calls
        calls += 1
        return shape(x - root)

    ends = (b, f(b), a, f(a)) if flip else (a, f(a), b, f(b))
    got = bracketed_root(f, *ends)
    ulp = math.ulp(max(abs(a), abs(b)))
    assert abs(got - root) <= 3 * ulp
    assert calls <= 2 + math.ceil(math.log2(width / ulp)) + 2


def test_a_smooth_root_takes_few_evaluations() -> None:
    calls = []

    def f(x: float) -> float:
        calls.append(x)
        return math.exp(x) - 2

    assert bracketed_root(f, 0.0, -1.0, 3.0, math.exp(3) - 2) == pytest.approx(math.log(2), 1e-15)
    assert len(calls) <= 12


def test_a_constant_of_an_event_that_is_changed_in_place_before_the_backward_pass_raises() -> None:
    level, y0 = f64(0.5), f64(1.0).requires_grad_()
    sol = sa.solve(lambda t, y: -y, y0, [0.0, 5.0], event=lambda t, y: y * y - level * level)
    assert sol.event is not None
    level.mul_(2.0)
    with pytest.raises(sa.ChangedTensorError):
        sol.event.t.backward()
