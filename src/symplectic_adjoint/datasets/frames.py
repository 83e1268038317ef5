"""Tables of numbers out of pickled pandas frames, without pandas and without running their code.

A pickle names the functions that rebuild it, and a reader that calls them runs whatever the file
says. Here everything of pandas becomes a husk that remembers what it was given, numpy may rebuild
its arrays, and all else is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from symplectic_adjoint._extras import require
from symplectic_adjoint.datasets.errors import DataError

_BUILTINS = {"slice": slice, "bytearray": bytearray, "set": set, "complex": complex}
_NUMPY = {"_reconstruct", "ndarray", "dtype", "_frombuffer"}


class _Husk:
    """Stands in for an object of pandas, made by a call or filled with a state."""

    kind = ""

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        top = module.partition(".")[0]
        if top == "pandas":
            return type("Husk", (_Husk,), {"kind": name})
        if top == "numpy" and name in _NUMPY:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if module in ("builtins", "__builtin__") and name in _BUILTINS:
            return _BUILTINS[name]
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a table does not need")


def read_frame(path: Path) -> dict[str, Any]:
    """Reads the numeric columns of a pickled ``pandas.DataFrame``, of old and new versions.

    Args:
        path: The file.

    Returns:
        numpy arrays of shape (n,) by the name of their column, in the order of the frame.

    Raises:
        DataError: The file is no such pickle, or holds more than numbers.
    """
    require("numpy")
    try:
        with open(path, "rb") as stream:
            # Frames that Python 2 wrote hold their arrays as text of this encoding.
            frame = _Unpickler(stream, encoding="latin1").load()
        axes, blocks = _parts(frame)
        columns = [str(name) for name in _labels(axes[0]).tolist()]
        found = {
            columns[place]: values
            for block in blocks
            for place, values in zip(*_block(block, len(columns)), strict=True)
        }
        return {name: found[name] for name in columns}
    except (pickle.UnpicklingError, AttributeError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a readable pickle of a table ({error})") from error
    except (ValueError, TypeError, LookupError, ImportError) as error:
        raise DataError(
            f"{path}: the pickle holds no table of numbers in a layout known here ({error!r})"
        ) from error


def _parts(frame: Any) -> tuple[Any, Any]:
    """The axes and the blocks of values of a frame."""
    state = frame.state
    (manager,) = [x for x in _entries(state) if isinstance(x, _Husk) and x.kind == "BlockManager"]
    if manager.args:
        blocks, axes = manager.args
        return axes, blocks
    *_, newest = manager.state  # older layouts come first
    parts = newest["0.14.1"]
    return parts["axes"], parts["blocks"]


def _entries(state: Any) -> Iterator[Any]:
    """What a state holds, through the tuples and dictionaries in it."""
    if isinstance(state, dict):
        yield from _entries(tuple(state.values()))
    elif isinstance(state, tuple):
        for entry in state:
            yield from _entries(entry)
    else:
        yield state


def _labels(index: Any) -> Any:
    """The array of labels behind an index, which may lie below several husks."""
    data = index.args[1]["data"]
    while isinstance(data, _Husk):
        held = list(_entries((data.args, data.state)))
        arrays = [x for x in held if getattr(x, "ndim", 0)]
        data = (arrays or [x for x in held if isinstance(x, _Husk) and x is not data])[0]
    return data


def _block(block: Any, columns: int) -> tuple[list[int], Any]:
    """Which columns a block holds, and their values, one a row."""
    values, place = (
        (block["values"], block["mgr_locs"])
        if isinstance(block, dict)
        else (block.args[0], block.args[1])
    )
    if isinstance(place, _Husk):
        place = place.args[0]
    if values.dtype.kind not in "iuf":
        raise TypeError(f"a column of {values.dtype}")
    places = range(columns)[place] if isinstance(place, slice) else [int(i) for i in place]
    return list(places), values
