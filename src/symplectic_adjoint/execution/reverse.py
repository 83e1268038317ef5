"""The reverse sweep over a record of steps, as one compiled graph with a loop inside."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint.execution.forward import Method, Records
from symplectic_adjoint.execution.trace import (
    Compiled,
    Input,
    TracedField,
    at,
    behind,
    compiled_loop,
    put,
)
from symplectic_adjoint.field import Stage
from symplectic_adjoint.steppers._base import DenseMoments, Reversal


@dataclass
class Cotangents:
    """Cotangents of the outputs of a record of steps.

    Attributes:
        hits: Those of the solution at the end of each step (C, ...), where there are any.
        moments: For each step, those of the outputs within it (C, degree + 1, ...), where there
            are any; see ``DenseMoments``.
        nodes: What each step's outputs put on the node at its start, by the step before (C, ...).
    """

    hits: list[Tensor]
    moments: list[Tensor]
    nodes: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.hits, *self.moments, *self.nodes]


class Stepwise:
    """A round transposes one step, and pulls back the stage at its start.

    There the step meets what the one before has put on its node; so there is one product a stage,
    and none more.
    """

    rounds, states, rows = 1, 1, 0
    tables: Sequence[Tensor] = ()

    def __init__(self, method: Method) -> None:
        self.method = method

    def pull(
        self,
        field: TracedField,
        carried: Sequence[Tensor],
        records: Records,
        cotangents: Cotangents,
        tables: Sequence[Tensor],
        work: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        after, lam = carried
        n = after - 1
        step = self.method.read(field, records, n, (at(records.t, n), at(records.t, after)))
        lam = sum((at(g, n) for g in cotangents.hits), start=lam)
        dense = [DenseMoments(at(x, n)) for x in cotangents.moments]
        mu = [at(x, n) for x in cotangents.nodes]
        whole: Any = field  # it pulls back, and Reversal asks for no more
        lam = self.method.stepper.transpose_alone(
            Reversal(whole), 0, step, lam, dense[0] if dense else None, mu[0] if mu else None
        )
        return [lam]


class Stagewise:
    """A round pulls back one stage, so that the graph is short and holds one evaluation.

    The recursion of ``steppers.explicit_rk`` with the weights read from tables: what is carried is
    ``lam`` and the sum of it and of the ``v_i`` so far, which is the next ``lam`` after stage 0.
    """

    states = 2

    def __init__(self, method: Method, like: Tensor) -> None:
        stepper = method.stepper
        self.rounds = self.rows = stages = stepper.node
        weights = torch.zeros(stages + 1, stages, dtype=torch.float64)
        for row in range(1, stages + 1):
            for weight, i in stepper.rows[row]:
                weights[row, i] = weight
        c = torch.tensor(stepper.c[:stages], dtype=torch.float64)
        dense = torch.tensor(stepper.dense.centred[:stages], dtype=torch.float64)
        self.tables = [
            weights.T.contiguous().to(like),
            c.to(like.device),
            *([dense.to(like)] if method.dense else []),
        ]

    def pull(
        self,
        field: TracedField,
        carried: Sequence[Tensor],
        records: Records,
        cotangents: Cotangents,
        tables: Sequence[Tensor],
        work: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        after, lam, total = carried
        (v,), (weights, c, *dense) = work, tables
        n, i = (after - 1) // self.rounds, (after - 1) % self.rounds
        start, last = i == 0, i == self.rounds - 1
        for g in cotangents.hits:
            total = total + torch.where(last, at(g, n), 0)
        lam = torch.where(last, total, lam)
        row, h = at(weights, i), at(records.t, n + 1) - at(records.t, n)
        kappa = torch.tensordot(row[:-1], v, dims=1) + row[-1] * lam
        for moments, shares in zip(cotangents.moments, dense, strict=True):
            kappa = kappa + torch.tensordot(at(shares, i), at(moments, n), dims=1)
            total = total + torch.where(start, at(moments, n)[0], 0)
        kappa = h.to(kappa) * kappa
        for mu in cotangents.nodes:
            kappa = kappa + torch.where(start, at(mu, n), 0)
        pulled = field.pull(self._stage(records, n, i, at(c, i) * h), kappa)
        put(v, i, pulled.v)
        return [lam.clone(), total + pulled.v]

    def _stage(self, records: Records, n: Tensor, i: Tensor, ahead: Tensor) -> Stage:
        x = at(records.y, n)
        for points in records.kept:
            inner = n * (self.rounds - 1) + torch.clamp(i - 1, min=0)
            x = torch.where(i == 0, x, at(points.flatten(0, 1), inner))
        return Stage(at(records.t, n) + ahead, x)


@dataclass
class Reverse:
    """A compiled reverse sweep over a record of steps.

    Attributes:
        compiled: The loop.
        body: A round of it.
    """

    compiled: Compiled
    body: Stepwise | Stagewise

    def run(
        self,
        steps: int,
        lam: Tensor,
        records: Records,
        cotangents: Cotangents,
        tensors: Sequence[Tensor],
        sums: Sequence[Tensor],
    ) -> Tensor:
        """The cotangent of the first state.

        Args:
            steps: How many steps there are.
            lam: The cotangent of the last state.
            records: The steps.
            cotangents: Those of their outputs.
            tensors: What ``func`` depends on.
            sums: To which the gradients of the tensors that need one are added.
        """
        body = self.body
        after = torch.full((), steps * body.rounds, dtype=torch.int64, device=lam.device)
        work = [lam.new_zeros((body.rows, *lam.shape))] if body.rows else []
        constants = (*records.tensors, *cotangents.tensors, *body.tables, *tensors)
        _, *lams = self.compiled.call(after, *[lam] * body.states, *constants, *work, *sums)
        return lams[-1]


def reverse_loop(
    method: Method,
    y0: Tensor,
    tensors: Sequence[Tensor],
    records: Records,
    cotangents: Cotangents,
) -> Reverse:
    """Compile ``(rounds, *lams, *constants, *written) -> (0, *lams)``; see ``Reverse``."""
    state = method.traced.graph.state_dims
    after, further = behind(state, 1), behind(state, 2)
    pairs = list(zip(method.traced.inputs(tensors), method.traced.wanted, strict=True))
    body = Stagewise(method, y0) if method.stagewise else Stepwise(method)
    parts = (records.tensors, cotangents.hits, cotangents.moments, cotangents.nodes, body.tables)
    bounds = [0, *itertools.accumulate(map(len, parts))]
    work = [Input(y0.new_empty((body.rows, *y0.shape)), after)] if body.rows else []

    def transpose(
        carried: Sequence[Tensor], constants: Sequence[Tensor], written: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], TracedField]:
        kept, *others, tables = (constants[a:b] for a, b in itertools.pairwise(bounds))
        field = TracedField(method.traced, carried[1], constants[bounds[-1] :], method.linear)
        held = Records.of(kept), Cotangents(*map(list, others))
        lams = body.pull(field, carried, *held, tables, written[: len(work)])
        for total, part in zip(written[len(work) :], field.parts, strict=True):
            if part is not None:
                total.add_(part)
        return [carried[0] - 1, *lams], field

    rounds = Input(torch.empty((), dtype=torch.int64, device=y0.device))
    compiled = compiled_loop(
        lambda carried, constants: carried[0] > 0,
        transpose,
        [rounds, *[Input(y0, state)] * body.states],
        [
            *method.inputs(records),
            *(Input(x, after) for x in cotangents.hits),
            *(Input(x, further) for x in cotangents.moments),
            *(Input(x, after) for x in cotangents.nodes),
            *map(Input, body.tables),
            *(x for x, _ in pairs),
        ],
        [*work, *(x for x, want in pairs if want)],
    )
    return Reverse(compiled, body)
