"""Time of a solve and its backward pass with its checkpoints on disk, beside those in memory.

    python -m benchmarks.places FOLDER

prints medians of interleaved runs and their ratio, and whether the gradients are equal to the bit.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import symplectic_adjoint as sa

STEPS, ROUNDS = 150, 5


def problem() -> tuple[nn.Module, Tensor]:
    """A 64-256-64 network on a batch of 256."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    return net, torch.randn(256, 64, requires_grad=True)


def run(net: nn.Module, y0: Tensor, strategy: sa.Symplectic) -> tuple[float, Tensor]:
    """Seconds of a solve with its backward pass, and the gradient of ``y0``."""
    grid = sa.FixedGrid(step_size=1 / STEPS)
    started = time.perf_counter()
    sol = sa.solve(
        sa.Autonomous(net), y0, [0.0, 1.0], method="rk4", controller=grid, gradient=strategy
    )
    (gradient, *_) = torch.autograd.grad(sol.y[-1].sum(), [y0, *net.parameters()])
    return time.perf_counter() - started, gradient


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Checkpoints on disk beside those in memory.")
    parser.add_argument("folder", help="a folder on the disk to measure")
    folder = parser.parse_args().folder
    net, y0 = problem()
    places = {"memory": None, "disk": sa.Disk(folder)}
    for store in ("steps", "stages"):
        times: dict[str, list[float]] = {name: [] for name in places}
        gradients: dict[str, Tensor] = {}
        for _ in range(ROUNDS):
            for name, place in places.items():
                seconds, gradients[name] = run(net, y0, sa.Symplectic(store, place=place))
                times[name].append(seconds)
        medians = {name: statistics.median(found) for name, found in times.items()}
        ratio = medians["disk"] / medians["memory"]
        equal = torch.equal(gradients["disk"], gradients["memory"])
        print(
            f"store={store!r}: memory {medians['memory']:.3f} s, disk {medians['disk']:.3f} s, "
            f"ratio {ratio:.2f}, gradients equal: {equal}"
        )


if __name__ == "__main__":
    main()
