"""Roots of the equations of implicit steps, and the linear systems of their derivatives.

The unknowns are the values ``K_i`` of ``m`` coupled stages, ``K_i = f(base_i + h sum_j a_ij K_j)``.
The derivative of the residual is ``M = I - h (A (x) I) J`` read stage by stage,

    (M d)_i = d_i - h J_i sum_j a_ij d_j,        (M^T w)_j = w_j - h sum_i a_ij J_i^T w_i,

with ``J_i = df/dy`` at stage ``i``. Newton's method solves with ``M``, the reverse pass with
``M^T``: both by one LU decomposition where the state is small, and otherwise by GMRES on products
of ``J_i``, which never forms a matrix (Hairer, Wanner, *Solving Ordinary Differential Equations
II*, section IV.8; Saad, Schultz 1986, doi 10.1137/0907058; Knoll, Keyes 2004, "Jacobian-free
Newton-Krylov methods", doi 10.1016/j.jcp.2003.08.010). Complex states are pairs of real ones, so
that nothing is asked of ``f`` but real differentiability.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint._tree import as_real, as_state, real_dtype, real_size


@dataclass(frozen=True)
class Newton:
    """How the equations of an implicit step are solved.

    The Jacobian is kept over iterations while they converge fast (chord iterations) and computed
    anew when they do not. The iteration goes on to rounding, since the gradient is that of the
    root: what the iteration leaves is what the gradient is off by.

    Attributes:
        max_iters: Greatest number of iterations of one step (of one stage, where stages follow one
            another).
        dense_below: States with at most this many real numbers, all samples of a batch together,
            get a dense Jacobian and an LU decomposition; larger ones matrix-free GMRES.
        krylov: Greatest dimension of a Krylov space; GMRES starts again from there. This many
            vectors of the size of all coupled stages are held at a time.
        tolerance: None iterates to rounding. A number stops earlier, when the estimated error of
            the root is below this fraction of ``atol + rtol |y|``; the gradient is then off by as
            much.

    Raises:
        ArgumentError: A value is out of range.

    Example:
        >>> Newton(dense_below=0)  # never a matrix
        Newton(max_iters=50, dense_below=0, krylov=40, tolerance=None)
    """

    max_iters: int = 50
    dense_below: int = 128
    krylov: int = 40
    tolerance: float | None = None

    def __post_init__(self) -> None:
        valid = {
            "max_iters": self.max_iters >= 2,
            "dense_below": self.dense_below >= 0,
            "krylov": self.krylov >= 1,
            "tolerance": self.tolerance is None or 0 < self.tolerance < math.inf,
        }
        for field in fields(self):
            if not valid[field.name]:
                raise ArgumentError(
                    f"{field.name} = {getattr(self, field.name)} is out of range; needed: "
                    "max_iters >= 2, dense_below >= 0, krylov >= 1, tolerance > 0 or None"
                )


class NoConvergence(Exception):  # noqa: N818 - a signal, which the caller turns into words
    """An iteration did not come to its end.

    Attributes:
        iterations: How many were made.
        size: Size of the last correction, in units of what would do.
    """

    def __init__(self, iterations: int, size: float) -> None:
        super().__init__(iterations, size)
        self.iterations = iterations
        self.size = size


class Jacobian:
    """``J = dk/dx`` at one evaluation, as a matrix or as products.

    Args:
        x: Where ``f`` was evaluated, on the graph of ``k``.
        k: Its value.
        count: Called with the number of products taken.
    """

    def __init__(self, x: Tensor, k: Tensor, count: Callable[[int], None]) -> None:
        self.x = x
        self.k = k
        self.count = count

    @functools.cached_property
    def dense(self) -> Tensor:
        """The matrix (N, N), by N products, some in one batch."""
        n, k = real_size(self.k), self.k
        matrix = torch.zeros(n, n, dtype=real_dtype(k), device=k.device)
        if not k.requires_grad:
            return matrix
        self.count(n)
        basis = as_state(torch.eye(n, dtype=matrix.dtype, device=k.device), k)
        for first in range(0, n, _BATCH):
            chunk = slice(first, first + _BATCH)
            rows = _product(k, self.x, basis[chunk], is_grads_batched=True)
            if rows is not None:
                matrix[chunk] = as_real(rows.detach(), 1)
        return matrix

    def transposed(self, w: Tensor) -> Tensor:
        """``J^T w`` by one product."""
        v: Tensor | None = None
        if self.k.requires_grad:
            self.count(1)
            v = _product(self.k, self.x, w)
        return torch.zeros_like(w) if v is None else v.detach()

    def apply(self, v: Tensor) -> Tensor:
        """``J v`` by one product: ``J^T u`` is linear in ``u``, and its transpose is ``J``."""
        if self._linear is None:
            return torch.zeros_like(v)
        self.count(1)
        u, g = self._linear
        w = _product(g, u, v)
        return torch.zeros_like(v) if w is None else w.detach()

    @functools.cached_property
    def _linear(self) -> tuple[Tensor, Tensor] | None:
        """``u`` and ``J^T u``; None where ``k`` does not depend on ``x``."""
        if not self.k.requires_grad:
            return None
        self.count(1)
        with torch.enable_grad():
            u = torch.zeros_like(self.k).requires_grad_()
            g = _product(self.k, self.x, u, create_graph=True)
        return None if g is None or not g.requires_grad else (u, g)


_BATCH = 16
"""Products in one batch hold the memory of as many; more of them are hardly quicker."""


def _product(output: Tensor, x: Tensor, cotangent: Tensor, **options: bool) -> Tensor | None:
    (v,) = torch.autograd.grad(
        output, x, cotangent, retain_graph=True, allow_unused=True, **options
    )
    return v


class StageSystem:
    """``M = I - h (A (x) I) J`` of ``m`` coupled stages; solves with it and with its transpose.

    Args:
        weights: ``h A``, an (m, m) matrix of floats.
        jacobians: ``J_i`` of each stage; one and the same is decomposed as such.
        options: How to solve.
        identity: What ``I`` is multiplied with. Zero leaves the second part alone: that of a step
            without end, which leads to a steady state.
    """

    def __init__(
        self,
        weights: Sequence[Sequence[float]],
        jacobians: Sequence[Jacobian],
        options: Newton,
        identity: float = 1.0,
    ) -> None:
        k = jacobians[0].k
        self.weights = torch.tensor(weights, dtype=real_dtype(k), device=k.device)
        self.jacobians = jacobians
        self.options = options
        self.identity = identity
        self.is_dense = real_size(k) <= options.dense_below

    def solve(self, r: Tensor, tolerance: float | None = None) -> Tensor:
        """``M^{-1} r`` for ``r`` of shape (m, ...); to rounding where no tolerance is given.

        Raises:
            NoConvergence: Without a tolerance, GMRES stalled far from rounding.
        """
        return self._solved(r, self._product, False, tolerance)

    def solve_transposed(self, r: Tensor) -> Tensor:
        """``M^{-T} r``, to rounding.

        Raises:
            NoConvergence: GMRES stalled far from rounding.
        """
        return self._solved(r, self._product_transposed, True, None)

    def _solved(
        self,
        r: Tensor,
        product: Callable[[Tensor], Tensor],
        transposed: bool,
        tolerance: float | None,
    ) -> Tensor:
        if self.is_dense:
            flat = as_real(r, 0).reshape(-1, 1)
            x = torch.linalg.lu_solve(*self._factors, flat, adjoint=transposed)
            return as_state(x.reshape(len(r), -1), r[0])
        return gmres(product, r, tolerance, self.options.krylov)

    @functools.cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """The LU decomposition of the (m N, m N) matrix."""
        m = len(self.jacobians)
        j = torch.stack([jacobian.dense for jacobian in self.jacobians])
        n = j.shape[-1]
        matrix = -torch.einsum("ij,iab->iajb", self.weights.to(j), j).reshape(m * n, m * n)
        matrix.diagonal().add_(self.identity)
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        return factors, pivots

    def _product(self, d: Tensor) -> Tensor:
        mixed = torch.tensordot(self.weights.to(d.dtype), d, dims=1)
        parts = [j.apply(x) for j, x in zip(self.jacobians, mixed, strict=True)]
        difference: Tensor = self.identity * d - torch.stack(parts)
        return difference

    def _product_transposed(self, w: Tensor) -> Tensor:
        parts = [j.transposed(x) for j, x in zip(self.jacobians, w, strict=True)]
        mixed = torch.tensordot(self.weights.T.to(w.dtype), torch.stack(parts), dims=1)
        difference: Tensor = self.identity * w - mixed
        return difference


def newton(
    options: Newton,
    u: Tensor,
    evaluate: Callable[[Tensor, int, bool], tuple[Tensor, StageSystem | None]],
    measure: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """A root of ``F`` by chord iterations and, where those are slow, Newton's.

    Args:
        options: When to give up, and how to solve.
        u: Where to start.
        evaluate: ``(u, iteration, wants_system) -> (F(u), M or None)``.
        measure: ``(correction, u) -> size``, a 0-dim tensor; at most 1 where the correction is as
            small as the error of the root may be.

    Returns:
        The root. ``F`` has not been evaluated there but at the iterate before.

    Raises:
        NoConvergence: ``max_iters`` iterations were not enough, or left the finite numbers.

    Example:
        The fixed point of the cosine, from a Jacobian that is right at the start only.

        >>> def evaluate(u, iteration, wants_system):
        ...     x = u[0].clone().requires_grad_()
        ...     jacobian = Jacobian(x, x.cos(), lambda products: None)
        ...     return u - u.cos(), StageSystem([[1.0]], [jacobian], Newton())
        >>> start = torch.full((1, 1), 0.5, dtype=torch.float64)
        >>> root = newton(Newton(), start, evaluate, lambda d, u: d.norm() / 1e-15)
        >>> round(root.item(), 12)
        0.739085133215
    """
    system: StageSystem | None = None
    last, rate, floor = 0.0, 0.0, torch.finfo(real_dtype(u)).eps ** -0.25
    for iteration in range(options.max_iters):
        r, fresh = evaluate(u, iteration, iteration == 0 or last * rate**3 > 1)
        system = system if fresh is None else fresh
        assert system is not None
        correction = system.solve(r, _INNER)
        u = u - correction
        size = float(measure(correction, u))
        if not math.isfinite(size):
            raise NoConvergence(iteration + 1, size)
        rate = size / last if iteration else 0.0
        converged = iteration > 0 and rate < 1 and size * rate / (1 - rate) <= 1
        if size <= 1 or converged or (rate > 0.5 and size <= floor):
            return u
        last = size
    raise NoConvergence(options.max_iters, last)


class Measure:
    """The size of a correction of ``K``, in units of what may be left of it.

    Args:
        options: ``tolerance`` says whether that is rounding, or a part of the tolerances.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        base: The state where ``K`` is zero.
        h: What the state moves by where ``K`` is one.
    """

    def __init__(
        self,
        options: Newton,
        rtol: float | Tensor,
        atol: float | Tensor,
        base: Tensor,
        h: float = 1.0,
    ) -> None:
        self.h = abs(h)
        self.eps = torch.finfo(real_dtype(base)).eps
        self.size = torch.linalg.vector_norm(base)
        self.allowed: Tensor | None = None
        if options.tolerance is not None:
            self.allowed = atol + rtol * base.abs()
            self.unit = torch.full_like(base, options.tolerance).norm()

    def __call__(self, correction: Tensor, k: Tensor) -> Tensor:
        """At most 1 where the correction is as small as the error may be; 0-dim."""
        moved = self.h * correction
        if self.allowed is None:
            reach = self.size + self.h * torch.linalg.vector_norm(k)
            unit = self.eps * reach.clamp_min(torch.finfo(reach.dtype).tiny)
        else:
            moved, unit = moved / self.allowed, self.unit
        size: Tensor = torch.linalg.vector_norm(moved) / unit
        return size


_INNER = 1e-6
"""Relative residual of the linear systems of Newton's method that are solved by GMRES."""


def gmres(
    product: Callable[[Tensor], Tensor], b: Tensor, tolerance: float | None, dimension: int
) -> Tensor:
    """The solution of ``M x = b`` from products ``M d``, restarted until its residual is small.

    Args:
        product: ``d -> M d``.
        b: Right side, of any shape.
        tolerance: Relative residual to reach; None for rounding.
        dimension: Greatest dimension of a Krylov space.

    Returns:
        The solution, like ``b``.

    Raises:
        NoConvergence: Without a tolerance, the residual stalled far above rounding.

    Example:
        >>> m = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
        >>> x = gmres(lambda d: m @ d, torch.ones(2, dtype=torch.float64), None, 5)
        >>> torch.allclose(m @ x, torch.ones(2, dtype=torch.float64))
        True
    """
    eps = torch.finfo(real_dtype(b)).eps
    right = as_real(b, 0).reshape(-1)
    norm = float(torch.linalg.vector_norm(right))
    x = torch.zeros_like(right)
    if norm == 0.0 or not math.isfinite(norm):
        return b - b  # zero, or NaN throughout where b holds one

    def apply(d: Tensor) -> Tensor:
        return as_real(product(as_state(d.reshape(-1), b)), 0).reshape(-1)

    target = norm * (4 * eps if tolerance is None else tolerance)
    residual, left = right, norm
    for _ in range(_CYCLES):
        correction, estimate = _krylov(apply, residual, left, target, dimension)
        x = x + correction
        if tolerance is not None and estimate <= target:
            break
        residual = right - apply(x)
        before, left = left, float(torch.linalg.vector_norm(residual))
        if left <= target or not left <= 0.5 * before:
            break
    if tolerance is None and not left <= _SLACK * target:
        raise NoConvergence(_CYCLES, left / target)
    return as_state(x, b)


_CYCLES = 50
_SLACK = 256.0
"""Where the residual no longer shrinks, this many times the rounding of ``b`` is still taken."""


def _krylov(
    apply: Callable[[Tensor], Tensor], r: Tensor, norm: float, target: float, dimension: int
) -> tuple[Tensor, float]:
    """The best correction in one Krylov space, and the residual it leaves: Arnoldi and Givens."""
    basis = [r / norm]
    columns: list[list[float]] = []
    rotations: list[tuple[float, float]] = []
    right = [norm]
    for j in range(min(dimension, len(r))):
        w = apply(basis[j])
        v = torch.stack(basis)
        overlap = v @ w
        w = w - overlap @ v
        again = v @ w  # twice is enough to be orthogonal to rounding
        w = w - again @ v
        size = torch.linalg.vector_norm(w)
        *column, below = torch.cat([overlap + again, size.unsqueeze(0)]).tolist()
        for i, (c, s) in enumerate(rotations):
            column[i : i + 2] = _rotated(c, s, *column[i : i + 2])
        length = math.hypot(column[-1], below)
        if length == 0.0 or not math.isfinite(length):
            break
        c, s = column[-1] / length, below / length
        rotations.append((c, s))
        column[-1] = length
        columns.append(column)
        right[-1:] = [c * right[-1], -s * right[-1]]
        if abs(right[-1]) <= 0.5 * target or below == 0.0:
            break
        basis.append(w / size)
    return _combined(columns, right, basis), abs(right[-1])


def _rotated(c: float, s: float, x: float, y: float) -> list[float]:
    return [c * x + s * y, c * y - s * x]


def _combined(columns: list[list[float]], right: list[float], basis: list[Tensor]) -> Tensor:
    """Back substitution in the triangular matrix of the rotated columns."""
    y = [0.0] * len(columns)
    for i in reversed(range(len(columns))):
        later = sum(columns[j][i] * y[j] for j in range(i + 1, len(columns)))
        y[i] = (right[i] - later) / columns[i][i]
    total = torch.zeros_like(basis[0])
    for weight, v in zip(y, basis, strict=False):
        total.add_(v, alpha=weight)
    return total
