"""Splitting methods for partitioned systems, as data that proves its order when it is built.

A separable system moves each of its two parts by the other alone, ``q' = v(t, p)``, ``p' = g(t,
q)``, and so is solved exactly with one part held fixed. A splitting method composes such moves,

    q <- q + d h v(t + c h, p)        or        p <- p + d h g(t + c h, q),

in turn (Hairer, Lubich, Wanner, *Geometric Numerical Integration*, 2nd ed., section II.5). Each
part has its own clock, moved together with it: a move sees the time of the part that it holds
fixed, so that ``c`` is the sum of that part's moves so far. For a Hamiltonian system every move is
symplectic, and with it the method.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from symplectic_adjoint._errors import TableauError, UnknownNameError

__all__ = ["Move", "Splitting", "get", "names"]

# Coefficients in double precision fulfil their conditions to 1e-15 or so; a wrong digit that
# matters does not.
_TOLERANCE = 1e-13


class Move(NamedTuple):
    """One part moved with the other held fixed.

    Attributes:
        part: 0 for the first part of the state (``q``), 1 for the second (``p``).
        weight: The size of the move in units of the step.
        c: The time at which it sees the other part, likewise.
    """

    part: int
    weight: float
    c: float


@dataclass(frozen=True, init=False)
class Splitting:
    """A composition of moves of the two parts of a separable system.

    When built, it checks that moves come in turn, that those of each part sum to one, and the
    conditions of its order: in the algebra of the two flows' Lie derivatives A and B, which do not
    commute, the product of the exponentials of the moves must equal exp(A + B) in every word of at
    most ``order`` letters (Hairer, Lubich, Wanner, section III.5). These conditions are necessary
    and sufficient.

    Args:
        name: Name of the method.
        order: Its order.
        moves: (part, weight) of each move, the first one first; part 0 is ``q``, part 1 is ``p``.
        citation: Where the coefficients come from.

    Attributes:
        moves: The moves, with their times.

    Raises:
        TableauError: A check failed; the message names the method and the defect.

    Example:
        >>> verlet = Splitting("verlet", 2, ((1, 0.5), (0, 1.0), (1, 0.5)))
        >>> [move.c for move in verlet.moves], verlet.closed
        ([0.0, 0.5, 1.0], True)
        >>> try:
        ...     Splitting("verlet", 2, ((1, 0.4), (0, 1.0), (1, 0.6)))
        ... except TableauError as error:
        ...     print(error)
        verlet: misses order 2 on the word qp: got 0.6 instead of 0.5
    """

    name: str
    order: int
    moves: tuple[Move, ...]
    citation: str

    def __init__(
        self, name: str, order: int, moves: Iterable[tuple[int, float]], citation: str = ""
    ) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "citation", citation)
        given = tuple((part, float(weight)) for part, weight in moves)
        for (before, _), (after, _) in itertools.pairwise(given):
            if {before, after} != {0, 1}:
                raise TableauError(f"{name}: moves of part 0 and part 1 must come in turn")
        object.__setattr__(self, "moves", tuple(_timed(given)))
        for part in (0, 1):
            total = math.fsum(weight for moved, weight in given if moved == part)
            if not abs(total - 1) <= _TOLERANCE:
                raise TableauError(f"{name}: the moves of part {part} sum to {total!r}, not to 1")
        _check_order(name, order, given)

    @property
    def closed(self) -> bool:
        """Whether the last move sees what the first move of the next step does."""
        return self.moves[0].part == self.moves[-1].part

    @property
    def reach(self) -> tuple[float, float]:
        """The least and the greatest time of a move, in units of the step."""
        times = [move.c for move in self.moves]
        return min(times), max(times)


def get(name: str) -> Splitting:
    """The splitting called ``name``, the same object at every call.

    Raises:
        UnknownNameError: There is no such method.

    Example:
        >>> len(get("yoshida4").moves)
        7
    """
    if name not in _METHODS:
        raise UnknownNameError("method", name, names())
    return _built(name)


def names() -> tuple[str, ...]:
    """The names of all splittings.

    Example:
        >>> names()
        ('symplectic_euler', 'verlet', 'yoshida4', 'yoshida6', 'yoshida8')
    """
    return tuple(_METHODS)


@cache
def _built(name: str) -> Splitting:
    order, moves, citation = _METHODS[name]
    return Splitting(name, order, moves, citation)


def _timed(moves: Sequence[tuple[int, float]]) -> Iterable[Move]:
    clocks = ([], [])  # type: tuple[list[float], list[float]]
    for part, weight in moves:
        c = math.fsum(clocks[1 - part])
        yield Move(part, weight, float(round(c)) if abs(c - round(c)) <= _TOLERANCE else c)
        clocks[part].append(weight)


def _check_order(name: str, order: int, moves: Sequence[tuple[int, float]]) -> None:
    for n, level in enumerate(_words(moves, order)):
        for word, got in enumerate(level):
            wanted = 1 / math.factorial(n)
            if not abs(got - wanted) <= _TOLERANCE:
                letters = "".join("qp"[word >> i & 1] for i in reversed(range(n)))
                raise TableauError(
                    f"{name}: misses order {n} on the word {letters}: got {got!r} instead of "
                    f"{wanted!r}"
                )


def _words(moves: Sequence[tuple[int, float]], order: int) -> list[list[float]]:
    """The product of exponentials: for each length, the coefficients of all words, as bits."""
    levels = [[0.0] * (1 << n) for n in range(order + 1)]
    levels[0][0] = 1.0
    for part, weight in moves:
        new = [[0.0] * len(level) for level in levels]
        for n, level in enumerate(levels):
            for word in range(len(level)):
                terms, factor = [level[word]], 1.0
                for k in range(1, n + 1):
                    if (word >> (k - 1)) & 1 != part:
                        break
                    factor *= weight / k
                    terms.append(factor * levels[n - k][word >> k])
                new[n][word] = math.fsum(terms)
        levels = new
    return levels


def _composed(*weights: float) -> tuple[tuple[int, float], ...]:
    """Steps of the Verlet method of sizes ``w_m ... w_1 w_0 w_1 ... w_m``, from ``w_1 ... w_m``."""
    sizes = [*reversed(weights), 1 - 2 * math.fsum(weights), *weights]
    halves = [sizes[0] / 2, *((a + b) / 2 for a, b in itertools.pairwise(sizes)), sizes[-1] / 2]
    moves = [(1, halves[0])]
    for size, half in zip(sizes, halves[1:], strict=True):
        moves += [(0, size), (1, half)]
    return tuple(moves)


_YOSHIDA = (
    "H. Yoshida, Construction of higher order symplectic integrators, Physics Letters A 150 (1990) "
    "262-268"
)
_METHODS: dict[str, tuple[int, tuple[tuple[int, float], ...], str]] = {
    "symplectic_euler": (
        1,
        ((1, 1.0), (0, 1.0)),
        "Hairer, Lubich, Wanner, Geometric Numerical Integration, 2nd ed., eq. (I.1.9)",
    ),
    "verlet": (
        2,
        _composed(),
        "L. Verlet, Computer experiments on classical fluids I, Physical Review 159 (1967) 98-103; "
        "Hairer, Lubich, Wanner, eq. (I.1.17)",
    ),
    "yoshida4": (4, _composed(1 / (2 - 2 ** (1 / 3))), f"{_YOSHIDA}, eq. (2.11)"),
    # The published digits, solved on to double precision.
    "yoshida6": (
        6,
        _composed(-1.177679984178871007, 0.2355732133593581337, 0.7845136104775572638),
        f"{_YOSHIDA}, table 1, solution A",
    ),
    "yoshida8": (
        8,
        _composed(
            0.1027998493917964406,
            -1.960610232975310808,
            1.938139137622525987,
            -0.1582406353680501752,
            -1.444852236860605158,
            0.2536933365662113541,
            0.9148442462297915667,
        ),
        f"{_YOSHIDA}, table 2, solution D",
    ),
}
