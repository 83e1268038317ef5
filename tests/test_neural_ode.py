"""The solution of an initial value problem as a layer."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import symplectic_adjoint as sa
from tests import problems

SETTINGS: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def layer(**options: Any) -> sa.NeuralODE:
    return sa.NeuralODE(problems.Net(), **{**SETTINGS, **options})


def state(*shape: int) -> Tensor:
    return torch.randn(*shape or (4, 3), dtype=torch.float64)


def classifier(gradient: str = "symplectic") -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    ode = sa.NeuralODE(sa.Autonomous(net), gradient=gradient, **SETTINGS)
    return nn.Sequential(nn.Linear(5, 3), ode, nn.Linear(3, 2)).double()


def gradients(model: nn.Module, x: Tensor, params: Iterable[Tensor] | None = None) -> list[Tensor]:
    loss = model(x).square().sum()
    return list(torch.autograd.grad(loss, list(params or model.parameters())))


def assert_equal(got: Iterable[Tensor], wanted: Iterable[Tensor], bound: float = 1e-12) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert problems.size(b) > 0
        assert problems.relative_error(a, b) <= bound


def test_it_gives_the_last_state_and_its_trajectory_all_of_them() -> None:
    ode, y0, t = layer(), state(), torch.linspace(0.2, 2.0, 7)
    y = sa.odeint(ode.func, y0, t, **SETTINGS)
    assert torch.equal(ode.trajectory(y0, t), y)
    assert torch.equal(ode(y0, t), y[-1])
    assert torch.equal(ode(y0), ode(y0, [0.0, 1.0]))
    assert torch.equal(layer(t=t)(y0), y[-1])
    assert torch.equal(layer(t=t).trajectory(y0), y)


def test_settings_are_those_of_the_solver_and_may_be_changed() -> None:
    ode, y0 = layer(method="rk4", controller=sa.FixedGrid(step_size=0.25)), state()
    assert ode.stats is None
    ode(y0)
    assert ode.stats is not None
    assert (ode.stats.accepted, ode.stats.evaluations) == (4, 16)
    sol = ode.solve(y0, [0.0, 2.0], method="midpoint", dense=True)
    assert sol.stats is ode.stats
    assert (sol.stats.accepted, sol.stats.evaluations) == (8, 16)
    assert sol.dense(1.0).shape == y0.shape
    ode.options["controller"] = sa.FixedGrid(step_size=0.5)
    ode(y0).sum().backward()
    assert (ode.stats.accepted, ode.stats.products) == (2, 8)


def test_a_state_may_be_a_tree_and_further_arguments_are_handed_on() -> None:
    ode = sa.NeuralODE(problems.Coupled(), **SETTINGS)
    y0 = {"fast": state(), "slow": [state(1)[0], state(2)]}
    gain = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    y = ode(y0, args=(gain,))
    whole = sa.solve(lambda t, y: ode.func(t, y, gain), y0, [0.0, 1.0], **SETTINGS).y
    assert y["fast"].shape == (4, 3)
    assert torch.equal(y["slow"][1], whole["slow"][1][-1])
    (grad,) = torch.autograd.grad(problems.loss(y), gain)
    (wanted,) = torch.autograd.grad(
        problems.loss([x[-1] for x in (whole["fast"], *whole["slow"])]), gain
    )
    assert_equal([grad], [wanted])


def test_gradients_of_a_sequential_model_are_those_of_backprop() -> None:
    x = state(6, 5)
    assert_equal(gradients(classifier(), x), gradients(classifier("backprop"), x))


def test_a_span_that_is_a_parameter_gets_its_gradient() -> None:
    span = nn.Parameter(torch.tensor([0.2, 1.3], dtype=torch.float64))
    ode, backprop = layer(t=span), layer(t=span, gradient="backprop")
    assert "t" in dict(ode.named_parameters())
    y0 = state()
    got, wanted = gradients(ode, y0, [span]), gradients(backprop, y0, [span])
    assert_equal(got, wanted)
    end = ode(y0)
    moved = (2 * end * ode.func(span[1], end)).sum()  # d/dT of sum(y(T)^2)
    assert float(got[0][1]) == pytest.approx(moved.item(), rel=1e-3)


def test_a_copy_has_weights_of_its_own_even_after_a_solve() -> None:
    model, x = classifier(), state(6, 5)
    wanted = gradients(model, x)
    for clone in (copy.deepcopy(model), pickled(model)):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        assert_equal(gradients(clone, x), wanted, bound=0.0)
        model.load_state_dict(clone.state_dict())
        assert_equal(gradients(model, x), wanted, bound=0.0)
    assert clone[1].stats.products > 0
    assert list(model[1].state_dict()) == [
        f"func.net.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    ]


def pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_it_follows_its_module_to_another_dtype() -> None:
    model = classifier().float()
    assert model(torch.randn(6, 5)).dtype == torch.float32


def test_printing_shows_the_settings() -> None:
    text = repr(layer(method="bosh3", gradient=sa.Symplectic(store="steps")))
    first = text.partition("\n")[2].splitlines()[0].strip()
    assert text.startswith("NeuralODE(")
    assert first.startswith("t=(0.0, 1.0), method='bosh3', rtol=0.0001, atol=1e-05, gradient=Symp")
    assert "(func): Net()" in text


def test_functions_without_parameters_will_do() -> None:
    matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    ode = sa.NeuralODE(lambda t, y: y @ matrix, (0.0, torch.pi / 2), rtol=1e-9, atol=1e-9)
    expected = torch.tensor([[-2.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(ode(torch.tensor([[1.0, 2.0]]).double()), expected)


def test_parameters_that_the_module_would_not_list_are_refused() -> None:
    net = nn.Linear(3, 3)
    with pytest.raises(
        sa.ArgumentError, match=r"on the parameter func:net.weight of shape \(3, 3\)"
    ):
        sa.NeuralODE(lambda t, y: net(y))
    with pytest.raises(sa.ArgumentError, match=r"net is no module, but depends on the parameter"):
        sa.Autonomous(lambda y: net(y))
    with pytest.raises(sa.ArgumentError, match=r"func = 3 is neither a module nor a function"):
        sa.NeuralODE(3)  # type: ignore[arg-type]
    with pytest.raises(sa.ArgumentError, match=r"func = <class .*Net'> is neither a module"):
        sa.NeuralODE(problems.Net)


def test_a_misspelt_name_is_found_when_the_module_is_made() -> None:
    with pytest.raises(sa.UnknownNameError, match="unknown method 'rk45'; did you mean 'rk4'"):
        layer(method="rk45")
    with pytest.raises(sa.UnknownNameError, match="did you mean 'symplectic'"):
        layer(gradient="simplectic")
    with pytest.raises(sa.ArgumentError, match="alf"):
        layer(method="rk4", gradient="mali")


def test_a_network_of_the_state_alone_is_told_how_to_be_one_of_time() -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(sa.ArgumentError, match=r"sa.Autonomous\(network\)"):
        sa.NeuralODE(net)(torch.randn(2, 3))
    with pytest.raises(sa.ArgumentError, match=r"sa.Autonomous\(network\)"):
        sa.odeint(net, torch.randn(2, 3), [0.0, 1.0])


def test_the_default_gradient_is_that_of_the_method() -> None:
    net = nn.Linear(3, 3).double()
    ode = sa.NeuralODE(sa.Autonomous(net), method="scipy_solver")
    ode(state()).sum().backward()
    assert net.weight.grad is not None
    with pytest.raises(sa.ArgumentError, match="scipy"):
        sa.NeuralODE(sa.Autonomous(net), method="scipy_solver", gradient="symplectic")
