"""The integration loop: its steps, its times, its outputs, and what it reads of the device."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import symplectic_adjoint as sa
from symplectic_adjoint import gradients, steppers
from symplectic_adjoint.controllers import Setting
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.loop import Outputs, OutputTimes, Run, Stats, integrate, run
from symplectic_adjoint.progress import Meter
from symplectic_adjoint.steppers._base import Work
from tests.conformance.registry import METHODS

ADAPTIVE = [name for name in METHODS if steppers.get(name).error_order is not None]
STRATEGIES: list[Any] = [
    *(pytest.param(gradients.get(name), id=name) for name in gradients.names()),
    pytest.param(sa.Symplectic("steps"), id="symplectic, steps"),
    pytest.param(sa.Symplectic("graph"), id="symplectic, graph"),
]


# With stubs ------------------------------------------------------------------------------------


@dataclass
class StubState:
    t: float
    y: Tensor


@dataclass
class StubStep:
    start: StubState
    t1: float
    y1: Tensor


class StubStepper:
    """Steps on ``y' = 1``, exactly; remembers what it was asked for."""

    name, order, error_order = "stub", 1, None
    work = Work(inner=0)

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.interpolated: list[list[float]] = []

    def step(self, field: Any, state: StubState, t1: float) -> StubStep:
        self.steps.append((state.t, t1))
        return StubStep(state, t1, state.y + (t1 - state.t))

    def end(self, step: StubStep) -> StubState:
        return StubState(step.t1, step.y1)

    def interpolate(self, field: Any, step: StubStep, theta: Tensor) -> Tensor:
        self.interpolated.append(theta.tolist())
        return (step.start.y + theta * (step.t1 - step.start.t)).unsqueeze(-1)


class StubPace:
    """Proposes steps of one size and rejects the attempts with the given numbers."""

    def __init__(self, h: float, end: float, rejects: Sequence[int] = (), fails: int = -1) -> None:
        self.h, self.end, self.rejects, self.fails = h, end, rejects, fails
        self.attempts = 0

    def propose(self, t: float) -> float:
        if self.attempts == self.fails:
            raise sa.StepLimitError("told to")
        ahead = t + self.h
        return self.end if (ahead - self.end) * self.h >= 0 else ahead

    def accepts(self, field: Any, stepper: Any, step: Any, t: float, t1: float) -> bool:
        self.attempts += 1
        return self.attempts - 1 not in self.rejects


def driven(
    pace: StubPace, times: Sequence[float], hits: Callable[[float], bool] = lambda t1: True
) -> tuple[StubStepper, Stats, Run, list[Any]]:
    """A run of the stub from ``times[0]`` to ``times[-1]``, with all that was kept."""
    stepper, stats = StubStepper(), Stats()
    any_stepper: Any = stepper
    state = StubState(times[0], torch.tensor([times[0]], dtype=torch.float64))
    direction = 1.0 if times[-1] > times[0] else -1.0
    field: Any = SimpleNamespace()
    setting = Setting(end=times[-1], direction=direction, rtol=0.0, atol=0.0)
    steps = integrate(field, any_stepper, pace, state, setting, {}, stats)
    outputs = OutputTimes(times, direction, torch.tensor(times, dtype=torch.float64), hits)
    kept: list[Any] = []

    def keep(n: int, step: Any, held: Outputs) -> None:
        kept.append((n, step.t1, held))

    return stepper, stats, run(field, any_stepper, steps, state, outputs, keep, False), kept


def test_steps_are_taken_until_the_end_is_reached_exactly() -> None:
    stepper, stats, result, kept = driven(StubPace(0.25, 1.0), [0.0, 1.0])
    assert stepper.steps == [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
    assert (stats.accepted, stats.rejected) == (4, 0)
    assert list(result.nodes) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [n for n, _, _ in kept] == [0, 1, 2, 3]
    assert result.end.t == 1.0


def test_a_rejected_attempt_starts_again_from_the_same_state() -> None:
    stepper, stats, result, _ = driven(StubPace(0.5, 1.0, rejects=(0, 2)), [0.0, 1.0])
    assert stepper.steps == [(0.0, 0.5), (0.0, 0.5), (0.5, 1.0), (0.5, 1.0)]
    assert (stats.accepted, stats.rejected) == (2, 2)
    assert list(result.nodes) == [0.0, 0.5, 1.0]


def test_outputs_do_not_change_the_steps() -> None:
    plain, *_ = driven(StubPace(0.3, 1.0), [0.0, 1.0])
    many, *_ = driven(StubPace(0.3, 1.0), torch.linspace(0, 1, 101).tolist())
    assert plain.steps == many.steps


def test_an_output_inside_a_step_is_interpolated_and_one_at_its_end_is_not() -> None:
    times = [0.0, 0.125, 0.25, 0.5, 0.625, 0.75, 1.5]
    stepper, _, result, kept = driven(StubPace(0.5, 1.5), times)
    assert stepper.interpolated == [[0.25, 0.5], [0.25, 0.5]]
    held = [Outputs(1, 3, 3), Outputs(4, 6, None), Outputs(6, 6, 6)]
    assert [h for _, _, h in kept] == result.outputs == held
    assert result.y.squeeze(-1).tolist() == times


def test_an_output_that_must_move_by_itself_is_interpolated_at_the_end_of_a_step() -> None:
    stepper, _, result, _ = driven(StubPace(0.5, 1.0), [0.0, 0.5, 1.0], hits=lambda t1: t1 == 1.0)
    assert stepper.interpolated == [[1.0]]
    assert result.outputs == [Outputs(1, 2, None), Outputs(2, 2, 2)]


def test_decreasing_times_are_sorted_into_steps_the_same_way() -> None:
    times = [1.0, 0.875, 0.5, 0.25, 0.0]
    stepper, _, result, _ = driven(StubPace(-0.5, 0.0), times)
    assert stepper.steps == [(1.0, 0.5), (0.5, 0.0)]
    assert stepper.interpolated == [[0.25], [0.5]]
    assert result.y.squeeze(-1).tolist() == times


def test_a_solve_that_fails_keeps_what_it_has_reached() -> None:
    _, stats, result, kept = driven(StubPace(0.25, 1.0, fails=2), [0.0, 0.25, 0.375, 0.625, 1.0])
    assert isinstance(result.error, sa.StepLimitError)
    assert (stats.accepted, len(kept)) == (2, 2)
    assert list(result.nodes) == [0.0, 0.25, 0.5]
    assert result.y.squeeze(-1).tolist() == [0.0, 0.25, 0.375]


# Times -----------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A small smooth field that writes down when it is evaluated."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Linear(2, 2, dtype=dtype)
        self.times: list[Tensor] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(t.detach())
        assert t.ndim == 0
        assert t.dtype == y.dtype
        k: Tensor = torch.tanh(self.net(y)) + torch.sin(3 * t)
        return k


def ends(t0: float, span: float, dtype: torch.dtype) -> list[float]:
    """An interval whose ends a float type resolves."""
    first = torch.tensor(t0, dtype=dtype)
    last = first + torch.tensor(span, dtype=dtype)
    if last == first:
        last = torch.nextafter(first, first + math.copysign(1, span) * (1 + first.abs()))
    return [float(first), float(last)]


@pytest.mark.filterwarnings("ignore::symplectic_adjoint.ConvergenceWarning")
@pytest.mark.parametrize("method", METHODS)
@given(
    t0=st.sampled_from([0.0, 1e-3, -7.3, 1e4, -1e7]),
    span=st.sampled_from([1e-15, 1e-7, 0.1, 3.0]),
    direction=st.sampled_from([1.0, -1.0]),
    single=st.booleans(),
    adaptive=st.booleans(),
)
def test_func_is_never_evaluated_outside_the_interval(
    method: str, t0: float, span: float, direction: float, single: bool, adaptive: bool
) -> None:
    if adaptive and method not in ADAPTIVE:
        return
    dtype = torch.float32 if single else torch.float64
    start, end = ends(t0, direction * span, dtype)
    func = Recorder(dtype)
    middle = start + (end - start) / 2
    t = [start, middle, end] if start != middle != end else [start, end]
    controller = (
        sa.Adaptive(max_steps=60) if adaptive else sa.FixedGrid(step_size=abs(end - start) / 3)
    )
    y0 = torch.ones(2, dtype=dtype, requires_grad=True)
    solution = sa.solve(
        func, y0, t, method=method, controller=controller, rtol=1e-3, atol=1e-3, throw=False
    )
    solution.y.sum().backward()
    low, high = sorted((start, end))
    assert low <= float(torch.stack(func.times).min())
    assert float(torch.stack(func.times).max()) <= high
    if solution.status is sa.Status.SUCCESS:
        assert float(solution.steps[-1]) == end


def test_a_state_of_low_precision_sees_no_time_beyond_the_rounded_ends() -> None:
    func = Recorder(torch.float32)
    sa.solve(func, torch.ones(2), [0.1, 0.7], rtol=1e-3)
    ends = torch.tensor([0.1, 0.7])
    assert float(torch.tensor(0.1)) > 0.1
    assert torch.equal(torch.stack(torch.stack(func.times).aminmax()), ends)


def test_the_adjoint_equation_is_not_evaluated_outside_the_interval_either() -> None:
    func = Recorder()
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    t = [0.3, 0.7, 2.0]
    sa.solve(func, y0, t, gradient="continuous").y.sum().backward()
    times = torch.stack(func.times)
    assert (float(times.min()), float(times.max())) == (0.3, 2.0)


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("end", [1.0, 0.1 + 0.2, math.pi, -2.0])
def test_the_last_step_ends_exactly_at_the_last_time(method: str, end: float) -> None:
    solution = sa.solve(Recorder(), torch.ones(2).double(), [0.0, end], method=method, rtol=1e-4)
    assert float(solution.steps[-1]) == end
    assert bool((solution.steps.diff() * end > 0).all())


@pytest.mark.parametrize(
    "t",
    [
        [0.0, 0.5, 1.0],
        (0, 0.5, 1),
        torch.tensor([0.0, 0.5, 1.0]),
        torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64),
        torch.tensor([0.0, 0.5, 1.0], dtype=torch.float16),
        torch.tensor([0.0, 0.5, 1.0], dtype=torch.bfloat16),
    ],
    ids=["list", "tuple", "float32", "float64", "float16", "bfloat16"],
)
def test_times_may_come_in_any_form(t: Any) -> None:
    y0 = torch.ones(2, dtype=torch.float64)
    wanted = sa.solve(Recorder(), y0, torch.tensor([0, 0.5, 1], dtype=torch.float64))
    solution = sa.solve(Recorder(), y0, t)
    assert torch.equal(solution.y, wanted.y)
    assert torch.equal(solution.steps, wanted.steps)
    assert solution.steps.dtype == torch.float64


def test_times_may_be_an_array_or_integers() -> None:
    numpy = pytest.importorskip("numpy")
    y0 = torch.ones(2, dtype=torch.float64)
    wanted = sa.solve(Recorder(), y0, [0.0, 1.0, 2.0]).y
    for t in (numpy.array([0.0, 1.0, 2.0]), numpy.arange(3), torch.arange(3), range(3)):
        assert torch.equal(sa.solve(Recorder(), y0, t).y, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_times_of_low_precision_receive_their_gradient_in_it(dtype: torch.dtype) -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=dtype, requires_grad=True)
    y0 = torch.ones(2, dtype=torch.float64)
    sa.solve(lambda t, y: -y, y0, t).y[1].sum().backward()
    assert t.grad is not None
    assert t.grad.dtype == dtype
    assert float(t.grad[1]) == pytest.approx(-2 * math.exp(-0.5), rel=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "fixed"])
def test_decreasing_time_mirrors_increasing_time_to_the_last_bit(
    strategy: Strategy, adaptive: bool
) -> None:
    method = strategy.method or "dopri5"
    controller = sa.Adaptive() if adaptive else sa.FixedGrid(step_size=0.3)
    t = torch.tensor([0.5, 0.8, 1.9], dtype=torch.float64)
    results = []
    for sign in (1.0, -1.0):
        func = Recorder()
        y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)

        def mirrored(t: Tensor, y: Tensor, func: Recorder = func, sign: float = sign) -> Tensor:
            k: Tensor = func(sign * t, y)
            return sign * k

        solution = sa.solve(
            mirrored,
            y0,
            sign * t,
            method=method,
            controller=controller,
            gradient=strategy,
            rtol=1e-5,
            atol=1e-5,
        )
        inputs = [y0, *func.parameters()]
        results.append((solution, torch.autograd.grad(solution.y.square().sum(), inputs)))
    (forth, forth_grads), (back, back_grads) = results
    assert torch.equal(forth.steps, -back.steps)
    assert torch.equal(forth.y, back.y)
    assert forth.stats == back.stats
    for a, b in zip(forth_grads, back_grads, strict=True):
        assert torch.equal(a, b)


# The device ------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts how often a value is read back from the device."""

    reading = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # States of random generators, which are bytes, are on the host anyway.
        if func in self.reading and args[0].dtype != torch.uint8:
            self.count += 1
        return func(*args, **(kwargs or {}))


def kicked(t: Tensor, y: Tensor) -> Tensor:
    """Has steps rejected."""
    return -y + torch.tanh(50 * (t - 0.4))


def reads(method: str, controller: Any, strategy: Strategy, device: torch.device) -> Any:
    """Reads of the forward and of the backward pass, and the statistics."""
    y0 = torch.ones(3, dtype=torch.float64, device=device, requires_grad=True)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    with Reads() as forward:
        solution = sa.solve(
            kicked,
            y0,
            t,
            method=method,
            controller=controller,
            gradient=strategy,
            rtol=1e-3,
            atol=1e-3,
        )
    loss = solution.y.sum()
    with Reads() as backward:
        loss.backward()
    return forward.count, backward.count, solution.stats


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_adaptive_solve_reads_the_device_once_an_attempt(
    strategy: Strategy, device: torch.device
) -> None:
    method = strategy.method or "bosh3"
    constants, back = set(), set()
    for max_step in (0.2, 0.05, 0.02):
        forward, backward, stats = reads(
            method, sa.Adaptive(max_step=max_step, first_step=0.01), strategy, device
        )
        constants.add(forward - stats.accepted - stats.rejected)
        back.add(backward - stats.backward_accepted - stats.backward_rejected)
    assert len(constants) == 1, "the number of reads must grow by one an attempt"
    assert max(constants) <= 8
    assert len(back) == 1, "the reverse sweep must read nothing that grows with the steps"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_solve_on_a_fixed_grid_reads_the_device_a_constant_number_of_times(
    strategy: Strategy, device: torch.device
) -> None:
    method = strategy.method or "rk4"
    counts = {
        reads(method, sa.FixedGrid(step_size=h), strategy, device)[:2] for h in (0.2, 0.05, 0.02)
    }
    assert len(counts) == 1
    forward, backward = counts.pop()
    assert forward <= 8
    assert backward <= 12  # the continuous adjoint: two an interval


def test_a_solve_stays_on_the_device_of_its_state(device: torch.device) -> None:
    y0 = torch.ones(3, device=device, requires_grad=True)
    t = torch.linspace(0, 1, 4, requires_grad=True)
    solution = sa.solve(kicked, y0, t, dense=True)
    assert solution.y.device == y0.device
    assert solution.dense(0.3).device == y0.device
    assert solution.steps.device.type == solution.t.device.type == "cpu"
    solution.y.sum().backward()
    assert y0.grad is not None
    assert t.grad is not None
    assert y0.grad.device == y0.device
    assert t.grad.device == t.device


# Progress --------------------------------------------------------------------------------------


def test_progress_is_told_every_time_reached() -> None:
    told: list[float] = []
    solution = sa.solve(kicked, torch.ones(2), [0.0, 1.0], progress=told.append)
    assert told == solution.steps[1:].tolist()
    assert solution.stats.rejected > 0


def test_the_progress_meter_writes_to_stderr_and_ends_its_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    solution = sa.solve(kicked, torch.ones(2), [1.0, 0.0], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert "100%" in err
    assert f"{solution.stats.accepted} steps" in err


def test_there_is_no_progress_meter_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    sa.solve(kicked, torch.ones(2), [0.0, 1.0])
    sa.solve(kicked, torch.ones(2), [0.0, 1.0], progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_progress_meter_says_how_far_the_solve_has_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.count(100.0, 1.0)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    out = io.StringIO()
    meter = Meter(2.0, 6.0, out)
    meter(3.0)
    assert " 25% [#####               ] t = 3, 1 steps, 1.0 s, 3.0 s left" in out.getvalue()
    meter(6.0)
    assert out.getvalue().endswith(
        "100% [####################] t = 6, 2 steps, 2.0 s, 0.0 s left\n"
    )


# Dense output after the solve --------------------------------------------------------------------


class Tree(nn.Module):
    """The recorder's field on a pytree."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Recorder()

    def forward(self, t: Tensor, y: Any) -> Any:
        k = self.inner(t, y["a"])
        return {"a": k * torch.cos(y["b"][0]), "b": [y["b"][0].sin() + k.sum()]}


def state(tree: bool) -> tuple[nn.Module, Any, list[Tensor]]:
    """A field, an initial state and the leaves to differentiate for."""
    a = torch.tensor([0.4, -0.9], dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    func: nn.Module = Tree() if tree else Recorder()
    y0: Any = {"a": a, "b": [b]} if tree else a
    return func, y0, [a, *([b] if tree else []), *func.parameters()]


def leaves(y: Any) -> list[Tensor]:
    return [y["a"], y["b"][0]] if isinstance(y, dict) else [y]


def weighed(y: Any) -> Tensor:
    """A functional in which every element of the outputs has its own weight."""
    return torch.stack(
        [(x * torch.arange(1, x.numel() + 1).reshape(x.shape).sqrt()).sum() for x in leaves(y)]
    ).sum()


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("tree", [False, True], ids=["tensor", "pytree"])
@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dense_output_equals_a_solve_with_these_output_times(
    strategy: Strategy, direction: float, tree: bool
) -> None:
    """Values and gradients, the times' own included, in any order, on and between the nodes."""
    options: dict[str, Any] = {
        "method": strategy.method or "dopri5",
        "gradient": strategy,
        "rtol": 1e-5,
        "atol": 1e-5,
    }
    func, y0, inputs = state(tree)
    ends = direction * torch.tensor([0.2, 2.0], dtype=torch.float64)
    plain = sa.solve(func, y0, ends, dense=True, **options)
    node = float(plain.steps[1])
    inner = [0.21 * direction, 0.9 * direction, node, 1.3 * direction, 1.31 * direction]
    inner.sort(key=lambda t: t * direction)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])

    t = torch.tensor([float(ends[0]), *inner, float(ends[1])], dtype=torch.float64)
    t.requires_grad_()
    wanted = sa.solve(func, y0, t, **options)
    picked = [x[order] for x in leaves(wanted.y)]
    shuffled = t.detach()[order].requires_grad_()
    got = plain.dense(shuffled)
    for a, b in zip(leaves(got), picked, strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 1e-13

    tree_of = (lambda x: {"a": x[0], "b": [x[1]]}) if tree else (lambda x: x[0])
    grads = torch.autograd.grad(weighed(got), [*inputs, shuffled])
    exact = torch.autograd.grad(weighed(tree_of(picked)), [*inputs, t])
    for a, b in zip(grads[:-1], exact[:-1], strict=True):
        assert relative(a, b) < 1e-12
    # The ends of a solve move it; as places of dense outputs they only move along it.
    inside = (order > 0) & (order < 6)
    assert relative(grads[-1][inside], exact[-1][order][inside]) < 1e-12


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_ends_of_a_solve_move_its_dense_output(strategy: Strategy) -> None:
    func, y0, _ = state(tree=False)
    options: dict[str, Any] = {
        "method": strategy.method or "dopri5",
        "gradient": strategy,
        "rtol": 1e-3,
        "atol": 1e-3,
    }
    t = torch.tensor([0.2, 2.0], dtype=torch.float64, requires_grad=True)
    solution = sa.solve(func, y0, t, dense=True, **options)
    at = [0.5, float(solution.steps[-2:].mean())]
    (got,) = torch.autograd.grad(weighed(solution.dense(at)), t)
    t2 = torch.tensor([0.2, *at, 2.0], dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(weighed(sa.solve(func, y0, t2, **options).y[1:3]), t2)
    assert relative(got[0], wanted[0]) < 1e-12
    if strategy.exact:
        # Moving the end moves the places of the stages, not the place of the output.
        assert abs(float(wanted[3])) > 0
        assert abs(float(got[1] - wanted[3])) < 1e-12 * abs(float(wanted[0]))


@pytest.mark.filterwarnings("ignore::symplectic_adjoint.ConvergenceWarning")
@pytest.mark.parametrize("method", METHODS)
def test_dense_output_is_there_for_every_method(method: str) -> None:
    func, y0, inputs = state(tree=False)
    solution = sa.solve(
        func, y0, [0.0, 1.0], method=method, dense=True, controller=sa.FixedGrid(step_size=0.25)
    )
    t = [0.0, 0.1, 0.25, 0.9, 1.0]
    grid = sa.FixedGrid(step_size=0.25)
    wanted = sa.solve(func, y0, t, method=method, controller=grid).y
    got = solution.dense(t)
    assert relative(got, wanted) < 1e-13
    for a, b in zip(
        torch.autograd.grad(weighed(got), inputs),
        torch.autograd.grad(weighed(wanted), inputs),
        strict=True,
    ):
        assert relative(a, b) < 1e-12


def test_dense_output_has_the_shape_of_its_times() -> None:
    func, y0, _ = state(tree=False)
    solution = sa.solve(func, y0, [0.0, 1.0], dense=True)
    assert solution.dense(0.5).shape == (2,)
    assert solution.dense(torch.tensor(0.5)).shape == (2,)
    assert solution.dense([0.5]).shape == (1, 2)
    assert solution.dense(torch.zeros(0)).shape == (0, 2)
    assert solution.dense(torch.full((3, 4), 0.5)).shape == (3, 4, 2)


def test_dense_output_may_be_asked_for_and_differentiated_again_and_again() -> None:
    func, y0, inputs = state(tree=False)
    solution = sa.solve(func, y0, [0.0, 0.6, 1.0], dense=True)
    first = torch.autograd.grad(solution.dense(0.3).sum(), inputs)
    torch.autograd.grad(solution.y.sum(), inputs)
    again = torch.autograd.grad(solution.dense(0.3).sum(), inputs)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_keeping_the_steps_changes_neither_solution_nor_gradient(strategy: Strategy) -> None:
    func, y0, inputs = state(tree=False)
    results = []
    for dense in (False, True):
        solution = sa.solve(
            func,
            y0,
            [0.0, 0.3, 1.0],
            dense=dense,
            gradient=strategy,
            method=strategy.method,
            rtol=1e-4,
        )
        results.append([solution.y, *torch.autograd.grad(solution.y.sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_dense_output_needs_no_gradient() -> None:
    func, y0, _ = state(tree=False)
    with torch.no_grad():
        solution = sa.solve(func, y0, [0.0, 1.0], dense=True)
        wanted = sa.solve(func, y0, [0.0, 0.4, 1.0]).y[1]
        assert torch.allclose(solution.dense(0.4), wanted, rtol=1e-14)
    assert not solution.dense(0.4).requires_grad


@pytest.mark.parametrize("t", [-0.1, 1.1, [0.5, 2.0], math.nan])
def test_dense_output_outside_the_interval_is_refused(t: Any) -> None:
    func, y0, _ = state(tree=False)
    solution = sa.solve(func, y0, [0.0, 1.0], dense=True)
    with pytest.raises(sa.ArgumentError, match="outside the solved interval"):
        solution.dense(t)


def test_dense_output_must_have_been_asked_for() -> None:
    func, y0, _ = state(tree=False)
    with pytest.raises(sa.ArgumentError, match="dense=True"):
        sa.solve(func, y0, [0.0, 1.0]).dense(0.5)
