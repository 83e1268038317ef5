"""Roots under autograd, by the implicit function theorem.

The iteration that found a root of ``F(u, theta) = 0`` leaves no graph. With ``M = dF/du`` at the
root, ``du = -M^{-1} dF``: ``u`` is the value found minus ``M^{-1} F``, with ``M`` a constant and
``F`` on the graph. One such correction gives first derivatives, two give second ones and so on
(each agrees with the root to one order more); a derivative beyond that raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._errors import NonlinearSolveError, SecondDerivativeError
from symplectic_adjoint.rootfind import NoConvergence, StageSystem


class _Correction(torch.autograd.Function):
    """``M^{-1} r`` for a residual that is zero up to rounding: its derivatives alone count."""

    @staticmethod
    def forward(residual: Tensor, system: StageSystem, order: int) -> Tensor:
        return torch.zeros_like(residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        residual, ctx.system, ctx.order = inputs
        ctx.save_for_backward(residual)
        ctx.save_for_forward(residual)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return inverse(ctx.system, g, transposed=True), None, None
        (residual,) = ctx.saved_tensors
        return _solved(g, residual, ctx.system, True, ctx.order - 1), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (residual,) = ctx.saved_tensors
        return _solved(tangent, residual, ctx.system, False, ctx.order - 1)


class _Solved(torch.autograd.Function):
    """``M^{-1} r`` or ``M^{-T} r`` with a constant ``M``, right to ``order`` further derivatives.

    The result is on the graph of ``anchor``, so that a derivative too many is noticed even where
    ``r`` is a constant.
    """

    @staticmethod
    def forward(
        r: Tensor, anchor: Tensor, system: StageSystem, transposed: bool, order: int
    ) -> Tensor:
        return inverse(system, r, transposed=transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        r, anchor, ctx.system, ctx.transposed, ctx.order = inputs
        ctx.save_for_backward(r, anchor)
        ctx.save_for_forward(r, anchor)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _Solved.further(ctx, g, not ctx.transposed), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor:
        zero = torch.zeros_like(ctx.saved_tensors[0])
        return _Solved.further(ctx, zero if tangent is None else tangent, ctx.transposed)

    @staticmethod
    def further(ctx: Any, r: Tensor, transposed: bool) -> Tensor:
        """The derivative of one order more."""
        if ctx.order == 0:
            raise SecondDerivativeError(
                "a derivative of too high an order was asked of the root of an implicit equation: "
                "a steady state has as many as steady_state(order=...) says; the stages of an "
                "implicit method have first ones under backprop, second and third ones under all "
                "other strategies, and higher ones are there with explicit methods"
            )
        return _solved(r, ctx.saved_tensors[1], ctx.system, transposed, ctx.order - 1)


correction: Callable[..., Tensor] = _Correction.apply
"""``(residual, system, order) -> M^{-1} residual``, right to ``order`` derivatives."""

_solved: Callable[..., Tensor] = _Solved.apply


def inverse(system: StageSystem, rhs: Tensor, *, transposed: bool) -> Tensor:
    """``M^{-1} rhs``, or ``M^{-T} rhs``.

    Raises:
        NonlinearSolveError: It was not found.
    """
    solve = system.solve_transposed if transposed else system.solve
    try:
        return solve(rhs.detach())
    except NoConvergence as error:
        raise NonlinearSolveError(
            f"the {'transposed ' if transposed else ''}linear system of an implicit equation was "
            f"not solved: GMRES stalled at {error.size:.3g} times its rounding. Raise "
            "Newton(krylov=...), or let the Jacobian be dense with Newton(dense_below=...)."
        ) from None
