"""The output folder of a run: atomic writes, nothing deleted unasked, one writer at a time."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from symplectic_adjoint._errors import ArgumentError
from symplectic_adjoint._files import lock, write_whole

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
    write_whole(path, [content])


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON; numbers that JSON lacks (NaN and the infinities) become null."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def line(value: Any) -> str:
    """A value as one line of JSON; numbers that JSON lacks become null."""
    return json.dumps(_finite(value), allow_nan=False)


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


class Folder:
    """An output folder that only runs of one kind write to, one process at a time.

    ``start`` it for a new run; ``check_run`` before continuing a stopped one.

    Args:
        path: The folder.
        kind: What its settings file says it holds.
        folders: Names of the folders inside that a run writes, and ``overwrite`` deletes.
        files: Names of the files, likewise.
    """

    def __init__(
        self, path: Path, *, kind: str, folders: Sequence[str], files: Sequence[str] = ()
    ) -> None:
        self.path = path
        self.kind = kind
        self.config = path / "config.json"
        self._written = (tuple(folders), tuple(files))

    def start(self, *, overwrite: bool) -> None:
        """Makes the folder of a new run.

        Args:
            overwrite: Whether an earlier run in it is to be deleted. Only what a run writes is
                deleted, and only from a folder that holds one of this kind.

        Raises:
            RunFolderError: The path is a file or a folder with something in it, and overwriting was
                not asked for or would not replace a run.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file; give another output folder with --out")
        if path.is_dir() and any(entry.name != _LOCK for entry in path.iterdir()):
            if not self.holds_run():
                raise RunFolderError(
                    f"{path} holds files that are not from a run; give another folder with --out"
                )
            if not overwrite:
                raise RunFolderError(
                    f"{path} holds a run; continue it with --resume, replace it with --overwrite, "
                    "or give another folder with --out"
                )
            with self.lock():
                self._clear()
        path.mkdir(parents=True, exist_ok=True)

    def check_run(self) -> None:
        """Makes sure that there is a run to continue.

        Raises:
            RunFolderError: There is no run.
        """
        if not self.holds_run():
            raise RunFolderError(
                f"{self.path} holds no run to resume; leave --resume out to start one"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from writing here; the lock dies with this process.

        Raises:
            RunFolderError: Another process holds the lock.
        """
        try:
            descriptor = lock(self.path / _LOCK)
        except BlockingIOError as error:
            raise RunFolderError(f"another process is writing to {self.path}") from error
        try:
            yield
        finally:
            os.close(descriptor)

    def holds_run(self) -> bool:
        """Whether a run of this kind was started here."""
        try:
            content = read_json(self.config)
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and content.get("kind") == self.kind

    def _clear(self) -> None:
        folders, files = self._written
        for name in folders:
            shutil.rmtree(self.path / name, ignore_errors=True)
        # The settings mark the folder as a run, so they go last.
        for name in (*files, self.config.name):
            (self.path / name).unlink(missing_ok=True)


class RunFolder(Folder):
    """Where a comparison keeps its settings, checkpoints, measurements, figures and report."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            kind=KIND,
            folders=("checkpoints", "measurements", "figures"),
            files=("results.json", "report.html"),
        )
        self.results = path / "results.json"
        self.report = path / "report.html"
        self.figures = path / "figures"
        self.checkpoints = path / "checkpoints"
        self.measurements = path / "measurements"

    @classmethod
    def create(cls, path: Path, *, overwrite: bool) -> RunFolder:
        """Makes the folder of a new run; see ``start``."""
        folder = cls(path)
        folder.start(overwrite=overwrite)
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Opens the folder of an earlier run; see ``check_run``."""
        folder = cls(path)
        folder.check_run()
        return folder

    def checkpoint(self, strategy: str) -> Path:
        """The file of a strategy's training state."""
        return self.checkpoints / f"{strategy}.pt"

    def measurement(self, strategy: str) -> Path:
        """The file of a strategy's measurements."""
        return self.measurements / f"{strategy}.json"
