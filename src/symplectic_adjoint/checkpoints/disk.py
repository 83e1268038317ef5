"""A store in a file, written behind and read ahead by a thread of its own."""

from __future__ import annotations

import bisect
import ctypes
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, ClassVar, NamedTuple

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, StoreError
from symplectic_adjoint.checkpoints.stores import Parcel, Store


@dataclass(frozen=True)
class Disk:
    """A file in ``folder`` that nobody else can open.

    The file has no name (``O_TMPFILE``; where the system has none, the name is removed at once) and
    mode 0600. So nothing is left of it when the solve's gradient is no longer needed, on an
    exception, when the interpreter exits or when the process is killed: the system frees it with
    its last descriptor.

    A thread writes behind the solve and reads ahead of the backward pass, ``ahead`` steps at most,
    which are in memory meanwhile.

    Attributes:
        folder: An existing folder on a disk with enough room.
        ahead: How many steps may be on their way to or from the disk, at least 1.

    Raises:
        ArgumentError: ``ahead`` is less than 1.
        StoreError: When it is opened: the folder does not exist or is not writable. When it is
            written: the disk is full. What was kept before is still there.

    Example:
        >>> store = Disk("/tmp").open()
        >>> store.put(0, [torch.ones(2)])
        >>> store.get(0)
        [tensor([1., 1.])]
        >>> store.close()
    """

    folder: str | os.PathLike[str]
    ahead: int = 4
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ahead < 1:
            raise ArgumentError(f"ahead must be at least 1, not {self.ahead}")

    def open(self) -> Store:
        return DiskStore(os.fspath(self.folder), self.ahead)


class _Shape(NamedTuple):
    """What a tensor in the file is."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.size.numel() * self.dtype.itemsize


class _Extent(NamedTuple):
    """Where in the file the tensors of a key lie, in a row."""

    offset: int
    shapes: list[_Shape]

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


class DiskStore:
    """The store of ``Disk``."""

    def __init__(self, folder: str, ahead: int) -> None:
        self.folder = folder
        self.ahead = ahead
        try:
            # A file without a name, open to nobody else.
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise StoreError(
                f"no checkpoint file can be made in {folder!r}: {error.strerror}; name an existing "
                "folder that you can write to"
            ) from error
        self.worker = ThreadPoolExecutor(1, "checkpoints")
        thread = self.worker.submit(threading.get_ident).result()
        self.extents: dict[int, _Extent] = {}
        self.keys: list[int] = []  # sorted
        self.free: dict[int, list[int]] = {}  # offsets of extents that can be used again, by size
        self.end = 0
        # What is on its way: the single worker does one after the other, in the order asked for, so
        # that an extent can be used again before its last reader or writer is done.
        self.writing: dict[int, tuple[Future[None], list[Parcel]]] = {}
        self.reading: dict[int, Future[list[Tensor]]] = {}
        self.close = weakref.finalize(self, _close, self.file, self.worker, thread)

    def put(self, key: int, tensors: Sequence[Tensor]) -> None:
        parcels = [Parcel.sent(x) for x in tensors]
        shapes = [_Shape(p.host.shape, p.host.dtype, p.device) for p in parcels]
        extent = _Extent(self._place(sum(shape.bytes for shape in shapes)), shapes)
        self.extents[key] = extent
        bisect.insort(self.keys, key)
        written = self.worker.submit(_write, self.file, extent.offset, parcels)
        self.writing[key] = written, parcels
        self._settle(self.ahead)

    def get(self, key: int) -> list[Tensor]:
        if key in self.writing:
            found = self.writing[key][1]
        elif key in self.reading:
            found = _parcels(self._read(self.reading.pop(key)), self.extents[key])
        else:
            extent = self.extents[key]
            found = _parcels(self._read(self.worker.submit(_read, self.file, extent)), extent)
        self._read_before(key)
        return [parcel.returned() for parcel in found]

    def drop(self, key: int) -> None:
        extent = self.extents.pop(key)
        del self.keys[bisect.bisect_left(self.keys, key)]
        self.free.setdefault(extent.bytes, []).append(extent.offset)
        self.reading.pop(key, None)
        self.writing.pop(key, None)

    def _place(self, size: int) -> int:
        if self.free.get(size):
            return self.free[size].pop()
        self.end += size
        return self.end - size

    def _settle(self, pending: int) -> None:
        """Wait until no more than ``pending`` writes are on their way."""
        for key, (written, _) in list(self.writing.items()):
            if not written.done() and len(self.writing) <= pending:
                break
            try:
                written.result()
            except OSError as error:  # the step stays in memory
                raise StoreError(
                    f"a checkpoint could not be written to {self.folder!r}: {error.strerror}, "
                    f"after {self.end} bytes; make room there, name another folder, or set a "
                    "memory budget without one"
                ) from error
            del self.writing[key]

    def _read(self, future: Future[list[Tensor]]) -> list[Tensor]:
        try:
            return future.result()
        except OSError as error:
            raise StoreError(
                f"a checkpoint could not be read from {self.folder!r}: {error.strerror}"
            ) from error

    def _read_before(self, key: int) -> None:
        """Read ahead what a backward pass will ask for after ``key``: the keys before it."""
        place = bisect.bisect_left(self.keys, key)
        for earlier in reversed(self.keys[max(place - self.ahead, 0) : place]):
            if earlier not in self.reading and earlier not in self.writing:
                extent = self.extents[earlier]
                self.reading[earlier] = self.worker.submit(_read, self.file, extent)
        for later in [k for k in self.reading if k > key]:
            del self.reading[later]


def _parcels(tensors: Sequence[Tensor], extent: _Extent) -> list[Parcel]:
    pairs = zip(tensors, extent.shapes, strict=True)
    return [Parcel(x, shape.device) for x, shape in pairs]


def _close(file: IO[bytes], worker: ThreadPoolExecutor, thread: int) -> None:
    """Called once: by ``close``, when the store is collected, or when the interpreter exits."""
    if threading.get_ident() == thread:  # collected by its own thread, which cannot wait for itself
        worker.submit(file.close)
        worker.shutdown(wait=False)
    else:
        worker.shutdown(wait=True, cancel_futures=True)
        file.close()


def _write(file: IO[bytes], offset: int, parcels: Sequence[Parcel]) -> None:
    for parcel in parcels:
        for view in views(parcel.landed()):
            while view:
                count = os.pwrite(file.fileno(), view, offset)
                view, offset = view[count:], offset + count


def _read(file: IO[bytes], extent: _Extent) -> list[Tensor]:
    offset, tensors = extent.offset, []
    for size, dtype, device in extent.shapes:
        x = torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")
        for view in views(x):
            while view:
                count = os.preadv(file.fileno(), [view], offset)
                if not count:
                    raise OSError(0, "the file is shorter than what was written to it")
                view, offset = view[count:], offset + count
        tensors.append(x)
    return tensors


def views(x: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor, in place; numpy would be one more dependency."""
    if x.numel():
        buffer = (ctypes.c_char * x.nbytes).from_address(x.data_ptr())
        yield memoryview(buffer).cast("B")
