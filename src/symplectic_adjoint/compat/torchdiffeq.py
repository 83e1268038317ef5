"""torchdiffeq's functions, keywords and options: ``import symplectic_adjoint as torchdiffeq``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint import gradients
from symplectic_adjoint._compile import uncompiled
from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint._types import Func
from symplectic_adjoint.api import default_gradient, resolved_stepper, solve
from symplectic_adjoint.controllers import Adaptive, Controller, FixedGrid
from symplectic_adjoint.dense import linear
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.steppers import ExplicitRK, ScipySolver, Stepper, options_of


@uncompiled
def odeint(
    func: Func,
    y0: Any,
    t: Any,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    gradient: str | Strategy | None = None,
    params: Sequence[Tensor] | None = None,
) -> Any:
    """Solve an initial value problem with torchdiffeq's signature.

    Args:
        func: Gives the derivative: ``func(t, y)``.
        y0: Initial state: a tensor or a pytree of tensors.
        t: Output times (T,), strictly monotone.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        method: Name of a method; "dopri5" by default.
        options: For methods with an error estimate ``first_step``, ``safety``, ``ifactor``,
            ``dfactor``, ``max_num_steps``, ``min_step``, ``max_step``, ``norm``; for the others
            ``step_size``, ``grid_constructor`` and ``interp`` ("linear" or "cubic"); for Adams
            methods also ``max_order`` and, for the implicit one, ``max_iters``; for scipy_solver
            ``solver``, ``min_step`` and ``max_step``.
        gradient: A strategy or its name; "symplectic" by default, and "continuous" with
            scipy_solver, whose steps have no exact gradient.
        params: When given, gradients go to ``y0``, ``t`` and these tensors only.

    Returns:
        The solution at ``t``: (T, ...), or a pytree like ``y0`` with such leaves.

    Raises:
        ArgumentError: An argument is unusable.
        SolveError: ``t[-1]`` could not be reached.

    Example:
        >>> import torch
        >>> y = odeint(lambda t, y: -y, torch.ones(3), torch.linspace(0.0, 1.0, 5))
        >>> y.shape
        torch.Size([5, 3])
    """
    if gradient is None:
        gradient = default_gradient(method)
    stepper = resolved_stepper(method, gradients.get(gradient))
    stepper, controller = _from_options(stepper, options or {})
    return solve(
        func,
        y0,
        t,
        method=stepper,
        rtol=rtol,
        atol=atol,
        controller=controller,
        gradient=gradient,
        params=params,
    ).y


@uncompiled
def odeint_adjoint(
    func: Func,
    y0: Any,
    t: Any,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Any:
    """Solve like ``odeint``, with torchdiffeq's signature for the adjoint method.

    Args:
        func: Gives the derivative: ``func(t, y)``.
        y0: Initial state: a tensor or a pytree of tensors.
        t: Output times (T,), strictly monotone.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        method: Name of a method; "dopri5" by default.
        options: Options of the method, as in ``odeint``.
        adjoint_params: When given, gradients go to ``y0``, ``t`` and these tensors only.

    Returns:
        The solution at ``t``: (T, ...), or a pytree like ``y0`` with such leaves.

    Raises:
        ArgumentError: An argument is unusable.
        SolveError: ``t[-1]`` could not be reached.

    Example:
        >>> import torch
        >>> odeint_adjoint(lambda t, y: -y, torch.ones(3), torch.linspace(0.0, 1.0, 5)).shape
        torch.Size([5, 3])
    """
    return odeint(
        func,
        y0,
        t,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
        params=adjoint_params,
    )


@uncompiled
def odeint_dense(
    func: Func,
    y0: Any,
    t0: float | Tensor,
    t1: float | Tensor,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[[Any], Any]:
    """Solve from ``t0`` to ``t1`` and return the solution as a function of time.

    Args:
        func: Gives the derivative: ``func(t, y)``.
        y0: Initial state: a tensor or a pytree of tensors.
        t0: Where to start.
        t1: Where to end.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        method: Name of a method; "dopri5" by default.
        options: Options of the method, as in ``odeint``.

    Returns:
        The solution, a function of a time or of a tensor of times between ``t0`` and ``t1``.

    Raises:
        ArgumentError: An argument is unusable.
        SolveError: ``t1`` could not be reached.

    Example:
        >>> import torch
        >>> solution = odeint_dense(lambda t, y: -y, torch.ones(3), 0.0, 1.0)
        >>> solution(torch.tensor(0.5)).shape
        torch.Size([3])
    """
    stepper, controller = _from_options(
        resolved_stepper(method, gradients.get("symplectic")), options or {}
    )
    times = torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in (t0, t1)])
    return solve(
        func,
        y0,
        times,
        method=stepper,
        rtol=rtol,
        atol=atol,
        controller=controller,
        dense=True,
    ).dense


_ADAPTIVE_OPTIONS = {
    "first_step": "first_step",
    "safety": "safety",
    "ifactor": "factor_max",
    "dfactor": "factor_min",
    "max_num_steps": "max_steps",
    "min_step": "min_step",
    "max_step": "max_step",
    "norm": "norm",
}
_FIXED_OPTIONS = ("step_size", "grid_constructor", "interp")


def _from_options(
    stepper: Stepper, options: Mapping[str, Any]
) -> tuple[Stepper, Controller | None]:
    if isinstance(stepper, ScipySolver):
        return _scipy_from_options(stepper, options), None
    adaptive = stepper.error_order is not None
    own = options_of(stepper)
    valid = (*(_ADAPTIVE_OPTIONS if adaptive else _FIXED_OPTIONS), *own)
    for name in options:
        if name not in valid:
            raise UnknownNameError(f"option of method {stepper.name!r}", name, valid)
    if adaptive:
        return stepper, Adaptive(**{_ADAPTIVE_OPTIONS[k]: v for k, v in options.items()})
    grid = {k: v for k, v in options.items() if k != "interp" and k not in own}
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise UnknownNameError("interp", interp, ("linear", "cubic"))
    if interp == "linear" and isinstance(stepper, ExplicitRK):
        stepper = ExplicitRK(stepper.tableau, linear(stepper.tableau.b))
    if own:
        given = {k: v for k, v in options.items() if k in own}
        stepper = dataclasses.replace(stepper, **given, interp=interp)  # type: ignore[type-var]
    return stepper, FixedGrid(**grid)


def _scipy_from_options(stepper: ScipySolver, options: Mapping[str, Any]) -> ScipySolver:
    valid = options_of(stepper)
    for name in options:
        if name not in valid:
            raise UnknownNameError(f"option of method {stepper.name!r}", name, valid)
    return dataclasses.replace(stepper, **options)
