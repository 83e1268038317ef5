"""Explicit Runge-Kutta steps, and their transposes by the symplectic adjoint recursion.

A step is a homogeneous list of stages. Stage 0 is ``f(t, y)``, carried over from the step before;
stages 1 ... s - 1 are the inner ones; stage s, the node, sits at the new point, and its row of
weights is ``b``; extra stages of the interpolant follow. With ``A`` the strictly lower matrix of
all rows,

    X_i = y + h sum_{j<i} a_ij k_j,    k_i = f(t + c_i h, X_i),    y1 = X_s.

The transpose visits the stages last to first. With ``lam`` the cotangent of ``y1``, ``g`` those of
dense outputs with weights ``b_i(theta)``, and ``mu`` the cotangent that the next step puts on the
node,

    kappa_i = h (sum_{l>i} a_li v_l + sum b_i(theta) g) + [i = s] mu
    v_i     = (df/dy)^T kappa_i + [i = s] lam
    lam'    = sum_i v_i + sum g,    mu' = kappa_0.

This is the symplectic partner of the method (Matsubara, Miyatake, Yaguchi 2024, doi
10.1109/TNNLS.2023.3242345) multiplied by ``h b_i``: with ``Lambda_i`` its stages, ``kappa_i = h b_i
Lambda_i``. So it needs neither a division nor a special case where ``b_i = 0``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint._types import Time
from symplectic_adjoint.dense import Interpolant
from symplectic_adjoint.field import DetachedField, Field, RandomState, Stage
from symplectic_adjoint.rootfind import Jacobian
from symplectic_adjoint.steppers._base import (
    Cotangent,
    DenseCotangent,
    DenseMoments,
    Reversal,
    Saved,
    Work,
    add_scaled,
    add_scaled_,
    dot,
    power_slopes,
    powers,
    scaled,
)
from symplectic_adjoint.tableaus import Tableau

Terms = tuple[tuple[float, int], ...]
"""The non-zero weights of a linear combination, each with the number of its stage."""


class RKState(NamedTuple):
    """Time, solution, and the stage there (evaluated once a step or an output needs it)."""

    t: Time
    y: Tensor
    node: Stage


@dataclass(slots=True)
class RKStep:
    """A step: its start, its size and its stages so far, each evaluated once it is needed.

    Where the error estimate of an implicit method needs it, a Jacobian is kept until then.
    """

    start: RKState
    t1: Time
    h: Time
    stages: list[Stage]
    tokens: Sequence[RandomState | None]
    node: int
    jacobian: Jacobian | None = None

    @property
    def y1(self) -> Tensor:
        return self.stages[self.node].x


class RungeKutta:
    """What all methods of a tableau share, with stages that depend on those before them."""

    def __init__(self, tableau: Tableau, interpolant: Interpolant | None = None) -> None:
        """Build the stepper.

        Args:
            tableau: The method.
            interpolant: A continuous extension to use in place of the tableau's own.
        """
        self.tableau = tableau
        self.name = tableau.name
        self.order = tableau.order
        self.error_order = None if tableau.embedded_order is None else tableau.embedded_order + 1
        self.node = tableau.stages
        self.dense = interpolant or tableau.interpolant
        self.rows = tuple(map(_terms, (*tableau.a, tableau.b, *self.dense.a)))
        self.c = (*tableau.c, 1.0, *self.dense.c)
        self.columns = tuple(
            tuple((w, i) for i, row in enumerate(self.rows) for w, j in row if j == stage)
            for stage in range(len(self.rows))
        )
        self.error_terms = _terms(tableau.error or ())
        self.dense_stages = tuple(i for i, row in enumerate(self.dense.coefficients) if any(row))
        self.work = self._work()

    def _work(self) -> Work:
        """Sorts the stages after the first by what needs their values."""
        node = self.node
        inner = self.weighed(range(1, node + 1)) - {0}
        error = {i for _, i in self.error_terms} - inner - {0}
        points = self.weighed(range(1, node))
        extra_points = self.weighed(range(node + 1, len(self.rows)))
        dense = (extra_points | set(self.dense_stages)) - inner - {0}
        return Work(
            inner=len(inner),
            error=len(error - {node}),
            error_node=node in error,
            extra=len(dense - {node}),
            dense_node=node in dense,
            points=len(points),
            dense_points=len(extra_points - points - {node}),
            points_node=node in extra_points,
        )

    def weighed(self, rows: Iterable[int]) -> set[int]:
        """The stages that rows of weights weigh."""
        return {i for row in rows for _, i in self.rows[row]}

    # Forward ---------------------------------------------------------------------------------

    def begin(self, t: Time, y: Tensor) -> RKState:
        return RKState(t, y, Stage(t, y))

    def slope(self, field: Field, state: RKState) -> Tensor:
        return field.value(state.node)

    def step(
        self, field: Field, state: RKState, t1: Time, tokens: Sequence[RandomState | None] = ()
    ) -> RKStep:
        step = RKStep(state, t1, t1 - state.t, [state.node], tokens, self.node)
        self._extend(field, step, self.node + 1)
        return step

    def error(self, field: Field, step: RKStep) -> Tensor:
        (weight, first), *rest = self.error_terms
        h = step.h.detach() if isinstance(step.h, Tensor) else step.h
        error = scaled(h * weight, field.value(step.stages[first]).detach())
        for weight, i in rest:
            add_scaled_(error, field.value(step.stages[i]).detach(), h, weight)
        return error

    def end(self, step: RKStep) -> RKState:
        return RKState(step.t1, step.y1, step.stages[self.node])

    def stages(self, step: RKStep) -> Sequence[Stage]:
        return step.stages

    def carried(self, state: RKState) -> tuple[Tensor, ...]:
        return (state.y,)

    def resume(self, t: Time, tensors: Sequence[Tensor], token: RandomState | None) -> RKState:
        return RKState(t, tensors[0], Stage(t, tensors[0], None, token))

    def interpolate(self, field: Field, step: RKStep, theta: Tensor) -> Tensor:
        self._extend(field, step, len(self.rows))
        k = torch.stack([field.value(step.stages[i]) for i in self.dense_stages])
        weights = self._weights(theta).to(k, non_blocking=True)
        increment = torch.tensordot(weights, k, dims=1)
        y: Tensor = step.start.y + scaled(step.h, increment)
        return y

    def moments(self, field: Field, step: RKStep) -> Tensor:
        """``h sum_i p_qi k_i`` (degree + 1, ...): the increments of the solution within the step.

        With ``p_qi`` the weights in powers q of ``2 theta - 1``, as in ``interpolate``.
        """
        self._extend(field, step, len(self.rows))
        k = [field.value(stage) for stage in step.stages]
        columns = zip(*self.dense.centred, strict=True)
        return scaled(step.h, torch.stack([_weighted(column, k) for column in columns]))

    @functools.cached_property
    def _polynomials(self) -> Tensor:
        """The weights in powers of ``2 theta - 1``: (degree + 1, stages)."""
        rows = [self.dense.centred[i] for i in self.dense_stages]
        return torch.tensor(rows, dtype=torch.float64).T

    @property
    def node_weights(self) -> Tensor:
        """The weight of the node in powers of ``2 theta - 1`` (degree + 1,)."""
        return torch.tensor(self.dense.centred[self.node], dtype=torch.float64)

    def _weights(self, theta: Tensor) -> Tensor:
        """``b_i(theta)`` of the stages that have any: (m,) -> (m, stages)."""
        p = self._polynomials
        return torch.addmm(p[0], powers(2 * theta - 1, self.dense.degree), p[1:])

    def _extend(self, field: Field, step: RKStep, count: int) -> None:
        """Compute stage points until there are ``count``, evaluating ``f`` where they need it."""
        stages, h, y = step.stages, step.h, step.start.y
        for i in range(len(stages), count):
            x = _combine(field, y, h, stages, self.rows[i])
            token = step.tokens[i] if step.tokens else None
            stages.append(Stage(self.time(step, i), x, None, token))

    def time(self, step: RKStep, i: int) -> Time:
        return step.t1 if self.c[i] == 1.0 else step.start.t + self.c[i] * step.h

    # Keeping ---------------------------------------------------------------------------------

    def save(self, step: RKStep, stages: bool) -> Saved:
        kept = [step.start.y]
        if stages:
            kept += [s.x for i, s in enumerate(step.stages) if i not in (0, self.node)]
        tokens = tuple(s.token for s in step.stages)
        return Saved(tuple(kept), tokens if any(tokens) else ())

    def load(
        self,
        field: DetachedField,
        start: Time,
        t1: Time,
        saved: Saved,
        end: RKState,
        dense: bool,
    ) -> RKStep:
        y, *inner = saved.tensors
        tokens = saved.tokens
        node = Stage(start, y, None, tokens[0] if tokens else None)
        step = RKStep(RKState(start, y, node), t1, t1 - start, [node], tokens, self.node)
        if inner:
            for i, x in enumerate(inner, start=1):
                if i == self.node:
                    step.stages.append(end.node)
                i = len(step.stages)
                token = tokens[i] if tokens else None
                step.stages.append(Stage(self.time(step, i), x, None, token))
        else:
            self._extend(field, step, self.node)
        if len(step.stages) == self.node:
            step.stages.append(end.node)
        if dense:
            self._extend(field, step, len(self.rows))
        return step

    # Reverse ---------------------------------------------------------------------------------

    def transpose(
        self,
        reversal: Reversal,
        n: int,
        step: RKStep,
        cotangent: Cotangent,
        dense: DenseCotangent | DenseMoments | None,
    ) -> Cotangent:
        sweep = _Transpose(self, reversal, n, step, dense)
        for i in range(len(step.stages) - 1, self.node, -1):
            sweep.v[i] = sweep.pull(i, sweep.kappa(i))
        sweep.v[self.node] = sweep.pull_node(cotangent)
        self._transpose_inner(sweep)
        return sweep.start()

    def _transpose_inner(self, sweep: _Transpose) -> None:
        for i in range(self.node - 1, 0, -1):
            sweep.v[i] = sweep.pull(i, sweep.kappa(i))

    def transpose_alone(
        self,
        reversal: Reversal,
        n: int,
        step: RKStep,
        lam: Tensor,
        dense: DenseMoments | None,
        mu: Tensor | None,
    ) -> Tensor:
        """The transpose of a step as if the next one began anew; so does this one.

        What the step itself puts on its node is left to the caller, as what the step before has put
        on the node at which this one starts.

        Args:
            reversal: Shared by the transposes.
            n: Number of the step.
            step: The step.
            lam: Cotangent of its end.
            dense: Those of outputs inside.
            mu: What the step before has put on the node.

        Returns:
            The cotangent of ``y`` at its start.
        """
        sweep = _Transpose(self, reversal, n, step, dense)
        sweep.v[self.node] = lam
        self._transpose_inner(sweep)
        start = sweep.start()
        if mu is not None:
            start.k = mu if start.k is None else start.k + mu
        return self.transpose_begin(reversal, step.start, start, n)

    def transpose_begin(
        self, reversal: Reversal, state: RKState, cotangent: Cotangent, n: int = 0
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


class ExplicitRK(RungeKutta):
    """The explicit Runge-Kutta method of a tableau.

    Raises:
        ArgumentError: The tableau is implicit.

    Example:
        >>> from symplectic_adjoint import tableaus
        >>> ExplicitRK(tableaus.get("dopri5")).order
        5
    """

    def __init__(self, tableau: Tableau, interpolant: Interpolant | None = None) -> None:
        if tableau.implicit:
            raise ArgumentError(f"method {tableau.name!r} is implicit; use ImplicitRK(tableau)")
        super().__init__(tableau, interpolant)


class _Transpose:
    """The reverse recursion through one step."""

    def __init__(
        self,
        method: RungeKutta,
        reversal: Reversal,
        n: int,
        step: RKStep,
        dense: DenseCotangent | DenseMoments | None,
    ) -> None:
        self.method = method
        self.field = reversal.field
        self.times = reversal.times if reversal.wants_time(n) else None
        self.n = n
        self.step = step
        self.h: Any = step.h
        self.reversal = reversal
        self.v: list[Tensor | None] = [None] * len(step.stages)
        self.dense = dense
        self.shares = self._dense_shares()

    def kappa(self, i: int) -> Tensor | None:
        """The cotangent that this step puts on ``k_i``."""
        share = self.shares.get(i)
        kappa = None if share is None else scaled(self.h, share)
        for weight, row in self.method.columns[i]:
            v = self.v[row] if row < len(self.v) else None
            if v is None:
                continue
            if kappa is None:
                # On small states quicker than a product, for which the factor becomes a tensor.
                kappa = add_scaled(self.reversal.zero(v), v, self.h, weight)
            else:
                add_scaled_(kappa, v, self.h, weight)
        return kappa

    def pull(self, i: int, kappa: Tensor | None) -> Tensor | None:
        if kappa is None:
            return None
        pulled = self.field.pull(self.step.stages[i], kappa, self.times is not None)
        self._report_value(i, kappa, pulled.k)
        if self.times is not None and pulled.time is not None:
            self.times.add_time(self.n, self.method.c[i], pulled.time)
        return pulled.v

    def pull_node(self, cotangent: Cotangent) -> Tensor:
        """The node, where the step meets the cotangents ``lam`` and ``mu`` of its end."""
        node = self.method.node
        own = self.kappa(node)
        if own is None and cotangent.k is None:
            return cotangent.y
        total = cotangent.k if own is None else own if cotangent.k is None else own + cotangent.k
        assert total is not None
        wants_time = self.times is not None or bool(cotangent.on_value)
        pulled = self.field.pull(self.step.stages[node], total, wants_time)
        for report in cotangent.on_value:
            report(pulled.k)
        if own is not None:
            self._report_value(node, own, pulled.k)
        if self.times is not None and pulled.time is not None:
            self.times.add_time(self.n, 1.0, pulled.time)
        return cotangent.y + pulled.v

    def start(self) -> Cotangent:
        """The cotangent of the step's start."""
        first, *rest = (v for v in self.v if v is not None)
        # Out of place once, since a product may share its memory with a cotangent.
        lam = first + (rest.pop() if rest else 0)
        for v in rest:
            lam += v
        if self.dense is not None:
            lam += self.dense.total
        mu = self.kappa(0)
        reports: list[Callable[[Tensor], None]] = []
        if mu is not None and (
            self.times is not None or getattr(self.dense, "slopes", None) is not None
        ):
            reports.append(functools.partial(self._report_value, 0, mu))
        return Cotangent(lam, mu, reports)

    def _report_value(self, i: int, kappa: Tensor, k: Tensor) -> None:
        """With ``k_i`` known: its parts of the cotangents of the step size and of ``theta``."""
        if self.times is not None:
            self.times.add_size(self.n, dot(k, kappa) / self.h)
        dense = self.dense
        if (
            isinstance(dense, DenseCotangent)
            and dense.slopes is not None
            and i in self.method.dense_stages
        ):
            column = self.method._polynomials[1:, self.method.dense_stages.index(i)]
            slopes = 2 * (power_slopes(2 * dense.theta - 1, len(column)) @ column)
            slopes = slopes.to(dense.slopes, non_blocking=True)
            along = dense.g.reshape(len(dense.g), k.numel()).conj() @ k.reshape(-1)
            dense.slopes += self.h * slopes * along.real

    def _dense_shares(self) -> dict[int, Tensor]:
        """``sum b_i(theta) g`` for each stage that the outputs weigh."""
        if self.dense is None:
            return {}
        method, dense = self.method, self.dense
        if isinstance(dense, DenseMoments):
            moments, rows = dense.moments.unbind(), method.dense.centred
            return {i: _weighted(rows[i], moments) for i in method.dense_stages}
        weights = method._weights(dense.theta).T.to(dense.g, non_blocking=True)
        shares = torch.tensordot(weights, dense.g, dims=1)
        return dict(zip(method.dense_stages, shares, strict=True))


def _weighted(weights: Sequence[float], xs: Sequence[Tensor]) -> Tensor:
    """``sum w x`` over the weights that are not zero."""
    (w, x), *rest = [(w, x) for w, x in zip(weights, xs, strict=True) if w != 0]
    total: Tensor = sum((w * x for w, x in rest), start=w * x)
    return total


def _terms(row: Sequence[float]) -> Terms:
    return tuple((float(w), j) for j, w in enumerate(row) if w != 0)


def _combine(field: Field, y: Tensor, h: Time, stages: Sequence[Stage], row: Terms) -> Tensor:
    """``y + h sum w k``, evaluating ``f`` where a stage has no value yet."""
    if not row:
        return y
    # All evaluations come before memory is taken for the sum.
    (weight, k), *rest = [(w, field.value(stages[j])) for w, j in row]
    if isinstance(h, Tensor):
        return y + scaled(h, sum((w * k for w, k in rest), start=weight * k))
    x = torch.add(y, k, alpha=h * weight)
    for weight, k in rest:
        x.add_(k, alpha=h * weight)
    return x
