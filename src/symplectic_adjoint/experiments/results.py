"""What a comparison found: plain values that JSON, the table, the figures and the report share."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint.datasets import Dataset
from symplectic_adjoint.experiments.config import CompareConfig
from symplectic_adjoint.experiments.measure import Cost, SweepPoint
from symplectic_adjoint.experiments.train import History, negative_log_likelihood
from symplectic_adjoint.models.cnf import Flow

FORMAT = 1


@dataclass(frozen=True)
class StrategyResult:
    """What one strategy did.

    Attributes:
        name: Name of the strategy.
        method: The solver that it ran with.
        own_solver: Whether that solver is not the one asked for, because the strategy needs its
            own.
        exact: Whether the strategy computes the gradient of the computed solution.
        error: Why it stopped early; None if it did not.
        test_nll: Mean negative log-likelihood of the test rows, nats in standardised coordinates.
        test_trace: Trace that ``test_nll`` was computed with.
        seconds_per_iteration: Median wall time of a training iteration.
        cost: The measured gradient.
        sweep: Memory against the number of steps.
        history: What each iteration gave.
    """

    name: str
    method: str
    own_solver: bool
    exact: bool
    error: str | None
    test_nll: float | None
    test_trace: str | None
    seconds_per_iteration: float | None
    cost: Cost | None
    sweep: tuple[SweepPoint, ...]
    history: History


@dataclass(frozen=True)
class DataSummary:
    """The data in a few figures.

    Attributes:
        name: Name or path.
        rows: Rows in the train, validation and test splits.
        dim: Number of columns.
        fingerprint: SHA-256 of the rows.
        log_scale: Added to a negative log-likelihood, gives that of the original coordinates.
        standard_normal_nll: Test score of the base distribution, where an untrained flow starts.
        gaussian_nll: Test score of a Gaussian with the training rows' covariance; None if it is
            singular.
    """

    name: str
    rows: tuple[int, int, int]
    dim: int
    fingerprint: str
    log_scale: float
    standard_normal_nll: float
    gaussian_nll: float | None


@dataclass(frozen=True)
class Results:
    """A whole comparison.

    Attributes:
        config: The settings.
        data: The data in a few figures.
        environment: Versions and machine.
        probe: Strategy whose trained weights all costs were measured at; None if none could be
            measured.
        strategies: One result for each strategy, in the order of the settings.
    """

    config: CompareConfig
    data: DataSummary
    environment: dict[str, Any]
    probe: str | None
    strategies: tuple[StrategyResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as values of JSON."""
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "data": asdict(self.data),
            "environment": self.environment,
            "probe": self.probe,
            "strategies": [asdict(result) for result in self.strategies],
        }


def summarise(data: Dataset) -> DataSummary:
    """The data in a few figures, with two scores to judge a flow by."""
    zeros = data.test.new_zeros(len(data.test))
    return DataSummary(
        name=data.name,
        rows=(len(data.train), len(data.validation), len(data.test)),
        dim=data.dim,
        fingerprint=data.fingerprint(),
        log_scale=data.log_scale,
        standard_normal_nll=float(negative_log_likelihood(Flow(data.test, zeros, ()))),
        gaussian_nll=_gaussian_nll(data.train, data.test),
    )


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they bear on the figures."""
    return {
        "python": platform.python_version(),
        "symplectic-adjoint": version("symplectic-adjoint"),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _gaussian_nll(train: Tensor, test: Tensor) -> float | None:
    factor, failed = torch.linalg.cholesky_ex(torch.cov(train.T).reshape(train.shape[1], -1))
    if int(failed):
        return None
    white = torch.linalg.solve_triangular(factor, (test - train.mean(0)).T, upper=False).T
    log_det = -factor.diagonal().log().sum().expand(len(test))
    return float(negative_log_likelihood(Flow(white, log_det, ())))


def version(distribution: str) -> str:
    """The version of an installed distribution, "unknown" where it runs without being installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
