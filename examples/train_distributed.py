"""Train a neural ODE on several processes, each on its share of the batch.

torchrun --standalone --nproc-per-node 2 examples/train_distributed.py
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import symplectic_adjoint as sa


class Classifier(nn.Module):
    """Tells two rings apart by the point to which a learned flow carries a sample."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 3))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch,)`` of points ``(batch, 2)``."""
        y0 = torch.nn.functional.pad(x, (0, 1))
        y = sa.odeint(lambda t, y: self.field(y), y0, [0.0, 1.0], rtol=1e-3, atol=1e-3)
        logits: Tensor = self.head(y[-1]).squeeze(-1)
        return logits


def rings(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points ``(samples, 2)`` and their labels; put your own data here."""
    draw = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(samples, generator=draw)
    label = (torch.arange(samples) % 2).float()
    points = torch.stack([angle.cos(), angle.sin()], dim=-1) * (1 + label).unsqueeze(-1)
    return points, label


def train(iterations: int) -> list[float]:
    """Trains on this process's share; returns the mean loss over all processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % 8) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = DistributedDataParallel(Classifier().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-1)
    losses = []
    for iteration in range(iterations):
        x, label = (z.to(device) for z in rings(64, seed=iteration * world + rank))
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), label)
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach())
        losses.append(loss.item() / world)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=100)
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    history = train(options.iterations)
    if dist.get_rank() == 0:
        print(f"loss of the first iteration {history[0]:.3f}, of the last {history[-1]:.3f}")
    dist.destroy_process_group()
