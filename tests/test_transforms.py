"""Solves inside the transforms of ``torch.func``, and in their compositions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils import _pytree as pytree

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.gradients import Strategy
from tests import problems
from tests.conformance.registry import QUICK, label, pacing, strategies

BOUND = 1e-12

EXACT = strategies(exact=True)
# Those that reverse steps in ways of their own.
REVERSED = [s for s in EXACT if getattr(s, "accumulate", "inplace") == "inplace"]

every_strategy = pytest.mark.parametrize("strategy", REVERSED, ids=label)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))


def end(module: nn.Module, strategy: Any = "symplectic") -> Callable[[Tensor], Tensor]:
    """y0 -> outputs, two of them, one inside a step."""
    method = getattr(strategy, "method", None) or "bosh3"

    def run(y0: Tensor) -> Tensor:
        times = [0.0, 0.37, 1.0]
        options: Any = {"method": method, "rtol": 1e-3, "atol": 1e-3, "gradient": strategy}
        sol = sa.solve(lambda t, y: module(y) * torch.cos(t), y0, times, **options)
        y: Tensor = sol.y[1:]
        return y

    return run


def scalar(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.sin(run(x)).sum()


def close(got: Any, wanted: Any, bound: float = BOUND) -> None:
    a, b = pytree.tree_leaves(got), pytree.tree_leaves(wanted)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert problems.relative_error(x, y) <= bound


def looped(fn: Callable[[Tensor], Any], xs: Tensor) -> Any:
    rows = [fn(x) for x in xs]
    return pytree.tree_map(lambda *parts: torch.stack(parts), *rows)


def reference(order: int) -> Callable[[Tensor], Tensor]:
    """A derivative of the scalar, by plain autograd through the solver."""
    fn = scalar(end(net(), "backprop"))
    for _ in range(order):
        fn = functools.partial(torch.autograd.functional.jacobian, fn, create_graph=True)
    return fn


X = torch.tensor([0.4, -0.7], dtype=torch.float64)
V = torch.tensor([0.3, 1.1], dtype=torch.float64)
BATCH = torch.tensor([[0.4, -0.7], [2.5, 0.1], [-1.2, 1.9]], dtype=torch.float64)


# First derivatives ------------------------------------------------------------------------------


@every_strategy
def test_first_derivatives_are_those_of_plain_autograd(strategy: Strategy) -> None:
    plain = "mali" if strategy.method else "backprop"
    module = net()
    wanted = torch.autograd.functional.jacobian(end(module, sa.gradients.get(plain)), X)
    run = end(module, strategy)
    g = torch.randn(2, 2)
    close(jacrev(run)(X), wanted)
    close(jacfwd(run)(X), wanted)
    close(jvp(run, (X,), (V,))[1], wanted @ V)
    close(vjp(run, X)[1](g)[0], torch.einsum("ij,ijk->k", g, wanted))
    weight = torch.cos(run(X))
    close(grad(scalar(run))(X), torch.einsum("ij,ijk->k", weight, wanted))
    close(vmap(jacrev(run))(BATCH), looped(lambda x: jacrev(run)(x), BATCH))


@pytest.mark.parametrize("method", [*QUICK, "trbdf2"])
def test_every_input_of_every_method_has_its_derivative(method: str) -> None:
    """State, parameters, extra argument and times of a pytree problem, forwards and backwards."""
    times = (0.1, 0.21, 0.23, 0.7, 1.28, 1.3)
    case = problems.case(tree=True, times=times, wants_time=True)
    controller, tolerance = pacing(steppers.get(method))
    inputs = {name: x.detach() for name, x in case.inputs().items()}
    tree = pytree.tree_structure(case.y0)

    def run(values: dict[str, Tensor]) -> Tensor:
        leaves = [values[f"y0[{i}]"] for i in range(tree.num_leaves)]
        params = {name: values[name] for name in case.params}
        y = sa.solve(
            lambda t, y, gain: functional_call(case.func, params, (t, y, gain)),
            pytree.tree_unflatten(leaves, tree),
            values["t"],
            args=(values["args[0]"],),
            method=method,
            controller=controller,
            rtol=tolerance,
            atol=tolerance,
        ).y
        return problems.loss(y)

    wanted = case.gradients_of(run)
    close(grad(run)(inputs), wanted)
    tangents = {name: torch.randn_like(x) for name, x in inputs.items()}
    along = sum((wanted[name] * t).sum() for name, t in tangents.items())
    close(jvp(run, (inputs,), (tangents,))[1], along)
    with torch.autograd.forward_ad.dual_level():
        make = torch.autograd.forward_ad.make_dual
        dual = run({name: make(x, tangents[name]) for name, x in inputs.items()})
        close(torch.autograd.forward_ad.unpack_dual(dual).tangent, along)


def test_the_gradient_is_the_lean_sweep_of_the_strategy() -> None:
    """Evaluations of the module: the solve, and each stage once more."""
    calls: list[int] = []
    module = net()
    module.register_forward_hook(lambda *_: calls.append(1))
    sols = []

    def run(y0: Tensor) -> Tensor:
        sols.append(sa.solve(lambda t, y: module(y), y0, [0.0, 1.0], rtol=1e-3, atol=1e-3))
        y: Tensor = sols[-1].y[-1].sum()
        return y

    grad(run)(X)
    stats = sols[0].stats
    assert stats.products == stats.backward_evaluations > 10
    assert len(calls) == stats.evaluations + stats.backward_evaluations


# Batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [sa.Symplectic(), sa.Backprop(), sa.Continuous()], ids=label)
def test_vmap_over_states_is_a_loop_each_sample_with_its_own_steps(strategy: Strategy) -> None:
    module = net()

    def run(y0: Tensor) -> Any:
        sol = sa.solve(
            lambda t, y: module(y) * y, y0, [0.0, 1.0], rtol=1e-6, atol=1e-6, gradient=strategy
        )
        return sol.y, sol.steps

    y, steps = vmap(run)(BATCH)
    rows = [run(x) for x in BATCH]
    close(y, torch.stack([row for row, _ in rows]), 0.0)
    counts = [len(row) for _, row in rows]
    assert len(set(counts)) > 1
    for got, (_, wanted) in zip(steps, rows, strict=True):
        assert torch.equal(got[: len(wanted)], wanted)
        assert torch.isnan(got[len(wanted) :]).all()


def test_vmap_over_parameters_solves_an_ensemble() -> None:
    modules = [net() for _ in range(3)]
    with torch.no_grad():
        for i, module in enumerate(modules):
            for p in module.parameters():
                p.mul_(1 + i)
    params, buffers = stack_module_state(modules)
    base = net().to("meta")

    def run(params: Any, buffers: Any, y0: Tensor) -> Tensor:
        func = lambda t, y: functional_call(base, (params, buffers), (y,))  # noqa: E731
        y: Tensor = sa.odeint(func, y0, [0.0, 1.0], rtol=1e-4, atol=1e-4)[-1]
        return y

    def alone(module: nn.Module, y0: Tensor) -> Tensor:
        y: Tensor = sa.odeint(lambda t, y: module(y), y0, [0.0, 1.0], rtol=1e-4, atol=1e-4)[-1]
        return y

    wanted = torch.stack([alone(module, X) for module in modules])
    got = vmap(run, in_dims=(0, 0, None))(params, buffers, X)
    close(got, wanted, 0.0)
    own = [
        torch.autograd.grad(y.square().sum(), list(m.parameters()))
        for y, m in zip(wanted, modules, strict=False)
    ]
    stacked = torch.autograd.grad(got.square().sum(), list(params.values()))
    close(stacked, [torch.stack(parts) for parts in zip(*own, strict=True)])

    def loss(params: Any, y0: Tensor) -> Tensor:
        return run(params, buffers, y0).square().sum()

    inside = vmap(grad(loss), in_dims=(0, None))(params, X)
    close([inside[name] for name in params], stacked)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (1, 0, None), (0, 0, 1)])
def test_vmap_over_args_in_any_dimension(in_dims: Any) -> None:
    """A float, an integer index and a tensor in a nested container."""
    y0, rates, index = torch.randn(2, 2), torch.randn(2), torch.tensor([[0, 1], [1, 0]])

    def run(y0: Tensor, rate: Tensor, index: Tensor) -> Tensor:
        def func(t: Tensor, y: Tensor, given: Any) -> Tensor:
            return torch.sin(y * given["rate"]) * y[..., given["index"][0]].sum()

        y0 = y0 if y0.ndim == 1 else y0[0]
        rate = rate if rate.ndim == 0 else rate[1]
        given = {"rate": rate, "index": (index if index.ndim == 1 else index[0],)}
        y: Tensor = sa.odeint(lambda t, y: func(t, y, given), y0, [0.0, 0.5], rtol=1e-4, atol=1e-4)[
            -1
        ]
        return y

    def sample(i: int) -> list[Tensor]:
        pairs = zip((y0, rates, index), in_dims, strict=True)
        return [x if dim is None else x.select(dim, i) for x, dim in pairs]

    wanted = torch.stack([run(*sample(i)) for i in range(2)])
    close(vmap(run, in_dims=in_dims)(y0, rates, index), wanted, 0.0)


def test_vmap_over_times_and_extra_arguments() -> None:
    t = torch.tensor([[0.0, 1.0], [0.2, 0.5]])
    gains = torch.tensor([1.0, 2.0])

    def run(t: Tensor, gain: Tensor) -> Tensor:
        y: Tensor = sa.solve(lambda t, y, a: a * torch.sin(y) * t, X, t, args=(gain,)).y[-1].sum()
        return y

    wanted = [
        torch.autograd.functional.jacobian(run, (a, b)) for a, b in zip(t, gains, strict=False)
    ]
    got = vmap(grad(run, argnums=(0, 1)))(t, gains)
    close(got, [torch.stack(parts) for parts in zip(*wanted, strict=True)])


def test_random_numbers_under_vmap_follow_its_randomness() -> None:
    def run(y0: Tensor) -> Tensor:
        def func(t: Tensor, y: Tensor) -> Tensor:
            return y + torch.rand_like(y)

        y: Tensor = sa.odeint(func, y0, [0.0, 0.5], method="rk4")[-1]
        return y

    same = X.expand(3, 2).clone()
    with pytest.raises(sa.ArgumentError, match="randomness='same'"):
        vmap(run)(same)
    torch.manual_seed(3)
    y = vmap(run, randomness="same")(same)
    torch.manual_seed(3)
    close(y, run(X).expand(3, 2), 0.0)
    torch.manual_seed(3)
    y = vmap(run, randomness="different")(same)
    torch.manual_seed(3)
    close(y, torch.stack([run(X) for _ in range(3)]), 0.0)
    assert not torch.equal(y[0], y[1])


def test_derivatives_draw_the_numbers_of_the_solve_again() -> None:
    def run(y0: Tensor) -> Tensor:
        y: Tensor = sa.odeint(
            lambda t, y: torch.sin(y + torch.rand_like(y)), y0, [0.0, 0.5], method="rk4"
        )[-1]
        return y

    results = []
    for derivative in (
        jacrev(run),
        jacfwd(run),
        functools.partial(torch.autograd.functional.jacobian, run),
    ):
        torch.manual_seed(3)
        results.append(derivative(X))
    close(results[0], results[2])
    close(results[1], results[2])


# Compositions -----------------------------------------------------------------------------------


SECOND: dict[str, Callable[[Any], Any]] = {
    "hessian": hessian,
    "jacrev jacrev": lambda f: jacrev(jacrev(f)),
    "jacfwd jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacrev jacfwd": lambda f: jacrev(jacfwd(f)),
}


@pytest.mark.parametrize("strategy", [s for s in REVERSED if s.method is None], ids=label)
def test_second_derivatives_are_those_of_plain_autograd(strategy: Strategy) -> None:
    close(hessian(scalar(end(net(), strategy)))(X), reference(2)(X))


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_in_every_mode(name: str) -> None:
    close(SECOND[name](scalar(end(net())))(X), reference(2)(X))


@pytest.mark.parametrize("name", ["hessian", "jacrev jacrev"])
def test_vmap_of_second_derivatives_is_a_loop(name: str) -> None:
    got = vmap(SECOND[name](scalar(end(net()))))(BATCH)
    close(got, looped(reference(2), BATCH))


def test_hessian_vector_products_in_every_mode() -> None:
    fn = scalar(end(net()))
    wanted = reference(2)(X) @ V
    close(jvp(grad(fn), (X,), (V,))[1], wanted)
    close(vjp(grad(fn), X)[1](V)[0], wanted)
    close(grad(lambda x: (grad(fn)(x) * V).sum())(X), wanted)
    close(grad(lambda x: jvp(fn, (x,), (V,))[1])(X), wanted)


def test_third_derivatives_in_mixed_modes() -> None:
    fn, wanted = scalar(end(net())), reference(3)(X)
    close(jacrev(jacfwd(jacrev(fn)))(X), wanted)
    close(jacfwd(jacfwd(grad(fn)))(X), wanted)


def test_gradient_of_a_batch_and_batch_of_batches() -> None:
    fn, plain = scalar(end(net())), reference(0)
    wanted = torch.autograd.functional.jacobian(lambda xs: looped(plain, xs).square().sum(), BATCH)
    close(grad(lambda xs: vmap(fn)(xs).square().sum())(BATCH), wanted)
    grid = torch.stack([BATCH, BATCH + 0.1])
    close(vmap(vmap(fn))(grid), torch.stack([looped(fn, xs) for xs in grid]), 0.0)
    pairs = vmap(vmap(grad(lambda x, s: fn(s * x)), (None, 0)), (0, None))(BATCH, V)
    wanted = torch.stack([torch.stack([reference(1)(s * x) * s for s in V]) for x in BATCH])
    close(pairs, wanted)


def test_plain_autograd_and_transforms_share_a_graph() -> None:
    """A transform inside, plain autograd around it, with respect to what the module holds."""
    module, plain = net(), net()
    penalty = grad(scalar(end(module)))(X).square().sum()
    x = X.clone().requires_grad_()
    (inner,) = torch.autograd.grad(scalar(end(plain, "backprop"))(x), x, create_graph=True)
    wanted = torch.autograd.grad(inner.square().sum(), list(plain.parameters())[:3])
    close(torch.autograd.grad(penalty, list(module.parameters())[:3]), wanted)


# What cannot be seen ----------------------------------------------------------------------------


class Held:
    """Holds a tensor where a walk over the references of a function does not look."""

    rate: Tensor


def test_a_hidden_tensor_of_a_transform_is_found_when_it_is_used() -> None:
    def run(rate: Tensor) -> Tensor:
        Held.rate = rate
        y: Tensor = sa.odeint(lambda t, y: y * Held.rate if t > 0.5 else y, X, [0.0, 1.0])[-1]
        return y

    rates = torch.tensor([0.5, 0.9])
    wanted = torch.stack([torch.autograd.functional.jacobian(run, rate) for rate in rates])
    assert wanted.abs().min() > 0.1
    close(vmap(jacrev(run))(rates), wanted)
    close(vmap(jacfwd(run))(rates), wanted)
    close(vmap(run)(rates), torch.stack([run(rate) for rate in rates]), 0.0)


def test_a_hidden_tangent_is_found_when_it_is_used() -> None:
    with torch.autograd.forward_ad.dual_level():
        make = torch.autograd.forward_ad.make_dual
        Held.rate = make(torch.tensor(0.5), torch.tensor(1.0))
        y = sa.odeint(lambda t, y: y * Held.rate, X, [0.0, 1.0], rtol=1e-9, atol=1e-9)[-1]
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    close(tangent, X * torch.tensor(0.5).exp(), 1e-7)


def test_params_makes_all_other_tensors_of_a_transform_constants() -> None:
    def run(a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = sa.odeint(lambda t, y: a * b * y, X, [0.0, 1.0], params=[a])[-1].sum()
        return y

    a, b = torch.tensor(0.3), torch.tensor(0.8)
    got = grad(run, argnums=(0, 1))(a, b)
    assert got[0].abs() > 0.01
    assert got[1] == 0
    close(
        vmap(run)(torch.stack([a, b]), torch.stack([b, a])),
        torch.stack([run(a, b), run(b, a)]),
        0.0,
    )


def test_what_transforms_cannot_give_is_refused() -> None:
    with pytest.raises(sa.ArgumentError, match="ask for all times in t"):
        grad(lambda x: sa.solve(lambda t, y: -y, x, [0.0, 1.0], dense=True).y.sum())(X)
    with pytest.raises(sa.ArgumentError, match=r"torch\.autograd"):
        grad(lambda x: sa.solve(lambda t, y: -y, x, [0.0, 1.0], event=lambda t, y: t).y.sum())(X)
    with pytest.raises(sa.NonFiniteError, match=r"component \d"):
        vmap(lambda x: sa.odeint(lambda t, y: y / (t < 0.5), x, [0.0, 0.5, 1.0], method="euler"))(
            BATCH
        )


@pytest.mark.parametrize("name", [*SECOND, "hvp"])
def test_second_derivatives_of_the_continuous_adjoint_raise(name: str) -> None:
    fn = scalar(end(net(), sa.Continuous()))
    with pytest.raises(sa.SecondDerivativeError, match="continuous"):
        (lambda f: jvp(grad(f), (X,), (V,)) if name == "hvp" else SECOND[name](f)(X))(fn)


def test_vmap_without_grad_mode_and_in_inference_mode() -> None:
    run, wanted = end(net()), looped(end(net()), BATCH)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = vmap(run)(BATCH + 0)
        close(got, wanted.detach(), 0.0)
        assert not got.requires_grad
    with torch.no_grad():
        close(jacfwd(run)(X), jacrev(run)(X))


def test_a_function_that_differentiates_inside_itself() -> None:
    """With torch.func, and with torch.autograd, in every mode."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    def functional(t: Tensor, y: Tensor) -> Tensor:
        return grad(lambda x: module(x).sum())(y).flip(-1)

    def plain(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y.requires_grad_()
            (slope,) = torch.autograd.grad(module(y).sum(), y, create_graph=True)
        return slope.flip(-1)

    def expecting(t: Tensor, y: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(module(y).sum(), y, create_graph=True)
        return slope.flip(-1)

    results = []
    for func in (functional, plain, expecting):
        run = lambda x, func=func: sa.odeint(func, x, [0.0, 1.0], method="rk4")[-1].sin().sum()  # noqa: E731
        results += [vmap(hessian(run))(BATCH), vmap(jacrev(jacrev(run)))(BATCH)]
    wanted = looped(
        lambda x: torch.autograd.functional.hessian(
            lambda x: (
                sa.odeint(functional, x, [0.0, 1.0], method="rk4", gradient="aca")[-1].sin().sum()
            ),
            x,
        ),
        BATCH,
    )
    for got in results:
        close(got, wanted)


@pytest.mark.parametrize("method", ["dopri5", "radauIIA5"])
def test_statistics_are_sums_over_the_batch(method: str) -> None:
    kept: list[sa.Solution] = []

    def final(y: Tensor) -> Tensor:
        kept.append(sa.solve(lambda t, y: -(y**3), y, [0.0, 1.0], method=method, rtol=1e-4))
        return kept[-1].y[-1].sum()

    ys = torch.tensor([[1.0], [0.5], [2.0]], dtype=torch.float64)
    torch.func.vmap(torch.func.grad(final))(ys)
    total, parts = kept[0].stats, []
    for y in ys:
        y = y.clone().requires_grad_()
        final(y).backward()
        parts.append(kept[-1].stats)
    for f in dataclasses.fields(sa.Stats):
        assert getattr(total, f.name) == sum(getattr(part, f.name) for part in parts), f.name
