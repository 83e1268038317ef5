"""torchdiffeq's functions, options and callbacks: what they say they mean, and how they differ.

Where both mean the same the numbers are compared with torchdiffeq's; every deliberate difference
that docs/torchdiffeq.md lists is asserted.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import symplectic_adjoint as sa
from tests import problems

F64 = torch.float64


class Decay(nn.Module):
    """``y' = rate y + sin t`` with a parameter that it does not use; it keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([-0.7, 0.4], dtype=F64))
        self.unused = nn.Parameter(torch.ones(3, dtype=F64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rate * y + torch.sin(t)


class Told(Decay):
    """Writes down every callback: its name, time, state and size."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, float, Any, float]] = []

    def note(self, name: str, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.told.append((name, float(t0), y0, float(dt)))

    def callback_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.note("step", t0, y0, dt)

    def callback_accept_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.note("accept", t0, y0, dt)

    def callback_reject_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.note("reject", t0, y0, dt)

    def callback_step_adjoint(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.note("step back", t0, y0, dt)

    def callback_accept_step_adjoint(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.note("accept back", t0, y0, dt)


def y0(wants_grad: bool = False) -> Tensor:
    return torch.tensor([1.0, -0.5], dtype=F64, requires_grad=wants_grad)


def times(decreasing: bool = False) -> Tensor:
    t = torch.tensor([0.0, 0.3, 0.35, 1.1, 2.0], dtype=F64)
    return t.flip(0) if decreasing else t


@pytest.mark.parametrize("decreasing", [False, True], ids=["increasing", "decreasing"])
@pytest.mark.parametrize(
    "options",
    [{}, {"step_size": 0.25}, {"step_size": 0.25, "interp": "cubic"}, {"perturb": True}],
    ids=str,
)
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4"])
def test_fixed_steps_are_torchdiffeqs(
    method: str, options: dict[str, Any], decreasing: bool
) -> None:
    args: Any = (Decay(), y0(), times(decreasing))
    with torch.no_grad():
        ours = sa.odeint(*args, method=method, options=options)
        theirs = torchdiffeq.odeint(*args, method=method, options=options)
    assert problems.relative_error(ours, theirs) < 1e-13


@pytest.mark.parametrize("decreasing", [False, True], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("method", ["dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"])
def test_adaptive_solutions_are_torchdiffeqs_within_tolerance(
    method: str, decreasing: bool
) -> None:
    args: Any = (Decay(), y0(), times(decreasing))
    with torch.no_grad():
        ours = sa.odeint(*args, method=method, rtol=1e-5, atol=1e-6)
        theirs = torchdiffeq.odeint(*args, method=method, rtol=1e-5, atol=1e-6)
    assert problems.relative_error(ours, theirs) < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.01, "safety": 0.8, "ifactor": 4.0, "dfactor": 0.5},
        {"max_num_steps": 1000, "min_step": 1e-6, "max_step": 0.2},
        {"step_t": torch.tensor([0.4, 0.9], dtype=F64)},
        {"jump_t": torch.tensor([0.4, 0.9], dtype=F64), "dtype": torch.float64},
        {"norm": lambda x: x.abs().max()},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_documented_option_of_adaptive_methods_is_accepted(options: dict[str, Any]) -> None:
    args: Any = (Decay(), y0(), times())
    with torch.no_grad():
        ours = sa.odeint(*args, method="dopri5", options=options)
        theirs = torchdiffeq.odeint(*args, method="dopri5", options=options)
    assert problems.relative_error(ours, theirs) < 1e-6


def test_a_norm_receives_a_state_like_y0_and_may_return_a_number() -> None:
    seen = []

    def norm(state: Any) -> float:
        seen.append([x.shape for x in state])
        return max(float(x.abs().max()) for x in state)

    def func(t: Tensor, state: Any) -> Any:
        a, b = state
        return -a, a.sum() * b

    state = (torch.ones(2, 2), torch.ones(()))
    sol = sa.odeint(func, state, [0.0, 1.0], options={"norm": norm})
    assert [x.shape for x in sol] == [(2, 2, 2), (2,)]
    assert seen
    assert all(shapes == [(2, 2), ()] for shapes in seen)


def test_the_default_norm_of_a_tuple_is_the_largest_of_its_parts() -> None:
    """A wide leaf at rest does not hide the error of a narrow one, as in torchdiffeq."""

    def solve(odeint: Any) -> Any:
        def func(t: Tensor, state: Any) -> Any:
            calls.append(None)
            return torch.zeros_like(state[0]), torch.cos(5 * t) * state[1]

        calls: list[None] = []
        state = (torch.zeros(10_000, dtype=F64), torch.ones(1, dtype=F64))
        options = {"rtol": 1e-6, "atol": 1e-6, "method": "dopri5"}
        t = torch.tensor([0.0, 2.0], dtype=F64)
        return odeint(func, state, t, **options)[1][-1], len(calls)

    (ours, count), (theirs, their_count) = solve(sa.odeint), solve(torchdiffeq.odeint)
    assert problems.relative_error(ours, theirs) < 1e-5
    assert count == pytest.approx(their_count, abs=8)


@pytest.mark.parametrize("tolerance", [(1e-3, 1e-9), [1e-3, torch.tensor(1e-9)]], ids=str)
def test_each_part_of_a_tuple_may_have_its_tolerance(tolerance: Any) -> None:
    def func(t: Tensor, state: Any) -> Any:
        return -state[0], -state[1]

    state = (torch.ones(3, dtype=F64), torch.ones(1, dtype=F64))
    t = torch.tensor([0.0, 1.0], dtype=F64)
    _, fine = sa.odeint(func, state, t, rtol=tolerance, atol=tolerance)
    assert abs(float(fine[-1]) - math.exp(-1)) < 1e-8


def test_odeint_adjoint_is_exact_unless_an_adjoint_argument_asks_for_the_continuous_adjoint() -> (
    None
):
    def gradient(odeint: Any, **kwargs: Any) -> Tensor:
        func = Decay()
        y = odeint(func, y0(), times(), rtol=1e-3, atol=1e-3, **kwargs)
        return torch.autograd.grad(y.square().sum(), func.rate)[0]

    exact = gradient(sa.odeint, gradient="backprop")
    assert problems.relative_error(gradient(sa.odeint_adjoint), exact) < 1e-12
    asked: list[dict[str, Any]] = [
        {"adjoint_rtol": 1e-5},
        {"adjoint_atol": 1e-5},
        {"adjoint_method": "bosh3"},
        {"adjoint_options": {"norm": "seminorm"}},
        {"adjoint_options": {"norm": lambda parts: max(x.abs().max() for x in parts)}},
        {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.1}},
    ]
    for kwargs in asked:
        error = problems.relative_error(gradient(sa.odeint_adjoint, **kwargs), exact)
        assert 1e-9 < error < 0.05, kwargs
    fine = {"adjoint_rtol": 1e-9, "adjoint_atol": 1e-9}
    ours = gradient(sa.odeint_adjoint, **fine)
    assert problems.relative_error(ours, gradient(torchdiffeq.odeint_adjoint, **fine)) < 1e-3


@pytest.mark.parametrize("kwargs", [{}, {"adjoint_rtol": 1e-4}], ids=["exact", "continuous"])
def test_unused_parameters_get_zeros_from_odeint_adjoint_alone(kwargs: dict[str, Any]) -> None:
    func = Decay()
    sa.odeint_adjoint(func, y0(), times(), **kwargs).sum().backward()
    assert func.unused.grad is not None
    assert func.unused.grad.tolist() == [0.0, 0.0, 0.0]
    func.zero_grad()
    sa.odeint(func, y0(), times()).sum().backward()
    assert func.unused.grad is None


def test_adjoint_params_restrict_the_gradients_and_may_be_empty() -> None:
    func = Decay()
    state = y0(wants_grad=True)
    sa.odeint_adjoint(func, state, times(), adjoint_params=(func.unused,)).sum().backward()
    assert func.rate.grad is None
    assert func.unused.grad is not None
    whole = torch.autograd.grad(sa.odeint(func, state, times()).sum(), state)[0]
    assert state.grad is not None
    assert problems.relative_error(state.grad, whole) < 1e-13
    alone = sa.odeint_adjoint(func, y0(), times(), adjoint_params=())
    assert not alone.requires_grad


def test_any_callable_serves_odeint_adjoint() -> None:
    rate = torch.tensor(-0.3, dtype=F64, requires_grad=True)
    sa.odeint_adjoint(lambda t, y: rate * y, torch.ones(1, dtype=F64), [0.0, 1.0]).sum().backward()
    assert rate.grad is not None
    assert rate.grad.item() == pytest.approx(math.exp(-0.3), rel=1e-6)
    with pytest.raises(ValueError, match=r"nn\.Module"):
        torchdiffeq.odeint_adjoint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))


def test_options_cannot_serve_another_adjoint_method() -> None:
    with pytest.raises(sa.ArgumentError, match="adjoint_options"):
        sa.odeint_adjoint(
            Decay(), y0(), times(), method="rk4", options={"step_size": 0.1}, adjoint_method="bosh3"
        )


@pytest.mark.parametrize("decreasing", [False, True], ids=["increasing", "decreasing"])
def test_callbacks_are_told_of_every_step_as_in_torchdiffeq(decreasing: bool) -> None:
    told = []
    for odeint in (sa.odeint, torchdiffeq.odeint):
        func = Told()
        with torch.no_grad():
            odeint(func, y0(), times(decreasing), rtol=1e-6, atol=1e-6, options={"first_step": 1.9})
        told.append(func.told)
    ours, theirs = told
    start = float(times(decreasing)[0])
    names = [name for name, *_ in ours]
    assert names.count("reject") > 0
    # Until theirs runs past t[-1], at which ours ends.
    inside = [*itertools.takewhile(lambda entry: 2.0 - abs(entry[1] - start) > entry[3], theirs)]
    assert len(inside) > 6
    for mine, other in zip(ours, inside, strict=False):
        assert mine[0] == other[0]
        assert mine[1] == pytest.approx(other[1], abs=1e-9)
        assert mine[3] == pytest.approx(other[3], rel=1e-6)
        assert problems.relative_error(mine[2], other[2]) < 1e-7
    end = ours[-1][1] + math.copysign(ours[-1][3], -1.0 if decreasing else 1.0)
    assert end == pytest.approx(float(times(decreasing)[-1]))


def test_callbacks_see_the_states_of_a_tuple_once_for_each_step() -> None:
    """A tensor that func hides makes the solve start again; nothing is told twice."""
    seen = []

    class Hidden:
        rate = torch.tensor(-0.5, requires_grad=True)

    def func(t: Tensor, state: Any) -> Any:
        return (state[0] * Hidden.rate if t > 0.5 else -state[0], -state[1])

    func.callback_step = lambda t0, y, dt: seen.append((float(t0), [x.shape for x in y]))  # type: ignore[attr-defined]
    state = (torch.ones(2), torch.ones(1))
    t = torch.linspace(0.0, 1.0, 5)
    sa.odeint(func, state, t, method="rk4")[0].sum().backward()
    assert seen == [(x, [(2,), (1,)]) for x in t[:-1].tolist()]


@pytest.mark.parametrize("kwargs", [{}, {"adjoint_rtol": 1e-4}], ids=["exact", "continuous"])
def test_adjoint_callbacks_are_told_of_the_steps_backwards(kwargs: dict[str, Any]) -> None:
    func = Told()
    y = sa.odeint_adjoint(func, y0(), times()[[0, -1]], rtol=1e-4, atol=1e-4, **kwargs)
    forward = [entry for entry in func.told if entry[0] == "accept"]
    func.told.clear()
    y.square().sum().backward()
    back = [entry for entry in func.told if entry[0] == "accept back"]
    starts = [t for _, t, _, _ in back]
    assert starts == sorted(starts, reverse=True)
    assert starts[0] == 2.0
    assert back[-1][1] - back[-1][3] == pytest.approx(0.0, abs=1e-12)
    _, first, lam, *params = back[0][2]
    assert torch.equal(first, y[-1].detach())
    assert torch.equal(lam, 2 * y[-1].detach())
    assert {tuple(x.shape) for x in params} == {(2,), (3,)}
    if not kwargs:
        sizes = [dt for *_, dt in reversed(back)]
        assert sizes == pytest.approx([dt for *_, dt in forward])


def test_odeint_dense_is_a_differentiable_function_of_time() -> None:
    func, state = Decay(), y0(wants_grad=True)
    t0, t1 = torch.tensor(0.2, dtype=F64, requires_grad=True), torch.tensor(1.4, dtype=F64)
    solution = sa.odeint_dense(func, state, t0, t1, method="dopri5")
    at = torch.tensor([0.9, 0.25, 1.4], dtype=F64)
    theirs = torchdiffeq.odeint_dense(func, state.detach(), t0.detach(), t1)
    for t in at[:2]:
        assert problems.relative_error(solution(t).detach(), theirs(t).detach()) < 1e-6
    got = torch.autograd.grad(solution(at).sum(), [state, func.rate, t0])
    order = [1, 0, 2]
    t = torch.cat([t0.reshape(1), at[order]])
    wanted = torch.autograd.grad(
        sa.odeint(func, state, t, gradient="backprop")[1:].sum(), [state, func.rate, t0]
    )
    for mine, other in zip(got, wanted, strict=True):
        assert problems.relative_error(mine, other) < 1e-12


@pytest.mark.parametrize(
    ("t", "dtype"),
    [
        (torch.tensor([0, 1, 2]), F64),
        (torch.tensor([0.0, 1.0, 2.0], dtype=torch.float32), F64),
        (torch.tensor([0.0, 1.0, 2.0], dtype=F64), torch.float32),
        ([2.0, 1.0, 0.0], torch.complex128),
    ],
    ids=["integer t", "float32 t", "float64 t with float32 state", "complex state"],
)
def test_times_and_states_of_any_dtype(t: Any, dtype: torch.dtype) -> None:
    state = torch.ones((), dtype=dtype, requires_grad=True)
    y = sa.odeint_adjoint(lambda t, y: -y, state, t)
    assert y.dtype == dtype
    assert y.shape == (3,)
    span = float(t[-1] - t[0])
    assert abs(y[-1].detach() - math.exp(-span)) < 1e-4 * math.exp(-span)
    y[-1].abs().backward()
    assert state.grad is not None
    assert abs(state.grad - math.exp(-span)) < 1e-4 * math.exp(-span)


def test_one_time_gives_the_initial_state() -> None:
    assert torch.equal(sa.odeint(Decay(), y0(), torch.tensor([0.5])), y0().unsqueeze(0))


def test_t_has_a_gradient_under_odeint_adjoint_as_in_torchdiffeq() -> None:
    found = []
    for odeint in (sa.odeint_adjoint, torchdiffeq.odeint_adjoint):
        t = times().requires_grad_()
        y = odeint(Decay(), y0(), t, rtol=1e-9, atol=1e-9)
        found.append(torch.autograd.grad(y[:, 0].square().sum(), t)[0])
    assert problems.relative_error(*found) < 1e-5


# Deliberate differences ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"options": {"step_sise": 0.1}, "method": "rk4"}, "did you mean 'step_size'"),
        ({"options": {"step_size": 0.1}, "method": "dopri5"}, "option of method 'dopri5'"),
        ({"options": ["step_size"]}, "must be a dict"),
        ({"options": {"norm": "seminorm"}}, "adjoint_options"),
        ({"options": {"first_step": "small"}}, "first_step"),
        ({"options": {"dtype": "float32"}}, "dtype"),
        ({"options": {"perturb": "yes"}, "method": "rk4"}, "perturb"),
        ({"options": {"grid_constructor": 3}, "method": "rk4"}, "grid_constructor"),
        ({"options": {"interp": "quintic"}, "method": "rk4"}, "interp"),
        ({"rtol": "tight"}, "rtol"),
        ({"atol": "1e-3"}, "atol"),
        ({"rtol": torch.tensor(1e-3, requires_grad=True)}, "rtol requires grad"),
        ({"rtol": (1e-3, 1e-3)}, "rtol"),
    ],
    ids=str,
)
def test_what_torchdiffeq_warns_of_or_crashes_on_is_a_typed_error(
    kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(sa.ArgumentError, match=message):
        sa.odeint(Decay(), y0(), times(), **kwargs)


@pytest.mark.parametrize(
    "options", [{"norm": "mixed"}, {"norm": 2}, {"step_size": 0.1}, "seminorm"], ids=str
)
def test_a_bad_adjoint_option_is_named(options: Any) -> None:
    with pytest.raises(sa.ArgumentError):
        sa.odeint_adjoint(Decay(), y0(), times(), adjoint_options=options)


def test_unknown_options_only_warn_in_torchdiffeq() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torchdiffeq.odeint(Decay(), y0(), times(), method="dopri5", options={"step_size": 0.1})
    assert any("Unexpected arguments" in str(w.message) for w in caught)


def test_the_step_limit_holds_for_the_whole_solve() -> None:
    t = torch.linspace(0.0, 2.0, 40, dtype=F64)
    options = {"max_num_steps": 5, "max_step": 0.1}
    torchdiffeq.odeint(Decay(), y0(), t, method="dopri5", options=options)  # counts per interval
    with pytest.raises(sa.StepLimitError):
        sa.odeint(Decay(), y0(), t, options=options)


@pytest.mark.parametrize("method", ["adaptive_heun", "fehlberg2"])
def test_a_method_without_the_fsal_property_evaluates_its_new_point(method: str) -> None:
    """torchdiffeq goes on with the last stage, which lies elsewhere: its error is larger."""
    exact = math.exp(-2.0)
    errors = []
    for odeint in (sa.odeint, torchdiffeq.odeint):
        y = odeint(
            lambda t, y: -y,
            torch.ones(1, dtype=F64),
            torch.tensor([0.0, 2.0], dtype=F64),
            rtol=1e-6,
            atol=1e-8,
            method=method,
        )
        errors.append(abs(float(y[-1]) - exact))
    assert errors[0] != errors[1]


def test_accept_callbacks_are_called_for_fixed_steps_as_well() -> None:
    func = Told()
    sa.odeint(func, y0(), times(), method="rk4")
    assert [name for name, *_ in func.told] == ["step", "accept"] * 4


def test_leaves_of_a_tuple_keep_their_dtypes() -> None:
    state = (torch.ones(1, dtype=torch.float32), torch.ones(1, dtype=F64))
    sol = sa.odeint(lambda t, y: (-y[0], -y[1]), state, [0.0, 1.0])
    assert [x.dtype for x in sol] == [torch.float32, F64]
