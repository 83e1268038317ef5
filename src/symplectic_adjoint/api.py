"""The front door: ``solve`` and ``odeint``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from symplectic_adjoint import gradients, steppers
from symplectic_adjoint._errors import ArgumentError, UnknownNameError
from symplectic_adjoint._types import Func
from symplectic_adjoint.capture import Capture
from symplectic_adjoint.controllers import Adaptive, Controller, FixedGrid
from symplectic_adjoint.dense import linear
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.gradients._job import Job, execute
from symplectic_adjoint.problem import Problem, flat_func
from symplectic_adjoint.progress import reporter
from symplectic_adjoint.solution import Solution
from symplectic_adjoint.steppers import ExplicitRK, Stepper


def solve(
    func: Func,
    y0: Any,
    t: Any,
    *,
    args: Sequence[Any] = (),
    method: str | Stepper | None = None,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    controller: Controller | None = None,
    gradient: str | Strategy = "symplectic",
    params: Sequence[Tensor] | None = None,
    throw: bool = True,
    dense: bool = False,
    progress: bool | Callable[[float], None] | None = None,
) -> Solution:
    """Solve ``dy/dt = func(t, y, *args)`` from ``y(t[0]) = y0``, differentiably.

    The gradient is the exact derivative of the computed solution with the accepted steps held
    fixed, for ``y0``, ``args``, every tensor that ``func`` depends on, and ``t``.

    Args:
        func: Gives the derivative of the state, like ``y0`` in structure, shape, dtype and device.
            It receives ``t`` as a 0-dim tensor. Modules, functions, closures and partials work
            alike.
        y0: Initial state: a floating-point or complex tensor, or a pytree of such.
        t: Times at which the solution is wanted, (T,), strictly monotone; the solve starts at
            ``t[0]`` and ends at ``t[-1]``.
        args: Passed on to ``func``.
        method: Name of a method (``steppers.names()``) or a stepper; "dopri5" by default.
        rtol: Relative tolerance, a number or a tensor that broadcasts against the state.
        atol: Absolute tolerance, likewise.
        controller: ``Adaptive(...)`` or ``FixedGrid(...)``. By default adaptive where the method
            estimates its error; otherwise the grid is ``t``.
        gradient: A strategy or its name (``gradients.names()``).
        params: When given, gradients go to ``y0``, ``t`` and these tensors only.
        throw: Whether a solve that cannot reach ``t[-1]`` raises; otherwise the valid prefix is
            returned with its status.
        dense: Keep every step, so that ``solution.dense(t)`` works.
        progress: True for a progress meter, or a function called with each time reached.

    Returns:
        The solution; ``solution.y`` has shape (T, ...).

    Raises:
        ArgumentError: An argument is unusable.
        FieldOutputError: ``func`` returned no derivative of the state.
        CaptureError: ``func`` depends on a tensor whose gradient would be lost.
        SolveError: ``t[-1]`` could not be reached (``NonFiniteError``, ``StepUnderflowError``,
            ``StepLimitError``); its ``solution`` holds the valid prefix.

    Example:
        >>> import torch
        >>> rate = torch.tensor(-0.5, requires_grad=True)
        >>> sol = solve(lambda t, y: rate * y, torch.ones(1), [0.0, 1.0])
        >>> sol.y[-1].sum().backward()
        >>> round(rate.grad.item(), 4)  # the derivative of exp(rate)
        0.6065
    """
    _check(func, args, controller)
    strategy = gradients.get(gradient)
    stepper = resolved_stepper(method, strategy)
    strategy.check(stepper)
    problem = Problem.of(y0, t)
    if controller is None:
        controller = FixedGrid() if stepper.error_order is None else Adaptive()
    arguments = list(args)
    job = Job(
        func=flat_func(func, problem.spec, arguments),
        capture=Capture(func, arguments, params),
        problem=problem,
        grid=_grid(controller, func, y0, problem),
        stepper=stepper,
        controller=controller,
        strategy=strategy,
        rtol=rtol,
        atol=atol,
        report=reporter(progress, problem.times[0], problem.times[-1]),
        keep_dense=dense,
    )
    solution, error = execute(job)
    solution.t = (t if isinstance(t, Tensor) else problem.t)[: len(solution.t)]
    if error is not None:
        solution.status, solution.message = error.status, str(error)
        if throw:
            error.solution = solution
            raise error
    return solution


def odeint(
    func: Func,
    y0: Any,
    t: Any,
    *,
    rtol: float | Tensor = 1e-7,
    atol: float | Tensor = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    gradient: str | Strategy = "symplectic",
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
            ``step_size``, ``grid_constructor`` and ``interp`` ("linear" or "cubic").
        gradient: A strategy or its name.
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


def _from_options(stepper: Stepper, options: Mapping[str, Any]) -> tuple[Stepper, Controller]:
    adaptive = stepper.error_order is not None
    valid = tuple(_ADAPTIVE_OPTIONS) if adaptive else _FIXED_OPTIONS
    for name in options:
        if name not in valid:
            raise UnknownNameError(f"option of method {stepper.name!r}", name, valid)
    if adaptive:
        return stepper, Adaptive(**{_ADAPTIVE_OPTIONS[k]: v for k, v in options.items()})
    grid = {k: v for k, v in options.items() if k != "interp"}
    interp = options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise UnknownNameError("interp", interp, ("linear", "cubic"))
    if interp == "linear" and isinstance(stepper, ExplicitRK):
        stepper = ExplicitRK(stepper.tableau, linear(stepper.tableau.b))
    return stepper, FixedGrid(**grid)


def resolved_stepper(method: str | Stepper | None, strategy: Strategy) -> Stepper:
    """The stepper asked for; by default the one that the strategy needs, or dopri5."""
    if method is None:
        method = strategy.method or "dopri5"
    if isinstance(method, str):
        return steppers.get(method)
    if not hasattr(method, "transpose"):
        raise ArgumentError(
            f"method = {method!r} must be a name such as 'dopri5' or a stepper such as ALF()"
        )
    return method


def _check(func: Any, args: Any, controller: Any) -> None:
    if not callable(func):
        raise ArgumentError(f"func = {func!r} is not callable; give func(t, y) -> dy/dt")
    if isinstance(func, nn.Sequential) and type(func).forward is nn.Sequential.forward:
        raise ArgumentError(
            "func is an nn.Sequential, which takes one argument, but func(t, y) gets two; a "
            "network of the state alone is sa.Autonomous(network)"
        )
    if isinstance(args, Tensor):
        raise ArgumentError("args is a tensor; give a tuple of arguments, e.g. args=(tensor,)")
    if controller is not None and not hasattr(controller, "begin"):
        raise ArgumentError(
            f"controller = {controller!r} must be a controller such as Adaptive() or FixedGrid()"
        )


def _grid(controller: Controller, func: Func, y0: Any, problem: Problem) -> Tensor | None:
    if not isinstance(controller, FixedGrid):
        return None
    return controller.grid(func, y0, problem.t)
