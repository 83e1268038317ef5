"""Restore blurred and incomplete images by a learned flow from measurement to image.

A digit is blurred, loses a part of its pixels, and is measured with noise. The flow descends an
energy: the misfit to the measurement, and how unlikely an image is, a sum of learned functions of
learned filters (a field of experts). Its equation is one of reaction and diffusion. What it has
reached at a time, which is learned too, is the restored image; all of it is trained through the
flow. See Chen, Pock, "Trainable nonlinear reaction diffusion", 2017, doi
10.1109/TPAMI.2016.2596743, and Effland et al., "Variational networks: an optimal control approach
to early stopping", 2020, doi 10.1007/s10851-019-00926-8.

    python examples/restore_images.py --figure docs/assets/restore_images.png
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import symplectic_adjoint as sa
from symplectic_adjoint.memory import peak_memory

NOISE, LOST = 0.05, 0.3
TRAINED = 500
LEARNING_RATE = 5e-2
KERNEL = torch.outer(*[torch.tensor([0.25, 0.5, 0.25])] * 2)[None, None]


class Measured(NamedTuple):
    """Images ``(n, 1, 8, 8)``: the truth, which pixels are measured, and their values."""

    truth: Tensor
    mask: Tensor
    values: Tensor


def blurred(x: Tensor) -> Tensor:
    """The blur, which is its own transpose."""
    return functional.conv2d(x, KERNEL, padding=1)


def measured(seed: int = 0) -> tuple[Measured, Measured]:
    """Measurements of the digits of scikit-learn: of those to train on, and of the others."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
    truth = images[torch.randperm(len(images), generator=draw)]
    mask = (torch.rand(truth.shape, generator=draw) >= LOST).float()
    noise = NOISE * torch.randn(truth.shape, generator=draw)
    data = Measured(truth, mask, mask * (blurred(truth) + noise))
    return Measured(*(x[:TRAINED] for x in data)), Measured(*(x[TRAINED:] for x in data))


class Flow(nn.Module):
    """``dx/dt = -w A^T (A x - b) - K^T f(K x)``, from ``x(0) = A^T b`` up to a time.

    ``A`` blurs and loses pixels, ``b`` is what was measured. ``K`` are filters, and ``f`` is a
    function of each of their answers, the slope of a ``log cosh``.
    """

    def __init__(self, filters: int = 24, gradient: str = "symplectic") -> None:
        super().__init__()
        self.gradient = gradient
        self.filters = nn.Parameter(0.1 * torch.randn(filters, 1, 5, 5))
        self.slopes = nn.Parameter(1 + 0.1 * torch.randn(filters, 1, 1))
        self.offsets = nn.Parameter(0.5 * torch.randn(filters, 1, 1))
        self.strengths = nn.Parameter(0.1 * torch.randn(filters, 1, 1))
        self.fidelity = nn.Parameter(torch.tensor(4.0))
        self.log_time = nn.Parameter(torch.tensor(0.0))

    def time(self) -> float:
        """How long the flow runs."""
        return float(self.log_time.detach().exp())

    def rate(self, t: Tensor, x: Tensor, data: Measured) -> Tensor:
        """``dx/dt``."""
        misfit = blurred(data.mask * (data.mask * blurred(x) - data.values))
        answers = functional.conv2d(x, self.filters, padding=2)
        weighed = self.strengths * torch.tanh(self.slopes * answers + self.offsets)
        prior: Tensor = functional.conv_transpose2d(weighed, self.filters, padding=2)
        return -self.fidelity * misfit - prior

    def forward(self, data: Measured) -> Tensor:
        """The restored images, ``(n, 1, 8, 8)``."""
        return self.path(data, torch.zeros(1))[-1]

    def path(self, data: Measured, before: Tensor) -> Tensor:
        """Images on the way, at parts ``before`` of the time, and at its end."""
        t = self.log_time.exp() * torch.cat([before, torch.ones(1)])
        sol = sa.solve(
            self.rate,
            blurred(data.values),
            t,
            args=(data,),
            method="bosh3",
            rtol=1e-2,
            atol=1e-2,
            gradient=self.gradient,
        )
        y: Tensor = sol.y
        return y


def psnr(x: Tensor, truth: Tensor) -> float:
    """Peak signal to noise ratio in dB, the mean over images."""
    errors = (x.clamp(0, 1) - truth).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())


def train(
    iterations: int = 150, batch: int = 32, gradient: str = "symplectic"
) -> tuple[Flow, list[float]]:
    """Trains on some digits; returns the flow, and the mean squared error of every iteration."""
    torch.manual_seed(0)
    data, _ = measured()
    flow = Flow(gradient=gradient)
    optimizer = torch.optim.Adam(flow.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=iterations)
    losses = []
    for iteration in range(iterations):
        chosen = rows(data, batch)
        optimizer.zero_grad()
        loss = (flow(chosen) - chosen.truth).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if iteration % 50 == 0 or iteration == iterations - 1:
            print(f"iteration {iteration:4d}   mean squared error {losses[-1]:.4f}")
    return flow, losses


def rows(data: Measured, count: int) -> Measured:
    """Some measurements, by chance."""
    chosen = torch.randint(len(data.truth), (count,))
    return Measured(*(x[chosen] for x in data))


def memory(flow: Flow, data: Measured, gradient: str) -> int:
    """Peak live bytes of one gradient under a strategy."""
    own = copy.deepcopy(flow)
    own.gradient = gradient
    return peak_memory(lambda: (own(data) - data.truth).square().mean().backward())


def draw(flow: Flow, data: Measured, path: Path) -> None:
    """Draws digits that were not trained on, from measurement to restored image."""
    from matplotlib.figure import Figure

    parts = torch.linspace(0, 1, 4)[:-1]
    few = Measured(*(x[:4] for x in data))
    with torch.no_grad():
        way = flow.path(few, parts)
    lost = few.values.masked_fill(few.mask == 0, torch.nan)
    time = flow.time()
    columns = [("truth", few.truth), ("measured", lost)]
    columns += [(f"t = {time * float(p):.2f}", x) for p, x in zip([*parts, 1.0], way, strict=True)]
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    grid = figure.subplots(len(few.truth), len(columns))
    for i, row in enumerate(grid):
        for axes, (title, images) in zip(row, columns, strict=True):
            axes.imshow(images[i, 0], cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[], facecolor="#E8C0C0")
            if i == 0:
                axes.set_title(title)
            if axes is not row[0]:
                one = slice(i, i + 1)
                axes.set_xlabel(f"{psnr(images[one].nan_to_num(), few.truth[one]):.1f} dB")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--gradient", default="symplectic", help="a strategy, e.g. backprop")
    parser.add_argument("--figure", type=Path, help="where to draw the result")
    options = parser.parse_args()
    flow, _ = train(options.iterations, gradient=options.gradient)
    _, new = measured()
    with torch.no_grad():
        before, after = psnr(blurred(new.values), new.truth), psnr(flow(new), new.truth)
    print(
        f"{len(new.truth)} new digits: {psnr(new.values, new.truth):.2f} dB as measured, "
        f"{before:.2f} dB at the start of the flow, {after:.2f} dB at its end, "
        f"t = {flow.time():.2f}"
    )
    few = rows(new, 64)
    for gradient in ("backprop", "symplectic"):
        print(
            f"peak memory of a gradient with {gradient}: {memory(flow, few, gradient) / 1e6:.1f} MB"
        )
    if options.figure is not None:
        draw(flow, new, options.figure)


if __name__ == "__main__":
    main()
