"""Adams methods: their weights, what they iterate, what they keep, and their exact gradients."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import symplectic_adjoint as sa
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.memory import peak_memory
from symplectic_adjoint.steppers.multistep import adams_weights, weight_slopes
from tests import problems
from tests.conformance import reference
from tests.conformance.registry import label, strategies
from tests.conformance.test_exactness import assert_close, assert_equal

EXACT = [s for s in strategies(exact=True) if s.method is None and "accumulate" not in label(s)]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


# The weights ---------------------------------------------------------------------------------


BASHFORTH = {
    1: ([1], 1),
    2: ([3, -1], 2),
    3: ([23, -16, 5], 12),
    4: ([55, -59, 37, -9], 24),
    5: ([1901, -2774, 2616, -1274, 251], 720),
    6: ([4277, -7923, 9982, -7298, 2877, -475], 1440),
}
MOULTON = {
    2: ([1, 1], 2),
    3: ([5, 8, -1], 12),
    4: ([9, 19, -5, 1], 24),
    5: ([251, 646, -264, 106, -19], 720),
    6: ([475, 1427, -798, 482, -173, 27], 1440),
}


def equal_times(slopes: int, explicit: bool) -> list[Fraction]:
    """The end of a step and the times of slopes, on a grid of step size 1."""
    return [Fraction(1 - i) for i in range(slopes + explicit)]


@pytest.mark.parametrize("explicit", [True, False], ids=["bashforth", "moulton"])
def test_weights_on_equal_steps_are_those_of_the_textbook(explicit: bool) -> None:
    """Hairer, Norsett, Wanner I, section III.1, tables 1.1 and 1.2."""
    for order, (numerators, denominator) in (BASHFORTH if explicit else MOULTON).items():
        wanted = [Fraction(x, denominator) for x in numerators]
        times = equal_times(order, explicit)
        assert adams_weights(times, explicit) == wanted
        floats = adams_weights([float(t) for t in times], explicit)
        assert floats == pytest.approx(list(map(float, wanted)), rel=4e-16 * order)


rising = st.lists(st.fractions(Fraction(1, 9), 9), min_size=2, max_size=9)


@given(steps=rising, start=st.fractions(-5, 5), explicit=st.booleans())
def test_weights_integrate_every_polynomial_exactly_on_any_grid(
    steps: list[Fraction], start: Fraction, explicit: bool
) -> None:
    times = list(itertools.accumulate((-h for h in steps), initial=start))
    weights = adams_weights(times, explicit)
    for power in range(len(weights)):
        slopes = [t**power for t in times[explicit:]]
        end, begin = (t ** (power + 1) / (power + 1) for t in times[:2])
        assert sum(w * k for w, k in zip(weights, slopes, strict=True)) == end - begin


@pytest.mark.parametrize("explicit", [True, False], ids=["bashforth", "moulton"])
@given(steps=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=12))
def test_weights_in_floats_are_as_good_as_floats_can_be(steps: list[float], explicit: bool) -> None:
    times = list(itertools.accumulate((-h for h in steps), initial=0.3))
    exact = adams_weights([Fraction(t) for t in times], explicit)
    size = float(max(map(abs, exact)))
    got = adams_weights(times, explicit)
    assert got == pytest.approx(list(map(float, exact)), rel=1e-11, abs=1e-14 * size)


@pytest.mark.parametrize("explicit", [True, False], ids=["bashforth", "moulton"])
@given(steps=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=8))
def test_weight_slopes_are_the_derivatives_of_the_weights(
    steps: list[float], explicit: bool
) -> None:
    """By a difference quotient in rational arithmetic, whose error is its step alone."""
    times = [Fraction(t) for t in itertools.accumulate((-h for h in steps), initial=0.3)]
    tiny = Fraction(1, 10**30)
    rows = weight_slopes(tuple(map(float, times)), explicit)
    for i in range(len(times)):
        moved = [t + tiny if i == j else t for j, t in enumerate(times)]
        pairs = zip(adams_weights(moved, explicit), adams_weights(times, explicit), strict=True)
        quotients = [float((b - a) / tiny) for b, a in pairs]
        size = max(map(abs, quotients))
        assert [row[i] for row in rows] == pytest.approx(quotients, rel=1e-9, abs=1e-11 * size)


def test_the_weights_agree_with_torchdiffeq_s_up_to_its_greatest_order() -> None:
    theirs = pytest.importorskip("torchdiffeq._impl.fixed_adams")
    tables = [(theirs._BASHFORTH_DIVISOR[1:], True), (theirs._MOULTON_DIVISOR[2:], False)]
    for table, explicit in tables:
        for weights in table[:12]:
            ours = adams_weights(equal_times(len(weights), explicit), explicit)
            assert list(map(float, ours)) == pytest.approx(weights.tolist(), rel=1e-15)


# The solution --------------------------------------------------------------------------------


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -torch.sin(y[0]) + 0.3 * torch.cos(t)])


@pytest.mark.parametrize("max_order", [4, 6, 12])
@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
def test_on_equal_steps_the_solution_is_torchdiffeq_s(method: str, max_order: int) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    y0 = torch.tensor([1.0, 0.2], dtype=torch.float64)
    t = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)
    options = {"max_order": max_order}
    ours, theirs = (
        odeint(pendulum, y0, t, method=method, options=options)
        for odeint in (sa.odeint, torchdiffeq.odeint)
    )
    assert problems.relative_error(ours, theirs) < 1e-13


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def test_the_iteration_ends_when_it_has_converged() -> None:
    """On y' = -y each iteration shrinks the change by the weight of the newest slope."""
    y0 = torch.ones(1, dtype=torch.float64)
    method = sa.ImplicitAdams(max_order=4, max_iters=20)
    solve = functools.partial(sa.solve, decay, y0, torch.arange(11) / 8, method=method)
    once, some, more = (solve(rtol=0.0, atol=a).stats for a in (1.0, 1e-6, 1e-6 * (3 / 64) ** 2))
    started, steps = 3 * 2, 8
    assert once.further == started + steps
    assert once.evaluations == 10 + once.further
    assert once.further < some.further
    assert more.further - some.further == 2 * steps


def test_own_tolerances_of_the_iteration_come_before_those_of_the_solve() -> None:
    y0, t = torch.ones(1, dtype=torch.float64), torch.linspace(0, 1, 11)
    loose = sa.ImplicitAdams(rtol=1.0, atol=1.0)
    assert sa.solve(decay, y0, t, method=loose, rtol=1e-13, atol=1e-13).stats.further == 14


def test_an_iteration_that_does_not_converge_warns_and_says_what_to_do() -> None:
    y0, t = torch.ones(1, dtype=torch.float64), torch.linspace(0, 1, 11)
    with pytest.warns(sa.ConvergenceWarning, match="max_iters.*Take smaller steps"):
        sa.solve(decay, y0, t, method=sa.ImplicitAdams(max_iters=1), rtol=1e-12, atol=1e-12)


def test_a_backward_pass_repeats_the_iterations_without_asking_again() -> None:
    """Neither a warning nor another number of iterations where the first pass did not converge."""
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    method = sa.ImplicitAdams(max_iters=2)
    for strategy in (s for s in EXACT if s.name != "forward"):  # which takes no products
        with pytest.warns(sa.ConvergenceWarning):
            sol = sa.solve(
                pendulum, y0, torch.linspace(0, 1, 8), method=method, gradient=strategy, **TIGHT
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error", sa.ConvergenceWarning)
            sol.y.sum().backward()
        assert sol.stats.further == 2 * 3 + 5 * 2
        assert sol.stats.products == sol.stats.evaluations


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sa.ExplicitAdams(max_order=1), "max_order = 1 is out of range"),
        (lambda: sa.ImplicitAdams(max_order=13), "'implicit_adams' takes 2 to 12"),
        (lambda: sa.ImplicitAdams(max_iters=0), "max_iters = 0 must be at least 1"),
        (lambda: sa.ExplicitAdams(start="rk5"), "did you mean 'rk4'"),
        (lambda: sa.ExplicitAdams(interp="cubics"), "did you mean 'cubic'"),  # type: ignore[arg-type]
    ],
)
def test_unusable_options_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(sa.ArgumentError, match=message):
        make()


def test_options_of_odeint_reach_the_method() -> None:
    y0, t = torch.ones(1, dtype=torch.float64), torch.linspace(0, 1, 11)
    solve = functools.partial(sa.odeint, decay, y0, t)
    first, second = (
        solve(method="fixed_adams", options={"max_order": m, "max_iters": 20}) for m in (2, 8)
    )
    assert abs(second[-1] - torch.exp(-t[-1])) < 1e-3 * abs(first[-1] - torch.exp(-t[-1]))
    with pytest.raises(sa.UnknownNameError, match="'max_oder'; did you mean 'max_order'"):
        solve(method="explicit_adams", options={"max_oder": 3})
    with pytest.raises(sa.UnknownNameError, match="'max_iters'"):
        solve(method="explicit_adams", options={"max_iters": 3})


# Gradients -----------------------------------------------------------------------------------


STEPPERS = {
    "bashforth, order 4": sa.ExplicitAdams(max_order=5),
    "bashforth, started by bosh3": sa.ExplicitAdams(max_order=6, start="bosh3"),
    "moulton, order 2": sa.ImplicitAdams(max_order=2, **TIGHT),
    "moulton, order 5": sa.ImplicitAdams(max_order=5, max_iters=3, **TIGHT),
}
# Unequal steps, more of them than any of these methods looks back.
GRID = (0.0, 0.1, 0.22, 0.3, 0.41, 0.5, 0.62, 0.7, 0.83, 0.9, 1.0)


def expected(
    case: problems.Case, stepper: Any, nodes: Sequence[Tensor]
) -> tuple[Any, dict[str, Tensor | None]]:
    """The textbook's solution and its gradients; it converges as the stepper does."""
    t = list(case.t)
    tolerance = (stepper.rtol, stepper.atol or 0.0) if hasattr(stepper, "rtol") else (1.0, 1.0)
    y = reference.frozen(stepper, case.func, case.y0, nodes, t, case.args, tolerance=tolerance)
    return y, case.gradients(y)


@pytest.mark.filterwarnings("ignore::symplectic_adjoint.ConvergenceWarning")
@pytest.mark.parametrize("strategy", EXACT, ids=label)
@pytest.mark.parametrize("stepper", STEPPERS.values(), ids=STEPPERS)
def test_gradients_are_exact_for_state_parameters_and_every_time_of_the_grid(
    stepper: Any, strategy: Strategy
) -> None:
    case = problems.case(times=GRID, wants_time=True)
    sol = case.solve(
        method=stepper,
        gradient=strategy,
        rtol=0.0,
        atol=0.0,
    )
    assert_equal(case, sol, expected(case, stepper, list(case.t)))


@pytest.mark.filterwarnings("ignore::symplectic_adjoint.ConvergenceWarning")
@pytest.mark.parametrize("interp", ["cubic", "linear"])
@pytest.mark.parametrize("strategy", EXACT, ids=label)
@pytest.mark.parametrize("method", [sa.ExplicitAdams, sa.ImplicitAdams])
def test_gradients_of_values_inside_the_steps_are_exact(
    method: Any, strategy: Strategy, interp: str
) -> None:
    """On a grid that stays where it is, all outputs but the first move along the interpolant."""
    case = problems.case(times=(0.0, 0.05, 0.35, 0.3501, 0.87, 1.0), wants_time=True, tree=True)
    grid = torch.tensor(GRID, dtype=torch.float64)
    stepper = method(max_order=5, interp=interp)
    sol = case.solve(
        method=stepper,
        gradient=strategy,
        controller=sa.FixedGrid(grid_constructor=lambda f, y, t: grid),
        rtol=1e-6,
        atol=1e-6,
    )
    t = list(case.t)
    y = reference.frozen(
        stepper, case.func, case.y0, list(grid), t, case.args, tolerance=(1e-6, 1e-6)
    )
    assert_close(case.gradients(sol.y), case.gradients(y))


@pytest.mark.parametrize("strategy", EXACT, ids=label)
def test_a_function_that_draws_draws_the_same_again(strategy: Strategy) -> None:
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(weight * y) * (1 + 0.1 * torch.rand(()).double())

    def gradient(method: Any, chosen: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
        sol = sa.solve(func, y0, torch.linspace(0, 1, 9), method=method, gradient=chosen)
        return torch.autograd.grad(sol.y[-1].square().sum(), [weight, y0])

    for method in (sa.ExplicitAdams(max_order=5), sa.ImplicitAdams(rtol=1.0, atol=1.0)):
        pairs = zip(gradient(method, strategy), gradient(method, "backprop"), strict=True)
        for got, wanted in pairs:
            assert problems.relative_error(got, wanted) < 1e-13


@pytest.mark.filterwarnings("ignore::symplectic_adjoint.ConvergenceWarning")
@pytest.mark.parametrize("method", [sa.ExplicitAdams(max_order=5), sa.ImplicitAdams(max_iters=2)])
def test_second_derivatives_in_states_and_times_are_those_of_the_discrete_solution(
    method: Any,
) -> None:
    def solution(y0: Tensor, t: Tensor) -> Tensor:
        times = torch.stack([t * i / 6 for i in range(7)])
        return sa.solve(pendulum, y0, times, method=method, rtol=0.0, atol=0.0).y[-1]

    y0 = torch.tensor([1.0, 0.2], dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(solution, (y0, t), atol=1e-6)


def test_the_gradient_of_a_complex_state_is_wirtinger_s() -> None:
    y0 = torch.tensor([0.5 + 0.2j], dtype=torch.complex128, requires_grad=True)

    def solution(y0: Tensor) -> Tensor:
        t = torch.linspace(0.0, 0.8, 7)
        method = sa.ExplicitAdams(max_order=4)
        return sa.solve(lambda t, y: 1j * y * y.abs(), y0, t, method=method).y[-1]

    assert torch.autograd.gradcheck(solution, y0, atol=1e-7)


def test_an_explicit_step_keeps_one_state_and_takes_one_product() -> None:
    state = torch.ones(20_000, dtype=torch.float64)
    weight = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def kept(steps: int) -> float:
        def solve() -> sa.Solution:
            t = torch.linspace(0.0, 1.0, steps + 1)[[0, -1]]
            return sa.solve(
                lambda t, y: weight * y,
                state,
                t,
                method=sa.ExplicitAdams(max_order=4),
                controller=sa.FixedGrid(step_size=1 / steps),
            )

        return peak_memory(solve) / state.nbytes

    assert (kept(40) - kept(20)) / 20 == pytest.approx(1.0, abs=0.02)


def test_tolerances_of_the_adjoint_are_those_of_its_corrector() -> None:
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    further = []
    for tolerance in (1e-2, 1e-10):
        strategy = sa.Continuous(rtol=tolerance, atol=tolerance)
        sol = sa.solve(
            pendulum,
            y0,
            [0.0, 1.0],
            controller=sa.FixedGrid(step_size=0.05),
            method=sa.ImplicitAdams(max_order=4, max_iters=20),
            gradient=strategy,
            rtol=1e-6,
            atol=1e-6,
        )
        sol.y[-1].sum().backward()
        further.append(sol.stats.backward_further)
    assert further[1] > further[0]
