"""Small solves run on one thread, and nobody else notices."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint.threads import limited, suited

T = torch.tensor([0.0, 1.0])


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Watching(nn.Module):
    """A network that notes how many threads its evaluations may use."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(2, width)
        self.outer = nn.Linear(width, 2)
        self.seen: list[int] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append(torch.get_num_threads())
        k: Tensor = self.outer(torch.tanh(self.inner(y)))
        return k

    def taken(self) -> set[int]:
        seen = set(self.seen)
        self.seen.clear()  # another list would not be the one that the backward pass goes by
        return seen


def solved(func: Any, batch: int = 3, **options: Any) -> Tensor:
    y0 = torch.full((batch, 2), 0.5)
    y: Tensor = sa.solve(func, y0, T, rtol=1e-2, atol=1e-2, **options).y
    return y


@pytest.mark.parametrize("strategy", ["symplectic", "aca", "checkpoint", "continuous", "forward"])
def test_both_passes_of_a_small_solve_use_one_thread(strategy: str) -> None:
    func = Watching()
    y = solved(func, gradient=strategy)
    assert (func.taken(), torch.get_num_threads()) == ({1}, 2)
    y.sum().backward()
    assert (func.taken(), torch.get_num_threads()) == ({1}, 2)


def test_the_forward_pass_of_backprop_uses_one_thread() -> None:
    func = Watching()
    solved(func, gradient="backprop").sum().backward()
    assert (func.taken(), torch.get_num_threads()) == ({1}, 2)


def test_a_replay_for_second_derivatives_uses_one_thread() -> None:
    func = Watching()
    y = solved(func)
    func.taken()
    (grad,) = torch.autograd.grad(y.sum(), func.inner.weight, create_graph=True)
    assert (func.taken(), torch.get_num_threads()) == ({1}, 2)
    assert grad.requires_grad


def test_a_solve_inside_a_transform_uses_one_thread() -> None:
    func = Watching()
    y0 = torch.full((3, 2), 0.5)
    torch.func.grad(lambda y: sa.odeint(func, y, T, rtol=1e-2, atol=1e-2).sum())(y0)
    assert (func.taken(), torch.get_num_threads()) == ({1}, 2)


def test_states_that_pytorch_shares_keep_their_threads() -> None:
    func = Watching(width=1)
    for batch, number in ((16383, 1), (16384, 2)):  # elements: below 32768, and as many
        solved(func, batch, method="euler").sum().backward()
        assert func.taken() == {number}


def test_networks_that_are_worth_it_keep_their_threads() -> None:
    # 32 elements of the state times the 5 w + 2 of the network, against 2**20.
    for width, number in ((6553, 1), (6554, 2)):
        func = Watching(width)
        solved(func, batch=16, method="euler").sum().backward()
        assert func.taken() == {number}


def test_constants_that_func_reads_count_as_well() -> None:
    matrix, seen = torch.zeros(1024, 1024), []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return matrix[0, 0] - y

    sa.odeint(func, torch.ones(1), T)
    assert set(seen) == {2}
    matrix = matrix[:1000]
    seen.clear()
    sa.odeint(func, torch.ones(1), T)
    assert set(seen) == {1}


class Hidden:
    """Holds a tensor where a walk over the references of a function does not look."""

    weight = torch.zeros(2**20, requires_grad=True)


def test_a_tensor_found_by_its_use_counts_from_then_on() -> None:
    seen = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return y * Hidden.weight[0] - y

    sa.odeint(func, torch.ones(1), T)
    assert (seen[0], seen[-1]) == (1, 2)


def test_the_number_is_never_raised() -> None:
    torch.set_num_threads(1)
    func = Watching()
    with sa.single_thread_below(0):
        solved(func).sum().backward()
    assert (func.taken(), torch.get_num_threads()) == ({1}, 1)
    with limited(3):
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("strategy", ["symplectic", "backprop"])
def test_the_number_is_put_back_when_the_forward_pass_fails(strategy: str) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            raise ArithmeticError
        return -y

    with pytest.raises(ArithmeticError):
        sa.odeint(func, torch.ones(1, requires_grad=True), T, gradient=strategy)
    assert torch.get_num_threads() == 2


def test_the_number_is_put_back_when_the_backward_pass_fails() -> None:
    func = Watching()
    y = solved(func)

    def fail(module: nn.Module, args: Any) -> None:
        assert torch.get_num_threads() == 1
        raise ArithmeticError

    func.inner.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        y.sum().backward()
    assert torch.get_num_threads() == 2


def test_other_threads_keep_their_number() -> None:
    """One that has used torch before keeps its own; one that begins afterwards has the caller's."""
    numbers: dict[str, int] = {}
    begun, solving = threading.Event(), threading.Event()

    def beside() -> None:
        numbers["before"] = torch.get_num_threads()
        begun.set()
        solving.wait(30)
        numbers["during"] = torch.get_num_threads()

    def func(t: Tensor, y: Tensor) -> Tensor:
        numbers["inside"] = torch.get_num_threads()
        solving.set()
        thread.join(30)
        return -y

    thread = threading.Thread(target=beside)
    thread.start()
    begun.wait(30)
    sa.odeint(func, torch.ones(1), T)
    later = threading.Thread(target=lambda: numbers.update(after=torch.get_num_threads()))
    later.start()
    later.join(30)
    assert numbers == {"before": 2, "during": 2, "inside": 1, "after": 2}


def test_the_bound_can_be_moved_for_a_block_and_for_good() -> None:
    func = Watching()
    with sa.single_thread_below(0):
        y = solved(func)
    assert func.taken() == {2}
    y.sum().backward()  # as chosen when the solve began
    assert func.taken() == {2}
    solved(func)
    assert func.taken() == {1}

    before = sa.single_thread_below(0)
    solved(func)
    assert func.taken() == {2}
    with before:
        pass
    solved(func)
    assert func.taken() == {1}


@pytest.mark.parametrize("work", [-1, math.nan, "none", True, None])
def test_a_bound_that_is_none_is_refused(work: Any) -> None:
    with pytest.raises(sa.ArgumentError, match="not negative"):
        sa.single_thread_below(work)


def test_on_an_accelerator_the_number_is_left_alone() -> None:
    assert suited(torch.empty(3), 5) == 1
    assert suited(torch.empty(3, device="meta"), 5) is None
