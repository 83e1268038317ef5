"""How many threads the operations of a solve use: one where they are too small to share."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError

_LEAST = 32
"""So that a state that PyTorch itself would share, of 32768 elements, is never small by default."""


class _Small:
    """Up to which work a solve is small."""

    below: float = 2.0**20


def single_thread_below(work: float) -> contextlib.AbstractContextManager[object]:
    """Sets which solves run on one thread: those whose evaluations of ``func`` are small.

    To share an operation between threads costs more than a small one takes, and a solve of a small
    system is thousands of them. The work of an evaluation is estimated as

        elements of the state * max(32, elements of the tensors that func depends on)

    which bounds the multiplications in a network of linear and convolutional layers. Below
    ``work``, 2**20 unless this function was called, a solve on the CPU uses one thread, and so does
    its backward pass, with every strategy but "backprop", whose backward pass is PyTorch's own. The
    number that ``torch.set_num_threads`` has set is put back when either ends, and it is never
    raised.

    Args:
        work: The bound; 0 leaves the number of threads alone.

    Returns:
        A context manager that puts back the previous bound on leaving; without ``with``, the new
        one holds from here on. A solve keeps the choice that was made when it began.

    Raises:
        ArgumentError: ``work`` is no number, or negative.

    Example:
        >>> import symplectic_adjoint as sa
        >>> with sa.single_thread_below(0):
        ...     y = sa.odeint(lambda t, y: -y, torch.ones(1), [0.0, 1.0])
    """
    if type(work) not in (int, float) or not work >= 0:
        raise ArgumentError(f"work = {work!r} must be a number that is not negative, e.g. 2**20")
    undo = contextlib.ExitStack()
    undo.callback(setattr, _Small, "below", _Small.below)
    _Small.below = work
    return undo


def suited(state: Tensor, elements: int) -> int | None:
    """The number of threads for a solve, or None where it is PyTorch's affair.

    Args:
        state: The flat initial state.
        elements: How many elements the tensors have that ``func`` depends on.
    """
    small = state.numel() * max(_LEAST, elements) < _Small.below
    return 1 if small and state.device.type == "cpu" else None


@contextlib.contextmanager
def limited(count: int | None) -> Generator[None]:
    """Use at most ``count`` threads inside the block, and as many as before afterwards.

    The number belongs to the calling thread, in which autograd reverses what is on the CPU, too.
    """
    before = torch.get_num_threads()
    if count is None or count >= before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
