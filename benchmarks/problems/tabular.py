"""Few expensive steps, bound by arithmetic."""

from benchmarks.problems.base import Problem, normal

PROBLEM = Problem(
    name="tabular",
    summary="few expensive steps, bound by arithmetic: a network of the size used for tabular data",
    batch=256,
    sizes=(43, 860, 860, 43),
    t1=1.0,
    rounds=5,
    start=normal,
)
