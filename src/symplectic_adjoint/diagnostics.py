"""Measuring a gradient on the problem at hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from symplectic_adjoint import gradients
from symplectic_adjoint.api import resolved_stepper, solve
from symplectic_adjoint.capture import Capture
from symplectic_adjoint.controllers import Adaptive, Controller, FixedGrid
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.memory import peak_memory
from symplectic_adjoint.steppers import Stepper

__all__ = ["GradientCheck", "check_gradient", "peak_memory"]


@dataclass(frozen=True)
class GradientCheck:
    """Relative L2 errors of a gradient.

    Attributes:
        errors: By name of the input: ``y0`` and each tensor that ``func`` depends on.
        total: Of all of them joined.
        reference: Dtype in which the reference was computed.
        steps: Number of accepted steps.
    """

    errors: dict[str, float]
    total: float
    reference: torch.dtype
    steps: int

    def __str__(self) -> str:
        lines = [f"{name:<24} {error:.2e}" for name, error in self.errors.items()]
        head = f"relative error against {self.reference} backprop over {self.steps} steps"
        return "\n".join([head, *lines, f"{'total':<24} {self.total:.2e}"])


def check_gradient(
    func: Any,
    y0: Any,
    t: Any,
    *,
    args: Sequence[Any] = (),
    method: str | Stepper | None = None,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    controller: Controller | None = None,
    gradient: str | Strategy = "symplectic",
) -> GradientCheck:
    """Measure a gradient's error on a problem, against backprop on the same accepted steps.

    A random linear function of the solution at all times is differentiated. Where ``func`` is a
    module the reference runs in float64; otherwise in the dtype of the problem.

    Args:
        func: As for ``solve``.
        y0: As for ``solve``.
        t: As for ``solve``.
        args: As for ``solve``.
        method: As for ``solve``.
        rtol: As for ``solve``.
        atol: As for ``solve``.
        controller: As for ``solve``.
        gradient: The strategy to measure.

    Returns:
        The errors, by input and in total.

    Example:
        >>> class Field(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(2, 2)
        ...
        ...     def forward(self, t, y):
        ...         return torch.tanh(self.net(y))
        >>> check = check_gradient(Field(), torch.ones(3, 2), [0.0, 1.0])
        >>> check.total < 1e-5
        True
    """
    options: dict[str, Any] = {"method": method, "rtol": rtol, "atol": atol}
    times = torch.as_tensor(t, dtype=torch.float64).detach()
    sol, own = _gradients(
        func, y0, times, args, {**options, "controller": controller, "gradient": gradient}
    )
    if controller is None or isinstance(controller, Adaptive):
        steps = sol.steps
        controller = FixedGrid(grid_constructor=lambda func, y0, t: steps)
    if isinstance(func, nn.Module):
        func, y0, args = _doubled((copy.deepcopy(func), y0, list(args)))
    options["method"] = resolved_stepper(method, gradients.get(gradient))
    _, reference = _gradients(
        func, y0, times, args, {**options, "controller": controller, "gradient": "backprop"}
    )
    return _compare(own, reference, len(sol.steps) - 1)


def _gradients(
    func: Any, y0: Any, t: Tensor, args: Sequence[Any], options: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """The solution, and the gradients by name of a random linear function of it."""
    y0 = pytree.tree_map(lambda x: x.detach().requires_grad_(), y0)
    leaves = pytree.tree_leaves(y0)
    capture = Capture(func, list(args))
    with torch.enable_grad():
        sol = solve(func, y0, t, args=args, **options)
        outputs = pytree.tree_leaves(sol.y)
        weights = torch.Generator().manual_seed(0)
        loss = sum(
            (y * torch.randn(y.shape, generator=weights, dtype=torch.float64).to(y)).sum()
            for y in outputs
        )
        inputs = [*leaves, *capture.tensors]
        names = [f"y0[{i}]" for i in range(len(leaves))] if len(leaves) > 1 else ["y0"]
        grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return sol, dict(zip([*names, *capture.names], grads, strict=True))


def _doubled(tree: Any) -> Any:
    def double(x: Any) -> Any:
        if isinstance(x, nn.Module):
            return x.double()
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().double().requires_grad_(x.requires_grad)
        return x

    return pytree.tree_map(double, tree)


def _compare(own: dict[str, Tensor], reference: dict[str, Tensor], steps: int) -> GradientCheck:
    wrong, size = {}, {}
    for (name, a), b in zip(own.items(), reference.values(), strict=True):
        wide = torch.promote_types(b.dtype, torch.float64)
        wrong[name] = float(torch.linalg.vector_norm(a.to(wide) - b.to(wide)))
        size[name] = float(torch.linalg.vector_norm(b.to(wide)))
    errors = {name: _ratio(wrong[name], size[name]) for name in wrong}
    total = _ratio(
        sum(x * x for x in wrong.values()) ** 0.5, sum(x * x for x in size.values()) ** 0.5
    )
    dtype = next(iter(reference.values())).dtype
    return GradientCheck(errors, total, dtype, steps)


def _ratio(error: float, size: float) -> float:
    return 0.0 if error == 0.0 else error / size if size else float("inf")
