"""Butcher tableaus as data: frozen, self-validating, registered by name.

To add a method, write a function without arguments that returns its :class:`Tableau` in a module of
``symplectic_adjoint.tableaus.methods`` and list it in that module's ``__all__``.
"""

from __future__ import annotations

from symplectic_adjoint.tableaus._registry import get, names
from symplectic_adjoint.tableaus._tableau import Butcher, Tableau

__all__ = ["Butcher", "Tableau", "get", "names"]
