"""A long fixed grid, bound by memory."""

from benchmarks.problems.base import Problem, normal

_CONTINUOUS = "its own backward solve takes the time of several others here and tells nothing new"

PROBLEM = Problem(
    name="long",
    summary="a long fixed grid, bound by memory",
    batch=64,
    sizes=(64, 256, 64),
    t1=500 / 512,  # steps of a power of two: no peer's grid arithmetic rounds to one step more
    method="rk4",
    steps=500,
    rounds=3,
    start=normal,
    omitted={
        "torchdiffeq/adjoint": _CONTINUOUS,
        "diffrax/backsolve": _CONTINUOUS,
        "ours/continuous": _CONTINUOUS,
        "*/mali": "another method, measured on the other problems",
    },
)
