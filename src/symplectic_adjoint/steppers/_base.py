"""What the loop and the gradient strategies ask of a stepper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from symplectic_adjoint._types import Time
from symplectic_adjoint.field import DetachedField, Field, RandomState, Stage


class State(Protocol):
    """What a stepper carries from step to step, beginning with the time and the solution."""

    @property
    def t(self) -> Time: ...
    @property
    def y(self) -> Tensor: ...


class Step(Protocol):
    """A step taken from ``start`` to time ``t1``, where the solution is ``y1``."""

    @property
    def start(self) -> Any: ...
    @property
    def t1(self) -> Time: ...
    @property
    def y1(self) -> Tensor: ...


class Saved(NamedTuple):
    """What of a step is kept for its reversal.

    Attributes:
        tensors: The state it starts from, and its stages where these were asked for.
        tokens: Random states of its stages. A step taken again with them takes as many stages.
        stages: Whether the stages are among the tensors; for steppers that cannot tell otherwise.
    """

    tensors: Sequence[Tensor]
    tokens: Sequence[RandomState | None] = ()
    stages: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """How many evaluations of ``f`` the parts of a step take.

    The node is the slope at a step's end, at which the next step begins.

    Attributes:
        inner: Stages between the ends on which the new value depends.
        node: 1, or 0 where the step yields that slope without an evaluation, or does not use it.
        start: 1, or 0 where the first step does not use the slope at which it begins, either.
        error: Further stages that only the error estimate weighs.
        error_node: Whether it weighs the node.
        extra: Further stages that only dense outputs weigh.
        dense_node: Whether they weigh the node. Where steps do not use it, the next step does not
            evaluate it again if it holds dense outputs, too.
        points: Stages whose values are needed to find the points of a step again.
        dense_points: Further ones to find the points of the extra stages.
        points_node: Whether the node is among those.
        varies: Whether steps take further stages between the ends, each of which says how many
            (``step.further``); the points of a step depend on all of them.
        checks: Evaluations of a solve that only check that ``f`` suits the method.
    """

    inner: int
    node: int = 1
    error: int = 0
    error_node: bool = False
    extra: int = 0
    dense_node: bool = False
    points: int = 0
    dense_points: int = 0
    points_node: bool = False
    varies: bool = False
    start: int = 1
    checks: int = 0


@dataclass(slots=True)
class DenseCotangent:
    """Cotangents ``g`` (m, ...) of the outputs at places ``theta`` (m,) inside a step.

    Attributes:
        theta: Places within the step, float64 on the CPU.
        g: Cotangents of the outputs there.
        slopes: Accumulates the cotangents of ``theta`` (m,), on the device of ``g``; None where
            the output times need no gradient.
    """

    theta: Tensor
    g: Tensor
    slopes: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The sum of the cotangents."""
        return self.g.sum(0)


@dataclass(slots=True)
class DenseMoments:
    """Cotangents of outputs inside a step, summed with the powers of their places as weights.

    Attributes:
        moments: ``sum_m (2 theta_m - 1)^q g_m`` for q = 0, 1, ... (degree + 1, ...).
    """

    moments: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of the cotangents."""
        return self.moments[0]


@dataclass(slots=True)
class TimeCotangents:
    """Accumulates the cotangents of the step times (N + 1,), on the state's device."""

    values: Tensor
    wanted: Callable[[int], bool]

    def add_time(self, n: int, c: float, value: Tensor) -> None:
        """Cotangent of the time ``t_n + c (t_{n+1} - t_n)``."""
        self.values[n] += (1.0 - c) * value
        self.values[n + 1] += c * value

    def add_size(self, n: int, value: Tensor) -> None:
        """Cotangent of the step size ``t_{n+1} - t_n``."""
        self.values[n] -= value
        self.values[n + 1] += value


@dataclass(slots=True)
class Reversal:
    """What the transposes of a sweep share.

    Attributes:
        field: The field, with aliases that require grad.
        times: Where the cotangents of the step times go; None where none is wanted.
    """

    field: DetachedField
    times: TimeCotangents | None = None
    _zero: Tensor | None = None

    def wants_time(self, n: int) -> bool:
        """Whether step ``n`` touches a time whose gradient is wanted."""
        return self.times is not None and (self.times.wanted(n) or self.times.wanted(n + 1))

    def zero(self, like: Tensor) -> Tensor:
        """A state of zeros, where sums of cotangents begin."""
        if self._zero is None:
            self._zero = torch.zeros_like(like)
        return self._zero


@dataclass(slots=True)
class SlopeCotangent:
    """Cotangent of a slope that a state carries.

    Attributes:
        k: The cotangent, a tensor of its own; None when nothing depends on the slope.
        on_value: Called with the slope once it is known.
    """

    k: Tensor | None = None
    on_value: list[Callable[[Tensor], None]] = field(default_factory=list)

    def add(self, k: Tensor | None, *on_value: Callable[[Tensor], None]) -> None:
        """Add a cotangent, and who wants the value."""
        if k is not None:
            self.k = k if self.k is None else self.k + k
        self.on_value += on_value

    def add_scaled(self, k: Tensor, weight: float) -> None:
        """Add ``weight k``."""
        if self.k is None:
            self.k = torch.mul(k, weight)
        else:
            self.k.add_(k, alpha=weight)


@dataclass(slots=True)
class Cotangent:
    """Cotangent of a state, of ``y`` and of the slopes that the state carries.

    Attributes:
        y: Cotangent of the solution.
        k: Cotangent of the carried value; None when nothing depends on it.
        on_value: Called with the carried value once it is known.
        past: Cotangents of the slopes before it, newest first, where the method has several steps.
    """

    y: Tensor
    k: Tensor | None = None
    on_value: list[Callable[[Tensor], None]] = field(default_factory=list)
    past: list[SlopeCotangent] = field(default_factory=list)


class Stepper(Protocol):
    """A method: ``step`` and, beside it, ``transpose``.

    A stepper holds no state. ``transpose`` is the exact adjoint of the linearised ``step``:
    with ``delta`` any tangent and ``lam`` any cotangent, ``<lam, S delta> = <S^T lam, delta>``.
    """

    name: str
    order: int
    error_order: int | None
    work: Work

    def begin(self, t: Time, y: Tensor) -> Any:
        """The state that starts a solve."""
        ...

    def slope(self, field: Field, state: Any) -> Tensor:
        """``f`` at the state, evaluated at most once."""
        ...

    def step(
        self, field: Field, state: Any, t1: Time, tokens: Sequence[RandomState | None] = ()
    ) -> Any:
        """A step from ``state`` to ``t1``; with ``tokens`` it draws the random numbers again."""
        ...

    def error(self, field: Field, step: Any) -> Tensor:
        """The estimate of the local error of a step; what only it needs is evaluated here."""
        ...

    def end(self, step: Any) -> Any:
        """The state after a step."""
        ...

    def stages(self, step: Any) -> Sequence[Stage]:
        """The stages of a step, in the order of their evaluation."""
        ...

    def carried(self, state: Any) -> tuple[Tensor, ...]:
        """The tensors that make up a state, beginning with ``y``."""
        ...

    def resume(self, t: Time, tensors: Sequence[Tensor], token: RandomState | None) -> Any:
        """A state from its tensors (``carried``) or from ``y`` alone."""
        ...

    def interpolate(self, field: Field, step: Any, theta: Tensor) -> Tensor:
        """The solution at places ``theta`` (m,) of a step, of shape (m, ...)."""
        ...

    def save(self, step: Any, stages: bool) -> Saved:
        """What to keep of a step: its start, and its stages where asked for."""
        ...

    def load(
        self, field: DetachedField, start: Time, t1: Time, saved: Saved, end: Any, dense: bool
    ) -> Any:
        """A step ready to be transposed; stages that were not saved are computed again."""
        ...

    def transpose(
        self,
        reversal: Reversal,
        n: int,
        step: Any,
        cotangent: Cotangent,
        dense: DenseCotangent | None,
    ) -> Cotangent:
        """The cotangent of a step's start from that of its end and of its dense outputs."""
        ...

    def transpose_begin(
        self, reversal: Reversal, state: Any, cotangent: Cotangent, n: int = 0
    ) -> Tensor:
        """The cotangent of ``y`` from that of the state that begins step ``n`` anew."""
        ...


def scaled(h: Time, x: Tensor) -> Tensor:
    """``h x`` in the dtype of ``x``; a 0-dim one would be promoted by a time with a gradient."""
    return (h * x).to(x.dtype) if isinstance(h, Tensor) else h * x


def add_scaled(x: Tensor, k: Tensor, h: Time, weight: float) -> Tensor:
    """``x + h weight k``."""
    if isinstance(h, Tensor):
        return x + scaled(h * weight, k)
    return torch.add(x, k, alpha=h * weight)


def add_scaled_(x: Tensor, k: Tensor, h: Time, weight: float) -> None:
    """Add ``h weight k`` to ``x`` in place."""
    if isinstance(h, Tensor):
        x += scaled(h * weight, k)
    else:
        x.add_(k, alpha=h * weight)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product of two tensors of one shape, as a float64 0-dim tensor."""
    return torch.vdot(a.reshape(-1), b.reshape(-1)).real.double()


def powers(theta: Tensor, degree: int) -> Tensor:
    """``theta^1 ... theta^degree`` as rows: (m,) -> (m, degree)."""
    return theta.unsqueeze(-1) ** torch.arange(1, degree + 1, dtype=theta.dtype)


def centred_powers(theta: Tensor, degree: int) -> Tensor:
    """Powers 0 ... degree of ``2 theta - 1`` as rows: (m,) -> (m, degree + 1)."""
    exponents = torch.arange(degree + 1, dtype=theta.dtype, device=theta.device)
    return (2 * theta - 1).unsqueeze(-1) ** exponents


def power_slopes(theta: Tensor, degree: int) -> Tensor:
    """Derivatives of ``powers``."""
    p = torch.arange(1, degree + 1, dtype=theta.dtype)
    return p * theta.unsqueeze(-1) ** (p - 1)
