"""Continuous normalizing flows and the networks behind them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.models import CNF, Concat, ConcatSquash, SolverOptions, TimeMLP
from symplectic_adjoint.models.cnf import (
    exact_divergence,
    hutchinson_divergence,
    standard_normal_log_prob,
)

TIGHT = SolverOptions(rtol=1e-9, atol=1e-9)
STRATEGIES = ("backprop", "checkpoint", "aca", "symplectic", "continuous", "mali")


def _flow(dim: int = 3, **options: Any) -> CNF:
    """A flow whose weights are away from the start, where its map is the identity."""
    torch.manual_seed(0)
    flow = CNF(dim, **{"hidden": (8,), "activation": "tanh", "solver": TIGHT, **options}).double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.5)
    return flow


def _rows(count: int, dim: int = 3) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class _Linear(nn.Module):
    """The field A x, whose flow has the log-determinant t tr A."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.a.T


def test_concatsquash_is_its_formula() -> None:
    layer = ConcatSquash(2, 3)
    t, x = torch.tensor(0.7), torch.randn(5, 2)
    affine = x @ layer.linear.weight.T + layer.linear.bias
    gate = 1 / (1 + torch.exp(-(0.7 * layer.gate_slope + layer.gate_offset)))
    torch.testing.assert_close(layer(t, x), affine * gate + 0.7 * layer.shift)


def test_concat_is_an_affine_map_of_the_input_with_time_appended() -> None:
    layer = Concat(2, 3)
    t, x = torch.tensor(0.7), torch.randn(5, 2)
    weight = torch.cat([layer.linear.weight, layer.shift.unsqueeze(1)], dim=1)
    appended = torch.cat([x, t.expand(5, 1)], dim=1)
    torch.testing.assert_close(layer(t, x), appended @ weight.T + layer.linear.bias)


@pytest.mark.parametrize("layer", ["concatsquash", "concat"])
@pytest.mark.parametrize("activation", ["softplus", "tanh"])
def test_a_fresh_network_is_zero_and_every_parameter_can_leave_it(
    layer: Any, activation: Any
) -> None:
    network = TimeMLP(2, (4, 4), layer, activation)
    t, x = torch.tensor(0.3), torch.randn(6, 2)
    assert torch.equal(network(t, x), torch.zeros(6, 2))
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network(t, x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_divergences_match_the_jacobian() -> None:
    x = _rows(4).requires_grad_()
    field = lambda x: torch.sin(x @ torch.arange(9.0).double().reshape(3, 3)) * x  # noqa: E731
    jacobian = torch.stack([torch.autograd.functional.jacobian(field, row) for row in x])
    noise = _rows(4).sign()
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(exact_divergence(field(x), x, False), trace)
    estimate = torch.einsum("ni,nij,nj->n", noise, jacobian, noise)
    torch.testing.assert_close(hutchinson_divergence(noise)(field(x), x, False), estimate)


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_linear_field_gives_the_known_gaussian(blocks: int) -> None:
    a = 0.4 * torch.tensor([[0.3, -1.0], [0.8, 0.5]], dtype=torch.float64)
    flow = CNF(2, blocks=blocks, trace="exact", t1=1.5, solver=TIGHT).double()
    flow.networks = nn.ModuleList(_Linear(a) for _ in range(blocks))
    x = _rows(5, 2)
    forward = torch.matrix_exp(1.5 * blocks * a)
    precision = forward.T @ forward
    gaussian = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), precision_matrix=precision
    )
    torch.testing.assert_close(flow.log_prob(x), gaussian.log_prob(x), rtol=1e-7, atol=1e-7)
    flow_of_x, log_det, _ = flow.transform(x)
    torch.testing.assert_close(flow_of_x, x @ forward.T, rtol=1e-7, atol=1e-7)
    expected = torch.full((5,), 1.5 * blocks * float(a.trace()), dtype=torch.float64)
    torch.testing.assert_close(log_det, expected, rtol=1e-7, atol=1e-7)


def test_the_log_determinant_is_that_of_the_map() -> None:
    flow = _flow(blocks=2, trace="exact", solver=SolverOptions(rtol=1e-7, atol=1e-7))
    x = _rows(2)
    jacobians = [
        torch.autograd.functional.jacobian(lambda r: flow.transform(r.unsqueeze(0)).z[0], row)
        for row in x
    ]
    expected = torch.stack([torch.linalg.slogdet(j).logabsdet for j in jacobians])
    torch.testing.assert_close(flow.transform(x).log_det, expected, rtol=1e-5, atol=1e-5)


def test_the_density_integrates_to_one() -> None:
    flow = _flow(2, trace="exact", solver=SolverOptions(rtol=1e-6, atol=1e-6))
    axis = torch.linspace(-8, 8, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = flow.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=1e-4)


def test_hutchinson_is_unbiased_and_exact_in_one_dimension() -> None:
    flow = _flow(1)
    x = _rows(4, 1)
    exact = copy.deepcopy(flow)
    exact.trace = "exact"
    torch.testing.assert_close(flow.log_prob(x), exact.log_prob(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_has_the_exact_mean(noise: Any) -> None:
    flow = _flow(noise=noise, solver=SolverOptions(rtol=1e-5, atol=1e-5))
    x = _rows(1)
    with torch.no_grad():
        drawn = flow.log_prob(x.expand(4000, 3), flow.draw_noise(x.expand(4000, 3)))
        flow.trace = "exact"
        exact = float(flow.log_prob(x))
    error = float(drawn.std()) / math.sqrt(len(drawn))
    assert float(drawn.std()) > 0.05
    assert float(drawn.mean()) == pytest.approx(exact, abs=5 * error)


def test_noise_is_that_of_its_distribution_and_of_its_seed() -> None:
    x = _rows(1000)
    rademacher, gaussian = _flow(blocks=2), _flow(blocks=2, noise="gaussian")
    drawn = rademacher.draw_noise(x, torch.Generator().manual_seed(7))
    again = rademacher.draw_noise(x, torch.Generator().manual_seed(7))
    assert drawn.shape == (2, 1000, 3)
    assert drawn.dtype == x.dtype
    assert torch.equal(drawn, again)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    normal = gaussian.draw_noise(x, torch.Generator().manual_seed(7))
    assert float(normal.std()) == pytest.approx(1.0, abs=0.05)
    assert len(normal.unique()) > 1000


def test_samples_map_back_to_their_base_samples() -> None:
    flow = _flow(blocks=2, trace="exact")
    samples = flow.sample(6, torch.Generator().manual_seed(3))
    base = torch.randn(6, 3, generator=torch.Generator().manual_seed(3)).double()
    assert not samples.requires_grad
    torch.testing.assert_close(flow.transform(samples).z, base, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_every_strategy_match_backprop_on_the_same_steps(
    strategy: str, trace: Any
) -> None:
    solver = SolverOptions(None, 1e-4, 1e-4, strategy)
    flow = _flow(blocks=2, trace=trace, solver=solver)
    x, noise = _rows(5), flow.draw_noise(_rows(5), torch.Generator().manual_seed(0))
    solution = flow.transform(x, noise)
    (standard_normal_log_prob(solution.z) + solution.log_det).mean().backward()
    exact = copy.deepcopy(flow)
    exact.zero_grad()
    method = "alf" if strategy == "mali" else "dopri5"
    exact.solver = replace(solver, method=method, gradient="backprop")
    replayed = exact.transform(x, noise, [s.steps for s in solution.solutions])
    (standard_normal_log_prob(replayed.z) + replayed.log_det).mean().backward()
    torch.testing.assert_close(replayed.z, solution.z)
    tolerance = 1e-2 if strategy == "continuous" else 1e-11
    for ours, reference in zip(flow.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        distance = torch.linalg.vector_norm(ours.grad - reference.grad)
        assert distance <= tolerance * torch.linalg.vector_norm(reference.grad)


def test_a_trained_flow_fits_better_than_its_base() -> None:
    torch.manual_seed(0)
    rows = torch.randn(256, 2) * torch.tensor([0.3, 1.5]) + torch.tensor([1.0, -0.5])
    flow = CNF(2, hidden=(16,), solver=SolverOptions(rtol=1e-3, atol=1e-3))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    before = float(flow.log_prob(rows).mean().detach())
    for _ in range(40):
        optimizer.zero_grad()
        (-flow.log_prob(rows).mean()).backward()
        optimizer.step()
    truth = torch.distributions.Normal(torch.tensor([1.0, -0.5]), torch.tensor([0.3, 1.5]))
    best = float(truth.log_prob(rows).sum(1).mean())
    after = float(flow.log_prob(rows).mean().detach())
    assert before < best - 0.5
    assert after > best - 0.1


def test_the_forward_solve_keeps_no_graph_without_a_gradient_to_come() -> None:
    flow = _flow()
    with torch.no_grad():
        z, log_det, (solution,) = flow.transform(_rows(4))
    assert not z.requires_grad
    assert not log_det.requires_grad
    assert solution.stats.evaluations > 0


def test_each_evaluation_of_the_network_is_counted_once() -> None:
    flow = _flow(solver=SolverOptions(rtol=1e-4, atol=1e-4))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    flow.networks[0].register_forward_hook(count)
    _, _, (solution,) = flow.transform(_rows(4))
    assert calls == solution.stats.evaluations


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trace": "exakt"}, UnknownNameError, "did you mean 'exact'"),
        ({"noise": "uniform"}, UnknownNameError, "unknown noise 'uniform'"),
        ({"layer": "concatsquosh"}, UnknownNameError, "did you mean 'concatsquash'"),
        ({"activation": "relu"}, UnknownNameError, "unknown activation 'relu'"),
        ({"blocks": 0}, ArgumentError, "blocks=0 must be at least 1"),
        ({"t1": 0.0}, ArgumentError, "t1=0.0 must be positive"),
        ({"t1": math.inf}, ArgumentError, "t1=inf must be positive and finite"),
        ({"hidden": (0,)}, ArgumentError, "every width must be at least 1"),
    ],
)
def test_bad_options_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CNF(2, **options)


def test_bad_rows_noise_and_grids_are_refused() -> None:
    flow = _flow()
    with pytest.raises(ArgumentError, match=r"x must have shape \(n, 3\), got \(4, 2\)"):
        flow.log_prob(_rows(4, 2))
    with pytest.raises(ArgumentError, match=r"x must have shape \(n, 3\), got \(3,\)"):
        flow.log_prob(_rows(1)[0])
    with pytest.raises(ArgumentError, match=r"noise must have shape \(1, 4, 3\), got \(4, 3\)"):
        flow.log_prob(_rows(4), _rows(4))
    with pytest.raises(ArgumentError, match="1 grids are needed, one a block, got 2"):
        flow.transform(_rows(4), None, [torch.tensor([0.0, 1.0])] * 2)
