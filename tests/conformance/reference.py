"""The computed solution once more, by the textbook, under plain autograd.

Nothing here comes from the package but the coefficients of the methods: the accepted steps are
replayed on a list of leaves, every stage written out, so that autograd differentiates exactly what
was computed on the frozen grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from symplectic_adjoint.dense import Interpolant
from symplectic_adjoint.steppers import ExplicitRK, Stepper

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

    Returns:
        Like ``y0``, with a leading dimension for the times.
    """
    leaves, tree = pytree.tree_flatten(y0)

    def field(time: Tensor, state: Leaves) -> Leaves:
        slope = func(time, pytree.tree_unflatten(state, tree), *args)
        return pytree.tree_flatten(slope)[0]

    if isinstance(stepper, ExplicitRK):
        step = _RungeKutta(stepper, interpolant)
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

    def __init__(self, stepper: ExplicitRK, interpolant: Interpolant | None) -> None:
        self.tableau = stepper.tableau
        self.interpolant = interpolant or stepper.tableau.interpolant

    def start(self, field: Field, t: Tensor, y: Leaves) -> tuple[Leaves]:
        return (y,)

    def take(self, field: Field, state: tuple[Leaves], t: Tensor, h: Tensor) -> Any:
        (y,) = state
        k: list[Leaves] = []
        for row, c in zip(self.tableau.a, self.tableau.c, strict=True):
            k.append(field(t + c * h, _plus(y, h, row, k)))
        y1 = _plus(y, h, self.tableau.b, k)

        def inside(theta: Tensor) -> Leaves:
            stages = [*k, field(t + h, y1)]
            for row, c in zip(self.interpolant.a, self.interpolant.c, strict=True):
                stages.append(field(t + c * h, _plus(y, h, row, stages)))
            return _plus(y, h, _polynomials(self.interpolant.coefficients, theta), stages)

        return (y1,), inside


class _Leapfrog:
    """The asynchronous leapfrog on (y, v), with cubic Hermite interpolation."""

    def start(self, field: Field, t: Tensor, y: Leaves) -> tuple[Leaves, Leaves]:
        return y, field(t, y)

    def take(self, field: Field, state: tuple[Leaves, Leaves], t: Tensor, h: Tensor) -> Any:
        y, v = state
        u = field(t + h / 2, _plus(y, h / 2, [1.0], [v]))
        v1 = [2 * b - a for a, b in zip(v, u, strict=True)]
        y1 = _plus(y, h / 2, [1.0, 1.0], [v, v1])

        def inside(theta: Tensor) -> Leaves:
            """Hermite's basis on the values and slopes at both ends."""
            rise = 3 * theta**2 - 2 * theta**3
            left, right = theta * (1 - theta) ** 2, theta**2 * (theta - 1)
            return [
                a + rise * (b - a) + h * (left * p + right * q)
                for a, b, p, q in zip(y, y1, v, v1, strict=True)
            ]

        return (y1, v1), inside
