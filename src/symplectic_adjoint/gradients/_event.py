"""The time and the state of an event on the caller's graph, by the implicit function theorem.

With ``Y(t)`` the dense output of the last step, the event time ``tau`` solves ``g(tau, Y(tau)) =
0``, so that for any tangent of what ``Y`` and ``g`` depend on

    d tau = -dg / (g_t + <g_y, Y'(tau)>),        d y(tau) = dY + Y'(tau) d tau

where ``dg`` and ``dY`` are taken at constant time. ``Y(tau)`` at constant time is an output of the
solve like any other; this module adds what is due to the motion of ``tau``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import (
    ArgumentError,
    CaptureError,
    EventGradientError,
    SecondDerivativeError,
)
from symplectic_adjoint.capture import detached, foreign_leaves, has_tangent
from symplectic_adjoint.events import Root
from symplectic_adjoint.field import Field
from symplectic_adjoint.gradients._base import Record
from symplectic_adjoint.gradients._function import Tape, refuse, replayed
from symplectic_adjoint.loop import Outputs, Stats
from symplectic_adjoint.steppers._base import Saved, scaled


@dataclass
class Located:
    """An event that was found, and what its derivatives take.

    Attributes:
        root: The event, its time, and the slope of the dense output there.
        field: Makes the times that the event function receives.
        tape: The solve, to be replayed for derivatives of derivatives.
        random: Whether ``func`` draws random numbers.
    """

    root: Root
    field: Field
    tape: Tape
    random: bool

    def attach(self, y: Tensor, y0: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The event time and the state there.

        Args:
            y: The output there at constant time, on the caller's graph.
            y0: The initial state.
            nodes: Step times (N + 1,), attached to ``t`` where they follow it.

        Raises:
            ArgumentError: Something carries a tangent of forward mode.
        """
        tau = torch.tensor(self.root.t, dtype=torch.float64)
        if any(map(has_tangent, (y, *self.root.event.capture.tensors))):
            raise ArgumentError(
                "the time of an event has no forward-mode derivative here; use reverse mode, "
                "torch.autograd.grad, for solves with event=..."
            )
        if not torch.is_grad_enabled():
            return tau, y
        self._explore(y.detach())
        own = self.root.event.capture
        own.freeze()
        apply: Callable[..., tuple[Tensor, Tensor]] = _Moved.apply
        tau, y = apply(self, tau, y, y0, nodes, *self.tape.capture.tensors, *own.tensors)
        return tau.clone(), y.clone()  # which the caller may change in place

    def height(self, tau: Tensor, y: Tensor) -> Tensor:
        """The component of the event function that changes its sign."""
        return self.root.event(self.field.time(tau), y)[self.root.component]

    def moved(self, tau: Tensor, y: Tensor) -> Tensor:
        """``Y(tau)`` from the output ``y`` at constant time, for first derivatives."""
        return y + scaled(tau - self.root.t, self.root.slope)

    def replayed(self, tau: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """``Y(tau)`` with all its derivatives, by operations on (y0, nodes, *captured).

        Raises:
            SecondDerivativeError: The strategy is not exact, or random draws were not kept.
        """
        refuse(self.tape.strategy)
        records = [Record(Saved((), record.saved.tokens)) for record in self.tape.records]
        if self.random and not any(record.saved.tokens for record in records):
            raise SecondDerivativeError(
                f"func draws random numbers, which gradient={self.tape.strategy.name!r} has not "
                "kept for a second derivative of the event; use gradient='symplectic' and let y0 "
                "or a parameter of func require grad"
            )
        count = len(self.tape.outputs)
        tape = replace(
            self.tape,
            outputs=[Outputs(1, 1, None)] * (count - 1) + [Outputs(1, 2, None)],
            records=records or [Record(Saved(()))] * count,
            stats=Stats(),
        )
        y0, nodes, *captured = inputs
        times = torch.stack([nodes[0].detach(), tau])
        y, _ = replayed(tape, [y0, nodes, times, *captured])
        return y[1]

    def _explore(self, y: Tensor) -> None:
        """Find every tensor that the event function depends on.

        Raises:
            CaptureError: One of them cannot be replaced, so that its gradient would be lost.
        """
        event, tau, missed = self.root.event, torch.tensor(self.root.t), True
        while missed:
            aliases = detached(event.capture.tensors)
            known = (tau, y, *aliases)
            evaluate = functools.partial(self.height, tau, y)
            with event.capture.substituted(aliases), torch.enable_grad():
                value = evaluate()
                missed = value.requires_grad and bool(foreign_leaves(value, known))
                try:
                    missed = missed and event.capture.discover(evaluate, known)
                except CaptureError as error:
                    raise CaptureError(f"in {event.name}: {error}") from error


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, located: Located, tau: Tensor, y: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.located = located
        tau, y = tau.clone(), y.clone()
        ctx.save_for_backward(tau, y, *tensors)
        return tau, y

    @staticmethod
    def backward(ctx: Any, g_tau: Tensor, g_y: Tensor) -> tuple[Tensor | None, ...]:
        located: Located = ctx.located
        again = torch.is_grad_enabled()
        # Views, so that an input that appears twice is told apart.
        tau, y, *tensors = [
            x.view_as(x) if again else x.detach().requires_grad_() for x in ctx.saved_tensors
        ]
        count = 2 + len(located.tape.capture.tensors)
        sources, own = tensors[:count] if again else [y], tensors[count:]
        with torch.enable_grad():
            end = located.replayed(tau, sources) if again else located.moved(tau, y)
            with located.root.event.capture.resumed(own), located.tape.autocast.restored():
                height = located.height(tau, end)
        rate, *shares = _grads(height, [tau, *sources, *own], None, again)
        along, *direct = _grads(end, [tau, *sources], g_y, again)
        assert along is not None
        move = -(g_tau + along) / _checked(rate, located)
        total = [
            _sum(a, None if b is None else (move * b).to(b.dtype))
            for a, b in zip([*direct, *[None] * len(own)], shares, strict=True)
        ]
        if again:
            return None, None, None, *total
        return None, None, total[0], *[None] * count, *total[1:]


def _grads(
    output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor | None, again: bool
) -> list[Tensor | None]:
    """Cotangents of the inputs; None where there is no dependence."""
    wanted = [x for x in inputs if x.requires_grad]
    if not output.requires_grad:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            output, wanted, cotangent, retain_graph=True, create_graph=again, allow_unused=True
        )
    )
    return [next(found) if x.requires_grad else None for x in inputs]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _checked(rate: Tensor | None, located: Located) -> Tensor:
    """The slope of the event function along the solution, not zero.

    Raises:
        EventGradientError: It is zero or not finite.
    """
    value = 0.0 if rate is None else float(rate.detach())
    if rate is None or value == 0.0 or not math.isfinite(value):
        raise EventGradientError(
            f"{located.root.event.name} changes its sign at t = {located.root.t:.17g} with slope "
            f"{value} along the solution, so that the time of the event has no derivative. Use a "
            "smooth function that crosses zero, or detach the time and the state of the event."
        )
    return rate
