"""A solve is one more operation of a training step, whatever PyTorch adds to the step."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import symplectic_adjoint as sa
from symplectic_adjoint.gradients import Strategy
from tests import problems
from tests.conformance.registry import label, strategies

BOUND = 1e-12
EXACT = [s for s in strategies(exact=True) if getattr(s, "accumulate", "inplace") == "inplace"]
ALL = [*EXACT, sa.Continuous()]
every_strategy = pytest.mark.parametrize("strategy", ALL, ids=label)
every_exact_strategy = pytest.mark.parametrize("strategy", EXACT, ids=label)
recomputing = pytest.mark.parametrize(
    "strategy",
    [s for s in ALL if s.name != "backprop" and getattr(s, "store", None) != "graph"],
    ids=label,
)
"""Strategies that evaluate func again in the backward pass."""


def solve(func: Any, y0: Any, strategy: Strategy | str, **options: Any) -> sa.Solution:
    strategy = sa.gradients.get(strategy)
    default = {"controller": sa.FixedGrid(step_size=0.25), "method": strategy.method or "midpoint"}
    return sa.solve(func, y0, (0.0, 0.4, 1.0), gradient=strategy, **(default | options))


def batch(dtype: torch.dtype = torch.float64, size: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(size, 3, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()


def backward(y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    grads = torch.autograd.grad(problems.loss(y), list(tensors.values()), allow_unused=True)
    return dict(zip(tensors, grads, strict=True))


def named(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class Model(nn.Module):
    """A solve between two layers, as in most models."""

    def __init__(self, strategy: Strategy, field: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.strategy = strategy
        self.encoder = nn.Linear(3, 3, dtype=torch.float64)
        self.field = field or problems.Net()
        self.head = nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(solve(self.field, self.encoder(x), self.strategy).y[-1])
        return y


# Activation checkpointing ----------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_a_solve_does_not_change_its_gradient(
    strategy: Strategy, use_reentrant: bool
) -> None:
    net, dropout, x = problems.Net(), nn.Dropout(0.3), batch()

    def block(x: Tensor) -> Tensor:
        y: Tensor = solve(lambda t, y: dropout(net(t, y)), torch.tanh(x), strategy).y
        return y

    tensors = {"x": x, **named(net)}
    torch.manual_seed(1)
    wanted = backward(block(x), tensors)
    torch.manual_seed(1)
    problems.loss(checkpoint(block, x, use_reentrant=use_reentrant)).backward()
    assert problems.worst({name: p.grad for name, p in tensors.items()}, wanted)[0] <= BOUND


# Low precision ---------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_leaves_the_state_and_the_adjoint_in_single_precision(
    strategy: Strategy, dtype: torch.dtype
) -> None:
    """func computes in low precision; sums over its evaluations do not."""
    net, x = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)), batch(torch.float32)
    seen = set()

    def func(t: Tensor, y: Tensor) -> Tensor:
        assert y.dtype == torch.float32
        out: Tensor = net(y)
        seen.add(out.dtype)
        return out

    tensors = {"x": x, **named(net)}
    plain = solve(func, x, strategy)
    single = backward(plain.y, tensors)
    seen.clear()
    with torch.autocast("cpu", dtype=dtype):
        y = solve(func, x, strategy).y
    got = backward(y, tensors)
    assert seen == {dtype}
    assert y.dtype == torch.float32
    assert all(g is not None and g.dtype == torch.float32 for g in got.values())
    rounding = torch.finfo(dtype).eps
    assert problems.relative_error(y, plain.y) <= rounding
    assert 0 < problems.worst(got, single)[0] <= 2 * rounding
    if strategy.name == "symplectic":
        # Plain autograd of the same low-precision evaluations, each of which casts the weights
        # anew, so that their gradients are summed in single precision, too.
        with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
            y = solve(func, x, "backprop").y
        assert problems.worst(got, backward(y, tensors))[0] <= 1e-6


@every_strategy
def test_a_gradient_scaler_scales_and_skips(strategy: Strategy) -> None:
    net, x = nn.Linear(3, 3), batch(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = problems.loss(solve(lambda t, y: torch.tanh(net(y)), x, strategy).y)
    wanted = torch.autograd.grad(loss, net.parameters(), retain_graph=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for p, g in zip(net.parameters(), wanted, strict=True):
        assert problems.relative_error(p.grad, g) <= 1e-5
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    before = net.weight.detach().clone()
    optimizer.zero_grad()
    net.weight.register_hook(lambda g: g / 0.0)
    loss = problems.loss(solve(lambda t, y: torch.tanh(net(y)), x, strategy).y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net.weight, before)
    assert scaler.get_scale() == 2.0**9


@every_strategy
def test_half_precision_states_are_solved_in_half_precision(strategy: Strategy) -> None:
    x, net = batch(torch.float16), nn.Linear(3, 3)
    half = copy.deepcopy(net).half()
    y = solve(lambda t, y: torch.tanh(half(y)), x, strategy).y
    got = backward(y, {"x": x, **named(half)})
    precise = x.detach().float().requires_grad_()
    twin = copy.deepcopy(half).float()
    y = solve(lambda t, y: torch.tanh(twin(y)), precise, strategy).y
    wanted = backward(y, {"x": precise, **named(twin)})
    assert all(g is not None and g.dtype == torch.float16 for g in got.values())
    assert problems.worst(got, wanted)[0] <= 5 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_states_without_a_derivative_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(sa.ArgumentError, match=r"floating-point or complex"):
        solve(lambda t, y: y, torch.ones(3, dtype=dtype), "symplectic")


@every_exact_strategy
def test_double_precision_times_of_a_single_precision_state_keep_theirs(strategy: Strategy) -> None:
    net, x = problems.Net(dtype=torch.float32), batch(torch.float32)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = sa.solve(net, x, t, gradient=strategy, method=strategy.method or "rk4_classic").y
    t64 = t.detach().requires_grad_()
    net64, x64 = copy.deepcopy(net).double(), x.detach().double()
    y64 = sa.solve(net64, x64, t64, gradient="backprop", method=strategy.method or "rk4_classic").y
    assert y.dtype == torch.float32
    assert problems.relative_error(y, y64) <= 1e-5
    (got,) = torch.autograd.grad(problems.loss(y), t)
    (wanted,) = torch.autograd.grad(problems.loss(y64), t64)
    assert got.dtype == torch.float64
    assert problems.relative_error(got, wanted) <= 1e-5


# Complex states --------------------------------------------------------------------------------


@every_exact_strategy
@pytest.mark.parametrize("shape", [(), (4, 3)], ids=str)
@pytest.mark.parametrize("adaptive", [True, False])
def test_complex_gradients_are_those_of_plain_autograd(
    strategy: Strategy, shape: tuple[int, ...], adaptive: bool
) -> None:
    """A field that is not holomorphic, with real and with complex parameters, and with times."""

    def leaf(*shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
        return (0.5 * torch.randn(shape, dtype=dtype)).requires_grad_()

    y0, c, w = leaf(*shape), leaf(), leaf(dtype=torch.float64)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return c * y.conj() * torch.exp(1j * t) / (1 + y.abs().square()) + w * y.imag - 0.2 * y

    options: dict[str, Any] = {"method": strategy.method or "bosh3", "rtol": 1e-3, "atol": 1e-3}
    options["controller"] = sa.Adaptive() if adaptive else sa.FixedGrid(step_size=0.3)
    tensors = {"y0": y0, "c": c, "w": w, "t": t}

    def gradients(gradient: Strategy | str) -> dict[str, Tensor]:
        y = sa.solve(func, y0, t, gradient=gradient, **options).y
        loss = problems.loss(torch.view_as_real(y)) + y.abs().square().sum()
        grads = torch.autograd.grad(loss, list(tensors.values()))
        return dict(zip(tensors, grads, strict=True))

    got, wanted = gradients(strategy), gradients("backprop")
    assert {name: g.dtype for name, g in got.items()} == {n: x.dtype for n, x in tensors.items()}
    error, where = problems.worst({**got}, {**wanted})
    assert error <= BOUND, f"{where} is off by {error:.1e}"


# Hooks -----------------------------------------------------------------------------------------


@every_strategy
def test_hooks_of_modules_fire_at_every_evaluation_and_every_product(strategy: Strategy) -> None:
    net = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Tanh())
    layer: Any = net[0]
    counts = dict.fromkeys(("before", "after", "product", "weight", "complete"), 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    layer.register_forward_pre_hook(count("before"))
    layer.register_forward_hook(count("after"))
    layer.register_full_backward_hook(count("product"))
    layer.weight.register_hook(count("weight"))
    layer.weight.register_post_accumulate_grad_hook(count("complete"))
    solution = solve(lambda t, y: net(y), batch(), strategy)
    problems.loss(solution.y).backward()
    stats = solution.stats
    evaluations = stats.evaluations + stats.backward_evaluations
    assert counts == {
        "before": evaluations,
        "after": evaluations,
        "product": stats.products,
        "weight": 1,
        "complete": 1,
    }


@pytest.mark.parametrize("strategy", [s for s in EXACT if s.name != "forward"], ids=label)
def test_hooks_of_modules_may_change_what_passes(strategy: Strategy) -> None:
    net = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Tanh())
    layer: Any = net[0]
    layer.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    layer.register_full_backward_hook(lambda module, inputs, outputs: (0.5 * inputs[0],))
    x = batch()
    tensors = {"x": x, **named(net)}
    got = backward(solve(lambda t, y: net(y), x, strategy).y, tensors)
    y = solve(lambda t, y: net(y), x, "backprop", method=strategy.method or "midpoint").y
    assert problems.worst(got, backward(y, tensors))[0] <= BOUND


# Weights made of others ------------------------------------------------------------------------


class LowRank(nn.Module):
    """W + B A with W frozen."""

    def __init__(self, rank: int = 1) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, 3, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(3, rank, dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


@every_exact_strategy
def test_low_rank_adapters_learn_and_what_is_frozen_stays(strategy: Strategy) -> None:
    layer = nn.Linear(3, 3, dtype=torch.float64).requires_grad_(False)
    adapter = LowRank()
    frozen = layer.weight
    parametrize.register_parametrization(layer, "weight", adapter)
    x = batch()
    got = backward(
        solve(lambda t, y: torch.tanh(layer(y)), x, strategy).y, {"x": x, **named(layer)}
    )

    def func(t: Tensor, y: Tensor) -> Tensor:
        weight = frozen + adapter.up @ adapter.down
        return torch.tanh(nn.functional.linear(y, weight, layer.bias))

    y = solve(func, x, "backprop", method=strategy.method or "midpoint").y
    assert problems.worst(got, backward(y, {"x": x, **named(layer)}))[0] <= BOUND
    assert got.keys() == {"x", "parametrizations.weight.0.down", "parametrizations.weight.0.up"}
    assert frozen.grad is None
    assert not frozen.requires_grad


@every_exact_strategy
def test_tied_and_frozen_weights_of_a_model(strategy: Strategy) -> None:
    """The field and the head share a weight; a part of the field is frozen."""
    model, reference = (Model(s) for s in (strategy, sa.Backprop()))
    for each in (model, reference):
        field: Any = each.field
        field.inner.requires_grad_(False)
        each.encoder.weight = nn.Parameter(field.outer.detach()[:, :3].clone())
        field.outer = nn.Parameter(field.outer.detach())
        each.encoder.bias = field.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
        net = each.field
        each.field = Shifted(net, each.encoder)
        problems.loss(
            each.head(
                solve(
                    each.field,
                    each.encoder(batch()),
                    each.strategy,
                    method=strategy.method or "midpoint",
                ).y[-1]
            )
        ).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    assert problems.worst(got, wanted)[0] <= BOUND
    assert [name for name, g in got.items() if g is None] == ["field.net.inner"]


class Shifted(nn.Module):
    def __init__(self, net: nn.Module, shift: nn.Linear) -> None:
        super().__init__()
        self.net = net
        self.shift = shift

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        moved: Tensor = self.net(t, self.shift(y))
        return moved


# What func keeps from evaluation to evaluation -------------------------------------------------


class Tracked(nn.Module):
    """Running statistics by a layer, by hand in place, and by hand in a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.normal = nn.BatchNorm1d(3, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("constant", torch.ones(3, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y = self.layer(y)
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return torch.tanh(self.normal(y)) * self.constant


@every_strategy
@pytest.mark.parametrize("create_graph", [False, True])
def test_buffers_follow_the_forward_pass_alone(strategy: Strategy, create_graph: bool) -> None:
    if create_graph and not strategy.exact:
        pytest.skip("there is no second derivative")
    net, x = Tracked(), batch()
    solution = solve(net, x, strategy, dense=True)
    assert net.calls == net.normal.num_batches_tracked == solution.stats.evaluations
    after = {name: (x, x.clone()) for name, x in net.named_buffers()}
    torch.autograd.grad(problems.loss(solution.y), x, create_graph=create_graph)
    if strategy.name != "backprop":
        solution.dense(torch.tensor([0.1]))
    for name, buffer in net.named_buffers():
        assert buffer is after[name][0], name
        assert torch.equal(buffer, after[name][1]), name


@every_exact_strategy
def test_batch_normalisation_has_the_gradient_of_plain_autograd(strategy: Strategy) -> None:
    """A second solve before the first backward pass changes the statistics, not the gradient."""
    net, x = Tracked(), batch()
    tensors = {"x": x, **named(net)}
    y = solve(net, x, "backprop", method=strategy.method or "midpoint").y
    wanted = backward(y, tensors)
    # The normalisation takes the shift before it out again.
    assert problems.size(wanted["layer.bias"]) <= 1e-14
    del tensors["layer.bias"], wanted["layer.bias"]
    first, second = solve(net, x, strategy), solve(net, x.detach() * 2, strategy)
    assert problems.worst(backward(first.y, tensors), wanted)[0] <= BOUND
    del tensors["x"]
    assert all(g is not None for g in backward(second.y, tensors).values())


@every_strategy
@pytest.mark.parametrize("where", ["closure", "argument", "buffer", "view", "excluded"])
def test_a_constant_that_is_changed_in_place_before_the_backward_pass_raises(
    where: str, strategy: Strategy
) -> None:
    net, data = Tracked(), torch.ones(2, 3, dtype=torch.float64)
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    row, params = data[0], None if where != "excluded" else list(net.parameters())

    def func(t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        out: Tensor = net(t, y)
        return out * row * weight * gain

    gain = torch.ones(3, dtype=torch.float64)
    # Times a parameter, so that plain autograd keeps each of them, too.
    y = solve(func, batch(), strategy, args=(gain,), params=params).y
    with torch.no_grad():
        changed = {"closure": row, "argument": gain, "view": data, "excluded": weight}
        changed.get(where, net.constant).mul_(2.0)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace") as caught:
        problems.loss(y).backward()
    again = strategy.name != "backprop" and getattr(strategy, "store", None) != "graph"
    assert isinstance(caught.value, sa.ChangedTensorError) == again


@recomputing
def test_what_func_does_not_read_may_be_changed_in_place(strategy: Strategy) -> None:
    """The metrics of a training loop, say, or a template whose shape alone counts."""

    class Trainer:
        def __init__(self) -> None:
            self.net = problems.Net()
            self.seen = torch.zeros(())
            self.template = torch.zeros(3, dtype=torch.float64)

        def field(self, t: Tensor, y: Tensor) -> Tensor:
            one: Tensor = torch.ones_like(self.template) + self.template.new_zeros(3)
            return self.net(t, y) * one * self.template.numel()

    trainer, x = Trainer(), batch()
    wanted = backward(solve(trainer.field, x, strategy).y, {"x": x})
    y = solve(trainer.field, x, strategy).y
    trainer.seen += 1
    trainer.template += 1
    assert problems.worst(backward(y, {"x": x}), wanted)[0] == 0.0


# Copies ----------------------------------------------------------------------------------------


def plain() -> nn.Module:
    return problems.Net()


def normalised() -> nn.Module:
    return OnState(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, dtype=torch.float64)))


def spectral() -> nn.Module:
    return OnState(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3, dtype=torch.float64)))


class OnState(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(y))


@every_strategy
@pytest.mark.parametrize("field", [plain, normalised, spectral], ids=lambda f: f.__name__)
def test_a_model_that_has_been_solved_can_be_copied_and_saved(
    strategy: Strategy, field: Callable[[], nn.Module]
) -> None:
    model = Model(strategy, field()).eval()
    x = batch().detach()
    y = model(x)
    problems.loss(y).backward()
    twin = copy.deepcopy(model)
    loaded = Model(strategy, field()).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))
    copies = [twin, loaded]
    if field is plain:  # PyTorch pickles no parametrised module as a whole
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies += [torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))]
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for other in copies:
        other.zero_grad()
        assert torch.equal(other(x), y)
        problems.loss(other(x)).backward()
        got = {name: p.grad for name, p in other.named_parameters()}
        assert problems.worst(got, wanted)[0] == 0.0
        shared = {p.data_ptr() for p in model.parameters()}
        assert all(p.data_ptr() not in shared for p in other.parameters())


# Optimisers ------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("kind", ["foreach", "fused", "loop"])
def test_optimisers_take_the_steps_that_plain_autograd_would(strategy: Strategy, kind: str) -> None:
    runs = []
    for each in (strategy, sa.Backprop()):
        method = strategy.method or "midpoint"
        model = Model(each)
        options = {kind: True} if kind != "loop" else {"foreach": False, "fused": False}
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, **options)
        for set_to_none in (True, False, False, True):
            optimizer.zero_grad(set_to_none=set_to_none)
            for part in batch().detach().split(2):  # two backward passes accumulate
                y = solve(model.field, model.encoder(part), each, method=method).y
                problems.loss(model.head(y)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        runs.append(dict(model.named_parameters()))
    bound = 1e-10 if strategy.exact else 0.1
    assert problems.worst(runs[0], runs[1])[0] <= bound


@every_strategy
def test_backward_passes_accumulate_into_the_gradients_that_are_there(strategy: Strategy) -> None:
    net, x = problems.Net(), batch().detach()
    first = torch.autograd.grad(problems.loss(solve(net, x, strategy).y), net.parameters())
    second = torch.autograd.grad(problems.loss(solve(net, 2 * x, strategy).y), net.parameters())
    held = {}
    for p in net.parameters():
        p.grad = held[p] = torch.ones_like(p)
    total = problems.loss(solve(net, x, strategy).y) + problems.loss(solve(net, 2 * x, strategy).y)
    total.backward()
    for p, a, b in zip(net.parameters(), first, second, strict=True):
        assert p.grad is held[p]
        assert problems.relative_error(p.grad, 1 + a + b) <= 1e-14
