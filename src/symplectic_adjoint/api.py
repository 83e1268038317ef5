"""The front door: ``solve``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from symplectic_adjoint import gradients, steppers
from symplectic_adjoint._compile import uncompiled
from symplectic_adjoint._errors import (
    ArgumentError,
    CompilationError,
    EventNotFoundError,
    SolveError,
    StepLimitError,
)
from symplectic_adjoint._tree import StateSpec
from symplectic_adjoint._types import Func
from symplectic_adjoint.callbacks import Callbacks
from symplectic_adjoint.capture import Capture, Listed, transformed, varies
from symplectic_adjoint.controllers import Adaptive, Controller, FixedGrid, no_times, number
from symplectic_adjoint.events import Event, FlatEvent, listed
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.gradients._execution import check_execution, execute
from symplectic_adjoint.gradients._job import Job
from symplectic_adjoint.gradients._transform import solve_lifted
from symplectic_adjoint.problem import Problem, as_times, flat_func
from symplectic_adjoint.progress import reporter
from symplectic_adjoint.solution import Solution
from symplectic_adjoint.steppers import ScipySolver, Stepper, fitted, within

EVENT_STEPS = 20_000
"""Limit of an endless solve whose controller sets none."""


@uncompiled
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
    gradient: str | Strategy | None = None,
    params: Sequence[Tensor] | None = None,
    event: Callable[..., Tensor] | Event | Sequence[Any] | None = None,
    throw: bool = True,
    dense: bool = False,
    progress: bool | Callable[[float], None] | None = None,
    execution: str = "eager",
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
        gradient: A strategy or its name (``gradients.names()``); "symplectic" by default, and
            "continuous" with scipy_solver, whose steps have no exact gradient.
        params: When given, gradients go to ``y0``, ``t`` and these tensors only.
        event: Ends the solve early: a function ``(t, y, *args) -> value``, an ``Event``, or a
            sequence of these. The solve ends where an element of a value first changes its sign;
            ``solution.event`` says when, where and which, and is None if nothing happened before
            ``t[-1]``. With an event ``t[-1]`` may be infinite.
        throw: Whether a solve that cannot reach ``t[-1]`` raises; otherwise the valid prefix is
            returned with its status.
        dense: Keep every step, so that ``solution.dense(t)`` works.
        progress: True for a progress meter, or a function called with each time reached.
        execution: ``"eager"`` runs any ``func``. ``"loop"`` compiles the whole solve, and its whole
            reverse sweep, at its first use: seconds once, several times faster ever after.
            ``"auto"`` compiles what can be compiled, and warns once where it cannot.

    Returns:
        The solution; ``solution.y`` has shape (T, ...), with as many times as were reached.

    Raises:
        ArgumentError: An argument is unusable.
        CompilationError: The solve cannot be compiled as ``execution`` asks.
        FieldOutputError: ``func`` returned no derivative of the state.
        CaptureError: ``func`` depends on a tensor whose gradient would be lost.
        SolveError: ``t[-1]`` could not be reached (``NonFiniteError``, ``StepUnderflowError``,
            ``StepLimitError``, ``NonlinearSolveError``); its ``solution`` holds the valid prefix.
        EventNotFoundError: ``t[-1]`` is infinite and no event occurred within the controller's
            ``max_steps``, or 20 000 steps where it sets no limit.
        EventOutputError: An event function returned no real tensor.

    Example:
        >>> import torch
        >>> rate = torch.tensor(-0.5, requires_grad=True)
        >>> sol = solve(lambda t, y: rate * y, torch.ones(1), [0.0, 1.0])
        >>> sol.y[-1].sum().backward()
        >>> round(rate.grad.item(), 4)  # the derivative of exp(rate)
        0.6065
    """
    _check(func, args, controller)
    check_execution(execution)
    strategy = gradients.get(default_gradient(method) if gradient is None else gradient)
    stepper = within(resolved_stepper(method, strategy), rtol, atol)
    strategy.check(stepper)
    strategy = strategy.fitted(stepper)
    if strategy.folder is not None:
        execution = _eager(execution)
    events = listed(event)
    if isinstance(stepper, ScipySolver):
        controller = _scipy_controller(controller, events, dense)
    elif controller is None:
        controller = default_controller(stepper)
    arguments, wanted = list(args), Listed(params)
    spec, flat = StateSpec.of(y0)
    stepper = fitted(stepper, spec)

    def job(y0: Tensor, t: Any, capture: Listed) -> Job:
        problem, own = Problem.flat(spec, y0, t, endless=bool(events)), controller
        if math.isinf(problem.times[-1]):
            problem, own = _limited(problem, own)
        regrid = functools.partial(_grid, own, func, spec.unflatten(y0))
        grid = regrid(problem.t)
        return Job(
            func=flat_func(func, spec, arguments),
            capture=capture,
            problem=problem,
            grid=grid,
            regrid=regrid,
            jumps=_jumps(own, grid, problem),
            stepper=stepper,
            controller=own,
            strategy=strategy,
            rtol=_tolerance("rtol", rtol, spec, flat),
            atol=_tolerance("atol", atol, spec, flat),
            report=reporter(progress, problem.times[0], problem.times[-1]),
            keep_dense=dense,
            callbacks=Callbacks(func),
            adjoint_callbacks=Callbacks(func, "_adjoint"),
            events=[
                FlatEvent(each, i, spec, arguments, Capture(each.func, arguments, wanted.only))
                for i, each in enumerate(events)
            ],
        )

    capture = functools.partial(Capture, func, arguments, wanted.only)
    if transformed():
        _check_lifted(dense, events, controller, execution)
        return solve_lifted(job, spec, flat, as_times(t), capture())
    task = job(flat, t, wanted)
    error: SolveError | None
    solution, error = execute(task, func, execution, capture)
    endless = bool(events) and math.isinf(float(as_times(t).detach()[-1]))
    if endless and solution.event is None and isinstance(error, StepLimitError | None):
        error = _not_found(solution)
    solution.t = (t if isinstance(t, Tensor) else task.problem.t)[: len(solution.t)]
    if error is not None:
        solution.status, solution.message = error.status, str(error)
        if throw:
            error.solution = solution
            raise error
    return solution


def default_controller(stepper: Stepper) -> Controller:
    """The controller of a method where none is asked for."""
    return FixedGrid() if stepper.error_order is None else _ADAPTIVE


_ADAPTIVE = Adaptive()


def default_gradient(method: str | Stepper | None) -> str:
    """The strategy of a method where none is asked for."""
    scipy = method == "scipy_solver" or isinstance(method, ScipySolver)
    return "continuous" if scipy else "symplectic"


def _scipy_controller(controller: Any, events: Sequence[Any], dense: bool) -> Controller:
    """A grid of one step, from start to end."""
    if controller is not None or events or dense:
        what = "controller" if controller is not None else "event" if events else "dense=True"
        raise ArgumentError(
            f"{what} does not work with scipy_solver, which takes its own steps and keeps none; "
            "leave it out, or use a method of this library"
        )
    return FixedGrid(grid_constructor=lambda func, y0, t: t[[0, -1]])


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


def _tolerance(name: str, value: Any, spec: StateSpec, y0: Tensor) -> float | Tensor:
    """A tolerance of the flat state, from a number, a tensor, or one for each leaf of a pytree."""
    if isinstance(value, list | tuple) and spec.tree is not None and len(value) == len(spec.shapes):
        parts = [
            torch.as_tensor(_tolerance(name, x, spec, y0)).expand(shape).reshape(-1)
            for x, shape in zip(value, spec.shapes, strict=True)
        ]
        return torch.cat(parts)
    if not isinstance(value, Tensor):
        return number(name, value)
    if value.requires_grad:
        raise ArgumentError(
            f"{name} requires grad, but step-size control is not differentiated; detach it"
        )
    return value


def _limited(problem: Problem, controller: Controller) -> tuple[Problem, Controller]:
    """An endless solve within a limit of steps."""
    if isinstance(controller, Adaptive):
        if controller.max_steps == Adaptive.max_steps:
            controller = replace(controller, max_steps=EVENT_STEPS)
        return problem, controller
    if not isinstance(controller, FixedGrid) or controller.step_size is None:
        raise ArgumentError(
            f"t[-1] = {problem.times[-1]} needs steps of a known size: use a method with an error "
            "estimate, FixedGrid(step_size=...) (in odeint options={'step_size': ...}), or end t "
            "where the event must have happened"
        )
    span = problem.direction * controller.step_size * EVENT_STEPS
    t = torch.cat([problem.t[:-1], problem.t[:1] + span])
    return replace(problem, t=t, times=tuple(t.tolist())), controller


def _not_found(solution: Solution) -> EventNotFoundError:
    steps = solution.stats.accepted + solution.stats.rejected
    return EventNotFoundError(
        f"no event within {steps} steps, which reached t = {float(solution.steps[-1]):.17g}. Check "
        "the sign and the direction of the event function, end t where the event must have "
        "happened, or allow more steps with controller=Adaptive(max_steps=...) (in odeint "
        "options={'max_num_steps': ...})"
    )


def _eager(execution: str) -> str:
    """How a solve runs that is written to a job folder, which compiled code cannot do.

    Raises:
        ArgumentError: It was to be compiled, or is part of a transform.
    """
    if transformed():
        raise ArgumentError(
            "folder=... is not supported inside a transform of torch.func (grad, vmap, jvp ...); "
            "differentiate with torch.autograd, or leave folder= out"
        )
    if execution not in ("auto", "eager"):
        raise ArgumentError(
            f"execution={execution!r} compiles the solve, which folder= then cannot write down; "
            "use execution='eager', or leave folder= out"
        )
    return "eager"


def _check_lifted(
    dense: bool, events: Sequence[Event], controller: Controller, execution: str
) -> None:
    if execution in ("step", "loop"):
        raise CompilationError(
            f"execution={execution!r} is not supported inside a transform of torch.func (grad, "
            "vmap, jvp ...), where solves run eagerly; use 'auto' or 'eager', or torch.autograd"
        )
    jumps = controller.jump_t if isinstance(controller, Adaptive) else None
    if isinstance(jumps, Tensor) and varies(jumps):
        raise ArgumentError(
            "jump_t varies inside a transform of torch.func (grad, vmap, jvp ...), which is not "
            "supported; differentiate the times of jumps with torch.autograd, or detach them"
        )
    if events:
        raise ArgumentError(
            "event=... is not supported inside a transform of torch.func (grad, vmap, jvp ...); "
            "differentiate the time and the state of an event with torch.autograd"
        )
    if dense:
        raise ArgumentError(
            "dense=True keeps steps, which a transform of torch.func (grad, vmap, jvp ...) cannot "
            "give; ask for all times in t, which costs no steps"
        )


def _grid(controller: Controller, func: Func, y0: Any, t: Tensor) -> Tensor | None:
    return controller.grid(func, y0, t) if isinstance(controller, FixedGrid) else None


def _jumps(controller: Controller, grid: Tensor | None, problem: Problem) -> Tensor:
    """Where steps see only one side of ``func``."""
    if isinstance(controller, Adaptive):
        return controller.jumps(problem.times[0], problem.times[-1])
    if grid is not None and isinstance(controller, FixedGrid) and controller.perturb:
        return grid.detach()
    return no_times()
