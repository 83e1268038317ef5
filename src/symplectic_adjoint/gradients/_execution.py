"""How a solve is run: by Python, or compiled."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from symplectic_adjoint._errors import (
    CompilationError,
    ExecutionWarning,
    SolveError,
    UnknownNameError,
)
from symplectic_adjoint._types import code_of
from symplectic_adjoint.capture import Capture
from symplectic_adjoint.execution import Stuck
from symplectic_adjoint.field import RandomState
from symplectic_adjoint.gradients._job import Job
from symplectic_adjoint.gradients._job import execute as eager
from symplectic_adjoint.solution import Solution


@functools.cache
def _compiler() -> Any:
    """The compiled tiers, loaded once they are asked for: that takes a second or two."""
    with warnings.catch_warnings():
        # The compiler uses parts of torch that torch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        from symplectic_adjoint.gradients import _compiled
    return _compiled


TIERS: dict[str, tuple[str, ...]] = {
    "eager": (),
    "step": ("step",),
    "loop": ("loop",),
    "auto": ("loop", "step"),
}
"""How a solve is run, by the value of ``execution``: what is tried, the fastest first."""

_refused: set[tuple[Any, str]] = set()
_warned: set[tuple[Any, str, str]] = set()


def check_execution(execution: str) -> None:
    """Refuse an unknown value.

    Raises:
        UnknownNameError: ``execution`` is none of those that there are.
    """
    if execution not in TIERS:
        raise UnknownNameError("execution", execution, TIERS)


def execute(
    job: Job, func: Any, execution: str, capture: Callable[[], Capture]
) -> tuple[Solution, SolveError | None]:
    """Solve, compiled as far as asked for and possible.

    Args:
        job: The solve, with a capture that is not known yet.
        func: The user's function.
        execution: One of ``TIERS``.
        capture: Finds what ``func`` depends on, where it is not compiled.

    Raises:
        CompilationError: The solve cannot be compiled as asked.
    """
    for tier in TIERS[execution]:
        key = (code_of(func), tier)
        if execution == "auto" and key in _refused:
            continue
        before = RandomState(job.problem.y0.device)
        try:
            result: tuple[Solution, SolveError | None] = _compiler().TIERS[tier](job, func)
            return result
        except Stuck:
            break
        except CompilationError as error:
            if execution != "auto":
                raise CompilationError(
                    f"execution={execution!r} cannot run this solve: {error}. Use 'auto', which "
                    "takes what can be compiled, or 'eager'"
                ) from error
            before.set()
            if error.lasting:
                _refused.add(key)
            if (*key, str(error)) not in _warned:
                _warned.add((*key, str(error)))
                warnings.warn(
                    f"execution='auto' cannot take {tier!r} here and runs slower: {error}",
                    ExecutionWarning,
                    stacklevel=4,
                )
    return eager(replace(job, capture=capture()))
