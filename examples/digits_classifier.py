"""Classify handwritten digits with an ODE-net: a residual network with a solve for its blocks.

python examples/digits_classifier.py --figure docs/assets/digits_classifier.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint.models import TimeConvNet


def digits() -> tuple[Tensor, Tensor]:
    """The 1797 digits of scikit-learn, shuffled: images ``(n, 1, 8, 8)`` in [0, 1], and labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return images[order], torch.from_numpy(data.target)[order]


def classifier(channels: int = 16, gradient: str = "symplectic") -> nn.Sequential:
    """A convolution, a flow of feature maps from t = 0 to 1, and a linear layer on what it ends in.

    The flow takes the place of a stack of residual blocks (Chen et al., NeurIPS 2018, section 3).
    """
    flow = sa.NeuralODE(
        TimeConvNet(channels, hidden=(channels,), activation="softplus"),
        rtol=1e-2,
        atol=1e-2,
        gradient=gradient,
    )
    head = nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))
    return nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), flow, head)


def train(
    epochs: int = 8, batch: int = 64, gradient: str = "symplectic"
) -> tuple[nn.Sequential, list[float]]:
    """Trains on the first 1500 digits; returns the model and its accuracy on the rest."""
    torch.manual_seed(0)
    images, labels = digits()
    train_x, test_x, train_y, test_y = images[:1500], images[1500:], labels[:1500], labels[1500:]
    model = classifier(gradient=gradient)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    accuracies = []
    for epoch in range(epochs):
        for rows in torch.randperm(len(train_x)).split(batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(train_x[rows]), train_y[rows])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = model(test_x).argmax(1) == test_y
        accuracies.append(float(right.float().mean()))
        print(f"epoch {epoch + 1}   accuracy {accuracies[-1]:.3f}")
    return model, accuracies


def draw(model: nn.Sequential, accuracies: list[float], path: Path) -> None:
    """Draws the accuracy, and test images with what the model takes them for."""
    from matplotlib.figure import Figure

    images, labels = digits()
    with torch.no_grad():
        guesses = model(images[1500:]).argmax(1)
    wrong = (guesses != labels[1500:]).nonzero().flatten()
    right = (guesses == labels[1500:]).nonzero().flatten()
    shown = torch.cat((right[:10], wrong[:5]))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, others = figure.subfigures(1, 2, width_ratios=(1, 1.3), squeeze=False)[0]
    axes = left.subplots()
    axes.plot(range(1, len(accuracies) + 1), accuracies, marker="o", color="#D55E00")
    axes.set(xlabel="epoch", ylabel="accuracy on held-out digits", title="ODE-net on digits")
    grid = others.subplots(3, 5)
    for axes, index in zip(grid.flat, shown.tolist(), strict=False):
        axes.imshow(images[1500 + index, 0], cmap="gray_r")
        guess, label = int(guesses[index]), int(labels[1500 + index])
        axes.set_title(f"{guess}" if guess == label else f"{guess}, is {label}", fontsize=9)
    for axes in grid.flat:
        axes.set_axis_off()
    others.suptitle("what they are taken for; last row: mistakes")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--gradient", default="symplectic", help="a strategy, e.g. backprop")
    parser.add_argument("--figure", type=Path, help="where to draw the result")
    options = parser.parse_args()
    trained, found = train(options.epochs, gradient=options.gradient)
    if options.figure is not None:
        draw(trained, found, options.figure)
