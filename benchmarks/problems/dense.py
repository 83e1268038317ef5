"""Many output times within the steps."""

from dataclasses import replace

from benchmarks.problems import spiral

PROBLEM = replace(
    spiral.PROBLEM,
    name="dense",
    summary="a thousand output times: the network of the spiral problem",
    rounds=5,
    outputs=1000,
    omitted={
        "torchdiffeq/adjoint": "it begins a new solve at each of the output times",
        "TorchDiffEqPack/*": "its output times are steps of their own",
        "ours/continuous": "the continuous adjoint begins a new solve at each of the output times",
        "diffrax/backsolve": "it begins a new solve at each of the output times",
        "*/mali": "another method, measured on the other problems",
    },
)
