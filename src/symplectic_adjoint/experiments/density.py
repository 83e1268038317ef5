"""The paper's experiments on density estimation: what is trained, on what, and how it is measured.

Source: Matsubara, Miyatake, Yaguchi, IEEE TNNLS 35(8), 2024, section V-A. The models are those of
FFJORD (Grathwohl et al., ICLR 2019, appendix B.1).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from symplectic_adjoint import datasets
from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint.datasets import BENCHMARKS, Dataset
from symplectic_adjoint.experiments.config import CompareConfig
from symplectic_adjoint.experiments.density_page import density_page
from symplectic_adjoint.experiments.frozen import Frozen
from symplectic_adjoint.experiments.measure import Probe, gradient_of, measure_cost, seconds_of
from symplectic_adjoint.experiments.pages import Page
from symplectic_adjoint.experiments.recipes import DIGITS, RECIPES, at_most
from symplectic_adjoint.experiments.sweep import Cell, Outcome, Record, Work
from symplectic_adjoint.experiments.train import (
    EXACT_TRACE_LIMIT,
    Session,
    batch_of,
    build_model,
    noise_of,
    prepared,
    to_device,
)
from symplectic_adjoint.models import bits_per_pixel

_DIGITS_LEVELS = 17


@dataclass(frozen=True)
class Scale:
    """How much of the paper's setting is run.

    Attributes:
        sets: Data sets that every strategy is trained on.
        from_files: Those of them that are left out where there are no published files.
        rows: At most so many training, validation and test rows; None for all.
        components: At most so many components; None for the recipe's.
        width: At most so many units in a hidden layer, or a fourth as many channels; None for the
            recipe's.
        depth: At most so many hidden layers; None for the recipe's.
        batch_size: At most so many rows in a batch, or a fourth as many images; None for the
            recipe's.
        iterations: Optimiser steps of each strategy on each data set.
        sweep_iterations: Optimiser steps of each cell of the sweeps.
        sweep_set: Data set of the sweeps.
        strategies: Strategies compared on every data set.
        sweep_strategies: Strategies compared over methods.
        methods: Methods that a flow is trained with.
        tolerances: Absolute tolerances at which the gradient of the frozen problem is computed; the
            relative one is a hundred times that.
        trained_tolerances: Those of them that a flow is trained at.
        tolerance_strategies: Strategies of both.
        frozen_iterations: Optimiser steps that make the frozen problem.
        dtypes: Precisions of all sweeps.
        tolerance: Absolute tolerance of everything but the sweeps over it.
        max_steps: Attempted steps after which a solve counts as failed.
        exact_trace: Up to so many columns test rows are scored with the exact trace.
        learning_rate: Of Adam.
    """

    sets: tuple[str, ...]
    rows: tuple[int, int, int] | None
    components: int | None
    width: int | None
    depth: int | None
    batch_size: int | None
    iterations: int
    sweep_iterations: int
    sweep_set: str
    from_files: tuple[str, ...] = ()
    strategies: tuple[str, ...] = (
        "backprop",
        "checkpoint",
        "aca",
        "symplectic",
        "symplectic-steps",
        "continuous",
        "mali",
    )
    sweep_strategies: tuple[str, ...] = ("backprop", "symplectic", "continuous")
    methods: tuple[str, ...] = ("adaptive_heun", "bosh3", "dopri5", "dopri8")
    tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
    trained_tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
    tolerance_strategies: tuple[str, ...] = ("backprop", "symplectic", "continuous")
    frozen_iterations: int = 100
    dtypes: tuple[str, ...] = ("float32", "float64")
    tolerance: float = 1e-4
    max_steps: int = 1000
    exact_trace: int = EXACT_TRACE_LIMIT
    learning_rate: float = 1e-2


SCALES = {
    "paper": Scale(
        sets=tuple(RECIPES),
        rows=None,
        components=None,
        width=None,
        depth=None,
        batch_size=None,
        iterations=10_000,
        sweep_iterations=1000,
        sweep_set="miniboone",
        tolerance=1e-8,
        max_steps=10_000,
        learning_rate=1e-3,
    ),
    "reduced": Scale(
        sets=tuple(RECIPES),
        rows=(2000, 32, 32),
        components=2,
        width=32,
        depth=2,
        batch_size=32,
        iterations=6,
        sweep_iterations=16,
        sweep_set="miniboone",
        from_files=("mnist",),  # the digits are real images, generated strokes are not
        strategies=("backprop", "checkpoint", "aca", "symplectic", "continuous", "mali"),
        trained_tolerances=(1e-2, 1e-5, 1e-8),
        tolerance_strategies=("symplectic", "continuous"),
        frozen_iterations=60,
        max_steps=300,
        exact_trace=8,
        learning_rate=3e-2,
    ),
    "tiny": Scale(
        sets=("gas", DIGITS),
        rows=(60, 10, 10),
        components=1,
        width=8,
        depth=1,
        batch_size=8,
        iterations=2,
        sweep_iterations=2,
        sweep_set="gas",
        strategies=("backprop", "symplectic", "continuous"),
        sweep_strategies=("symplectic", "continuous"),
        methods=("bosh3",),
        tolerances=(1e-2, 1e-8),
        trained_tolerances=(1e-8,),
        tolerance_strategies=("symplectic", "continuous"),
        frozen_iterations=5,
        tolerance=1e-2,
        max_steps=60,
        exact_trace=0,
    ),
}


class DensityStudy:
    """Every strategy on every data set; every method, tolerance and precision on one.

    Args:
        scale: "paper", "reduced" or "tiny".
        folder: Folder of the published files; None for generated stand-ins.
        seed: Seed of everything random.
        device: Device of torch.

    Raises:
        UnknownNameError: There is no such scale.
        DataNotFoundError: A file is missing; the message says what to put where.
    """

    name = "density"

    def __init__(
        self, scale: str = "reduced", folder: Path | None = None, seed: int = 0, device: str = "cpu"
    ) -> None:
        if scale not in SCALES:
            raise UnknownNameError("scale", scale, SCALES)
        self.scale_name = scale
        self.scale = SCALES[scale]
        self.folder = folder
        self.seed = seed
        self.device = device
        if folder is not None:
            for name in {*self.scale.sets, self.scale.sweep_set} & set(BENCHMARKS):
                BENCHMARKS[name].locate(folder)
        self._data = functools.lru_cache(maxsize=1)(self._load)

    def settings(self) -> dict[str, Any]:
        """See ``Study``."""
        return {
            "scale": self.scale_name,
            "data": None if self.folder is None else str(self.folder),
            "seed": self.seed,
            "device": self.device,
        }

    def cells(self) -> Sequence[Cell]:
        """See ``Study``."""
        scale = self.scale
        left_out = scale.from_files if self.folder is None else ()
        cells = [
            self._cell("data", name, strategy, together=True)
            for name in scale.sets
            if name not in left_out
            for strategy in scale.strategies
        ]
        sweeps: tuple[tuple[str, str, Sequence[Any], Sequence[str]], ...] = (
            ("method", "method", scale.methods, scale.sweep_strategies),
            ("frozen", "atol", scale.tolerances, scale.tolerance_strategies),
            ("tolerance", "atol", scale.trained_tolerances, scale.tolerance_strategies),
        )
        for kind, axis, values, strategies in sweeps:
            ways: list[dict[str, Any]] = [{axis: value} for value in values]
            cells += [
                self._cell(kind, scale.sweep_set, strategy, dtype=dtype, **way)
                for dtype in scale.dtypes
                for strategy in strategies
                for way in ways
            ]
        return cells

    def run(self, cell: Cell, work: Work) -> Outcome:
        """See ``Study``."""
        config = CompareConfig.from_dict(cell.settings["config"])
        strategy = cell.settings["strategy"]
        if cell.settings["kind"] == "frozen":
            return self._problem.measure(config, strategy)
        data = prepared(self._data(config.data), config)
        session = Session(config, strategy, data, work.world)
        work.train(session, every=config.checkpoint_every)
        test_nll, trace = session.test(self.scale.exact_trace)
        if not work.world.first:
            return Outcome({})
        batch = batch_of(to_device(data.train, config), config, 0)
        noise = noise_of(session.model, batch, config, 0)
        probe = Probe(session.model.state_dict(), batch, noise)
        model = build_model(config, strategy, data)
        cost = measure_cost(model, probe)
        result = {
            "data": data.name,
            "rows": [len(part) for part in (data.train, data.validation, data.test)],
            "fingerprint": data.fingerprint(),
            "initial_nll": session.history.validation[0][1],
            "test_nll": test_nll,
            "test_trace": trace,
            "bits": self._bits(config, data, test_nll),
            "nll": session.history.nll,
            **cost.to_dict(),
        }
        timing = {
            "iteration": session.history.seconds_per_iteration(),
            "gradient": seconds_of(lambda: gradient_of(model, batch, noise), self.device),
        }
        return Outcome(result, timing)

    def page(self, records: Mapping[str, Record]) -> Page:
        """See ``Study``."""
        return density_page(self.settings(), records)

    def _cell(
        self, kind: str, name: str, strategy: str, *, together: bool = False, **given: Any
    ) -> Cell:
        value = given.get("method", "")
        if "atol" in given:
            value = f"{given['atol']:.0e}"
            given["rtol"] = 100 * given["atol"]
        steps = self.scale.iterations if kind == "data" else self.scale.sweep_iterations
        config = replace(
            self._config(name),
            strategies=(strategy,),
            iterations=steps,
            evaluate_every=max(5, steps // 10),
            **given,
        )
        parts = (kind, name, value, given.get("dtype", ""), strategy)
        settings = {"kind": kind, "strategy": strategy, "config": config.to_dict()}
        return Cell("-".join(part for part in parts if part), settings, together)

    def _config(self, name: str) -> CompareConfig:
        scale, recipe = self.scale, RECIPES[name]
        share = 4 if recipe.model == "conv" else 1
        width, rows = (
            None if limit is None else limit // share for limit in (scale.width, scale.batch_size)
        )
        return CompareConfig(
            data=name,
            rtol=100 * scale.tolerance,
            atol=scale.tolerance,
            max_steps=scale.max_steps,
            model=recipe.model,
            blocks=recipe.blocks(scale.components),
            hidden=tuple(at_most(units, width) for units in recipe.hidden[: scale.depth]),
            activation=recipe.activation,
            noise="gaussian",
            batch_size=at_most(recipe.batch_size, rows),
            learning_rate=scale.learning_rate,
            checkpoint_every=25,
            seed=self.seed,
            device=self.device,
            sweep=(),
        )

    @functools.cached_property
    def _problem(self) -> Frozen:
        config = replace(
            self._config(self.scale.sweep_set),
            strategies=("symplectic",),
            dtype="float64",
            rtol=1e-3,
            atol=1e-5,
            learning_rate=1e-2,
            iterations=self.scale.frozen_iterations,
            evaluate_every=self.scale.frozen_iterations,
        )
        return Frozen(config, prepared(self._data(config.data), config))

    def _load(self, name: str) -> Dataset:
        rows = self.scale.rows
        if name == DIGITS:
            return _cut(datasets.load(name, seed=self.seed), rows)
        if self.folder is None:
            return datasets.stand_in(name, rows=rows, seed=self.seed)
        return _cut(datasets.load_benchmark(name, self.folder, seed=self.seed), rows)

    def _bits(self, config: CompareConfig, data: Dataset, nll: float) -> float | None:
        if data.image_shape is None:
            return None
        like = BENCHMARKS.get(config.data)
        levels = _DIGITS_LEVELS if like is None or like.levels is None else like.levels
        return bits_per_pixel(nll, data.dim, levels)


def _cut(data: Dataset, rows: tuple[int, int, int] | None) -> Dataset:
    """The first rows of each split."""
    if rows is None:
        return data
    parts = (data.train, data.validation, data.test)
    train, validation, test = (part[:n] for part, n in zip(parts, rows, strict=True))
    return replace(data, train=train, validation=validation, test=test)
