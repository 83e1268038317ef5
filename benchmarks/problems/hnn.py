"""A Hamiltonian network: the field is the gradient of an energy."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.problems.base import Problem, normal
from benchmarks.problems.fields import Field, Hamiltonian


def enlarge(field: Field, generator: torch.Generator, batch: int) -> None:
    """A last layer twenty times as large: forces of the order of those of a pendulum."""
    last = field.net[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(20)


PROBLEM = Problem(
    name="hnn",
    summary="a Hamiltonian network, differentiated inside the field",
    batch=64,
    sizes=(4, 64, 64, 1),
    t1=10.0,
    rounds=9,
    network=Hamiltonian,
    prepare=enlarge,
    start=normal,
)
