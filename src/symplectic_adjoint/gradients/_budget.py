"""Memory as an argument: how many bytes of it are left for what is kept of the steps."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, MemoryBudgetError, UnknownNameError
from symplectic_adjoint.checkpoints.rows import SLACK
from symplectic_adjoint.checkpoints.schedules import Plan
from symplectic_adjoint.steppers import Stepper

SETTINGS = ("auto", "fastest", "least")
AUTO = 0.8
"""The fraction of the free memory that ``memory="auto"`` takes."""

_UNITS = {"B": 1} | {
    f"{prefix}{infix}B": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
STEP = 48
"""Bytes that each step leaves: its times, on the grid and in the solution, and its outputs."""

ENTRY = 1536
"""Bytes that the books take for each step of which something is kept, beside its tensors.

Entries that come and go let the tables of a dict grow to six times as many rows as there are.
"""


def parsed(memory: int | str | None) -> int | str | None:
    """A number of bytes, one of ``SETTINGS`` or None.

    Raises:
        ArgumentError: It is neither that nor a size such as "512MiB".
        UnknownNameError: It is another word.

    Example:
        >>> parsed("1.5 KiB"), parsed("2GB"), parsed("auto"), parsed(10)
        (1536, 2000000000, 'auto', 10)
    """
    if isinstance(memory, str) and memory not in SETTINGS:
        size = re.fullmatch(r"([\d.]+)\s*([kKMGT]?i?B)", memory.strip())
        if size is None:
            raise UnknownNameError("memory", memory, (*SETTINGS, "512MiB", "2GB"))
        memory = int(float(size[1]) * _UNITS[size[2].replace("k", "K")])
    if isinstance(memory, bool) or not (memory is None or isinstance(memory, int | str)):
        raise ArgumentError(
            f"memory must be a number of bytes, a size such as '512MiB', one of {SETTINGS} or "
            f"None, not {memory!r}"
        )
    if isinstance(memory, int) and memory < 1:
        raise ArgumentError(f"memory must be positive, not {memory}")
    return memory


def free(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Budget:
    """A number of bytes, and what of it is taken before any step is kept.

    Attributes:
        memory: All of it.
        fixed: The solve's outputs and their cotangents, the stages of the step at hand, the sums of
            the parameters' gradients, what is on its way to or from a store.
    """

    memory: int
    fixed: int

    @staticmethod
    def of(
        memory: int | str,
        stepper: Stepper,
        y0: Tensor,
        outputs: int,
        sums: Sequence[Tensor],
        ahead: int,
        steps: int,
    ) -> Budget:
        """The budget of a solve.

        Args:
            memory: Bytes, or "auto".
            stepper: The method.
            y0: The initial state.
            outputs: Number of output times.
            sums: Tensors that take as much as the sums of the captured tensors' gradients.
            ahead: How many steps are in memory on their way to or from a store.
            steps: How many steps will be taken at least.

        Raises:
            MemoryBudgetError: Not one state can be kept.
        """
        work = stepper.work
        stages = 1 + work.inner + work.error + work.extra
        states = 2 * outputs + 3 * stages + 9 + ahead * (stages + 1)
        fixed = states * y0.nbytes + sum(x.nbytes for x in sums)
        total = int(AUTO * free(y0.device)) if isinstance(memory, str) else memory
        budget = Budget(total, fixed)
        budget.left(steps, 0, y0.nbytes + ENTRY)
        return budget

    def settle(self, plan: Plan, steps: int, traces: int, state: int) -> None:
        """Leave to a plan what is left."""
        plan.capacity = self.left(steps, traces, state)

    def left(self, steps: int, traces: int, state: int) -> int:
        """What is left after a number of steps that left ``traces``, where states are as large.

        Raises:
            MemoryBudgetError: Not one state can be kept.
        """
        taken = self.fixed + STEP * steps + traces
        needed = taken + state
        if needed > self.memory:
            raise MemoryBudgetError(
                f"memory={self.memory} bytes are too few: outputs, gradients, the stages of a step "
                f"and one state take {needed} bytes after {steps} steps; give memory={needed} or "
                "more",
                needed,
            )
        left = self.memory - taken
        return max(left - left // SLACK, state)


def settle_logarithm(plan: Plan, steps: int, traces: int, state: int) -> None:
    """Leave to a plan room for as many states as the logarithm of the number of steps.

    Each step is then taken again about as often: the least memory with which the number of steps
    taken again does not grow faster than ``N log N``.
    """
    plan.capacity = state * (4 + 2 * steps.bit_length())


def settle_nothing(plan: Plan, steps: int, traces: int, state: int) -> None:
    """Leave a plan as it is."""
