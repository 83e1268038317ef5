"""Time of a solve and its backward pass with a job folder, beside those without.

    python -m benchmarks.jobs FOLDER

prints medians of interleaved runs and their ratio, how many entries were written, and whether the
gradients are equal to the bit. The default interval is 60 seconds; runs that are shorter show what
the folder costs apart from that, and the last line what an entry takes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from benchmarks.long import differentiated

ROUNDS = 5
SOLVES = {
    # batch, width of the state, of the network, steps
    "small network": (16, 8, 32, 1500),
    "64-256-64 network": (256, 64, 256, 150),
}


def problem(batch: int, width: int, hidden: int) -> tuple[nn.Module, Tensor]:
    """A network with one hidden layer, and a batch of states."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
    return net, torch.randn(batch, width, requires_grad=True)


def run(
    net: nn.Module, y0: Tensor, steps: int, strategy: sa.Symplectic
) -> tuple[float, tuple[Tensor, ...]]:
    """Seconds of a solve with its backward pass, and the gradients."""
    grid = sa.FixedGrid(step_size=1 / steps)
    took, gradients = differentiated(
        sa.Autonomous(net), y0, [0.0, 1.0], method="rk4", controller=grid, gradient=strategy
    )
    return took["forward"] + took["backward"], gradients


def compare(
    folder: str, every: float, net: nn.Module, y0: Tensor, steps: int
) -> tuple[float, float, int, bool]:
    """Medians without and with a folder, the number of entries, and whether all are equal."""
    times: dict[bool, list[float]] = {False: [], True: []}
    entries, equal = 0, True
    for _ in range(ROUNDS):
        seconds, wanted = run(net, y0, steps, sa.Symplectic())
        times[False].append(seconds)
        with tempfile.TemporaryDirectory(dir=folder) as path:
            job = sa.JobFolder(path, every=every)
            seconds, got = run(net, y0, steps, sa.Symplectic(folder=job))
            entries = max(int(x.name[-8:]) + 1 for x in Path(path).glob("backward-*"))
            entries += len(list(Path(path).glob("forward-*")))
        times[True].append(seconds)
        equal = equal and all(map(torch.equal, wanted, got))
    return statistics.median(times[False]), statistics.median(times[True]), entries, equal


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Solves with a job folder beside those without.")
    parser.add_argument("folder", help="a folder on the disk to measure")
    folder = parser.parse_args().folder
    for name, (batch, width, hidden, steps) in SOLVES.items():
        net, y0 = problem(batch, width, hidden)
        for every in (60.0, 0.1):
            without, within, entries, equal = compare(folder, every, net, y0, steps)
            print(
                f"{name}, {steps} steps of rk4, every={every:g} s: without {without:.3f} s, with "
                f"{within:.3f} s ({entries} entries), ratio {within / without:.3f}, gradients "
                f"equal: {equal}"
            )


if __name__ == "__main__":
    main()
