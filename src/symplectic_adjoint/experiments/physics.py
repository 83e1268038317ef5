"""Physical systems: their energy learned from snapshots, and predicted with over a long time.

The network gives an energy and thereby the dynamics (``models.Hamiltonian``, ``models.EnergyPDE``),
or, to compare with, the dynamics themselves. It is trained by integrating from one snapshot to the
next. All strategies see the same weights, snapshots and batches, so that exact ones differ in
rounding only, and in what they cost.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor, nn

from symplectic_adjoint import gradients, steppers
from symplectic_adjoint._errors import SolveError, UnknownNameError
from symplectic_adjoint.api import default_controller, solve
from symplectic_adjoint.controllers import Adaptive, FixedGrid
from symplectic_adjoint.datasets import physics
from symplectic_adjoint.datasets.physics import FieldEquation, System, Trajectories
from symplectic_adjoint.experiments.config import ConfigError
from symplectic_adjoint.experiments.measure import seconds_of
from symplectic_adjoint.experiments.pages import Page
from symplectic_adjoint.experiments.parallel import ALONE, World
from symplectic_adjoint.experiments.physics_page import physics_page
from symplectic_adjoint.experiments.sweep import Cell, Outcome, Record, Work
from symplectic_adjoint.experiments.train import TrainingError
from symplectic_adjoint.memory import peak_memory
from symplectic_adjoint.models import (
    Autonomous,
    ConvEnergy,
    EnergyPDE,
    Hamiltonian,
    SeparableHamiltonian,
    mlp,
)
from symplectic_adjoint.solution import Solution

MODELS = ("energy", "plain")
_KEPT = 101
"""Of a long prediction at most so many times are kept for the figures."""


@dataclass(frozen=True)
class PhysicsStudy:
    """The study of physical systems.

    Attributes:
        systems: Names of the systems, see ``datasets.physics``.
        strategies: Gradient strategies.
        methods: Methods with which snapshots are joined. One for separable systems is left out
            where the network is not separable.
        models: "energy" (the network is an energy), "plain" (it is the dynamics).
        iterations: Iterations of training.
        batch: Pairs of neighbouring snapshots in a batch.
        width: Width of the hidden layers.
        trajectories: Trajectories to learn from, and as many others to test on.
        snapshots: Snapshots of each.
        horizon: Snapshots of the long prediction.
        learning_rate: Step size of Adam.
        tolerance: Relative and absolute tolerance of methods that choose their steps.
        substeps: Steps from snapshot to snapshot of methods that do not.
        seed: Seed of everything that is drawn.
        scale: What these settings are called.
    """

    systems: tuple[str, ...] = ("kdv", "cahn-hilliard")
    strategies: tuple[str, ...] = ("backprop", "checkpoint", "aca", "symplectic", "continuous")
    methods: tuple[str, ...] = ("dopri5",)
    models: tuple[str, ...] = ("energy",)
    iterations: int = 120
    batch: int = 10
    width: int = 32
    trajectories: int = 10
    snapshots: int = 21
    horizon: int = 31
    learning_rate: float = 2e-2
    tolerance: float = 1e-5
    substeps: int = 4
    seed: int = 0
    scale: str = "own"
    name: str = field(default="physics", init=False)

    def __post_init__(self) -> None:
        for chosen, kind, known in (
            (self.systems, "system", physics.names()),
            (self.strategies, "gradient", gradients.names()),
            (self.methods, "method", steppers.names()),
            (self.models, "model", MODELS),
        ):
            for name in chosen:
                if name not in known:
                    raise UnknownNameError(kind, name, known)
        if min(self.iterations, self.batch, self.trajectories, self.substeps) < 1:
            raise ConfigError("iterations, batch, trajectories and substeps must be at least 1")
        if min(self.snapshots, self.horizon) < 2:
            raise ConfigError("snapshots and horizon must be at least 2")

    def settings(self) -> dict[str, Any]:
        """Every field, as values of JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def cells(self) -> Sequence[Cell]:
        """One training each."""
        return [
            Cell(
                f"{system}-{model}-{method}-{strategy}",
                {"system": system, "model": model, "method": method, "strategy": strategy},
                together=True,
            )
            for system in self.systems
            for model in self.models
            for method in self.methods
            for strategy in self.strategies
            if self._fits(system, model, method, strategy)
        ]

    def _fits(self, system: str, model: str, method: str, strategy: str) -> bool:
        stepper = steppers.get(method)
        if isinstance(stepper, steppers.Partitioned) and not _separable(system, model):
            return False
        try:
            gradients.get(strategy).check(stepper)
        except ValueError:
            return False
        return True

    def run(self, cell: Cell, work: Work) -> Outcome:
        """Trains one network under one strategy, and predicts with it."""
        torch.manual_seed(self.seed)
        training = Training(self, **cell.settings, world=work.world)
        work.train(training, every=20)
        if not work.world.first:
            return Outcome({})
        training.world = ALONE
        seconds = training.seconds
        return Outcome(
            {**training.cost(), **training.scores()},
            {
                "seconds_per_iteration": statistics.median(seconds),
                "gradient": seconds_of(lambda: training.loss()[0].backward(), "cpu"),
            },
        )

    def page(self, records: Mapping[str, Record]) -> Page:
        """The paper's table, and the long predictions."""
        return physics_page(self.settings(), records)

    @property
    def shown(self) -> str:
        """The strategy whose predictions are drawn: exact ones agree up to rounding."""
        return "symplectic" if "symplectic" in self.strategies else self.strategies[0]


class Training:
    """One network, trained under one strategy; a ``sweep.Session``.

    Args:
        study: The settings.
        system: Name of the system.
        model: "energy" or "plain".
        method: Method of integration.
        strategy: Gradient strategy.
        world: The processes that train together. Each takes its rows of every batch, and all take
            the same steps, so that the results are those of one process up to rounding.

    Raises:
        ConfigError: A batch has fewer rows than there are processes.
    """

    def __init__(
        self,
        study: PhysicsStudy,
        system: str,
        model: str,
        method: str,
        strategy: str,
        world: World = ALONE,
    ) -> None:
        if study.batch < world.size:
            raise ConfigError(f"batch={study.batch} is too small for {world.size} processes")
        self.study = study
        self.world = world
        self.system = physics.get(system)
        self.method = method
        self.strategy = strategy
        data = _simulated(system, study.trajectories, study.snapshots, study.seed)
        self.train = data.y.float()
        self.test = _simulated(system, study.trajectories, study.horizon, study.seed + 1)
        self.model = network(self.system, model, study.width, study.seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=study.learning_rate)
        self.iteration = 0
        self.seconds: list[float] = []
        # Changes from snapshot to snapshot differ by decades from system to system.
        self.scale = float((data.y[1:] - data.y[:-1]).square().mean())

    @property
    def finished(self) -> bool:
        """Whether every iteration is done."""
        return self.iteration >= self.study.iterations

    def step(self) -> None:
        """One iteration.

        Raises:
            TrainingError: The loss is not finite.
            SolveError: The equation cannot be solved.
        """
        begin = time.perf_counter()
        loss, _ = self.loss()
        if not math.isfinite(self.world.total(float(loss.detach()))):
            raise TrainingError(f"the loss is not finite at iteration {self.iteration + 1}")
        self.optimizer.zero_grad()
        loss.backward()
        self.world.add_gradients(self.model)
        self.optimizer.step()
        self.iteration += 1
        self.seconds.append(time.perf_counter() - begin)

    def loss(self) -> tuple[Tensor, Solution]:
        """Mean squared error of the next snapshot on the batch of this iteration.

        Where several processes train, each has its part of the sum over the rows.
        """
        batch = self._batch()
        before, after = (self.world.rows(x) for x in batch)
        solution = self.integrate(before, self.model, self.strategy)
        errors = (solution.y[-1] - after).square().sum() / batch[1].numel()
        return errors / self.scale, solution

    def integrate(
        self, y0: Tensor, model: nn.Module, strategy: str, snapshots: int = 2
    ) -> Solution:
        """From snapshot to snapshot."""
        t = torch.arange(snapshots, dtype=torch.float64) * self.system.interval
        controller = default_controller(steppers.get(self.method))
        if isinstance(controller, FixedGrid):
            controller = FixedGrid(step_size=self.system.interval / self.study.substeps)
        elif self.world.size > 1:
            controller = Adaptive(norm=self.world.norm)
        tolerance = self.study.tolerance
        return solve(
            model,
            y0,
            t,
            method=self.method,
            controller=controller,
            gradient=strategy,
            rtol=tolerance,
            atol=tolerance,
        )

    def _batch(self) -> tuple[Tensor, Tensor]:
        """A function of the seed and the iteration alone."""
        draw = Generator().manual_seed(1_000_003 * (self.study.seed + 1) + self.iteration)
        times, count, _ = self.train.shape
        n = torch.randint(times - 1, (self.study.batch,), generator=draw)
        i = torch.randint(count, (self.study.batch,), generator=draw)
        return self.train[n, i], self.train[n + 1, i]

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, all that a continuation needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what ``state`` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.seconds = state["iteration"], list(state["seconds"])

    def cost(self) -> dict[str, Any]:
        """Of one gradient, at the trained weights."""
        solutions: list[Solution] = []

        def differentiate() -> None:
            self.optimizer.zero_grad()
            loss, solution = self.loss()
            loss.backward()
            solutions.append(solution)

        differentiate()
        peak = peak_memory(differentiate)
        stats = solutions[-1].stats
        return {
            "peak_memory": peak,
            "evaluations": stats.evaluations + stats.backward_evaluations,
            "steps": stats.accepted,
        }

    @torch.no_grad()
    def scores(self) -> dict[str, Any]:
        """Of predictions in float64 from states that were not trained on."""
        truth = self.test.y
        model = network(self.system, *self._kind(), self.study.width, self.study.seed).double()
        model.load_state_dict({k: v.double() for k, v in self.model.state_dict().items()})
        pairs = self.integrate(truth[:-1].flatten(0, 1), model, "symplectic").y[-1]
        changes = (truth[1:] - truth[:-1]).square().mean()
        found: dict[str, Any] = {
            "one_step_error": float((pairs - truth[1:].flatten(0, 1)).square().mean() / changes),
            "learned_energy": _correlation(model, self.system, truth),
        }
        try:
            y = self.integrate(truth[0], model, "symplectic", len(truth)).y
        except SolveError:
            return {**found, **dict.fromkeys(("trajectory_error", "energy_error", "mass_error"))}
        return {**found, **_invariants(self.system, truth, y), **self._kept(model, y)}

    def _kind(self) -> tuple[str]:
        return ("plain" if isinstance(self.model, Autonomous) else "energy",)

    def _kept(self, model: nn.Module, y: Tensor) -> dict[str, Any]:
        """The first test trajectory, for the figures, with as many digits as they show."""
        if self.strategy != self.study.shown:
            return {}
        every = max(1, -(-len(y) // _KEPT))
        truth, y = self.test.y[::every, 0], y[::every, 0]
        learned = _energy(model, y)
        return {
            "t": self.test.t[::every].tolist(),
            "true_energy": self.system.energy(truth).tolist(),
            "predicted_energy": self.system.energy(y).tolist(),
            "learned": None if learned is None else learned.tolist(),
            "fields": [_rounded(truth), _rounded(y)]
            if isinstance(self.system, FieldEquation)
            else None,
        }


def _rounded(fields: Tensor) -> list[list[float]]:
    return [[float(f"{u:.5g}") for u in row] for row in fields.tolist()]


@cache
def _simulated(system: str, count: int, snapshots: int, seed: int) -> Trajectories:
    """The same data for all cells."""
    return physics.get(system).simulate(count, snapshots, seed)


def network(system: System, model: str, width: int, seed: int) -> nn.Module:
    """A network for a system, its weights drawn from a seed alone.

    Args:
        system: The system.
        model: "energy" or "plain".
        width: Width of the hidden layers.
        seed: Seed of the weights.

    Returns:
        A module ``(t, y) -> dy/dt`` in float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(system, FieldEquation):
            if model == "energy":
                energy = ConvEnergy(width, system.spacing)
                return EnergyPDE(energy, system.structure, system.spacing)
            return Autonomous(_PlainConv(width))
        dim = system.draw(1, Generator()).shape[-1]
        if model == "plain":
            return Autonomous(mlp(dim, width, dim))
        if isinstance(system.field, SeparableHamiltonian):
            return SeparableHamiltonian(mlp(dim // 2, width, 1), mlp(dim // 2, width, 1))
        return Hamiltonian(mlp(dim, width, 1))


class _PlainConv(nn.Module):
    """Periodic convolutions from a field to its derivative, which see as far as an energy's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, width, 5, padding=2, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv1d(width, width, 1),
            nn.Tanh(),
            nn.Conv1d(width, 1, 3, padding=1, padding_mode="circular"),
        )

    def forward(self, u: Tensor) -> Tensor:
        x: Tensor = self.layers(u.reshape(-1, 1, u.shape[-1]))
        return x.reshape(u.shape)


def _separable(system: str, model: str) -> bool:
    found = physics.get(system)
    return model == "energy" and isinstance(found.field, SeparableHamiltonian)


def _energy(model: nn.Module, y: Tensor) -> Tensor | None:
    energy = getattr(model, "energy", None)
    if energy is None:
        return None
    value: Tensor = energy(y)
    return value.squeeze(-1) if value.ndim == y.ndim else value


def _correlation(model: nn.Module, system: System, y: Tensor) -> float | None:
    """Of the learned and the true energy over all states, beside what moves nothing.

    The dynamics do not change with a constant added to the energy and, on a periodic interval, a
    multiple of the mass.
    """
    learned = _energy(model, y)
    if learned is None:
        return None
    both = torch.stack([learned.flatten(), system.energy(y).flatten()], -1)
    idle = [torch.ones_like(both[:, 0])]
    if isinstance(system, FieldEquation):
        idle.append(system.mass(y).flatten())
    known = torch.stack(idle, -1)
    rest = both - known @ torch.linalg.lstsq(known, both).solution
    return float(torch.corrcoef(rest.T)[0, 1])


def _invariants(system: System, truth: Tensor, y: Tensor) -> dict[str, float | None]:
    """Errors of a prediction against the reference."""
    wanted, energy = system.energy(truth), system.energy(y)
    found: dict[str, float | None] = {
        "trajectory_error": float(
            (y - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        ),
        "energy_error": float((energy - wanted).abs().max() / _span(wanted)),
        "mass_error": None,
    }
    if isinstance(system, FieldEquation):
        mass = system.mass(truth)
        drift = (system.mass(y) - mass).abs().max()
        found["mass_error"] = float(drift / mass.abs().mean())
    return found


def _span(energy: Tensor) -> Tensor:
    span = energy.max() - energy.min()
    # A single conserved energy has no range.
    return span if float(span) > 1e-6 * float(energy.abs().max()) else energy.abs().max()


SCALES = {
    "paper": PhysicsStudy(
        scale="paper",
        methods=("dopri8",),
        iterations=10_000,
        batch=200,
        width=200,
        trajectories=90,
        snapshots=101,
        horizon=101,
        learning_rate=1e-3,
    ),
    "reduced": PhysicsStudy(scale="reduced"),
    "tiny": PhysicsStudy(
        scale="tiny",
        systems=("cahn-hilliard",),
        strategies=("backprop", "symplectic", "continuous"),
        iterations=2,
        batch=4,
        width=4,
        trajectories=2,
        snapshots=4,
        horizon=5,
    ),
}
"""Settings by name: a size like the paper's, minutes on two cores, and to see that all works."""
