"""What users do with a solve and its gradient, under every strategy."""

from __future__ import annotations

import contextlib
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.gradients import Strategy
from tests import problems
from tests.conformance import reference
from tests.conformance.registry import label, strategies

BOUND = 1e-12
"""Relative error of an exact strategy against plain autograd, in float64."""

EXACT = strategies(exact=True)
EVERY = [*EXACT, sa.Continuous()]
PLAIN = [s for s in EXACT if getattr(s, "accumulate", "inplace") == "inplace"]
"""Where the summation of the parameters' parts makes no difference."""

TIMES = (0.0, 0.3, 0.7, 1.0)

every_strategy = pytest.mark.parametrize("strategy", [*PLAIN, sa.Continuous()], ids=label)
every_exact_strategy = pytest.mark.parametrize("strategy", PLAIN, ids=label)
every_sum = pytest.mark.parametrize("strategy", EXACT, ids=label)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (0.5 * torch.randn(shape, dtype=dtype)).requires_grad_()


def method_of(strategy: Strategy) -> str:
    return strategy.method or "rk4_classic"


def solution(func: Any, y0: Any, strategy: Strategy, t: Any = TIMES, **options: Any) -> sa.Solution:
    """A solve on the grid of its output times; a finer one where the strategy is not exact."""
    options.setdefault("method", method_of(strategy))
    grid = sa.FixedGrid() if strategy.exact else sa.FixedGrid(step_size=0.1)
    options.setdefault("controller", grid)
    return sa.solve(func, y0, t, gradient=strategy, **options)


def solve(func: Any, y0: Any, strategy: Strategy, t: Any = TIMES, **options: Any) -> Any:
    return solution(func, y0, strategy, t, **options).y


def backprop(func: Any, y0: Any, strategy: Strategy, t: Any = TIMES, **options: Any) -> Any:
    """The same solve under plain autograd."""
    options.setdefault("method", method_of(strategy))
    grid = sa.FixedGrid() if strategy.exact else sa.FixedGrid(step_size=0.1)
    options.setdefault("controller", grid)
    return sa.solve(func, y0, t, gradient="backprop", **options).y


def replayed(func: Any, y0: Any, strategy: Strategy, t: Any = TIMES) -> Any:
    """The same solve on the grid of its output times, written out by hand."""
    nodes = list(torch.as_tensor(t, dtype=torch.float64).unbind())
    return reference.frozen(steppers.get(method_of(strategy)), func, y0, nodes, nodes)


def gradients(y: Any, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor | None]:
    wanted = list(tensors.values())
    grads = torch.autograd.grad(problems.loss(y), wanted, allow_unused=True, **options)
    return dict(zip(tensors, grads, strict=True))


def assert_close(
    got: dict[str, Tensor | None], wanted: dict[str, Tensor | None], bound: float = BOUND
) -> None:
    error, where = problems.worst(got, wanted)
    assert error <= bound, f"{where} is off by {error:.1e}"


def net(dtype: torch.dtype = torch.float64, dim: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 4, dtype=dtype), nn.Tanh(), nn.Linear(4, dim, dtype=dtype))


def named(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


# Functions that differentiate inside themselves ------------------------------------------------


class Energy(nn.Module):
    """A Hamiltonian network with a time-dependent energy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 5, dtype=torch.float64), nn.Tanh(), nn.Linear(5, 1, dtype=torch.float64)
        )

    def energy(self, t: Tensor, y: Tensor) -> Tensor:
        return (self.net(y).squeeze(-1) * torch.cos(t)).sum()


def rotated(gradient: Tensor) -> Tensor:
    dq, dp = gradient.chunk(2, dim=-1)
    return torch.cat([dp, -dq], dim=-1)


class Asking(Energy):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y = y.requires_grad_()
        return rotated(torch.autograd.grad(self.energy(t, y), y, create_graph=True)[0])


class Expecting(Energy):
    """Takes it that its argument requires grad."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return rotated(torch.autograd.grad(self.energy(t, y), y, create_graph=True)[0])


class Enabling(Energy):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.requires_grad_()
            return rotated(torch.autograd.grad(self.energy(t, y), y, create_graph=True)[0])


class Functional(Energy):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return rotated(torch.func.grad(self.energy, argnums=1)(t, y))


class Vmapped(Energy):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        one = torch.func.grad(self.energy, argnums=1)
        return rotated(torch.func.vmap(one, in_dims=(None, 0))(t, y))


class Forward(Energy):
    """Differentiates along a direction, in forward mode."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: torch.tanh(self.net(x)) * x, (y,), (torch.cos(y),))[1]


class Flow(nn.Module):
    """FFJORD: the state and its log-density, whose derivative is minus the divergence."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.noise = torch.randn(2, 3, dtype=torch.float64)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = state[0].requires_grad_()
            dz = self.net(z) * torch.cos(t)
            return dz, -self.divergence(dz, z).unsqueeze(-1)

    def divergence(self, dz: Tensor, z: Tensor) -> Tensor:
        (e_dz,) = torch.autograd.grad(dz, z, self.noise, create_graph=True)
        return (e_dz * self.noise).sum(-1)


class ExactFlow(Flow):
    def divergence(self, dz: Tensor, z: Tensor) -> Tensor:
        total = torch.zeros(len(z), dtype=z.dtype)
        for i in range(z.shape[-1]):
            total = total + torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i]
        return total


class JacobianFlow(Flow):
    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, _ = state
        jacobian = torch.func.vmap(torch.func.jacrev(self.net))(z) * torch.cos(t)
        trace = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        return self.net(z) * torch.cos(t), -trace


INSIDE = [Asking, Expecting, Enabling, Functional, Vmapped, Forward, Flow, ExactFlow, JacobianFlow]

every_inside = pytest.mark.parametrize("make", INSIDE)


def initial(module: nn.Module, requires_grad: bool = True) -> Any:
    if isinstance(module, Flow):
        z = leaf(2, 3).detach().requires_grad_(requires_grad)
        return (z, torch.zeros(2, 1, dtype=torch.float64))
    return leaf(2, 4).detach().requires_grad_(requires_grad)


def leaves(y0: Any) -> dict[str, Tensor]:
    flat = pytree.tree_leaves(y0)
    return {f"y0[{i}]": x for i, x in enumerate(flat) if x.requires_grad}


@every_inside
@every_strategy
def test_func_may_differentiate_inside_itself(strategy: Strategy, make: Any) -> None:
    module = make()
    y0 = initial(module)
    tensors = {**leaves(y0), **named(module)}
    got = gradients(solve(module, y0, strategy), tensors)
    if strategy.exact:
        assert_close(got, gradients(replayed(module, y0, strategy), tensors))
    assert_close(
        got, gradients(backprop(module, y0, strategy), tensors), 1e-2 * (not strategy.exact) + BOUND
    )


@every_inside
@every_strategy
def test_func_may_differentiate_inside_itself_with_respect_to_a_constant_state(
    strategy: Strategy, make: Any
) -> None:
    module = make()
    y0 = initial(module, requires_grad=False)
    y = solve(module, y0, strategy)
    got = gradients(y, named(module))
    assert not any(x.requires_grad for x in pytree.tree_leaves(y0))
    y0 = pytree.tree_map(lambda x: x.clone().requires_grad_(), y0)
    wanted = gradients(backprop(module, y0, strategy), named(module))
    assert_close(got, wanted, 1e-2 * (not strategy.exact) + BOUND)


@every_inside
@pytest.mark.parametrize("strategy", [sa.Symplectic(), sa.Backprop()], ids=label)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_func_may_differentiate_inside_itself_without_grad_mode(
    strategy: Strategy, make: Any, mode: Any
) -> None:
    module = make()
    y0 = initial(module, requires_grad=False)
    with mode():
        ours = pytree.tree_map(lambda x: x + 0, y0)  # an inference tensor in inference mode
        y = solve(module, ours, strategy)
    wanted = solve(module, y0, strategy)
    for a, b in zip(pytree.tree_leaves(y), pytree.tree_leaves(wanted), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    assert not any(x.requires_grad for x in pytree.tree_leaves(ours))
    assert all(x.grad is None for x in module.parameters())


def test_the_model_of_inference_mode_may_be_trained_afterwards() -> None:
    module, y0 = net(), leaf(2, 3).detach()
    with torch.inference_mode():
        sa.odeint(lambda t, y: module(y), y0, TIMES)
    sa.odeint(lambda t, y: module(y), y0, TIMES).sum().backward()
    assert all(x.grad is not None for x in module.parameters())


# Autocast --------------------------------------------------------------------------------------


@every_sum
@pytest.mark.parametrize("cache", [False, True])
def test_stages_are_recomputed_under_the_autocast_state_of_the_forward_pass(
    strategy: Strategy, cache: bool
) -> None:
    module = net(torch.float32)
    seen: list[bool] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return module(y)

    def found(run: Callable[..., Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            y = run(func, y0, strategy)
        return y, gradients(y, {"y0": y0, **named(module)})

    y0 = leaf(2, 3, dtype=torch.float32)
    y, got = found(solve)
    assert all(seen)
    assert not torch.is_autocast_enabled("cpu")
    wanted_y, wanted = found(backprop)
    if strategy.method is None:
        assert torch.equal(y, wanted_y)
    # With its cache, plain autograd sums the parameters' parts in bfloat16, and we in float32;
    # tangents round in bfloat16 as they go forwards, cotangents as they go backwards.
    rough = cache or strategy.name == "forward"
    assert_close(got, wanted, 2e-2 if rough else 1e-6)
    plain = gradients(solve(func, y0, strategy), {"y0": y0, **named(module)})
    assert problems.worst(got, plain)[0] > 1e-4  # bfloat16 was really used


@every_strategy
def test_autocast_around_the_backward_pass_alone_changes_nothing(strategy: Strategy) -> None:
    if strategy.name == "backprop":
        pytest.skip("autograd itself then computes in bfloat16")
    module, y0 = net(torch.float32), leaf(2, 3, dtype=torch.float32)
    tensors = {"y0": y0, **named(module)}
    wanted = gradients(solve(lambda t, y: module(y), y0, strategy), tensors)
    y = solve(lambda t, y: module(y), y0, strategy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(y, tensors)
    assert_close(got, wanted, 0.0)


# Random numbers --------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self, start: float, kind: str) -> None:
        super().__init__()
        self.net = net()
        self.start = start
        self.kind = kind

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out = self.net(y)
        if t < self.start:
            return out
        if self.kind == "dropout":
            return nn.functional.dropout(out * y, 0.5)
        return out * (1 + torch.randn_like(y))


@every_exact_strategy
@pytest.mark.parametrize("kind", ["dropout", "noise"])
@pytest.mark.parametrize("start", [0.0, 0.2, 0.3, 0.5, 0.7, 0.99])
def test_random_numbers_are_drawn_again_as_in_the_forward_pass(
    strategy: Strategy, kind: str, start: float
) -> None:
    """From the first evaluation on, or first at a node, at a stage, or at the last node."""
    module, y0 = Noisy(start, kind), leaf(2, 3)
    tensors = {"y0": y0, **named(module)}
    times = (0.0, 0.3, 0.5, 0.7, 1.0)

    def found(run: Callable[..., Any]) -> tuple[Any, Any, Tensor]:
        torch.manual_seed(3)
        y = run(module, y0, strategy, times)
        after = torch.get_rng_state()
        torch.randn(5)
        before_backward = torch.get_rng_state()
        grads = gradients(y, tensors)
        assert torch.equal(torch.get_rng_state(), before_backward), "the stream was disturbed"
        return y, grads, after

    y, got, stream = found(solve)
    wanted_y, wanted, wanted_stream = found(backprop)
    assert problems.relative_error(y, wanted_y) <= 1e-14
    assert torch.equal(stream, wanted_stream)
    assert_close(got, wanted)


@every_exact_strategy
@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("method", ["dopri5", "vern7", "adaptive_heun"])
def test_random_numbers_survive_rejected_steps_and_dense_outputs(
    strategy: Strategy, method: str, start: float
) -> None:
    if strategy.method is not None:
        method = strategy.method
    module, y0 = Noisy(start, "noise"), leaf(2, 3)
    tensors = {"y0": y0, **named(module)}
    # The noise never averages out; min_step lets the solve pass.
    options: Any = {
        "method": method,
        "rtol": 1e-3,
        "atol": 1e-3,
        "controller": sa.Adaptive(first_step=0.3, min_step=0.1),
    }
    torch.manual_seed(3)
    sol = solution(module, y0, strategy, torch.linspace(0, 1, 12), **options)
    got = gradients(sol.y, tensors)
    torch.manual_seed(3)
    wanted_y = backprop(module, y0, strategy, torch.linspace(0, 1, 12), **options)
    assert sol.stats.rejected
    assert problems.relative_error(sol.y, wanted_y) <= 1e-14
    assert_close(got, gradients(wanted_y, tensors))


class DrawingOnce(nn.Module):
    """Draws at one evaluation only, given by its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.net = net()
        self.number = number
        self.place: float | None = None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out = self.net(y)
        if self.place is None:
            self.number -= 1
            if self.number == 0:
                self.place = float(t)
        return out * torch.rand_like(out) if float(t) == self.place else out


@every_exact_strategy
def test_numbers_drawn_first_in_any_stage_are_drawn_again(strategy: Strategy) -> None:
    """Those of both steps and of the interpolants in them, as far as there are so many."""
    y0, found = leaf(2, 3), 0
    options: Any = {
        "method": strategy.method or "vern7",
        "controller": sa.FixedGrid(step_size=0.5),
    }
    times = (0.0, 0.1, 0.9, 1.0)
    for number in (1, 2, 11, 12, 17, 27):
        module = DrawingOnce(number)
        tensors = {"y0": y0, **named(module)}
        solve(module, y0, strategy, times, **options)  # finds the place
        found += module.place is not None
        if module.place is not None:
            torch.manual_seed(3)
            y = solve(module, y0, strategy, times, **options)
            got = gradients(y, tensors)
            torch.manual_seed(3)
            wanted_y = backprop(module, y0, strategy, times, **options)
            assert problems.relative_error(y, wanted_y) <= 1e-14, f"evaluation {number}"
            assert_close(got, gradients(wanted_y, tensors))
    assert found >= (2 if strategy.method else 6)


@every_strategy
def test_the_backward_pass_leaves_the_stream_of_random_numbers_alone(strategy: Strategy) -> None:
    module, y0 = Noisy(0.0, "noise"), leaf(2, 3)
    y = solve(module, y0, strategy)
    before = torch.get_rng_state()
    problems.loss(y).backward()
    assert torch.equal(torch.get_rng_state(), before)


@every_exact_strategy
def test_a_solve_that_starts_again_draws_the_same_numbers(strategy: Strategy) -> None:
    """A hidden tensor is found late, after random numbers were drawn."""
    hidden = leaf(3)
    box = iter(lambda: hidden, None)

    def func(t: Tensor, y: Tensor) -> Tensor:
        y = torch.sin(y + torch.rand_like(y))
        return y if t < 0.5 else y * next(box)

    y0 = leaf(2, 3)
    torch.manual_seed(3)
    y = solve(func, y0, strategy)
    torch.manual_seed(3)
    wanted = backprop(func, y0, strategy)
    assert problems.relative_error(y, wanted) <= 1e-14
    tensors = {"y0": y0, "hidden": hidden}
    assert_close(gradients(y, tensors), gradients(wanted, tensors))


# Backward passes -------------------------------------------------------------------------------


@every_sum
def test_a_second_backward_pass_gives_the_same_gradient(strategy: Strategy) -> None:
    module, y0, t = net(), leaf(2, 3), torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    tensors = {"y0": y0, "t": t, **named(module)}
    y = solve(lambda t, y: module(y) * torch.cos(t), y0, strategy, t)
    first = gradients(y, tensors, retain_graph=True)
    second = gradients(y, tensors, retain_graph=True)
    third = gradients(2 * y, tensors)
    assert_close(second, first, 1e-15)
    assert_close({k: None if x is None else x / 2 for k, x in third.items()}, first, 1e-15)


@every_strategy
def test_backward_twice_without_retaining_raises(strategy: Strategy) -> None:
    module, y0 = net(), leaf(2, 3)
    y = solve(lambda t, y: module(y), y0, strategy)
    problems.loss(y).backward()
    with pytest.raises(RuntimeError, match="second time"):
        problems.loss(y).backward()


@every_strategy
@pytest.mark.parametrize("retain", [False, True])
def test_what_was_kept_is_freed_after_the_backward_pass(strategy: Strategy, retain: bool) -> None:
    module, y0 = net(), leaf(2, 3)
    held: list[StorageWeakRef] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(module(y))
        if 0 < t < 1:
            held.extend(StorageWeakRef(x.untyped_storage()) for x in (y, hidden))
        return hidden * y

    sol = solution(func, y0, strategy, (0.0, 1.0), controller=sa.FixedGrid(step_size=0.25))
    forward = list(held)
    kept = sum(not ref.expired() for ref in forward)
    assert (kept > 0) == (strategy.name in ("symplectic", "backprop", "aca"))
    problems.loss(sol.y).backward(retain_graph=retain)
    alive = sum(not ref.expired() for ref in forward)
    if not retain:
        assert alive == 0
        assert all(ref.expired() for ref in held)
    elif getattr(strategy, "store", None) == "graph":
        assert 0 < alive < kept  # the graphs are used up, their stages are still there
    else:
        assert alive == kept


@every_strategy
def test_dropping_the_solution_frees_what_was_kept(strategy: Strategy) -> None:
    module, y0 = net(), leaf(2, 3)
    held: list[StorageWeakRef] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(module(y))
        held.extend(StorageWeakRef(x.untyped_storage()) for x in (y, hidden) if t > 0)
        return hidden * y

    sol = solution(func, y0, strategy, dense=True)
    del sol
    assert all(ref.expired() for ref in held)  # at once: there is no cycle of references


@every_sum
def test_hooks_fire_once_and_gradients_accumulate(strategy: Strategy) -> None:
    module, y0 = net(), leaf(2, 3)
    fired: list[str] = []
    wanted = gradients(solve(lambda t, y: module(y), y0, strategy), {"y0": y0, **named(module)})
    for name, x in {"y0": y0, **named(module)}.items():
        x.grad = torch.ones_like(x)
        x.register_hook(lambda g, name=name: fired.append(name))
        x.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(f"{name} after"))
    old = {name: x.grad for name, x in named(module).items()}
    problems.loss(solve(lambda t, y: module(y), y0, strategy)).backward()
    names = ["y0", *named(module)]
    assert sorted(fired) == sorted([*names, *(f"{name} after" for name in names)])
    for name, x in {"y0": y0, **named(module)}.items():
        assert problems.relative_error(x.grad - 1, wanted[name]) <= 1e-14
    assert all(x.grad is old[name] for name, x in named(module).items())  # added in place


@every_strategy
def test_asking_for_some_gradients_touches_no_others(strategy: Strategy) -> None:
    module, y0 = net(), leaf(2, 3)
    y = solve(lambda t, y: module(y), y0, strategy)
    torch.autograd.grad(problems.loss(y), y0)
    assert all(x.grad is None for x in (y0, *module.parameters()))
    bias = module[0].bias
    y = solve(lambda t, y: module(y), y0, strategy)
    problems.loss(y).backward(inputs=[bias])
    assert [x.grad is None for x in (y0, bias, module[0].weight)] == [True, False, True]


@every_strategy
def test_the_gradient_that_is_returned_is_not_shared(strategy: Strategy) -> None:
    """Changing one in place must not change another, or a later backward pass."""
    module, y0 = net(), leaf(2, 3)
    tensors = {"y0": y0, **named(module)}
    y = solve(lambda t, y: module(y), y0, strategy)
    first = gradients(y, tensors, retain_graph=True)
    wanted = {name: None if x is None else x.clone() for name, x in first.items()}
    for x in first.values():
        assert x is not None
        x.zero_()
    assert_close(gradients(y, tensors), wanted, 1e-15)


@every_exact_strategy
def test_outputs_may_be_changed_in_place(strategy: Strategy) -> None:
    module, y0 = net(), leaf(2, 3)
    tensors = {"y0": y0, **named(module)}
    wanted = gradients(2 * solve(lambda t, y: module(y), y0, strategy), tensors)
    y = solve(lambda t, y: module(y), y0, strategy)
    y *= 2
    assert_close(gradients(y, tensors), wanted, 1e-15)


def test_changing_outputs_that_the_continuous_adjoint_needs_raises() -> None:
    module, y0 = net(), leaf(2, 3)
    y = solve(lambda t, y: module(y), y0, sa.Continuous())
    y *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        problems.loss(y).backward()


@every_strategy
def test_the_initial_state_alone_has_no_gradient_for_the_parameters(strategy: Strategy) -> None:
    module, y0 = net(), leaf(2, 3)
    tensors = {"y0": y0, **named(module)}
    got = gradients(solve(lambda t, y: module(y), y0, strategy)[0], tensors)
    wanted = gradients(backprop(lambda t, y: module(y), y0, strategy)[0], tensors)
    assert_close(got, wanted, 0.0)


# Second derivatives ----------------------------------------------------------------------------


def second(y: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients of the squared norm of the gradient."""
    grads = torch.autograd.grad(
        problems.loss(torch.sin(y)), list(tensors.values()), create_graph=True
    )
    penalty = sum(g.square().sum() for g in grads)
    return gradients(penalty, tensors)


@every_sum
@pytest.mark.parametrize("outputs", ["nodes", "dense"])
def test_second_derivatives_are_those_of_plain_autograd(strategy: Strategy, outputs: str) -> None:
    module, y0 = net(), leaf(2, 3)
    times = TIMES if outputs == "nodes" else (0.0, 0.1, 0.15, 0.9, 1.0)
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    tensors = {"y0": y0, "t": t, **named(module)}
    grid = sa.FixedGrid() if outputs == "nodes" else sa.FixedGrid(step_size=0.4)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return module(y) * torch.cos(t)

    got = second(solve(func, y0, strategy, t, controller=grid), tensors)
    wanted = second(backprop(func, y0, strategy, t, controller=grid), tensors)
    assert_close(got, wanted)
    if outputs == "nodes":
        assert_close(got, second(replayed(func, y0, strategy, t), tensors))


@every_exact_strategy
def test_second_derivatives_are_right_on_adaptive_steps(strategy: Strategy) -> None:
    module, y0 = net(), leaf(2, 3)
    tensors = {"y0": y0, **named(module)}
    options: Any = {"controller": sa.Adaptive(), "method": strategy.method or "bosh3", "rtol": 1e-3}
    got = second(solve(lambda t, y: module(y), y0, strategy, **options), tensors)
    wanted = second(backprop(lambda t, y: module(y), y0, strategy, **options), tensors)
    assert_close(got, wanted)


@every_exact_strategy
def test_second_derivatives_are_those_of_finite_differences(strategy: Strategy) -> None:
    w, y0 = leaf(2), leaf(1, 2)

    def end(y0: Tensor, w: Tensor) -> Tensor:
        y: Tensor = solve(lambda t, y: torch.sin(w * y), y0, strategy, (0.0, 0.5, 1.0))
        return y[-1]

    assert torch.autograd.gradcheck(end, (y0, w))
    assert torch.autograd.gradgradcheck(end, (y0, w))


@every_exact_strategy
def test_third_derivatives_are_those_of_plain_autograd(strategy: Strategy) -> None:
    w, y0 = leaf(3), leaf(2, 3)

    def third(run: Callable[..., Any]) -> dict[str, Tensor | None]:
        y = run(lambda t, y: torch.sin(w * y), y0, strategy)
        (g,) = torch.autograd.grad(y.sum(), y0, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), y0, create_graph=True)
        return gradients(h, {"y0": y0, "w": w})

    assert_close(third(solve), third(backprop))


@every_exact_strategy
def test_second_derivatives_of_functions_that_differentiate_inside(strategy: Strategy) -> None:
    module = Asking()
    y0 = initial(module)
    tensors = {"y0": y0, **named(module)}
    del tensors["net.2.bias"]  # it shifts the energy
    got = second(solve(module, y0, strategy), tensors)
    assert_close(got, second(backprop(module, y0, strategy), tensors))


@every_exact_strategy
def test_second_derivatives_draw_the_same_random_numbers(strategy: Strategy) -> None:
    module, y0 = Noisy(0.5, "noise"), leaf(2, 3)
    tensors = {"y0": y0, **named(module)}
    torch.manual_seed(3)
    got = second(solve(module, y0, strategy), tensors)
    torch.manual_seed(3)
    assert_close(got, second(backprop(module, y0, strategy), tensors))


@every_exact_strategy
@pytest.mark.parametrize("hidden", [False, True])
def test_a_state_that_func_captures_too_gets_both_gradients(
    strategy: Strategy, hidden: bool
) -> None:
    y0 = leaf(2, 3)
    box = iter(lambda: y0, None)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y * (next(box) if hidden else y0))

    for derivative in (gradients, second):
        got = derivative(solve(func, y0, strategy), {"y0": y0})
        assert_close(got, derivative(backprop(func, y0, strategy), {"y0": y0}))
    first = gradients(solve(func, y0, strategy), {"y0": y0})
    assert_close(first, gradients(replayed(func, y0, strategy), {"y0": y0}))


@every_exact_strategy
def test_a_time_tensor_that_func_captures_too_gets_both_gradients(strategy: Strategy) -> None:
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    y0 = leaf(2, 3)

    def func(s: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y * s * t.sum())

    got = gradients(solve(func, y0, strategy, t), {"t": t, "y0": y0})
    assert_close(got, gradients(replayed(func, y0, strategy, t), {"t": t, "y0": y0}))


def test_a_second_derivative_of_the_continuous_adjoint_raises() -> None:
    module, y0 = net(), leaf(2, 3)
    y = solve(lambda t, y: module(y), y0, sa.Continuous())
    with pytest.raises(sa.SecondDerivativeError, match=r"continuous.*'symplectic'"):
        torch.autograd.grad(problems.loss(y), y0, create_graph=True)


# States of every kind --------------------------------------------------------------------------


DTYPES = {
    torch.float64: BOUND,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.complex128: BOUND,
    torch.complex64: 1e-5,
}


def whole(grads: dict[str, Tensor | None]) -> Tensor:
    """All gradients as one vector."""
    flat = [problems.precise(x).reshape(-1) for x in grads.values() if x is not None]
    return torch.cat([torch.view_as_real(x).flatten() if x.is_complex() else x for x in flat])


@every_exact_strategy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (3,), (), (0, 3)], ids=str)
def test_states_of_any_dtype_and_shape_get_their_gradients(
    strategy: Strategy, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    w = leaf(3, dtype=dtype) if shape else leaf(dtype=dtype)
    b = leaf(dtype=dtype)
    y0 = leaf(*shape, dtype=dtype)
    t = torch.tensor((0.0, 0.3, 0.55, 1.0), requires_grad=True)
    tensors = {"y0": y0, "w": w, "b": b, "t": t}

    def func(t: Tensor, y: Tensor) -> Tensor:
        assert y.dtype == dtype
        assert not t.is_complex()
        return torch.sin(w * y) * torch.cos(t) + b

    # Outputs at nodes and inside of steps.
    options: Any = {"controller": sa.FixedGrid(step_size=0.3)}
    y = solve(func, y0, strategy, t, **options)
    assert y.dtype == dtype
    assert y.shape == (4, *shape)
    got = gradients(torch.view_as_real(y) if y.is_complex() else y, tensors)
    y = backprop(func, y0, strategy, t, **options)
    wanted = gradients(torch.view_as_real(y) if y.is_complex() else y, tensors)
    # One gradient may be small by cancellation, and is then as rough as the others.
    assert problems.relative_error(whole(got), whole(wanted)) <= DTYPES[dtype]
    assert all(x is not None and x.dtype == tensors[name].dtype for name, x in got.items())


@every_exact_strategy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaptive_steps_work_in_any_dtype(strategy: Strategy, dtype: torch.dtype) -> None:
    w, y0 = leaf(3, dtype=dtype), leaf(2, 3, dtype=dtype)
    rough = dtype == torch.bfloat16
    options: Any = {
        "controller": sa.Adaptive(),
        "method": strategy.method or "bosh3",
        "rtol": 0.1 if rough else 1e-3,
        "atol": 0.1 if rough else 1e-3,
    }
    y = solve(lambda t, y: torch.sin(w * y), y0, strategy, **options)
    got = gradients(torch.view_as_real(y) if y.is_complex() else y, {"y0": y0, "w": w})
    y = backprop(lambda t, y: torch.sin(w * y), y0, strategy, **options)
    wanted = gradients(torch.view_as_real(y) if y.is_complex() else y, {"y0": y0, "w": w})
    assert problems.relative_error(whole(got), whole(wanted)) <= DTYPES[dtype]


Pair = namedtuple("Pair", "position momentum")

TREES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"b": b, "a": a},
    "namedtuple": lambda a, b: Pair(a, b),
    "nested": lambda a, b: {"x": [a, (b,)], "y": Pair(a * 2, {"z": b})},
    "with an empty leaf": lambda a, b: (a, b, torch.zeros(0, 2, dtype=torch.float64)),
    "of one": lambda a, b: [a * b.sum()],
}


@every_exact_strategy
@pytest.mark.parametrize("tree", TREES)
def test_states_of_any_structure_get_their_gradients(strategy: Strategy, tree: str) -> None:
    a, b, w = leaf(2, 3), leaf(), leaf()
    tensors = {"a": a, "b": b, "w": w}
    y0 = TREES[tree](a, b)

    def func(t: Tensor, y: Any) -> Any:
        assert type(y) is type(y0)
        total = sum(x.sum() for x in pytree.tree_leaves(y))
        return pytree.tree_map(lambda x: torch.sin(x * w) + total * torch.cos(t), y)

    y = solve(func, y0, strategy)
    flat, structure = pytree.tree_flatten(y)
    assert structure == pytree.tree_structure(y0)
    assert [x.shape[1:] for x in flat] == [x.shape for x in pytree.tree_leaves(y0)]
    got = gradients(y, tensors, retain_graph=True)
    wanted = gradients(replayed(func, y0, strategy), tensors, retain_graph=True)
    assert_close(got, wanted)


@every_exact_strategy
def test_leaves_of_several_dtypes_keep_theirs(strategy: Strategy) -> None:
    a, b = leaf(2, dtype=torch.float32), leaf(3, dtype=torch.float64)

    def func(t: Tensor, y: Any) -> Any:
        assert [x.dtype for x in y] == [torch.float32, torch.float64]
        return [torch.sin(y[0]) * y[1].sum().float(), torch.cos(y[1]) * y[0].sum()]

    tensors = {"a": a, "b": b}
    y = solve(func, [a, b], strategy)
    assert [x.dtype for x in y] == [torch.float32, torch.float64]
    assert_close(gradients(y, tensors), gradients(backprop(func, [a, b], strategy), tensors), 1e-6)


@every_exact_strategy
def test_one_tensor_may_be_several_leaves_of_the_state(strategy: Strategy) -> None:
    y0 = leaf(3)

    def func(t: Tensor, y: Any) -> Any:
        return (torch.sin(y[1]), torch.cos(y[0]) * y0)

    got = gradients(solve(func, (y0, y0), strategy), {"y0": y0})
    assert_close(got, gradients(replayed(func, (y0, y0), strategy), {"y0": y0}))


@every_exact_strategy
def test_no_gradient_is_recorded_where_none_is_wanted(strategy: Strategy) -> None:
    y0 = leaf(3)
    y = solve(lambda t, y: torch.sin(y), y0.detach(), strategy)
    assert not y.requires_grad
    with torch.no_grad():
        assert not solve(lambda t, y: torch.sin(y), y0, strategy).requires_grad


def test_non_contiguous_and_expanded_states_are_fine() -> None:
    base = leaf(3, 2)
    for y0 in (base.T, base[:1].expand(4, 2), base[::2]):
        got = gradients(sa.odeint(lambda t, y: torch.sin(y), y0, TIMES, method="rk4"), {"y": base})
        y = sa.odeint(lambda t, y: torch.sin(y), y0, TIMES, method="rk4", gradient="backprop")
        assert_close(got, gradients(y, {"y": base}))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@every_exact_strategy
def test_the_default_dtype_does_not_matter(strategy: Strategy) -> None:
    module, y0 = net(), leaf(2, 3)
    tensors = {"y0": y0, **named(module)}
    wanted = gradients(solve(lambda t, y: module(y), y0, strategy), tensors)
    with default_dtype(torch.float64):
        got = gradients(solve(lambda t, y: module(y), y0, strategy), tensors)
    assert_close(got, wanted, 0.0)


# On a device -----------------------------------------------------------------------------------


@every_exact_strategy
def test_gradients_are_those_of_plain_autograd_on_every_device(
    strategy: Strategy, device: torch.device
) -> None:
    module = Noisy(0.5, "dropout").to(device)
    y0 = leaf(2, 3).detach().to(device).requires_grad_()
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    tensors = {"y0": y0, "t": t, **named(module)}
    torch.manual_seed(3)
    got = gradients(solve(module, y0, strategy, t), tensors)
    torch.manual_seed(3)
    wanted = gradients(backprop(module, y0, strategy, t), tensors)
    assert_close(got, wanted)
