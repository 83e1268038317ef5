"""What an adapter offers: a solver bound to a problem, ready to run forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from torch import Tensor

from benchmarks.problems import Instance, Problem, loosened


def _unknown() -> None:
    return None


@dataclass(frozen=True)
class Bound:
    """A solver bound to an instance.

    Attributes:
        forward: Solves and returns the final state, attached to the autograd graph.
        steps: Accepted steps of the last forward call, None where the package does not tell.
        grid: Accepted times of the last forward call, shape (steps + 1,), None where the package
            does not tell.
    """

    forward: Callable[[], Tensor]
    steps: Callable[[], int | None] = _unknown
    grid: Callable[[], Tensor | None] = _unknown


class Peer(ABC):
    """One way of one package to differentiate a solution.

    Attributes:
        name: ``package/strategy``, as the tables show it.
        package: Distribution that must be installed.
        reference_note: What :meth:`reference` is, for the reader of the tables.
    """

    name: str
    package: str
    reference_note: str

    def refuses(self, problem: Problem) -> str | None:
        """Why this peer cannot run the problem, None if it can."""
        try:
            metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return f"{self.package} is not installed"
        return self.lacks(problem)

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
    def reference(self, instance: Instance, grid: Tensor | None) -> Callable[[], Tensor] | None:
        """A solve whose plain autograd gives the exact gradient of this peer's solution.

        Args:
            instance: In float64.
            grid: What the bound solver's ``grid`` gave.

        Returns:
            The solve, or None where there is no way to obtain it.
        """


def second_order_remark(problem: Problem) -> str:
    """The remark of the peers whose method is the asynchronous leapfrog."""
    if problem.steps is not None:
        return "another method: asynchronous leapfrog, order 2"
    tolerances = loosened(problem)
    return (
        "another method: asynchronous leapfrog, order 2, "
        f"rtol {tolerances.rtol:g}, atol {tolerances.atol:g}"
    )
