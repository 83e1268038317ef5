"""torchdiffeq's functions, keywords and options: ``import symplectic_adjoint as torchdiffeq``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from symplectic_adjoint import gradients
from symplectic_adjoint._compile import uncompiled
from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint._types import Func
from symplectic_adjoint.api import default_gradient, resolved_stepper, solve
from symplectic_adjoint.controllers import Adaptive, Controller, FixedGrid
from symplectic_adjoint.dense import linear
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.solution import Solution
from symplectic_adjoint.steppers import ExplicitRK, ImplicitRK, ScipySolver, Stepper, options_of


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
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
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
            ``solver``, ``min_step`` and ``max_step``. Implicit Runge-Kutta methods step on a grid,
            too, and take the fields of ``Newton`` besides.
        event_fn: ``(t, y) -> value``. When given, the solve runs from ``t[0]`` in the direction of
            ``t`` until an element of the value changes its sign, wherever ``t`` ends.
        gradient: A strategy or its name; "symplectic" by default, and "continuous" with
            scipy_solver, whose steps have no exact gradient.
        params: When given, gradients go to ``y0``, ``t`` and these tensors only.

    Returns:
        The solution at ``t``: (T, ...), or a pytree like ``y0`` with such leaves. With ``event_fn``
        the pair ``(event_t, y)``: the time of the event, like ``t[0]``, and the solution at
        ``t[0]`` and there, (2, ...).

    Raises:
        ArgumentError: An argument is unusable.
        SolveError: ``t[-1]`` could not be reached.
        EventNotFoundError: No event occurred within ``max_num_steps``, or 20 000 steps.

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
    solution = solve(
        func,
        y0,
        t if event_fn is None else _endless(t),
        method=stepper,
        rtol=rtol,
        atol=atol,
        controller=controller,
        gradient=gradient,
        params=params,
        event=event_fn,
    )
    return solution.y if event_fn is None else _at_event(solution)


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
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
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
        event_fn: Ends the solve, as in ``odeint``.
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
        event_fn=event_fn,
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


@uncompiled
def odeint_event(
    func: Func,
    y0: Any,
    t0: float | Tensor,
    *,
    event_fn: Callable[[Tensor, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solve from ``t0`` until an event.

    Args:
        func: Gives the derivative: ``func(t, y)``.
        y0: Initial state: a tensor or a pytree of tensors.
        t0: Where to start, a number or a tensor with one element.
        event_fn: ``(t, y) -> value``; the solve ends where an element of the value changes its
            sign.
        reverse_time: Whether time decreases.
        odeint_interface: ``odeint`` or ``odeint_adjoint``.
        **kwargs: Further keyword arguments of ``odeint_interface``.

    Returns:
        The pair ``(event_t, y)``: the time of the event, like ``t0``, and the solution at ``t0``
        and there, (2, ...), or a pytree like ``y0`` with such leaves. Both have the exact gradient,
        also for the parameters of ``event_fn``.

    Raises:
        ArgumentError: An argument is unusable.
        SolveError: The solve failed before an event.
        EventNotFoundError: No event occurred within ``max_num_steps``, or 20 000 steps.

    Example:
        >>> import torch
        >>> rate = torch.tensor(0.5, requires_grad=True)
        >>> t, y = odeint_event(
        ...     lambda t, y: rate * y, torch.ones(1), 0.0, event_fn=lambda t, y: y - 2.0
        ... )
        >>> round(t.item(), 4), y.shape  # log(2) / rate
        (1.3863, torch.Size([2, 1]))
        >>> round(torch.autograd.grad(t, rate)[0].item(), 4)
        -2.7726
    """
    start = t0 if isinstance(t0, Tensor) else torch.tensor(t0, dtype=torch.float64)
    start = start.reshape(1)
    ahead = start.detach() + (-1.0 if reverse_time else 1.0)
    event_t, y = odeint_interface(func, y0, torch.cat([start, ahead]), event_fn=event_fn, **kwargs)
    return event_t, y


def _endless(t: Any) -> Tensor:
    """From ``t[0]`` in the direction of ``t``, without end."""
    times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    if times.ndim != 1 or len(times) < 2 or times[0] == times[-1]:
        return times  # which solve refuses
    ahead = (times[-1:] - times[:1]).detach().sign()
    return torch.cat([times[:1], ahead * math.inf])


def _at_event(solution: Solution) -> tuple[Tensor, Any]:
    event = solution.event
    assert event is not None
    y = pytree.tree_map(lambda a, b: torch.cat([a[:1], b.unsqueeze(0)]), solution.y, event.y)
    return event.t.to(solution.t), y


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
    # As in torchdiffeq, implicit methods step on a grid even where they estimate their error.
    adaptive = stepper.error_order is not None and not isinstance(stepper, ImplicitRK)
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
    if isinstance(stepper, ImplicitRK):
        stepper = stepper.configured(options, linear=interp == "linear")
    elif own:
        given = {k: v for k, v in options.items() if k in own}
        stepper = dataclasses.replace(stepper, **given, interp=interp)  # type: ignore[type-var]
    return stepper, FixedGrid(**grid)


def _scipy_from_options(stepper: ScipySolver, options: Mapping[str, Any]) -> ScipySolver:
    valid = options_of(stepper)
    for name in options:
        if name not in valid:
            raise UnknownNameError(f"option of method {stepper.name!r}", name, valid)
    return dataclasses.replace(stepper, **options)
