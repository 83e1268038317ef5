"""Step control that bounds the errors of sensitivities beside that of the solution.

The derivative of a solution along a direction obeys the variational equation

    d/dt delta = (df/dy) delta + (df/dp) dp,        delta(t0) = dy0,

and the derivative of a step of any one-step or multistep method is the same step of the augmented
equation for ``(y, delta_1, ..., delta_m)``. Its embedded formula hence estimates the local errors
of the sensitivities, too, which join that of the solution in the error test by the largest norm, as
in CVODES (Serban and Hindmarsh 2005, "CVODES: the sensitivity-enabled ODE solver in SUNDIALS", doi
10.1115/DETC2005-85597, "full error control"). The augmented steps choose the grid and are thrown
away: the solution and its gradient are those of the plain steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, NonlinearSolveError, UnknownNameError
from symplectic_adjoint._types import Norm, Time, as_float, one_sided, side_of
from symplectic_adjoint.controllers._base import Pace, Setting
from symplectic_adjoint.controllers.adaptive import Adaptive
from symplectic_adjoint.field import Field, RandomState, Stage
from symplectic_adjoint.steppers import ImplicitRK, Stepper

Direction = tuple[Tensor | None, list[Tensor | None]]
"""A direction: its parts in the initial state and in each tensor that ``f`` depends on."""


@dataclass(frozen=True)
class SensitivityControl(Adaptive):
    """An adaptive controller that also bounds the error of the solution's derivatives.

    The error test of ``Adaptive`` sees the solution alone. Where the solution is smooth and its
    derivatives are not, the grid is too coarse for the gradient, which is then exact for the
    computed solution, but far from the gradient of the ODE. This controller carries a few
    directional derivatives along, scaled like the solution, and accepts a step where the largest
    error is at most 1. The gradient is still that of the computed solution; only the steps differ.

    Every attempted step costs, for each stage, one more evaluation of ``func``, one vector-Jacobian
    product, and one derivative of that product for each direction; ``func`` has to be twice
    differentiable by autograd.

    Attributes:
        inputs: The inputs to watch, each with directions of its own: ``"y0"``, or a path to what
            ``func`` depends on, such as ``"func"``, ``"func.net"``, ``"func.net.0.weight"`` or
            ``"args[0]"`` (``check_gradient`` lists them); a path stands for everything below it.
            By default the initial state is one input, and all that ``func`` depends on another,
            where they require grad.
        directions: Number of random directions for each input. Each has entries of one size and
            random sign, so that the mean square of the derivative along it is that of the whole
            Jacobian; the size is the root mean square of the tensor, or 1 where that is zero.
        seed: Seed of the signs, drawn from a generator of their own.
        sensitivity_rtol: Relative tolerance of the derivatives; that of the solve where None.
        sensitivity_atol: Absolute tolerance of the derivatives; that of the solve where None.

    Example:
        >>> import torch
        >>> import symplectic_adjoint as sa
        >>> rate = torch.tensor(50.0, requires_grad=True)
        >>> def func(t, y):  # the second component is zero, its derivative decays rapidly
        ...     return torch.stack([-y[0], -rate * y[1]])
        >>> y0 = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> options = {"rtol": 1e-4, "atol": 1e-4}
        >>> plain = sa.solve(func, y0, [0.0, 1.0], **options)
        >>> careful = sa.solve(func, y0, [0.0, 1.0], controller=sa.SensitivityControl(), **options)
        >>> careful.stats.accepted > 2 * plain.stats.accepted
        True
    """

    inputs: Sequence[str] | None = None
    directions: int = 1
    seed: int = 0
    sensitivity_rtol: float | None = None
    sensitivity_atol: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions < 1:
            raise ArgumentError(f"directions = {self.directions} must be at least 1")
        if isinstance(self.inputs, str):
            raise ArgumentError(f"inputs = {self.inputs!r} must be a sequence of names")

    def begin(self, field: Field, stepper: Stepper, state: Any, setting: Setting) -> Pace:
        """Start pacing a solve, together with the derivatives along the directions.

        Raises:
            ArgumentError: The method estimates no error or is implicit, or a tolerance is unusable.
            UnknownNameError: ``inputs`` names nothing that requires grad.
        """
        directions = self._directions(setting.inputs, state.y)
        if isinstance(stepper, ImplicitRK):
            raise ArgumentError(
                f"the derivatives are carried along by explicit steps, not by {stepper.name!r}; "
                "use Adaptive(), with tighter tolerances where the gradient needs them"
            )
        if not directions or stepper.error_order is None:
            return super().begin(field, stepper, state, setting)
        y = state.y.detach()
        first = [torch.zeros_like(y) if dy is None else dy for dy, _ in directions]
        z = torch.stack([y, *first])
        tangents = TangentField(field, z, setting.inputs, [parts for _, parts in directions])
        start = stepper.begin(_plain(state.t), z)
        before = RandomState(field.device)
        with before.restored():
            stepper.slope(tangents, start)
            # The derivatives need the very numbers that the stages have drawn.
            field.random = field.random or not before.same(RandomState(field.device))
            joint = replace(self, norm=_largest(self.norm))
            pace = Adaptive.begin(joint, tangents, stepper, start, self._tolerances(setting, z))
        return SensitivityPace(pace, tangents, start, state.node)

    def _directions(self, inputs: Sequence[tuple[str, Tensor]], y: Tensor) -> list[Direction]:
        """Random directions of each watched input."""
        draw = torch.Generator().manual_seed(self.seed)
        found = []
        for group in self._groups([name for name, _ in inputs]):
            for _ in range(self.directions):
                parts = [_signs(x, draw) if i in group else None for i, (_, x) in enumerate(inputs)]
                dy = next(
                    (p for p, (name, _) in zip(parts, inputs, strict=True) if name == "y0"), None
                )
                found.append((dy, parts))
        return found

    def _groups(self, names: Sequence[str]) -> list[set[int]]:
        """Which tensors belong to each watched input."""
        if self.inputs is None:
            state = {i for i, name in enumerate(names) if name == "y0"}
            return [group for group in (state, {*range(len(names))} - state) if group]
        groups = []
        for wanted in self.inputs:
            group = {i for i, name in enumerate(names) if _below(name, wanted)}
            if names and not group:
                raise UnknownNameError("input that requires grad", wanted, names)
            groups.append(group)
        return groups if names else []

    def _tolerances(self, setting: Setting, z: Tensor) -> Setting:
        """The tolerances of each row of the augmented state."""

        def rows(own: float | Tensor, other: float | None) -> float | Tensor:
            if other is None:
                return own
            first = torch.as_tensor(own, dtype=torch.float64, device=z.device).expand(z.shape[1:])
            return torch.stack([first, *[torch.full_like(first, other)] * (len(z) - 1)])

        return replace(
            setting,
            rtol=rows(setting.rtol, self.sensitivity_rtol),
            atol=rows(setting.atol, self.sensitivity_atol),
        )


class SensitivityPace:
    """Judges an attempted step by the same step of the augmented equation."""

    def __init__(self, pace: Pace, tangents: TangentField, state: Any, node: Stage) -> None:
        """Pace a solve.

        Args:
            pace: That of the augmented equation.
            tangents: Its field.
            state: Its first state.
            node: The stage at which the next step starts, unless it begins anew.
        """
        self.pace = pace
        self.tangents = tangents
        self.state = state
        self.node = node

    def propose(self, t: float) -> float:
        return self.pace.propose(t)

    def accepts(self, field: Field, stepper: Stepper, step: Any, t: float, t1: float) -> bool:
        if field.random:
            stepper.error(field, step)  # so that the random state of every stage is known
        tokens = stepper.save(step, stages=False).tokens
        start = step.start
        if start.node is not self.node:
            self.state, self.node = stepper.begin(_plain(start.t), self.state.y), start.node
        if tokens:
            self.state.node.token = tokens[0]
        with RandomState(field.device).restored():
            attempt = stepper.step(self.tangents, self.state, _plain(step.t1), tokens)
            accepted = self.pace.accepts(self.tangents, stepper, attempt, t, t1)
        if accepted:
            self.state, self.node = stepper.end(attempt), stepper.end(step).node
        return accepted

    def fail(self, error: NonlinearSolveError, t: float, t1: float) -> None:
        self.pace.fail(error, t, t1)


class TangentField(Field):
    """``f`` and its derivatives along directions, as one field on states (1 + m, ...)."""

    def __init__(
        self,
        field: Field,
        like: Tensor,
        inputs: Sequence[tuple[str, Tensor]],
        directions: Sequence[Sequence[Tensor | None]],
    ) -> None:
        """Augment a field.

        Args:
            field: The field; its evaluations are counted there.
            like: A tensor of the augmented state's shape, dtype and device.
            inputs: What ``f`` depends on, by name; the initial state is not used.
            directions: A direction in the inputs for each derivative.
        """
        super().__init__(self._slopes, like)
        used = [i for i, (name, _) in enumerate(inputs) if name != "y0"]
        self.field = field
        self.inputs = [inputs[i][1] for i in used]
        self.directions = [[parts[i] for i in used] for parts in directions]
        self.locate = self._locate

    def _evaluate(self, stage: Stage) -> Tensor:
        return self._slopes(self.time(stage.t), stage.x)

    def _slopes(self, t: Tensor, z: Tensor) -> Tensor:
        y = z[0].detach().requires_grad_()
        with torch.enable_grad(), _requiring_grad(self.inputs):
            k = self.field.call(t, y)
            return torch.stack([k.detach(), *self._derivatives(k, y, z)])

    def _derivatives(self, k: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
        """The product with the Jacobian, as the derivative of the one with its transpose."""
        if not k.requires_grad:
            return [torch.zeros_like(k)] * (len(z) - 1)
        dual = torch.zeros_like(k, requires_grad=True)
        wanted = [y, *self.inputs]
        pulled: tuple[Tensor | None, ...] = torch.autograd.grad(
            k, wanted, dual, create_graph=True, allow_unused=True
        )
        derivatives = []
        for delta, direction in zip(z[1:], self.directions, strict=True):
            pairs = [
                (v, d)
                for v, d in zip(pulled, [delta, *direction], strict=True)
                if v is not None and d is not None and v.requires_grad
            ]
            if not pairs:
                derivatives.append(torch.zeros_like(dual))
                continue
            products, along = zip(*pairs, strict=True)
            derivatives += torch.autograd.grad(
                products, [dual], along, retain_graph=True, materialize_grads=True
            )
        return [x.detach() for x in derivatives]

    def _locate(self, index: int) -> str:
        row, inner = divmod(index, math.prod(self.shape[1:]))
        where = self.field.locate(inner)
        return f"the derivative of {where} along direction {row - 1}" if row else where


def _plain(t: Time) -> Time:
    """A time without its graph, seen from the same side."""
    if not isinstance(t, Tensor):
        return t
    side = side_of(t)
    return one_sided(as_float(t), side) if side else as_float(t)


def _below(name: str, path: str) -> bool:
    return name == path or (name.startswith(path) and name[len(path)] in ".[:")


def _signs(x: Tensor, draw: torch.Generator) -> Tensor:
    """Random signs, as large as the entries of ``x``."""
    size = float(torch.linalg.vector_norm(x.detach())) / math.sqrt(max(x.numel(), 1))
    signs = 2.0 * torch.randint(2, x.shape, generator=draw) - 1.0
    return (signs * (size or 1.0)).to(x.device, x.dtype)


def _largest(norm: Norm | None) -> Norm:
    """The largest norm of the rows."""
    if norm is not None:
        return lambda z: torch.stack([norm(row) for row in z]).max()
    return lambda z: (
        torch.linalg.vector_norm(z.flatten(1), dim=1).max() / math.sqrt(max(z[0].numel(), 1))
    )


@contextlib.contextmanager
def _requiring_grad(tensors: Sequence[Tensor]) -> Generator[None]:
    changed = [x for x in tensors if not x.requires_grad]
    for x in changed:
        x.requires_grad_()
    try:
        yield
    finally:
        for x in changed:
            x.requires_grad_(False)
