"""Jobs that tests run in processes of their own, and kill."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import _files
from tests.problems import case, loss

FIXED = {"controller": sa.FixedGrid(step_size=0.06)}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Options of the strategy, options of the solve.
    "grid": ({"store": "steps"}, {"method": "rk4", **FIXED}),
    "adaptive": ({}, {"method": "dopri5", "rtol": 1e-8}),
    "graph": ({"store": "graph", "accumulate": "float64"}, {"method": "bosh3", "rtol": 1e-5}),
    "thinned": ({"memory": "least", "accumulate": "compensated"}, {"method": "midpoint", **FIXED}),
    "multistep": ({}, {"method": "implicit_adams", **FIXED}),
    "jumps": ({}, {"controller": sa.Adaptive.pi(jump_t=[0.2, 0.8]), "rtol": 1e-6}),
    "implicit": ({}, {"method": "trbdf2", "rtol": 1e-3, "atol": 1e-4}),
}
TIMES = (0.0, 0.31, 0.7, 0.71, 1.2)

REFUSED = 7

Death = tuple[str, int]
"""At which occurrence of what a process kills itself."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.jobs"])


class Mortal(nn.Module):
    """A network that is told of each of its evaluations, and may jump."""

    def __init__(self, net: nn.Module, told: Callable[[], None], jump: float) -> None:
        super().__init__()
        self.net = net
        self.told = told
        self.jump = jump

    def forward(self, t: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        self.told()
        result: Tensor = self.net(t, y, gain)
        return result + self.jump * (t > 0.2) if self.jump else result


def _countdown(count: int, before: Callable[..., None] = lambda *_: None) -> Callable[..., None]:
    left = itertools.count(count, -1)

    def told(*args: Any) -> None:
        if next(left) == 1:
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)

    return told


def _dying(death: Death | None) -> Callable[[], None]:
    """What to tell of evaluations; lets the process die at the ``count``-th time of something."""
    moment, count = death or ("evaluation", 0)
    if moment == "evaluation":
        return _countdown(count)
    name = {"rename": "replace", "written": "fsync", "torn": "fsync"}[moment]
    call, torn = getattr(os, name), moment == "torn"

    def half(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)

    told = _countdown(count, half if torn else lambda *_: None)

    def instead(*args: Any) -> Any:
        told(*args)
        return call(*args)

    setattr(_files.os, name, instead)
    return lambda: None


def solution(
    job: str, folder: sa.JobFolder | None, told: Callable[[], None] = lambda: None
) -> tuple[sa.Solution, list[Tensor]]:
    """A job's solution, and its inputs."""
    problem = case(times=TIMES)
    problem.func = Mortal(problem.func, told, 0.5 * (job == "jumps"))  # type: ignore[arg-type]
    strategy, options = JOBS[job]
    sol = problem.solve(gradient=sa.Symplectic(**strategy, folder=folder), **options)
    return sol, [*problem.inputs().values()]


def gradient(
    job: str, folder: sa.JobFolder | None, told: Callable[[], None] = lambda: None
) -> tuple[list[Tensor], sa.Stats]:
    """Its solution and gradients, and its counts."""
    sol, inputs = solution(job, folder, told)
    grads = torch.autograd.grad(loss(sol.y), inputs, allow_unused=True)
    return [sol.y.detach(), *(x for x in grads if x is not None)], sol.stats


def _work(job: str, folder: sa.JobFolder | None, death: Death | None, out: Path) -> None:
    torch.set_num_threads(1)
    try:
        tensors, stats = gradient(job, folder, _dying(death))
    except sa.JobFolderError:
        sys.exit(REFUSED)
    torch.save({"tensors": tensors, "stats": vars(stats)}, out)


def start(job: str, folder: sa.JobFolder | None, death: Death | None, out: Path) -> Any:
    """Run a job in a process of its own."""
    process = _processes.Process(target=_work, args=(job, folder, death, out))
    process.start()
    return process


def run(job: str, folder: sa.JobFolder | None, death: Death | None, out: Path) -> Any:
    """What a job gives, or None where it was killed; ``REFUSED`` where it cannot use its folder."""
    process = start(job, folder, death, out)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL, REFUSED)
    if process.exitcode:
        return REFUSED if process.exitcode == REFUSED else None
    return torch.load(out, weights_only=True)


def killed_after(job: str, folder: sa.JobFolder, seconds: float, out: Path) -> bool:
    """Start a job and kill it after a while; whether it was still running."""
    process = start(job, folder, None, out)
    time.sleep(seconds)
    process.kill()
    process.join()
    return bool(process.exitcode)
