"""The comparison: training, measuring, resuming, reporting."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from symplectic_adjoint import datasets
from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.controllers import Adaptive
from symplectic_adjoint.datasets import Dataset
from symplectic_adjoint.datasets.base import make_dataset
from symplectic_adjoint.experiments import files, plots
from symplectic_adjoint.experiments.compare import Comparison, RunInterruptedError
from symplectic_adjoint.experiments.config import STRATEGIES, CompareConfig, ConfigError
from symplectic_adjoint.experiments.files import RunFolder, RunFolderError
from symplectic_adjoint.experiments.measure import SWEEP_STEPS, Probe, sweep_memory
from symplectic_adjoint.experiments.parallel import World
from symplectic_adjoint.experiments.report import command
from symplectic_adjoint.experiments.results import Results, summarise
from symplectic_adjoint.experiments.table import HEADINGS, findings, notes, row
from symplectic_adjoint.experiments.train import (
    Session,
    TrainingError,
    batch_of,
    build_model,
    noise_of,
    prepared,
)
from symplectic_adjoint.models import ImageCNF

PNG = b"\x89PNG\r\n\x1a\n"


class Silent:
    """An observer that remembers what it was told."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}
        self.steps = 0

    def trained(self, session: Session) -> None:
        self.steps += 1

    def failed(self, strategy: str, error: Exception) -> None:
        self.failures[strategy] = str(error)

    def measuring(self, done: int, total: int, what: str) -> None:
        pass


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Resuming sets the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "table.npy"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 2))
    np.save(path, np.stack([x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1]], axis=1))
    return str(path)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose figures nobody looks at: drawing takes longer than they do."""
    monkeypatch.setattr("symplectic_adjoint.experiments.compare.figures", lambda *_: {})


def _config(table: str, **settings: Any) -> CompareConfig:
    tiny: dict[str, Any] = {
        "data": table,
        "strategies": ("backprop", "symplectic"),
        "rtol": 1e-3,
        "atol": 1e-3,
        "blocks": 1,
        "hidden": (8,),
        "iterations": 6,
        "batch_size": 32,
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "sweep": (),
    }
    return CompareConfig(**(tiny | settings))


def _stop_after(calls: int) -> Callable[[], bool]:
    counter = itertools.count()
    return lambda: next(counter) >= calls


def _parameters(folder: RunFolder, strategy: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = files.read_state(folder.checkpoint(strategy))["model"]
    return state


@pytest.fixture(scope="module")
def finished(table: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Results]:
    """A run under every strategy."""
    path = tmp_path_factory.mktemp("runs") / "all"
    config = _config(
        table,
        strategies=STRATEGIES,
        sweep=(1e-2, 1e-6),
        iterations=3,
    )
    comparison = Comparison.start(config, path)
    return comparison, comparison.run(Silent())


# --- settings


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"iterations": 0}, ConfigError, "iterations=0 must be at least 1"),
        ({"rtol": -1.0}, ConfigError, "rtol=-1.0 must be positive and finite"),
        ({"learning_rate": float("nan")}, ConfigError, "learning_rate=nan"),
        ({"hidden": (8, 0)}, ConfigError, r"hidden=\(8, 0\) must be widths of at least 1"),
        ({"sweep": (2.0,)}, ConfigError, "between 0 and 1"),
        ({"strategies": ()}, ConfigError, "at least one strategy"),
        ({"strategies": ("aca", "aca")}, ConfigError, "named once each"),
        ({"strategies": ("simplectic",)}, UnknownNameError, "did you mean 'symplectic'"),
        ({"method": "doprri5"}, UnknownNameError, "did you mean 'dopri5'"),
        ({"method": "rk4"}, ConfigError, "'rk4' does not control its steps; give step_size"),
        ({"step_size": 2.0}, ConfigError, r"step_size=2.0 must be in \(0, 1\]"),
        ({"dtype": "float16"}, UnknownNameError, "unknown dtype 'float16'"),
        ({"layer": "dense"}, UnknownNameError, "unknown layer 'dense'"),
        ({"device": "quantum"}, ConfigError, "device='quantum' cannot be used here"),
    ],
)
def test_bad_settings_are_refused(settings: Any, error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        CompareConfig(**settings)


def test_settings_survive_json() -> None:
    config = CompareConfig(hidden=(3, 4), strategies=("aca",), step_size=0.5, sweep=())
    assert CompareConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_of_another_version_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\['colour'\] must be known to this version"):
        CompareConfig.from_dict({"colour": "red"})


def test_the_printed_command_repeats_the_settings() -> None:
    config = CompareConfig(data="my data.csv", hidden=(8, 8), strategies=("aca", "mali"))
    assert command(config) == (
        "symplectic-adjoint compare --data 'my data.csv' --strategies aca,mali --hidden 8,8"
    )


# --- files


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"x": [float("nan"), 1.5, (float("inf"),)]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1.5, [None]]}


def test_states_keep_tensors_and_run_no_code(tmp_path: Path) -> None:
    state = {"a": torch.randn(3), "b": {"c": [1, 2.5, "x", (1, 2)]}}
    files.write_state(tmp_path / "state", state)
    read = files.read_state(tmp_path / "state")
    assert torch.equal(read["a"], state["a"])
    assert read["b"] == state["b"]
    torch.save({"f": Silent()}, tmp_path / "code")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        files.read_state(tmp_path / "code")


def test_a_folder_of_other_files_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(RunFolderError, match="files that are not from a run"):
            RunFolder.create(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "out", overwrite=True)


def test_a_run_is_overwritten_only_when_told_and_leaves_other_files(
    table: str, tmp_path: Path
) -> None:
    comparison = Comparison.start(_config(table), tmp_path)
    files.write_bytes(comparison.folder.checkpoint("backprop"), b"")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"--resume.*--overwrite.*--out"):
        Comparison.start(_config(table), tmp_path)
    assert comparison.folder.checkpoint("backprop").exists()
    Comparison.start(_config(table, seed=1), tmp_path, overwrite=True)
    assert not comparison.folder.checkpoint("backprop").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert files.read_json(comparison.folder.config)["config"]["seed"] == 1


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run to resume"):
        Comparison.resume(tmp_path)


def test_two_runs_cannot_write_to_one_folder(table: str, tmp_path: Path) -> None:
    comparison = Comparison.start(_config(table), tmp_path)
    with (
        RunFolder(tmp_path).lock(),
        pytest.raises(RunFolderError, match="another process is writing"),
    ):
        comparison.run(Silent())


# --- training


def test_every_epoch_holds_every_row_once_and_in_another_order(table: str) -> None:
    config = _config(table, batch_size=24)
    rows = torch.arange(96).unsqueeze(1)
    epochs = [
        torch.cat([batch_of(rows, config, 4 * epoch + i) for i in range(4)]).flatten()
        for epoch in range(2)
    ]
    assert all(torch.equal(epoch.sort().values, rows.flatten()) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_a_batch_larger_than_the_data_is_all_of_it(table: str) -> None:
    rows = torch.arange(10).unsqueeze(1)
    batch = batch_of(rows, _config(table, batch_size=64), 3)
    assert sorted(batch.flatten().tolist()) == list(range(10))


def test_strategies_start_alike_and_see_the_same_noise(table: str) -> None:
    config = _config(table)
    first, second = (
        build_model(config, "backprop", datasets.load(table)),
        build_model(config, "mali", datasets.load(table)),
    )
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    batch = torch.zeros(4, 2)
    assert torch.equal(noise_of(first, batch, config, 3), noise_of(second, batch, config, 3))
    assert not torch.equal(noise_of(first, batch, config, 3), noise_of(first, batch, config, 4))


def test_building_a_model_leaves_the_global_generator_alone(table: str) -> None:
    torch.manual_seed(1)
    expected = torch.randn(1)
    torch.manual_seed(1)
    build_model(_config(table), "aca", datasets.load(table))
    assert torch.equal(torch.randn(1), expected)


def test_training_improves_the_score_and_the_history_is_complete(table: str) -> None:
    config = _config(table, iterations=20, evaluate_every=5, batch_size=96, learning_rate=0.03)
    session = Session(config, "symplectic", datasets.load(table))
    while not session.finished:
        session.step()
    history = session.history
    assert [iteration for iteration, _ in history.validation] == [0, 5, 10, 15, 20]
    assert history.validation[-1][1] < history.validation[0][1] - 0.1
    columns = (history.seconds, history.evaluations, history.products, history.accepted)
    assert all(len(column) == 20 for column in columns)
    assert min(history.products) > 0
    score, trace = session.test()
    assert trace == "exact"
    assert score < summarise(session.data).standard_normal_nll


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(_config(table), "backprop", datasets.load(table))
    session.step()
    before = {name: p.clone() for name, p in session.model.state_dict().items()}
    monkeypatch.setattr(
        "symplectic_adjoint.experiments.train.negative_log_likelihood",
        lambda flow: flow.z.sum() * float("nan"),
    )
    with pytest.raises(TrainingError, match=r"loss is nan at iteration 2.*--learning-rate"):
        session.step()
    after = session.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert session.iteration == 1


@pytest.fixture(scope="module")
def straight(table: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Results]:
    """A run that nothing stopped."""
    comparison = Comparison.start(_config(table), tmp_path_factory.mktemp("runs") / "straight")
    return comparison, comparison.run(Silent())


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("stops", [[1], [4, 3], [11, 1]])
def test_a_stopped_run_continues_bit_for_bit(
    straight: tuple[Comparison, Results], tmp_path: Path, stops: list[int]
) -> None:
    reference, expected = straight
    Comparison.start(reference.config, tmp_path)
    for calls in stops:
        with pytest.raises(RunInterruptedError):
            Comparison.resume(tmp_path).run(Silent(), _stop_after(calls))
    resumed = Comparison.resume(tmp_path)
    results = resumed.run(Silent())
    for ours, theirs in zip(results.strategies, expected.strategies, strict=True):
        for name, value in _parameters(reference.folder, ours.name).items():
            assert torch.equal(value, _parameters(resumed.folder, ours.name)[name])
        assert ours.test_nll == theirs.test_nll
        assert ours.history.nll == theirs.history.nll
        assert ours.history.validation == theirs.history.validation
        assert ours.cost == theirs.cost


@pytest.mark.usefixtures("no_figures")
def test_a_run_can_be_stopped_while_it_measures(table: str, tmp_path: Path) -> None:
    config = _config(table, iterations=1)
    comparison = Comparison.start(config, tmp_path)
    with pytest.raises(RunInterruptedError):
        comparison.run(Silent(), _stop_after(3))
    assert comparison.folder.measurement("backprop").exists()
    assert not comparison.folder.measurement("symplectic").exists()
    observer = Silent()
    results = Comparison.resume(tmp_path).run(observer)
    assert observer.steps == 2  # each session was only announced
    assert all(result.cost is not None for result in results.strategies)


def test_changed_data_are_not_resumed(table: str, tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    array = np.load(table)
    np.save(path, array)
    Comparison.start(_config(str(path)), tmp_path / "run")
    array[0, 0] += 1
    np.save(path, array)
    with pytest.raises(ConfigError, match="are not those that the run"):
        Comparison.resume(tmp_path / "run")


def test_epochs_are_turned_into_iterations(table: str, tmp_path: Path) -> None:
    config = Comparison.start(_config(table, batch_size=20), tmp_path, epochs=3).config
    assert config.iterations == 3 * (96 // 20)


# --- measuring and reporting


def test_exact_strategies_are_exact_and_the_others_are_not(
    finished: tuple[Comparison, Results],
) -> None:
    _, results = finished
    assert [result.name for result in results.strategies if not result.exact] == ["continuous"]
    for result in results.strategies:
        assert result.cost is not None
        error = result.cost.gradient_error_float64
        assert (error < 1e-12) is result.exact
        assert 1e-9 < result.cost.gradient_error < (1e-5 if result.exact else 1.0)


def test_costs_are_those_of_each_strategy(finished: tuple[Comparison, Results]) -> None:
    _, results = finished
    cost = {result.name: result.cost for result in results.strategies}
    assert all(c is not None and c.peak_memory > 0 and c.accepted > 0 for c in cost.values())
    backprop, symplectic = cost["backprop"], cost["symplectic"]
    assert backprop is not None
    assert symplectic is not None
    assert symplectic.peak_memory < 0.5 * backprop.peak_memory
    assert backprop.backward_evaluations == 0
    assert symplectic.products > 0
    assert symplectic.accepted == backprop.accepted
    steps = cost["symplectic-steps"]
    assert steps is not None
    assert steps.backward_evaluations > symplectic.backward_evaluations
    assert [result.method for result in results.strategies] == ["dopri5"] * 6 + ["alf"]
    assert [result.own_solver for result in results.strategies] == [False] * 6 + [True]


def test_exact_strategies_with_one_solver_learn_the_same(
    finished: tuple[Comparison, Results],
) -> None:
    _, results = finished
    scores = [s.test_nll for s in results.strategies if s.exact and not s.own_solver]
    assert len(scores) == 5
    assert scores == pytest.approx([scores[0]] * 5, abs=1e-4)


def test_the_sweep_tells_memory_at_growing_numbers_of_steps(
    finished: tuple[Comparison, Results],
) -> None:
    _, results = finished
    sweep = {result.name: result.sweep for result in results.strategies}
    assert [point.tolerance for point in sweep["backprop"]] == [1e-2, 1e-6]
    growth = {}
    for name, (loose, tight) in sweep.items():
        assert loose.steps is not None
        assert tight.steps is not None
        assert loose.peak_memory is not None
        assert tight.peak_memory is not None
        assert tight.steps > loose.steps
        growth[name] = (tight.peak_memory / loose.peak_memory) / (tight.steps / loose.steps)
    assert growth["mali"] < growth["symplectic"] < growth["backprop"]


def test_a_sweep_stops_at_the_tolerance_that_needs_too_many_steps(table: str) -> None:
    config = _config(table, strategies=("mali",))
    model = build_model(config, "mali", datasets.load(table))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    batch = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    probe = Probe(model.state_dict(), batch, noise_of(model, batch, config, 0))
    points = sweep_memory(model, probe, (1e-2, 1e-12, 1e-13))
    assert points[0].steps is not None
    assert points[0].steps < SWEEP_STEPS
    assert [point.steps for point in points[1:]] == [None, None]


@pytest.mark.usefixtures("no_figures")
def test_methods_without_step_size_control_run_on_fixed_steps(table: str, tmp_path: Path) -> None:
    config = _config(table, method="rk4", step_size=0.25, iterations=2, sweep=(1e-2,))
    results = Comparison.start(config, tmp_path).run(Silent())
    for result in results.strategies:
        assert result.history.accepted == [4, 4]
        assert result.sweep == ()
        assert result.cost is not None
        assert result.cost.gradient_error_float64 < 1e-12


@pytest.mark.usefixtures("no_figures")
def test_a_strategy_that_fails_is_reported_and_the_others_go_on(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Session.step

    def failing(self: Session) -> None:
        if self.strategy == "backprop" and self.iteration == 2:
            raise TrainingError("the loss is nan")
        step(self)

    monkeypatch.setattr(Session, "step", failing)
    comparison = Comparison.start(_config(table), tmp_path)
    observer = Silent()
    results = comparison.run(observer)
    failed, fine = results.strategies
    assert observer.failures == {"backprop": "the loss is nan"}
    assert failed.error == "the loss is nan"
    assert failed.cost is None
    assert len(failed.history.nll) == 2
    assert fine.cost is not None
    assert results.probe == "symplectic"
    assert "backprop stopped early: the loss is nan" in notes(results)
    assert row(failed)[3:7] == ("-",) * 4
    assert "stopped early" in comparison.folder.report.read_text()


def test_results_are_complete_in_json(finished: tuple[Comparison, Results]) -> None:
    comparison, results = finished
    content = json.loads(comparison.folder.results.read_text())
    assert CompareConfig.from_dict(content["config"]) == comparison.config
    assert content["data"]["rows"] == [96, 12, 12]
    assert content["data"]["fingerprint"] == comparison.data.fingerprint()
    assert {"python", "torch", "processor", "cores", "threads"} <= set(content["environment"])
    assert content["probe"] == "backprop"
    for entry, result in zip(content["strategies"], results.strategies, strict=True):
        assert entry["name"] == result.name
        assert entry["history"]["nll"] == result.history.nll
        assert len(entry["history"]["seconds"]) == comparison.config.iterations
        assert result.cost is not None
        assert entry["cost"]["peak_memory"] == result.cost.peak_memory


def test_the_report_holds_everything_in_one_file(finished: tuple[Comparison, Results]) -> None:
    comparison, results = finished
    page = comparison.folder.report.read_text()
    images = sorted(path.stem for path in comparison.folder.figures.glob("*.png"))
    assert images == ["costs", "densities", "learning_curves", "memory_against_steps"]
    assert page.count("src='data:image/png;base64,") == len(images)
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page)
    for result in results.strategies:
        assert f"<td>{result.name}</td>" in page
    assert command(comparison.config).replace("'", "&#x27;") in page
    assert all(path.read_bytes().startswith(PNG) for path in comparison.folder.figures.iterdir())


def test_the_table_says_what_a_reader_must_know(finished: tuple[Comparison, Results]) -> None:
    _, results = finished
    rows = [row(result) for result in results.strategies]
    assert all(len(cells) == len(HEADINGS) for cells in rows)
    assert rows[-1][:3] == ("mali", "alf*", "yes")
    assert rows[-2][:3] == ("continuous", "dopri5", "no")
    text = "\n".join(notes(results))
    assert "* mali runs with its own solver, alf" in text
    assert "at the weights trained under backprop" in text
    said = "\n".join(findings(results))
    assert "a Gaussian with full covariance scores" in said
    assert "(with another solver, alf)" in said
    assert said.count("times backprop's peak memory") == 6


@pytest.mark.usefixtures("no_figures")
def test_names_from_the_user_are_escaped_in_the_report(table: str, tmp_path: Path) -> None:
    path = tmp_path / "<b>&.npy"
    np.save(path, np.load(table))
    config = _config(str(path), iterations=1, strategies=("backprop",))
    comparison = Comparison.start(config, tmp_path / "run")
    comparison.run(Silent())
    page = comparison.folder.report.read_text()
    assert "&lt;b&gt;&amp;.npy" in page
    assert "<b>" not in page


def test_the_summary_scores_gaussian_data_by_the_gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.9], [0.0, 0.3]], dtype=torch.float64)
    rows = torch.randn(20_000, 2, dtype=torch.float64, generator=generator) @ mixing
    data = make_dataset("gaussian", rows, seed=0)
    summary = summarise(data)
    covariance = mixing.T @ mixing
    truth = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance)
    original = -float(truth.log_prob(data.restore(data.test)).mean())
    assert summary.gaussian_nll == pytest.approx(original - data.log_scale, abs=5e-3)
    assert summary.standard_normal_nll > summary.gaussian_nll + 0.5


def test_the_summary_has_no_gaussian_where_columns_depend_on_each_other() -> None:
    column = torch.randn(60, 1, dtype=torch.float64)
    assert summarise(make_dataset("copies", column.expand(60, 2), seed=0)).gaussian_nll is None


def test_the_heat_map_is_the_density_in_the_original_coordinates(table: str) -> None:
    data: Dataset = datasets.load(table)
    model = build_model(_config(table), "backprop", datasets.load(table))
    low, high = data.mean - 6 * data.scale, data.mean + 6 * data.scale
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    density = plots.density_map(data, model, extent)
    cell = float((high - low).prod()) / density.numel()
    assert float(density.sum()) * cell == pytest.approx(1.0, abs=1e-3)
    assert model.trace == "hutchinson"


def test_images_get_a_figure_of_samples(tmp_path: Path) -> None:
    data = datasets.load("digits")
    config = _config("digits", iterations=1, strategies=("backprop",))
    model = build_model(config, "backprop", data)
    with plots.style():
        figure = plots.samples(data, (8, 8), {"backprop": model})
    assert plots.png(figure).startswith(PNG)
    assert len(figure.axes) == 20


# --- flows of images


def test_a_flow_of_images_is_trained_on_pixels_between_zero_and_one() -> None:
    config = CompareConfig(
        model="conv",
        hidden=(2,),
        blocks=1,
        batch_size=8,
        iterations=1,
        rtol=1e-2,
        atol=1e-2,
        max_steps=50,
    )
    data = datasets.load("digits")
    data = prepared(replace(data, validation=data.validation[:8]), config)
    assert data.log_scale == 0
    session = Session(config, "symplectic", data)
    session.step()
    assert isinstance(session.model, ImageCNF)
    assert session.model.solver.controller == Adaptive(max_steps=50)
    assert session.history.validation[1][1] < session.history.validation[0][1]


def test_a_flow_of_images_needs_images(table: str) -> None:
    with pytest.raises(ConfigError, match="model='conv' needs images"):
        Session(_config(table, model="conv"), "symplectic", datasets.load(table))


def test_more_processes_than_rows_are_refused(table: str) -> None:
    with pytest.raises(ConfigError, match="batch or split of 2 rows is too small for 4 processes"):
        Session(_config(table, batch_size=2), "aca", datasets.load(table), World(0, 4))
