"""The problems, one file each; the order is that of the page."""

from benchmarks.problems import conv, dense, ffjord, hnn, long, mid, spiral, tabular
from benchmarks.problems.base import Instance, Problem, loosened, quick
from benchmarks.problems.fields import Field, TooManyEvaluationsError

PROBLEMS: dict[str, Problem] = {
    module.PROBLEM.name: module.PROBLEM
    for module in (spiral, mid, tabular, ffjord, hnn, conv, long, dense)
}

__all__ = [
    "PROBLEMS",
    "Field",
    "Instance",
    "Problem",
    "TooManyEvaluationsError",
    "loosened",
    "quick",
]
