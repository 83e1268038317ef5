"""Models that are trained through a differential equation."""

from symplectic_adjoint.models.blocks import Concat, ConcatSquash, TimeMLP
from symplectic_adjoint.models.cnf import CNF, Flow, SolverOptions

__all__ = ["CNF", "Concat", "ConcatSquash", "Flow", "SolverOptions", "TimeMLP"]
