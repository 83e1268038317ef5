"""diffrax: recursive checkpointing of its own solver, and the continuous adjoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.peers.jax_base import Array, Func, JaxPeer, Params, Solved, size_of_steps
from benchmarks.problems import Instance, Problem
from symplectic_adjoint import tableaus

_ADJOINTS = {"recursive": "RecursiveCheckpointAdjoint", "backsolve": "BacksolveAdjoint"}


class Diffrax(JaxPeer):
    """``diffeqsolve`` with its own step control at the tolerances given, or with constant steps."""

    package = "diffrax"

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self.name = f"diffrax/{strategy}"
        self.doubled = strategy == "recursive"  # the other one has no steps to be exact on

    def remark(self, problem: Problem) -> str | None:
        if problem.method == "rk4":
            return "its solver class with the tableau of our rk4, which it does not have"
        return None

    def solve(self, instance: Instance, func: Func, params: Params, y0: Array, room: int) -> Solved:
        import diffrax
        import jax.numpy as jnp

        problem = instance.problem
        size, number = size_of_steps(problem), y0.dtype.type
        control = (
            diffrax.PIDController(rtol=problem.rtol, atol=problem.atol)
            if size is None
            else diffrax.ConstantStepSize()
        )
        told = instance.field.counting and self.strategy != "backsolve"
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: func(p, y)),
            _solver(problem.method),
            t0=number(0.0),
            t1=number(problem.t1),
            dt0=None if size is None else number(size),
            y0=y0,
            args=params,
            saveat=_saved(instance, told),
            stepsize_controller=control,
            adjoint=getattr(diffrax, _ADJOINTS[self.strategy])(),
            max_steps=room,
            throw=False,
        )
        ends = solution.ts[1] if told else jnp.zeros(0)
        return Solved(
            solution.ys[0] if told else solution.ys,
            solution.stats["num_accepted_steps"],
            ends,
            solution.result == diffrax.RESULTS.max_steps_reached,
        )


def _saved(instance: Instance, steps: bool) -> Any:
    """The states at the output times and, if asked for, the times of all steps."""
    import diffrax
    import jax.numpy as jnp

    wanted: dict[str, Any] = (
        {"ts": jnp.asarray(instance.times[1:].numpy())}
        if instance.problem.outputs > 1
        else {"t1": True}
    )
    if not steps:
        return diffrax.SaveAt(**wanted)
    ends = diffrax.SubSaveAt(steps=True, fn=lambda t, y, args: t)
    return diffrax.SaveAt(subs=[diffrax.SubSaveAt(**wanted), ends])


def _solver(method: str) -> Any:
    import diffrax

    solvers = {"dopri5": diffrax.Dopri5, "dopri8": diffrax.Dopri8}
    return solvers[method]() if method in solvers else _with_tableau(method)


def _with_tableau(method: str) -> Any:
    """A solver of diffrax with one of our tableaus, whose steps have no error estimate."""
    import diffrax

    found = tableaus.get(method)

    class Solver(diffrax.AbstractERK):
        tableau = diffrax.ButcherTableau(
            c=np.array(found.c[1:]),
            b_sol=np.array(found.b),
            b_error=np.zeros(found.stages),
            a_lower=tuple(np.array(row) for row in found.a[1:]),
        )
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms: Any) -> int:
            return found.order

    return Solver()


PEERS = tuple(Diffrax(strategy) for strategy in _ADJOINTS)
