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
    neuron, _, misses = load(EXAMPLES / "integrate_and_fire.py").fit()
    assert misses[0] > 0.1
    assert misses[-1] < 1e-10
    assert abs(neuron.current.item() - 0.6) < 1e-10
    assert abs(neuron.tau.item() - 2.0) < 1e-10


def test_integrate_and_fire_example_has_exact_derivatives_through_the_spikes() -> None:
    checked = load(EXAMPLES / "integrate_and_fire.py").check(count=4, sizes=(1e-3, 1e-5))
    assert checked.exact < 1e-10
    assert checked.differences[1e-3] == pytest.approx(1e4 * checked.differences[1e-5], rel=0.2)
    assert checked.differences[1e-5] > 10 * checked.exact


def test_steady_state_example_compares_with_the_closed_form() -> None:
    example = load(EXAMPLES / "steady_state.py")
    exact, *unrolled = example.compare(spans=(3.0, 30.0), rtols=(1e-6,))
    assert exact.error < 1e-12
    for short, long in (unrolled[:2], unrolled[2:]):
        assert short.way == long.way
        assert short.error > 0.1
        assert 1e-4 < long.error < 0.1
        assert long.calls > 2 * short.calls
    by_symplectic, by_backprop = unrolled[1], unrolled[3]
    assert by_backprop.memory > 2 * by_symplectic.memory
    slope = float(example.gradients(example.implicit)[1][0])
    assert example.difference(0) == pytest.approx(slope, rel=1e-6)


def test_images_example_restores_new_digits_with_less_memory() -> None:
    example = load(EXAMPLES / "restore_images.py")
    flow, losses = example.train(iterations=40)
    _, new = example.measured()
    few = example.rows(new, 100)
    before = example.psnr(example.blurred(few.values), few.truth)
    assert losses[-1] < 0.7 * losses[0]
    assert example.psnr(flow(few).detach(), few.truth) > before + 3
    assert example.memory(flow, few, "backprop") > 3 * example.memory(flow, few, "symplectic")


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
    found = example.fit(example.measured(), iterations=8)
    guess = example.angles(example.GUESS) - example.measured()
    assert float(guess.square().mean().sqrt()) > 10 * example.NOISE
    assert found.misfit[-1] < 1.1 * example.NOISE
    assert float((found.parameters - example.TRUE).abs()[:4].max()) < 0.02
