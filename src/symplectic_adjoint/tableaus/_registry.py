"""Methods by name, built and validated when first asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

from symplectic_adjoint._errors import UnknownNameError
from symplectic_adjoint.tableaus import methods
from symplectic_adjoint.tableaus._tableau import Tableau

__all__ = ["get", "names"]


@cache
def get(name: str) -> Tableau:
    """The tableau called ``name``, the same object at every call.

    Args:
        name: One of :func:`names`.

    Returns:
        The validated tableau.

    Raises:
        UnknownNameError: There is no such method; the message names the nearest one.

    Example:
        >>> get("dopri5").order
        5
    """
    build = _builders().get(name)
    if build is None:
        raise UnknownNameError("method", name, names())
    return build()


def names() -> tuple[str, ...]:
    """The names of all tableaus, sorted.

    Example:
        >>> "dopri5" in names()
        True
    """
    return tuple(sorted(_builders()))


@cache
def _builders() -> dict[str, Callable[[], Tableau]]:
    """Every public function that a module in ``methods`` lists in its ``__all__``."""
    found: dict[str, Callable[[], Tableau]] = {}
    for module_info in pkgutil.iter_modules(methods.__path__, methods.__name__ + "."):
        module = importlib.import_module(module_info.name)
        found.update({name: getattr(module, name) for name in module.__all__})
    return found
