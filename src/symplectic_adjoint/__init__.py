"""Differentiable ODE solvers for PyTorch with the exact gradient of the computed solution.

Example:
    >>> import torch
    >>> import symplectic_adjoint as sa
    >>> net = torch.nn.Linear(2, 2)
    >>> y = sa.odeint(lambda t, y: net(y), torch.randn(5, 2), torch.linspace(0.0, 1.0, 3))
    >>> y.square().sum().backward()
    >>> net.weight.grad.shape
    torch.Size([2, 2])
"""

from symplectic_adjoint._errors import (
    ArgumentError,
    CaptureError,
    ChangedTensorError,
    CompilationError,
    ConvergenceWarning,
    EventGradientError,
    EventNotFoundError,
    EventOutputError,
    ExecutionWarning,
    FieldOutputError,
    JobFolderError,
    MemoryBudgetError,
    NonFiniteError,
    NonlinearSolveError,
    NotSeparableError,
    OtherJobError,
    SecondDerivativeError,
    SolveError,
    Status,
    SteadyStateError,
    StepLimitError,
    StepUnderflowError,
    StoreError,
    SymplecticAdjointError,
    TableauError,
    UnderResolvedWarning,
    UnknownNameError,
)
from symplectic_adjoint.api import solve
from symplectic_adjoint.checkpoints import Device, Disk, Host, JobFolder, Rounded
from symplectic_adjoint.compat.torchdiffeq import (
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
)
from symplectic_adjoint.controllers import Adaptive, FixedGrid, SensitivityControl
from symplectic_adjoint.diagnostics import GradientCheck, check_gradient, peak_memory
from symplectic_adjoint.events import Crossing, Event
from symplectic_adjoint.gradients import (
    ACA,
    MALI,
    Backprop,
    Checkpoint,
    Continuous,
    Forward,
    Symplectic,
)
from symplectic_adjoint.interpolation import Interpolation, fill_missing
from symplectic_adjoint.loop import Stats
from symplectic_adjoint.models import Autonomous, NeuralODE
from symplectic_adjoint.planning import MemoryPlan, MemorySetting, plan_memory
from symplectic_adjoint.rootfind import Newton
from symplectic_adjoint.solution import Solution
from symplectic_adjoint.splitting import Splitting
from symplectic_adjoint.steady import steady_state
from symplectic_adjoint.steppers import (
    ALF,
    ExplicitAdams,
    ExplicitRK,
    ImplicitAdams,
    ImplicitRK,
    Partitioned,
    ScipySolver,
)
from symplectic_adjoint.threads import single_thread_below

__all__ = [
    "ACA",
    "ALF",
    "MALI",
    "Adaptive",
    "ArgumentError",
    "Autonomous",
    "Backprop",
    "CaptureError",
    "ChangedTensorError",
    "Checkpoint",
    "CompilationError",
    "Continuous",
    "ConvergenceWarning",
    "Crossing",
    "Device",
    "Disk",
    "Event",
    "EventGradientError",
    "EventNotFoundError",
    "EventOutputError",
    "ExecutionWarning",
    "ExplicitAdams",
    "ExplicitRK",
    "FieldOutputError",
    "FixedGrid",
    "Forward",
    "GradientCheck",
    "Host",
    "ImplicitAdams",
    "ImplicitRK",
    "Interpolation",
    "JobFolder",
    "JobFolderError",
    "MemoryBudgetError",
    "MemoryPlan",
    "MemorySetting",
    "NeuralODE",
    "Newton",
    "NonFiniteError",
    "NonlinearSolveError",
    "NotSeparableError",
    "OtherJobError",
    "Partitioned",
    "Rounded",
    "ScipySolver",
    "SecondDerivativeError",
    "SensitivityControl",
    "Solution",
    "SolveError",
    "Splitting",
    "Stats",
    "Status",
    "SteadyStateError",
    "StepLimitError",
    "StepUnderflowError",
    "StoreError",
    "Symplectic",
    "SymplecticAdjointError",
    "TableauError",
    "UnderResolvedWarning",
    "UnknownNameError",
    "check_gradient",
    "fill_missing",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "peak_memory",
    "plan_memory",
    "single_thread_below",
    "solve",
    "steady_state",
]
