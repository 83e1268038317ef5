"""Implicit methods: order, stability, stiff problems, and how their equations are solved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import gradients, steppers, tableaus
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.loop import SolveShape
from symplectic_adjoint.memory import peak_memory
from symplectic_adjoint.rootfind import Jacobian, Newton, NoConvergence, StageSystem, gmres
from symplectic_adjoint.steppers import ImplicitRK
from tests import problems
from tests.conformance.registry import IMPLICIT, label, pairs, strategies

KRYLOV = Newton(dense_below=0)


def method(name: str, **options: Any) -> ImplicitRK:
    return ImplicitRK(tableaus.get(name), newton=Newton(**options))


# --- order and stability -----------------------------------------------------------------


@pytest.mark.parametrize("name", IMPLICIT)
def test_every_method_has_its_order_on_a_non_autonomous_problem(name: str) -> None:
    """gl4 among them, which converges with order one in torchdiffeq."""
    known = problems.known()
    order = tableaus.get(name).order
    errors = []
    for steps in (64, 128) if order < 4 else (12, 24):
        t = torch.linspace(*known.span, steps + 1, dtype=torch.float64)
        y = sa.odeint(known.func, known.solution(t[0]), t, method=name)
        errors.append(float((y - known.solution(t)).norm(dim=-1).max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", IMPLICIT)
def test_only_l_stable_methods_forget_a_wrong_start_at_once(name: str) -> None:
    """Steps 1e5 times as long as the fast time scale, from a value far off the slow solution."""
    t = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
    y0 = torch.tensor([2.0], dtype=torch.float64)
    y = sa.odeint(lambda t, y: -1e6 * (y - torch.cos(t)), y0, t, method=name)
    off = float((y[1:, 0] - torch.cos(t[1:])).abs().max())
    damps = {"implicit_euler", "radauIIA3", "radauIIA5", "sdirk2", "trbdf2"}
    assert off < 1e-4 if name in damps else off > 0.9


@pytest.mark.parametrize(
    ("name", "conserves"),
    [("gl4", True), ("gl6", True), ("implicit_midpoint", True), ("radauIIA5", False)],
)
def test_gauss_methods_conserve_quadratic_invariants(name: str, conserves: bool) -> None:
    """The free rigid body: energy and angular momentum, both quadratic."""
    inertia = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def spin(t: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.cross(y, y / inertia)

    y0 = torch.tensor([1.0, 0.3, 1.5], dtype=torch.float64)
    y = sa.odeint(spin, y0, torch.linspace(0.0, 30.0, 101, dtype=torch.float64), method=name)
    assert float((y[-1] - y0).norm()) > 0.1
    for invariant in (y.square().sum(-1), (y.square() / inertia).sum(-1)):
        drift = float((invariant - invariant[0]).abs().max())
        assert drift < 1e-12 if conserves else drift > 1e-8


# --- stiff problems ----------------------------------------------------------------------


def robertson(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    slow, fast, back = rates
    loss = slow * y[0] - back * y[1] * y[2]
    gain = fast * y[1].square()
    return torch.stack([-loss, loss - gain, gain])


RATES = (0.04, 3e7, 1e4)


def reference_robertson(end: float) -> tuple[list[float], list[list[float]]]:
    """Solution and its sensitivities to the rates, by scipy's Radau on the variational equation."""
    integrate = pytest.importorskip("scipy.integrate")
    numpy = pytest.importorskip("numpy")
    k1, k2, k3 = RATES

    def slope(t: float, z: Any) -> Any:
        a, b, c = z[:3]
        s = z[3:].reshape(3, 3)
        jac = numpy.array(
            [
                [-k1, k3 * c, k3 * b],
                [k1, -k3 * c - 2 * k2 * b, -k3 * b],
                [0.0, 2 * k2 * b, 0.0],
            ]
        )
        explicit = numpy.array([[-a, 0.0, b * c], [a, -b * b, -b * c], [0.0, b * b, 0.0]])
        return numpy.concatenate([jac[:, 0] * 0 + base(a, b, c), (jac @ s + explicit).ravel()])

    def base(a: float, b: float, c: float) -> Any:
        loss, gain = k1 * a - k3 * b * c, k2 * b * b
        return numpy.array([-loss, loss - gain, gain])

    start = numpy.concatenate([[1.0, 0.0, 0.0], numpy.zeros(9)])
    # Sensitivities to a rate are as large as one over the rate.
    scale = numpy.concatenate([[1e-12, 1e-16, 1e-12], numpy.tile([1e-10, 1e-19, 1e-15], 3)])
    z = integrate.solve_ivp(slope, (0.0, end), start, "Radau", rtol=1e-10, atol=scale).y[:, -1]
    return z[:3].tolist(), z[3:].reshape(3, 3).tolist()


@pytest.mark.parametrize(
    ("name", "tolerance", "most"), [("radauIIA5", 1e-6, 200), ("trbdf2", 1e-4, 150)]
)
def test_robertson_is_solved_in_few_steps_with_the_right_gradient(
    name: str, tolerance: float, most: int
) -> None:
    """Three reactions whose rates span nine decades; the reference is an independent solver."""
    end = 1e4
    rates = torch.tensor(RATES, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    sol = sa.solve(
        robertson, y0, [0.0, end], args=(rates,), method=name, rtol=tolerance, atol=tolerance * 1e-6
    )
    wanted, sensitivities = reference_robertson(end)
    assert sol.stats.accepted < most
    bound = 100 * tolerance
    assert sol.y[-1].tolist() == pytest.approx(wanted, rel=bound)
    for i in range(3):
        (grad,) = torch.autograd.grad(sol.y[-1, i], rates, retain_graph=True)
        scaled = [float(g) * rate for g, rate in zip(grad, RATES, strict=True)]
        right = [s * rate for s, rate in zip(sensitivities[i], RATES, strict=True)]
        assert scaled == pytest.approx(right, rel=bound), i


def test_van_der_pol_takes_a_thousandth_of_the_steps_of_an_explicit_method() -> None:
    """mu = 1000: the explicit method follows the fast time scale, the implicit one need not."""

    def oscillator(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
        return torch.stack([y[1], mu * (1 - y[0].square()) * y[1] - y[0]])

    mu = torch.tensor(1000.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
    options: dict[str, Any] = {"args": (mu,), "rtol": 1e-6, "atol": 1e-8}
    sol = sa.solve(oscillator, y0, [0.0, 500.0], method="radauIIA5", **options)
    short = sa.solve(oscillator, y0, [0.0, 1.0], method="dopri5", **options)
    explicit = 500 * (short.stats.accepted + short.stats.rejected)
    assert 1000 * (sol.stats.accepted + sol.stats.rejected) < explicit
    (grad,) = torch.autograd.grad(sol.y[-1, 0], mu)
    moved = [
        sa.solve(
            oscillator,
            y0,
            [0.0, 500.0],
            method="radauIIA5",
            args=(mu.detach() + by,),
            rtol=1e-8,
            atol=1e-11,
        ).y[-1, 0]
        for by in (-1.0, 1.0)
    ]
    assert float(grad) == pytest.approx(float(moved[1] - moved[0]) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["radauIIA5", "sdirk2", "trbdf2"])
def test_dense_output_after_a_stiff_solve_is_that_of_the_solve(name: str) -> None:
    """To evaluate f at the stages once more would amplify their rounding by 1e6."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        return -1e6 * (y - torch.cos(t))

    y0 = torch.ones(1, dtype=torch.float64)
    t = torch.linspace(0.0, 1.0, 20, dtype=torch.float64)
    grid = sa.FixedGrid(step_size=0.1)
    inside = sa.solve(field, y0, t, method=name, controller=grid).y
    after = sa.solve(field, y0, [0.0, 1.0], method=name, controller=grid, dense=True).dense(t)
    assert float((after - inside).abs().max()) < 1e-13


# --- how equations are solved ------------------------------------------------------------


def solved(
    case: problems.Case, stepper: Any, gradient: Any = "symplectic", **options: Any
) -> sa.Solution:
    return case.solve(
        method=stepper,
        gradient=gradient,
        controller=sa.FixedGrid(step_size=0.3),
        **options,
    )


@pytest.mark.parametrize(
    ("name", "gradient"),
    [*((name, "symplectic") for name in IMPLICIT), ("sdirk2", "backprop"), ("gl4", "backprop")],
)
def test_matrix_free_solves_give_the_same_solution_and_gradient(name: str, gradient: str) -> None:
    case = problems.case(times=(0.0, 0.4, 1.0), wants_time=True)
    free = solved(case, method(name, dense_below=0), gradient)
    dense = solved(case, name, gradient)
    assert problems.relative_error(free.y, dense.y) < 1e-14
    error, where = problems.worst(case.gradients(free.y), case.gradients(dense.y))
    assert error < 1e-12, where


@pytest.mark.parametrize("name", ["radauIIA3", "trbdf2"])
def test_no_matrix_is_formed_for_a_large_state(name: str) -> None:
    """Reaction and diffusion on a ring of 2000 places: the matrix would take 32 MB."""
    n = 2000
    stiffness = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)

    def field(t: Tensor, y: Tensor) -> Tensor:
        diffusion = y.roll(1) - 2 * y + y.roll(-1)
        return stiffness * diffusion + y * (1 - y)

    x = torch.linspace(0.0, 2 * math.pi, n + 1, dtype=torch.float64)[:-1]
    y0 = (0.5 + 0.3 * torch.sin(40 * x)).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        grid = sa.FixedGrid(step_size=0.05)
        sol = sa.solve(field, y0, [0.0, 0.05], method=name, controller=grid)
        return torch.autograd.grad(sol.y[-1].square().sum(), [y0, stiffness])

    got: list[Any] = []
    peak = peak_memory(lambda: got.append(run()))
    assert peak < n * n * 8 / 6
    grid = sa.FixedGrid(step_size=0.05)
    checked = sa.solve(field, y0, [0.0, 0.05], method=name, controller=grid, gradient="aca")
    wanted = torch.autograd.grad(checked.y[-1].square().sum(), [y0, stiffness])
    for a, b in zip(got[0], wanted, strict=True):
        assert problems.relative_error(a, b) < 1e-12


def test_single_precision_is_solved_to_its_rounding() -> None:
    net = problems.Net(dim=4, dtype=torch.float32)
    y0 = torch.randn(8, 4)
    grid = sa.FixedGrid(step_size=0.25)
    for stepper in ("radauIIA5", "sdirk2", method("gl4", dense_below=0)):
        single = sa.solve(net, y0, [0.0, 1.0], method=stepper, controller=grid)
        wide = problems.Net(dim=4)
        wide.load_state_dict({k: v.double() for k, v in net.state_dict().items()})
        double = sa.solve(wide, y0.double(), [0.0, 1.0], method=stepper, controller=grid)
        assert problems.relative_error(single.y, double.y) < 5e-7
        check = sa.check_gradient(net, y0, [0.0, 1.0], method=stepper, controller=grid)
        assert check.reference is torch.float64
        assert check.total < 2e-6


@pytest.mark.parametrize("dense_below", [0, 128])
@pytest.mark.parametrize("gradient", ["symplectic", "backprop", "aca"])
def test_complex_states_that_are_not_holomorphic(gradient: str, dense_below: int) -> None:
    """The same problem as pairs of real numbers gives the same solution and the same gradients."""
    weight = torch.randn(2, 2, dtype=torch.complex128, requires_grad=True)
    start = torch.randn(2, dtype=torch.complex128, requires_grad=True)

    def field(t: Tensor, z: Tensor) -> Tensor:
        return weight @ z - z * z.abs() + 0.3 * z.conj()

    def paired(t: Tensor, y: Tensor) -> Tensor:
        return torch.view_as_real(field(t, torch.view_as_complex(y)))

    got, wanted = (
        sa.solve(
            func,
            y0,
            [0.0, 1.0],
            method=method("radauIIA3", dense_below=dense_below),
            gradient=strategy,
            controller=sa.FixedGrid(step_size=0.25),
        ).y[-1]
        for func, y0, strategy in (
            (field, start, gradient),
            (paired, torch.view_as_real(start), "backprop"),
        )
    )
    assert problems.relative_error(torch.view_as_real(got), wanted) < 1e-14
    mix = torch.randn(2, 2, dtype=torch.float64)
    grads = [
        torch.autograd.grad((mix * y).sum(), [start, weight])
        for y in (torch.view_as_real(got), wanted)
    ]
    for a, b in zip(*grads, strict=True):
        assert problems.relative_error(a, b) < 1e-12


@pytest.mark.parametrize("gradient", ["symplectic", "checkpoint", "aca"])
def test_random_numbers_are_the_same_in_every_iteration_and_again_in_reverse(gradient: str) -> None:
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def noisy(t: Tensor, y: Tensor) -> Tensor:
        return -torch.sin(weight * y) * torch.rand(y.shape, dtype=y.dtype)

    y0 = torch.ones(4, dtype=torch.float64)
    grads = []
    for strategy in (gradient, "backprop"):
        torch.manual_seed(3)
        sol = sa.solve(
            noisy,
            y0,
            [0.0, 0.5, 1.0],
            method="radauIIA3",
            gradient=strategy,
            controller=sa.FixedGrid(),
        )
        grads.append(torch.autograd.grad(sol.y[-1].sum(), weight)[0])
    assert float(grads[0]) == pytest.approx(float(grads[1]), rel=1e-12)


def test_a_tolerance_saves_evaluations_and_keeps_what_it_promises() -> None:
    case = problems.case(times=(0.0, 1.0))
    exact = solved(case, "radauIIA5")
    loose = solved(case, method("radauIIA5", tolerance=0.01), rtol=1e-4, atol=1e-4)
    assert loose.stats.evaluations < exact.stats.evaluations
    error = problems.relative_error(loose.y, exact.y)
    assert 1e-14 < error < 1e-6
    tight = solved(case, method("radauIIA5", tolerance=0.01), rtol=1e-9, atol=1e-9)
    assert problems.relative_error(tight.y, exact.y) < error / 100


# --- failure -----------------------------------------------------------------------------


def sharp(t: Tensor, y: Tensor) -> Tensor:
    return -50 * torch.atan(40 * (y - torch.sin(t)))


def test_newton_that_does_not_converge_on_a_grid_says_where_and_what_helps() -> None:
    y0 = torch.tensor([3.0], dtype=torch.float64)
    t = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
    with pytest.raises(sa.NonlinearSolveError, match="did not converge in the step") as caught:
        sa.odeint(sharp, y0, t, method="gl6", options={"max_iters": 3})
    for part in ("'gl6'", "from t = 0 with h = 0.5", "3 iterations", "max_iters = 3", "smaller"):
        assert part in str(caught.value)
    assert caught.value.status is sa.Status.NO_CONVERGENCE
    assert len(caught.value.solution.y) == 1
    stepper = method("gl6", max_iters=3)
    prefix = sa.solve(sharp, y0, t, method=stepper, controller=sa.FixedGrid(), throw=False)
    assert prefix.status is sa.Status.NO_CONVERGENCE


def test_under_step_control_a_smaller_step_is_tried_instead() -> None:
    y0 = torch.tensor([3.0], dtype=torch.float64)
    options: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    control = sa.Adaptive(first_step=0.5)
    few = sa.solve(
        sharp,
        y0,
        [0.0, 2.0],
        method=method("radauIIA5", max_iters=6),
        controller=control,
        **options,
    )
    assert few.stats.rejected > 0
    fine = sa.solve(sharp, y0, [0.0, 2.0], method="radauIIA5", rtol=1e-9, atol=1e-9)
    assert float((few.y[-1] - fine.y[-1]).abs()) < 1e-4


def test_a_step_that_can_shrink_no_further_raises() -> None:
    def kink(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y > 0, -1e8, 1e8) * torch.ones_like(y)

    with pytest.raises(sa.NonlinearSolveError):
        sa.solve(
            kink,
            torch.full((1,), 1e-9, dtype=torch.float64),
            [0.0, 1.0],
            method="radauIIA5",
            controller=sa.Adaptive(first_step=0.1, min_step=1e-3),
        )


def test_a_value_that_is_not_finite_is_named_as_in_explicit_methods() -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return y / (t < 0.5)

    t = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    with pytest.raises(sa.NonFiniteError, match=r"func returned inf at t = 0\.5"):
        sa.odeint(field, torch.ones(2, dtype=torch.float64), t, method="trapezoid")


def test_strategies_that_do_not_apply_refuse() -> None:
    y0, t = torch.ones(1), [0.0, 1.0]
    refusals: list[tuple[Strategy, str]] = [
        (sa.Symplectic(store="graph"), "store='stages'"),
        (sa.MALI(), "'alf' only"),
        (sa.Continuous(), "method_name='dopri5'"),
    ]
    for strategy, remedy in refusals:
        with pytest.raises(sa.ArgumentError, match=remedy):
            sa.solve(lambda t, y: -y, y0, t, method="gl4", gradient=strategy)
    careful = sa.SensitivityControl()
    with pytest.raises(sa.ArgumentError, match=r"use Adaptive\(\)"):
        sa.solve(lambda t, y: -y, y0, t, method="trbdf2", controller=careful)
    explicit = sa.Continuous(method_name="dopri5")
    y = sa.solve(lambda t, y: -y, y0.requires_grad_(), t, method="radauIIA5", gradient=explicit).y
    (grad,) = torch.autograd.grad(y[-1].sum(), y0)
    assert float(grad) == pytest.approx(math.exp(-1), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"max_iters": 1}, {"dense_below": -1}, {"krylov": 0}, {"tolerance": 0.0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(sa.ArgumentError, match=next(iter(options))):
        Newton(**options)


def test_tableaus_go_to_the_class_of_their_kind() -> None:
    with pytest.raises(sa.ArgumentError, match="use ExplicitRK"):
        sa.ImplicitRK(tableaus.get("rk4"))
    with pytest.raises(sa.ArgumentError, match="use ImplicitRK"):
        sa.ExplicitRK(tableaus.get("gl4"))


# --- second derivatives ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["implicit_midpoint", "sdirk2", "radauIIA3"])
@pytest.mark.parametrize("gradient", ["symplectic", "aca", "checkpoint"])
def test_second_derivatives_are_exact(name: str, gradient: str) -> None:
    """Against fourth-order differences of the exact gradient."""
    direction = torch.tensor([0.3, -1.0], dtype=torch.float64)

    def gradient_at(p: Tensor, **options: bool) -> Tensor:
        y = sa.solve(
            lambda t, y: torch.sin(p[0] * y * y.roll(1)) - p[1] * y * t,
            torch.tensor([0.5, -0.8], dtype=torch.float64),
            [0.0, 0.5, 1.0],
            method=name,
            gradient=gradient,
            controller=sa.FixedGrid(),
        ).y
        (grad,) = torch.autograd.grad(y[-1].square().sum(), p, **options)
        return grad

    p = torch.tensor([1.3, 0.4], dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(gradient_at(p, create_graph=True) @ direction, p)
    h = 1e-3
    points = [
        gradient_at((p.detach() + k * h * direction).requires_grad_()) for k in (-2, -1, 1, 2)
    ]
    wanted = (points[0] - 8 * points[1] + 8 * points[2] - points[3]) / (12 * h)
    assert problems.relative_error(got, wanted) < 1e-9


def test_transforms_of_torch_func_agree_on_hessians() -> None:
    """Forward over reverse, and every other order of the two, and forward mode on its own."""

    def final(p: Tensor) -> Tensor:
        y = sa.solve(
            lambda t, y: torch.sin(p[0] * y * y.roll(1)) - p[1] * y * t,
            torch.tensor([0.5, -0.8], dtype=torch.float64),
            [0.0, 0.5],
            method="implicit_midpoint",
            controller=sa.FixedGrid(),
        ).y
        return y[-1].square().sum()

    p = torch.tensor([1.3, 0.4], dtype=torch.float64)
    jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
    assert problems.relative_error(jacfwd(final)(p), jacrev(final)(p)) < 1e-13
    wanted = jacrev(jacrev(final))(p)
    for transform in (jacfwd(jacrev(final)), jacrev(jacfwd(final)), jacfwd(jacfwd(final))):
        assert problems.relative_error(transform(p), wanted) < 1e-12
    third = jacrev(jacrev(jacrev(final)))(p)
    direction, h = torch.tensor([0.6, -0.8], dtype=torch.float64), 1e-4
    moved = [jacrev(jacrev(final))(p + k * h * direction) for k in (-1, 1)]
    difference = (moved[1] - moved[0]) / (2 * h)
    assert problems.relative_error(third @ direction, difference) < 1e-7


def test_a_derivative_of_too_high_an_order_raises() -> None:
    p = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64)
    for gradient, order in (("backprop", 2), ("symplectic", 4)):
        y = sa.solve(
            lambda t, y: torch.sin(p * y),
            y0,
            [0.0, 1.0],
            method="gl4",
            gradient=gradient,
            controller=sa.FixedGrid(),
        ).y
        value = y[-1].sum()
        for _ in range(order - 1):
            (value,) = torch.autograd.grad(value, p, create_graph=True)
        with pytest.raises(sa.SecondDerivativeError, match="implicit"):
            torch.autograd.grad(value, p)


# --- counts ------------------------------------------------------------------------------


class Counted(nn.Module):
    """A network that counts its calls and the products that pass through it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = problems.Net(dim=2)
        self.calls = 0
        self.products = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        k: Tensor = self.net(t, y)
        if k.requires_grad:
            k.register_hook(self._pulled)
        return k

    def _pulled(self, cotangent: Tensor) -> None:
        self.products += 1  # those of a batch, which make a dense Jacobian, arrive as one


STRATEGIES = [
    s for s in strategies(exact=True) if "accumulate" not in label(s) and s.name != "forward"
]


def shape(sol: sa.Solution) -> SolveShape:
    """From the grid and the output times alone: every second step holds an output."""
    dense = [
        any(a < x < b for x in sol.t.tolist())
        for a, b in zip(sol.steps.tolist(), sol.steps.tolist()[1:], strict=False)
    ]
    runs = sum(now and not before for before, now in zip([False, *dense], dense, strict=False))
    return SolveShape(len(dense), dense=sum(dense), dense_ends=dense[-1], dense_runs=runs)


@pytest.mark.parametrize("outputs", [(0.0, 1.0), (0.0, 0.3, 0.8, 0.9, 1.0)], ids=["end", "dense"])
@pytest.mark.parametrize(("name", "strategy"), pairs(STRATEGIES, IMPLICIT))
def test_counts_are_those_of_stages_and_those_of_solvers(
    name: str, strategy: Strategy, outputs: tuple[float, ...]
) -> None:
    """What the stages take is declared; what solving their equations takes is told apart."""
    func, stepper = Counted(), steppers.get(name)
    y0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(outputs, dtype=torch.float64)
    grid = sa.FixedGrid(step_size=0.25)
    sol = sa.solve(func, y0, t, method=name, gradient=strategy, controller=grid)
    stats, seen, n = sol.stats, shape(sol), y0.numel()
    assert stats.evaluations == func.calls
    own = stats.evaluations - stats.solver_evaluations
    assert own == seen.evaluations(stepper.work)
    assert stats.solver_products % n == 0  # each Jacobian is n products
    func.calls = func.products = 0

    sol.y.square().sum().backward()
    assert stats.backward_evaluations == func.calls
    solver = stats.backward_solver_products
    assert stats.products - solver + solver // n == func.products
    own = stats.backward_evaluations - stats.backward_solver_evaluations
    declared = strategy.counts(stepper, seen)
    assert (own, stats.products - stats.backward_solver_products) == declared
    # One transposed decomposition needs the Jacobian of every stage that is solved for, once.
    solved_for = seen.accepted * (stepper.tableau.stages - 1)  # type: ignore[attr-defined]
    transposed = solved_for * n
    if strategy.name in ("backprop",) or label(strategy) == "symplectic":
        assert stats.backward_solver_products == transposed
        assert stats.backward_solver_evaluations == 0
    else:
        assert stats.backward_solver_products > transposed
        assert stats.backward_solver_evaluations > 0


@pytest.mark.parametrize("name", ["radauIIA5", "sdirk2"])
def test_matrix_free_products_are_counted_one_by_one(name: str) -> None:
    func = Counted()
    y0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    stepper = method(name, dense_below=0)
    grid = sa.FixedGrid(step_size=0.5)
    sol = sa.solve(func, y0, [0.0, 1.0], method=stepper, controller=grid)
    func.calls = func.products = 0
    sol.y[-1].sum().backward()
    assert (sol.stats.backward_evaluations, sol.stats.products) == (func.calls, func.products)
    assert func.products > func.calls


# --- linear algebra ----------------------------------------------------------------------


def system(options: Newton, m: int = 3, n: int = 7) -> tuple[StageSystem, Tensor]:
    """A system of m stages with random Jacobians, and its matrix written out."""
    torch.manual_seed(5)
    weights = torch.randn(m, m, dtype=torch.float64) / m
    jacobians, matrices = [], []
    for _ in range(m):
        matrix = torch.randn(n, n, dtype=torch.float64)
        x = torch.randn(n, dtype=torch.float64).requires_grad_()
        k = torch.sin(matrix @ x)
        jacobians.append(Jacobian(x, k, lambda products: None))
        matrices.append(torch.cos(matrix @ x.detach()).unsqueeze(-1) * matrix)
    full = torch.eye(m * n, dtype=torch.float64)
    for i in range(m):
        for j in range(m):
            full[i * n : (i + 1) * n, j * n : (j + 1) * n] -= weights[i, j] * matrices[i]
    return StageSystem(weights.tolist(), jacobians, options), full


@pytest.mark.parametrize("options", [Newton(), KRYLOV, Newton(dense_below=0, krylov=15)], ids=str)
def test_systems_of_stages_are_solved_with_their_matrix_and_its_transpose(options: Newton) -> None:
    stages, matrix = system(options)
    r = torch.randn(3, 7, dtype=torch.float64)
    condition = float(torch.linalg.cond(matrix))
    for solve, full in ((stages.solve, matrix), (stages.solve_transposed, matrix.T)):
        wanted = torch.linalg.solve(full, r.reshape(-1)).reshape(3, 7)
        assert problems.relative_error(solve(r), wanted) < 1e-14 * condition


def test_gmres_that_stalls_says_so() -> None:
    singular = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    with pytest.raises(NoConvergence):
        gmres(lambda d: singular @ d, torch.ones(3, dtype=torch.float64), None, 10)


def test_gmres_of_nothing_is_nothing() -> None:
    assert gmres(lambda d: 2 * d, torch.zeros(4), None, 10).tolist() == [0.0] * 4


def test_a_field_that_does_not_depend_on_the_state_is_integrated_like_a_quadrature() -> None:
    quadrature: Callable[[Tensor, Tensor], Tensor] = lambda t, y: torch.stack([t**4, t**5])  # noqa: E731
    y0 = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for newton in (Newton(), KRYLOV):
        stepper = ImplicitRK(tableaus.get("gl6"), newton=newton)
        for gradient in gradients.get("symplectic"), gradients.get("aca"):
            grid = sa.FixedGrid()
            y = sa.solve(
                quadrature, y0, [0.0, 1.0], method=stepper, controller=grid, gradient=gradient
            ).y[-1]
            assert y.tolist() == pytest.approx([1 / 5, 1 / 6], rel=1e-14)
            assert torch.autograd.grad(y.sum(), y0)[0].tolist() == [1.0, 1.0]
