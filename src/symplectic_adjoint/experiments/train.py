"""Training of one flow under one gradient strategy, resumable bit for bit."""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from symplectic_adjoint.datasets import Dataset
from symplectic_adjoint.experiments.config import DTYPES, CompareConfig, ConfigError
from symplectic_adjoint.experiments.parallel import ALONE, World
from symplectic_adjoint.models import CNF, ContinuousFlow, Flow, ImageCNF, SolverOptions
from symplectic_adjoint.models.cnf import standard_normal_log_prob

EXACT_TRACE_LIMIT = 128
"""Up to this dimension test rows are scored with the exact trace, beyond it with Hutchinson's."""
_CHUNK = 1024


class TrainingError(RuntimeError):
    """Training cannot go on: the loss left the finite numbers."""


@dataclass
class History:
    """What each iteration gave, as lists of one entry an iteration.

    Attributes:
        nll: Mean negative log-likelihood of the batch, nats.
        seconds: Wall time of forward, backward and optimiser.
        evaluations: Network evaluations of the forward solves.
        backward_evaluations: Network evaluations of the backward pass.
        products: vector-Jacobian products.
        accepted: Accepted steps.
        rejected: Rejected steps.
        validation: Pairs (number of iterations done, mean negative log-likelihood).
    """

    nll: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    backward_evaluations: list[int] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    def seconds_per_iteration(self) -> float:
        """Median wall time of an iteration, the first left out because it warms caches."""
        return statistics.median(self.seconds[1:] or self.seconds)


class Session:
    """One model, its optimiser and its history under one strategy.

    Every random draw (weights, order of the rows, noise) is a function of the seed, its purpose and
    the iteration alone. So all strategies see the same batches and the same noise, and a session
    that is restored from ``state`` continues exactly as if it had never stopped, with no generator
    to restore.

    Args:
        config: The settings.
        strategy: Gradient strategy.
        data: The rows; pixels in (0, 1) for a flow of images.
        world: The processes that train together. Each takes its rows of every batch, and all take
            the same steps, so that the results are those of one process up to rounding.

    Raises:
        ConfigError: There are fewer rows than processes.
    """

    def __init__(
        self, config: CompareConfig, strategy: str, data: Dataset, world: World = ALONE
    ) -> None:
        fewest = min(config.batch_size, *(map(len, (data.train, data.validation, data.test))))
        if fewest < world.size:
            raise ConfigError(
                f"a batch or split of {fewest} rows is too small for {world.size} processes"
            )
        self.config = config
        self.strategy = strategy
        self.data = data
        self.world = world
        self.model = build_model(config, strategy, data, world)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        self.history = History()
        self._train = to_device(data.train, config)
        self._validation = to_device(data.validation, config)

    @property
    def iteration(self) -> int:
        """Number of iterations done."""
        return len(self.history.nll)

    @property
    def finished(self) -> bool:
        """Whether every iteration is done."""
        return self.iteration >= self.config.iterations

    def step(self) -> None:
        """Does one iteration, and scores the validation rows where that is due.

        Raises:
            TrainingError: The loss is not finite; the parameters are those before the iteration.
            SolveError: The equation cannot be solved, for example because its steps underflow.
        """
        if self.iteration == 0 and not self.history.validation:
            self._validate()
        whole = batch_of(self._train, self.config, self.iteration)
        noise = noise_of(self.model, whole, self.config, self.iteration)
        batch, noise = self.world.rows(whole), self.world.rows(noise, axis=1)
        _wait(batch)
        begin = time.perf_counter()
        flow = self.model.transform(batch, noise)
        loss = negative_log_likelihood(flow) * (len(batch) / len(whole))
        nll = self.world.total(float(loss.detach()))
        if not abs(nll) < float("inf"):
            raise TrainingError(
                f"the loss is {nll} at iteration {self.iteration + 1}; "
                "a smaller --learning-rate or tighter --rtol and --atol may help"
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.world.add_gradients(self.model)
        self.optimizer.step()
        _wait(batch)
        self._record(nll, time.perf_counter() - begin, flow)
        if self.finished or self.iteration % self.config.evaluate_every == 0:
            self._validate()

    def test(self, exact_trace: int = EXACT_TRACE_LIMIT) -> tuple[float, str]:
        """Mean negative log-likelihood of the test rows in nats, and the trace behind it.

        Args:
            exact_trace: Up to so many columns the trace is exact.
        """
        model = copy.deepcopy(self.model)
        if self.data.dim <= exact_trace:
            model.trace = "exact"
        rows = to_device(self.data.test, self.config)
        return evaluate(model, rows, self.config, self.world), model.trace

    def state(self) -> dict[str, Any]:
        """Everything that a continuation needs, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what ``state`` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])

    def _validate(self) -> None:
        score = evaluate(self.model, self._validation, self.config, self.world)
        self.history.validation.append((self.iteration, score))

    def _record(self, nll: float, seconds: float, flow: Flow) -> None:
        history = self.history
        history.nll.append(nll)
        history.seconds.append(seconds)
        for name, total in counts(flow).items():
            getattr(history, name).append(total)


def build_model(
    config: CompareConfig, strategy: str, data: Dataset, world: World = ALONE
) -> ContinuousFlow:
    """The flow of a comparison; the same settings give the same weights, whatever the strategy.

    Raises:
        ConfigError: A flow of images was asked for, and the rows are none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(config, "weights", 0))
        model = _flow(config, data, config.solver(strategy, world))
    return model.to(device=config.device, dtype=DTYPES[config.dtype])


def _flow(config: CompareConfig, data: Dataset, solver: SolverOptions) -> ContinuousFlow:
    shared: dict[str, Any] = {
        "hidden": config.hidden,
        "blocks": config.blocks,
        "activation": config.activation,
        "trace": config.trace,
        "noise": config.noise,
        "solver": solver,
    }
    if config.model == "mlp":
        return CNF(data.dim, layer=config.layer, **shared)
    if data.image_shape is None:
        raise ConfigError(f"model='conv' needs images, and the rows of {data.name} are none")
    return ImageCNF(data.image_shape, **shared)


def prepared(data: Dataset, config: CompareConfig) -> Dataset:
    """The rows in the coordinates that the model of a comparison takes."""
    return data.unscaled() if config.model == "conv" else data


def negative_log_likelihood(flow: Flow) -> Tensor:
    """Mean negative log-likelihood of the rows behind a flow, in nats, a scalar."""
    return -(standard_normal_log_prob(flow.z) + flow.log_det).mean()


def counts(flow: Flow) -> dict[str, int]:
    """Network evaluations, products and steps over all blocks, as far as they have been done."""
    names = ("evaluations", "backward_evaluations", "products", "accepted", "rejected")
    return {name: sum(getattr(s.stats, name) for s in flow.solutions) for name in names}


def batch_of(rows: Tensor, config: CompareConfig, iteration: int) -> Tensor:
    """The batch of an iteration: the next rows of its epoch's permutation, an odd rest left out."""
    size = min(config.batch_size, len(rows))
    epoch, index = divmod(iteration, len(rows) // size)
    order = torch.randperm(len(rows), generator=_generator(config, "order", epoch))
    return rows[order[index * size : (index + 1) * size].to(rows.device)]


def noise_of(model: ContinuousFlow, batch: Tensor, config: CompareConfig, iteration: int) -> Tensor:
    """The noise of an iteration, shape (blocks, n, dim)."""
    return model.draw_noise(batch, _generator(config, "noise", iteration))


@torch.no_grad()
def evaluate(
    model: ContinuousFlow, rows: Tensor, config: CompareConfig, world: World = ALONE
) -> float:
    """Mean negative log-likelihood of rows in nats, with noise that depends on the seed alone."""
    generator = _generator(config, "evaluation", 0)
    total = 0.0
    for chunk in rows.tensor_split(math.ceil(len(rows) / _CHUNK)):
        noise = world.rows(model.draw_noise(chunk, generator), axis=1)
        mine = world.rows(chunk)
        total += float(negative_log_likelihood(model.transform(mine, noise))) * len(mine)
    return world.total(total) / len(rows)


def to_device(rows: Tensor, config: CompareConfig) -> Tensor:
    """Rows in the dtype and on the device of a comparison."""
    return rows.to(device=config.device, dtype=DTYPES[config.dtype])


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _generator(config: CompareConfig, purpose: str, index: int) -> Generator:
    return Generator().manual_seed(_seed(config, purpose, index))


def _seed(config: CompareConfig, purpose: str, index: int) -> int:
    digest = hashlib.sha256(f"{config.seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
