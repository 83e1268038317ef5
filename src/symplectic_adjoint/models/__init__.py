"""Models that are trained through a differential equation."""

from symplectic_adjoint.models.blocks import (
    Concat,
    ConcatSquash,
    ConcatSquashConv2d,
    TimeConvNet,
    TimeMLP,
)
from symplectic_adjoint.models.cnf import CNF, ContinuousFlow, Flow, Layout, SolverOptions
from symplectic_adjoint.models.distribution import FlowDistribution
from symplectic_adjoint.models.hamiltonian import Hamiltonian, SeparableHamiltonian, mlp
from symplectic_adjoint.models.image_cnf import ImageCNF, bits_per_pixel
from symplectic_adjoint.models.neural_ode import Autonomous, NeuralODE
from symplectic_adjoint.models.pde import ConvEnergy, EnergyPDE

__all__ = [
    "CNF",
    "Autonomous",
    "Concat",
    "ConcatSquash",
    "ConcatSquashConv2d",
    "ContinuousFlow",
    "ConvEnergy",
    "EnergyPDE",
    "Flow",
    "FlowDistribution",
    "Hamiltonian",
    "ImageCNF",
    "Layout",
    "NeuralODE",
    "SeparableHamiltonian",
    "SolverOptions",
    "TimeConvNet",
    "TimeMLP",
    "bits_per_pixel",
    "mlp",
]
