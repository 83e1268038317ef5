"""What ``torch.compile`` shall leave alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let the compiler break its graph at a function, and run it and all it calls as they are.

    A compiled module that is called inside runs compiled. This is ``torch.compiler.disable``, which
    would load the compiler, a second or two, for everyone who never compiles anything.

    Example:
        >>> uncompiled(len)([1, 2, 3])
        3
    """
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # then nobody is compiling
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    mark: Any = called
    mark._torchdynamo_disable = True  # do not trace into it
    return called
