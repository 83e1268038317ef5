"""Physical systems: what their equations keep, what networks of energies keep, and the study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from symplectic_adjoint import gradients
from symplectic_adjoint.datasets import DataError, physics
from symplectic_adjoint.datasets.physics import FieldEquation, Mechanics
from symplectic_adjoint.experiments.config import ConfigError
from symplectic_adjoint.experiments.physics import PhysicsStudy, Training, _correlation, network
from symplectic_adjoint.experiments.sweep import Sweep
from symplectic_adjoint.models import (
    ConvEnergy,
    EnergyPDE,
    Hamiltonian,
    SeparableHamiltonian,
    mlp,
)
from symplectic_adjoint.models.pde import derivative, laplacian

SYSTEMS = {name: physics.get(name) for name in physics.names()}
MECHANICAL = [name for name, s in SYSTEMS.items() if isinstance(s, Mechanics)]
FIELDS = [name for name, s in SYSTEMS.items() if isinstance(s, FieldEquation)]


@pytest.mark.parametrize("name", MECHANICAL)
def test_trajectories_of_mechanical_systems_keep_their_energy(name: str) -> None:
    system = SYSTEMS[name]
    data = system.simulate(count=3, snapshots=11, seed=4)
    energy = system.energy(data.y)
    assert float((data.y[1:] - data.y[:-1]).abs().max()) > 0.05
    assert float((energy - energy[0]).abs().max()) < 1e-9
    exact = sa.solve(system.field, data.y[0], data.t, method="dopri8", rtol=1e-10, atol=1e-10).y
    assert float((data.y - exact).detach().abs().max()) < 1e-7


def test_fields_of_the_kdv_equation_keep_energy_and_mass() -> None:
    system = physics.korteweg_de_vries()
    data = system.simulate(count=3, snapshots=4, seed=1)
    energy, mass = system.energy(data.y), system.mass(data.y)
    assert float((data.y[1:] - data.y[:-1]).abs().max()) > 0.05
    assert float(((energy - energy[0]) / energy[0]).abs().max()) < 1e-12
    assert float(((mass - mass[0]) / mass[0]).abs().max()) < 1e-12


def test_fields_of_the_cahn_hilliard_equation_lose_energy_and_keep_mass() -> None:
    system = physics.cahn_hilliard()
    data = system.simulate(count=3, snapshots=6, seed=1)
    energy, mass = system.energy(data.y), system.mass(data.y)
    assert bool((energy.diff(dim=0) < 0).all())
    assert float(energy[-1].mean()) < 0.9 * float(energy[0].mean())
    assert float((mass - mass[0]).abs().max()) < 1e-13


@pytest.mark.parametrize(("name", "bound"), [("kdv", 4e-4), ("cahn-hilliard", 1e-5)])
def test_the_reference_solver_solves_the_equation(name: str, bound: float) -> None:
    system = SYSTEMS[name]
    data = system.simulate(count=1, snapshots=2, seed=3)
    exact = sa.solve(system.field, data.y[0], data.t, method="radauIIA5", rtol=1e-7, atol=1e-8).y
    assert float((data.y - exact).detach().abs().max()) < bound


def test_a_soliton_travels_at_its_speed() -> None:
    """``c / 2 sech^2(sqrt(c) / 2 (x - c t))`` solves the equation; the grid slows it a little."""
    system = physics.korteweg_de_vries(points=200, length=20.0)
    x, c = system.x - 10, 2.0
    advance = physics._AverageVectorField(system, 0.001)
    u = (c / 2 / torch.cosh(c**0.5 / 2 * x) ** 2).unsqueeze(0)
    for _ in range(250):
        u = advance(u)
    wanted = c / 2 / torch.cosh(c**0.5 / 2 * (x - 0.25 * c)) ** 2
    assert float((u - wanted).abs().max()) < 0.01


def test_a_step_too_long_for_the_iteration_is_refused() -> None:
    system = physics.korteweg_de_vries()
    u = 50 * system.simulate(count=1, snapshots=2).y[0]
    with pytest.raises(DataError, match="smaller steps"):
        physics._AverageVectorField(system, 0.5)(u)


def test_an_unknown_system_is_answered_with_the_nearest() -> None:
    with pytest.raises(sa.UnknownNameError, match="'pendulum'"):
        physics.get("pendulm")


# Networks ----------------------------------------------------------------------------------------


def test_operators_are_those_of_the_textbook() -> None:
    x = torch.arange(64, dtype=torch.float64) * (2 * torch.pi / 64)
    dx = float(x[1])
    assert float((derivative(torch.sin(x), dx) - torch.cos(x)).abs().max()) < 2e-3
    assert float((laplacian(torch.sin(x), dx) + torch.sin(x)).abs().max()) < 1e-3
    matrix = derivative(torch.eye(8, dtype=torch.float64), 0.1)
    assert torch.equal(matrix, -matrix.T)
    matrix = laplacian(torch.eye(8, dtype=torch.float64), 0.1)
    assert float(torch.linalg.eigvalsh(matrix).max()) < 1e-10


def test_the_energy_of_a_network_is_kept_whatever_its_weights() -> None:
    torch.manual_seed(0)
    y = torch.randn(5, 4)
    for field in (Hamiltonian(mlp(4, 8, 1)), SeparableHamiltonian(mlp(2, 8, 1), mlp(2, 8, 1))):
        field.double()
        energy = lambda y, e=field.energy: e(y).reshape(len(y))  # noqa: E731
        sol = sa.solve(field, y.double(), [0.0, 2.0], rtol=1e-9, atol=1e-9).y
        assert float((sol[-1] - sol[0]).detach().abs().max()) > 1e-3
        assert float((energy(sol[-1]) - energy(sol[0])).detach().abs().max()) < 1e-8


@pytest.mark.parametrize("structure", ["derivative", "laplacian"])
def test_networks_of_fields_keep_mass_and_conserve_or_lose_energy(structure: Any) -> None:
    torch.manual_seed(0)
    field = EnergyPDE(ConvEnergy(8, 0.3), structure, 0.3).double()
    u = torch.randn(3, 20, dtype=torch.float64)
    y = sa.solve(field, u, [0.0, 0.5], rtol=1e-9, atol=1e-9).y.detach()
    energy = field.energy(y)
    assert float((y[-1] - y[0]).abs().max()) > 1e-2
    assert float((y[-1] - y[0]).sum(-1).abs().max()) < 1e-12
    if structure == "derivative":
        assert float((energy[-1] - energy[0]).detach().abs().max()) < 1e-8
    else:
        assert bool((energy[-1] < energy[0]).all())


def dynamics(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    if kind == "general":
        return Hamiltonian(mlp(4, 6, 1)).double(), torch.randn(3, 4, dtype=torch.float64)
    if kind == "separable":
        field = SeparableHamiltonian(mlp(2, 6, 1), mlp(2, 6, 1))
        return field.double(), torch.randn(3, 4, dtype=torch.float64)
    field = EnergyPDE(ConvEnergy(6, 0.4), "derivative", 0.4)
    return field.double(), torch.randn(3, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "method", "strategy"),
    [
        (kind, method, strategy)
        for kind, method in (
            ("general", "midpoint"),
            ("separable", "verlet"),
            ("field", "midpoint"),
        )
        for strategy in gradients.names()
        if gradients.get(strategy).exact
    ]
    + [("general", "gl4", "symplectic"), ("general", "gl4", "aca")],
)
def test_a_network_that_differentiates_has_exact_gradients_under_every_strategy(
    kind: str, method: str, strategy: str
) -> None:
    if strategy == "mali":
        method = "alf"
    field, y0 = dynamics(kind)
    y0.requires_grad_()
    inputs = [y0, *field.parameters()]
    t = torch.linspace(0.0, 0.6, 4, dtype=torch.float64)

    def gradient(name: str) -> list[Tensor]:
        controller = sa.FixedGrid()
        y = sa.solve(field, y0, t, method=method, gradient=name, controller=controller).y
        weight = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)
        grads = torch.autograd.grad((weight * y).sum(), inputs, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]

    for got, wanted in zip(gradient(strategy), gradient("backprop"), strict=True):
        size = float(wanted.norm()) or 1.0
        assert float((got - wanted).norm()) <= 1e-12 * size


def test_shapes_and_names_are_checked() -> None:
    with pytest.raises(sa.ArgumentError, match=r"shape \(3,\)"):
        Hamiltonian(mlp(3, 4, 1))(torch.tensor(0.0), torch.ones(3))
    with pytest.raises(sa.UnknownNameError, match="laplacian"):
        EnergyPDE(ConvEnergy(4, 0.1), "laplacien", 0.1)  # type: ignore[arg-type]
    with pytest.raises(sa.ArgumentError, match="odd"):
        ConvEnergy(4, 0.1, kernel=4)
    with pytest.raises(sa.ArgumentError, match="positive"):
        EnergyPDE(ConvEnergy(4, 0.1), "laplacian", 0.0)


# The study ---------------------------------------------------------------------------------------


class Silent:
    def measuring(self, done: int, total: int, what: str) -> None:
        pass


TINY = PhysicsStudy(
    systems=("cahn-hilliard", "pendulum"),
    strategies=("backprop", "symplectic"),
    methods=("dopri5", "verlet"),
    models=("energy", "plain"),
    iterations=3,
    batch=4,
    width=4,
    trajectories=2,
    snapshots=4,
    horizon=5,
)


def test_the_study_writes_the_papers_table_and_figures(tmp_path: Path) -> None:
    sweep = Sweep(TINY, tmp_path / "run")
    sweep.prepare(resume=False, overwrite=False)
    records = sweep.run(Silent())
    # verlet: for the learned energy of the pendulum alone.
    assert len(records) == 2 * (2 + 2 + 1)
    assert {r.status for r in records.values()} == {"ok"}
    rows = json.loads((sweep.report / "physics-costs.json").read_text())["rows"]
    assert [row["strategy"] for row in rows] == ["backprop", "symplectic"] * 5
    for backprop, symplectic in zip(rows[::2], rows[1::2], strict=True):
        # The same training up to rounding in float32, the same steps, twice the evaluations.
        assert backprop["one-step error"] == pytest.approx(symplectic["one-step error"], rel=1e-3)
        assert backprop["steps"] == symplectic["steps"]
        assert backprop["evaluations"] < symplectic["evaluations"]
    fields = json.loads((sweep.report / "physics-cahn-hilliard.json").read_text())["rows"]
    for row in fields:
        assert (row["mass error"] < 1e-12) == (row["model"] == "energy")
    text = (sweep.report / "index.md").read_text()
    assert "times the memory of symplectic" in text
    for name in ("cahn-hilliard-energy", "cahn-hilliard-fields", "pendulum-energy"):
        assert (sweep.report / f"{name}.png").stat().st_size > 10_000
        assert f"]({name}.png)" in text


@pytest.mark.parametrize("name", ["kdv", "henon-heiles"])
def test_an_energy_is_compared_beside_what_moves_nothing(name: str) -> None:
    system = SYSTEMS[name]
    y = system.simulate(count=6, snapshots=2).y

    class Learned(nn.Module):
        def energy(self, y: Tensor) -> Tensor:
            mass = y.sum(-1) if isinstance(system, FieldEquation) else 0.0
            return 0.5 * system.energy(y) - 30 * mass + 7

    class Wrong(nn.Module):
        def energy(self, y: Tensor) -> Tensor:
            return torch.sin(40 * y).sum(-1)

    right, wrong = (_correlation(model, system, y) for model in (Learned(), Wrong()))
    assert right == pytest.approx(1.0, abs=1e-9)
    assert wrong is not None
    assert abs(wrong) < 0.9


def test_a_restored_training_goes_on_to_the_last_bit() -> None:
    cell = TINY.cells()[-1].settings
    straight, stopped, restored = (Training(TINY, **cell) for _ in range(3))
    for _ in range(3):
        straight.step()
    stopped.step()
    restored.restore(stopped.state())
    for _ in range(2):
        restored.step()
    for a, b in zip(straight.model.parameters(), restored.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert restored.finished


def test_a_little_training_lowers_the_error_of_a_step() -> None:
    study = PhysicsStudy(
        systems=("mass-spring",), iterations=40, width=16, learning_rate=2e-2, horizon=6
    )
    training = Training(study, "mass-spring", "energy", "verlet", "symplectic")
    before = training.scores()["one_step_error"]
    while not training.finished:
        training.step()
    assert training.scores()["one_step_error"] < 0.1 * before


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    a = network(SYSTEMS["pendulum"], "energy", 4, seed=2)
    torch.manual_seed(6)
    b = network(SYSTEMS["pendulum"], "energy", 4, seed=2)
    assert isinstance(a, SeparableHamiltonian)
    assert isinstance(network(SYSTEMS["double-pendulum"], "energy", 4, seed=2), Hamiltonian)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


def test_settings_of_the_study_are_checked() -> None:
    with pytest.raises(sa.UnknownNameError, match="pendulum"):
        PhysicsStudy(systems=("pendulums",))
    with pytest.raises(sa.UnknownNameError, match="energy"):
        PhysicsStudy(models=("energie",))
    with pytest.raises(ConfigError, match="at least 2"):
        PhysicsStudy(horizon=1)
