"""What one thread is worth to small solves: the library's choice against PyTorch's number.

OMP_NUM_THREADS=2 python -m benchmarks.threads
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor

import symplectic_adjoint as sa
from benchmarks.measure import run
from benchmarks.problems import PROBLEMS, Problem


def seconds(problem: Problem, work: float) -> float:
    """Time of one forward and backward where solves below ``work`` run on one thread."""
    instance = problem.instance()

    def forward() -> Tensor:
        times = torch.tensor([0.0, problem.t1])
        y: Tensor = sa.odeint(
            instance.field, instance.y0, times, rtol=problem.rtol, atol=problem.atol
        )
        return y[-1]

    with sa.single_thread_below(work):
        start = time.perf_counter()
        run(instance, forward)
        return time.perf_counter() - start


def main() -> None:
    """Prints, for each adaptive problem, the median over the rounds of the ratio of times."""
    threads = torch.get_num_threads()
    print(f"forward and backward, chosen number of threads against {threads}")
    for problem in PROBLEMS.values():
        if problem.steps is not None:
            continue
        seconds(problem, 2.0**20)
        pairs = [(seconds(problem, 2.0**20), seconds(problem, 0)) for _ in range(problem.rounds)]
        chosen, given = (median(x) for x in zip(*pairs, strict=True))
        ratio = median(a / b for a, b in pairs)
        print(f"{problem.name:8s} {1e3 * chosen:8.1f} ms {1e3 * given:8.1f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
