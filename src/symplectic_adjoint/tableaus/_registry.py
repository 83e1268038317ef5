"""Methods by name, built and validated when first asked for."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

from . import methods
from ._tableau import Tableau

__all__ = ["UnknownTableauError", "get", "names"]


class UnknownTableauError(KeyError):
    """No tableau has this name."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which is meant for keys, not for sentences.
        return str(self.args[0])


@cache
def get(name: str) -> Tableau:
    """The tableau called ``name``, the same object at every call.

    Args:
        name: One of :func:`names`.

    Returns:
        The validated tableau.

    Raises:
        UnknownTableauError: There is no such method; the message names the nearest one.

    Example:
        >>> get("dopri5").order
        5
    """
    build = _builders().get(name)
    if build is None:
        raise UnknownTableauError(_unknown(name))
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


def _unknown(name: str) -> str:
    nearest = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)
    return (
        f"unknown Runge-Kutta method {name!r}: did you mean {nearest[0]!r}? "
        f"The methods are {', '.join(names())}"
    )
