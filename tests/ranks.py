"""What each of two processes does under torchrun, and the figures that the tests judge.

Every rank takes half of a batch; the reference is one process on the whole of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import symplectic_adjoint as sa
from symplectic_adjoint import datasets
from symplectic_adjoint.datasets import Dataset
from symplectic_adjoint.experiments.config import CompareConfig, ConfigError
from symplectic_adjoint.experiments.pages import Page
from symplectic_adjoint.experiments.parallel import ALONE, World
from symplectic_adjoint.experiments.physics import PhysicsStudy, Training
from symplectic_adjoint.experiments.sweep import Cell, Outcome, Record, Sweep, Work
from symplectic_adjoint.experiments.train import Session
from tests import problems

HALF = 3
STRATEGIES: dict[str, Any] = {
    "steps": sa.Symplectic(store="steps"),
    "graph": sa.Symplectic(store="graph"),
    **{name: sa.gradients.get(name) for name in sa.gradients.names()},
}

Figures = dict[str, Any]


class Model(nn.Module):
    """An encoder and a solve; ``func`` may stand in for the field."""

    def __init__(self, gradient: str, adaptive: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(3, 3, dtype=torch.float64)
        self.field = problems.Net()
        self.gradient = gradient
        self.adaptive = adaptive

    def forward(self, x: Tensor) -> Tensor:
        return self.solved(self.field, self.encoder(x))

    def solved(self, func: Any, y0: Tensor) -> Tensor:
        strategy = STRATEGIES[self.gradient]
        y: Tensor = sa.solve(
            func,
            y0,
            (0.0, 1.0),
            gradient=strategy,
            method=strategy.method or "bosh3",
            controller=sa.Adaptive() if self.adaptive else sa.FixedGrid(step_size=0.25),
            rtol=1e-4,
            atol=1e-4,
        ).y[-1]
        return y


def batch() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2 * HALF, 3, generator=draw, dtype=torch.float64)


def part(x: Tensor) -> Tensor:
    rank = dist.get_rank()
    return x[rank * HALF : (rank + 1) * HALF]


def loss(y: Tensor) -> Tensor:
    return y.square().sum() / len(y)


def wanted(gradient: str, adaptive: bool = False, repeats: int = 1) -> dict[str, Tensor]:
    """The gradients of one process on the joined batch."""
    model = Model(gradient, adaptive)
    if adaptive:  # each rank adapts its steps to its half
        total = sum(loss(model(x)) for x in batch().split(HALF)) / 2
    else:
        total = loss(model(batch()))
    assert isinstance(total, Tensor)
    (total * repeats).backward()
    return grads(model)


def whole(x: Any) -> Tensor:
    gathered: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return gathered.clone()


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def error(model: nn.Module, reference: dict[str, Tensor]) -> float:
    got = {name.replace("module.", ""): x for name, x in grads(model).items()}
    return problems.worst(dict(got), dict(reference))[0]


def counted(model: nn.Module) -> dict[str, int]:
    """How often the gradient of each parameter is complete."""
    counts = {name: 0 for name, _ in model.named_parameters()}

    def count(name: str) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            counts[name] += 1

        return hook

    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(count(name))
    return counts


def data_parallel(gradient: str, wrapped: str, adaptive: bool) -> Figures:
    """DistributedDataParallel of the whole model, or of the parts of which a loss is made."""
    model = Model(gradient, adaptive)
    counts = counted(model)
    forward: Callable[[Tensor], Tensor]
    if wrapped == "model":
        forward = DistributedDataParallel(model, find_unused_parameters=False)
    else:
        field, encoder = map(DistributedDataParallel, (model.field, model.encoder))
        forward = lambda x: model.solved(field, encoder(x))  # noqa: E731
    iterations = 3
    for _ in range(iterations):
        model.zero_grad()
        loss(forward(part(batch()))).backward()
    return {
        "error": error(model, wanted(gradient, adaptive)),
        "hooks": sorted(set(counts.values())),
        "iterations": iterations,
    }


def accumulated(gradient: str) -> Figures:
    """Two backward passes without and one with synchronisation."""
    model = Model(gradient)
    parallel = DistributedDataParallel(model)
    with parallel.no_sync():
        for _ in range(2):
            loss(parallel(part(batch()))).backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    apart = max(float((g - mean(g)).abs().max()) for g in alone.values())
    loss(parallel(part(batch()))).backward()
    return {"error": error(model, wanted(gradient, repeats=3)), "apart": apart}


def mean(x: Tensor) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def sharded(gradient: str, applied: str) -> Figures:
    """``fully_shard`` of the field, of the model, or of both; the optimiser steps on shards."""
    model = Model(gradient)
    mesh = init_device_mesh("cpu", (2,))
    if applied == "field, replicated":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    if applied != "model":
        fully_shard(model.field, mesh=mesh)
    if applied in ("model", "both"):
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(part(batch()))).backward()
        if applied.startswith("field"):
            for p in model.encoder.parameters():
                assert p.grad is not None
                p.grad = mean(p.grad)
    reference = wanted(gradient)
    shards = type(model.field.inner.grad).__name__
    figures = {"error": error(model, reference), "shards": shards}
    optimizer.step()
    now = {name: whole(p.detach()) for name, p in model.named_parameters()}
    stepped = {name: p - 0.1 * reference[name] for name, p in Model(gradient).named_parameters()}
    return {**figures, "stepped": problems.worst(dict(now), dict(stepped))[0]}


def refused(kind: str) -> Figures:
    """What a solve of a sharded module cannot do raises, on both ranks, and says why."""
    model = Model("symplectic")
    mesh = init_device_mesh("cpu", (2,))
    if kind == "mixed precision":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(model.field, mesh=mesh, mp_policy=policy)
    else:
        fully_shard(model.field, mesh=mesh, reshard_after_forward=False)
        model.field(torch.zeros(()), part(batch()))
    try:
        model(part(batch()))
    except sa.CaptureError as caught:
        return {"message": str(caught)}
    return {"message": ""}


def trained(strategy: str, data: Dataset) -> Figures:
    """A flow trained by both ranks, and by one alone, from the same seed."""
    config = CompareConfig(
        data=data.name,
        iterations=3,
        batch_size=15,
        blocks=1,
        hidden=(6,),
        dtype="float64",
        evaluate_every=3,
        noise="gaussian",
        learning_rate=0.1,
    )
    world = World(dist.get_rank(), dist.get_world_size())
    together, alone = (Session(config, strategy, data, w) for w in (world, ALONE))
    for session in (together, alone):
        while not session.finished:
            session.step()
    pairs = zip(together.model.parameters(), alone.model.parameters(), strict=True)
    parameters = [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs]
    scores = [abs(a / b - 1) for a, b in zip(together.history.nll, alone.history.nll, strict=True)]
    scores.append(abs(together.test()[0] / alone.test()[0] - 1))
    steps = [(s.history.accepted, s.history.rejected) for s in (together, alone)]
    moved = abs(alone.history.nll[-1] - alone.history.nll[0])
    return {"error": max(*parameters, *scores), "steps": steps, "moved": moved}


def learned(strategy: str) -> Figures:
    """An energy learned by both ranks, and by one alone, in float64."""
    study = PhysicsStudy(
        iterations=3,
        batch=5,
        width=6,
        trajectories=2,
        snapshots=4,
        horizon=3,
        learning_rate=0.05,
        tolerance=1e-8,
    )
    world = World(dist.get_rank(), dist.get_world_size())
    together, alone = (
        Training(study, "cahn-hilliard", "energy", "dopri5", strategy, w) for w in (world, ALONE)
    )
    before = alone.scores()["one_step_error"]
    for training in (together, alone):
        training.model.double()
        training.train = training.train.double()
        while not training.finished:
            training.step()
    pairs = zip(together.model.parameters(), alone.model.parameters(), strict=True)
    errors = [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs]
    grids = [training.loss()[1].steps.tolist() for training in (together, alone)]
    return {
        "error": max(errors),
        "steps": [len(grid) for grid in grids],
        "moved": abs(alone.scores()["one_step_error"] / before - 1),
    }


class Shared:
    """A study of one cell for all processes and one for the first of them."""

    name = "shared"

    def settings(self) -> dict[str, Any]:
        return {}

    def cells(self) -> list[Cell]:
        return [Cell("all", {}, together=True), Cell("one", {})]

    def run(self, cell: Cell, work: Work) -> Outcome:
        return Outcome({"ranks": work.world.total(1.0 + work.world.rank)})

    def page(self, records: Mapping[str, Record]) -> Page:
        return Page("Shared", "", [])


class Quiet:
    def measuring(self, done: int, total: int, what: str) -> None:
        pass


def studied() -> Figures:
    """A study under two processes, one of which writes."""
    world = World(dist.get_rank(), dist.get_world_size())
    path = Path(world.agree(tempfile.mkdtemp())) / "run"
    for resume in (False, True):
        sweep = Sweep(Shared(), path, world)
        sweep.prepare(resume=resume, overwrite=False)
        records = sweep.run(Quiet())
    try:
        Sweep(Shared(), path).prepare(resume=True, overwrite=False)
    except ConfigError as caught:
        message = str(caught)
    return {"message": message, **{name: r.result for name, r in records.items()}}


def cases() -> dict[str, Callable[[], Figures]]:
    found: dict[str, Callable[[], Figures]] = {}

    def add(name: str, make: Callable[..., Figures], *args: Any) -> None:
        found[name] = lambda: make(*args)

    for gradient in STRATEGIES:
        for wrapped in ("model", "parts"):
            add(f"parallel {wrapped} {gradient}", data_parallel, gradient, wrapped, False)
        add(f"sharded field {gradient}", sharded, gradient, "field")
    for gradient in ("symplectic", "backprop", "aca"):
        for wrapped in ("model", "parts"):
            add(f"parallel {wrapped} {gradient} adaptive", data_parallel, gradient, wrapped, True)
        for applied in ("model", "both"):
            add(f"sharded {applied} {gradient}", sharded, gradient, applied)
        add(f"accumulated {gradient}", accumulated, gradient)
    add("sharded field, replicated symplectic", sharded, "symplectic", "field, replicated")
    add("refused mixed precision", refused, "mixed precision")
    add("refused gathered", refused, "gathered")
    data = datasets.stand_in("gas", rows=(60, 10, 11))
    for strategy in ("backprop", "symplectic", "continuous", "mali"):
        add(f"trained {strategy}", trained, strategy, data)
    for strategy in ("symplectic", "continuous"):
        add(f"learned {strategy}", learned, strategy)
    add("studied", studied)
    return found


def main(path: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module.*returned a view")
    dist.init_process_group("gloo")
    figures = {name: make() for name, make in cases().items()}
    if dist.get_rank() == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(figures, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
