"""The continuous adjoint: the adjoint equation solved backwards in time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint._tree import as_real, as_state, real_size
from symplectic_adjoint._types import Norm, Time, as_float
from symplectic_adjoint.controllers import Adaptive, Controller, FixedGrid, GridPace
from symplectic_adjoint.field import DetachedField, RandomState, Stage
from symplectic_adjoint.gradients._base import Counts, Record, Strategy, Sweep
from symplectic_adjoint.loop import SolveShape, integrate
from symplectic_adjoint.steppers import (
    ImplicitAdams,
    ImplicitRK,
    Partitioned,
    ScipySolver,
    Stepper,
    get,
    within,
)
from symplectic_adjoint.steppers._base import Saved, dot


@dataclass(frozen=True)
class Continuous(Strategy):
    """Solves the augmented adjoint ODE between output times, from the last to the first.

    Chen et al. 2018, "Neural ordinary differential equations", arXiv 1806.07366, algorithm 2, with
    the seminorm of Kidger, Chen, Lyons 2021, arXiv 2009.09457, section 3. Not exact: the gradient
    is that of the continuous problem, discretised anew; its error follows the tolerances.

    Attributes:
        seminorm: Leave the parameters' part, a quadrature, out of the error norm.
        rtol: Relative tolerance of the adjoint solve; the forward one's where None.
        atol: Absolute tolerance of the adjoint solve; the forward one's where None.
        method_name: Method of the adjoint solve, a name or a stepper; the forward one's where None.
        controller: Step control of the adjoint solve. Where None, the forward one's tolerances and
            limits, or its grid backwards.
        norm: Norm of the scaled error of the adjoint state ``(t, y, lam, *params)``, where the
            leaves of a pytree stand in the place of ``y`` and of ``lam``; ``t`` is the cotangent of
            time. In place of the largest of the norms of these parts.
    """

    seminorm: bool = True
    rtol: float | None = None
    atol: float | None = None
    method_name: str | Stepper | None = None
    controller: Controller | None = None
    norm: Callable[[tuple[Tensor, ...]], Tensor] | None = None
    name = "continuous"
    exact = False
    keeps_outputs = True

    def check(self, stepper: Stepper) -> None:
        super().check(stepper)
        own = self.stepper(stepper)
        if isinstance(own, ImplicitRK | Partitioned):
            raise ArgumentError(
                "the adjoint equation is solved by explicit methods for any system, not by "
                f"{own.name!r}; give "
                "one, e.g. Continuous(method_name='dopri5'), or choose gradient='symplectic', "
                "which is exact"
            )

    def keep(self, stepper: Stepper, n: int, step: Any) -> Record:
        return Record(Saved((), stepper.save(step, stages=False).tokens[:1]))

    def reverse(self, sweep: Sweep) -> Tensor:
        # Where func draws random numbers, it draws others now, and from nobody else's stream.
        with RandomState(sweep.y0.device).restored():
            return _AdjointSolve(self, sweep).run()

    def counts(self, stepper: Stepper, shape: SolveShape) -> Counts:
        """One product for each evaluation of its own solves, whose steps only they know."""
        assert shape.adjoint is not None
        products = shape.adjoint.evaluations(self.stepper(stepper).work)
        return Counts(products + shape.moved, products)

    def stepper(self, forward: Stepper) -> Stepper:
        """The method of the adjoint solve."""
        name = self.method_name
        own = forward if name is None else get(name) if isinstance(name, str) else name
        if isinstance(own, ImplicitAdams | ScipySolver):
            given: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol}
            own = replace(own, **{k: v for k, v in given.items() if v is not None})
        return own


class _AdjointSolve:
    """The state (y, lam, cotangents of parameters, cotangent of t) as one real vector."""

    def __init__(self, strategy: Continuous, sweep: Sweep) -> None:
        assert sweep.y is not None
        self.strategy = strategy
        self.sweep = sweep
        self.y = sweep.y
        rtol = sweep.setting.rtol if strategy.rtol is None else strategy.rtol
        atol = sweep.setting.atol if strategy.atol is None else strategy.atol
        self.setting = replace(
            sweep.setting, direction=-sweep.setting.direction, rtol=rtol, atol=atol
        )
        self.stepper = within(strategy.stepper(sweep.stepper), rtol, atol)
        self.aliases = sweep.field.aliases
        self.used: set[int] = set()
        self.wants_time = sweep.out_times is not None
        self.like = [sweep.y0, sweep.y0, *self.aliases]
        if self.wants_time:
            self.like.append(sweep.y0.new_zeros((), dtype=sweep.field.time_dtype))
        self.sizes = [*map(real_size, self.like)]
        self.dtype = sweep.field.time_dtype

    def run(self) -> Tensor:
        sweep = self.sweep
        reached = len(self.y)
        lam = torch.zeros_like(sweep.y0)
        rest = [torch.zeros_like(x) for x in self.like[2:]]
        for j in range(reached - 1, 0, -1):
            lam = lam + sweep.g[j]
            if self.wants_time:
                rest[-1] = rest[-1] - self._move_time(j)
            z = self._pack([self.y[j], lam, *rest])
            z = self._integrate(z, j)
            _, lam, *rest = self._unpack(z)
        for i, (alias, grad) in enumerate(zip(self.aliases, rest, strict=False)):
            alias.grad = grad if i in self.used else None
        if self.wants_time:
            assert sweep.out_times is not None
            sweep.out_times[0] += rest[-1]
        return lam + sweep.g[0]

    def _move_time(self, j: int) -> Tensor:
        """Cotangent of the output time ``t_j``: the output moves along the solution."""
        slope = self._value(float(self.sweep.times[j]), self.y[j])
        moved = dot(slope, self.sweep.g[j])
        assert self.sweep.out_times is not None
        self.sweep.out_times[j] += moved
        return moved.to(self.dtype)

    def _integrate(self, z: Tensor, j: int) -> Tensor:
        sweep = self.sweep
        start, end = float(sweep.times[j]), float(sweep.times[j - 1])
        if start == end:
            return z
        field = DetachedField(self._slope, z, (), None)
        controller = self.strategy.controller or sweep.controller
        if isinstance(self.stepper, ScipySolver):
            controller = None
        elif isinstance(sweep.stepper, ScipySolver) and self.stepper.error_order is not None:
            controller = self.strategy.controller or Adaptive()
        setting = replace(self.setting, end=end)
        if isinstance(controller, Adaptive):
            jumps = controller.jumps(start, end).tolist()
        else:
            grid = [start, end] if controller is None else self._grid(start, end, z)
            inside = [t for t in setting.jumps if min(start, end) < t < max(start, end)]
            grid = sorted({*grid, *inside}, reverse=setting.direction < 0)
            perturbed = isinstance(controller, FixedGrid) and controller.perturb
            jumps = grid if perturbed else []
        setting = replace(setting, jumps=frozenset({*setting.jumps, *jumps}))
        state = self.stepper.begin(setting.starting(start), z)
        if isinstance(controller, Adaptive):
            first = None if self.strategy.controller is None else controller.first_step
            own = replace(controller, norm=self._norm(), first_step=first)
            pace: Any = own.begin(field, self.stepper, state, setting)
        else:
            pace = GridPace(grid)
        for step in integrate(field, self.stepper, pace, state, setting, {}, sweep.own, self._tell):
            z = step.y1
            self._move_jump(step.t1, z)
            del step
        return z

    def _move_jump(self, t: Time, z: Tensor) -> None:
        """Cotangent of the time of a jump: the solution follows one slope for longer."""
        times, setting = self.sweep.reversal.times, self.sweep.setting
        if times is None or not setting.cuts(as_float(t)):
            return
        n = self.sweep.nodes.index(as_float(t))
        if times.wanted(n):
            y, lam, *_ = self._unpack(z)
            before = self._value(setting.ending(self.sweep.nodes[n]), y)
            after = self._value(setting.starting(self.sweep.nodes[n]), y)
            times.values[n] += dot(before - after, lam)

    def _value(self, t: Time, y: Tensor) -> Tensor:
        """``f`` without a graph."""
        self.sweep.field.linearize(False)
        value = self.sweep.field.evaluate(Stage(t, y))
        self.sweep.field.linearize(True)
        return value

    def _tell(self, moment: str, t: float, t1: float, state: Any) -> None:
        def parts() -> tuple[Any, ...]:
            time, y, lam, *params = self._parts(state.y)
            unflatten = self.sweep.spec.unflatten
            return (time, unflatten(y), unflatten(lam), *params)

        self.sweep.callbacks(moment, t, t1, parts)

    def _parts(self, z: Tensor) -> list[Tensor]:
        """The cotangent of time, the state, its cotangent and those of captured tensors."""
        y, lam, *rest = self._unpack(z)
        time = rest.pop() if self.wants_time else z.new_zeros(())
        return [time, y, lam, *rest]

    def _grid(self, start: float, end: float, z: Tensor) -> list[float]:
        """The grid between two outputs; without a controller of its own the forward one."""
        if isinstance(own := self.strategy.controller, FixedGrid):
            ends = torch.tensor([start, end], dtype=torch.float64)
            return own.grid(self._slope, z, ends).tolist()
        low, high = min(start, end), max(start, end)
        return [start, *(t for t in reversed(self.sweep.nodes) if low < t < high), end]

    def _slope(self, t: Tensor, z: Tensor) -> Tensor:
        y, lam, *_ = self._unpack(z)
        field = self.sweep.field
        field.products += 1
        graph = field.graph(Stage(t, y), self.wants_time)
        wanted = [graph.x, *self.aliases, *([graph.t] if self.wants_time else [])]
        if not graph.k.requires_grad:
            return self._pack([graph.k, *(torch.zeros_like(x) for x in wanted)])
        grads: list[Tensor | None] = [
            *torch.autograd.grad(graph.k, wanted, -lam, allow_unused=True)
        ]
        self.used |= {i for i, grad in enumerate(grads[1:]) if grad is not None}
        pairs = zip(grads, wanted, strict=True)
        return self._pack([graph.k, *(torch.zeros_like(x) if g is None else g for g, x in pairs)])

    def _norm(self) -> Norm:
        """The largest norm of the parts that count; the forward norm for states."""
        if (given := self.strategy.norm) is not None:
            return lambda z: given(self._leaves(z))
        count = 2 if self.strategy.seminorm else len(self.sizes)
        controller = self.sweep.controller
        forward = controller.norm if isinstance(controller, Adaptive) else None

        def largest(z: Tensor) -> Tensor:
            parts = [x for x in torch.split(z, self.sizes)[:count] if x.numel()]
            sizes = [torch.linalg.vector_norm(x) / math.sqrt(x.numel()) for x in parts]
            if forward is not None:
                sizes[:2] = (torch.as_tensor(forward(x)).to(z) for x in self._unpack(z)[:2])
            return torch.stack(sizes).max()

        return largest

    def _leaves(self, z: Tensor) -> tuple[Tensor, ...]:
        time, y, lam, *params = self._parts(z)
        states = (pytree.tree_leaves(self.sweep.spec.unflatten(x)) for x in (y, lam))
        return (time, *itertools.chain(*states), *params)

    def _pack(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([as_real(x.detach(), 0).to(self.dtype) for x in parts])

    def _unpack(self, z: Tensor) -> list[Tensor]:
        pairs = zip(torch.split(z, self.sizes), self.like, strict=True)
        return [as_state(x, like).to(like.dtype) for x, like in pairs]
