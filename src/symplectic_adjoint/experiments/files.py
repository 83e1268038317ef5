"""The output folder of a run: atomic writes, nothing deleted unasked, one writer at a time."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from symplectic_adjoint._errors import ArgumentError

KIND = "symplectic-adjoint compare"
_LOCK = ".lock"


class RunFolderError(ArgumentError):
    """An output folder that cannot be used as asked; the message says what to do instead."""


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that, whenever the process dies, it holds the old or the new content whole.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bytes(Path(folder) / "a.txt", b"content")
        ...     (Path(folder) / "a.txt").read_bytes()
        b'content'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # There is one writer (see RunFolder.lock), so what a killed process left is overwritten.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON; numbers that JSON lacks (NaN and the infinities) become null."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads what ``write_json`` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def read_state(path: Path) -> dict[str, Any]:
    """Reads what ``write_state`` wrote, onto the CPU; runs no code that the file might hold."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class RunFolder:
    """Where a run keeps its settings, checkpoints, measurements, figures and report.

    Build one with ``create`` for a new run or ``reopen`` for a stopped one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.results = path / "results.json"
        self.report = path / "report.html"
        self.figures = path / "figures"
        self.checkpoints = path / "checkpoints"
        self.measurements = path / "measurements"

    @classmethod
    def create(cls, path: Path, *, overwrite: bool) -> RunFolder:
        """Makes the folder of a new run.

        Args:
            path: The folder.
            overwrite: Whether an earlier run in it is to be deleted. Only what a run writes is
                deleted, and only from a folder that holds one.

        Raises:
            RunFolderError: The path is a file or a folder with something in it, and overwriting was
                not asked for or would not replace a run.
        """
        folder = cls(path)
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file; give another output folder with --out")
        if path.is_dir() and any(entry.name != _LOCK for entry in path.iterdir()):
            if not folder._holds_run():
                raise RunFolderError(
                    f"{path} holds files that are not from a run; give another folder with --out"
                )
            if not overwrite:
                raise RunFolderError(
                    f"{path} holds a run; continue it with --resume, replace it with --overwrite, "
                    "or give another folder with --out"
                )
            with folder.lock():
                folder._clear()
        path.mkdir(parents=True, exist_ok=True)
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Opens the folder of an earlier run.

        Raises:
            RunFolderError: There is no run.
        """
        folder = cls(path)
        if not folder._holds_run():
            raise RunFolderError(f"{path} holds no run to resume; leave --resume out to start one")
        return folder

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from writing here; the lock dies with this process.

        Raises:
            RunFolderError: Another process holds the lock.
        """
        try:
            import fcntl
        except ImportError:  # not on this platform; the lock is a courtesy
            yield
            return
        with open(self.path / _LOCK, "w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(f"another process is writing to {self.path}") from error
            yield

    def checkpoint(self, strategy: str) -> Path:
        """The file of a strategy's training state."""
        return self.checkpoints / f"{strategy}.pt"

    def measurement(self, strategy: str) -> Path:
        """The file of a strategy's measurements."""
        return self.measurements / f"{strategy}.json"

    def _holds_run(self) -> bool:
        try:
            content = read_json(self.config)
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and content.get("kind") == KIND

    def _clear(self) -> None:
        for name in (self.checkpoints, self.measurements, self.figures):
            shutil.rmtree(name, ignore_errors=True)
        # The settings mark the folder as a run, so they go last.
        for name in (self.results, self.report, self.config):
            name.unlink(missing_ok=True)
