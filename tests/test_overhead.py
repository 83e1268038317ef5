"""What a solve costs beside the evaluations: reads of the device, graphs, temporaries."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import symplectic_adjoint as sa
from symplectic_adjoint.capture import graph_leaves

STRATEGIES = {
    "stages": sa.Symplectic(),
    "steps": sa.Symplectic(store="steps"),
    "graph": sa.Symplectic(store="graph"),
    "backprop": sa.Backprop(),
    "aca": sa.ACA(),
    "checkpoint": sa.Checkpoint(),
}
strategies = pytest.mark.parametrize("name", STRATEGIES)


class Switched(nn.Module):
    """A small network with a sudden change in each unit of time, so that steps are rejected."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        k: Tensor = self.net(y) + torch.tanh(60.0 * torch.sin(6.28 * t))
        return k


class _Scalars(TorchDispatchMode):
    """Counts what reads one number, or a shape that depends on numbers."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        self.count += func in (aten._local_scalar_dense.default, aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def host_reads(fn: Callable[[], Any]) -> tuple[int, Any]:
    """How often the host would wait for the device, and the result."""
    copies = 0

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal copies
            copies += 1
            return method(tensor, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, _Scalars() as scalars:
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, counted(name))
        result = fn()
    return copies + scalars.count, result


def solve(span: float, strategy: Any, steps: int | None, outputs: int = 2, **options: Any) -> Any:
    controller = sa.FixedGrid(step_size=span / steps) if steps else sa.Adaptive()
    t = torch.linspace(0.0, span, outputs, dtype=torch.float64)
    device = options.pop("device", "cpu")
    torch.manual_seed(0)
    func, y0 = Switched().to(device), torch.full((3, 2), 0.5, device=device)
    return sa.solve(
        *(func, y0, t),
        **{"controller": controller, "gradient": strategy, "rtol": 1e-4, "atol": 1e-4, **options},
    )


@strategies
@pytest.mark.parametrize("outputs", [2, 40])
def test_an_attempted_step_is_read_once(name: str, outputs: int) -> None:
    seen = []
    for span in (1.0, 2.0):
        reads, solution = host_reads(lambda: solve(span, STRATEGIES[name], None, outputs))  # noqa: B023
        assert solution.stats.rejected > 0
        seen.append((solution.stats.accepted + solution.stats.rejected, reads))
    (few, reads_of_few), (many, reads_of_many) = seen
    assert many > few + 10
    assert reads_of_many - reads_of_few == many - few


@strategies
@pytest.mark.parametrize("method", ["rk4", "dopri5", "alf"])
def test_fixed_steps_are_never_read(name: str, method: str) -> None:
    counts = {
        host_reads(lambda: solve(1.0, STRATEGIES[name], steps, 20, method=method))[0]  # noqa: B023
        for steps in (8, 32)
    }
    assert len(counts) == 1, "the number of reads must not depend on the number of steps"


@strategies
@pytest.mark.parametrize("steps", [None, 8])
def test_a_backward_pass_reads_nothing(name: str, steps: int | None) -> None:
    y = solve(1.0, STRATEGIES[name], steps, 20).y
    assert host_reads(y.sum().backward)[0] == 0


def test_gradients_of_times_are_read_once_each() -> None:
    for steps in (8, 32):
        t = torch.linspace(0.0, 1.0, steps + 1, requires_grad=True)
        y = sa.odeint(lambda t, y: torch.sin(t * y), torch.ones(3), t, method="rk4")
        reads, _ = host_reads(y.sum().backward)
        assert reads == 2  # those of steps, and those of outputs


def nodes_made(fn: Callable[[], Any]) -> int:
    """How many nodes a function adds to autograd graphs, kept or not."""

    def number() -> int:
        one = torch.ones((), requires_grad=True) * 1
        assert one.grad_fn is not None
        return int(one.grad_fn._sequence_nr())

    before = number()
    result = fn()
    after = number()
    del result
    return after - before - 1


@strategies
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_graph_is_built_in_the_forward_pass_only_to_be_kept(name: str, method: str) -> None:
    few, many = (
        nodes_made(lambda: solve(1.0, STRATEGIES[name], steps, method=method))  # noqa: B023
        for steps in (4, 16)
    )
    if name in ("graph", "backprop"):
        assert many - few > 12 * 3  # at least the layers of each step
    else:
        assert few == many == 1  # the solve itself


class Wide(nn.Module):
    """Few states and many parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(2, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 2))
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        k: Tensor = self.net(y)
        return k

    def bytes(self) -> list[int]:
        return [p.numel() * p.element_size() for p in self.parameters()]


@pytest.mark.parametrize("store", ["stages", "steps", "graph"])
@pytest.mark.parametrize("again", [False, True], ids=["first", "accumulating"])
def test_a_backward_pass_holds_the_gradient_and_one_product(store: Any, again: bool) -> None:
    func = Wide()
    strategy = sa.Symplectic(store=store)

    def solved() -> Tensor:
        t = torch.tensor([0.0, 1.0])
        y: Tensor = sa.odeint(
            func, torch.ones(1, 2), t, method="rk4", options={"step_size": 0.25}, gradient=strategy
        )
        return y.sum()

    solved().backward()
    loss = solved()
    if not again:
        func.zero_grad(set_to_none=True)
    sizes = func.bytes()
    peak = sa.peak_memory(loss.backward)
    assert sum(sizes) <= peak <= (sum(sizes) + max(sizes)) * 1.02


class Marked(torch.autograd.Function):
    """Keeps something of its own under the name by which leaves hold their tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = "none of autograd's"
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_the_walk_over_a_graph_finds_leaves_alone() -> None:
    x, w = (torch.ones(2, requires_grad=True) for _ in range(2))
    apply: Any = Marked.apply
    leaves = graph_leaves(apply(x * w) + x)
    assert sorted(map(id, leaves)) == sorted(map(id, (x, w)))


def syncs(fn: Callable[[], Any]) -> tuple[int, Any]:
    """How often a function has made the host wait for the GPU, and its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = fn()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught), result


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@strategies
def test_the_host_waits_for_a_gpu_once_an_attempted_step_and_not_at_all_on_a_grid(
    name: str,
) -> None:
    strategy = STRATEGIES[name]
    for outputs in (2, 40):
        runs = [
            syncs(lambda: solve(span, strategy, steps, outputs, device="cuda"))  # noqa: B023
            for span, steps in ((1.0, None), (2.0, None), (1.0, 8), (1.0, 32))
        ]
        few, many, *grids = [count for count, _ in runs]
        attempts = [s.stats.accepted + s.stats.rejected for _, s in runs]
        assert many - few == attempts[1] - attempts[0]
        assert grids[0] == grids[1]
        for _, solution in runs:
            loss = solution.y.sum()
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
