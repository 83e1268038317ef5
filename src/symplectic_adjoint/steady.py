"""Steady states, differentiated by the implicit function theorem."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from symplectic_adjoint._compile import uncompiled
from symplectic_adjoint._errors import (
    ArgumentError,
    NonFiniteError,
    SteadyStateError,
    StepLimitError,
)
from symplectic_adjoint._tree import StateSpec
from symplectic_adjoint._types import Func
from symplectic_adjoint.api import solve
from symplectic_adjoint.capture import foreign_leaves, has_tangent, transformed
from symplectic_adjoint.controllers import Adaptive
from symplectic_adjoint.field import GraphField
from symplectic_adjoint.implicit import correction
from symplectic_adjoint.problem import flat_func
from symplectic_adjoint.rootfind import (
    Jacobian,
    Measure,
    Newton,
    NoConvergence,
    StageSystem,
)
from symplectic_adjoint.rootfind import newton as root_of
from symplectic_adjoint.steppers import Stepper


@uncompiled
def steady_state(
    func: Func,
    y0: Any,
    *,
    args: Sequence[Any] = (),
    t: float | Tensor = 0.0,
    method: str | Stepper | None = "radauIIA5",
    rtol: float = 1e-4,
    atol: float = 1e-7,
    max_steps: int = 1000,
    newton: Newton | None = None,
    order: int = 1,
) -> Any:
    """The state in which ``dy/dt = func(t, y, *args)`` comes to rest from ``y0``, differentiably.

    The equation is integrated, with no graph, until the state hardly moves any more; Newton's
    method then goes on to the root of ``func``, to rounding. The derivative is that of the root:
    ``dy = -J^{-1} dfunc`` with ``J = dfunc/dy``, by one linear solve with ``J^T`` and one
    vector-Jacobian product, however long the way to the root was (Griewank, Walther, *Evaluating
    Derivatives*, 2nd ed., 2008, section 15.1). One evaluation of ``func`` is kept for it. It goes
    to ``args``, ``t`` and every tensor that ``func`` uses, under autograd in reverse and in forward
    mode. An isolated steady state does not move with ``y0``, so ``y0`` gets no gradient.

    A state from which the solution departs when it is disturbed is found only where ``y0`` leads to
    it; ``method=None`` finds such states, too.

    Args:
        func: Gives the derivative of the state, as for ``solve``.
        y0: Where to start: a floating-point or complex tensor, or a pytree of such.
        args: Passed on to ``func``.
        t: The time that ``func`` receives; it stands still.
        method: How to integrate, a method with step-size control; None starts Newton's method at
            ``y0``, which suits a ``y0`` that is near already.
        rtol: Relative tolerance of the integration. It ends where the state would move by less than
            the tolerance in as much time as has passed.
        atol: Absolute tolerance, likewise.
        max_steps: Greatest number of attempted steps of the integration.
        newton: How the root is found, and when the Jacobian is a matrix.
        order: How often the result can be differentiated; each order takes one more evaluation.

    Returns:
        The steady state, like ``y0``.

    Raises:
        ArgumentError: An argument is unusable, or a transform of ``torch.func`` is at work.
        FieldOutputError: ``func`` returned no derivative of the state.
        SteadyStateError: The solution did not come to rest within ``max_steps``, Newton's method
            did not converge, or the Jacobian is singular, as it is where a combination of the
            components is conserved.
        NonFiniteError: ``y0`` or ``func`` there is not finite.
        SolveError: The integration failed otherwise.
        NonlinearSolveError: In the backward pass or in forward mode: GMRES did not converge.
        SecondDerivativeError: In the backward pass: a derivative beyond ``order`` was asked for.

    Example:
        Production against decay that saturates.

        >>> import torch
        >>> made = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> func = lambda t, y: made - y / (1 + y)
        >>> y = steady_state(func, torch.zeros(1, dtype=torch.float64))
        >>> y.sum().backward()
        >>> round(y.item(), 12), round(made.grad.item(), 12)  # p / (1 - p), 1 / (1 - p)^2
        (1.0, 4.0)
    """
    _check(func)
    _check_numbers(rtol=rtol, atol=atol, max_steps=max_steps, order=order)
    spec, flat = StateSpec.of(y0)
    field = GraphField(flat_func(func, spec, list(args)), flat)
    equation = _Equation(field, spec, field.time(t), newton or Newton())
    start = flat.detach()
    with torch.inference_mode(mode=False), torch.enable_grad(), _no_tangents():
        start = start.clone()
        equation.check(start)
        if method is None:
            root = equation.root(start, rtol, atol)
        else:
            root = _Descent(equation, method, rtol, atol, max_steps).root(start)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        root = equation.attached(root, order)
    return spec.unflatten(root)


def _check(func: Any) -> None:
    if not callable(func):
        raise ArgumentError(f"func = {func!r} is not callable; give func(t, y) -> dy/dt")
    if transformed():
        raise ArgumentError(
            "steady_state does not work inside a transform of torch.func (grad, vmap, jvp ...); "
            "differentiate it with torch.autograd, and solve samples one by one or as one state"
        )


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ArgumentError(f"{name} = {value} must be positive and finite")


@dataclass
class _Equation:
    """``func(t, y) = 0``, for a flat state.

    Attributes:
        field: ``func``, which keeps graphs.
        spec: How the caller's state maps onto the flat one.
        t: The time that stands still, on the caller's graph.
        newton: How linear systems are solved, and how long to iterate.
    """

    field: GraphField
    spec: StateSpec
    t: Tensor
    newton: Newton

    def rate(self, y: Tensor) -> Tensor:
        """``func`` without a graph."""
        return self.field.call(self.t.detach(), y).detach()

    def check(self, y: Tensor) -> None:
        """Refuse a start that is no state, or where there is no derivative.

        Raises:
            NonFiniteError: A value is not finite.
        """
        for what, x in (("y0", y), ("func at y0", self.rate(y))):
            bad = (~torch.isfinite(x)).reshape(-1).nonzero()
            if len(bad):
                raise NonFiniteError(
                    f"{what} is not finite, first at {self.spec.locate(int(bad[0]))}; start where "
                    "func has a value"
                )

    def near(self, y: Tensor, rtol: float, atol: float) -> Tensor:
        """The root that Newton's method finds from ``y``.

        Raises:
            NoConvergence: It finds none.
            SteadyStateError: A Jacobian on the way is singular.
        """

        def evaluate(u: Tensor, iteration: int, wants: bool) -> tuple[Tensor, StageSystem | None]:
            if not wants:
                return -self.rate(u[0]).unsqueeze(0), None
            k, system = self.linearized(u[0])
            return -k.detach().unsqueeze(0), system

        measure = Measure(self.newton, rtol, atol, y)
        return root_of(self.newton, y.unsqueeze(0), evaluate, measure)[0]

    def root(self, y: Tensor, rtol: float, atol: float) -> Tensor:
        """The same; where there is none, the error says so."""
        try:
            return self.near(y, rtol, atol)
        except NoConvergence as error:
            raise SteadyStateError(
                f"Newton's method found no steady state: after {error.iterations} iterations the "
                f"last correction was {error.size:.3g} times what would do. Start nearer to it, or "
                "let method= integrate the equation up to there."
            ) from None

    def linearized(self, y: Tensor) -> tuple[Tensor, StageSystem]:
        """``func`` at ``y`` on the caller's graph, and ``-J`` there.

        Raises:
            SteadyStateError: ``J`` is a matrix, and singular.
        """
        with torch.enable_grad():
            x = y.detach().requires_grad_()
            plain = k = self.field.call(self.t, x)
            with _no_tangents():
                if has_tangent(k):
                    plain = self.field.call(self.t, x)
                jacobian = Jacobian(x, plain, lambda products: None)
                system = StageSystem([[1.0]], [jacobian], self.newton, identity=0.0)
                if system.is_dense and bool(torch.isfinite(jacobian.dense).all()):
                    _check_regular(jacobian.dense, self.spec)
        return k, system

    def attached(self, root: Tensor, order: int) -> Tensor:
        """The root on the caller's graph, and with its tangents."""
        k, system = self.linearized(root)
        x = system.jacobians[0].x
        if not has_tangent(k) and not (torch.is_grad_enabled() and foreign_leaves(k, [x])):
            return root
        y = root
        for left in reversed(range(order)):
            y = y + correction(k.unsqueeze(0), system, order).squeeze(0)
            if left:
                k = self.field.call(self.t, y)
        return y


@dataclass
class _Descent:
    """The way to a steady state along the solution.

    Attributes:
        equation: The equation of the steady state.
        method: How to integrate.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        max_steps: Greatest number of attempted steps.
    """

    equation: _Equation
    method: str | Stepper
    rtol: float
    atol: float
    max_steps: int

    def root(self, y: Tensor) -> Tensor:
        """The steady state to which the solution from ``y`` leads.

        Raises:
            SteadyStateError: There is none.
        """
        rate, passed, left = self.equation.rate(y), 0.0, self.max_steps
        if not bool(rate.any()):
            return self.equation.root(y, self.rtol, self.atol)
        size = torch.linalg.vector_norm(y) + self.atol / self.rtol
        first = span = _FIRST * float(size / torch.linalg.vector_norm(rate))
        while left > 0 and passed < _DECADES * first:
            y, steps = self._integrated(y, span, passed, left)
            passed, left = passed + span, left - steps
            span, rate = (_GROWTH - 1) * passed, self.equation.rate(y)
            root = self._root_beside(y, rate * passed)
            if root is not None:
                return root
        raise self._restless(y, rate, passed)

    def _integrated(self, y: Tensor, span: float, passed: float, left: int) -> tuple[Tensor, int]:
        """The solution after a further time, and how many steps that took."""
        equation = self.equation
        try:
            with torch.no_grad():
                solution = solve(
                    lambda _, y: equation.field.func(equation.t.detach(), y),
                    y,
                    [0.0, span],
                    method=self.method,
                    rtol=self.rtol,
                    atol=self.atol,
                    controller=Adaptive(max_steps=left),
                )
        except StepLimitError:
            raise self._restless(y, equation.rate(y), passed) from None
        return solution.y[-1], solution.stats.accepted + solution.stats.rejected

    def _root_beside(self, y: Tensor, moved: Tensor) -> Tensor | None:
        """The steady state, where ``y`` would move by no more than ``moved`` before it is there."""
        allowed = self.atol + self.rtol * y.abs()
        if not bool((moved.abs() <= allowed).all()):
            return None
        try:
            root = self.equation.near(y, self.rtol, self.atol)
        except NoConvergence:
            return None
        return root if bool(((root - y).abs() <= _BESIDE * allowed).all()) else None

    def _restless(self, y: Tensor, rate: Tensor, passed: float) -> SteadyStateError:
        allowed = self.atol + self.rtol * y.abs()
        worst = int((rate.abs() / allowed).argmax())
        value, change = y.reshape(-1)[worst].item(), rate.reshape(-1)[worst].item()
        return SteadyStateError(
            f"the solution does not come to rest: when a time of {passed:.3g} has passed, "
            f"{self.equation.spec.locate(worst)} is {value:.3g} and changes at the rate "
            f"{change:.3g}. It may oscillate, grow, or need more than max_steps = "
            f"{self.max_steps}; look at it with solve, or start nearer to a steady state."
        )


def _no_tangents() -> contextlib.AbstractContextManager[Any]:
    """Compute as if nothing carried a tangent of forward mode."""
    return forward_ad._set_fwd_grad_enabled(False)


_FIRST = 1e-2
"""The first time, as a part of that in which the state would move by its own size."""

_GROWTH = 10.0
"""By how much the time that has passed grows from one look at the state to the next."""

_DECADES = 1e15
"""How many first times may pass."""

_BESIDE = 10.0
"""How many tolerances the root may be away from where the solution has come to rest."""


def _check_regular(jacobian: Tensor, spec: StateSpec) -> None:
    """Refuse a singular matrix, and name what does not move.

    Rows and columns are scaled first, so that components of different sizes do not count.

    Raises:
        SteadyStateError: It is singular to rounding.
    """
    rows = _inverse_size(jacobian.abs().amax(1))
    scaled = jacobian * rows.unsqueeze(1)
    scaled = scaled * _inverse_size(scaled.abs().amax(0))
    left, sizes, _ = torch.linalg.svd(scaled)
    n = len(jacobian)
    rank = int((sizes > n * torch.finfo(sizes.dtype).eps * sizes[0]).sum())
    if rank == n:
        return
    weights = left[:, -1] * rows
    weights = weights / weights[weights.abs().argmax()]
    elements = n // sum(spec.sizes)  # 2 where the state is complex
    parts = [
        f"{float(weights[i]):.3g} * ({spec.locate(int(i) // elements)})"
        for i in weights.abs().argsort(descending=True)[:_NAMED]
        if abs(float(weights[i])) > _SMALL
    ]
    raise SteadyStateError(
        f"the Jacobian of func is singular, of rank {rank} of {n}, so that the steady state is not "
        f"isolated and has no derivative. What func does not change, to first order, is "
        f"{' + '.join(parts)}. If it is conserved, eliminate one of these components by it and let "
        "the total be a parameter; otherwise the steady state lies at a fold, or func ignores a "
        "component."
    )


_NAMED, _SMALL = 6, 1e-6
"""How many components are named, and which weights are taken for zero."""


def _inverse_size(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1 / x, 1.0)
