"""scipy's solvers as a method."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import symplectic_adjoint as sa
from symplectic_adjoint import _extras, gradients, steppers
from tests import problems

pytest.importorskip("scipy")

SOLVERS = ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
EXACT = [name for name in gradients.names() if gradients.get(name).exact and name != "mali"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_of_scipy_solves_within_the_tolerance(solver: str) -> None:
    known = problems.known()
    t = torch.linspace(*known.span, 5, dtype=torch.float64)
    y = sa.odeint(
        known.func,
        known.solution(t[:1])[0],
        t,
        method="scipy_solver",
        options={"solver": solver},
        rtol=1e-7,
        atol=1e-9,
    )
    assert float((y - known.solution(t)).abs().max()) < 1e-4


@pytest.mark.filterwarnings("ignore:The following arguments have no effect")  # torchdiffeq's own
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"solver": "RK45"}, 1e-14),
        ({"solver": "Radau", "max_step": 0.3}, 1e-14),
        ({"solver": "LSODA", "min_step": 1e-6}, 1e-7),
    ],
    ids=str,
)
def test_the_solution_is_torchdiffeq_s(options: dict[str, Any], bound: float) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    net = problems.Net(dim=2)
    y0, t = torch.ones(3, 2, dtype=torch.float64), torch.linspace(0.0, 2.0, 7)
    ours, theirs = (
        odeint(net, y0, t.double(), method="scipy_solver", options=dict(options))
        for odeint in (sa.odeint, torchdiffeq.odeint)
    )
    assert problems.relative_error(ours, theirs) < bound


@pytest.mark.parametrize("tree", [False, True], ids=["tensor", "pytree"])
@pytest.mark.parametrize("gradient", [None, "continuous", sa.Continuous(method_name="dopri5")])
def test_gradients_are_those_of_the_ode_to_tolerance(gradient: Any, tree: bool) -> None:
    options: dict[str, Any] = {"times": (0.1, 0.4, 0.75, 1.3), "wants_time": True, "tree": tree}
    case = problems.case(**options)
    sol = case.solve(
        method="scipy_solver",
        gradient=gradient,
        **TIGHT,
    )
    truth = problems.case(**options)
    wanted = sa.solve(truth.func, truth.y0, truth.t, args=truth.args, **TIGHT)
    error, where = problems.worst(case.gradients(sol.y), truth.gradients(wanted.y))
    assert error < 1e-6, where


@pytest.mark.filterwarnings("ignore:The following arguments have no effect")  # torchdiffeq's own
def test_odeint_adjoint_solves_backwards_with_scipy_as_torchdiffeq_s_does() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    found = []
    for odeint in (sa.odeint_adjoint, torchdiffeq.odeint_adjoint):
        net = problems.Net(dim=2)
        y0 = torch.ones(3, 2, dtype=torch.float64)
        t = torch.linspace(0.0, 2.0, 3, dtype=torch.float64)
        y = odeint(net, y0, t, method="scipy_solver", options={"solver": "RK45"}, **TIGHT)
        y.square().sum().backward()
        found.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))
    assert problems.relative_error(*found) < 1e-6


@pytest.mark.parametrize("gradient", EXACT)
def test_an_exact_gradient_is_refused_and_another_named(gradient: str) -> None:
    with pytest.raises(sa.ArgumentError, match=r"cannot be differentiated.*gradient='continuous'"):
        sa.odeint(decay, torch.ones(1), [0.0, 1.0], method="scipy_solver", gradient=gradient)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(_extras.MissingExtraError, match=r"symplectic-adjoint\[scipy\]"):
        sa.odeint(decay, torch.ones(1), [0.0, 1.0], method="scipy_solver")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "RK54"}, "unknown solver 'RK54'; did you mean 'RK45'"),
        ({"solver": "BDF", "min_step": 0.1}, "knows no least step size"),
        ({"max_stepp": 0.1}, "'max_stepp'; did you mean 'max_step'"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sa.ArgumentError, match=message):
        sa.odeint(decay, torch.ones(1), [0.0, 1.0], method="scipy_solver", options=options)


@pytest.mark.parametrize(
    "options",
    [
        {"controller": sa.Adaptive()},
        {"dense": True},
        {"event": lambda t, y: y[0] - 0.5},
        {"rtol": torch.tensor([1e-3, 1e-4])},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_needs_our_own_steps_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(sa.ArgumentError, match="scipy_solver"):
        sa.solve(decay, torch.ones(2), [0.0, 1.0], method=steppers.ScipySolver(), **options)


def test_a_solution_without_end_is_a_typed_error() -> None:
    with pytest.raises(sa.StepUnderflowError, match=r"scipy.s RK45 stopped at t = 1.0000"):
        sa.solve(lambda t, y: y**2, torch.ones(1), [0.0, 2.0], method=sa.ScipySolver("RK45"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_states_of_any_dtype_come_back_as_they_are(dtype: torch.dtype) -> None:
    y0 = torch.tensor([[1.0, 2.0]], dtype=dtype, requires_grad=True)
    rate = torch.tensor(-0.5, dtype=dtype, requires_grad=True)
    y = sa.odeint(lambda t, y: rate * y, y0, [0.0, 1.0, 2.0], method="scipy_solver", **TIGHT)
    assert (y.dtype, y.shape) == (dtype, (3, 1, 2))
    y[-1].real.sum().backward()
    assert rate.grad is not None
    assert abs(rate.grad.real.item() - 6 * torch.exp(torch.tensor(-1.0)).item()) < 1e-5


def test_evaluations_are_counted() -> None:
    calls = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(None)
        return -y

    y0 = torch.ones(1, requires_grad=True)
    sol = sa.solve(func, y0, [0.0, 1.0], method="scipy_solver")
    assert sol.stats.evaluations == len(calls) == sol.stats.further + 1
    assert torch.equal(sol.steps, torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("method", ["scipy_solver", "dopri5"])
def test_states_that_torch_conjugates_lazily_are_states_like_others(method: str) -> None:
    z = torch.tensor([0.3 - 0.2j, 1.1 + 0.4j], dtype=torch.complex128, requires_grad=True)
    found = []
    for gradient, start in (("continuous", z.conj()), ("backprop", z.conj().resolve_conj())):
        own = method if gradient == "continuous" else "dopri5"
        y = sa.odeint(
            lambda t, y: y.conj(), start, [0.0, 1.0], method=own, gradient=gradient, **TIGHT
        )
        found.append(torch.autograd.grad(y[-1].abs().square().sum(), z)[0])
    assert problems.relative_error(found[0], found[1]) < 1e-6
