"""The comparison: one flow trained and measured under each strategy, stoppable at any moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from symplectic_adjoint import datasets
from symplectic_adjoint._errors import SolveError
from symplectic_adjoint.datasets import Dataset
from symplectic_adjoint.experiments.config import CompareConfig, ConfigError, strategy
from symplectic_adjoint.experiments.files import (
    KIND,
    RunFolder,
    read_json,
    read_state,
    write_bytes,
    write_json,
    write_state,
)
from symplectic_adjoint.experiments.measure import (
    Cost,
    Probe,
    SweepPoint,
    measure_cost,
    sweep_memory,
)
from symplectic_adjoint.experiments.plots import figures
from symplectic_adjoint.experiments.report import html
from symplectic_adjoint.experiments.results import (
    Results,
    StrategyResult,
    environment,
    summarise,
)
from symplectic_adjoint.experiments.train import (
    Session,
    TrainingError,
    batch_of,
    build_model,
    noise_of,
    prepared,
    to_device,
)


class RunInterruptedError(Exception):
    """The run was asked to stop and has saved its state."""


class Observer(Protocol):
    """What a run tells to whoever watches it."""

    def trained(self, session: Session) -> None:
        """A session is new, was restored, or has done an iteration."""

    def failed(self, strategy: str, error: Exception) -> None:
        """A strategy stopped early and is left out from here on."""

    def measuring(self, done: int, total: int, what: str) -> None:
        """So many of the measurements are done, and the next is this."""


class Comparison:
    """One comparison in one folder.

    Build it with ``start`` or ``resume``, then call ``run``.

    Args:
        config: The settings.
        data: The rows.
        folder: Where everything is written.
    """

    def __init__(self, config: CompareConfig, data: Dataset, folder: RunFolder) -> None:
        self.config = config
        self.data = data
        self.folder = folder
        self.errors: dict[str, str] = {}

    @classmethod
    def start(
        cls,
        config: CompareConfig,
        path: Path,
        *,
        overwrite: bool = False,
        epochs: int | None = None,
    ) -> Comparison:
        """Prepares a new run.

        Args:
            config: The settings.
            path: Output folder.
            overwrite: Whether an earlier run in the folder may be deleted.
            epochs: Passes over the training rows, in place of the settings' number of iterations.

        Raises:
            DataError: The data cannot be used.
            RunFolderError: The folder cannot be used.
        """
        data = prepared(datasets.load(config.data, seed=config.seed), config)
        if epochs is not None:
            batches = len(data.train) // min(config.batch_size, len(data.train))
            config = replace(config, iterations=epochs * batches)
        folder = RunFolder.create(path, overwrite=overwrite)
        write_json(
            folder.config,
            {
                "kind": KIND,
                "config": config.to_dict(),
                "fingerprint": data.fingerprint(),
                "environment": environment(),
            },
        )
        return cls(config, data, folder)

    @classmethod
    def resume(cls, path: Path) -> Comparison:
        """Prepares the continuation of a stopped run, with its settings and its number of threads.

        Raises:
            RunFolderError: The folder holds no run.
            ConfigError: The run's settings cannot be used here, or its data have changed since.
        """
        folder = RunFolder.reopen(path)
        stored = read_json(folder.config)
        config = CompareConfig.from_dict(stored["config"])
        data = prepared(datasets.load(config.data, seed=config.seed), config)
        if data.fingerprint() != stored["fingerprint"]:
            raise ConfigError(
                f"the data {config.data!r} are not those that the run in {path} began with; "
                "restore them, or start a new run"
            )
        # How sums are split among threads decides their last bits.
        torch.set_num_threads(stored["environment"]["threads"])
        return cls(config, data, folder)

    def run(self, observer: Observer, should_stop: Callable[[], bool] = lambda: False) -> Results:
        """Trains, measures and reports, as far as that is not done yet.

        Args:
            observer: Is told of the progress.
            should_stop: Asked between units of work whether to save and stop.

        Returns:
            The results, which are also in the folder.

        Raises:
            RunInterruptedError: ``should_stop`` said so; everything done so far is saved.
            RunFolderError: Another process is writing to the folder.
        """
        with self.folder.lock():
            sessions = [self._session(name) for name in self.config.strategies]
            self._train(sessions, observer, should_stop)
            trained = [s for s in sessions if s.strategy not in self.errors]
            measurements = self._measure(trained, observer, should_stop)
            probe = trained[0].strategy if trained else None
            results = self._collect(sessions, measurements, probe)
            self._write(results, trained)
        return results

    def _session(self, name: str) -> Session:
        session = Session(self.config, name, self.data)
        path = self.folder.checkpoint(name)
        if path.exists():
            session.restore(read_state(path))
        return session

    def _train(
        self, sessions: Sequence[Session], observer: Observer, should_stop: Callable[[], bool]
    ) -> None:
        """Trains all sessions in turns, so that other work on the machine slows all alike."""
        for session in sessions:
            observer.trained(session)
        for iteration in range(self.config.iterations):
            for session in sessions:
                if session.iteration > iteration or session.strategy in self.errors:
                    continue
                if should_stop():
                    self._save(sessions)
                    raise RunInterruptedError
                self._step(session, observer)

    def _step(self, session: Session, observer: Observer) -> None:
        try:
            session.step()
        except (SolveError, TrainingError) as error:
            self.errors[session.strategy] = str(error)
            self._save([session])
            observer.failed(session.strategy, error)
            return
        if session.finished or session.iteration % self.config.checkpoint_every == 0:
            self._save([session])
        observer.trained(session)

    def _save(self, sessions: Sequence[Session]) -> None:
        for session in sessions:
            write_state(self.folder.checkpoint(session.strategy), session.state())

    def _measure(
        self, sessions: Sequence[Session], observer: Observer, should_stop: Callable[[], bool]
    ) -> dict[str, dict[str, Any]]:
        """The measurements of each session, read where an earlier run has left them."""
        found: dict[str, dict[str, Any]] = {}
        for done, session in enumerate(sessions):
            if should_stop():
                raise RunInterruptedError
            observer.measuring(done, len(sessions), session.strategy)
            path = self.folder.measurement(session.strategy)
            try:
                if not path.exists():
                    write_json(path, self._measurement(session, self._probe(sessions[0])))
            except SolveError as error:
                self.errors[session.strategy] = str(error)
                observer.failed(session.strategy, error)
                continue
            found[session.strategy] = read_json(path)
        observer.measuring(len(sessions), len(sessions), "report")
        return found

    def _probe(self, session: Session) -> Probe:
        rows = to_device(self.data.train, self.config)
        batch = batch_of(rows, self.config, 0)
        noise = noise_of(session.model, batch, self.config, 0)
        return Probe(session.model.state_dict(), batch, noise)

    def _measurement(self, session: Session, probe: Probe) -> dict[str, Any]:
        test_nll, trace = session.test()
        model = build_model(self.config, session.strategy, self.data)
        cost = measure_cost(model, probe)
        sweep = sweep_memory(model, probe, self.config.sweep)
        return {
            "test_nll": test_nll,
            "test_trace": trace,
            "cost": cost.to_dict(),
            "sweep": [vars(point) for point in sweep],
        }

    def _collect(
        self,
        sessions: Sequence[Session],
        measurements: dict[str, dict[str, Any]],
        probe: str | None,
    ) -> Results:
        return Results(
            config=self.config,
            data=summarise(self.data),
            environment=environment(),
            probe=probe,
            strategies=tuple(
                self._result(session, measurements.get(session.strategy)) for session in sessions
            ),
        )

    def _result(self, session: Session, measurement: dict[str, Any] | None) -> StrategyResult:
        name, history = session.strategy, session.history
        found = measurement or {"test_nll": None, "test_trace": None, "cost": None, "sweep": ()}
        method = self.config.method_of(name)
        return StrategyResult(
            name=name,
            method=method,
            own_solver=method != self.config.method,
            exact=strategy(name).exact,
            error=self.errors.get(name),
            test_nll=found["test_nll"],
            test_trace=found["test_trace"],
            seconds_per_iteration=history.seconds_per_iteration() if history.seconds else None,
            cost=Cost(**found["cost"]) if found["cost"] else None,
            sweep=tuple(SweepPoint(**point) for point in found["sweep"]),
            history=history,
        )

    def _write(self, results: Results, sessions: Sequence[Session]) -> None:
        write_json(self.folder.results, results.to_dict())
        images = figures(results, self.data, {s.strategy: s.model for s in sessions})
        for name, image in images.items():
            write_bytes(self.folder.figures / f"{name}.png", image)
        write_bytes(self.folder.report, html(results, images).encode())
