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

from symplectic_adjoint._errors import CaptureError, EventGradientError, SecondDerivativeError
from symplectic_adjoint.capture import detached, foreign_leaves
from symplectic_adjoint.events import Root
from symplectic_adjoint.field import Field
from symplectic_adjoint.gradients._base import Record
from symplectic_adjoint.gradients._function import Autocast, Tape, attach
from symplectic_adjoint.loop import Outputs, Stats
from symplectic_adjoint.steppers._base import Saved, dot


@dataclass
class Located:
    """An event that was found, and what its derivatives take.

    Attributes:
        root: The event, its time, and the slope of the dense output there.
        field: Makes times and states that the event function receives.
        autocast: Autocast state of the forward pass.
        again: ``(tau, y) -> Y(tau)``, whose value is ``y``, for derivatives of derivatives.
    """

    root: Root
    field: Field
    autocast: Autocast
    again: Callable[[Tensor, Tensor], Tensor]

    def attach(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The event time, and the state there, from ``y``, the output there at constant time."""
        tau = torch.tensor(self.root.t, dtype=torch.float64)
        if not torch.is_grad_enabled():
            return tau, y
        self._explore(y.detach())
        capture = self.root.event.capture
        capture.freeze()
        apply: Callable[..., tuple[Tensor, Tensor]] = _Moved.apply
        return apply(self, tau, y, *capture.tensors)

    def height(self, tau: Tensor, y: Tensor) -> Tensor:
        """The component of the event function that changes its sign."""
        return self.root.event(self.field.time(tau), y)[self.root.component]

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
        inputs = [x.view_as(x) if again else x.detach().requires_grad_() for x in ctx.saved_tensors]
        tau, y, *tensors = inputs
        capture = located.root.event.capture
        with torch.enable_grad(), capture.substituted(tensors), located.autocast.restored():
            height = located.height(tau, y)
        h_t, h_y, *h = _derivatives(height, inputs, again)
        along = _along(located, tau, y, again)
        rate = along(h_y) if h_t is None else along(h_y) + h_t
        _check(rate, located)
        move = -(g_tau + along(g_y)) / rate
        shares = [None if x is None else (move * x).to(x.dtype) for x in (h_y, *h)]
        return None, None, g_y if shares[0] is None else g_y + shares[0], *shares[1:]


def _derivatives(height: Tensor, inputs: Sequence[Tensor], again: bool) -> list[Tensor | None]:
    if not height.requires_grad:
        return [None] * len(inputs)
    return [*torch.autograd.grad(height, inputs, create_graph=again, allow_unused=True)]


def _along(
    located: Located, tau: Tensor, y: Tensor, again: bool
) -> Callable[[Tensor | None], Tensor]:
    """``v -> <v, Y'(tau)>``, on the graph where it is to be differentiated again."""
    moved = located.again(tau, y.detach()) if again else y

    def along(v: Tensor | None) -> Tensor:
        if v is None:
            return torch.zeros_like(tau)
        if not again:
            return dot(located.root.slope, v).to(tau)
        return torch.autograd.grad(moved, tau, v, create_graph=True)[0]

    return along


def _check(rate: Tensor, located: Located) -> None:
    value = float(rate.detach())
    if value == 0.0 or not math.isfinite(value):
        raise EventGradientError(
            f"{located.root.event.name} changes its sign at t = {located.root.t:.17g} with slope "
            f"{value} along the solution, so that the time of the event has no derivative. Use a "
            "smooth function that crosses zero, or detach the time and the state of the event."
        )


def replaying(
    tape: Tape, y0: Tensor, nodes: Tensor, random: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """``again`` of a recorded solve: its last step has the event for its only output."""

    def again(tau: Tensor, y: Tensor) -> Tensor:
        count = len(tape.outputs)
        if not tape.strategy.exact or (random and not tape.records):
            raise SecondDerivativeError(
                f"gradient={tape.strategy.name!r} has not kept what a second derivative of an "
                "event takes; use 'symplectic' or another exact strategy"
            )
        own = replace(
            tape,
            aliases=(),
            outputs=[Outputs(1, 1, None)] * (count - 1) + [Outputs(1, 2, None)],
            records=[Record(Saved((), record.saved.tokens)) for record in tape.records]
            or [Record(Saved(())) for _ in range(count)],
            end=(),
            stats=Stats(),
        )
        times = torch.stack([nodes[0].detach(), tau])
        return attach(own, torch.stack([y0.detach(), y]), y0, nodes, times)[1]

    return again
