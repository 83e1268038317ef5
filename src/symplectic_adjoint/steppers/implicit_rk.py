"""Implicit Runge-Kutta steps, their transposes, and their derivatives under autograd.

The stages of a step are those of an explicit one: stage 0 is ``f(t, y)``, the node sits at the new
point. In between, stages depend on one another, one block after the other: a block is a single
stage where the matrix ``a`` is lower triangular (diagonally implicit methods), and all of them
where it is full. With ``K`` the stacked values of a block and ``base`` what earlier stages give,

    F(K)_i = K_i - f(t + c_i h, base_i + h sum_j a_ij K_j) = 0

(Hairer, Wanner, *Solving Ordinary Differential Equations II*, section IV.8, eq. (8.1), in the
values ``K`` instead of the increments). Newton's method starts at ``K = 0``, where the points of
all stages are ``base``: the root that is found depends on the start of the step alone, so that a
step taken again finds the same.

**Transpose.** As in an explicit method, ``kappa_i``, the cotangent of ``k_i``, is

    kappa_i = h (sum_l a_li v_l + sum b_i(theta) g) + [i = s] mu,
    v_l     = J_l^T kappa_l + [l = s] lam,

but ``l`` now also runs over the block of ``i`` itself. Moved to the left, that part makes

    (I - h (A (x) I) J)^T kappa = rhs,    rhs_i = what later stages and dense outputs put on k_i,

the transpose of the derivative of ``F``: one linear solve a block, then one product a stage, which
gives ``v_i`` and the cotangents of parameters and time. With ``kappa_i = h b_i Lambda_i`` this is
the symplectic partner of the method (Matsubara, Miyatake, Yaguchi 2024, doi
10.1109/TNNLS.2023.3242345; Sanz-Serna 2016, doi 10.1137/151002769, theorem 3.4), whose matrix
``b_j a_ji / b_i`` is full where that of the method is.

**Under autograd** the iteration leaves no graph: derivatives are those of the root (``implicit``).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, NonlinearSolveError
from symplectic_adjoint._types import as_float
from symplectic_adjoint.dense import Interpolant
from symplectic_adjoint.dense import linear as straight
from symplectic_adjoint.field import Field, GraphField, RandomState, Stage, TangentField
from symplectic_adjoint.implicit import correction, inverse
from symplectic_adjoint.rootfind import (
    Jacobian,
    Measure,
    Newton,
    NoConvergence,
    StageSystem,
    newton,
)
from symplectic_adjoint.steppers._base import Work, scaled
from symplectic_adjoint.steppers.explicit_rk import (
    RKStep,
    RungeKutta,
    _combine,
    _Transpose,
)
from symplectic_adjoint.tableaus import Tableau

Tolerance = float | Tensor

NEWTON_OPTIONS = tuple(field.name for field in fields(Newton))


class ImplicitRK(RungeKutta):
    """The implicit Runge-Kutta method of a tableau.

    Raises:
        ArgumentError: The tableau is explicit.

    Example:
        >>> import symplectic_adjoint as sa
        >>> from symplectic_adjoint import tableaus
        >>> method = ImplicitRK(tableaus.get("radauIIA5"), newton=Newton(max_iters=10))
        >>> stiff = lambda t, y: -1e6 * (y - torch.cos(t))
        >>> y0 = torch.zeros(1, dtype=torch.float64)
        >>> sol = sa.solve(stiff, y0, [0.0, 1.0], method=method, rtol=1e-6, atol=1e-6)
        >>> sol.stats.accepted < 50, bool((sol.y[-1] - torch.cos(torch.tensor(1.0))).abs() < 1e-5)
        (True, True)
    """

    def __init__(
        self,
        tableau: Tableau,
        interpolant: Interpolant | None = None,
        newton: Newton | None = None,
        rtol: Tolerance = 1e-7,
        atol: Tolerance = 1e-9,
    ) -> None:
        """Build the stepper.

        Args:
            tableau: The method.
            interpolant: A continuous extension to use in place of the tableau's own.
            newton: How its equations are solved.
            rtol: What ``newton.tolerance`` is a fraction of; ``solve`` gives its own.
            atol: Likewise.
        """
        if not tableau.implicit:
            raise ArgumentError(f"method {tableau.name!r} is explicit; use ExplicitRK(tableau)")
        super().__init__(tableau, interpolant)
        self.newton = newton or Newton()
        self.rtol, self.atol = rtol, atol
        self.blocks = _blocks(tableau)
        if tableau.embedded_order is not None:
            self.error_order = min(tableau.order, tableau.embedded_order) + 1

    def _work(self) -> Work:
        """Stages count once, however often the solution of their equations evaluates them."""
        used = 0 in self.weighed(range(1, self.node + 1))
        dense = 0 in self.dense_stages and not used
        work = super()._work()
        return replace(work, node=int(used), start=int(used), extra=work.extra + dense)

    def within(self, rtol: Tolerance, atol: Tolerance) -> ImplicitRK:
        """The same method with the tolerances of a solve."""
        own = copy.copy(self)
        own.rtol, own.atol = rtol, atol
        return own

    def configured(self, options: Mapping[str, Any], *, linear: bool) -> ImplicitRK:
        """The method with the fields of ``Newton`` among ``options``, and its dense output.

        ``linear`` draws straight lines between the steps.
        """
        given = {name: options[name] for name in NEWTON_OPTIONS if name in options}
        interpolant = straight(self.tableau.b) if linear else self.dense
        newton = replace(self.newton, **given)
        return ImplicitRK(self.tableau, interpolant, newton, self.rtol, self.atol)

    # Forward ---------------------------------------------------------------------------------

    def error(self, field: Field, step: RKStep) -> Tensor:
        error = super().error(field, step)
        jacobian, step.jacobian = step.jacobian, None
        if not self.tableau.damping or jacobian is None:
            return error
        weight = self.tableau.damping * as_float(step.h)
        damped = StageSystem([[weight]], [jacobian], self.newton)
        return damped.solve(error.unsqueeze(0), _ESTIMATE).squeeze(0)

    def interpolate(self, field: Field, step: RKStep, theta: Tensor) -> Tensor:
        for block in self.blocks:
            if any(step.stages[i].k is None for i in block):
                self._recover(field, step, block)
        return super().interpolate(field, step, theta)

    def _recover(self, field: Field, step: RKStep, block: range) -> None:
        """The values of stages from their points: ``f`` there would amplify their rounding."""
        equations = _Equations(self, field, step, block)
        points = torch.stack([step.stages[i].x for i in block])
        moved = (points - torch.stack(equations.base)) / as_float(step.h)
        k = torch.linalg.solve(equations.weights, moved.flatten(1)).view_as(moved)
        for i, value in zip(block, k.unbind(), strict=True):
            step.stages[i].k = value

    def _extend(self, field: Field, step: RKStep, count: int) -> None:
        for block in self.blocks:
            if len(step.stages) <= block.start < count:
                super()._extend(field, step, block.start)
                self._solve(field, step, block)
        super()._extend(field, step, count)

    def _solve(self, field: Field, step: RKStep, block: range) -> None:
        """Append the stages of a block, which depend on one another."""
        equations = _Equations(self, field, step, block)
        equations.solve()
        step.stages += equations.stages

    # Reverse ---------------------------------------------------------------------------------

    def _transpose_inner(self, sweep: _Transpose) -> None:
        for block in reversed(self.blocks):
            for i, kappa in zip(block, self._cotangents(sweep, block), strict=True):
                sweep.v[i] = sweep.pull(i, kappa)

    def _cotangents(self, sweep: _Transpose, block: range) -> Sequence[Tensor | None]:
        """``kappa`` of the stages of a block, from the cotangents that later stages put on them."""
        right = [sweep.kappa(i) for i in block]
        known = [x for x in right if x is not None]
        if not known:
            return right
        field, stages = sweep.field, [sweep.step.stages[i] for i in block]
        for stage in stages:
            stage.graph = stage.graph or field.graph(stage, sweep.times is not None)
        jacobians = [_jacobian(field, s.graph.x, s.graph.k) for s in stages if s.graph is not None]
        system = StageSystem(self.coupling(block, sweep.h), jacobians, self.newton)
        rhs = torch.stack([torch.zeros_like(known[0]) if x is None else x for x in right])
        return inverse(system, rhs, transposed=True).unbind()

    def coupling(self, block: range, h: float) -> list[list[float]]:
        """``h A`` within a block."""
        return [[h * self.tableau.a[i][j] for j in block] for i in block]


class _Equations:
    """The equations of one block of stages."""

    def __init__(self, method: ImplicitRK, field: Field, step: RKStep, block: range) -> None:
        self.method = method
        self.field = field
        self.step = step
        self.block = block
        self.h = as_float(step.h)
        a = method.coupling(block, 1.0)
        self.weights = torch.tensor(a, dtype=step.start.y.dtype, device=step.start.y.device)
        tokens = step.tokens or [None] * len(method.rows)
        self.stages = [Stage(method.time(step, i), step.start.y, None, tokens[i]) for i in block]
        self.base = [self._base(i) for i in block]

    def solve(self) -> None:
        """Set the points and values of the stages."""
        before = self.field.evaluations
        try:
            k = self._root()
        except NoConvergence as error:
            raise self._failure(error) from None
        evaluations = self.field.evaluations - before
        if isinstance(self.field, GraphField):
            self.field.count_solver(evaluations, 0)
            k = self._on_graph(k)
        else:
            self.field.count_solver(evaluations - len(self.block), 0)
        for stage, x, value in zip(self.stages, self._points(k), k.unbind(), strict=True):
            stage.x, stage.k = x, value

    def _base(self, i: int) -> Tensor:
        """What the stages before the block give."""
        step, row = self.step, self.method.rows[i]
        before = tuple((w, j) for w, j in row if j < self.block.start)
        return _combine(self.field, step.start.y, step.h, step.stages, before)

    def _points(self, k: Tensor) -> tuple[Tensor, ...]:
        """Where ``f`` is evaluated for values ``k`` (m, ...), on the graph of both."""
        mixed = torch.tensordot(self.weights, k, dims=1)
        return (torch.stack(self.base) + scaled(self.step.h, mixed)).unbind()

    def _root(self) -> Tensor:
        """The values at the root, without a graph."""
        start = torch.stack(self.base).detach()

        def evaluate(k: Tensor, iteration: int, wants: bool) -> tuple[Tensor, StageSystem | None]:
            points = start + self.h * torch.tensordot(self.weights, k, dims=1)
            for stage, x in zip(self.stages, points.unbind(), strict=True):
                stage.x = x
            jacobians = self._evaluated(iteration == 0) if wants else self._evaluated(None)
            return k - self._values(), self._system(jacobians) if jacobians else None

        method = self.method
        measure = Measure(method.newton, method.rtol, method.atol, start, self.h)
        try:
            return newton(method.newton, torch.zeros_like(start), evaluate, measure)
        except NoConvergence as error:
            values = self._values()
            if error.iterations == 1 and not bool(torch.isfinite(values).all()):
                return values  # which says where f is not finite, in words of the controller
            raise

    def _values(self) -> Tensor:
        return torch.stack([stage.k for stage in self.stages if stage.k is not None])

    def _system(self, jacobians: Sequence[Jacobian]) -> StageSystem:
        return StageSystem(self.method.coupling(self.block, self.h), jacobians, self.method.newton)

    def _evaluated(self, shared: bool | None) -> list[Jacobian]:
        """Evaluate the stages; with Jacobians of each, or that of the first for all, or none."""
        field, jacobians = self.field, []
        for number, stage in enumerate(self.stages):
            fresh = stage.k is None and stage.token is None
            before = RandomState(field.device) if fresh else None
            if shared is None or (shared and number):
                stage.k = field.evaluate(stage).detach()
            else:
                x, k = _graph(field, stage)
                stage.k = k.detach()
                jacobians.append(_jacobian(field, x, k))
            if before is not None and not before.same(RandomState(field.device)):
                stage.token = before  # every further evaluation draws the same numbers
        if shared:
            jacobians *= len(self.stages)
            if self.method.tableau.damping and self.block is self.method.blocks[0]:
                self.step.jacobian = jacobians[0]
        return jacobians

    def _on_graph(self, root: Tensor) -> Tensor:
        """The values as a function of everything on the caller's graph."""
        k = root.detach().requires_grad_()
        system = None
        for _ in range(self.field.corrections):
            points = self._points(k)
            pairs = zip(self.stages, points, strict=True)
            values = [self.field.evaluate(Stage(s.t, x, None, s.token)) for s, x in pairs]
            if system is None:
                system = self._system(self._jacobians(points, values))
            residual = k - torch.stack(values)
            k = k - correction(residual, system, self.field.corrections)
        return k

    def _jacobians(self, points: Sequence[Tensor], values: Sequence[Tensor]) -> list[Jacobian]:
        """Those at the root, from the graphs of the values where these have one."""
        if isinstance(self.field, TangentField):
            stages = [
                Stage(s.t, x, None, s.token) for s, x in zip(self.stages, points, strict=True)
            ]
            graphs = [_graph(self.field, stage) for stage in stages]
        else:
            graphs = list(zip(points, values, strict=True))
        return [_jacobian(self.field, x, k) for x, k in graphs]

    def _failure(self, error: NoConvergence) -> NonlinearSolveError:
        t = as_float(self.step.start.t)
        return NonlinearSolveError(
            f"Newton's method for {self.method.name!r} did not converge in the step from t = "
            f"{t:.17g} with h = {self.h:.3g}: after {error.iterations} iterations the last "
            f"correction was {error.size:.3g} times what would do (func there has norm "
            f"{float(torch.linalg.vector_norm(self._values())):.3g}). Take smaller steps, raise "
            f"max_iters = {self.method.newton.max_iters}, or give func a continuous derivative; "
            "throw=False returns the valid prefix."
        )


def _jacobian(field: Field, x: Tensor, k: Tensor) -> Jacobian:
    return Jacobian(x, k, lambda products: field.count_solver(0, products))


def _graph(field: Field, stage: Stage) -> tuple[Tensor, Tensor]:
    """``x`` and ``f(t, x)`` on the graph of ``x``, where random numbers are those of the stage."""
    x = stage.x.detach().requires_grad_()
    t = field.time(stage.t).detach()  # its value alone, seen from its side where f jumps
    drawn = contextlib.nullcontext() if stage.token is None else stage.token.restored()
    with torch.enable_grad(), drawn:
        return x, field.call(t, x)


def _blocks(tableau: Tableau) -> tuple[range, ...]:
    """The stages after the first that depend on one another."""
    a, s = tableau.a, tableau.stages
    if any(a[i][j] for i in range(s) for j in range(i + 1, s)):
        return (range(1, s),)
    return tuple(range(i, i + 1) for i in range(1, s))


_ESTIMATE = 1e-3
"""Relative residual to which error estimates are damped."""
