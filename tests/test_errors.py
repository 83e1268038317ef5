"""Bad input is named with its value and a remedy, and a solve that fails leaves a valid prefix."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.gradients import Strategy
from tests import problems
from tests.conformance import reference
from tests.conformance.registry import label, strategies

BOUND = 1e-12

# How gradients are summed makes no difference here.
EXACT = [s for s in strategies(exact=True) if getattr(s, "accumulate", "inplace") == "inplace"]

every_exact_strategy = pytest.mark.parametrize("strategy", EXACT, ids=label)


def refuse(t: Tensor, y: Any) -> Any:
    pytest.fail("func was called although an argument is bad")


# Arguments -------------------------------------------------------------------------------------


nan, inf = math.nan, math.inf

BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    # t
    "a single time": ({"t": [0.0]}, r"t must be 1-D with at least two times.*shape \(1,\)"),
    "a number for t": ({"t": 1.0}, r"t must be 1-D with at least two times.*shape \(\)"),
    "no time": ({"t": []}, r"t must be 1-D with at least two times.*shape \(0,\)"),
    "times with two axes": ({"t": torch.zeros(2, 2)}, r"t must be 1-D.*shape \(2, 2\)"),
    "repeated times": (
        {"t": [0.0, 0.5, 0.5, 1.0]},
        r"t\[1\] = 0.5 and t\[2\] = 0.5; sort it and remove duplicates",
    ),
    "one time twice": ({"t": [1.0, 1.0]}, r"t\[0\] = 1.0 and t\[1\] = 1.0"),
    "times in disorder": ({"t": [0.0, 2.0, 1.0, 3.0]}, r"t\[1\] = 2.0 and t\[2\] = 1.0; sort"),
    "times that turn back": ({"t": [0.0, 1.0, 0.0]}, r"strictly increasing or strictly decreasing"),
    "a time that is nan": ({"t": [0.0, nan, 1.0]}, r"t\[1\] = nan is not finite; remove it"),
    "an endless time": ({"t": [0.0, inf]}, r"t\[1\] = inf is not finite"),
    "complex times": ({"t": torch.zeros(2, dtype=torch.complex64)}, r"t has dtype torch.complex64"),
    "boolean times": ({"t": torch.tensor([False, True])}, r"t has dtype torch.bool"),
    "words for t": ({"t": "now"}, r"t = 'now' must be a 1-D tensor or list of times"),
    "nothing for t": ({"t": None}, r"t = None must be"),
    # y0
    "an integer state": (
        {"y0": torch.ones(2, dtype=torch.int64)},
        r"y0 has dtype torch.int64.*use y0.float\(\) or .double\(\)",
    ),
    "an integer leaf": (
        {"y0": {"a": torch.ones(1), "b": [torch.ones(2, dtype=torch.int32)]}},
        r"y0\['b'\]\[0\] has dtype torch.int32",
    ),
    "a boolean state": ({"y0": torch.tensor([True])}, r"y0 has dtype torch.bool"),
    "a number for y0": ({"y0": 1.0}, r"y0 must be a tensor, but is float; wrap it in torch.as_ten"),
    "a number in y0": ({"y0": (torch.ones(1), 2.0)}, r"y0\[1\] must be a tensor, but is float"),
    "nothing for y0": ({"y0": None}, r"y0 must be a tensor, but is NoneType"),
    "an empty y0": ({"y0": []}, r"y0 holds no tensor; give"),
    "nan in y0": (
        {"y0": torch.tensor([[1.0, 2.0], [3.0, nan]])},
        r"y0 holds 1 non-finite.*y0, sample 1, component \(1,\); clean",
    ),
    "inf in a leaf of y0": (
        {"y0": (torch.ones(3), torch.tensor([0.0, -inf, nan]))},
        r"y0 holds 2 non-finite.*y0\[1\], component 1",
    ),
    "a scalar y0 that is nan": ({"y0": torch.tensor(nan)}, r"y0 holds 1 non-finite.*at y0;"),
    "real and complex leaves": (
        {"y0": (torch.ones(1), torch.ones(1, dtype=torch.complex64))},
        r"y0 mixes real and complex leaves; make them all complex, or use torch.view_as_real",
    ),
    "leaves on several devices": (
        {"y0": (torch.ones(1), torch.ones(1, device="meta"))},
        r"the leaves of y0 live on several devices \(cpu, meta\); move them to one",
    ),
    # The method, its options and the gradient
    "an unknown method": ({"method": "dopri6"}, r"unknown method 'dopri6'; did you mean 'dopri"),
    "a method far from any": ({"method": "xyz"}, r"unknown method 'xyz'. Valid: 'adaptive_heun'"),
    "a number for the method": ({"method": 5}, r"method = 5 must be a name such as 'dopri5'"),
    "an unknown gradient": ({"gradient": "adjiont"}, r"unknown gradient 'adjiont'.*Valid: 'aca'"),
    "a misspelt gradient": ({"gradient": "simplectic"}, r"did you mean 'symplectic'\?"),
    "a number for the gradient": ({"gradient": 3}, r"gradient must be a name or a strategy.*not 3"),
    "a class for the gradient": ({"gradient": sa.ACA}, r"gradient must be a name or a strategy"),
    "mali with a Runge-Kutta method": (
        {"gradient": "mali", "method": "dopri5"},
        r"'mali' works with method 'alf' only, not with 'dopri5'; leave method out",
    ),
    "a word for the controller": ({"controller": "pi"}, r"controller = 'pi' must be a controller"),
    "adaptive steps without an estimate": (
        {"method": "rk4", "controller": sa.Adaptive()},
        r"method 'rk4' has no error estimate.*FixedGrid\(step_size=...\)",
    ),
    "a negative rtol": ({"rtol": -1.0}, r"rtol = -1.0 must be non-negative and finite"),
    "an atol that is nan": ({"atol": nan}, r"atol = nan must be non-negative and finite"),
    "no tolerance": ({"rtol": 0.0, "atol": 0.0}, r"rtol and atol are both zero"),
    # The rest
    "no function": ({"func": 3}, r"func = 3 is not callable; give func\(t, y\)"),
    "a tensor for args": ({"args": torch.ones(2)}, r"args is a tensor; give a tuple"),
    "a tensor for params": ({"params": torch.ones(2)}, r"params must be a sequence of tensors"),
    "numbers for params": ({"params": [1.0]}, r"params must be a sequence of tensors"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_a_bad_argument_is_named_before_anything_is_computed(name: str) -> None:
    changed, message = BAD_ARGUMENTS[name]
    arguments: dict[str, Any] = {"func": refuse, "y0": torch.ones(2), "t": [0.0, 1.0], **changed}
    with pytest.raises(sa.ArgumentError, match=message) as caught:
        sa.solve(**arguments)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, sa.SymplecticAdjointError)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt option": (
        {"options": {"frist_step": 0.1}},
        r"unknown option of method 'dopri5' 'frist_step'; did you mean 'first_step'\?",
    ),
    "an option of fixed grids": (
        {"options": {"step_size": 0.1}},
        r"unknown option of method 'dopri5' 'step_size'",
    ),
    "an option of adaptive steps": (
        {"method": "rk4", "options": {"max_num_steps": 3}},
        r"unknown option of method 'rk4' 'max_num_steps'.*Valid: 'grid_constructor'",
    ),
    "an unknown interpolation": (
        {"method": "rk4", "options": {"interp": "cubik"}},
        r"unknown interp 'cubik'; did you mean 'cubic'\?",
    ),
    "a step size that is negative": (
        {"method": "rk4", "options": {"step_size": -0.1}},
        r"step_size = -0.1 must be positive and finite",
    ),
    "a first step of zero": ({"options": {"first_step": 0.0}}, r"first_step = 0.0 is out of range"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_named_with_the_nearest_valid_one(name: str) -> None:
    arguments, message = BAD_OPTIONS[name]
    with pytest.raises(sa.ArgumentError, match=message):
        sa.odeint(refuse, torch.ones(2), [0.0, 1.0], **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sa.Symplectic(store="stage"), r"unknown store 'stage'; did you mean 'stages'\?"),
        (lambda: sa.Symplectic(accumulate="float"), r"unknown accumulate 'float'.*'float64'"),
    ],
)
def test_a_bad_option_of_a_strategy_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(sa.UnknownNameError, match=message):
        make()


@pytest.mark.parametrize("y0", [torch.ones(3), (torch.ones(2), torch.ones(()))])
def test_unordinary_but_valid_arguments_are_accepted(y0: Any) -> None:
    def func(t: Tensor, y: Any) -> Any:
        return torch.utils._pytree.tree_map(torch.zeros_like, y)

    for t in (
        [0, 1],
        (0.0, 1.0),
        torch.arange(3),
        torch.tensor([1.0, 0.0]),
        torch.linspace(0, 1, 5),
    ):
        assert sa.solve(func, y0, t).status is sa.Status.SUCCESS


# What func returns -----------------------------------------------------------------------------


Pair = namedtuple("Pair", "first second")

ONE = torch.ones(2, 3)
TWO = {"a": torch.ones(2), "b": (torch.ones(3), torch.ones(()))}

BAD_RESULTS: dict[str, tuple[Any, Callable[[Any], Any], str]] = {
    "a wrong shape": (
        ONE,
        lambda y: y.sum(0),
        r"func returned shape \(3,\) for a state of shape \(2, 3\); they must be equal",
    ),
    "a shape that would broadcast": (ONE, lambda y: y[:, :1], r"func returned shape \(2, 1\)"),
    "a wrong dtype": (
        ONE,
        lambda y: y.double(),
        r"func returned dtype torch.float64 for a state of dtype torch.float32; convert y0 or",
    ),
    "a complex derivative": (ONE, lambda y: y + 0j, r"func returned dtype torch.complex64"),
    "integers": (ONE, lambda y: y.long(), r"func returned dtype torch.int64"),
    "a wrong device": (
        ONE,
        lambda y: torch.empty(2, 3, device="meta"),
        r"func returned a tensor on meta for a state on cpu; move the module or y0",
    ),
    "nothing": (ONE, lambda y: None, r"func must return a tensor like y0, but returned NoneType"),
    "a tuple for a tensor": (ONE, lambda y: (y,), r"must return a tensor like y0.*returned tuple"),
    "a tensor for a pytree": (
        TWO,
        lambda y: y["a"],
        r"like y0 \(3 tensors: y0\['a'\], y0\['b'\]\[0\], y0\['b'\]\[1\]\), but returned 1 leaves",
    ),
    "a missing leaf": (TWO, lambda y: {"a": y["a"], "b": (y["b"][0],)}, r"but returned 2 leaves"),
    "wrong keys": (TWO, lambda y: {"a": y["a"], "c": y["b"]}, r"must return a pytree like y0"),
    "another structure": (
        TWO,
        lambda y: [y["a"], *y["b"]],
        r"must return a pytree like y0.*but returned 3 leaves",
    ),
    "a number in a pytree": (
        TWO,
        lambda y: {**y, "a": 1.0},
        r"func returned float as the derivative of y0\['a'\]; return a tensor",
    ),
    "a wrong shape in a pytree": (
        TWO,
        lambda y: {"a": y["a"], "b": (y["b"][0][:1], y["b"][1])},
        r"func returned shape \(1,\) as the derivative of y0\['b'\]\[0\], which has shape \(3,\)",
    ),
}


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("name", BAD_RESULTS)
def test_a_bad_result_of_func_is_named(name: str, late: bool) -> None:
    y0, result, message = BAD_RESULTS[name]

    def func(t: Tensor, y: Any) -> Any:
        return y if late and t < 0.5 else result(y)

    with pytest.raises(sa.FieldOutputError, match=message) as caught:
        sa.odeint(func, y0, [0.0, 1.0])
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("gradient", ["symplectic", "backprop"])
def test_the_items_of_a_dict_are_told_apart_by_their_keys(gradient: str) -> None:
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)

    def func(t: Tensor, y: Any) -> Any:
        return {"b": 3 * y["a"], "a": torch.zeros(())}  # not in the order of y0

    y = sa.odeint(func, {"a": a, "b": b}, [0.0, 1.0], gradient=gradient)
    assert y["a"][-1] == a
    assert torch.isclose(y["b"][-1], b + 3 * a)
    grads = torch.autograd.grad(y["b"][-1], (a, b))
    assert [round(float(g), 5) for g in grads] == [3.0, 1.0]


@pytest.mark.parametrize("kind", [list, tuple, lambda leaves: Pair(*leaves)])
def test_any_sequence_stands_for_any_other(kind: Any) -> None:
    y0 = (torch.ones(2), torch.zeros(3))
    y = sa.odeint(lambda t, y: kind([-y[0], y[0].sum() + y[1]]), y0, [0.0, 1.0])
    assert isinstance(y, tuple)
    assert [x.shape for x in y] == [(2, 2), (2, 3)]


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (nn.Linear(2, 2), TypeError),
        (lambda t, y: torch.cat([y, t], dim=-1), RuntimeError),
        (lambda t, y: nn.Linear(2, 2)(y), RuntimeError),
    ],
    ids=["of the state alone", "for a time with an axis", "in another dtype"],
)
def test_an_error_of_func_comes_with_how_it_is_called(func: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        sa.odeint(func, torch.ones(3, 2, dtype=torch.float64), [0.0, 1.0])
    (note,) = caught.value.__notes__
    assert "t is a torch.float64 tensor without dimensions" in note
    assert "sa.Autonomous(network)" in note


def test_an_error_of_func_itself_passes_through() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        raise ZeroDivisionError("func's own")

    for strategy in EXACT:
        with pytest.raises(ZeroDivisionError, match="func's own"):
            sa.solve(func, torch.ones(2), [0.0, 1.0], gradient=strategy)


# Solves that fail ------------------------------------------------------------------------------


class Failing(nn.Module):
    """Smooth until ``stop``; there it returns a non-finite value for one component."""

    def __init__(self, stop: float, value: float = math.nan) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(3, 3, dtype=torch.float64))
        self.stop = stop
        self.value = value

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out = torch.tanh(y @ self.weight) * torch.cos(t)
        if t < self.stop:
            return out
        bad = torch.zeros(2, 3, dtype=torch.float64)
        bad[1, 2] = self.value
        return out + bad


def start() -> Tensor:
    return torch.randn(2, 3, dtype=torch.float64).requires_grad_()


GRIDS: dict[str, dict[str, Any]] = {
    "adaptive": {"method": "bosh3", "rtol": 1e-4, "atol": 1e-4},
    "grid": {"method": "rk4", "controller": sa.FixedGrid(step_size=0.1)},
    "outputs": {"method": "rk4", "controller": sa.FixedGrid()},
}

every_grid = pytest.mark.parametrize("grid", GRIDS)


def options_of(grid: str, strategy: Strategy) -> dict[str, Any]:
    options = dict(GRIDS[grid])
    if strategy.method is not None:
        options["method"] = strategy.method
    return options


@every_grid
@every_exact_strategy
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_value_is_located(strategy: Strategy, grid: str, value: float) -> None:
    func, y0 = Failing(0.55, value), start()
    with pytest.raises(sa.NonFiniteError) as caught:
        sa.solve(func, y0, [0, 0.25, 0.5, 0.75, 1], gradient=strategy, **options_of(grid, strategy))
    message = str(caught.value)
    assert f"func returned {value} at t = " in message
    at = float(message.split("at t = ")[1].split(" ")[0])
    step = float(message.split("step from t = ")[1].split(" ")[0])
    h = float(message.split("with h = ")[1].split(". ")[0].rstrip("."))
    assert 0.55 <= at <= step + h * 1.01
    assert step < 0.6  # alf looks at the middle of a step alone
    assert "y0, sample 1, component (2,)" in message
    assert "throw=False returns the valid prefix" in message
    assert isinstance(caught.value, RuntimeError)


def test_a_non_finite_value_in_a_pytree_is_located_in_its_leaf() -> None:
    def func(t: Tensor, y: Any) -> Any:
        bad = torch.where(t > 0.5, nan, 0.0)
        return {"x": torch.zeros(2, 2), "y": [torch.stack([torch.zeros(()), bad])]}

    y0 = {"x": torch.ones(2, 2), "y": [torch.ones(2)]}
    with pytest.raises(sa.NonFiniteError, match=r"for y0\['y'\]\[0\], component 1"):
        sa.odeint(func, y0, [0.0, 1.0])


def test_a_scalar_that_is_not_finite_is_located() -> None:
    with pytest.raises(sa.NonFiniteError, match=r"func returned nan at t = 0 for y0, in the step"):
        sa.odeint(lambda t, y: y * nan, torch.tensor(1.0), [0.0, 1.0], method="euler")


def test_a_solution_that_overflows_is_named_as_such() -> None:
    """func stays finite, the state does not."""
    with pytest.raises(sa.NonFiniteError, match=r"the solution became inf at t = .*in y0, compon"):
        sa.odeint(
            lambda t, y: torch.full_like(y, 3e38),
            torch.full((2,), 3e38),
            [0.0, 1.0],
            method="euler",
        )


def test_a_smaller_step_may_avoid_a_non_finite_value() -> None:
    """The square root of a negative number is met by a step that is too long, and only by one."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y.sqrt() * 20 - y

    y0 = torch.ones(2, dtype=torch.float64)
    sol = sa.solve(func, y0, [0.0, 0.05], controller=sa.Adaptive(first_step=0.05))
    assert sol.status is sa.Status.SUCCESS
    assert sol.stats.rejected


def replayed(func: Any, y0: Tensor, sol: sa.Solution, method: str) -> Tensor:
    """The prefix written out by hand on its own steps, under plain autograd."""
    nodes = list(sol.steps.unbind())
    at = {float(node): node for node in nodes}
    times = [at.get(float(t), t) for t in sol.t.double()]
    y: Tensor = reference.frozen(steppers.get(method), func, y0, nodes, times)
    return y


@every_grid
@every_exact_strategy
def test_the_valid_prefix_and_its_gradients_are_right(strategy: Strategy, grid: str) -> None:
    func, y0 = Failing(0.55), start()
    times = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    options = options_of(grid, strategy)
    sol = sa.solve(func, y0, times, gradient=strategy, throw=False, **options)
    assert sol.status is sa.Status.NON_FINITE
    assert "func returned nan" in sol.message
    assert torch.equal(sol.t, times[: len(sol.t)])
    assert len(sol.y) == len(sol.t) == 3
    assert 0.5 <= float(sol.steps[-1]) < 0.6
    assert sol.stats.accepted == len(sol.steps) - 1
    tensors = {"y0": y0, **dict(func.named_parameters())}

    def found(y: Tensor) -> dict[str, Tensor | None]:
        grads = torch.autograd.grad(problems.loss(y), list(tensors.values()))
        return dict(zip(tensors, grads, strict=True))

    wanted = replayed(func, y0, sol, options["method"])
    assert problems.relative_error(sol.y, wanted) <= 1e-13
    error, where = problems.worst(found(sol.y), found(wanted))
    assert error <= BOUND, f"the gradient of {where} is off by {error:.1e}"


@every_grid
@every_exact_strategy
def test_the_prefix_of_a_solve_without_any_valid_step_is_its_initial_state(
    strategy: Strategy, grid: str
) -> None:
    func, y0 = Failing(0.0), start()
    t = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    options = options_of(grid, strategy)
    sol = sa.solve(func, y0, t, gradient=strategy, throw=False, **options)
    assert sol.status is sa.Status.NON_FINITE
    assert torch.equal(sol.y, y0.unsqueeze(0))
    assert sol.steps.tolist() == sol.t.tolist() == [0.0]
    grads = torch.autograd.grad(sol.y.sum(), (y0, t, func.weight), allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(y0))  # type: ignore[arg-type]
    assert all(g is None or not g.any() for g in grads[1:])


@every_exact_strategy
def test_the_error_carries_the_valid_prefix(strategy: Strategy) -> None:
    func, y0 = Failing(0.55), start()
    options = {"gradient": strategy, **options_of("grid", strategy)}
    prefix = sa.solve(func, y0, [0.0, 0.5, 1.0], throw=False, **options)
    with pytest.raises(sa.NonFiniteError) as caught:
        sa.solve(func, y0, [0.0, 0.5, 1.0], **options)
    sol = caught.value.solution
    assert sol is not None
    assert sol.status is caught.value.status is sa.Status.NON_FINITE
    assert sol.message == str(caught.value)
    assert torch.equal(sol.y, prefix.y)
    sol.y.sum().backward()
    assert y0.grad is not None
    assert func.weight.grad is not None


@every_exact_strategy
def test_the_gradient_of_time_of_a_prefix_is_that_of_plain_autograd(strategy: Strategy) -> None:
    func, y0 = Failing(0.55), start()
    found = []
    for gradient in (strategy, sa.Backprop()):
        for grid in ("adaptive", "outputs"):
            t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
            options = {"gradient": gradient, **options_of(grid, strategy)}
            sol = sa.solve(func, y0, t, throw=False, **options)
            found.append(torch.autograd.grad(problems.loss(sol.y), t)[0])
    (adaptive, fixed), (wanted_adaptive, wanted_fixed) = found[:2], found[2:]
    assert problems.relative_error(adaptive, wanted_adaptive) <= BOUND
    assert problems.relative_error(fixed, wanted_fixed) <= BOUND
    assert float(fixed[-1]) == 0.0


@every_exact_strategy
def test_dense_output_covers_the_prefix_and_no_more(strategy: Strategy) -> None:
    func, y0 = Failing(0.55), start()
    sol = sa.solve(
        func,
        y0,
        [0.0, 0.5, 1.0],
        gradient=strategy,
        throw=False,
        dense=True,
        **options_of("adaptive", strategy),
    )
    reached = float(sol.steps[-1])
    assert 0.5 <= reached < 0.6
    assert torch.allclose(sol.dense(0.5), sol.y[1], rtol=1e-12)
    assert sol.dense(reached).shape == y0.shape
    with pytest.raises(sa.ArgumentError, match="outside the solved interval"):
        sol.dense(0.9)


def test_a_step_limit_says_how_far_the_solve_came_and_what_to_try() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(20 * t) * y

    y0 = torch.ones(2, dtype=torch.float64)
    controller = sa.Adaptive(max_steps=7)
    with pytest.raises(sa.StepLimitError) as caught:
        sa.solve(func, y0, [0.0, 0.01, 5.0], controller=controller)
    message, sol = str(caught.value), caught.value.solution
    assert "max_steps = 7 attempted steps did not reach t = 5" in message
    assert sol is not None
    assert f"stopped at t = {float(sol.steps[-1]):.17g}" in message
    assert message.count("error") >= 5  # of the last attempts
    assert "Loosen rtol/atol, raise max_steps" in message
    assert sol.status is sa.Status.STEP_LIMIT
    assert sol.stats.accepted + sol.stats.rejected == 7
    assert len(sol.y) == 2
    again = sa.solve(func, y0, [0.0, 0.01, 5.0], controller=controller, throw=False)
    assert torch.equal(again.y, sol.y)


def test_a_step_underflow_says_where_and_what_to_try() -> None:
    y0 = torch.ones(1, dtype=torch.float64)
    with pytest.raises(sa.StepUnderflowError) as caught:
        sa.solve(lambda t, y: y**2, y0, [0.0, 0.5, 2.0])  # 1 / (1 - t)
    message, sol = str(caught.value), caught.value.solution
    assert "vanishes at t = 1.0000" in message
    assert message.count("error") >= 5
    assert "stiff or singular there" in message
    assert "loosen rtol/atol" in message
    assert sol is not None
    assert sol.status is sa.Status.STEP_UNDERFLOW
    assert len(sol.y) == 2
    assert abs(float(sol.y[1]) - 2.0) < 1e-6


def test_every_error_is_of_the_library_and_says_more_than_its_type() -> None:
    kinds = (sa.ArgumentError, sa.FieldOutputError, sa.CaptureError, sa.SolveError)
    assert all(issubclass(kind, sa.SymplecticAdjointError) for kind in kinds)
    assert issubclass(sa.UnknownNameError, sa.ArgumentError)
    failures = (
        sa.NonFiniteError,
        sa.StepUnderflowError,
        sa.StepLimitError,
        sa.EventNotFoundError,
        sa.NonlinearSolveError,
        sa.MemoryBudgetError,
        sa.StoreError,
    )
    assert {kind.status for kind in failures} == set(sa.Status) - {
        sa.Status.SUCCESS,
        sa.Status.EVENT,
    }


def test_a_solve_that_succeeds_says_so() -> None:
    sol = sa.solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0], throw=False)
    assert sol.status is sa.Status.SUCCESS
    assert sol.message == ""
