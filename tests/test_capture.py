"""Every tensor that func depends on is found, wherever func keeps it, and gets its gradient."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import types
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import symplectic_adjoint as sa
from symplectic_adjoint import steppers
from symplectic_adjoint.capture import Capture
from symplectic_adjoint.gradients import Strategy
from tests import problems
from tests.conformance import reference
from tests.conformance.registry import label, strategies

BOUND = 1e-12
"""Relative error of an exact strategy against plain autograd, in float64."""

# How gradients are summed makes no difference to which tensors receive one.
EXACT = [s for s in strategies(exact=True) if getattr(s, "accumulate", "inplace") == "inplace"]
ALL = [*EXACT, sa.Continuous()]
DETACHING = [s for s in ALL if s.name != "backprop"]
"""Strategies that compute func with stand-ins for its tensors."""

every_strategy = pytest.mark.parametrize("strategy", ALL, ids=label)
every_exact_strategy = pytest.mark.parametrize("strategy", EXACT, ids=label)
every_detaching_strategy = pytest.mark.parametrize("strategy", DETACHING, ids=label)

TIMES = (0.0, 0.3, 0.7, 1.0)


def leaf(*shape: int) -> Tensor:
    return (0.5 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def linear() -> nn.Linear:
    return nn.Linear(3, 3, dtype=torch.float64)


def method_of(strategy: Strategy) -> str:
    return strategy.method or "rk4_classic"


def solve(func: Any, y0: Tensor, strategy: Strategy | str, **options: Any) -> Tensor:
    """The solution at TIMES, on a grid of these times where the strategy is exact."""
    strategy = sa.gradients.get(strategy)
    # The continuous adjoint is compared roughly, to find missing parts only.
    grid = sa.FixedGrid() if strategy.exact else sa.FixedGrid(step_size=0.1)
    options = {"method": method_of(strategy), "controller": grid, **options}
    y: Tensor = sa.solve(func, y0, TIMES, gradient=strategy, **options).y
    return y


def replayed(func: Any, y0: Tensor, method: str, args: Any = ()) -> Tensor:
    """The same solution written out by hand, under plain autograd."""
    nodes = list(torch.tensor(TIMES, dtype=torch.float64).unbind())
    y: Tensor = reference.frozen(steppers.get(method), func, y0, nodes, nodes, args)
    return y


def gradients(y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    grads = torch.autograd.grad(
        problems.loss(y), list(tensors.values()), allow_unused=True, retain_graph=True
    )
    return dict(zip(tensors, grads, strict=True))


# The places where a function can keep a tensor ------------------------------------------------


@dataclass
class Held:
    """A function, and the tensors that must receive a gradient through it."""

    func: Callable[..., Any]
    tensors: dict[str, Tensor]
    args: tuple[Any, ...] = ()
    unused: dict[str, Tensor] = field(default_factory=dict)


PLACES: dict[str, Callable[[], Held]] = {}


def place(make: Callable[[], Held]) -> Callable[[], Held]:
    PLACES[make.__name__] = make
    return make


def named(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


# Functions at module level reach these by name; each place fills in its own.
NET: Any = None
WEIGHT: Any = None
REGISTRY: dict[str, Any] = {}
CONTEXT: contextvars.ContextVar[Tensor] = contextvars.ContextVar("CONTEXT")
helpers: Any = types.ModuleType("helpers")


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(linear(), nn.Tanh(), linear())
        self.spare = linear()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * torch.cos(t)

    def other(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) - y


@place
def a_module() -> Held:
    module = Field()
    return Held(module, named(module.net), unused=named(module.spare))


@place
def a_bound_method_of_a_module() -> Held:
    module = Field()
    return Held(module.other, named(module.net), unused=named(module.spare))


@place
def a_closure_over_a_module() -> Held:
    module, spare = linear(), linear()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(module(y)) if t < 2 else spare(y)

    return Held(func, named(module), unused=named(spare))


@place
def a_lambda_over_a_tensor() -> Held:
    w = leaf(3)
    return Held(lambda t, y: torch.sin(w * y), {"w": w})


@place
def a_closure_of_a_closure() -> Held:
    w, b = leaf(3), leaf(3)

    def inner(y: Tensor) -> Tensor:
        return torch.sin(w * y)

    def outer(t: Tensor, y: Tensor) -> Tensor:
        return inner(y) + b

    return Held(outer, {"w": w, "b": b})


@place
def a_function_defined_inside_func() -> Held:
    w = leaf(3)

    def func(t: Tensor, y: Tensor) -> Tensor:
        def inner(scale: Tensor) -> Tensor:
            return torch.sin(w * y) * scale

        return inner(torch.cos(t))

    return Held(func, {"w": w})


def uses_globals(t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(NET(y)) * WEIGHT


def calls_a_function_that_uses_globals(t: Tensor, y: Tensor) -> Tensor:
    return uses_globals(t, y) - y


@place
def globals_of_its_module() -> Held:
    global NET, WEIGHT
    NET, WEIGHT = linear(), leaf(3)
    return Held(uses_globals, {**named(NET), "w": WEIGHT})


@place
def globals_of_a_function_that_it_calls() -> Held:
    globals_of_its_module()
    return Held(calls_a_function_that_uses_globals, {**named(NET), "w": WEIGHT})


@place
def a_global_registry() -> Held:
    REGISTRY["w"] = [leaf(3), (leaf(3),)]
    tensors = {"0": REGISTRY["w"][0], "1": REGISTRY["w"][1][0]}
    return Held(lambda t, y: REGISTRY["w"][0] * y + REGISTRY["w"][1][0], tensors)


@place
def a_partial() -> Held:
    w, b = leaf(3), leaf(3)

    def func(w: Tensor, t: Tensor, y: Tensor, *, b: Tensor) -> Tensor:
        return torch.sin(w * y) + b

    return Held(functools.partial(func, w, b=b), {"w": w, "b": b})


@place
def a_partial_of_a_partial_with_containers() -> Held:
    w, b = leaf(3), leaf(3)

    def func(held: Any, t: Tensor, y: Tensor, extra: Any = None) -> Tensor:
        return torch.sin(held["w"][0] * y) + extra[0]

    inner = functools.partial(func, {"w": (w,)})
    return Held(functools.partial(inner, extra=[b]), {"w": w, "b": b})


@place
def default_arguments() -> Held:
    w, b = leaf(3), leaf(3)

    def func(t: Tensor, y: Tensor, w: Tensor = w, *, held: Any = {"b": b}) -> Tensor:  # noqa: B006
        return torch.sin(w * y) + held["b"]

    return Held(func, {"w": w, "b": b})


@place
def an_attribute_of_a_function() -> Held:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(func.w * y)

    func.w = leaf(3)
    return Held(func, {"w": func.w})


class Holder:
    scale: Any = None

    def __init__(self, deep: Any = None) -> None:
        self.w = leaf(3)
        self.held = {"b": [leaf(3)]}
        self.deep = deep

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(self.w * y) + self.held["b"][0]

    def method(self, t: Tensor, y: Tensor) -> Tensor:
        return self(t, y) * self.scale

    def deeper(self, t: Tensor, y: Tensor) -> Tensor:
        return self.deep(t, y) + self(t, y)

    @classmethod
    def of_the_class(cls, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(cls.scale * y)

    @staticmethod
    def static(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(REGISTRY["static"] * y)


@place
def a_callable_object() -> Held:
    func = Holder()
    return Held(func, {"w": func.w, "b": func.held["b"][0]})


@place
def a_callable_object_inside_a_callable_object() -> Held:
    inner = Holder()
    func = Holder(Holder(inner))
    tensors = {"w": func.w, "inner w": func.deep.w}
    return Held(func.deeper, tensors, unused={"w": inner.w})


@place
def a_bound_method_and_an_attribute_of_its_class() -> Held:
    Holder.scale = leaf(3)
    func = Holder()
    return Held(func.method, {"w": func.w, "scale": Holder.scale})


@place
def a_class_method() -> Held:
    Holder.scale = leaf(3)
    return Held(Holder.of_the_class, {"scale": Holder.scale})


@place
def a_static_method() -> Held:
    REGISTRY["static"] = leaf(3)
    return Held(Holder.static, {"w": REGISTRY["static"]})


class Slotted:
    __slots__ = ("w",)

    def __init__(self) -> None:
        self.w = leaf(3)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(self.w * y)


@place
def a_slot_of_an_object() -> Held:
    func = Slotted()
    return Held(func, {"w": func.w})


@place
def a_wrapped_function() -> Held:
    w, b = leaf(3), leaf(3)

    def shifted(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            return func(*args, **kwargs) + b

        return wrapper

    @shifted
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(w * y)

    return Held(func, {"w": w, "b": b})


@place
def a_cached_function() -> Held:
    w = leaf(3)

    @functools.cache
    def weight() -> Tensor:
        return w

    return Held(lambda t, y: torch.sin(weight() * y), {"w": w})


Pair = namedtuple("Pair", "first second")


@place
def nested_containers() -> Held:
    w = [leaf(3) for _ in range(5)]
    held = {"a": [w[0], (w[1], {"b": w[2]})], 7: Pair(w[3], [w[4]])}

    def func(t: Tensor, y: Tensor) -> Tensor:
        pair: Any = held[7]
        a: Any = held["a"]
        return torch.sin(a[0] * y + a[1][0]) * a[1][1]["b"] + pair.first * pair.second[0]

    return Held(func, {str(i): x for i, x in enumerate(w)})


class Odd(nn.Module):
    """Keeps tensors where a module has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.exp(leaf(3))  # not a parameter, not a leaf
        self.listed = [leaf(3)]
        self.grouped = (leaf(3),)
        self.keyed = {"w": leaf(3)}
        self.register_buffer("shift", leaf(3))
        self.register_buffer("constant", torch.ones(3, dtype=torch.float64))
        self.more = nn.ParameterList([leaf(3)])
        self.yet_more = nn.ParameterDict({"w": leaf(3)})

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y = torch.sin(self.gain * y + self.listed[0]) * self.grouped[0] + self.keyed["w"]
        return y * self.more[0] + self.yet_more["w"] + self.shift * self.constant


@place
def attributes_and_buffers_of_a_module() -> Held:
    m = Odd()
    tensors = {"gain": m.gain, "listed": m.listed[0], "grouped": m.grouped[0]}
    tensors |= {"keyed": m.keyed["w"], "buffer": m.get_buffer("shift"), **named(m)}
    return Held(m, tensors)


@place
def the_flat_weights_of_a_recurrent_network() -> Held:
    rnn = nn.GRU(3, 3, num_layers=2, batch_first=True, dtype=torch.float64)
    return Held(lambda t, y: rnn(y.unsqueeze(1))[0].squeeze(1), named(rnn))


@place
def a_recurrent_cell() -> Held:
    cell = nn.GRUCell(3, 3, dtype=torch.float64)
    return Held(lambda t, y: cell(y, torch.tanh(y)) - y, named(cell))


@place
def attention() -> Held:
    layer = nn.MultiheadAttention(3, 1, batch_first=True, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        x = y.unsqueeze(0)
        out: Tensor = layer(x, x, x, need_weights=False)[0]
        return out.squeeze(0)

    return Held(func, named(layer))


@place
def tied_weights() -> Held:
    first, second = linear(), linear()
    second.weight = first.weight
    net = nn.Sequential(first, nn.Tanh(), second)
    w = first.weight

    def func(t: Tensor, y: Tensor) -> Tensor:
        return net(y) + y @ w

    return Held(func, {"weight": w, "b1": first.bias, "b2": second.bias})


@place
def a_module_of_helpers() -> Held:
    helpers.net = linear()
    helpers.w = leaf(3)
    helpers.spare = leaf(3)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(helpers.net(y)) * helpers.w

    tensors = {**named(helpers.net), "w": helpers.w}
    return Held(func, tensors, unused={"w": helpers.spare})


@place
def a_namespace() -> Held:
    space = types.SimpleNamespace(net=linear(), inner=types.SimpleNamespace(w=leaf(3)))
    tensors = {**named(space.net), "w": space.inner.w}
    return Held(lambda t, y: torch.tanh(space.net(y)) * space.inner.w, tensors)


@place
def a_context_variable() -> Held:
    w = leaf(3)
    CONTEXT.set(w)
    return Held(lambda t, y: torch.sin(CONTEXT.get() * y), {"w": w})


@place
def an_iterator_that_runs_in_circles() -> Held:
    w = leaf(3)
    endless = iter(lambda: w, None)
    return Held(lambda t, y: torch.sin(next(endless) * y), {"w": w})


@place
def tensors_used_late() -> Held:
    """Some only after t = 0.5, found by name or hidden; some in one branch only."""
    first, late = linear(), linear()
    helpers.hidden = leaf(3)

    def func(t: Tensor, y: Tensor) -> Tensor:
        if t < 0.5:
            return torch.tanh(first(y))
        return torch.tanh(late(y)) * helpers.hidden

    tensors = {f"first {name}": x for name, x in first.named_parameters()}
    tensors |= {f"late {name}": x for name, x in late.named_parameters()}
    return Held(func, {**tensors, "w": helpers.hidden})


@place
def several_hidden_tensors_used_one_after_another() -> Held:
    w = [leaf(3) for _ in range(4)]
    helpers.all = w

    def func(t: Tensor, y: Tensor) -> Tensor:
        i = sum(t > limit for limit in (0.1, 0.4, 0.6))
        return torch.sin(helpers.all[i] * y)

    return Held(func, {str(i): x for i, x in enumerate(w)})


@place
def the_output_of_a_hypernetwork() -> Held:
    """Two non-leaf tensors with roots of their own and one in common."""
    hyper, other, code = linear(), linear(), leaf(3)
    w, b = torch.tanh(hyper(code)), other(code)
    tensors = {"code": code, "w": w, "b": b}
    tensors |= {f"hyper {name}": x for name, x in hyper.named_parameters()}
    tensors |= {f"other {name}": x for name, x in other.named_parameters()}
    return Held(lambda t, y: torch.sin(w * y) + b * code, tensors)


@place
def a_hidden_output_of_a_hypernetwork() -> Held:
    hyper = linear()
    helpers.w = torch.tanh(hyper(torch.ones(3, dtype=torch.float64)))
    tensors = {**named(hyper), "w": helpers.w}
    return Held(lambda t, y: torch.sin(helpers.w * y), tensors)


@place
def views_of_one_tensor() -> Held:
    base = leaf(2, 3)
    first, second = base
    return Held(lambda t, y: torch.sin(first * y) + second, {"base": base, "first": first})


@place
def arguments() -> Held:
    w, b, c = leaf(3), leaf(3), leaf(3)

    def func(t: Tensor, y: Tensor, w: Tensor, held: Any) -> Tensor:
        return torch.sin(w * y) * held["c"][0] + held["b"]

    return Held(func, {"w": w, "b": b, "c": c}, args=(w, {"b": b, "c": (c,)}))


@place
def a_functional_call() -> Held:
    net = linear()
    params = {name: leaf(*x.shape) for name, x in net.named_parameters()}

    def func(t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(net, params, (y,))
        return torch.tanh(out)

    return Held(func, params, unused=named(net))


@place
def a_function_under_vmap() -> Held:
    net, helpers.v = linear(), leaf(3)
    one = torch.func.vmap(lambda y: torch.tanh(net(y)) * helpers.v)
    tensors = {**named(net), "v": helpers.v}
    return Held(lambda t, y: one(y), tensors)


@place
def a_custom_function_of_a_tensor_in_sight() -> Held:
    w = leaf(3)
    return Held(lambda t, y: torch.sin(problems.Product.apply(y, w)), {"w": w})


class Reparametrised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.square())


@place
def a_custom_parametrisation() -> Held:
    net = linear()
    parametrize.register_parametrization(net, "weight", Reparametrised())
    return Held(net_of(net), named(net))


@place
def chained_parametrisations() -> Held:
    net = linear()
    nn.utils.parametrizations.weight_norm(net)
    parametrize.register_parametrization(net, "weight", Reparametrised())
    return Held(net_of(net), named(net))


@place
def an_orthogonal_weight() -> Held:
    net = nn.utils.parametrizations.orthogonal(linear())
    return Held(net_of(net), named(net))


@place
def a_hidden_parametrised_module() -> Held:
    helpers.net = nn.utils.parametrizations.weight_norm(linear())
    return Held(lambda t, y: torch.tanh(helpers.net(y)), named(helpers.net))


def net_of(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: torch.tanh(net(y))


NOT_FORWARD = (
    "attention",
    "a_custom_function_of_a_tensor_in_sight",
    "a_hidden_parametrised_module",
)
"""Places that PyTorch cannot differentiate in forward mode."""


@every_strategy
@pytest.mark.parametrize("name", PLACES)
def test_every_tensor_gets_the_gradient_of_plain_autograd(name: str, strategy: Strategy) -> None:
    held = PLACES[name]()
    y0 = leaf(2, 3)
    tensors = {"y0": y0, **held.tensors}
    unused = {f"unused {key}": x for key, x in held.unused.items()}

    def found(strategy: Strategy | str, **options: Any) -> dict[str, Tensor | None]:
        y = solve(held.func, y0, strategy, args=held.args, **options)
        return gradients(y, tensors | unused)

    if strategy.name == "forward" and name in NOT_FORWARD:
        with pytest.raises(sa.ArgumentError, match="Use gradient='symplectic'"):
            found(strategy)
        return
    got = found(strategy)
    if strategy.exact:
        method = method_of(strategy)
        wanted = gradients(replayed(held.func, y0, method, held.args), tensors | unused)
        again = found("backprop", method=method)
        bound = BOUND
    else:
        wanted = again = found("backprop", controller=sa.FixedGrid(step_size=0.1))
        bound = 1e-2
    for other in (wanted, again):
        error, where = problems.worst(got, other)
        assert error <= bound, f"{where} is off by {error:.1e}"
    assert all(got[key] is not None for key in tensors)
    assert all(got[key] is None for key in unused)


# Modules compiled by torch ---------------------------------------------------------------------


@every_exact_strategy
@pytest.mark.parametrize("what", ["module", "function", "method"])
def test_compiled_functions_get_the_gradient_of_plain_autograd(
    what: str, strategy: Strategy
) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(linear(), nn.Tanh())
    scale = leaf(3)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return net(y) * scale

    compiled: Any
    if what == "module":
        module = torch.compile(net, backend="eager")
        compiled = lambda t, y: module(y) * scale  # noqa: E731
    elif what == "function":
        compiled = torch.compile(func, backend="eager")
    else:
        net.compile(backend="eager")
        compiled = func
    y0 = leaf(2, 3)
    tensors = {"y0": y0, "scale": scale, **named(net)}
    got = gradients(solve(compiled, y0, strategy), tensors)
    wanted = gradients(replayed(func, y0, method_of(strategy)), tensors)
    error, where = problems.worst(got, wanted)
    assert error <= BOUND, f"{where} is off by {error:.1e}"


# What cannot be found --------------------------------------------------------------------------


def hide(**values: Any) -> None:
    """Put values where no walk from a function finds them."""
    for name, value in values.items():
        setattr(helpers, name, value)


def traced(net: nn.Module) -> Any:
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        return torch.jit.trace(net, torch.zeros(2, 3, dtype=torch.float64))


def in_a_custom_function() -> tuple[Any, Tensor, str]:
    hide(w=leaf(3))
    return lambda t, y: problems.Product.apply(y, helpers.w), helpers.w, "float64 of shape (3,)"


def in_a_custom_function_and_elsewhere() -> tuple[Any, Tensor, str]:
    hide(w=leaf(3))
    func = lambda t, y: problems.Product.apply(y, helpers.w) + helpers.w  # noqa: E731
    return func, helpers.w, "float64 of shape (3,)"


def in_a_custom_function_on_a_late_branch() -> tuple[Any, Tensor, str]:
    hide(w=leaf(3))

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y) if t < 0.8 else problems.Product.apply(y, helpers.w)

    return func, helpers.w, "float64 of shape (3,)"


def as_a_non_leaf_in_a_custom_function() -> tuple[Any, Tensor, str]:
    hyper = leaf(4, 3)
    hide(w=hyper.exp().sum(0))
    func = lambda t, y: problems.Product.apply(y, helpers.w) + helpers.w  # noqa: E731
    return func, hyper, "float64 of shape (4, 3)"


def in_torchscript() -> tuple[Any, Tensor, str]:
    net = linear()
    script = traced(net)
    return lambda t, y: script(y), net.weight, "script.weight (torch.float64 of shape (3, 3))"


def in_a_torchscript_submodule() -> tuple[Any, Tensor, str]:
    net = linear()
    module = nn.Sequential(traced(net), nn.Tanh())
    return lambda t, y: module(y), net.weight, "module.0.weight (torch.float64"


HIDDEN = [
    in_a_custom_function,
    in_a_custom_function_and_elsewhere,
    in_a_custom_function_on_a_late_branch,
    as_a_non_leaf_in_a_custom_function,
    in_torchscript,
    in_a_torchscript_submodule,
]


@every_detaching_strategy
@pytest.mark.parametrize("hidden", HIDDEN, ids=lambda f: f.__name__)
def test_a_dependency_that_cannot_be_replaced_is_named_in_an_error(
    hidden: Callable[[], Any], strategy: Strategy
) -> None:
    func, _, name = hidden()
    for y0 in (leaf(2, 3), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(sa.CaptureError) as caught:
            solve(func, y0, strategy)
        assert name in str(caught.value)
        assert "args" in str(caught.value)


@pytest.mark.parametrize("hidden", HIDDEN, ids=lambda f: f.__name__)
def test_backprop_needs_to_find_nothing(hidden: Callable[[], Any]) -> None:
    func, tensor, _ = hidden()
    y0 = torch.ones(2, 3, dtype=torch.float64)
    got = gradients(solve(func, y0, "backprop", method="rk4_classic"), {"w": tensor})
    wanted = gradients(replayed(func, y0, "rk4_classic"), {"w": tensor})
    assert problems.worst(got, wanted)[0] <= BOUND
    assert got["w"] is not None


@every_strategy
@pytest.mark.parametrize("hidden", HIDDEN, ids=lambda f: f.__name__)
def test_without_grad_mode_nothing_needs_to_be_found(
    hidden: Callable[[], Any], strategy: Strategy
) -> None:
    func, _, _ = hidden()
    y0 = torch.ones(2, 3, dtype=torch.float64)
    with torch.no_grad():
        y = solve(func, y0, strategy)
        assert not y.requires_grad
        if strategy.exact:
            wanted = replayed(func, y0, method_of(strategy))
            assert problems.relative_error(y, wanted) <= 1e-14


def test_leaves_that_func_makes_itself_are_no_dependency() -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        own = torch.ones(3, dtype=torch.float64, requires_grad=True)
        return torch.sin(y) * own

    y0 = leaf(2, 3)
    for strategy in EXACT:
        got = gradients(solve(func, y0, strategy), {"y0": y0})
        wanted = gradients(replayed(func, y0, method_of(strategy)), {"y0": y0})
        assert problems.worst(got, wanted)[0] <= BOUND


def by_a_leaf_of_its_own(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def by_the_argument_itself(x: Tensor) -> Tensor:
    return x.requires_grad_()


@pytest.mark.parametrize("prepared", [by_a_leaf_of_its_own, by_the_argument_itself])
def test_a_function_that_differentiates_inside_itself_is_evaluated_once_a_stage(
    prepared: Callable[[Tensor], Tensor],
) -> None:
    net = linear()

    def flow(t: Tensor, state: Any) -> Any:
        with torch.enable_grad():
            x = prepared(state[0])
            dx = torch.tanh(net(x))
            (product,) = torch.autograd.grad(dx, x, torch.ones_like(dx), create_graph=True)
        return dx, product.sum(-1)

    y0 = leaf(2, 3), torch.zeros(2, dtype=torch.float64)
    grid = sa.FixedGrid(step_size=0.25)
    sol = sa.solve(flow, y0, [0.0, 1.0], method="rk4", controller=grid)
    assert sol.stats.evaluations == 16
    sol.y[1][-1].sum().backward()
    assert sol.stats.backward_evaluations == 16


# params= ---------------------------------------------------------------------------------------


@every_strategy
def test_params_restricts_the_gradient_to_what_it_lists(strategy: Strategy) -> None:
    net, w, code = linear(), leaf(3), leaf(3)
    made = torch.exp(code)
    hide(found=leaf(3), other=leaf(3))

    def func(t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        return torch.tanh(net(y)) * w * gain * made + helpers.found * helpers.other

    y0, gain = leaf(2, 3), leaf(3)
    listed = {"y0": y0, "weight": net.weight, "found": helpers.found, "made": made}
    others = {"bias": net.bias, "w": w, "gain": gain, "other": helpers.other}
    params = [net.weight, helpers.found, made]

    def found(**options: Any) -> dict[str, Tensor | None]:
        y = solve(func, y0, strategy, args=(gain,), **options)
        return gradients(y, listed | others)

    got, everything = found(params=params), found()
    assert all(got[name] is None for name in others)
    error, where = problems.worst(
        {name: got[name] for name in listed}, {name: everything[name] for name in listed}
    )
    assert error <= BOUND, f"{where} is off by {error:.1e}"


@every_strategy
def test_empty_params_leave_the_gradient_of_the_state_alone(strategy: Strategy) -> None:
    net, y0 = linear(), leaf(2, 3)
    y = solve(net_of(net), y0, strategy, params=())
    got = gradients(y, {"y0": y0, **named(net)})
    assert [name for name, grad in got.items() if grad is not None] == ["y0"]
    assert not solve(net_of(net), y0.detach(), strategy, params=()).requires_grad


@every_strategy
def test_a_listed_tensor_that_func_does_not_use_gets_none(strategy: Strategy) -> None:
    net, y0, spare = linear(), leaf(2, 3), leaf(3)
    y = solve(net_of(net), y0, strategy, params=[net.weight, spare])
    got = gradients(y, {"w": net.weight, "spare": spare})
    assert got["w"] is not None
    assert got["spare"] is None


@every_strategy
@pytest.mark.parametrize("given", ["generator", "list"])
def test_parameters_of_parametrised_modules_can_be_listed(strategy: Strategy, given: str) -> None:
    net = nn.utils.parametrizations.weight_norm(linear())
    y0 = leaf(2, 3)
    wanted = gradients(solve(net_of(net), y0, strategy), named(net))
    params: Any = net.parameters() if given == "generator" else list(net.parameters())
    got = gradients(solve(net_of(net), y0, strategy, params=params), named(net))
    error, where = problems.worst(got, wanted)
    assert error <= BOUND, f"{where} is off by {error:.1e}"
    assert all(grad is not None for grad in got.values())


@every_strategy
def test_one_of_the_parameters_of_a_parametrised_module_can_be_listed(strategy: Strategy) -> None:
    net = nn.utils.parametrizations.weight_norm(linear())
    y0 = leaf(2, 3)
    name = "parametrizations.weight.original1"
    wanted = gradients(solve(net_of(net), y0, strategy), named(net))
    y = solve(net_of(net), y0, strategy, params=[named(net)[name]])
    got = gradients(y, named(net))
    assert problems.relative_error(got[name], wanted[name]) <= BOUND
    assert [key for key, grad in got.items() if grad is not None] == [name]


# What a solve leaves behind --------------------------------------------------------------------


class Everywhere(nn.Module):
    """Keeps tensors in every kind of place at once."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.utils.parametrizations.weight_norm(linear())
        with pytest.warns(FutureWarning):
            self.old = nn.utils.weight_norm(linear())
        self.plain = leaf(3)
        self.listed = [leaf(3)]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y) + self.old(y)) * self.plain * self.listed[0] * WEIGHT


def contents(module: nn.Module, func: Any) -> list[Any]:
    """Everything that a solve puts stand-ins for, by identity."""
    found: list[Any] = [WEIGHT, *(cell.cell_contents for cell in func.__closure__)]
    for part in module.modules():
        places = [part._parameters, part._buffers, part._modules, part._forward_pre_hooks]
        found += [value for held in places for value in held.values()]
        found += [x for x in vars(part).values() if isinstance(x, Tensor | list)]
        found += [item for x in vars(part).values() if isinstance(x, list) for item in x]
    # The older weight_norm assigns the weight that it has computed.
    return [x for x in found if not isinstance(x, Tensor) or x.is_leaf]


@every_strategy
@pytest.mark.parametrize("stop", [None, ValueError, KeyboardInterrupt, sa.NonFiniteError])
def test_everything_is_back_in_its_place_after_a_solve(stop: Any, strategy: Strategy) -> None:
    global WEIGHT
    WEIGHT, w, module = leaf(3), leaf(3), Everywhere()

    def func(t: Tensor, y: Tensor) -> Tensor:
        if stop is sa.NonFiniteError:
            return y * math.nan
        if stop is not None and t > 0.4:
            raise stop
        return module(t, y) + w

    before = contents(module, func)
    with contextlib.nullcontext() if stop is None else pytest.raises(stop):
        problems.loss(solve(func, leaf(2, 3), strategy)).backward()
    assert all(a is b for a, b in zip(before, contents(module, func), strict=True))
    parameters = [*module.parameters(), w, WEIGHT]
    assert all(x.requires_grad and x.is_leaf for x in parameters)
    assert all((x.grad is None) == (stop is not None) for x in parameters)


@every_detaching_strategy
def test_everything_is_back_in_its_place_when_the_backward_pass_fails(strategy: Strategy) -> None:
    net, w, failing = linear(), leaf(3), []

    def func(t: Tensor, y: Tensor) -> Tensor:
        if failing:
            raise KeyboardInterrupt
        return torch.tanh(net(y)) * w

    y0 = leaf(2, 3)
    y = solve(func, y0, strategy)
    before, parameter = func.__closure__, net.weight
    held = [cell.cell_contents for cell in before or ()]
    failing.append(True)
    if getattr(strategy, "store", None) != "graph":  # that one needs no further evaluation
        with pytest.raises(KeyboardInterrupt):
            problems.loss(y).backward()
    assert net.weight is parameter
    assert all(a is b.cell_contents for a, b in zip(held, func.__closure__ or (), strict=True))


def test_solves_inside_func_find_their_own_tensors() -> None:
    outer, inner = leaf(3), leaf(3)

    def nested(t: Tensor, y: Tensor) -> Tensor:
        end = solve(lambda s, z: torch.sin(inner * z) * outer, y, "symplectic")[-1]
        return end * outer

    y0 = leaf(2, 3)
    tensors = {"y0": y0, "outer": outer, "inner": inner}
    got = gradients(solve(nested, y0, "symplectic"), tensors)
    wanted = gradients(solve(nested, y0, "backprop"), tensors)
    assert problems.worst(got, wanted)[0] <= BOUND


# Between the forward and the backward pass -----------------------------------------------------


def rebinding_a_closure_variable() -> tuple[Any, Callable[[], None], dict[str, Tensor]]:
    w = first = leaf(3)

    def change() -> None:
        nonlocal w
        w = leaf(3)

    return lambda t, y: torch.sin(w * y), change, {"w": first}


def rebinding_a_global() -> tuple[Any, Callable[[], None], dict[str, Tensor]]:
    global WEIGHT
    WEIGHT = first = leaf(3)

    def change() -> None:
        global WEIGHT
        WEIGHT = leaf(3)

    return lambda t, y: torch.sin(WEIGHT * y), change, {"w": first}


def replacing_a_parameter() -> tuple[Any, Callable[[], None], dict[str, Tensor]]:
    net = linear()
    first = net.weight

    def change() -> None:
        net.weight = nn.Parameter(torch.zeros_like(first))

    return net_of(net), change, {"w": first, "b": net.bias}


def rebinding_a_hidden_tensor() -> tuple[Any, Callable[[], None], dict[str, Tensor]]:
    hide(w=leaf(3))
    first = helpers.w
    return lambda t, y: torch.sin(helpers.w * y), lambda: hide(w=leaf(3)), {"w": first}


def rebinding_a_constant_tensor() -> tuple[Any, Callable[[], None], dict[str, Tensor]]:
    w, data = leaf(3), torch.ones(3, dtype=torch.float64)

    def change() -> None:
        nonlocal data
        data = torch.zeros(3, dtype=torch.float64)

    return lambda t, y: torch.sin(w * y) * data, change, {"w": w}


def rebinding_the_attribute_of_a_module() -> tuple[Any, Callable[[], None], dict[str, Tensor]]:
    net = Conditioned()

    def change() -> None:
        net.data = torch.zeros(3, dtype=torch.float64)
        net.sign = -1.0

    return net, change, named(net)


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = linear()
        self.data = torch.ones(3, dtype=torch.float64)
        self.sign = 1.0
        self.calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.net(y)) * self.data * self.sign


def rebinding_a_module_and_a_number() -> tuple[Any, Callable[[], None], dict[str, Tensor]]:
    net, gain = linear(), 1.0
    tensors = named(net)

    def change() -> None:
        nonlocal net, gain
        net, gain = linear(), 2.0

    return lambda t, y: torch.tanh(net(y)) * gain, change, tensors


CHANGES = [
    rebinding_a_closure_variable,
    rebinding_a_global,
    replacing_a_parameter,
    rebinding_a_constant_tensor,
    rebinding_the_attribute_of_a_module,
    rebinding_a_module_and_a_number,
]


@every_strategy
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changing_what_a_name_means_does_not_change_the_gradient(
    change: Callable[[], Any], strategy: Strategy
) -> None:
    func, do, tensors = change()
    y0 = leaf(2, 3)
    tensors = {"y0": y0, **tensors}
    wanted = gradients(solve(func, y0, strategy), tensors)
    y = solve(func, y0, strategy)
    do()
    got = gradients(y, tensors)
    error, where = problems.worst(got, wanted)
    assert error <= BOUND, f"{where} is off by {error:.1e}"


@every_strategy
def test_a_counter_of_func_counts_on(strategy: Strategy) -> None:
    calls = 0
    module = Conditioned()

    def func(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out: Tensor = module(t, y)
        return out

    solution = sa.solve(
        func,
        leaf(2, 3),
        TIMES,
        gradient=strategy,
        method=method_of(strategy),
        controller=sa.FixedGrid(),
    )
    assert calls == module.calls == solution.stats.evaluations
    problems.loss(solution.y).backward()
    assert calls == module.calls
    assert calls == solution.stats.evaluations + solution.stats.backward_evaluations


@every_strategy
@pytest.mark.parametrize("what", ["parameter", "hidden", "non-leaf", "argument", "state"])
def test_changing_a_tensor_in_place_before_the_backward_pass_raises(
    what: str, strategy: Strategy
) -> None:
    net, gain, code = linear(), leaf(3), leaf(3)
    made = torch.exp(code)
    hide(w=leaf(3))
    y0 = leaf(2, 3)

    def func(t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        return torch.sin(torch.tanh(net(y)) * y * gain * made * helpers.w)

    y = solve(func, y0, strategy, args=(gain,))
    with torch.no_grad():
        changed = {
            "parameter": net.weight,
            "hidden": helpers.w,
            "non-leaf": made,
            "argument": gain,
            "state": y0,
        }
        changed[what].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        problems.loss(y).backward()


@every_strategy
def test_the_optimiser_may_step_after_the_backward_pass(strategy: Strategy) -> None:
    net, y0 = linear(), leaf(2, 3)
    for _ in range(2):
        problems.loss(solve(net_of(net), y0, strategy)).backward()
        with torch.no_grad():
            net.weight.sub_(0.1 * net.weight.grad)


# Weights that are computed ---------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x / (1 + x.square())


@every_strategy
def test_a_parametrised_weight_is_computed_once_per_solve(strategy: Strategy) -> None:
    net, counting = linear(), Counting()
    parametrize.register_parametrization(net, "weight", counting)
    before = counting.calls
    y = solve(net_of(net), leaf(2, 3), strategy)
    assert counting.calls == before + 1
    problems.loss(y).backward()
    assert counting.calls == before + 1
    assert all(x.grad is not None for x in net.parameters())


@every_strategy
def test_a_parametrised_weight_that_is_cached_gets_its_gradient(strategy: Strategy) -> None:
    net, y0 = linear(), leaf(2, 3)
    parametrize.register_parametrization(net, "weight", Reparametrised())
    wanted = gradients(solve(net_of(net), y0, strategy), named(net))
    with parametrize.cached():
        y = solve(net_of(net), y0, strategy)
        got = gradients(y, named(net))
    assert problems.worst(got, wanted)[0] <= BOUND


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(linear())


def old_spectral() -> nn.Module:
    net: nn.Module = nn.utils.spectral_norm(linear())
    return net


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        net: nn.Module = nn.utils.weight_norm(linear())
    return net


@every_strategy
@pytest.mark.parametrize("make", [spectral, old_spectral, old_weight_norm])
@pytest.mark.parametrize("training", [True, False])
def test_normalised_weights_are_one_per_solve_and_get_their_gradients(
    make: Callable[[], nn.Module], training: bool, strategy: Strategy
) -> None:
    """Power iteration runs once per solve while training, and never otherwise."""
    y0 = leaf(2, 3)
    torch.manual_seed(1)
    net = make().train(training)
    torch.manual_seed(1)
    twin = make().train(training)

    got = gradients(solve(net_of(net), y0, strategy), named(net))
    # By hand: one call makes the weight of the whole solve, and is itself differentiated.
    twin(torch.zeros(1, 3, dtype=torch.float64))
    held: Any = twin.eval()
    if make is spectral:
        y = solve(
            net_of(held), y0, "backprop", method=method_of(strategy), controller=_grid(strategy)
        )
    else:
        weight, bias = held.weight, held.bias
        func = lambda t, y: torch.tanh(nn.functional.linear(y, weight, bias))  # noqa: E731
        y = solve(func, y0, "backprop", method=method_of(strategy), controller=_grid(strategy))
    wanted = gradients(y, named(twin))
    error, where = problems.worst(got, wanted)
    assert error <= (BOUND if strategy.exact else 1e-2), f"{where} is off by {error:.1e}"
    buffers = zip(net.named_buffers(), twin.named_buffers(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in buffers)


def _grid(strategy: Strategy) -> sa.FixedGrid:
    return sa.FixedGrid() if strategy.exact else sa.FixedGrid(step_size=0.1)


SCALE = torch.tensor([0.5], requires_grad=True)


def _weighted(t: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return weight * y


def _by_keyword(t: Tensor, y: Tensor, *, weight: Tensor = SCALE) -> Tensor:
    return weight * y


def _by_default(t: Tensor, y: Tensor, weight: Tensor = SCALE) -> Tensor:
    return weight * y


class _Owner:
    def __init__(self) -> None:
        self.weight = SCALE

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        return self.weight * y


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (_by_keyword, "func.weight"),
        (_by_default, "func[0]"),
        (functools.partial(_weighted, weight=SCALE), "func.weight"),
        (functools.partial(lambda weight, t, y: weight * y, SCALE), "func[0]"),
        (_Owner().field, "func.weight"),
    ],
    ids=["keyword", "default", "partial-keyword", "partial-argument", "bound"],
)
def test_a_tensor_is_named_by_where_it_sits_before_its_use_reveals_it(func: Any, name: str) -> None:
    capture = Capture(func)
    assert capture.names == [name]
    assert capture.tensors[0] is SCALE
