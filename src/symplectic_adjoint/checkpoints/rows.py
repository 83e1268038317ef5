"""Equal tensors side by side in a few pieces of memory.

Kept one by one between the short-lived tensors of the steps, they would leave holes that the C
library's allocator does not fill again: it looks for more room than an aligned block takes, so
that the process would grow to twice what its tensors hold.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 2**22
"""Bytes of a piece, at most."""

SLACK = 20
"""At most one row and this part of all rows are not in use."""

_ALIGNMENT = 64  # bytes, as the allocator's: products may round otherwise where data lie otherwise
_SHARE = 32
_FREE = -1


class Kind(NamedTuple):
    """What equal tensors have in common."""

    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Kind | None:
        """The kind that all of some tensors are of; None where they are better held as they are."""
        kinds = {Kind(x.shape, x.dtype) for x in tensors}
        held = all(_plain(x) and 0 < x.nbytes < PIECE for x in tensors)
        return kinds.pop() if held and len(kinds) == 1 else None


def _plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.is_contiguous() and not (x.is_conj() or x.is_neg())


class Rows:
    """Holds copies of tensors of one kind, each for an owner and under a number that may change.

    Rows that are no longer used are used again. When more than a piece is free, its tensors move
    into free rows of the others, and it is given back.
    """

    def __init__(self, kind: Kind) -> None:
        """Hold nothing yet.

        Args:
            kind: Of the tensors.
        """
        self.shape, self.dtype = kind
        self.elements = self.shape.numel()
        line = max(_ALIGNMENT // self.dtype.itemsize, 1)
        self.width = -(-self.elements // line) * line
        self.padding = self.width - self.elements
        self.most = max(PIECE // (self.width * self.dtype.itemsize), 1)
        self.pieces: list[Tensor] = []
        self.starts: list[int] = []
        self.owners = array("q")
        self.free = array("q")

    def put(self, owner: int, x: Tensor) -> int:
        """Hold a copy; its row."""
        if not self.free:
            self._grow()
        row = self.free.pop()
        self.owners[row] = owner
        self._at(row).copy_(x)
        return row

    def get(self, row: int) -> Tensor:
        """A copy of what a row holds."""
        return self._at(row).clone()

    def drop(self, row: int) -> Iterator[tuple[int, int, int]]:
        """Forget a row; yields (owner, row, new row) for each row that has moved."""
        self.owners[row] = _FREE
        self.free.append(row)
        while self.pieces and 2 * len(self.free) > 3 * len(self.pieces[-1]):
            yield from self._shrink()

    def _at(self, row: int) -> Tensor:
        piece = bisect.bisect_right(self.starts, row) - 1
        whole = self.pieces[piece][row - self.starts[piece]]
        return whole if self.padding == 0 else whole[: self.elements].view(self.shape)

    def _grow(self) -> None:
        start = len(self.owners)
        count = min(max(start // _SHARE, 1), self.most)
        shape = (count, *self.shape) if self.padding == 0 else (count, self.width)
        self.pieces.append(torch.empty(shape, dtype=self.dtype))
        self.starts.append(start)
        self.owners.extend([_FREE] * count)
        self.free.extend(range(start + count - 1, start - 1, -1))

    def _shrink(self) -> Iterator[tuple[int, int, int]]:
        start = self.starts[-1]
        self.free = array("q", (row for row in self.free if row < start))
        for row in range(start, len(self.owners)):
            if (owner := self.owners[row]) != _FREE:
                new = self.free.pop()
                self._at(new).copy_(self._at(row))
                self.owners[new] = owner
                yield owner, row, new
        del self.owners[start:]
        self.pieces.pop()
        self.starts.pop()
