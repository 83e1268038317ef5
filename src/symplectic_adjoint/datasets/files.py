"""Tables from the user's own .npy and .csv files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symplectic_adjoint._extras import require
from symplectic_adjoint.datasets.errors import DataError, DataNotFoundError

SUFFIXES = (".npy", ".csv")
_SEPARATORS = ",;\t"


def read_table(path: Path) -> Tensor:
    """Reads a table of numbers.

    A .npy file holds an array with one or two axes, of any real dtype. A .csv file holds one row a
    line, separated by commas, semicolons or tabs; a first line without a single number is a header,
    blank lines and lines that start with ``#`` are skipped.

    Args:
        path: The file.

    Returns:
        Finite float64 rows of shape (n, dim).

    Raises:
        DataNotFoundError: There is no such file.
        DataError: Another kind of file, unreadable or not rectangular, or an entry that is not a
            finite number; the message says the row and column.
    """
    if not path.is_file():
        raise DataNotFoundError(f"no such file: {path}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of file {suffix!r}; use one of {', '.join(SUFFIXES)}"
        )
    return _read_npy(path) if suffix == ".npy" else _read_csv(path)


def read_array(path: Path) -> Any:
    """Reads the array of a .npy file, of any real dtype.

    Returns:
        A numpy array, float64.

    Raises:
        DataError: The file is not readable, or does not hold real numbers.
    """
    numpy = require("numpy")
    try:
        array = numpy.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a readable .npy file of numbers ({error})") from error
    if array.dtype.kind not in "iuf":
        raise DataError(f"{path}: the array holds {array.dtype}, not real numbers")
    return array.astype(numpy.float64)


def _read_npy(path: Path) -> Tensor:
    array = read_array(path)
    if array.ndim not in (1, 2):
        raise DataError(f"{path}: the array has shape {array.shape}; one row a sample is needed")
    rows = torch.from_numpy(array).reshape(len(array), -1)
    bad = (~rows.isfinite()).nonzero()
    if len(bad):
        i, j = bad[0].tolist()
        raise DataError(_entry(path, f"row {i + 1}", j, f"{float(rows[i, j])} is not finite"))
    return rows


def _read_csv(path: Path) -> Tensor:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: not a readable text file ({error})") from error
    rows = _split(text.splitlines())
    if rows and not any(_is_number(cell) for cell in rows[0][1]):
        rows = rows[1:]  # a header
    if not rows:
        raise DataError(f"{path}: the file holds no rows")
    width = len(rows[0][1])
    return torch.tensor(
        [_parse_row(path, number, row, width) for number, row in rows], dtype=torch.float64
    )


def _split(lines: list[str]) -> list[tuple[int, list[str]]]:
    """The cells of every row that is neither blank nor a comment, with the number of its line."""
    first = next((line for line in lines if not _is_skipped(line)), "")
    reader = csv.reader(lines, delimiter=max(_SEPARATORS, key=first.count))
    return [
        (reader.line_num, [cell.strip() for cell in row])
        for row in reader
        if not _is_skipped("".join(row))
    ]


def _is_skipped(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _parse_row(path: Path, number: int, row: list[str], width: int) -> list[float]:
    if len(row) != width:
        raise DataError(f"{path}: line {number} has {len(row)} columns, the first row has {width}")
    values = []
    for column, cell in enumerate(row):
        if not _is_number(cell):
            raise DataError(_entry(path, f"line {number}", column, f"{cell!r} is not a number"))
        value = float(cell)
        if not abs(value) < float("inf"):
            raise DataError(_entry(path, f"line {number}", column, f"{cell} is not finite"))
        values.append(value)
    return values


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # Python reads 1_000 as a number; in a table it is a slip


def _entry(path: Path, row: str, column: int, why: str) -> str:
    return f"{path}: {row}, column {column + 1}: {why}. Remove or fill in such rows first"
