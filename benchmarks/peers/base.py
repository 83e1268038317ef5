"""What an adapter offers: a solver bound to a problem, ready to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.problems import Instance, Problem, loosened
from symplectic_adjoint.memory import peak_memory


class Counts(NamedTuple):
    """Network evaluations of the forward and the backward pass, and products of the latter."""

    forward: int
    backward: int
    products: int


def _unknown() -> None:
    return None


@dataclass(frozen=True)
class Bound:
    """A solver bound to an instance.

    Attributes:
        run: One solve, loss and gradient of all parameters.
        gradient: The gradient that the last run left, a float64 vector.
        clear: Drops that gradient.
        peak: Runs once more and gives the peak of its bytes.
        steps: Accepted steps of the last run, None where the package does not tell.
        grid: Accepted times of the last run, shape (steps + 1,), None where the package does not
            tell.
        counts: What the last run counted, None where it did not count.
        forward: The solve alone, attached to torch's graph; None where there is no such thing.
    """

    run: Callable[[], object]
    gradient: Callable[[], Tensor]
    clear: Callable[[], object]
    peak: Callable[[], int]
    steps: Callable[[], int | None] = _unknown
    grid: Callable[[], Tensor | None] = _unknown
    counts: Callable[[], Counts | None] = _unknown
    forward: Callable[[], Tensor] | None = None


def attached(
    instance: Instance,
    forward: Callable[[], Tensor],
    *,
    steps: Callable[[], int | None] = _unknown,
    grid: Callable[[], Tensor | None] = _unknown,
    counts: Callable[[], Counts | None] | None = None,
) -> Bound:
    """A bound solver made of a solve that torch's autograd differentiates.

    Args:
        instance: Its parameters receive the gradients.
        forward: Gives the states at the times after the start, attached to the graph.
        steps: As in :class:`Bound`.
        grid: As in :class:`Bound`.
        counts: As in :class:`Bound`; by default what a counting field counts.
    """
    field = instance.field
    calls: list[int] = []

    def run() -> None:
        field.evaluations = field.products = 0
        loss = instance.loss(forward())
        calls[:] = [field.evaluations]
        torch.autograd.backward(loss)

    def counted() -> Counts | None:
        if not (field.counting and calls):
            return None
        return Counts(calls[0], field.evaluations - calls[0], field.products)

    return Bound(
        run,
        instance.gradient,
        instance.clear,
        lambda: peak_memory(run),
        steps,
        grid,
        counts or counted,
        forward,
    )


class Peer(ABC):
    """One way of one package to differentiate a solution.

    Attributes:
        name: ``package/strategy``, as the tables show it.
        package: Distribution that must be installed.
        reference_note: What :meth:`reference` is, for the reader of the tables.
        compiled: Whether the first run compiles, which is timed apart.
        counted: Whether it runs a counting field; others count by themselves.
        doubled: Whether it is measured in float64, too.
    """

    name: str
    package: str
    reference_note: str
    compiled = False
    counted = True
    doubled = True

    def refuses(self, problem: Problem) -> str | None:
        """Why this peer cannot run the problem, None if it can."""
        if not self.installed():
            return f"{self.package} is not installed"
        return problem.omits(self.name) or self.lacks(problem)

    def installed(self) -> bool:
        """Whether the package is there."""
        try:
            metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return False
        return True

    def lacks(self, problem: Problem) -> str | None:
        """Why the installed package cannot run the problem, None if it can."""
        return None

    def remark(self, problem: Problem) -> str | None:
        """In what the run differs from the problem as stated, None if in nothing."""
        return None

    @abstractmethod
    def bind(self, instance: Instance) -> Bound:
        """Binds the solver to an instance; called once for every series of runs."""

    @abstractmethod
    def reference(self, instance: Instance, grid: Tensor | None) -> Bound | None:
        """A solve whose plain autograd gives the exact gradient of this peer's solution.

        Args:
            instance: In float64.
            grid: What the bound solver's ``grid`` gave.

        Returns:
            The solve, or None where there is no way to obtain it.
        """


def final_alone(package: str, problem: Problem) -> str | None:
    """What a package lacks that gives the final state and no other, None if that is asked for."""
    return None if problem.outputs == 1 else f"{package} gives the final state alone"


def second_order_remark(problem: Problem) -> str:
    """The remark of the peers whose method is the asynchronous leapfrog."""
    if problem.steps is not None:
        return "another method: asynchronous leapfrog, order 2"
    tolerances = loosened(problem)
    return (
        "another method: asynchronous leapfrog, order 2, "
        f"rtol {tolerances.rtol:g}, atol {tolerances.atol:g}"
    )
