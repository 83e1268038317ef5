"""What one gradient costs under a strategy, and how far it is from the exact one."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint import steppers
from symplectic_adjoint._errors import SolveError
from symplectic_adjoint.controllers import Adaptive
from symplectic_adjoint.experiments.train import counts, negative_log_likelihood
from symplectic_adjoint.memory import peak_memory
from symplectic_adjoint.models import ContinuousFlow, Flow

SWEEP_ROWS = 32
SWEEP_STEPS = 400
"""A tolerance that needs more steps a block than this is left out of the sweep."""


@dataclass(frozen=True)
class Probe:
    """The point at which every strategy is measured: the same weights, rows and noise for all.

    Attributes:
        state: Parameters of the model.
        batch: Rows, shape (n, dim).
        noise: Noise of Hutchinson's estimate, shape (blocks, n, dim).
    """

    state: dict[str, Tensor]
    batch: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Cost:
    """One gradient, measured.

    Attributes:
        gradient_error: Relative L2 distance of the gradient, in the dtype of the training, from
            float64 backpropagation through the same accepted steps.
        gradient_error_float64: The same with the strategy in float64 too, which leaves out
            rounding.
        peak_memory: Bytes of tensors alive at once at most, during one forward and backward pass.
        evaluations: Network evaluations of the forward solves.
        backward_evaluations: Network evaluations of the backward pass.
        products: vector-Jacobian products.
        accepted: Accepted steps.
        rejected: Rejected steps.
    """

    gradient_error: float
    gradient_error_float64: float
    peak_memory: int
    evaluations: int
    backward_evaluations: int
    products: int
    accepted: int
    rejected: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as values of JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SweepPoint:
    """Memory at one tolerance.

    Attributes:
        tolerance: Relative and absolute tolerance.
        steps: Accepted steps over all blocks; None where the solve needed too many or failed.
        peak_memory: Bytes of tensors alive at once at most; None likewise.
    """

    tolerance: float
    steps: int | None
    peak_memory: int | None


def measure_cost(model: ContinuousFlow, probe: Probe) -> Cost:
    """Measures one gradient of the mean negative log-likelihood.

    Args:
        model: The flow, with the strategy in its solver options; its parameters are replaced by the
            probe's.
        probe: Where to measure.

    Returns:
        The cost and the error of the gradient.
    """
    model.load_state_dict(probe.state)
    error, totals = gradient_error(model, probe.batch, probe.noise)
    error64 = error
    if probe.batch.dtype != torch.float64:
        error64, _ = gradient_error(
            copy.deepcopy(model).double(), probe.batch.double(), probe.noise.double()
        )
    peak = _peak(lambda: _differentiate(model, probe.batch, probe.noise), probe.batch)
    return Cost(error, error64, peak, **totals)


def gradient_error(
    model: ContinuousFlow, batch: Tensor, noise: Tensor
) -> tuple[float, dict[str, int]]:
    """Relative L2 error of the parameters' gradient against float64 backprop on the same steps.

    Args:
        model: The flow, with the strategy in its solver options.
        batch: Rows, shape (n, dim).
        noise: Noise of shape (blocks, n, dim).

    Returns:
        The error, and the counts of the measured solve.
    """
    gradient, flow = gradient_of(model, batch, noise)
    totals = counts(flow)
    return distance(gradient, exact_gradient(model, batch, noise, flow)), totals


def gradient_of(model: ContinuousFlow, batch: Tensor, noise: Tensor) -> tuple[Tensor, Flow]:
    """The parameters' gradient of the mean negative log-likelihood in float64, and its solve."""
    flow = _differentiate(model, batch, noise)
    return _gradient_vector(model), flow


def exact_gradient(model: ContinuousFlow, batch: Tensor, noise: Tensor, flow: Flow) -> Tensor:
    """The gradient of a computed solution: float64 backprop through its accepted steps."""
    exact = copy.deepcopy(model).double()
    exact.solver = replace(exact.solver, gradient="backprop")
    _differentiate(exact, batch.double(), noise.double(), [s.steps for s in flow.solutions])
    return _gradient_vector(exact)


def seconds_of(run: Callable[[], object], device: torch.device | str, repeats: int = 3) -> float:
    """Median time of a call: of the processor where it computes, which other work touches least."""
    if torch.device(device).type == "cpu":
        return statistics.median(_timed(run, time.process_time) for _ in range(repeats))

    def waited() -> None:
        run()
        torch.cuda.synchronize(device)

    return statistics.median(_timed(waited, time.perf_counter) for _ in range(repeats))


def _timed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    run()
    return clock() - begin


def distance(gradient: Tensor, reference: Tensor) -> float:
    """Relative L2 distance."""
    norm = torch.linalg.vector_norm
    return float(norm(gradient - reference) / norm(reference))


def sweep_memory(
    model: ContinuousFlow, probe: Probe, tolerances: Sequence[float]
) -> list[SweepPoint]:
    """Measures the memory of one gradient while the tolerance drives the number of steps.

    The sweep runs in float64, whose rounding leaves room for tight tolerances, on few rows.

    Args:
        model: The flow, with the strategy in its solver options.
        probe: Where to measure.
        tolerances: Relative and absolute tolerances, the loosest first. Those after one that fails
            are not tried.

    Returns:
        One point for each tolerance; none if the method has no step size control.
    """
    if steppers.get(model.solver.method or "dopri5").error_order is None:
        return []
    model = copy.deepcopy(model).double()
    model.load_state_dict(probe.state)
    batch, noise = probe.batch[:SWEEP_ROWS].double(), probe.noise[:, :SWEEP_ROWS].double()
    points: list[SweepPoint] = []
    for tolerance in tolerances:
        model.solver = replace(
            model.solver,
            rtol=tolerance,
            atol=tolerance,
            controller=Adaptive(max_steps=SWEEP_STEPS),
        )
        failed = bool(points) and points[-1].steps is None
        points.append(
            SweepPoint(tolerance, None, None)
            if failed
            else _sweep_point(model, batch, noise, tolerance)
        )
    return points


def _sweep_point(
    model: ContinuousFlow, batch: Tensor, noise: Tensor, tolerance: float
) -> SweepPoint:
    flows: list[Flow] = []
    try:
        peak = _peak(lambda: flows.append(_differentiate(model, batch, noise)), batch)
    except SolveError:
        return SweepPoint(tolerance, None, None)
    return SweepPoint(tolerance, counts(flows[0])["accepted"], peak)


def _peak(run: Callable[[], object], batch: Tensor) -> int:
    return peak_memory(run, device=batch.device)


def _differentiate(
    model: ContinuousFlow, batch: Tensor, noise: Tensor, grids: Sequence[Tensor] | None = None
) -> Flow:
    """One forward and backward pass, which leaves the gradients in the parameters."""
    model.zero_grad()
    flow = model.transform(batch, noise, grids)
    negative_log_likelihood(flow).backward()
    return flow


def _gradient_vector(model: ContinuousFlow) -> Tensor:
    """The gradients of all parameters, in float64."""
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().double()
            for p in model.parameters()
        ]
    )
