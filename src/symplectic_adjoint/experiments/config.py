"""What a comparison trains and measures: one frozen value, checked when built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from symplectic_adjoint import gradients, steppers
from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.controllers import Adaptive, Controller, FixedGrid
from symplectic_adjoint.experiments.parallel import ALONE, World
from symplectic_adjoint.gradients import Strategy, Symplectic
from symplectic_adjoint.models import SolverOptions
from symplectic_adjoint.models.blocks import Activation, Layer
from symplectic_adjoint.models.cnf import Noise, Trace

Model = Literal["mlp", "conv"]

STRATEGIES = (
    "backprop",
    "checkpoint",
    "aca",
    "symplectic",
    "symplectic-steps",
    "continuous",
    "mali",
)
"""Strategies that a comparison runs unless told otherwise."""

_VARIANTS: dict[str, Strategy] = {
    "symplectic-steps": Symplectic(store="steps"),
    "symplectic-graph": Symplectic(store="graph"),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


_CHOICES: dict[str, tuple[str, ...]] = {
    "model": get_args(Model),
    "layer": get_args(Layer),
    "activation": get_args(Activation),
    "trace": get_args(Trace),
    "noise": get_args(Noise),
    "dtype": tuple(DTYPES),
}


class ConfigError(ArgumentError):
    """A setting that cannot be used; the message names it, its value, and what is allowed."""


@dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison.

    Attributes:
        data: Name of a data set, or path of a .npy or .csv file.
        strategies: Gradient strategies to train under, in the order of the report: names of
            strategies, "symplectic-steps" or "symplectic-graph" for what the symplectic one stores.
        method: Solver of every strategy that does not come with its own.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver.
        step_size: Size of fixed steps, in place of step size control; None where the method has
            such control.
        max_steps: Attempted steps after which a solve under step size control fails; None for the
            control's own limit.
        model: "mlp", or "conv" for a multi-scale flow of images.
        blocks: Stacked blocks of the flow; of each of its three scales with "conv".
        hidden: Widths, or channels, of the hidden layers of each block.
        layer: "concatsquash" or "concat".
        activation: "softplus" or "tanh".
        trace: "hutchinson" or "exact", while training.
        noise: "rademacher" or "gaussian", of Hutchinson's estimate.
        iterations: Number of optimiser steps for each strategy.
        batch_size: Rows in a batch; a smaller training split is taken whole.
        learning_rate: Learning rate of Adam.
        seed: Seed of the weights, of the data's split, of their order and of the noise.
        device: Device of torch, such as "cpu" or "cuda".
        dtype: "float32" or "float64", of the training.
        evaluate_every: Iterations between two evaluations of the validation rows.
        checkpoint_every: Iterations between two checkpoints.
        sweep: Tolerances, the loosest first, at which memory is measured against the number of
            steps.

    Raises:
        ConfigError: A setting cannot be used.
        UnknownNameError: A setting is none of its choices.

    Example:
        >>> config = CompareConfig(data="pinwheel", iterations=10)
        >>> CompareConfig.from_dict(config.to_dict()) == config
        True
    """

    data: str = "digits"
    strategies: tuple[str, ...] = STRATEGIES
    method: str = "dopri5"
    rtol: float = 1e-4
    atol: float = 1e-4
    step_size: float | None = None
    max_steps: int | None = None
    model: Model = "mlp"
    blocks: int = 2
    hidden: tuple[int, ...] = (128, 128)
    layer: Layer = "concatsquash"
    activation: Activation = "tanh"
    trace: Trace = "hutchinson"
    noise: Noise = "rademacher"
    iterations: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-2
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    evaluate_every: int = 10
    checkpoint_every: int = 10
    sweep: tuple[float, ...] = (1e-3, 1e-5, 1e-7, 1e-9)

    def __post_init__(self) -> None:
        for name in ("blocks", "iterations", "batch_size", "evaluate_every", "checkpoint_every"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("rtol", "atol", "learning_rate"):
            value = getattr(self, name)
            _check(0 < value < math.inf, name, value, "positive and finite")
        _check(all(0 < tol < 1 for tol in self.sweep), "sweep", self.sweep, "between 0 and 1")
        _check(
            all(width >= 1 for width in self.hidden), "hidden", self.hidden, "widths of at least 1"
        )
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UnknownNameError(name, value, choices)
        _check(bool(self.strategies), "strategies", self.strategies, "at least one strategy")
        for name in self.strategies:
            strategy(name)
        repeated = len(set(self.strategies)) < len(self.strategies)
        _check(not repeated, "strategies", self.strategies, "named once each")
        self._check_method()
        _check_device(self.device)

    def _check_method(self) -> None:
        stepper = steppers.get(self.method)
        if self.step_size is not None:
            _check(0 < self.step_size <= 1, "step_size", self.step_size, "in (0, 1]")
        elif self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps={self.max_steps!r} must be at least 1")
        elif stepper.error_order is None:
            raise ConfigError(f"method={self.method!r} does not control its steps; give step_size")

    def method_of(self, name: str) -> str:
        """The solver that a strategy runs with."""
        return strategy(name).method or self.method

    def solver(self, name: str, world: World = ALONE) -> SolverOptions:
        """The solver options that a strategy trains with, and one of several processes with it."""
        return SolverOptions(
            self.method_of(name), self.rtol, self.atol, strategy(name), self._controller(world)
        )

    def _controller(self, world: World) -> Controller | None:
        if self.step_size is not None:
            return FixedGrid(step_size=self.step_size)
        given: dict[str, Any] = {}
        if self.max_steps is not None:
            given["max_steps"] = self.max_steps
        if world.size > 1:
            given["norm"] = world.norm
        return Adaptive(**given) if given else None

    def to_dict(self) -> dict[str, Any]:
        """The settings as values of JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompareConfig:
        """Settings from what ``to_dict`` gave.

        Raises:
            ConfigError: A setting is unknown, or cannot be used.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        _check(not unknown, "settings", unknown, "known to this version")
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**settings)


def strategy(name: str) -> Strategy:
    """The gradient strategy of a name: one of ``gradients.names()``, or a variant with its options.

    Raises:
        UnknownNameError: No strategy has this name.

    Example:
        >>> strategy("symplectic-steps").store
        'steps'
    """
    if name in _VARIANTS:
        return _VARIANTS[name]
    if name not in gradients.names():
        raise UnknownNameError("strategy", name, (*gradients.names(), *_VARIANTS))
    return gradients.get(name)


def _check(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r} must be {allowed}")


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name!r} cannot be used here: {reason}") from error
