"""Continuous normalizing flows and the networks behind them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint.controllers import FixedGrid
from symplectic_adjoint.models import (
    CNF,
    Concat,
    ConcatSquash,
    ConcatSquashConv2d,
    ContinuousFlow,
    FlowDistribution,
    ImageCNF,
    SolverOptions,
    TimeMLP,
    bits_per_pixel,
)
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


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_gradients_of_a_flow_in_forward_mode_are_those_of_backpropagation(trace: Any) -> None:
    x = torch.randn(3, 3, dtype=torch.float64)

    def gradients_by(strategy: str) -> list[Tensor]:
        solver = SolverOptions(method="midpoint", controller=FixedGrid(step_size=0.5))
        flow = _flow(trace=trace, solver=replace(solver, gradient=strategy))
        noise = flow.draw_noise(x, torch.Generator().manual_seed(2))
        loss = flow.log_prob(x, noise).sum()
        return list(torch.autograd.grad(loss, list(flow.parameters())))

    for got, wanted in zip(gradients_by("forward"), gradients_by("backprop"), strict=True):
        assert float((got - wanted).norm()) <= 1e-12 * float(wanted.norm())


def test_samples_map_back_to_their_base_samples() -> None:
    flow = _flow(blocks=2, trace="exact")
    samples = flow.sample(6, torch.Generator().manual_seed(3))
    base = torch.randn(6, 3, generator=torch.Generator().manual_seed(3)).double()
    assert not samples.requires_grad
    torch.testing.assert_close(flow.transform(samples).z, base, rtol=1e-6, atol=1e-6)


def _images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 16, dtype=torch.float64, generator=generator)


def _image_flow(**options: Any) -> ImageCNF:
    """A flow of 4 x 4 images on two scales, away from the identity."""
    torch.manual_seed(0)
    wanted = {"hidden": (3,), "scales": 2, "blocks": 1, "activation": "tanh", "solver": TIGHT}
    flow = ImageCNF((4, 4), **{**wanted, **options}).double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    return flow


KINDS: dict[str, Callable[..., ContinuousFlow]] = {
    "rademacher": lambda **o: _flow(blocks=2, **o),
    "gaussian": lambda **o: _flow(noise="gaussian", **o),
    "exact trace": lambda **o: _flow(blocks=2, trace="exact", **o),
    "context": lambda **o: _flow(context=2, **o),
    "images": _image_flow,
    "images, exact trace, context": lambda **o: _image_flow(trace="exact", context=2, **o),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_every_strategy_match_backprop_on_the_same_steps(
    strategy: str, kind: str
) -> None:
    solver = SolverOptions(None, 1e-4, 1e-4, strategy)
    flow = KINDS[kind](solver=solver)
    x = _images(3) if isinstance(flow, ImageCNF) else _rows(5)
    noise = flow.draw_noise(x, torch.Generator().manual_seed(0))
    context = torch.randn(len(x), 2).double().requires_grad_() if flow.context else None
    leaves = [*flow.parameters(), *([] if context is None else [context])]
    solution = flow.transform(x, noise, context=context)
    loss = (standard_normal_log_prob(solution.z) + solution.log_det).mean()
    found = torch.autograd.grad(loss, leaves)
    method = "alf" if strategy == "mali" else "dopri5"
    flow.solver = replace(solver, method=method, gradient="backprop")
    replayed = flow.transform(x, noise, [s.steps for s in solution.solutions], context)
    loss = (standard_normal_log_prob(replayed.z) + replayed.log_det).mean()
    torch.testing.assert_close(replayed.z, solution.z)
    tolerance = 1e-2 if strategy == "continuous" else 1e-11
    for ours, reference in zip(found, torch.autograd.grad(loss, leaves), strict=True):
        distance = torch.linalg.vector_norm(ours - reference)
        assert distance <= tolerance * torch.linalg.vector_norm(reference)


@pytest.mark.parametrize("kind", ["exact trace", "context", "images"])
@pytest.mark.parametrize("strategy", ["symplectic", "mali"])
def test_gradients_through_samples_match_backprop_on_the_same_grid(
    strategy: str, kind: str
) -> None:
    method = "alf" if strategy == "mali" else "bosh3"
    solver = SolverOptions(method, 1e-4, 1e-4, strategy, FixedGrid(step_size=0.25))
    flow = KINDS[kind](solver=solver)
    context = torch.randn(3, 2).double().requires_grad_() if flow.context else None
    leaves = [*flow.parameters(), *([] if context is None else [context])]
    found = []
    for gradient in (strategy, "backprop"):
        flow.solver = replace(solver, gradient=gradient)
        samples = flow.rsample(3, torch.Generator().manual_seed(0), context)
        loss = (samples * torch.linspace(0, 1, samples.numel()).view_as(samples)).square().sum()
        found.append(torch.autograd.grad(loss, leaves))
    for ours, reference in zip(*found, strict=True):
        distance = torch.linalg.vector_norm(ours - reference)
        assert distance <= 1e-12 * torch.linalg.vector_norm(reference)
        assert torch.linalg.vector_norm(reference) > 0


def test_the_log_determinant_of_images_is_that_of_the_map() -> None:
    solver = SolverOptions(rtol=1e-6, atol=1e-6, gradient="backprop")
    flow = _image_flow(trace="exact", solver=solver)
    x = _images(1).requires_grad_()
    z, log_det, _ = flow.transform(x)
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0][0] for entry in z[0]]
    expected = torch.linalg.slogdet(torch.stack(rows)).logabsdet
    assert log_det.item() == pytest.approx(expected.item(), abs=1e-5)


def test_images_map_back_to_their_base_samples() -> None:
    flow = _image_flow(trace="exact")
    samples = flow.sample(6, torch.Generator().manual_seed(3))
    base = torch.randn(6, 16, generator=torch.Generator().manual_seed(3)).double()
    # Where the flow leaves the image of (0, 1) under the logit, a pixel is taken back to its edge.
    inside = ((samples > 0) & (samples < 1)).all(1)
    assert int(inside.sum()) >= 2
    z = flow.transform(samples[inside]).z
    torch.testing.assert_close(z, base[inside], rtol=1e-6, atol=1e-6)


def test_a_conditional_density_integrates_to_one_at_every_context_and_depends_on_it() -> None:
    flow = _flow(2, trace="exact", context=1, solver=SolverOptions(rtol=1e-6, atol=1e-6))
    axis = torch.linspace(-8, 8, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    densities = []
    for value in (-1.0, 1.0):
        with torch.no_grad():
            context = grid.new_full((len(grid), 1), value)
            densities.append(flow.log_prob(grid, context=context).exp())
        total = densities[-1].sum() * (axis[1] - axis[0]) ** 2
        assert float(total) == pytest.approx(1.0, abs=1e-4)
    assert (densities[0] - densities[1]).abs().max() > 0.01


def test_halves_of_the_channels_leave_between_the_scales() -> None:
    layouts = ImageCNF((28, 28), hidden=(2,), scales=3, blocks=2).layouts
    shapes = [layout.shape for layout in layouts]
    assert shapes == [(1, 28, 28)] * 2 + [(4, 14, 14)] * 2 + [(8, 7, 7)] * 2
    assert [layout.left for layout in layouts] == [0, 0, 0, 0, 2 * 14 * 14, 0]


def test_a_distribution_is_one_of_torchs() -> None:
    flow = _flow(2, trace="exact", context=2)
    context = torch.randn(3, 2).double()
    distribution = flow.distribution(context)
    assert (distribution.batch_shape, distribution.event_shape) == ((3,), (2,))
    samples = distribution.rsample((4,))
    assert samples.shape == (4, 3, 2)
    assert samples.requires_grad
    assert not distribution.sample((4,)).requires_grad
    scores = distribution.log_prob(samples)
    rows = flow.log_prob(samples.reshape(12, 2), context=context.repeat(4, 1))
    torch.testing.assert_close(scores, rows.reshape(4, 3))
    # One value is scored at every context.
    value = _rows(1, 2)[0]
    each = torch.stack([flow.log_prob(value[None], context=c[None])[0] for c in context])
    torch.testing.assert_close(distribution.log_prob(value), each, rtol=1e-6, atol=1e-6)
    assert distribution.expand((5, 3)).sample().shape == (5, 3, 2)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3).double()), distribution
    )
    expected = torch.logsumexp(each, 0) - math.log(3)
    torch.testing.assert_close(mixture.log_prob(value), expected, rtol=1e-6, atol=1e-6)


def test_a_distribution_checks_what_it_is_given() -> None:
    plain, conditional = _flow(2), _flow(2, context=2)
    with pytest.raises(ValueError, match="the flow has no context"):
        plain.distribution(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"must have shape \(\.\.\., 2\)"):
        conditional.distribution()
    with pytest.raises(ValueError, match="within the support"):
        FlowDistribution(_image_flow(), validate_args=True).log_prob(2 * torch.ones(16).double())
    with pytest.raises(ValueError, match="support"):
        FlowDistribution(plain, validate_args=True).log_prob(torch.full((2,), math.nan).double())


def test_contexts_and_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"context must have shape \(4, 2\), got None"):
        _flow(context=2).log_prob(_rows(4))
    with pytest.raises(ArgumentError, match=r"context must have shape None, got \(4, 2\)"):
        _flow().log_prob(_rows(4), context=torch.zeros(4, 2).double())
    with pytest.raises(ArgumentError, match="pixels must lie between 0 and 1, got 0 to 2"):
        _image_flow().log_prob(torch.tensor([[0.0, 2.0] * 8]).double())
    with pytest.raises(ArgumentError, match=r"\(1, 6, 6\) cannot be halved 2 times"):
        ImageCNF((6, 6), scales=3)
    with pytest.raises(ArgumentError, match=r"alpha=0\.5"):
        ImageCNF((4, 4), alpha=0.5)
    with pytest.raises(ArgumentError, match="scales=0"):
        ImageCNF((4, 4), scales=0)


def test_the_convolution_gates_and_shifts_each_channel() -> None:
    layer = ConcatSquashConv2d(2, 3)
    t, x = torch.tensor(0.7), torch.randn(5, 2, 4, 4)
    gate = torch.sigmoid(0.7 * layer.gate_slope + layer.gate_offset)
    expected = layer.linear(x) * gate[:, None, None] + 0.7 * layer.shift[:, None, None]
    torch.testing.assert_close(layer(t, x), expected)


def test_bits_per_pixel_are_those_of_the_grey_levels() -> None:
    # A uniform density over dequantised pixels is a uniform choice among the levels.
    assert bits_per_pixel(0.0, 10, 16) == 4.0
    assert bits_per_pixel(10 * math.log(2), 10, 16) == pytest.approx(5.0)


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
