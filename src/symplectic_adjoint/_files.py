"""Files that are written whole or not at all, by one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, chunks: Iterable[bytes | memoryview], mode: int = 0o666) -> None:
    """Write a file so that, whenever the process dies, it holds the old or the new content whole.

    Args:
        path: The file; there is one writer at a time (see ``lock``).
        chunks: Its content, in order.
        mode: Permissions of a new file, less the process's umask.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "a.txt", [b"con", b"tent"])
        ...     (Path(folder) / "a.txt").read_bytes()
        b'content'
    """
    # What a killed process left is overwritten.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with open(os.open(temporary, flags, mode), "wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _settle(path.parent)


def _settle(folder: Path) -> None:
    """Let what was renamed in a folder outlast a loss of power, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(path: Path, mode: int = 0o666) -> int:
    """Take the lock that a file stands for.

    Returns:
        A descriptor; the lock lasts until it is closed, or the process dies.

    Raises:
        BlockingIOError: It is taken.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, mode)
    try:
        import fcntl
    except ImportError:  # not on this platform; the lock is a courtesy
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
