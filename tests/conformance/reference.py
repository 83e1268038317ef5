"""The computed solution once more, by the textbook, under plain autograd.

Nothing here comes from the package but the coefficients of the methods: the accepted steps are
replayed on a list of leaves, every stage written out, so that autograd differentiates exactly what
was computed on the frozen grid.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from symplectic_adjoint import tableaus
from symplectic_adjoint.dense import Interpolant, hermite, linear
from symplectic_adjoint.steppers import (
    ExplicitAdams,
    ExplicitRK,
    ImplicitAdams,
    ImplicitRK,
    Partitioned,
    Stepper,
)
from symplectic_adjoint.tableaus import Tableau

Leaves = list[Tensor]
Field = Callable[[Tensor, Leaves], Leaves]


def frozen(
    stepper: Stepper,
    func: Callable[..., Any],
    y0: Any,
    nodes: Sequence[Tensor],
    times: Sequence[Tensor],
    args: Sequence[Any] = (),
    interpolant: Interpolant | None = None,
    tolerance: tuple[float, float] = (1.0, 1.0),
) -> Any:
    """The solution at ``t`` on given step times.

    Args:
        stepper: The method whose coefficients to use.
        func: ``func(t, y, *args)``.
        y0: Initial state, a tensor or a pytree.
        nodes: Step times, 0-dim tensors; an output whose time is the very same tensor is the
            state there, any other output is interpolated in the first step that reaches it.
        times: Output times, 0-dim tensors.
        args: Extra arguments.
        interpolant: A continuous extension in place of the method's own.
        tolerance: Relative and absolute tolerance of iterations within a step.

    Returns:
        Like ``y0``, with a leading dimension for the times.
    """
    leaves, tree = pytree.tree_flatten(y0)

    def field(time: Tensor, state: Leaves) -> Leaves:
        slope = func(time, pytree.tree_unflatten(state, tree), *args)
        return pytree.tree_flatten(slope)[0]

    step: Any
    if isinstance(stepper, ExplicitRK):
        step = _RungeKutta(stepper.tableau, interpolant)
    elif isinstance(stepper, ImplicitRK):
        step = _ImplicitRungeKutta(stepper.tableau, interpolant)
    elif isinstance(stepper, ExplicitAdams | ImplicitAdams):
        step = _Adams(stepper, tolerance)
    elif isinstance(stepper, Partitioned):
        branches = pytree.tree_structure(y0).children()
        step = _Splitting(stepper, branches[0].num_leaves if branches else None)
    else:
        assert stepper.name == "alf", f"write down method {stepper.name!r} here"
        step = _Leapfrog()
    outputs = _replay(step, field, leaves, nodes, list(times))
    stacked = [torch.stack(parts) for parts in zip(*outputs, strict=True)]
    return pytree.tree_unflatten(stacked, tree)


class Split:
    """A module whose parameters and extra arguments are told apart from evaluation to evaluation.

    The gradient of a tensor is the sum of those of its copies, so the copies' gradients show how
    large the terms of that sum are.
    """

    def __init__(self, module: Any, params: dict[str, Tensor]) -> None:
        self.module = module
        self.params = params
        self.copies: list[tuple[str, Tensor]] = []

    def __call__(self, t: Tensor, y: Any, *args: Tensor) -> Any:
        params = {name: self._copy(name, x) for name, x in self.params.items()}
        args = tuple(self._copy(f"args[{i}]", x) for i, x in enumerate(args))
        return torch.func.functional_call(self.module, params, (t, y, *args))

    def sizes(self, loss: Tensor) -> dict[str, float]:
        """For each tensor, the sum of the sizes of its copies' gradients."""
        names, copies = zip(*self.copies, strict=True)
        grads = torch.autograd.grad(loss, copies, retain_graph=True, materialize_grads=True)
        sizes = dict.fromkeys(names, 0.0)
        for name, grad in zip(names, grads, strict=True):
            sizes[name] += float(torch.linalg.vector_norm(grad))
        return sizes

    def _copy(self, name: str, x: Tensor) -> Tensor:
        self.copies.append((name, x.clone()))
        return self.copies[-1][1]


def adaptive_nodes(steps: Tensor, times: Sequence[Tensor]) -> list[Tensor]:
    """The step times of an adaptive solve: its ends follow ``t``, all between are constants."""
    return [times[0], *steps[1:-1].unbind(), times[-1]]


def uniform_nodes(steps: Tensor, times: Sequence[Tensor]) -> list[Tensor]:
    """The step times of a grid of one step size: they follow ``t[0]``, the last is ``t[-1]``."""
    return [*(times[0] + (steps[:-1] - steps[0])).unbind(), times[-1]]


def _replay(
    step: Any, field: Field, leaves: Leaves, nodes: Sequence[Tensor], times: list[Tensor]
) -> list[Leaves]:
    direction = 1.0 if nodes[-1] > nodes[0] else -1.0
    outputs, waiting = [leaves], times[1:]
    state = step.start(field, nodes[0], leaves)
    for t, t1 in itertools.pairwise(nodes):
        h = t1 - t
        state, inside = step.take(field, state, t, h)
        while waiting and (waiting[0].detach() - t1.detach()).item() * direction <= 0:
            time = waiting.pop(0)
            outputs.append(state[0] if time is t1 else inside((time - t) / h))
    assert not waiting, "the step times do not reach the last output"
    return outputs


def _plus(y: Leaves, h: Tensor, weights: Sequence[Any], k: Sequence[Leaves]) -> Leaves:
    """``y + h sum w k``, leaf by leaf."""
    moved = []
    for i, leaf in enumerate(y):
        total = torch.zeros_like(leaf)
        for weight, slope in zip(weights, k, strict=True):
            total = total + weight * slope[i]
        moved.append(leaf + h * total)
    return moved


def _polynomials(rows: Sequence[Sequence[float]], theta: Tensor) -> list[Tensor]:
    """``sum_p row[p] theta^(p + 1)`` for each row, with its slope; without rounding on the way."""
    place = Fraction(theta.detach().item())
    powers = [place**p for p in range(len(rows[0]) + 1)]
    values = []
    for row in rows:
        value = sum(Fraction(x) * powers[p + 1] for p, x in enumerate(row))
        slope = sum(Fraction(x) * (p + 1) * powers[p] for p, x in enumerate(row))
        values.append(float(value) + float(slope) * (theta - theta.detach()))
    return values


class _RungeKutta:
    """Explicit Runge-Kutta by its Butcher tableau and the polynomials of its interpolant."""

    def __init__(self, tableau: Tableau, interpolant: Interpolant | None) -> None:
        self.tableau = tableau
        self.interpolant = interpolant or tableau.interpolant

    def start(self, field: Field, t: Tensor, y: Leaves) -> tuple[Leaves]:
        return (y,)

    def stages(self, field: Field, y: Leaves, t: Tensor, h: Tensor) -> list[Leaves]:
        k: list[Leaves] = []
        for row, c in zip(self.tableau.a, self.tableau.c, strict=True):
            k.append(field(t + c * h, _plus(y, h, row, k)))
        return k

    def take(self, field: Field, state: tuple[Leaves], t: Tensor, h: Tensor) -> Any:
        (y,) = state
        k = self.stages(field, y, t, h)
        y1 = _plus(y, h, self.tableau.b, k)

        def inside(theta: Tensor) -> Leaves:
            stages = [*k, field(t + h, y1)]
            for row, c in zip(self.interpolant.a, self.interpolant.c, strict=True):
                stages.append(field(t + c * h, _plus(y, h, row, stages)))
            return _plus(y, h, _polynomials(self.interpolant.coefficients, theta), stages)

        return (y1,), inside


class _ImplicitRungeKutta(_RungeKutta):
    """All stages at once, diagonally implicit or not, by Newton's method with the full matrix."""

    def stages(self, field: Field, y: Leaves, t: Tensor, h: Tensor) -> list[Leaves]:
        first = field(t, y)
        shapes = [x.shape for _ in self.tableau.c[1:] for x in y]

        def split(flat: Tensor) -> list[Leaves]:
            sizes = [shape.numel() for shape in shapes]
            parts = zip(flat.split(sizes), shapes, strict=True)
            leaves = [x.reshape(shape) for x, shape in parts]
            return [first, *(leaves[i : i + len(y)] for i in range(0, len(leaves), len(y)))]

        def residual(flat: Tensor) -> Tensor:
            k = split(flat)
            values = [
                field(t + c * h, _plus(y, h, row, k))
                for row, c in zip(self.tableau.a[1:], self.tableau.c[1:], strict=True)
            ]
            return flat - torch.cat([x.reshape(-1) for leaves in values for x in leaves])

        root = torch.zeros(sum(shape.numel() for shape in shapes), dtype=y[0].dtype)
        size = 1.0
        while size > 1e-14:
            matrix = torch.autograd.functional.jacobian(residual, root, vectorize=True)
            correction = torch.linalg.solve(matrix, residual(root).detach())
            root, size = root - correction, float(correction.norm() / (1 + root.norm()))
        # Once more, with its graph: at the root, Newton's step has the derivative of the root.
        return split(root - torch.linalg.solve(matrix, residual(root)))


class _Leapfrog:
    """The asynchronous leapfrog on (y, v), with cubic Hermite interpolation."""

    def start(self, field: Field, t: Tensor, y: Leaves) -> tuple[Leaves, Leaves]:
        return y, field(t, y)

    def take(self, field: Field, state: tuple[Leaves, Leaves], t: Tensor, h: Tensor) -> Any:
        y, v = state
        u = field(t + h / 2, _plus(y, h / 2, [1.0], [v]))
        v1 = [2 * b - a for a, b in zip(v, u, strict=True)]
        y1 = _plus(y, h / 2, [1.0, 1.0], [v, v1])

        return (y1, v1), lambda theta: _hermite(theta, h, (y, v), (y1, v1))


class _Splitting:
    """Moves of one part after the other, each with an evaluation of its own, and cubic Hermite."""

    def __init__(self, stepper: Partitioned, first: int | None) -> None:
        self.splitting = stepper.splitting
        self.first = first

    def start(self, field: Field, t: Tensor, y: Leaves) -> tuple[Leaves]:
        return (y,)

    def take(self, field: Field, state: tuple[Leaves], t: Tensor, h: Tensor) -> Any:
        (y,) = state
        y1, clocks = y, [0.0, 0.0]
        for part, weight, _ in self.splitting.moves:
            k = field(t + clocks[1 - part] * h, y1)
            y1 = _plus(y1, h, [weight], [[self.masked(x, i, part) for i, x in enumerate(k)]])
            clocks[part] += weight
        ends = (y, field(t, y)), (y1, field(t + h, y1))
        return (y1,), lambda theta: _hermite(theta, h, *ends)

    def masked(self, x: Tensor, i: int, part: int) -> Tensor:
        if self.first is not None:
            return x if (i >= self.first) == part else torch.zeros_like(x)
        halves = list(x.chunk(2, -1))
        halves[1 - part] = torch.zeros_like(halves[1 - part])
        return torch.cat(halves, -1)


class _Adams:
    """Adams-Bashforth and Adams-Moulton on (y, past times, past slopes), newest first."""

    def __init__(
        self, stepper: ExplicitAdams | ImplicitAdams, tolerance: tuple[float, float]
    ) -> None:
        tableau = tableaus.get(stepper.start)
        self.stepper = stepper
        self.tolerance = tolerance
        between = linear if stepper.interp == "linear" else hermite
        self.first = _RungeKutta(tableau, between(tableau.b, order=1))
        self.few = min(tableau.order, stepper.max_order) - 1

    def start(self, field: Field, t: Tensor, y: Leaves) -> tuple[Leaves, list[Any], list[Any]]:
        return y, [], []

    def take(self, field: Field, state: Any, t: Tensor, h: Tensor) -> Any:
        y, times, slopes = state
        times, slopes = [t, *times], [field(t, y), *slopes]
        if len(times) < self.few:
            (y1,), inside = self.first.take(field, (y,), t, h)
            return (y1, times, slopes), inside
        times = times[: self.stepper.max_order - 1]
        slopes = slopes[: self.stepper.max_order - 1]
        d = self.increment(t + h, times, times, slopes)
        if isinstance(self.stepper, ImplicitAdams):
            d = self.iterated(field, y, d, [t + h, *times], slopes)
        y1 = [a + b for a, b in zip(y, d, strict=True)]

        def inside(theta: Tensor) -> Leaves:
            if self.stepper.interp == "linear":
                return [a + theta * (b - a) for a, b in zip(y, y1, strict=True)]
            return _hermite(theta, h, (y, slopes[0]), (y1, field(t + h, y1)))

        return (y1, times, slopes), inside

    def iterated(
        self, field: Field, y: Leaves, d: Leaves, times: list[Tensor], slopes: list[Leaves]
    ) -> Leaves:
        """The corrector, until no element changes by more than the tolerance."""
        assert isinstance(self.stepper, ImplicitAdams)
        for _ in range(self.stepper.max_iters):
            k = field(times[0], [a + b for a, b in zip(y, d, strict=True)])
            last, d = d, self.increment(times[0], times[1:], times, [k, *slopes])
            if all(self.close(a.detach(), b.detach()) for a, b in zip(last, d, strict=True)):
                break
        return d

    def close(self, last: Tensor, d: Tensor) -> bool:
        rtol, atol = self.tolerance
        allowed = atol + rtol * torch.maximum(last.abs(), d.abs())
        return bool(((d - last).abs() <= allowed).all())

    def increment(
        self, t1: Tensor, start: list[Tensor], nodes: list[Tensor], slopes: list[Leaves]
    ) -> Leaves:
        """The integral from ``start[0]`` to ``t1`` of the polynomial through the slopes."""
        weights = [_integral(nodes, j, start[0], t1) for j in range(len(nodes))]
        zero = [torch.zeros_like(leaf) for leaf in slopes[0]]
        return _plus(zero, torch.ones_like(t1), weights, slopes)


def _integral(nodes: Sequence[Tensor], j: int, a: Tensor, b: Tensor) -> Tensor:
    """``int_a^b l_j(t) dt`` by Gauss's rule with seven points, exact up to degree 13."""
    points, weights = _gauss(7)
    total = torch.zeros_like(a)
    for point, weight in zip(points, weights, strict=True):
        t, value = (a + b) / 2 + point * (b - a) / 2, torch.ones_like(a)
        for i, node in enumerate(nodes):
            if i != j:
                value = value * (t - node) / (nodes[j] - node)
        total = total + weight * value
    return total * (b - a) / 2


@functools.cache
def _gauss(n: int) -> tuple[list[float], list[float]]:
    """Points and weights on [-1, 1] (Golub and Welsch 1969)."""
    off = torch.arange(1, n, dtype=torch.float64)
    off = off / torch.sqrt(4 * off**2 - 1)
    points, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return points.tolist(), (2 * vectors[0] ** 2).tolist()


def _hermite(
    theta: Tensor, h: Tensor, left: tuple[Leaves, Leaves], right: tuple[Leaves, Leaves]
) -> Leaves:
    """Hermite's basis on the values and slopes at both ends of a step."""
    rise = 3 * theta**2 - 2 * theta**3
    early, late = theta * (1 - theta) ** 2, theta**2 * (theta - 1)
    return [
        a + rise * (b - a) + h * (early * p + late * q)
        for a, p, b, q in zip(*left, *right, strict=True)
    ]
