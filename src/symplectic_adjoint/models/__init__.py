"""Models that are trained through a differential equation."""

from symplectic_adjoint.models.blocks import Concat, ConcatSquash, TimeMLP
from symplectic_adjoint.models.cnf import CNF, Flow, SolverOptions
from symplectic_adjoint.models.neural_ode import Autonomous, NeuralODE

__all__ = [
    "CNF",
    "Autonomous",
    "Concat",
    "ConcatSquash",
    "Flow",
    "NeuralODE",
    "SolverOptions",
    "TimeMLP",
]
