"""Splitting methods on a state of two parts, and their transposes.

The state is ``(q, p)``, the equation ``q' = v(t, p)``, ``p' = g(t, q)``. Move ``i`` of a step
changes one part by ``f`` at the point that the moves before it have reached,

    x_{i+1} = x_i + d_i h P_i f(t + c_i h, x_i),        x_0 = y,    x_m = y1,

with ``P_i`` the projection on the part that moves. The transpose goes through the moves in reverse,

    kappa_i = d_i h P_i lam_{i+1},    lam_i = lam_{i+1} + (df/dy (t + c_i h, x_i))^T kappa_i,

one product a move (Matsuda and Miyatake 2021, arXiv 2003.09789, where the pair of a symplectic
partitioned method and its transpose is again symplectic, and so gives the exact gradient).

Where the first and the last move change the same part (Verlet, Yoshida), the first move of a step
needs what the last evaluation of the step before has given, and the state carries it along: the
cotangent that the next step puts on it is pulled back together with that of the last move.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, NotSeparableError
from symplectic_adjoint._tree import StateSpec
from symplectic_adjoint._types import Time, as_float
from symplectic_adjoint.field import DetachedField, Field, RandomState, Stage
from symplectic_adjoint.splitting import Splitting
from symplectic_adjoint.steppers._base import (
    Cotangent,
    DenseCotangent,
    Reversal,
    Saved,
    Work,
    dot,
    power_slopes,
    powers,
    scaled,
)

_HERMITE = torch.tensor([[0.0, 3.0, -2.0], [1.0, -2.0, 1.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
"""Weights, in powers of theta, of ``y1 - y`` and of ``h`` times the slopes at both ends."""


class PartitionedState(NamedTuple):
    """Time, solution, and the evaluation with which the next step begins.

    After a step of a closed method the node lies where its last move saw ``f``.
    """

    t: Time
    y: Tensor
    node: Stage


@dataclass(slots=True)
class PartitionedStep:
    """A step: the points of its moves; where it holds outputs, ``f`` at both ends follows."""

    start: PartitionedState
    t1: Time
    y1: Tensor
    stages: list[Stage]
    tokens: Sequence[RandomState | None] = ()

    @property
    def h(self) -> Time:
        return self.t1 - self.start.t


@dataclass
class Partitioned:
    """A splitting method, explicit and symplectic for a separable Hamiltonian system.

    The state is ``(q, p)``: a pytree of two branches, or one tensor whose last dimension holds
    ``q`` and then ``p``, of equal sizes. ``func`` gives ``(dq, dp)`` in the same form, where ``dq``
    must depend on ``p`` (and time) alone, and ``dp`` on ``q`` (and time) alone. Each solve checks
    this with two evaluations near its start, and raises ``NotSeparableError``.

    Yoshida's methods step back and forth within a step: ``func`` is also evaluated at times before
    and after it (``splitting.reach``), and so outside of the interval of the solve.

    Args:
        splitting: The method.
        size: How many numbers of the flat state, along its last dimension, are ``q``; half of them
            where None.

    Example:
        >>> import symplectic_adjoint as sa
        >>> from symplectic_adjoint import splitting
        >>> stepper = Partitioned(splitting.get("verlet"))
        >>> def pendulum(t, state):
        ...     q, p = state
        ...     return p, -torch.sin(q)
        >>> start = torch.ones(1), torch.zeros(1)
        >>> q, p = sa.solve(pendulum, start, torch.linspace(0, 10, 101), method=stepper).y
        >>> energy = p**2 / 2 - torch.cos(q)
        >>> bool((energy - energy[0]).abs().max() < 2e-3)
        True
    """

    splitting: Splitting
    size: int | None = None
    name: str = field(init=False)
    order: int = field(init=False)
    error_order: int | None = field(init=False, default=None)
    work: Work = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.name, self.order = self.splitting.name, self.splitting.order
        count, closed = len(self.splitting.moves), self.splitting.closed
        self.work = Work(
            inner=count - 1,
            node=int(not closed),
            extra=2,
            points=count - 1 - closed,
            checks=2,
        )

    def fitted(self, spec: StateSpec) -> Partitioned:
        """The method for states of this form.

        Raises:
            ArgumentError: The state does not have two parts.
        """
        if spec.tree is None:
            shape = spec.shapes[0]
            if self.size is None and (not shape or shape[-1] % 2):
                raise ArgumentError(
                    f"method {self.name!r} moves the two parts of (q, p) in turn, but y0 has shape "
                    f"{tuple(shape)}; give a tuple (q, p), or a tensor whose last dimension holds "
                    "q and then p, of equal sizes"
                )
            return self
        branches = spec.tree.children()
        if len(branches) != 2:
            raise ArgumentError(
                f"method {self.name!r} moves the two parts of (q, p) in turn, but y0 has "
                f"{len(branches)} branches ({', '.join(spec.names)}); give a tuple (q, p), where q "
                "and p may be tuples again"
            )
        return Partitioned(self.splitting, sum(spec.sizes[: branches[0].num_leaves]))

    # Forward ---------------------------------------------------------------------------------

    def begin(self, t: Time, y: Tensor) -> PartitionedState:
        return PartitionedState(t, y, Stage(t, y))

    def slope(self, field: Field, state: PartitionedState) -> Tensor:
        return field.value(state.node)

    def admit(self, field: Field, state: PartitionedState, t1: float) -> None:
        """Refuse a system that is not separable, as seen along the first moves from a state.

        Raises:
            NotSeparableError: A part moves by itself.
        """
        drawn = RandomState(field.device)
        h, x, k = t1 - as_float(state.t), state.y.detach(), field.value(state.node).detach()
        for part, _, _ in self.splitting.moves[:2]:
            x = self._moved(x, part, 0.5 * h, k)
            with drawn.restored():
                before, k = k, field.evaluate(Stage(state.t, x)).detach()
            was, now = self._part(before, part), self._part(k, part)
            change, size = torch.linalg.vector_norm(now - was), torch.linalg.vector_norm(was)
            if bool(change > torch.finfo(k.dtype).eps ** 0.75 * size):
                raise NotSeparableError(
                    _not_separable(self.name, part, float(change), as_float(state.t))
                )

    def step(
        self,
        field: Field,
        state: PartitionedState,
        t1: Time,
        tokens: Sequence[RandomState | None] = (),
    ) -> PartitionedStep:
        step = PartitionedStep(state, t1, state.y, [state.node], tokens)
        x = state.y
        for i in range(1, len(self.splitting.moves)):
            x = self._move(field, step, i - 1, x)
            step.stages.append(self._stage(step, i, self._time(step, i), x))
        step.y1 = self._move(field, step, len(self.splitting.moves) - 1, x)
        if not self.splitting.closed:
            step.stages.append(self._stage(step, len(step.stages), t1, step.y1))
        return step

    def error(self, field: Field, step: PartitionedStep) -> Tensor:
        raise NotImplementedError("splitting methods estimate no error")

    def end(self, step: PartitionedStep) -> PartitionedState:
        return PartitionedState(step.t1, step.y1, step.stages[self._node])

    def stages(self, step: PartitionedStep) -> Sequence[Stage]:
        return step.stages

    def carried(self, state: PartitionedState) -> tuple[Tensor, ...]:
        """The solution and, after a step of a closed method, what the next move needs."""
        if not self.splitting.closed or state.node.k is None:
            return (state.y,)
        return (state.y, self._part(state.node.k, self.splitting.moves[0].part).clone())

    def resume(
        self, t: Time, tensors: Sequence[Tensor], token: RandomState | None
    ) -> PartitionedState:
        y, *rest = tensors
        k = self._alone(y, self.splitting.moves[0].part, rest[0]) if rest else None
        return PartitionedState(t, y, Stage(t, y, k, token))

    def interpolate(self, field: Field, step: PartitionedStep, theta: Tensor) -> Tensor:
        self._add_ends(step)
        y = step.start.y
        slopes = (scaled(step.h, field.value(stage)) for stage in step.stages[self._node + 1 :])
        parts = torch.stack([step.y1 - y, *slopes])
        between: Tensor = y + torch.tensordot(_weights(theta).to(y), parts, dims=1)
        return between

    def _move(self, field: Field, step: PartitionedStep, i: int, x: Tensor) -> Tensor:
        part, weight, _ = self.splitting.moves[i]
        return self._moved(x, part, weight * step.h, field.value(step.stages[i]))

    def _moved(self, x: Tensor, part: int, h: Time, k: Tensor) -> Tensor:
        parts = list(self._parts(x))
        parts[part] = parts[part] + scaled(h, self._part(k, part))
        return torch.cat(parts, -1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.shape[-1] // 2 if self.size is None else self.size
        q, p = x.split([size, x.shape[-1] - size], -1)
        return q, p

    def _part(self, x: Tensor, part: int) -> Tensor:
        return self._parts(x)[part]

    def _alone(self, like: Tensor, part: int, x: Tensor) -> Tensor:
        """One part, with zeros for the other."""
        parts = [torch.zeros_like(other) for other in self._parts(like)]
        parts[part] = x
        return torch.cat(parts, -1)

    @property
    def _node(self) -> int:
        """The stage with which the next step begins."""
        return len(self.splitting.moves) - self.splitting.closed

    def _time(self, step: PartitionedStep, i: int) -> Time:
        c = self.splitting.moves[i].c
        if c in (0.0, 1.0):  # which may know their side of a jump
            return step.t1 if c else step.start.t
        return step.start.t + c * step.h

    def _stage(self, step: PartitionedStep, i: int, t: Time, x: Tensor) -> Stage:
        return Stage(t, x, None, step.tokens[i] if i < len(step.tokens) else None)

    def _add_ends(self, step: PartitionedStep) -> None:
        """The stages at both ends, which only outputs between them need."""
        if len(step.stages) == self._node + 1:
            for t, x in ((step.start.t, step.start.y), (step.t1, step.y1)):
                step.stages.append(self._stage(step, len(step.stages), t, x))

    # Keeping ---------------------------------------------------------------------------------

    def save(self, step: PartitionedStep, stages: bool) -> Saved:
        tokens = tuple(stage.token for stage in step.stages)
        kept = self.carried(step.start)
        if stages:
            # A point differs from the one before in one part; the last of each is in the end.
            moves = self.splitting.moves[:-2]
            points = step.stages[1:]
            kept = (
                step.start.y,
                *(self._part(s.x, m.part).clone() for m, s in zip(moves, points, strict=False)),
            )
        return Saved(kept, tokens if any(tokens) else (), stages)

    def load(
        self,
        field: DetachedField,
        start: Time,
        t1: Time,
        saved: Saved,
        end: PartitionedState,
        dense: bool,
    ) -> PartitionedStep:
        y, *rest = saved.tensors
        token = saved.tokens[0] if saved.tokens else None
        tensors = (y,) if saved.stages else saved.tensors
        step = PartitionedStep(self.resume(start, tensors, token), t1, end.y, [], saved.tokens)
        step.stages.append(step.start.node)
        x, moves = y, self.splitting.moves
        for i in range(1, len(moves)):
            if not saved.stages:
                x = self._move(field, step, i - 1, x)
            else:
                parts = list(self._parts(x))
                part = moves[i - 1].part
                parts[part] = rest[i - 1] if i <= len(rest) else self._part(end.y, part)
                x = torch.cat(parts, -1)
            step.stages.append(self._stage(step, i, self._time(step, i), x))
        if self.splitting.closed:
            step.stages[-1].graph = end.node.graph
        else:
            step.stages.append(end.node)
        if dense:
            self._add_ends(step)
        return step

    # Reverse ---------------------------------------------------------------------------------

    def transpose(
        self,
        reversal: Reversal,
        n: int,
        step: PartitionedStep,
        cotangent: Cotangent,
        dense: DenseCotangent | None,
    ) -> Cotangent:
        sweep = _Transpose(self, reversal, n, step, dense)
        lam = cotangent.y
        start: Tensor | float = 0.0
        if dense is not None:
            lam, start = sweep.outputs(dense, lam)
        if not self.splitting.closed:
            lam = sweep.pull(self._node, None, cotangent, lam)
        for i in range(len(self.splitting.moves) - 1, 0, -1):
            carried = cotangent if i == self._node else None
            lam = sweep.pull(i, sweep.kappa(i, lam), carried, lam)
        kappa = sweep.kappa(0, lam)
        reports: list[Callable[[Tensor], None]] = []
        if sweep.times is not None:
            reports.append(functools.partial(sweep.report_size, kappa))
        return Cotangent(lam + start, kappa, reports)

    def transpose_begin(
        self, reversal: Reversal, state: PartitionedState, cotangent: Cotangent, n: int = 0
    ) -> Tensor:
        if cotangent.k is None:
            return cotangent.y
        times = reversal.times
        wants_time = times is not None and times.wanted(n)
        pulled = reversal.field.pull(state.node, cotangent.k, wants_time)
        for report in cotangent.on_value:
            report(pulled.k)
        if times is not None and pulled.time is not None:
            times.add_time(n, 0.0, pulled.time)
        return cotangent.y + pulled.v


class _Transpose:
    """The way back through one step."""

    def __init__(
        self,
        method: Partitioned,
        reversal: Reversal,
        n: int,
        step: PartitionedStep,
        dense: DenseCotangent | None,
    ) -> None:
        self.method = method
        self.field = reversal.field
        self.times = reversal.times if reversal.wants_time(n) else None
        self.n = n
        self.step = step
        self.h = as_float(step.h)

    def kappa(self, i: int, lam: Tensor) -> Tensor:
        """The cotangent that move ``i`` puts on its evaluation."""
        part, weight, _ = self.method.splitting.moves[i]
        return self.method._alone(lam, part, self.method._part(lam, part) * (self.h * weight))

    def pull(self, i: int, own: Tensor | None, carried: Cotangent | None, lam: Tensor) -> Tensor:
        """``lam`` before stage ``i``, which has its own cotangent and that of the next step."""
        shares = [x for x in (own, None if carried is None else carried.k) if x is not None]
        if not shares:
            return lam
        reports = [] if carried is None else carried.on_value
        wants_time = self.times is not None or bool(reports)
        pulled = self.field.pull(self.step.stages[i], sum(shares[1:], shares[0]), wants_time)
        for report in reports:
            report(pulled.k)
        if own is not None:
            self.report_size(own, pulled.k)
        c = self.method.splitting.moves[i].c if own is not None else 1.0
        self._report_time(c, pulled.time)
        return lam + pulled.v

    def outputs(self, dense: DenseCotangent, lam: Tensor) -> tuple[Tensor, Tensor]:
        """The cotangents of the end and, apart from the moves, of the start."""
        g = dense.g
        shares = torch.tensordot(_weights(dense.theta).T.to(g), g, dims=1)
        rise, *ends = shares.unbind()
        y = self.step.start.y
        values = [self.step.y1 - y]
        pulls = []
        for stage, share, c in zip(self.step.stages[-2:], ends, (0.0, 1.0), strict=True):
            pulled = self.field.pull(stage, self.h * share, self.times is not None)
            self._report_time(c, pulled.time)
            self.report_size(self.h * share, pulled.k)
            pulls.append(pulled.v)
            values.append(self.h * pulled.k)
        if dense.slopes is not None:
            slopes = (power_slopes(dense.theta, 3) @ _HERMITE.T).to(dense.slopes)
            along = torch.stack([x.reshape(-1) for x in values])
            dense.slopes += (slopes * (g.reshape(len(g), -1).conj() @ along.T).real).sum(1)
        return lam + rise + pulls[1], g.sum(0) - rise + pulls[0]

    def report_size(self, kappa: Tensor, k: Tensor) -> None:
        """With the value of a stage known: its part of the cotangent of the step size."""
        if self.times is not None:
            self.times.add_size(self.n, dot(k, kappa) / self.h)

    def _report_time(self, c: float, value: Tensor | None) -> None:
        if self.times is not None and value is not None:
            self.times.add_time(self.n, c, value)


def _weights(theta: Tensor) -> Tensor:
    """Hermite's weights at places ``theta``: (m,) -> (m, 3)."""
    return powers(theta, 3) @ _HERMITE.T


def _not_separable(name: str, part: int, change: float, t: float) -> str:
    own = "qp"[part]
    return (
        f"method {name!r} needs dq to depend on p alone and dp on q alone, but near t = {t:.17g} "
        f"d{own} changed by {change:.3g} when only {own} did. Use a method for general systems: "
        "'implicit_midpoint', 'gl4' or 'gl6' are symplectic, too; 'dopri5' is explicit. (The first "
        "half of the state is q, the second p.)"
    )
