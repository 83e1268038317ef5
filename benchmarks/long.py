"""One long solve within a budget: ``python -m benchmarks.long '{"steps": 1000, ...}'``.

A process of its own for every figure of resident memory, as in ``resident``.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from benchmarks.resident import lower_peak, peak_resident
from symplectic_adjoint.gradients import Strategy


@dataclass(frozen=True)
class Long:
    """Steps of rk4 over the unit interval with a 64-256-64 network on a batch.

    Attributes:
        steps: How many.
        memory: As in ``Symplectic(memory=...)``.
        store: As in ``Symplectic(store=...)``.
        execution: As in ``solve(execution=...)``.
        double: Whether in float64.
        batch: Samples.
    """

    steps: int
    memory: int | str | None = None
    store: str = "stages"
    execution: str = "eager"
    double: bool = False
    batch: int = 16

    @property
    def gradient(self) -> sa.Symplectic:
        """The strategy."""
        return sa.Symplectic(self.store, memory=self.memory)  # type: ignore[arg-type]

    def problem(self) -> tuple[nn.Module, Tensor]:
        """The network and the initial state, always the same."""
        return _problem(self.double, self.batch)

    def differentiate(self, gradient: Strategy) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """Solve and differentiate under a strategy; see ``differentiated``."""
        return differentiated(
            *self.problem(),
            [0.0, 1.0],
            method="rk4",
            controller=sa.FixedGrid(step_size=1 / self.steps),
            gradient=gradient,
            execution=self.execution,
        )

    def run(self) -> tuple[dict[str, Any], Tensor]:
        """Solve and differentiate: what it took, and the gradient of everything as one vector."""
        took, grads = self.differentiate(self.gradient)
        return took, torch.cat([g.reshape(-1).double() for g in grads])


def differentiated(
    field: nn.Module, y0: Tensor, t: Sequence[float], **options: Any
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """A solve and the gradient of its end: what both took, and the gradients.

    Args:
        field: The network.
        y0: The initial state, which requires grad.
        t: Start and end.
        **options: As of ``solve``.

    Returns:
        Steps, seconds, and steps taken again; the gradients of the state and the parameters.
    """
    started = time.perf_counter()
    solution = sa.solve(field, y0, t, **options)
    between = time.perf_counter()
    grads = torch.autograd.grad(solution.y[-1].square().mean(), [y0, *field.parameters()])
    took = {
        "steps": solution.stats.accepted,
        "forward": between - started,
        "backward": time.perf_counter() - between,
        "retaken": solution.stats.backward_retaken,
    }
    return took, grads


@functools.cache
def _problem(double: bool, batch: int) -> tuple[nn.Module, Tensor]:
    dtype = torch.float64 if double else torch.float32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)).to(dtype)
        y0 = torch.randn(batch, 64, dtype=dtype, requires_grad=True)
    return sa.Autonomous(net), y0


def measured(long: Long) -> dict[str, Any]:
    """What a run takes in a process of its own: its times, its steps, its resident bytes."""
    command = [sys.executable, "-m", "benchmarks.long", json.dumps(asdict(long))]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs once; a few steps before load the libraries, and compile."""
    long = Long(**arguments)
    replace(long, steps=20, memory="least").run()
    before = lower_peak()
    took, gradient = long.run()
    return {
        **asdict(long),
        **took,
        "interpreter": before,
        "resident": peak_resident() - before,
        "finite": bool(gradient.isfinite().all()),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
