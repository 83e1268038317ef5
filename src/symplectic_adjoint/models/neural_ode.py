"""An initial value problem as a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from symplectic_adjoint import gradients
from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint._types import Func
from symplectic_adjoint.api import default_gradient, resolved_stepper, solve
from symplectic_adjoint.capture import Capture
from symplectic_adjoint.controllers import Controller
from symplectic_adjoint.gradients import Strategy
from symplectic_adjoint.loop import Stats
from symplectic_adjoint.solution import Solution
from symplectic_adjoint.steppers import Stepper


class Autonomous(nn.Module):
    """A right-hand side that does not depend on time: ``func(t, y) = net(y)``.

    Every solver here calls ``func(t, y)``. This makes such a function of a network that takes the
    state alone, and hands on further arguments.

    Args:
        net: The network, or any function of the state that holds no parameters.

    Raises:
        ArgumentError: ``net`` is no module, but depends on parameters of one.

    Example:
        >>> import torch
        >>> func = Autonomous(nn.Linear(2, 2))
        >>> func(torch.tensor(0.0), torch.ones(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, net: Callable[..., Any]) -> None:
        super().__init__()
        _check_owned("net", net)
        self.net = net

    def forward(self, t: Tensor, y: Any, *args: Any) -> Any:
        """``net(y, *args)``."""
        return self.net(y, *args)


class NeuralODE(nn.Module):
    """The solution of ``dy/dt = func(t, y)`` as a function of ``y(t[0])``.

    Called with a state it returns the state at the end of the time span, so that it is one layer
    among others; ``trajectory`` returns the states on the way, and ``solve`` all there is to know.

    Args:
        func: The derivative of the state, ``func(t, y)``: a module, or a function that holds no
            parameters. A network that takes ``y`` alone is ``Autonomous(net)``.
        t: Where to start and where to end, and the times of ``trajectory`` in between, (T,). Where
            it is an ``nn.Parameter`` it is one of the module's: the span is then learned.
        method: As for ``solve``, like all that follows.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        controller: Step size control.
        gradient: Gradient strategy, by name or as an object.

    Attributes:
        options: The arguments from ``method`` on, by name; they may be changed between solves.
        stats: Counts of the last solve, completed by its backward pass; None before the first.

    Raises:
        ArgumentError: ``func`` is no function, or depends on parameters of a module that it is not,
            which this module could not list among its own.
        UnknownNameError: ``method`` or ``gradient`` is unknown.

    Example:
        >>> import torch
        >>> field = Autonomous(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)))
        >>> ode = NeuralODE(field, rtol=1e-4, atol=1e-5)
        >>> model = nn.Sequential(nn.Linear(2, 4), ode, nn.Linear(4, 1))
        >>> model(torch.randn(8, 2)).shape
        torch.Size([8, 1])
        >>> ode.trajectory(torch.randn(8, 4), torch.linspace(0.0, 1.0, 5)).shape
        torch.Size([5, 8, 4])
        >>> ode.stats.accepted > 0
        True
    """

    def __init__(
        self,
        func: Func,
        t: Any = (0.0, 1.0),
        *,
        method: str | Stepper | None = None,
        rtol: float | Tensor = 1e-7,
        atol: float | Tensor = 1e-9,
        controller: Controller | None = None,
        gradient: str | Strategy | None = None,
        execution: str = "eager",
    ) -> None:
        super().__init__()
        _check_owned("func", func)
        strategy = gradients.get(default_gradient(method) if gradient is None else gradient)
        strategy.check(resolved_stepper(method, strategy))
        self.func = func
        self.t = t
        self.options = {
            "method": method,
            "rtol": rtol,
            "atol": atol,
            "controller": controller,
            "gradient": gradient,
            "execution": execution,
        }
        self.stats: Stats | None = None

    def forward(self, y0: Any, t: Any = None, args: Sequence[Any] = ()) -> Any:
        """The state at the last time.

        Args:
            y0: The state at the first time: a tensor of any shape, or a pytree of tensors.
            t: Times, (T,), in place of the module's own.
            args: Passed on to ``func``.

        Returns:
            Like ``y0``.

        Raises:
            SolveError: The last time could not be reached.
        """
        return pytree.tree_map(lambda y: y[-1], self.trajectory(y0, t, args))

    def trajectory(self, y0: Any, t: Any = None, args: Sequence[Any] = ()) -> Any:
        """The states at all times, the first one included.

        Args:
            y0: As for a call.
            t: Times, (T,), in place of the module's own.
            args: Passed on to ``func``.

        Returns:
            Of shape (T, *y0.shape), or a pytree like ``y0`` with such leaves.

        Raises:
            SolveError: The last time could not be reached.
        """
        return self.solve(y0, t, args=args).y

    def solve(self, y0: Any, t: Any = None, **options: Any) -> Solution:
        """The whole solution: the states, the steps taken, and what they cost.

        Args:
            y0: As for a call.
            t: Times, (T,), in place of the module's own.
            **options: Further arguments of the function ``solve``, such as ``dense=True``; they
                take precedence over the module's.

        Returns:
            The solution.

        Raises:
            SolveError: The last time could not be reached.
        """
        times = self.t if t is None else t
        solution = solve(self.func, y0, times, **{**self.options, **options})
        self.stats = solution.stats
        return solution

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        settings = {"t": self.t, **self.options}
        return ", ".join(f"{k}={v!r}" for k, v in settings.items() if v is not None)


def _check_owned(name: str, func: Any) -> None:
    """A function's parameters would be found by a solve, but by no optimiser."""
    if isinstance(func, nn.Module):
        return
    if not callable(func) or isinstance(func, type):
        raise ArgumentError(f"{name} = {func!r} is neither a module nor a function")
    capture = Capture(func)
    for path, x in zip(capture.names, capture.tensors, strict=True):
        if isinstance(x, nn.Parameter):
            raise ArgumentError(
                f"{name} is no module, but depends on the parameter {path} of shape "
                f"{tuple(x.shape)}, which parameters() and state_dict() would not list; write "
                "a module with forward(t, y), or Autonomous(net) for a network of the state alone"
            )
