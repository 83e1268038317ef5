"""Processes that train one model together, each on its rows of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """The processes that ``torchrun`` started, as one of them sees them; alone by default.

    Example:
        >>> ALONE.rows(torch.arange(4)).tolist(), ALONE.total(3.0)
        ([0, 1, 2, 3], 3.0)
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def rows(self, x: Tensor, axis: int = 0) -> Tensor:
        """This process's rows of what all of them hold."""
        return x if self.size == 1 else x.tensor_split(self.size, axis)[self.rank]

    def total(self, value: float) -> float:
        """The sum of a number over the processes, the same to the last bit in all of them."""
        return value if self.size == 1 else float(_sum(torch.tensor(value, dtype=torch.float64)))

    def norm(self, x: Tensor) -> Tensor:
        """Root mean square over the entries that all processes hold together.

        As the norm of step size control it lets all processes take the steps that one alone would
        take with all rows, which is what makes their gradients the same up to rounding.
        """
        squares = x.detach().double().square().sum()
        both = _sum(torch.stack((squares, squares.new_tensor(float(x.numel())))))
        return (both[0] / both[1]).sqrt()

    def add_gradients(self, model: nn.Module) -> None:
        """Replaces the gradients of the parameters by their sum over the processes."""
        if self.size == 1:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = _sum(torch.cat([g.flatten() for g in gradients]))
        parts = flat.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def agree(self, value: Any) -> Any:
        """What the first process has, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """The processes that ``torchrun`` started, for the time of a with block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    # The others wait while the first measures alone. torchrun ends them all where one of them ends.
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=7)
    )
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _sum(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x
