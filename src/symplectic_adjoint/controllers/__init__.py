"""Where steps end: on a fixed grid, or where the error estimate says."""

from symplectic_adjoint.controllers._base import Controller, Pace, Setting, no_times, number
from symplectic_adjoint.controllers.adaptive import Adaptive, AdaptivePace, LargestPart
from symplectic_adjoint.controllers.fixed import FixedGrid, GridPace
from symplectic_adjoint.controllers.sensitivities import SensitivityControl

__all__ = [
    "Adaptive",
    "AdaptivePace",
    "Controller",
    "FixedGrid",
    "GridPace",
    "LargestPart",
    "Pace",
    "SensitivityControl",
    "Setting",
    "no_times",
    "number",
]
