"""A folder in which a long job leaves what it needs to go on after its process has died."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from symplectic_adjoint._errors import ArgumentError, JobFolderError, OtherJobError, StoreError
from symplectic_adjoint._files import lock, write_whole
from symplectic_adjoint.checkpoints.disk import views

_MAGIC = b"symplectic-adjoint job 1\n"
_DIGEST = 32
_BLOCK = 1 << 20
_SHARE = 50
"""Of the time between two entries, writing may take the 50th part."""

_JOB, _LOCK = "job", ".lock"
_KINDS = ("forward-", "backward-")


@dataclass(frozen=True)
class JobFolder:
    """A folder that lets a solve and its backward pass go on after their process has died.

    Every so often the solve writes down where it is, in forward and in backward. A process that
    runs the same script again, after a crash or ``kill -9``, continues from there, to bitwise the
    same gradient; see "Long jobs" in the documentation on memory.

    The folder is made with mode 0700 if it is not there, its files have mode 0600 and are written
    whole or not at all, with checksums: a damaged one is not used, and the job goes on from the one
    before it. Reading them runs no code. One job at a time may use a folder, and one process.

    Attributes:
        path: The folder. Its parent exists.
        every: Seconds between two entries, at least. There are more where writing an entry takes
            more than the 50th part of that; at 0 every step writes one.

    Raises:
        ArgumentError: ``every`` is negative or no number.

    Example:
        >>> import tempfile
        >>> import symplectic_adjoint as sa
        >>> y0 = torch.ones(2, requires_grad=True)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     folder = sa.JobFolder(path)
        ...     gradient = sa.Symplectic(folder=folder)
        ...     sol = sa.solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=gradient)
        ...     sol.y[-1].sum().backward()
        ...     # The same again: all of it is in the folder.
        ...     sol = sa.solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=gradient)
        ...     (grad,) = torch.autograd.grad(sol.y[-1].sum(), y0)
        ...     folder.clear()
        >>> sol.stats.resumed == sol.stats.accepted, torch.equal(grad, y0.grad)
        (True, True)
    """

    path: str | os.PathLike[str]
    every: float = 60.0

    def __post_init__(self) -> None:
        if type(self.every) not in (int, float) or not 0 <= self.every < math.inf:
            raise ArgumentError(f"every = {self.every!r} must be a number of seconds, e.g. 60.0")

    def open(self, identity: Mapping[str, str]) -> Journal:
        """The journal of a job, as far as it was written.

        Args:
            identity: What makes the job that one, by name.

        Raises:
            OtherJobError: The folder holds another job.
            JobFolderError: Another process works in the folder, or it holds other files.
            StoreError: The folder cannot be made or written.
        """
        journal = Journal(self, identity)
        journal.acquire()
        return journal

    def clear(self) -> None:
        """Delete what a job has left in the folder, and nothing else.

        Raises:
            JobFolderError: A process works in the folder.
        """
        if Path(self.path).is_dir():
            with _Lock(Path(self.path)):
                for name in (
                    *_entries(Path(self.path)),
                    _JOB,
                ):  # what says whose they are goes last
                    (Path(self.path) / name).unlink(missing_ok=True)


class Entry(NamedTuple):
    """What is written at a time.

    Attributes:
        values: Plain values, as JSON knows them.
        tensors: Lists of tensors, by name; some may be None.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, Sequence[Tensor | None]] = {}


class Journal:
    """The entries of one job, numbered within each kind."""

    def __init__(self, folder: JobFolder, identity: Mapping[str, str]) -> None:
        self.path = Path(folder.path)
        self.identity = dict(identity)
        self.every = folder.every
        self._lock: _Lock | None = None
        self._next = time.monotonic() + self.every

    def acquire(self) -> None:
        """Let no other process work in the folder, and make sure that it holds this job.

        Raises:
            OtherJobError: It holds another job.
            JobFolderError: Another process works in it, or it holds other files.
            StoreError: It cannot be made or written.
        """
        if self._lock is not None:
            return
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            held = _Lock(self.path)
        except OSError as error:
            raise self._failed("made or opened", error) from error
        try:
            self._identify()
        except BaseException:
            held.close()
            raise
        self._lock = held

    def release(self) -> None:
        """Let others work in the folder; ``acquire`` takes it back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _identify(self) -> None:
        if not (self.path / _JOB).exists():
            if others := [x.name for x in self.path.iterdir() if not x.name.startswith(".")]:
                raise JobFolderError(
                    f"{self.path} holds files that are no job's, {others[0]!r} among them; give a "
                    "folder of its own, which need not exist"
                )
            self._write(_JOB, Entry(self.identity))
        found = self._read(_JOB, torch.device("cpu"))
        if found is None:
            raise JobFolderError(
                f"{self.path / _JOB} is damaged, so that nobody can say whose the files beside it "
                f"are; JobFolder({str(self.path)!r}).clear() deletes them, or give another folder"
            )
        if found.values != self.identity:
            raise self._other(found.values)

    def _other(self, found: Mapping[str, str]) -> OtherJobError:
        names = [*self.identity, *(name for name in found if name not in self.identity)]
        pairs = [(name, found.get(name), self.identity.get(name)) for name in names]
        differences = [
            f"{name} ({'nothing' if there is None else there} there, "
            f"{'nothing' if here is None else here} here)"
            for name, there, here in pairs
            if there != here
        ]
        shown = "; ".join(differences[:5]) + ("; ..." if len(differences) > 5 else "")
        return OtherJobError(
            f"the folder {str(self.path)!r} holds another job, which differs in {shown}. Nothing "
            "was touched: run the job that it holds, give another folder, or delete what it holds "
            f"with JobFolder({str(self.path)!r}).clear()",
            differences,
        )

    # Entries ---------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether it is time for an entry."""
        return time.monotonic() >= self._next

    def write(self, kind: str, number: int, entry: Entry) -> None:
        """Write an entry, whole or not at all.

        Raises:
            StoreError: The disk is full or cannot be written; the entries before are still there.
        """
        begin = time.monotonic()
        self._write(_name(kind, number), entry)
        now = time.monotonic()
        self._next = now + max(self.every, _SHARE * (now - begin) if self.every else 0.0)

    def read(self, kind: str, number: int, device: torch.device) -> Entry | None:
        """An entry of this job, or None where it is missing or damaged."""
        return self._read(_name(kind, number), device)

    def numbers(self, kind: str) -> list[int]:
        """The numbers under which there are entries."""
        prefix = f"{kind}-"
        names = _entries(self.path)
        return sorted(int(x.removeprefix(prefix)) for x in names if x.startswith(prefix))

    def drop(self, kind: str, number: int) -> None:
        """Delete an entry, if it is there."""
        (self.path / _name(kind, number)).unlink(missing_ok=True)

    def _write(self, name: str, entry: Entry) -> None:
        try:
            write_whole(self.path / name, _chunks(entry, self._mark(name)), mode=0o600)
        except OSError as error:
            raise self._failed("written", error) from error

    def _read(self, name: str, device: torch.device) -> Entry | None:
        try:
            with open(self.path / name, "rb") as stream:
                return _parsed(stream, None if name == _JOB else self._mark(name), device)
        except OSError:
            return None

    def _mark(self, name: str) -> str:
        """Whose entry a file is, so that no other is taken for it."""
        text = json.dumps([name, sorted(self.identity.items())])
        return hashlib.blake2b(text.encode(), digest_size=_DIGEST).hexdigest()

    def _failed(self, what: str, error: OSError) -> StoreError:
        return StoreError(
            f"the job folder {str(self.path)!r} could not be {what}: {error.strerror}; make room "
            "there, or see to it that you can write to it, and run the job again: it goes on from "
            "the last entry"
        )


class _Lock:
    """A folder that one process works in."""

    def __init__(self, path: Path) -> None:
        """Take it.

        Raises:
            JobFolderError: Another has it.
        """
        try:
            descriptor = lock(path / _LOCK, mode=0o600)
        except BlockingIOError as error:
            raise JobFolderError(
                f"another solve works in the folder {str(path)!r}, in another process or in this "
                "one; wait for its gradient, end it (delete its solution, if its gradient is not "
                "wanted), or give another folder"
            ) from error
        self.close = weakref.finalize(self, os.close, descriptor)

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _name(kind: str, number: int) -> str:
    return f"{kind}-{number:08d}"


def _entries(path: Path) -> list[str]:
    """The files that a job writes beside that which says what it is, half-written ones included."""
    names = [x.name for x in path.iterdir()]
    kinds = (*_KINDS, *(f".{kind}" for kind in _KINDS), f".{_JOB}.")
    return [name for name in names if name.startswith(kinds)]


# How an entry is written: a mark, the length of a description in JSON, the description, the bytes
# of the tensors, and a checksum of all of it.


def _chunks(entry: Entry, mark: str) -> Iterator[bytes | memoryview]:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for chunk in _content(entry, mark):
        digest.update(chunk)
        yield chunk
    yield digest.digest()


def _content(entry: Entry, mark: str) -> Iterator[bytes | memoryview]:
    shapes = {
        name: [None if x is None else [str(x.dtype).removeprefix("torch."), *x.shape] for x in xs]
        for name, xs in entry.tensors.items()
    }
    described = {"mark": mark, "values": dict(entry.values), "tensors": shapes}
    text = json.dumps(described).encode()
    yield _MAGIC + struct.pack("<Q", len(text)) + text
    for xs in entry.tensors.values():
        for x in xs:
            if x is not None:
                yield from views(on_host(x))


def on_host(x: Tensor) -> Tensor:
    """A tensor whose bytes can be read in place."""
    return x.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _parsed(stream: IO[bytes], mark: str | None, device: torch.device) -> Entry | None:
    """The entry in a file, or None where it is damaged or has another mark."""
    if not _sound(stream):
        return None
    stream.seek(len(_MAGIC))
    (length,) = struct.unpack("<Q", stream.read(8))
    described = json.loads(stream.read(length))
    if mark is not None and described["mark"] != mark:
        return None
    tensors = {
        name: [None if shape is None else _tensor(stream, *shape).to(device) for shape in shapes]
        for name, shapes in described["tensors"].items()
    }
    return Entry(described["values"], tensors)


def _sound(stream: IO[bytes]) -> bool:
    """Whether a file begins as an entry does and has the checksum that it says."""
    left = os.fstat(stream.fileno()).st_size - _DIGEST
    if left < len(_MAGIC) + 8 or stream.read(len(_MAGIC)) != _MAGIC:
        return False
    stream.seek(0)
    digest = hashlib.blake2b(digest_size=_DIGEST)
    while left and (block := stream.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    return stream.read() == digest.digest()


def _tensor(stream: IO[bytes], dtype: str, *shape: int) -> Tensor:
    x = torch.empty(shape, dtype=getattr(torch, dtype))
    for view in views(x):
        stream.readinto(view)  # type: ignore[attr-defined]
    return x
