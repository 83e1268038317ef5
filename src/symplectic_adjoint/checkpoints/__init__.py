"""Which steps of a solve are kept, and where: schedules of actions, and stores."""

from __future__ import annotations

from symplectic_adjoint.checkpoints.disk import Disk
from symplectic_adjoint.checkpoints.folder import JobFolder
from symplectic_adjoint.checkpoints.stores import Device, Host, Place, Rounded, Store

__all__ = ["Device", "Disk", "Host", "JobFolder", "Place", "Rounded", "Store"]
