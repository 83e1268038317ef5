"""Nothing is left behind, whatever interrupts a solve, and the same is computed every time."""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import hashlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import capture
from symplectic_adjoint.gradients import Strategy
from tests import markdown, problems
from tests.conformance.registry import label, strategies

EXACT = [s for s in strategies(exact=True) if getattr(s, "accumulate", "inplace") == "inplace"]
ALL = [*EXACT, sa.Continuous()]
every_strategy = pytest.mark.parametrize("strategy", ALL, ids=label)
every_exact_strategy = pytest.mark.parametrize("strategy", EXACT, ids=label)


def solve(func: Any, y0: Tensor, strategy: Strategy, steps: int = 2, **options: Any) -> Any:
    default = {"controller": sa.FixedGrid(step_size=1 / steps), "method": "midpoint"}
    if strategy.method is not None:
        default["method"] = strategy.method
    return sa.solve(func, y0, (0.0, 1.0), gradient=strategy, **(default | options))


def batch(size: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(size, 3, generator=draw, dtype=torch.float64).requires_grad_()


class Field(nn.Module):
    """Weights of several kinds, a closure's, and random numbers; counts, and stops when told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = problems.Net()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, dtype=torch.float64))
        self.normal = nn.BatchNorm1d(3, dtype=torch.float64)
        self.calls = 0
        self.stop: int | None = None
        self.error: type[BaseException] = KeyboardInterrupt

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.calls == self.stop:
            raise self.error
        self.calls += 1
        y = nn.functional.dropout(self.net(t, y), 0.2, self.training)
        return torch.tanh(self.normal(self.layer(y)))


def train(field: Field, strategy: Strategy) -> Tensor:
    """One iteration; all gradients as one vector."""
    torch.manual_seed(11)
    y0 = batch()
    field.calls = 0
    loss = problems.loss(solve(field, y0, strategy).y)
    # Forward mode has no gradient where the normalisation takes a shift out again.
    inputs = [y0, *field.parameters()]
    grads = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
    return torch.cat([loss.detach().reshape(1), *(g.reshape(-1) for g in grads)])


# Leaks -----------------------------------------------------------------------------------------


def live() -> tuple[int, int]:
    """Number and bytes of the tensors that Python knows."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return len(tensors), sum(x.nbytes for x in tensors)


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(iterate: Callable[[], None], iterations: int) -> tuple[int, int, int]:
    """Growth of tensors, of their bytes and of the process; garbage is never collected."""
    for _ in range(3):
        iterate()
    gc.collect()
    gc.disable()
    try:
        count, size = live()
        before = resident()
        for _ in range(iterations):
            iterate()
        after = resident()
        new_count, new_size = live()
    finally:
        gc.enable()
    return new_count - count, new_size - size, after - before


def test_two_thousand_iterations_leave_nothing_in_memory() -> None:
    rate = torch.tensor([-0.5, 0.5], requires_grad=True)
    y0, iterations = torch.ones(1, 2), 2000

    def iterate() -> None:
        rate.grad = None
        y = solve(lambda t, y: rate * y, y0, sa.Symplectic(), steps=1, method="euler").y
        y[-1].sum().backward()

    count, size, process = grown(iterate, iterations)
    assert count == 0
    assert size == 0
    assert process < 500 * iterations


@every_strategy
def test_no_strategy_leaves_tensors_to_the_garbage_collector(strategy: Strategy) -> None:
    """After two backward passes, after one that never comes, and after one that fails."""
    field, y0 = Field(), batch()

    def iterate() -> None:
        field.calls, field.stop = 0, None
        solution = solve(field, y0, strategy, dense=True)
        loss = problems.loss(solution.y) + solution.dense(torch.tensor([0.3])).sum()
        torch.autograd.grad(loss, y0, retain_graph=True)
        torch.autograd.grad(loss, y0)
        solve(field, y0, strategy)
        for calls in (1, 5):
            field.calls, field.stop = 0, calls
            with contextlib.suppress(KeyboardInterrupt):
                problems.loss(solve(field, y0, strategy).y).backward()
        y0.grad = None
        field.zero_grad()

    count, size, _ = grown(iterate, 3)
    assert count == 0
    assert size == 0


# Interruptions ---------------------------------------------------------------------------------


def state(field: Field, values: bool = True) -> list[Any]:
    """Everything that a solve touches: held objects by identity, flags, gradients, hooks."""
    found: list[Any] = []
    for part in field.modules():
        for held in (part._parameters, part._modules, part._forward_pre_hooks, part._buffers):
            found += [id(x) for x in held.values()]
    for p in field.parameters():
        assert p.grad is not None
        found += [p.requires_grad, p.is_leaf, id(p.grad), p.grad.sum().item(), p._version]
    return found


def released() -> bool:
    """Whether another thread may solve."""
    with ThreadPoolExecutor(1) as pool:
        free: bool = pool.submit(capture._SUBSTITUTION.acquire, blocking=False).result()
        if free:
            pool.submit(capture._SUBSTITUTION.release).result()
    return free


@every_strategy
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_at_any_evaluation_leaves_nothing_behind(
    strategy: Strategy, error: type[BaseException]
) -> None:
    field = Field()
    field.error = error
    for p in field.parameters():
        p.grad = torch.ones_like(p)
    buffers = {name: x.clone() for name, x in field.named_buffers()}
    wanted = train(field, strategy)
    calls, before = field.calls, state(field)
    assert calls >= 4
    for stop in range(calls):
        for name, x in field.named_buffers():
            x.copy_(buffers[name])
        field.stop = stop
        with pytest.raises(error):
            train(field, strategy)
        assert state(field) == before, f"after evaluation {stop} of {calls}"
    assert released()
    field.stop = None
    assert torch.equal(train(field, strategy), wanted)


@every_strategy
def test_an_interrupted_backward_pass_leaves_the_random_numbers_alone(strategy: Strategy) -> None:
    field = Field()
    loss = problems.loss(solve(field, batch(), strategy).y)
    before = torch.get_rng_state()
    field.stop = field.calls + 1
    with contextlib.suppress(KeyboardInterrupt):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def leaving(frame: FrameType) -> bool:
    """Whether a ``with`` block is about to call ``__exit__``: Python takes no signal before it."""
    ahead = itertools.dropwhile(lambda i: i.offset < frame.f_lasti, instructions(frame.f_code))
    exit_call = [(i.opname, i.argval) for i in itertools.islice(ahead, 3)]
    return exit_call == [("LOAD_CONST", None)] * 3


@functools.cache
def instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(dis.get_instructions(code))


@contextlib.contextmanager
def interrupted(line: int, where: tuple[str, ...]) -> Generator[list[int]]:
    """Raise when the given number of lines of these files has run, as Ctrl-C may anywhere."""
    count = [0]

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and not leaving(frame):
            count[0] += 1
            if count[0] == line:
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.endswith(where) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def test_an_interruption_between_any_two_lines_leaves_nothing_behind() -> None:
    field = Field()
    for p in field.parameters():
        p.grad = torch.ones_like(p)
    strategy, files = sa.Symplectic(), ("capture.py", "_job.py", "_function.py")
    with interrupted(-1, files) as count:
        train(field, strategy)
    lines, before = count[0], state(field)
    assert lines > 1000
    for line in range(1, lines, 7):
        with contextlib.suppress(KeyboardInterrupt), interrupted(line, files):
            train(field, strategy)
        assert state(field) == before, f"after line {line} of {lines}"
    assert released()


# The same every time ---------------------------------------------------------------------------


def digest() -> str:
    """A fingerprint of every bit of the values and gradients of all strategies."""
    torch.set_num_threads(1)
    parts = [train(Field(), strategy) for strategy in ALL]
    options: dict[str, Any] = {"controller": sa.Adaptive(), "rtol": 1e-3, "atol": 1e-3}
    adaptive = [
        solve(Field().eval(), batch(), s, **options, method=s.method or "bosh3").y for s in ALL
    ]
    bits = torch.cat([*parts, *(y.detach().reshape(-1) for y in adaptive)]).numpy().tobytes()
    return hashlib.sha256(bits).hexdigest()


def test_the_same_seed_gives_the_same_bits_here_and_in_a_fresh_process() -> None:
    here = digest()
    assert here == digest()
    path = os.pathsep.join([str(markdown.ROOT), os.environ.get("PYTHONPATH", "")])
    fresh = subprocess.run(
        [sys.executable, "-c", "from tests.test_robustness import digest; print(digest())"],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "123"},
        cwd=markdown.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    assert fresh.stdout.strip() == here


@every_exact_strategy
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_order_of_the_batch_does_not_matter(strategy: Strategy, adaptive: bool) -> None:
    net, y0 = problems.Net(), batch(7)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    options: dict[str, Any] = {}
    if adaptive:
        options = {"controller": sa.Adaptive(), "method": strategy.method or "bosh3"}
        options |= {"rtol": 1e-3, "atol": 1e-3}

    def solved(start: Tensor) -> tuple[Any, list[Tensor]]:
        solution = solve(net, start, strategy, **options)
        loss = solution.y[-1].square().sum()
        return solution, [*torch.autograd.grad(loss, [start, *net.parameters()])]

    one, (lam, *grads) = solved(y0)
    other, (permuted, *others) = solved(y0.detach()[order].requires_grad_())
    assert one.steps.shape == other.steps.shape
    pairs = [(one.steps, other.steps), (one.y[:, order], other.y), (lam[order], permuted)]
    pairs += zip(grads, others, strict=True)
    for a, b in pairs:
        assert problems.relative_error(a, b) <= 1e-13


# Threads ---------------------------------------------------------------------------------------


def together(work: Callable[[int], list[Tensor]], jobs: int = 24) -> list[list[Tensor]]:
    """Four threads that switch as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(work, range(jobs), timeout=120))
    finally:
        sys.setswitchinterval(before)


class Encoded(nn.Module):
    """Evaluates layers outside of the solve, too."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(3, 3, dtype=torch.float64)
        self.net = problems.Net(seed=seed)
        self.scale = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor, strategy: Strategy) -> Tensor:
        y0 = self.encoder(x) + self.net(torch.zeros(()), x)
        y: Tensor = solve(lambda t, y: self.net(t, self.scale(y)), y0, strategy).y[-1]
        return y + self.encoder(x)

    def gradients(self, x: Tensor, strategy: Strategy) -> list[Tensor]:
        return [*torch.autograd.grad(problems.loss(self(x, strategy)), [x, *self.parameters()])]


@pytest.mark.parametrize("strategy", [s for s in ALL if s.name != "forward"], ids=label)
@pytest.mark.parametrize("shared", [True, False])
def test_solves_in_several_threads_are_right(strategy: Strategy, shared: bool) -> None:
    models = [Encoded(seed) for seed in range(1 if shared else 4)]
    inputs = [batch(2 + i) for i in range(4)]
    kinds = [(models[i % len(models)], inputs[i % 4], strategy) for i in range(24)]
    wanted = [model.gradients(*rest) for model, *rest in kinds[:4]]
    for i, got in enumerate(together(lambda i: kinds[i][0].gradients(*kinds[i][1:]))):
        for a, b in zip(got, wanted[i % 4], strict=True):
            assert torch.equal(a, b)


def test_gradients_of_several_threads_accumulate() -> None:
    model, x = Encoded(), batch()
    wanted = model.gradients(x, sa.Symplectic())[1:]

    def work(_: int) -> list[Tensor]:
        problems.loss(model(x.detach(), sa.Symplectic())).backward()
        return []

    together(work, 8)
    for p, g in zip(model.parameters(), wanted, strict=True):
        assert problems.relative_error(p.grad, 8 * g) <= 1e-13


@pytest.mark.parametrize("strategy", [sa.Symplectic(), sa.Backprop(), sa.Checkpoint()], ids=label)
@pytest.mark.parametrize("listed", [False, True])
def test_weights_that_torch_functions_do_not_receive_get_their_gradients_in_threads(
    strategy: Strategy, listed: bool
) -> None:
    w, b = (torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tensors = [w] if listed else [w, b]
    params = tensors if listed else None

    def work(_: int) -> list[Tensor]:
        y = solve(lambda t, y: problems.Product.apply(y, w) * b, batch(), strategy, params=params).y
        return [*torch.autograd.grad(problems.loss(y), tensors)]

    wanted = work(0)
    for got in together(work, 8):
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


@every_strategy
def test_a_solve_inside_a_backward_hook_is_right(strategy: Strategy) -> None:
    outer, inner, found = problems.Net(), problems.Net(seed=1), []

    def work() -> Tensor:
        z = batch()
        with torch.enable_grad():
            loss = problems.loss(solve(inner, z, strategy).y)
        return torch.autograd.grad(loss, z)[0]

    def hook(_: Tensor) -> None:
        found.append(work())

    y0 = batch()
    problems.loss(solve(outer, y0, strategy).y).backward()
    wanted, y0.grad = (y0.grad, outer.inner.grad), None
    outer.zero_grad()
    outer.inner.register_hook(hook)
    field = lambda t, y: outer(t, y)  # noqa: E731
    y = solve(field, y0, strategy).y
    y.register_hook(hook)
    problems.loss(y).backward()
    assert len(found) == 2
    assert all(torch.equal(x, work()) for x in found)
    for a, b in zip((y0.grad, outer.inner.grad), wanted, strict=True):
        assert a is not None
        assert torch.equal(a, b)


def test_a_thread_waits_for_the_solve_of_another() -> None:
    """The lock is held while func runs, and not between forward and backward pass."""
    inside, go = threading.Event(), threading.Event()
    net = problems.Net()

    def slow(t: Tensor, y: Tensor) -> Tensor:
        inside.set()
        assert go.wait(60)
        out: Tensor = net(t, y)
        return out

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: solve(slow, batch(), sa.Symplectic()).y)
        assert inside.wait(60)
        second = pool.submit(lambda: solve(net, batch(), sa.Symplectic()).y)
        assert not second.done()
        go.set()
        assert torch.equal(first.result(60), second.result(60))
    assert released()
