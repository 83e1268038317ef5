"""What makes a solve that one and no other, in words and checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from symplectic_adjoint.checkpoints.disk import views
from symplectic_adjoint.checkpoints.folder import on_host

if TYPE_CHECKING:
    from symplectic_adjoint.gradients._job import Job

_SHORT = 60


def identity(job: Job, slope: Tensor, accumulate: str) -> dict[str, str]:
    """What a solve and its gradient depend on to the last bit, by name.

    How much of the solve is kept, and where, is not among it: that may change.

    Args:
        job: The solve.
        slope: ``f`` at the initial state, which tells apart what no walk through objects sees.
        accumulate: How gradients of parameters are summed.
    """
    problem, y0 = job.problem, job.problem.y0
    device = y0.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    names = [name or "tensor of func" for name in job.capture.names]
    named = [
        (name if names.count(name) == 1 else f"{name} {i}", x)
        for i, (name, x) in enumerate(zip(names, job.capture.tensors, strict=True))
    ]
    return {
        "symplectic-adjoint": version("symplectic-adjoint"),
        "torch": torch.__version__,
        "device": str(y0.device),
        "autocast": str(autocast),
        "method": described(job.stepper),
        "controller": described(job.controller),
        "rtol": described(job.rtol),
        "atol": described(job.atol),
        "accumulate": accumulate,
        "y0": f"{problem.spec.names} {described(y0)}",
        "t": described(problem.times),
        "grid": described(() if job.grid is None else job.grid.tolist()),
        "jumps": described(job.jumps.tolist()),
        **{name: described(x) for name, x in named},
        "constants and buffers of func": described(job.capture.found),
        "func(t[0], y0)": described(slope),
    }


def described(x: Any) -> str:
    """A value in words, or in a checksum of them where they are many.

    Example:
        >>> described((0.5, "rk4")), described(torch.zeros(2))
        ("(0.5, 'rk4')", 'float32(2,) a0bc201966ef19bd')
    """
    if isinstance(x, Tensor):
        return _tensor(x)
    text = "".join(_words(x, frozenset()))
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}... {_digest([text.encode()])}"


def _words(x: Any, outer: frozenset[int]) -> Iterable[str]:
    """The words of a value; of an object, its public attributes."""
    if isinstance(x, Tensor):
        yield _tensor(x)
    elif isinstance(x, types.FunctionType | types.MethodType):
        yield f"{x.__module__}.{x.__qualname__} {_digest(_code(x.__code__))}"
    elif isinstance(x, Mapping):
        yield from _listed("{}", ((f"{key}: ", value) for key, value in x.items()), outer)
    elif isinstance(x, Sequence | set | frozenset) and not isinstance(x, str | bytes | range):
        items = sorted(x, key=repr) if isinstance(x, set | frozenset) else x
        yield from _listed("()", (("", value) for value in items), outer)
    elif (names := _attributes(x)) and id(x) not in outer:
        yield type(x).__name__
        yield from _listed("()", ((f"{k}=", getattr(x, k)) for k in names), outer | {id(x)})
    else:
        yield type(x).__name__ if id(x) in outer else re.sub(" at 0x[0-9a-f]+", "", repr(x))


def _attributes(x: Any) -> list[str]:
    """The public attributes of an object that says nothing better of itself."""
    if isinstance(x, type):
        return []
    fields = dataclasses.fields(x) if dataclasses.is_dataclass(x) else ()
    names = [f.name for f in fields] or [*getattr(x, "__dict__", {})]
    return [name for name in names if not name.startswith("_")]


def _listed(
    brackets: str, items: Iterable[tuple[str, Any]], outer: frozenset[int]
) -> Iterable[str]:
    yield brackets[0]
    for i, (name, value) in enumerate(items):
        yield f"{', ' if i else ''}{name}"
        yield from _words(value, outer)
    yield brackets[1]


def _code(code: types.CodeType) -> Iterable[bytes]:
    yield code.co_code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:
            yield repr(constant).encode()


def checksum(x: Tensor) -> str:
    """A checksum of a tensor's dtype, shape and bytes."""
    text = f"{x.dtype} {tuple(x.shape)}".encode()
    return _digest([text, *views(on_host(x))])


def _tensor(x: Tensor) -> str:
    name = f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}"
    if x.layout != torch.strided or x.is_quantized or x.device.type == "meta":
        return name  # whose bytes are not one piece
    return f"{name} {checksum(x)}"


def _digest(chunks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
