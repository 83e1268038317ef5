"""What the documentation shows runs, and gives what it says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests import markdown

PAGES = sorted((markdown.ROOT / "docs").rglob("*.md"))
EXAMPLES = markdown.ROOT / "examples"


# Lightning asks torch for the kind of a tree in a way that torch deprecates.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    markdown.run(page)


def load(path: Path) -> ModuleType:
    """A script as a module, without running its command line."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_example_learns() -> None:
    losses = load(EXAMPLES / "train_neural_ode.py").train(iterations=60, batch=16)
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])


def test_integrate_and_fire_example_recovers_the_neuron() -> None:
    neuron, misses = load(EXAMPLES / "integrate_and_fire.py").fit()
    assert misses[0] > 0.1
    assert misses[-1] < 1e-10
    assert abs(neuron.current.item() - 0.6) < 1e-10
    assert abs(neuron.tau.item() - 2.0) < 1e-10


def test_digits_example_learns() -> None:
    _, accuracies = load(EXAMPLES / "digits_classifier.py").train(epochs=2)
    assert accuracies[-1] > 0.6


def test_latent_ode_example_learns_to_continue_series() -> None:
    example = load(EXAMPLES / "latent_ode.py")
    new = example.oscillations(64, seed=2)
    _, untrained = example.errors(example.LatentODE(), new)
    model, bounds = example.train(iterations=100)
    within, beyond = example.errors(model, new)
    assert bounds[-1] < 0.15 * bounds[0]
    assert within < 0.35
    assert beyond < 0.9 * untrained


def test_assimilation_example_recovers_the_initial_field() -> None:
    analysis = load(EXAMPLES / "data_assimilation.py").assimilate(iterations=12)
    before, after = analysis.errors()
    assert after[0] < 0.4 * before[0]
    assert after[-1] < 0.1 * before[-1]


def test_pendulum_example_identifies_the_pendulum() -> None:
    example = load(EXAMPLES / "pendulum_identification.py")
    found = example.fit(example.measured())
    guess = example.angles(example.GUESS) - example.measured()
    assert float(guess.square().mean().sqrt()) > 10 * example.NOISE
    assert found.misfit[-1] < 1.1 * example.NOISE
    assert float((found.parameters - example.TRUE).abs()[:4].max()) < 0.02
