"""Dense output after a solve."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from symplectic_adjoint._compile import uncompiled
from symplectic_adjoint._types import as_float
from symplectic_adjoint.capture import Capture, detached, varies
from symplectic_adjoint.field import DetachedField, Field
from symplectic_adjoint.gradients._base import Record
from symplectic_adjoint.gradients._function import Tape, attach
from symplectic_adjoint.gradients.symplectic import Symplectic
from symplectic_adjoint.loop import Outputs, Stats
from symplectic_adjoint.problem import Problem
from symplectic_adjoint.steppers import Stepper


class Dense:
    """Dense output after the solve: sorts times into steps, whatever their order."""

    def __init__(self, problem: Problem, nodes: Sequence[float]) -> None:
        self.problem = problem
        self.nodes = torch.tensor(nodes, dtype=torch.float64)

    @uncompiled
    def __call__(self, t: Tensor) -> Any:
        flat, order = (t.reshape(-1) * self.problem.direction).sort()
        times = flat * self.problem.direction
        y = self.at(times)[order.argsort()]
        return self.problem.spec.unflatten(y.reshape(*t.shape, *y.shape[1:]))

    def at(self, times: Tensor) -> Tensor:
        """The flat solution at times sorted in the direction of the solve."""
        raise NotImplementedError

    def bins(self, times: Tensor) -> list[Outputs]:
        """The outputs that each step holds; those at the start belong to the first step."""
        direction = self.problem.direction
        edges = torch.searchsorted(times.detach() * direction, self.nodes * direction, side="right")
        edges[0] = 0
        stops = edges.tolist()
        return [Outputs(a, b, None) for a, b in itertools.pairwise(stops)]


class GraphDense(Dense):
    """Interpolates the steps that are still on the graph."""

    def __init__(
        self,
        problem: Problem,
        stepper: Stepper,
        capture: Capture,
        field: Field,
        steps: Sequence[Any],
    ) -> None:
        super().__init__(problem, [problem.times[0], *(as_float(step.t1) for step in steps)])
        self.stepper = stepper
        self.capture = capture
        self.field = field
        self.steps = steps

    def at(self, times: Tensor) -> Tensor:
        parts = []
        with self.capture.resumed(self.capture.tensors):
            for step, (first, stop, _) in zip(self.steps, self.bins(times), strict=True):
                if stop > first:
                    theta = (times[first:stop] - step.start.t) / (step.t1 - step.start.t)
                    parts.append(self.stepper.interpolate(self.field, step, theta))
        return torch.cat(parts)


class RecordedDense(Dense):
    """Evaluates the stages of the steps asked for again, and attaches the outputs like a solve."""

    def __init__(
        self,
        problem: Problem,
        tape: Tape,
        records: Sequence[Record],
        step_times: Tensor,
        wants_grad: bool,
    ) -> None:
        super().__init__(problem, tape.nodes)
        self.tape = tape
        self.end = tape.end
        self.records = records
        self.step_times = step_times
        self.wants_grad = wants_grad

    def at(self, times: Tensor) -> Tensor:
        # The initial state comes first, as in every solve.
        outputs = [Outputs(a + 1, b + 1, None) for a, b, _ in self.bins(times)]
        times = torch.cat([self.step_times[:1], times])
        y = self._values(outputs, times.detach())
        asked = torch.is_grad_enabled() or forward_ad._current_level >= 0
        if asked and (self.wants_grad or varies(times)):
            y = attach(self._tape(outputs), y, self.problem.y0, self.step_times, times)
        return y[1:]

    def _values(self, outputs: Sequence[Outputs], times: Tensor) -> Tensor:
        capture, stepper = self.tape.capture, self.tape.stepper
        aliases = detached(capture.tensors)
        y0 = self.problem.y0.detach()
        parts = [y0.unsqueeze(0)]
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            capture.resumed(aliases),
            self.tape.autocast.restored(),
        ):
            field = DetachedField(self.tape.func, y0, aliases, None)
            field.leafy = self.tape.leafy
            for n, (first, stop, _) in enumerate(outputs):
                if stop == first:
                    continue
                t, t1 = self.tape.nodes[n : n + 2]
                nodes = self.tape.setting.starting(t), self.tape.setting.ending(t1)
                saved = self.records[n].saved
                step = stepper.load(field, *nodes, saved, self._end(n), dense=True)
                theta = (times[first:stop] - t) / (t1 - t)
                parts.append(stepper.interpolate(field, step, theta))
        return torch.cat(parts)

    def _end(self, n: int) -> Any:
        t1 = self.tape.setting.ending(self.tape.nodes[n + 1])
        if n + 1 == len(self.records):
            return self.tape.stepper.resume(t1, self.end, self.tape.end_token)
        tensors, tokens, _ = self.records[n].end or self.records[n + 1].saved
        return self.tape.stepper.resume(t1, tensors, tokens[0] if tokens else None)

    def _tape(self, outputs: Sequence[Outputs]) -> Tape:
        strategy = Symplectic() if self.tape.strategy.exact else self.tape.strategy
        return replace(
            self.tape,
            strategy=strategy,
            aliases=(),
            outputs=outputs,
            records=[replace(record) for record in self.records],
            end=self.end,
            stats=Stats(),
        )
