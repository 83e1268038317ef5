"""TorchDiffEqPack: the adaptive checkpoint adjoint (ACA) and MALI."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.base import Bound, Peer, attached, final_alone, second_order_remark
from benchmarks.problems import Instance, Problem, loosened


class TorchDiffEqPack(Peer):
    """``odesolve_adjoint`` (ACA) or ``odesolve_adjoint_sym12`` (MALI)."""

    package = "TorchDiffEqPack"
    reference_note = "its own solver under autograd in float64, which chooses its own steps"

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self.name = f"TorchDiffEqPack/{strategy}"

    def lacks(self, problem: Problem) -> str | None:
        if problem.method not in ("dopri5", "rk4"):
            return f"TorchDiffEqPack has no {problem.method}"
        return final_alone("TorchDiffEqPack", problem)

    def remark(self, problem: Problem) -> str | None:
        return second_order_remark(problem) if self.strategy == "mali" else _classic_remark(problem)

    def _method(self, problem: Problem) -> str:
        if self.strategy == "mali":
            return "sym12async" if problem.steps is None else "fixedstep_sym12async"
        return problem.method

    def _options(self, problem: Problem) -> dict[str, Any]:
        if self.strategy == "mali":
            problem = loosened(problem)
        # Times travel inside as float32 whatever the dtype of the state; a fresh dict because
        # solvers write to it.
        return {
            "method": self._method(problem),
            "h": None if problem.steps is None else problem.t1 / problem.steps,
            "t0": 0.0,
            "t1": problem.t1,
            "rtol": problem.rtol,
            "atol": problem.atol,
            "print_neval": False,
            "neval_max": 10**7,
            "interpolation_method": "cubic",
        }

    def bind(self, instance: Instance) -> Bound:
        from TorchDiffEqPack.odesolver_mem import odesolve_adjoint, odesolve_adjoint_sym12

        solve = odesolve_adjoint_sym12 if self.strategy == "mali" else odesolve_adjoint

        accepted: list[int] = []

        def forward() -> Tensor:
            final = _tensor(solve(instance.field, instance.y0, self._options(instance.problem)))
            node: Any = final.grad_fn  # keeps the steps for the way back
            accepted[:] = [len(node.steps)]
            return final

        return attached(instance, forward, steps=lambda: accepted[0] if accepted else None)

    def reference(self, instance: Instance, grid: Tensor | None) -> Bound:
        from TorchDiffEqPack.odesolver_mem import odesolve_endtime

        def forward() -> Tensor:
            return _tensor(
                odesolve_endtime(instance.field, instance.y0, self._options(instance.problem))
            )

        return attached(instance, forward)


def _tensor(final: Any) -> Tensor:
    first: Tensor = final if isinstance(final, Tensor) else final[0]
    return first


def _classic_remark(problem: Problem) -> str | None:
    return "its rk4 is the classic one" if problem.method == "rk4" else None


PEERS = (TorchDiffEqPack("aca"), TorchDiffEqPack("mali"))
