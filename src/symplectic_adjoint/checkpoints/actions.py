"""What a schedule asks for, one frozen action at a time."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias


class What(enum.IntEnum):
    """What is kept of a step; more of it leaves less to compute again."""

    STATE = 0
    """The state that it starts from: its stages are computed again."""
    STAGES = 1
    """The points of its stages, too: each is evaluated again."""
    GRAPH = 2
    """The autograd graph of every stage: nothing is evaluated again."""


class Where(enum.IntEnum):
    """In which store something lies."""

    FAST = 0
    SLOW = 1


@dataclass(frozen=True, slots=True)
class Keep:
    """Keep ``what`` of ``step``, the step just taken."""

    step: int
    what: What = What.STATE
    where: Where = Where.FAST


@dataclass(frozen=True, slots=True)
class Reduce:
    """Of what is kept of ``step``, keep only ``what``."""

    step: int
    what: What


@dataclass(frozen=True, slots=True)
class Move:
    """Move what is kept of ``step`` to another store."""

    step: int
    where: Where


@dataclass(frozen=True, slots=True)
class Drop:
    """Keep nothing of ``step`` any longer."""

    step: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Continue from the start of ``step``, of which something is kept and stays kept."""

    step: int


@dataclass(frozen=True, slots=True)
class Advance:
    """Take the recorded steps ``first``, ..., ``stop - 1`` again."""

    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Reverse:
    """Reverse ``step``, at whose start the last ``Restore`` or ``Advance`` has ended."""

    step: int


Action: TypeAlias = Keep | Reduce | Move | Drop | Restore | Advance | Reverse
