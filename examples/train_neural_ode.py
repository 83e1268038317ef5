"""Learn the dynamics of a spiral from noisy samples of its trajectories.

python examples/train_neural_ode.py --iterations 300
"""

import argparse

import torch
from torch import Tensor, nn

import symplectic_adjoint as sa


class Dynamics(nn.Module):
    """dy/dt as a small network; replace it with your own: ``forward(t, y)`` returns y's shape."""

    def __init__(self, size: int = 2, hidden: int = 50) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, size))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The derivative of ``y`` at time ``t``: shape ``(batch, size)`` in and out."""
        rate: Tensor = self.net(y**3)
        return rate


def spiral_data(samples: int, noise: float = 0.02) -> tuple[Tensor, Tensor]:
    """Times ``(20,)`` and noisy trajectories ``(20, samples, 2)``; put your own data here."""
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    angle = 2 * torch.pi * torch.rand(samples)
    start = 1.5 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    t = torch.linspace(0.0, 1.0, 20)
    with torch.no_grad():
        y = sa.odeint(lambda t, y: y**3 @ matrix.T, start, t)
    assert isinstance(y, Tensor)
    return t, y + noise * torch.randn_like(y)


def train(iterations: int = 300, batch: int = 32, gradient: str = "symplectic") -> list[float]:
    """Trains and returns the mean squared error of every iteration."""
    torch.manual_seed(0)
    t, data = spiral_data(samples=256)
    model = Dynamics()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for iteration in range(iterations):
        chosen = torch.randint(data.shape[1], (batch,))
        optimizer.zero_grad()
        prediction = sa.odeint(model, data[0, chosen], t, rtol=1e-3, atol=1e-4, gradient=gradient)
        loss = (prediction - data[:, chosen]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if iteration % 50 == 0 or iteration == iterations - 1:
            print(f"iteration {iteration:4d}   mean squared error {loss.item():.5f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--gradient", default="symplectic", help="a strategy, e.g. backprop")
    options = parser.parse_args()
    train(options.iterations, gradient=options.gradient)
