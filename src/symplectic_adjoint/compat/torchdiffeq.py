"""torchdiffeq's functions, keywords and options: ``import symplectic_adjoint as torchdiffeq``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from symplectic_adjoint import gradients
from symplectic_adjoint._compile import uncompiled
from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint._tree import StateSpec, as_real
from symplectic_adjoint._types import Func, Norm
from symplectic_adjoint.api import default_gradient, resolved_stepper, solve
from symplectic_adjoint.controllers import Adaptive, Controller, FixedGrid, LargestPart
from symplectic_adjoint.dense import linear
from symplectic_adjoint.gradients import Continuous, Strategy
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
    execution: str = "eager",
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
            ``dfactor``, ``max_num_steps``, ``min_step``, ``max_step``, ``step_t``, ``jump_t``
            (which has a gradient), ``dtype`` (accepted; times are float64 always) and ``norm``, a
            function of a state like ``y0``: by default the largest root mean square of its leaves.
            For the others ``step_size``, ``grid_constructor``, ``perturb`` and ``interp``
            ("linear" or "cubic"), and ``norm``, which they do not need; for Adams methods also
            ``max_order`` and, for the implicit one, ``max_iters``; for scipy_solver ``solver``,
            ``min_step`` and ``max_step``. Implicit Runge-Kutta methods step on a grid, too, and
            take the fields of ``Newton`` besides.
        event_fn: ``(t, y) -> value``. When given, the solve runs from ``t[0]`` in the direction of
            ``t`` until an element of the value changes its sign, wherever ``t`` ends.
        gradient: A strategy or its name; "symplectic" by default, and "continuous" with
            scipy_solver, whose steps have no exact gradient.
        params: When given, gradients go to ``y0``, ``t`` and these tensors only.
        execution: Whether to compile, as in ``solve``: "eager", "step", "loop" or "auto".

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
    stepper, controller = _from_options(stepper, options, y0)
    if event_fn is None and _is_single(t):
        return pytree.tree_map(lambda x: x.unsqueeze(0), y0)
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
        execution=execution,
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
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    execution: str = "eager",
) -> Any:
    """Solve like ``odeint``, with torchdiffeq's signature for the adjoint method.

    The gradient is exact (symplectic), at the same memory, unless one of ``adjoint_rtol``,
    ``adjoint_atol``, ``adjoint_method`` and ``adjoint_options`` asks for the continuous adjoint,
    which solves the adjoint ODE with these. Parameters that ``func`` does not use get zeros.

    Args:
        func: Gives the derivative: ``func(t, y)``.
        y0: Initial state: a tensor or a pytree of tensors.
        t: Output times (T,), strictly monotone.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        method: Name of a method; "dopri5" by default.
        options: Options of the method, as in ``odeint``.
        event_fn: Ends the solve, as in ``odeint``.
        adjoint_rtol: Relative tolerance of the adjoint ODE; ``rtol`` by default.
        adjoint_atol: Absolute tolerance of the adjoint ODE; ``atol`` by default.
        adjoint_method: Method of the adjoint ODE; ``method`` by default.
        adjoint_options: Options of that method; ``options`` without ``norm`` by default. Here
            ``norm`` is "seminorm", which leaves the parameters out, or a function of ``(t, y, lam,
            *params)``, the parts of the adjoint state; the leaves of a pytree stand in the place
            of ``y`` and of ``lam``.
        adjoint_params: When given, gradients go to ``y0``, ``t`` and these tensors only.
        execution: Whether to compile, as in ``solve``.

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
    strategy: Strategy = gradients.get(default_gradient(method))
    asked = (adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options)
    if any(x is not None for x in asked):
        strategy = replace(
            _adjoint(method, options, adjoint_method, adjoint_options, y0),
            rtol=adjoint_rtol,
            atol=adjoint_atol,
        )
    params = None if adjoint_params is None else tuple(adjoint_params)
    expected: Iterable[Tensor] = params or ()
    if params is None and isinstance(func, nn.Module):
        expected = func.parameters()
    return odeint(
        func,
        _tied(y0, expected),
        t,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
        event_fn=event_fn,
        gradient=strategy,
        params=params,
        execution=execution,
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
    stepper = resolved_stepper(method, gradients.get("symplectic"))
    stepper, controller = _from_options(stepper, options, y0)
    times = torch.stack([torch.as_tensor(t).reshape(()).to("cpu", torch.float64) for t in (t0, t1)])
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


def _is_single(t: Any) -> bool:
    """Whether only the initial state is wanted."""
    if isinstance(t, Tensor):
        return t.ndim == 1 and len(t) == 1
    return isinstance(t, list | tuple) and len(t) == 1


def _adjoint(
    method: str | None,
    options: Mapping[str, Any] | None,
    adjoint_method: str | None,
    adjoint_options: Mapping[str, Any] | None,
    y0: Any,
) -> Continuous:
    """How the adjoint ODE is solved."""
    if adjoint_options is None:
        if adjoint_method in (None, method):
            return Continuous(seminorm=False)  # with the steps and limits of the forward solve
        if options is not None:
            raise ArgumentError(
                "options are those of method and cannot serve adjoint_method = "
                f"{adjoint_method!r}; give adjoint_options, e.g. adjoint_options={{}}"
            )
    own = dict(_checked(adjoint_options, "adjoint_options"))
    norm = own.pop("norm", None)
    if isinstance(norm, str) and norm != "seminorm":
        raise UnknownNameError("norm", norm, ("seminorm",))
    seminorm = isinstance(norm, str)
    if not seminorm and norm is not None and not callable(norm):
        raise ArgumentError(f"norm = {norm!r} must be 'seminorm' or a function of a tuple")
    stepper = resolved_stepper(adjoint_method or method, gradients.get("symplectic"))
    stepper, controller = _from_options(stepper, own, y0)
    return Continuous(
        seminorm=seminorm,
        norm=None if seminorm else norm,
        method_name=stepper,
        controller=controller,
    )


def _tied(y0: Any, params: Iterable[Tensor]) -> Any:
    """``y0`` on the graph of all parameters, so that those without use get zeros."""
    if not torch.is_grad_enabled():
        return y0
    leaves, tree = pytree.tree_flatten(y0)
    known = [x for x in params if type(x) in (Tensor, nn.Parameter) and x.requires_grad]
    if not known or not leaves or not isinstance(leaves[0], Tensor):
        return y0
    zeros = [as_real(x, 0)[:0].sum().to(leaves[0].device, leaves[0].dtype) for x in known]
    return pytree.tree_unflatten([leaves[0] + torch.stack(zeros).sum(), *leaves[1:]], tree)


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
    "step_t": "step_t",
    "jump_t": "jump_t",
}
_GRID_OPTIONS = ("step_size", "grid_constructor", "perturb")


def _from_options(
    stepper: Stepper, options: Mapping[str, Any] | None, y0: Any
) -> tuple[Stepper, Controller | None]:
    options = _checked(options, "options")
    if isinstance(stepper, ScipySolver):
        _check_names(stepper, options, options_of(stepper))
        return replace(stepper, **options), None
    # As in torchdiffeq, implicit methods step on a grid even where they estimate their error.
    adaptive = stepper.error_order is not None and not isinstance(stepper, ImplicitRK)
    own = options_of(stepper)
    general = (*_ADAPTIVE_OPTIONS, "dtype") if adaptive else (*_GRID_OPTIONS, "interp")
    _check_names(stepper, options, (*general, "norm", *own))
    norm = _state_norm(options.get("norm"), y0)
    if adaptive:
        _check_dtype(options.get("dtype", torch.float64))
        given = {_ADAPTIVE_OPTIONS[k]: v for k, v in options.items() if k in _ADAPTIVE_OPTIONS}
        return stepper, Adaptive(norm=norm, **given)
    grid = {k: v for k, v in options.items() if k in _GRID_OPTIONS}
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise UnknownNameError("interp", interp, ("linear", "cubic"))
    if interp == "linear" and isinstance(stepper, ExplicitRK):
        stepper = ExplicitRK(stepper.tableau, linear(stepper.tableau.b))
    if isinstance(stepper, ImplicitRK):
        stepper = stepper.configured(options, linear=interp == "linear")
    elif own:
        given = {k: v for k, v in options.items() if k in own}
        stepper = replace(stepper, **given, interp=interp)  # type: ignore[type-var]
    return stepper, FixedGrid(**grid)


def _check_names(stepper: Stepper, options: Mapping[str, Any], valid: Sequence[str]) -> None:
    for name in options:
        if name not in valid:
            raise UnknownNameError(f"option of method {stepper.name!r}", name, valid)


def _checked(options: Any, name: str) -> Mapping[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ArgumentError(
            f"{name} = {options!r} must be a dict of options by name, e.g. dict(max_num_steps=1000)"
        )
    return options


def _check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(
            f"dtype = {dtype!r} must be a floating-point dtype such as torch.float64, which times "
            "have whatever it says"
        )


def _state_norm(norm: Any, y0: Any) -> Norm | None:
    """A norm of the flat state from one of a state like ``y0``; by default of its leaves."""
    if norm is not None and not callable(norm):
        raise ArgumentError(
            f"norm = {norm!r} must be a function of a state like y0 that returns a number; "
            "'seminorm' belongs to adjoint_options"
        )
    if isinstance(y0, Tensor):
        return norm if norm is None else lambda x: torch.as_tensor(norm(x))
    spec, _ = StateSpec.of(y0)
    if norm is None:
        return LargestPart(spec.sizes)
    return lambda x: torch.as_tensor(norm(spec.unflatten(x)))
