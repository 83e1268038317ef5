"""Imports of optional dependencies that name the command to install what is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from symplectic_adjoint._errors import SymplecticAdjointError


class MissingExtraError(SymplecticAdjointError, ImportError):
    """An optional dependency is needed and not installed."""


def require(module: str, extra: str = "cli") -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: Dotted name of the module.
        extra: The extra of this distribution that installs it.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The module is not installed; the message holds the command that installs
            it.

    Example:
        >>> require("json").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # the module is there, and what it needs is not: its own message says more
        raise MissingExtraError(
            f"{top!r} is needed here and is not installed; "
            f"run: pip install 'symplectic-adjoint[{extra}]'"
        ) from error
