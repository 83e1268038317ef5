"""How peak memory grows with the steps N, the stages s and the size of the network.

Bytes are counted by the allocator, the laws are fitted to them by least squares, and the
coefficients are held against the table of costs in docs/gradients.md, in units of

- a state,
- the tape of one evaluation: what autograd keeps for its backward pass beside input and output,
- the work of one evaluation and its product, alone.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.memory import peak_memory

BATCH, DIM = 256, 4
STATE = BATCH * DIM * 8
RANDOM = torch.get_rng_state().nbytes / STATE
METHODS = {"euler": 1, "rk4": 4, "dopri5": 6}
STEPS = (4, 12)
WIDTHS = (8, 32, 64)


@dataclass(frozen=True)
class Law:
    """Coefficients of memory.

    Attributes:
        steps: States for each step.
        stages: States for each stage of every step.
        tapes: Tapes for each stage of every step.
        kept: The same three, between the forward and the backward pass.
        work_stages: States for each stage of the method, once; an upper bound.
        work_tapes: Tapes for each stage of the method, once.
        rest: What is left, in states: outputs, cotangents, and the like; an upper bound.
    """

    steps: int
    stages: int
    tapes: int
    kept: tuple[int, int, int]
    work_stages: float
    work_tapes: int
    rest: float


LAWS: dict[str, tuple[Strategy, Law]] = {
    "backprop": (sa.Backprop(), Law(0, 1, 1, (0, 1, 1), 0.5, 0, 3)),
    "checkpoint": (sa.Checkpoint(), Law(0, 1, 1, (0, 0, 0), 2, 0, 4)),
    "aca": (sa.ACA(), Law(1, 0, 0, (1, 0, 0), 2, 1, 4)),
    "symplectic, steps": (sa.Symplectic("steps"), Law(1, 0, 0, (1, 0, 0), 2.5, 0, 4)),
    "symplectic, stages": (sa.Symplectic("stages"), Law(0, 1, 0, (0, 1, 0), 1.5, 0, 4)),
    # Beside its point a stage's graph holds its value.
    "symplectic, graph": (sa.Symplectic("graph"), Law(0, 2, 1, (0, 2, 1), 0.5, 0, 5)),
    # Each of its stages has a point and a value, which hold the solution and its cotangent. The
    # states of the random generator are set aside and put back.
    "continuous": (sa.Continuous(), Law(0, 0, 0, (0, 0, 0), 4.1, 0, 8 + 2 * RANDOM)),
}


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Each measurement collects garbage first: what was there before need not be looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, width, dtype=torch.float64)
        self.outer = nn.Linear(width, DIM, dtype=torch.float64)
        for p in self.parameters():
            p.grad = torch.zeros_like(p)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        k: Tensor = self.outer(torch.tanh(self.inner(y)))
        return k


def kept(fn: Callable[[], object]) -> float:
    """Memory that is still live when ``fn`` has returned and its result is held, in states."""
    probe = 1 << 28  # so large that the peak is where it is allocated

    def held() -> tuple[object, Tensor]:
        result = fn()
        return result, torch.empty(probe, dtype=torch.uint8)

    return (peak_memory(held) - probe) / STATE


def peak(fn: Callable[[], Tensor]) -> float:
    """Peak memory of a solve and its backward pass, in states."""
    return peak_memory(lambda: fn()[-1].sum().backward()) / STATE


@functools.cache
def tape(width: int) -> float:
    """What autograd keeps of one evaluation, beside input and output."""
    net, y = Net(width), torch.zeros(BATCH, DIM, dtype=torch.float64)
    return kept(lambda: net(torch.zeros(()), y)) - 1


@functools.cache
def work(width: int) -> float:
    """Peak memory of one evaluation and its product."""
    net, y = Net(width), torch.zeros(BATCH, DIM, dtype=torch.float64, requires_grad=True)
    return peak_memory(lambda: net(torch.zeros(()), y).backward(torch.zeros_like(y))) / STATE


def solve(method: str, strategy: Strategy, steps: int, width: int) -> Callable[[], Tensor]:
    net, y0 = Net(width), torch.ones(BATCH, DIM, dtype=torch.float64)
    grid = sa.FixedGrid(step_size=1 / steps)

    def forward() -> Tensor:
        solution = sa.solve(net, y0, [0.0, 1.0], method=method, gradient=strategy, controller=grid)
        assert solution.stats.accepted == steps
        y: Tensor = solution.y
        return y

    return forward


def fitted(rows: list[list[float]], values: list[float], off: float) -> list[float]:
    """Coefficients by least squares, which must describe every value up to ``off`` states."""
    a = torch.tensor(rows, dtype=torch.float64)
    b = torch.tensor(values, dtype=torch.float64)
    coefficients = torch.linalg.lstsq(a, b.unsqueeze(-1)).solution.squeeze(-1)
    assert float((a @ coefficients - b).abs().max()) <= off
    return [float(x) for x in coefficients]


@pytest.mark.parametrize("name", LAWS)
def test_peak_memory_grows_as_the_table_of_costs_says(name: str) -> None:
    strategy, law = LAWS[name]
    rows, values = [], []
    for (method, s), n, w in itertools.product(METHODS.items(), STEPS, WIDTHS):
        rows.append([n, n * s, n * s * tape(w), s, s * tape(w), work(w), 1])
        values.append(peak(solve(method, strategy, n, w)))
    steps, stages, tapes, work_stages, work_tapes, works, rest = fitted(rows, values, off=2)
    assert (steps, stages, tapes) == approx((law.steps, law.stages, law.tapes))
    assert work_stages <= law.work_stages
    assert work_tapes == pytest.approx(law.work_tapes, abs=0.1)
    assert works <= 1.05
    assert rest <= law.rest


@pytest.mark.parametrize("name", LAWS)
def test_memory_kept_for_the_backward_pass_grows_as_the_table_of_costs_says(name: str) -> None:
    strategy, law = LAWS[name]
    rows, values = [], []
    for (method, s), n, w in itertools.product(METHODS.items(), STEPS, WIDTHS[::2]):
        rows.append([n, n * s, n * s * tape(w), 1])
        values.append(kept(solve(method, strategy, n, w)))
    steps, stages, tapes, rest = fitted(rows, values, off=0.01)
    assert (steps, stages, tapes) == approx(law.kept)
    assert rest <= 3.01  # the outputs and the last state


def test_reversible_steps_keep_nothing_and_work_on_one_evaluation() -> None:
    rows, peaks, keeps = [], [], []
    for n, w in itertools.product(STEPS, WIDTHS):
        rows.append([n, n * tape(w), work(w), 1])
        peaks.append(peak(solve("alf", sa.MALI(), n, w)))
        keeps.append(kept(solve("alf", sa.MALI(), n, w)))
    steps, tapes, works, rest = fitted(rows, peaks, off=1)
    assert (steps, tapes) == approx((0, 0))
    assert works <= 1.05
    assert rest <= 12
    steps, tapes, _, rest = fitted(rows, keeps, off=0.01)
    assert (steps, tapes) == approx((0, 0))
    assert rest <= 4.01


def test_rejected_attempts_leave_nothing_behind() -> None:
    net, y0 = Net(16), torch.ones(BATCH, DIM, dtype=torch.float64)

    def jump(t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = net(t, y) + torch.tanh(100 * (t - 0.5))
        return out

    def solve() -> sa.Solution:
        return sa.solve(jump, y0, [0.0, 1.0], method="dopri5", rtol=1e-3, atol=1e-3)

    stats = solve().stats
    assert stats.rejected >= 3
    assert kept(solve) == pytest.approx(6 * stats.accepted + 2, abs=0.1)


def approx(wanted: tuple[float, ...]) -> object:
    """Equality up to a hundredth of a state, or of a tape, for each step."""
    return pytest.approx(wanted, abs=0.01)
