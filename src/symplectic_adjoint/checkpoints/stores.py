"""Stores: where checkpoints lie.

A ``Place`` is what a user names: a frozen value. It opens a ``Store`` for each solve, which owns
what is put into it and forgets it when it is closed or no longer referred to.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, StoreError
from symplectic_adjoint.checkpoints.rows import Kind, Rows


class Store(Protocol):
    """Holds lists of tensors by number. Nobody changes them in place."""

    def put(self, key: int, tensors: Sequence[Tensor]) -> None:
        """Hold tensors; copying them elsewhere may go on after the call has returned.

        Raises:
            StoreError: These or earlier ones cannot be held where they should; all are still there.
        """
        ...

    def get(self, key: int) -> list[Tensor]:
        """What was put there, on its own device; it stays there."""
        ...

    def drop(self, key: int) -> None:
        """Forget it."""
        ...

    def close(self) -> None:
        """Forget everything and give back what holds it."""
        ...


class Place(Protocol):
    """Where a store is opened.

    Attributes:
        exact: Whether what comes out is what was put in, to the last bit.
        ahead: How many steps may be in the solve's own memory on their way to the store or back.
    """

    @property
    def exact(self) -> bool: ...
    @property
    def ahead(self) -> int: ...

    def open(self) -> Store:
        """An empty store.

        Raises:
            StoreError: There cannot be one.
        """
        ...


@dataclass(frozen=True)
class Device:
    """The memory in which the solve itself works."""

    exact: ClassVar[bool] = True
    ahead: ClassVar[int] = 0

    def open(self) -> Store:
        return _DeviceStore()


class _Copies(NamedTuple):
    """Where copies of tensors lie."""

    rows: Rows
    numbers: array[int]


class _DeviceStore:
    """Tensors as they are, or copied into rows where these keep the process small."""

    def __init__(self) -> None:
        self.held: dict[int, Sequence[Tensor] | _Copies] = {}
        self.rows: dict[Kind, Rows] = {}

    def put(self, key: int, tensors: Sequence[Tensor]) -> None:
        if (kind := Kind.of(tensors)) is None:
            self.held[key] = tensors
            return
        if kind not in self.rows:
            self.rows[kind] = Rows(kind)
        rows = self.rows[kind]
        self.held[key] = _Copies(rows, array("q", [rows.put(key, x) for x in tensors]))

    def get(self, key: int) -> list[Tensor]:
        held = self.held[key]
        if isinstance(held, _Copies):
            return [held.rows.get(row) for row in held.numbers]
        return list(held)

    def drop(self, key: int) -> None:
        held = self.held[key]
        while isinstance(held, _Copies) and held.numbers:
            for owner, row, new in held.rows.drop(held.numbers.pop()):
                numbers = self.held[owner].numbers  # type: ignore[union-attr]
                numbers[numbers.index(row)] = new
        del self.held[key]

    def close(self) -> None:
        self.held.clear()
        self.rows.clear()


@dataclass(frozen=True)
class Host:
    """The host's memory; for a solve on the CPU, that in which it works.

    From a CUDA device tensors are copied into pinned memory on a stream of their own, beside the
    computation, and back when they are needed.

    Example:
        >>> store = Host().open()
        >>> store.put(0, [torch.ones(2)])
        >>> store.get(0)
        [tensor([1., 1.])]
    """

    exact: ClassVar[bool] = True
    ahead: ClassVar[int] = 1

    def open(self) -> Store:
        return _HostStore()


class _HostStore:
    def __init__(self) -> None:
        self.held: dict[int, list[Parcel]] = {}

    def put(self, key: int, tensors: Sequence[Tensor]) -> None:
        self.held[key] = [Parcel.sent(x) for x in tensors]

    def get(self, key: int) -> list[Tensor]:
        return [parcel.returned() for parcel in self.held[key]]

    def drop(self, key: int) -> None:
        del self.held[key]

    def close(self) -> None:
        self.held.clear()


class Parcel(NamedTuple):
    """A tensor on the host, and what its way there and back needs.

    Attributes:
        host: The tensor in pinned memory, or itself if it was on the host already.
        device: Where it came from.
        arrived: Recorded behind the copy; None where there was none.
    """

    host: Tensor
    device: torch.device
    arrived: torch.cuda.Event | None = None

    @staticmethod
    def sent(x: Tensor) -> Parcel:
        """Send a tensor to the host; the copy runs beside what the device computes next."""
        x = x.detach().resolve_conj().resolve_neg().contiguous()
        if x.device.type != "cuda":
            return Parcel(x, x.device)
        stream = _side_stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            host.copy_(x, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        x.record_stream(stream)
        return Parcel(host, x.device, arrived)

    def landed(self) -> Tensor:
        """The tensor on the host once its copy is complete; for a thread that reads it there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host

    def returned(self) -> Tensor:
        """The tensor on its device, for what the device computes next."""
        if self.device.type != "cuda":
            return self.host
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        return self.host.to(self.device, non_blocking=True)


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


@dataclass(frozen=True)
class Rounded:
    """Another place, in which tensors are held with fewer bits.

    What comes out differs from what was put in by a relative error of up to 2^-8 in bfloat16 and
    2^-11 in float16, and the gradient from the exact one by an error of that order:
    ``check_gradient`` measures it.

    Attributes:
        dtype: ``torch.bfloat16``, or ``torch.float16`` for numbers up to 65504.
        place: Where the rounded tensors lie.

    Raises:
        ArgumentError: ``dtype`` is neither.

    Example:
        >>> store = Rounded(torch.bfloat16).open()
        >>> store.put(0, [torch.tensor([1.001])])
        >>> store.get(0)
        [tensor([1.])]
    """

    dtype: torch.dtype = torch.bfloat16
    place: Place = field(default_factory=Device)
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ArgumentError(
                f"Rounded holds tensors in torch.bfloat16 or torch.float16, not in {self.dtype}"
            )

    @property
    def ahead(self) -> int:
        return self.place.ahead + 1

    def open(self) -> Store:
        return _RoundedStore(self.dtype, self.place.open())


class _RoundedStore:
    def __init__(self, dtype: torch.dtype, store: Store) -> None:
        self.dtype = dtype
        self.store = store
        self.dtypes: dict[int, list[torch.dtype]] = {}

    def put(self, key: int, tensors: Sequence[Tensor]) -> None:
        self.store.put(key, [self._rounded(x) for x in tensors])
        self.dtypes[key] = [x.dtype for x in tensors]

    def get(self, key: int) -> list[Tensor]:
        pairs = zip(self.store.get(key), self.dtypes[key], strict=True)
        return [
            torch.view_as_complex(x.to(dtype.to_real())) if dtype.is_complex else x.to(dtype)
            for x, dtype in pairs
        ]

    def drop(self, key: int) -> None:
        self.store.drop(key)
        del self.dtypes[key]

    def close(self) -> None:
        self.store.close()
        self.dtypes.clear()

    def _rounded(self, x: Tensor) -> Tensor:
        x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        rounded = x.to(self.dtype)
        if self.dtype == torch.float16 and bool((rounded.isinf() & x.isfinite()).any()):
            raise StoreError(
                f"a state of size {float(x.abs().max()):.3g} is to be kept in float16, which ends "
                "at 65504; use Rounded(torch.bfloat16)"
            )
        return rounded
