"""Peak live memory against cases counted by hand."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest
import torch
from torch import Tensor, nn

from symplectic_adjoint.memory import peak_memory

MEGA = 1 << 20


def block(megabytes: int = 1) -> Tensor:
    return torch.empty(megabytes * MEGA // 4)


def test_nothing_allocated_is_zero() -> None:
    assert peak_memory(lambda: None) == 0


@pytest.mark.parametrize("count", [1, 5])
def test_tensors_held_together_add_up(count: int) -> None:
    assert peak_memory(lambda: [block() for _ in range(count)]) == count * MEGA


def test_a_tensor_freed_before_the_next_is_made_counts_once() -> None:
    def one_at_a_time() -> None:
        for _ in range(10):
            block(3)

    assert peak_memory(one_at_a_time) == 3 * MEGA


def test_the_peak_may_lie_in_the_middle() -> None:
    def rise_and_fall() -> Tensor:
        first, second = block(2), block(5)
        del first, second
        return block(3)

    assert peak_memory(rise_and_fall) == 7 * MEGA


def test_views_and_in_place_work_cost_nothing() -> None:
    assert peak_memory(lambda: block().view(-1, 4)[::2].zero_()) == MEGA


def test_freeing_older_memory_earns_no_credit() -> None:
    older = [block(8)]

    def replace_by_smaller() -> Tensor:
        older.clear()
        return block(2)

    assert peak_memory(replace_by_smaller) == 2 * MEGA


def test_memory_known_from_an_earlier_measurement_earns_no_credit_either() -> None:
    kept: list[Tensor] = []
    assert peak_memory(lambda: kept.append(block(8))) == 8 * MEGA

    def replace_by_smaller() -> Tensor:
        kept.clear()
        return block(2)

    assert peak_memory(replace_by_smaller) == 2 * MEGA


def test_a_garbage_cycle_counts_until_it_is_collected() -> None:
    def cycle(collect: bool) -> Tensor:
        loop: list[object] = [block(4)]
        loop.append(loop)
        del loop
        if collect:
            gc.collect()
        return block(4)

    assert peak_memory(lambda: cycle(collect=True)) == 4 * MEGA
    gc.disable()
    try:
        assert peak_memory(lambda: cycle(collect=False)) == 8 * MEGA
    finally:
        gc.enable()


def test_an_autograd_graph_of_known_size() -> None:
    """tanh saves its result: n are alive at the loss, and at most two cotangents after it."""
    x = torch.zeros(MEGA // 4, requires_grad=True)

    def chain(length: int) -> None:
        y = x
        for _ in range(length):
            y = y.tanh()
        torch.autograd.backward(y, torch.ones_like(y))

    small, large = (peak_memory(lambda n=n: chain(n)) for n in (10, 30))  # type: ignore[misc]
    assert large - small == 20 * MEGA
    assert 11 * MEGA <= small <= 13 * MEGA


def test_detached_steps_need_memory_that_does_not_grow() -> None:
    net = nn.Linear(64, 64)

    def solve(steps: int) -> None:
        y = torch.zeros(16, 64)
        with torch.no_grad():
            for _ in range(steps):
                y = y.add(net(y), alpha=0.1)  # 0.1 * net(y) would make a tensor of the 0.1 too

    assert peak_memory(lambda: solve(4)) == peak_memory(lambda: solve(64)) == 3 * 16 * 64 * 4


def test_the_same_figure_every_time() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))

    def train() -> None:
        net.zero_grad()
        net(torch.ones(4, 8)).sum().backward()
        net.zero_grad()

    assert len({peak_memory(train) for _ in range(3)}) == 1


def test_allocations_inside_record_function_are_seen() -> None:
    def labelled() -> Tensor:
        with torch.profiler.record_function("outer"):
            with torch.profiler.record_function("inner"):
                first = block(2)
            return torch.cat([first, block(1)])

    assert peak_memory(labelled) == 6 * MEGA


def test_a_hundred_thousand_events_take_seconds() -> None:
    def many() -> None:
        for _ in range(50_000):
            torch.empty(4)

    start = time.perf_counter()
    assert peak_memory(many) == 16
    assert time.perf_counter() - start < 20


def test_an_exception_passes_through_and_leaves_the_profiler_off() -> None:
    def fails() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        peak_memory(fails)
    assert peak_memory(block) == MEGA


def test_inside_a_running_profiler_it_refuses() -> None:
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(RuntimeError, match="running torch profiler"),
    ):
        peak_memory(block)


def test_nested_it_refuses() -> None:
    with pytest.raises(RuntimeError, match="running torch profiler"):
        peak_memory(lambda: peak_memory(block))
    assert peak_memory(block) == MEGA


def test_other_devices_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'meta'"):
        peak_memory(block, device="meta")


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    peak_memory(block)
    assert "KINETO_LOG_LEVEL" not in os.environ
    monkeypatch.setenv("KINETO_LOG_LEVEL", "3")
    peak_memory(block)
    assert os.environ["KINETO_LOG_LEVEL"] == "3"


def test_the_work_of_other_threads_does_not_disturb() -> None:
    stop = threading.Event()

    def noise() -> None:
        while not stop.is_set():
            block(16)

    worker = threading.Thread(target=noise)
    worker.start()
    try:
        assert peak_memory(lambda: [block() for _ in range(3)]) == 3 * MEGA
    finally:
        stop.set()
        worker.join()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_reads_the_caching_allocator() -> None:
    def two() -> tuple[Tensor, Tensor]:
        return torch.empty(MEGA // 4, device="cuda"), torch.empty(MEGA // 4, device="cuda")

    assert peak_memory(two, device="cuda") == 2 * MEGA
