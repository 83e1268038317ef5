"""Data as a function of time, and its gradient inside a solve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline, CubicSpline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.gradients import Strategy
from tests import problems
from tests.conformance import reference
from tests.conformance.registry import label, strategies

Make = Callable[[Any, Tensor], sa.Interpolation]

KINDS: dict[str, Make] = {
    "linear": sa.Interpolation.linear,
    "hermite": sa.Interpolation.hermite,
    "natural_cubic": sa.Interpolation.natural_cubic,
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
EXACT = strategies(exact=True)


def irregular(count: int, *batch: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Times (T,) and data (*batch, T, channels)."""
    t = torch.rand(count, dtype=torch.float64).cumsum(0) - 0.3
    return t, torch.randn(*batch, count, channels, dtype=torch.float64)


def around(t: Tensor) -> Tensor:
    """Times within all pieces, on the knots, and outside."""
    return torch.cat([torch.linspace(float(t[0]) - 0.1, float(t[-1]) + 0.1, 40).double(), t])


def assert_close(got: Tensor, wanted: Any) -> None:
    wanted = torch.as_tensor(np.ascontiguousarray(wanted))
    assert got.shape == wanted.shape
    assert problems.relative_error(got, wanted) <= 1e-14


@pytest.mark.parametrize("count", [2, 3, 4, 5, 33, 1000])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_natural_cubic_splines_equal_scipys(count: int, batch: tuple[int, ...]) -> None:
    t, x = irregular(count, *batch)
    spline, at = sa.Interpolation.natural_cubic(t, x), around(t)
    theirs = CubicSpline(t.numpy(), np.moveaxis(x.numpy(), -2, 0), bc_type="natural")
    assert_close(spline(at), theirs(at.numpy()))
    assert_close(spline.derivative(at), theirs(at.numpy(), 1))


@pytest.mark.parametrize("count", [2, 3, 20])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_hermite_splines_have_the_slope_of_the_line_that_leads_to_each_knot(
    count: int, batch: tuple[int, ...]
) -> None:
    t, x = irregular(count, *batch)
    spline, at = sa.Interpolation.hermite(t, x), around(t)
    first = np.moveaxis(x.numpy(), -2, 0)
    lines = np.diff(first, axis=0) / np.diff(t.numpy()).reshape(-1, *[1] * (x.ndim - 1))
    theirs = CubicHermiteSpline(t.numpy(), first, np.concatenate([lines[:1], lines]))
    assert_close(spline(at), theirs(at.numpy()))
    assert_close(spline.derivative(at), theirs(at.numpy(), 1))


def test_linear_interpolation_equals_numpys() -> None:
    t, x = irregular(9, 2)
    line = sa.Interpolation.linear(t, x)
    at = torch.linspace(float(t[0]), float(t[-1]), 50, dtype=torch.float64)
    wanted = np.empty((50, 2, 3))
    for i, c in itertools.product(range(2), range(3)):
        wanted[:, i, c] = np.interp(at.numpy(), t.numpy(), x[i, :, c].numpy())
    assert_close(line(at), wanted)
    middles = (t[1:] + t[:-1]) / 2
    assert_close(line.derivative(middles).movedim(0, -2), x.diff(dim=-2) / t.diff().unsqueeze(-1))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_the_path_goes_through_the_data(make: Make, dtype: torch.dtype) -> None:
    t, x = irregular(6, 4)
    t, x = t.to(dtype.to_real()), (x * (1 + 0.5j)).to(dtype) if dtype.is_complex else x.to(dtype)
    values = make(t, x)(t)
    assert values.dtype == dtype
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(values.movedim(0, -2), x, rtol=tolerance, atol=tolerance)


@kinds
def test_a_time_of_any_shape_or_a_number_leads_the_shape_of_the_result(make: Make) -> None:
    t, x = irregular(5, 4)
    path = make(t, x)
    for evaluate in (path, path.derivative):
        single = evaluate(torch.tensor(0.5, dtype=torch.float64))
        assert single.shape == (4, 3)
        assert torch.equal(evaluate(0.5), single)
        several = evaluate(torch.tensor([[0.1, 0.5, 0.9]] * 2, dtype=torch.float64))
        assert several.shape == (2, 3, 4, 3)
        assert torch.equal(several[1, 1], single)


@kinds
def test_on_a_knot_the_piece_to_the_right_holds_in_the_dtype_of_the_time(make: Make) -> None:
    t, x = torch.arange(40, dtype=torch.float64) / 3, torch.randn(40, 3, dtype=torch.float64)
    path = make(t, x)
    for dtype in (torch.float32, torch.float64):
        knot = t.to(dtype)[20]
        beyond = torch.nextafter(knot, torch.tensor(math.inf, dtype=dtype))
        left, here, right = (path.derivative(u) for u in (2 * knot - beyond, knot, beyond))
        assert problems.relative_error(here, right) < 1e-4
        jumps = make is sa.Interpolation.linear
        assert (problems.relative_error(here, left) > 1e-2) is jumps


@kinds
def test_derivatives_with_respect_to_data_times_and_place_pass_gradcheck(make: Make) -> None:
    t, x = irregular(5, 2, channels=1)
    at = (torch.rand(3, dtype=torch.float64) * (t[-1] - t[0]) + t[0]).requires_grad_()

    def both(t: Tensor, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        path = make(t, x)
        return path(at), path.derivative(at)

    inputs = (t.requires_grad_(), x.requires_grad_(), at)
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


# torch's own decompositions for forward mode are scripted.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@kinds
def test_vmap_and_forward_mode_go_through_an_evaluation(make: Make) -> None:
    t, x = irregular(5, 2)
    path, at = make(t, x), torch.tensor([0.2, 0.4, 1.0], dtype=torch.float64)
    assert torch.equal(torch.vmap(path)(at), path(at))
    slope = torch.func.vmap(torch.func.jacfwd(path))(at)
    torch.testing.assert_close(slope, path.derivative(at), rtol=1e-13, atol=1e-13)


@kinds
def test_a_path_may_be_made_and_solved_with_under_vmap(make: Make) -> None:
    t, x = irregular(5, 3)
    times = t * torch.tensor([[1.0], [1.1], [0.9]], dtype=torch.float64)

    def end(t: Tensor, x: Tensor) -> Any:
        path = make(t, x)
        y0 = torch.zeros(3, dtype=torch.float64)
        return sa.odeint(lambda s, y: path(s) - y, y0, [0.0, 1.0], rtol=1e-3, atol=1e-3)[-1]

    one_by_one = torch.stack([end(*pair) for pair in zip(times, x, strict=True)])
    assert problems.relative_error(torch.vmap(end)(times, x), one_by_one) <= 1e-14


class Held(nn.Module):
    """A controlled equation: ``dz = tanh(z W) dX + X(t)``, with the path as an argument or within.

    Three channels control a state of shape (batch, 3).
    """

    def __init__(self, path: sa.Interpolation | None = None) -> None:
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor, path: sa.Interpolation | None = None) -> Tensor:
        path = path or self.path
        assert path is not None
        return torch.tanh(z @ self.weight) * path.derivative(t) + path(t)


def given_as_args(path: sa.Interpolation) -> tuple[Any, tuple[Any, ...], Tensor]:
    func = Held()
    return func, (path,), func.weight


def inside_args(path: sa.Interpolation) -> tuple[Any, tuple[Any, ...], Tensor]:
    func = Held()
    return lambda t, z, held: func(t, z, held["path"][0]), ({"path": [path]},), func.weight


def in_a_closure(path: sa.Interpolation) -> tuple[Any, tuple[Any, ...], Tensor]:
    func = Held()
    return lambda t, z: func(t, z, path), (), func.weight


def in_a_module(path: sa.Interpolation) -> tuple[Any, tuple[Any, ...], Tensor]:
    func = Held(path)
    return func, (), func.weight


PLACES = [given_as_args, inside_args, in_a_closure, in_a_module]


@pytest.mark.parametrize("strategy", EXACT, ids=label)
@pytest.mark.parametrize(
    ("make", "place"),
    [
        *itertools.product(KINDS.values(), [given_as_args]),
        *itertools.product([sa.Interpolation.hermite], PLACES[1:]),
    ],
)
def test_gradients_of_a_solve_reach_the_data_and_their_times_exactly(
    make: Make, strategy: Strategy, place: Callable[..., Any]
) -> None:
    t, x = irregular(6, 2)
    inputs = {"t": t.requires_grad_(), "x": x.requires_grad_()}
    func, args, inputs["weight"] = place(make(t, x))
    inputs["z0"] = z0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    method = strategy.method or "bosh3"
    span = torch.tensor([0.0, 0.7, 1.5], dtype=torch.float64)
    controller = sa.FixedGrid(step_size=0.2) if strategy.method else sa.Adaptive()
    sol = sa.solve(
        func,
        z0,
        span,
        args=args,
        method=method,
        rtol=1e-2,
        atol=1e-2,
        controller=controller,
        gradient=strategy,
    )
    times = list(span)
    nodes = reference.adaptive_nodes(sol.steps, times)
    wanted = reference.frozen(steppers.get(method), func, z0, nodes, times, args)
    for name, x in inputs.items():
        (got,) = torch.autograd.grad(problems.loss(sol.y), x, retain_graph=True)
        (right,) = torch.autograd.grad(problems.loss(wanted), x, retain_graph=True)
        assert problems.size(right) > 1e-3
        assert problems.relative_error(got, right) <= 1e-12, name


class Reads(TorchDispatchMode):
    """Counts what copies a value from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
        return func(*args, **(kwargs or {}))


@kinds
def test_an_evaluation_reads_nothing_back_from_the_device(make: Make) -> None:
    t, x = irregular(6, 2)
    at = torch.tensor(0.4, dtype=torch.float64)
    with Reads() as reads:
        assert make(t, x)(0.4).isfinite().all()
    assert reads.count > 0  # the constructor checks its data, and assert reads its result
    path = make(t, x.requires_grad_())
    with Reads() as reads:
        (path(at) * path.derivative(at)).sum().backward()
    assert reads.count == 0


@kinds
def test_a_path_moves_with_its_module_and_is_no_part_of_its_state(make: Make) -> None:
    func = Held(make(*irregular(4)))
    assert list(func.state_dict()) == ["weight"]
    assert func.float()(torch.tensor(0.1), torch.zeros(3)).dtype == torch.float32
    degree = 1 if make is sa.Interpolation.linear else 3
    assert repr(func.path) == f"Interpolation(knots=4, degree={degree}, shape=(3,))"


def test_a_path_may_be_built_from_coefficients() -> None:
    knots = torch.tensor([0.0, 1.0, 3.0])
    steps = sa.Interpolation(knots, torch.tensor([[[2.0]], [[5.0]]]))
    assert steps(torch.tensor([0.5, 1.0, 2.0])).flatten().tolist() == [2.0, 5.0, 5.0]
    assert steps.derivative(torch.tensor(0.5)).tolist() == [0.0]
    with pytest.raises(sa.ArgumentError, match=r"but are \(3, 1, 1\) for knots of shape \(3,\)"):
        sa.Interpolation(knots, torch.zeros(3, 1, 1))


NAN = math.nan
GAPS = torch.tensor([NAN, 1.0, NAN, NAN, 7.0, NAN], dtype=torch.float64)


@pytest.mark.parametrize(
    ("how", "filled"),
    [("linear", [1.0, 1.0, 2.0, 5.0, 7.0, 7.0]), ("forward", [1.0, 1.0, 1.0, 1.0, 7.0, 7.0])],
)
def test_missing_values_are_filled_in_each_series_by_itself(how: Any, filled: list[float]) -> None:
    t = torch.tensor([0.0, 1.0, 2.0, 5.0, 7.0, 8.0], dtype=torch.float64)
    whole = torch.arange(6.0, dtype=torch.float64)
    x = torch.stack([torch.stack([GAPS, whole], dim=-1)] * 2)
    wanted = torch.stack([torch.tensor(filled, dtype=torch.float64), whole], dim=-1)
    torch.testing.assert_close(sa.fill_missing(t, x, how), wanted.expand(2, 6, 2))


def test_gradients_of_filled_values_go_to_the_observations() -> None:
    t = torch.tensor([0.0, 1.0, 2.0, 5.0, 7.0, 8.0], dtype=torch.float64, requires_grad=True)
    x = GAPS.unsqueeze(-1).clone().requires_grad_()
    gx, gt = torch.autograd.grad(sa.fill_missing(t, x)[[0, 2, 3]].sum(), [x, t])
    # 1 + (1 + 1/6 * 6) + (1 + 4/6 * 6): weights 1, 5/6, 2/6 on the first and 1/6, 4/6 on the second
    torch.testing.assert_close(gx.flatten(), torch.tensor([0, 13 / 6, 0, 0, 5 / 6, 0]).double())
    torch.testing.assert_close(gt, torch.tensor([0, -7 / 6, 1, 1, -5 / 6, 0]).double())


def test_unusable_data_are_refused() -> None:
    t, x = irregular(4, 2)
    make = sa.Interpolation.linear
    bad: list[tuple[Any, Any, str]] = [
        (t.flip(0), x, "strictly increasing"),
        (t[:1], x[:, :1], "at least two"),
        (t.unsqueeze(0), x, "must be 1-D"),
        (t, x[:, :3], r"T = 4 times, but has shape \(2, 3, 3\)"),
        (t, x[0, :, 0], r"a single series of shape \(T,\) is x.unsqueeze"),
        (t, x.long(), "floating-point or complex"),
        (
            t,
            torch.where(x == x[1, 2, 0], math.nan, x),
            r"x\[1, 2, 0\] = nan .* fill_missing",
        ),
        (t, torch.where(x == x[0, 3, 1], -math.inf, x), r"x\[0, 3, 1\] = -inf is not finite"),
    ]
    for times, data, message in bad:
        with pytest.raises(sa.ArgumentError, match=message):
            make(times, data)
    with pytest.raises(sa.ArgumentError, match=r"the series \(1, 2\) of x has no observation"):
        sa.fill_missing(t, torch.where(x == x[1:, :, 2:], math.nan, x))
    with pytest.raises(sa.ArgumentError, match=r"x\[1, 2, 0\] = nan"):
        torch.vmap(lambda x: make(t, x)(0.0))(torch.where(x == x[1, 2, 0], math.nan, x))
    with pytest.raises(sa.UnknownNameError, match="did you mean 'linear'"):
        sa.fill_missing(t, x, "liner")  # type: ignore[arg-type]
