"""Step-size control and fixed grids, against values worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.controllers import Setting
from symplectic_adjoint.controllers.adaptive import AdaptivePace
from symplectic_adjoint.field import GraphField
from tests.conformance.registry import METHODS

ADAPTIVE = [name for name in steppers.names() if steppers.get(name).error_order is not None]


def setting(end: float = 1e9) -> Setting:
    """Tolerances that leave the error as it is: its scale is one."""
    return Setting(end=end, direction=1.0, rtol=0.0, atol=1.0)


class StubStepper:
    """Takes no step: its errors are told to it beforehand."""

    name, order = "stub", 5

    def __init__(self, errors: Iterable[float] = (), error_order: int | None = 5) -> None:
        self.error_order = error_order
        self.errors = iter(errors)

    def error(self, field: Any, step: Any) -> Tensor:
        return torch.tensor([next(self.errors)], dtype=torch.float64)

    def stages(self, step: Any) -> Sequence[Any]:
        return ()

    def slope(self, field: Any, state: Any) -> Tensor:
        return torch.ones(1)


FIELD: Any = SimpleNamespace(locate=lambda index: f"component {index}")


def paced(
    controller: sa.Adaptive, errors: Sequence[float], order: int = 5, h: float = 1.0
) -> tuple[list[float], list[bool]]:
    """The sizes tried, with the one to come, and which of them were accepted."""
    pace = AdaptivePace(controller, setting(), order, h)
    stepper: Any = StubStepper(errors, order)
    t, sizes, accepted = 0.0, [h], []
    step = SimpleNamespace(start=SimpleNamespace(y=torch.zeros(1)), y1=torch.zeros(1))
    for _ in errors:
        t1 = pace.propose(t)
        accepted.append(pace.accepts(FIELD, stepper, step, t, t1))
        sizes.append(pace.h)
        t = t1 if accepted[-1] else t
    return sizes, accepted


def test_an_integral_controller_follows_the_last_error_alone() -> None:
    sizes, accepted = paced(sa.Adaptive(), [0.2, 3.0, 0.5])
    assert accepted == [True, False, True]
    wanted = [1.0, 0.9 * 0.2**-0.2]
    wanted.append(wanted[-1] * 0.9 * 3.0**-0.2)
    wanted.append(wanted[-1] * 0.9 * 0.5**-0.2)
    assert sizes == pytest.approx(wanted, rel=1e-12)


def test_a_proportional_integral_controller_weighs_the_error_before() -> None:
    sizes, accepted = paced(sa.Adaptive.pi(), [0.2, 0.05, 5.0, 0.02], order=4)
    assert accepted == [True, True, False, True]
    wanted = [1.0]
    # A rejected error (5.0) is no "error before": the one of the last accepted step is.
    for now, before in ((0.2, 1.0), (0.05, 0.2), (5.0, 0.05), (0.02, 0.05)):
        wanted.append(wanted[-1] * max(0.2, 0.9 * now ** (-0.7 / 4) * before ** (0.4 / 4)))
    assert sizes == pytest.approx(wanted, rel=1e-12)


def test_a_derivative_part_weighs_two_errors_before() -> None:
    sizes, _ = paced(sa.Adaptive.pid(), [0.2, 0.05, 0.3, 0.02], order=3)
    wanted = [1.0]
    for now, last, before in ((0.2, 1, 1), (0.05, 0.2, 1), (0.3, 0.05, 0.2), (0.02, 0.3, 0.05)):
        factor = 0.9 * now ** (-0.7 / 3) * last ** (0.5 / 3) * before ** (-0.1 / 3)
        wanted.append(wanted[-1] * max(1.0, factor))
    assert sizes == pytest.approx(wanted, rel=1e-12)


def test_the_factors_between_sizes_are_bounded() -> None:
    controller = sa.Adaptive(factor_min=0.3, factor_max=4.0, safety=0.8)
    sizes, accepted = paced(controller, [1e-12, 0.0, 1.0, 1e12])
    assert accepted == [True, True, True, False]
    # An error of one is accepted, and an accepted step does not shrink the next one.
    factors = [b / a for a, b in itertools.pairwise(sizes)]
    assert factors == pytest.approx([4.0, 4.0, 1.0, 0.3])


def test_steps_of_the_least_size_are_accepted_whatever_their_error() -> None:
    sizes, accepted = paced(sa.Adaptive(min_step=0.5), [100.0, 100.0, 100.0])
    assert sizes == [1.0, 0.5, 0.5, 0.5]
    assert accepted == [False, True, True]


def test_sizes_never_exceed_the_greatest_step() -> None:
    sizes, _ = paced(sa.Adaptive(max_step=2.5), [1e-9, 1e-9, 1e-9])
    assert sizes == [1.0, 2.5, 2.5, 2.5]


def test_a_non_finite_attempt_is_repeated_with_a_smaller_step() -> None:
    sizes, accepted = paced(sa.Adaptive(factor_min=0.25), [math.nan, math.inf, 1.0])
    assert sizes == [1.0, 0.25, 0.0625, 0.0625]
    assert accepted == [False, False, True]


@pytest.mark.parametrize("error", [1.0 + 1e-9, 1.2, 5.0, 1e5])
def test_a_size_that_is_rejected_again_and_again_vanishes(error: float) -> None:
    """At t = 1e6 sizes near 1e-10 are rounded, up to the size that was just rejected."""
    pace = AdaptivePace(sa.Adaptive(), setting(), 5, 1e-3)
    stepper: Any = StubStepper(itertools.repeat(error))
    step = SimpleNamespace(start=SimpleNamespace(y=torch.zeros(1)), y1=torch.zeros(1))

    def attempt_for_ever() -> None:
        for _ in range(1000):
            assert not pace.accepts(FIELD, stepper, step, 1e6, pace.propose(1e6))

    with pytest.raises(sa.StepUnderflowError, match="vanishes at t = 1000000"):
        attempt_for_ever()


def test_a_failure_that_a_smaller_step_has_overcome_explains_nothing_later() -> None:
    pace = AdaptivePace(sa.Adaptive(), setting(), 5, 1e-3)
    stepper: Any = StubStepper(itertools.chain([0.5], itertools.repeat(1.2)))
    step = SimpleNamespace(start=SimpleNamespace(y=torch.zeros(1)), y1=torch.zeros(1))
    pace.fail(sa.NonlinearSolveError("at the start"), 0.0, 1e-3)
    assert pace.accepts(FIELD, stepper, step, 0.0, pace.propose(0.0))

    def attempt_for_ever() -> None:
        for _ in range(1000):
            assert not pace.accepts(FIELD, stepper, step, 1e6, pace.propose(1e6))

    with pytest.raises(sa.StepUnderflowError, match="vanishes at t = 1000000"):
        attempt_for_ever()


def test_the_last_step_ends_where_the_solve_ends() -> None:
    pace = AdaptivePace(sa.Adaptive(), setting(end=1.0), 5, 0.4)
    assert pace.propose(0.3) == 0.7
    assert pace.propose(0.6) == 1.0
    assert pace.propose(0.9) == 1.0


def test_a_step_that_would_leave_no_more_than_rounding_goes_to_the_end() -> None:
    pace = AdaptivePace(sa.Adaptive(), setting(end=0.3), 5, 0.1)
    assert 0.2 + 0.1 != 0.3
    assert pace.propose(0.2) == 0.3
    assert pace.propose(0.2 - 1e-13) == 0.3


# On solves -------------------------------------------------------------------------------------


class Kicked(nn.Module):
    """A network with a sudden change at ``t = place``."""

    def __init__(self, place: float = 0.6) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.place = place
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.starts: list[float] = []
        self.rejected = 0
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        k: Tensor = 3 * self.net(y) + torch.tanh(30 * (t - self.place))
        return k

    def callback_accept_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.starts.append(float(t))

    def callback_reject_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.rejected += 1


def start() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(4, 3, dtype=torch.float64)


@pytest.mark.parametrize("backwards", [False, True], ids=["increasing", "decreasing"])
@pytest.mark.parametrize(
    ("method", "tolerance", "options", "close"),
    [
        ("dopri5", 1e-3, {}, 1e-9),
        ("dopri5", 1e-6, {}, 1e-9),
        ("dopri5", 1e-6, {"first_step": 0.05, "safety": 0.8, "ifactor": 3, "dfactor": 0.5}, 1e-9),
        ("dopri5", 1e-6, {"max_step": 0.1}, 1e-9),
        ("bosh3", 1e-4, {}, 1e-9),
        # Its error weights cancel, and so does the error of a short first step, down to rounding.
        ("dopri8", 1e-9, {"first_step": 0.3}, 1e-6),
    ],
)
@torch.no_grad()
def test_accepted_steps_are_torchdiffeqs(
    method: str, tolerance: float, options: dict[str, Any], close: float, backwards: bool
) -> None:
    """Up to the last step, which torchdiffeq does not end at the end of the interval."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    t = t.flip(0) if backwards else t
    func = Kicked(1.4 if backwards else 0.6)
    tolerances: Any = {"rtol": tolerance, "atol": tolerance}
    torchdiffeq.odeint(func, start(), t, method=method, options=options, **tolerances)
    starts, rejected = func.starts[:], func.rejected
    names = {"ifactor": "factor_max", "dfactor": "factor_min"}
    controller = sa.Adaptive(**{names.get(k, k): v for k, v in options.items()})
    solution = sa.solve(func, start(), t, method=method, controller=controller, **tolerances)
    assert rejected == solution.stats.rejected > 0
    assert func.rejected == 2 * rejected  # our callbacks say so, too
    wanted = torch.tensor(starts, dtype=torch.float64).abs()
    assert solution.steps[:-1] == pytest.approx(wanted, abs=close)
    assert starts[-1] != 0


@pytest.mark.parametrize("method", ["adaptive_heun", "fehlberg2"])
@torch.no_grad()
def test_methods_that_are_not_fsal_deliberately_leave_torchdiffeqs_steps(method: str) -> None:
    """torchdiffeq reuses their last stage as the slope at the new point, which it is not.

    The first step, from an evaluated slope, and so the size of the second one are the same.
    """
    torchdiffeq = pytest.importorskip("torchdiffeq")
    t = torch.tensor([0.0, 2.0], dtype=torch.float64)
    func = Kicked()
    torchdiffeq.odeint(func, start(), t, method=method, rtol=1e-3, atol=1e-3)
    starts = func.starts[:]
    solution = sa.solve(func, start(), t, method=method, rtol=1e-3, atol=1e-3)
    assert solution.steps[:3] == pytest.approx(torch.tensor(starts[:3]).double(), rel=1e-6)
    further = zip(solution.steps.tolist(), starts, strict=False)
    assert max(abs(a - b) for a, b in further) > 1e-6


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize(
    ("y0", "binding"), [([1.0, 0.5], "h1"), ([1e-3, 1e-3], "100 h0"), ([0.0, 0.0], "1e-6")]
)
def test_the_first_step_is_chosen_as_by_hairer_norsett_and_wanner(
    method: str, y0: list[float], binding: str
) -> None:
    """Algorithm (4.14) of section II.4, worked out anew."""
    start, tolerance = torch.tensor(y0, dtype=torch.float64), 1e-4
    scale = tolerance + tolerance * start.abs()
    order = steppers.get(method).error_order
    assert order is not None

    def func(t: Tensor | float, y: Tensor) -> Tensor:
        return torch.cos(20 * y) + t

    def norm(x: Tensor) -> float:
        return math.sqrt(float(((x / scale) ** 2).mean()))

    slope = func(5.0, start)
    d0, d1 = norm(start), norm(slope)
    h0 = 0.01 * d0 / d1 if d0 >= 1e-5 else 1e-6
    d2 = norm(func(5.0 + h0, start + h0 * slope) - slope) / h0
    h1 = (0.01 / max(d1, d2)) ** (1 / order)
    assert (h1 < 100 * h0) == (binding == "h1")
    stepper = steppers.get(method)
    tolerances = Setting(end=9.0, direction=1.0, rtol=tolerance, atol=tolerance)
    field = GraphField(func, start)
    pace = sa.Adaptive().begin(field, stepper, stepper.begin(5.0, start), tolerances)
    assert pace.h == pytest.approx(min(100 * h0, h1), rel=1e-9)


def test_the_chosen_first_step_stays_within_a_short_interval() -> None:
    solution = sa.solve(lambda t, y: 0 * y, torch.ones(2), [1.0, 1.0 + 1e-9])
    assert solution.stats.accepted == 1


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y + torch.tanh(50 * (t - 0.4))


def solved(controller: Any, t: Sequence[float] = (0.0, 1.0), **options: Any) -> sa.Solution:
    y0 = torch.ones(2, dtype=torch.float64)
    options = {"rtol": 1e-5, "atol": 1e-5, **options}
    return sa.solve(decay, y0, t, controller=controller, **options)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("make", [sa.Adaptive, sa.Adaptive.pi, sa.Adaptive.pid])
def test_every_controller_reaches_the_end_within_the_tolerance(
    method: str, make: Callable[..., sa.Adaptive]
) -> None:
    solution = solved(make(), method=method)
    exact = solved(make(), rtol=1e-11, atol=1e-11)
    assert float((solution.y[-1] - exact.y[-1]).abs().max()) < 3e-4  # 30 tolerances
    assert float(solution.steps[-1]) == 1.0


def test_a_pi_controller_rejects_less_where_the_step_keeps_changing() -> None:
    t = (0.0, 12.0)
    stiff: Any = {"rtol": 1e-4, "atol": 1e-4, "method": "bosh3"}
    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)

    def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], 20 * (1 - y[0] ** 2) * y[1] - y[0]])

    rejected = [
        sa.solve(van_der_pol, y0, t, controller=c, **stiff).stats.rejected
        for c in (sa.Adaptive(), sa.Adaptive.pi())
    ]
    assert rejected[1] < rejected[0]


def test_given_first_greatest_and_least_steps_are_respected() -> None:
    steps = solved(sa.Adaptive(first_step=0.013)).steps
    assert float(steps[1]) == 0.013
    assert float(solved(sa.Adaptive(first_step=5.0)).steps[-1]) == 1.0
    assert (
        float(solved(sa.Adaptive(first_step=5.0, max_step=0.2)).steps.diff().max()) <= 0.2 + 1e-15
    )
    least = solved(sa.Adaptive(min_step=0.03), rtol=1e-9, atol=1e-9)
    assert float(least.steps.diff()[:-1].min()) >= 0.03 - 1e-15
    assert least.stats.accepted <= 34


def test_the_step_limit_counts_attempts_and_is_exact() -> None:
    needed = solved(sa.Adaptive())
    attempts = needed.stats.accepted + needed.stats.rejected
    assert needed.stats.rejected > 0
    assert solved(sa.Adaptive(max_steps=attempts)).status is sa.Status.SUCCESS
    with pytest.raises(sa.StepLimitError, match=f"max_steps = {attempts - 1} ") as caught:
        solved(sa.Adaptive(max_steps=attempts - 1))
    assert caught.value.solution is not None
    stats = caught.value.solution.stats
    assert stats.accepted + stats.rejected == attempts - 1


def test_a_norm_decides_what_error_is() -> None:
    def first_component(x: Tensor) -> Tensor:
        return x[0].abs()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[0], 200 * torch.cos(100 * t)])

    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    strict = sa.solve(func, y0, [0.0, 1.0])
    loose = sa.solve(func, y0, [0.0, 1.0], controller=sa.Adaptive(norm=first_component))
    assert loose.stats.accepted < strict.stats.accepted / 4


def test_tolerances_may_differ_between_components() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[0], 200 * torch.cos(100 * t)])

    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    atol = torch.tensor([1e-9, 1e3], dtype=torch.float64)
    one = sa.solve(func, y0, [0.0, 1.0], atol=atol)
    both = sa.solve(func, y0, [0.0, 1.0], atol=1e-9)
    assert one.stats.accepted < both.stats.accepted / 4


@pytest.mark.parametrize(
    "options",
    [
        {"safety": 0.0},
        {"safety": 1.1},
        {"factor_min": 0.0},
        {"factor_min": 1.0},  # a rejected step would be repeated for ever
        {"factor_max": 0.9},
        {"min_step": -1.0},
        {"min_step": 0.2, "max_step": 0.1},
        {"max_steps": 0},
        {"first_step": 0.0},
        {"first_step": -0.1},
        {"first_step": math.inf},
        {"safety": math.nan},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(sa.ArgumentError, match="out of range"):
        sa.Adaptive(**options)


@pytest.mark.parametrize("tolerances", [(0.0, 0.0), (-1e-3, 1e-3), (1e-3, math.nan)])
def test_tolerances_out_of_range_are_refused(tolerances: tuple[float, float]) -> None:
    with pytest.raises(sa.ArgumentError, match=r"rtol|atol"):
        solved(sa.Adaptive(), rtol=tolerances[0], atol=tolerances[1])


def test_a_method_without_an_error_estimate_cannot_adapt() -> None:
    with pytest.raises(sa.ArgumentError, match="'rk4' has no error estimate"):
        solved(sa.Adaptive(), method="rk4")


# Fixed grids -----------------------------------------------------------------------------------


def test_without_a_step_size_the_grid_is_the_output_times() -> None:
    t = [0.0, 0.1, 0.5, 0.6, 2.0]
    solution = solved(sa.FixedGrid(), t, method="rk4")
    assert solution.steps.tolist() == t
    assert solved(None, t, method="rk4").steps.tolist() == t


def test_a_grid_of_one_step_size_starts_at_the_start_and_ends_at_the_end() -> None:
    solution = solved(sa.FixedGrid(step_size=0.4), [1.0, 1.3, 2.0], method="rk4")
    assert solution.steps.tolist() == pytest.approx([1.0, 1.4, 1.8, 2.0])
    assert solution.y.shape == (3, 2)


@example(49, 0.0, 1.0, 1.0)  # 1 / (1 / 49) > 49
@given(
    st.integers(1, 500),
    st.floats(-100, 100),
    st.floats(1e-3, 1e3),
    st.sampled_from([-1.0, 1.0]),
)
def test_a_step_size_that_divides_the_interval_leaves_no_remainder(
    count: int, t0: float, span: float, direction: float
) -> None:
    t = torch.tensor([t0, t0 + direction * span], dtype=torch.float64)
    length = abs(float(t[1] - t[0]))
    grid = sa.FixedGrid(step_size=length / count).grid(None, None, t)
    assert len(grid) == count + 1
    assert grid[0] == t[0]
    assert grid[-1] == t[1]
    assert bool((grid.diff() * direction > 0).all())


def test_a_step_size_longer_than_the_interval_is_one_step() -> None:
    assert solved(sa.FixedGrid(step_size=7.0), method="rk4").stats.accepted == 1


def test_a_constructed_grid_is_followed_and_moves_with_the_times() -> None:
    def quadratic(func: Any, y0: Any, t: Tensor) -> Tensor:
        return t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, 5, dtype=torch.float64) ** 2

    t = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(2, dtype=torch.float64)
    controller = sa.FixedGrid(grid_constructor=quadratic)
    solution = sa.solve(decay, y0, t, method="midpoint", controller=controller)
    assert solution.steps.tolist() == [0.0, 0.125, 0.5, 1.125, 2.0]
    solution.y[-1].sum().backward()

    # The textbook, with the grid's own dependence on t.
    t2 = t.detach().clone().requires_grad_()
    y, grid = y0, quadratic(None, None, t2)
    for a, b in itertools.pairwise(grid):
        y = y + (b - a) * decay((a + b) / 2, y + (b - a) / 2 * decay(a, y))
    assert torch.allclose(y, solution.y[-1], rtol=1e-13)
    (wanted,) = torch.autograd.grad(y.sum(), t2)
    assert torch.allclose(t.grad, wanted, rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "grid", [[0.0, 0.5], [0.1, 1.0], [0.0, 0.7, 0.7, 1.0], [0.0, 0.8, 0.4, 1.0], [[0.0, 1.0]]]
)
def test_a_constructed_grid_must_run_from_start_to_end(grid: Any) -> None:
    controller = sa.FixedGrid(grid_constructor=lambda func, y0, t: torch.tensor(grid))
    with pytest.raises(sa.ArgumentError, match="grid_constructor must return"):
        solved(controller, method="rk4")


@pytest.mark.parametrize("step_size", [0.0, -0.1, math.nan, math.inf])
def test_a_step_size_must_be_positive_and_finite(step_size: float) -> None:
    with pytest.raises(sa.ArgumentError, match="step_size"):
        sa.FixedGrid(step_size=step_size)


def test_step_size_and_grid_exclude_each_other() -> None:
    with pytest.raises(sa.ArgumentError, match="not both"):
        sa.FixedGrid(step_size=0.1, grid_constructor=lambda func, y0, t: t)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_fixed_steps(method: str) -> None:
    # With its default order the explicit Adams method is stable for much smaller steps only.
    chosen = sa.ExplicitAdams(max_order=4) if method == "explicit_adams" else method
    solution = solved(sa.FixedGrid(step_size=0.01), method=chosen)
    assert solution.stats.accepted == 100
    assert solution.stats.rejected == 0
    exact = solved(sa.Adaptive(), rtol=1e-11, atol=1e-11)
    assert float((solution.y[-1] - exact.y[-1]).abs().max()) < 0.02
