"""Order conditions of Runge-Kutta methods, one for each rooted tree.

A method has order ``p`` when ``sum_i b_i Phi_i(tree) = 1 / gamma(tree)`` for every rooted tree of
at most ``p`` nodes (Butcher 1963; Hairer, Norsett, Wanner, *Solving Ordinary Differential Equations
I*, 2nd ed., section II.2, theorem 2.13), and a continuous extension has order ``p`` when ``sum_i
b_i(theta) Phi_i(tree) = theta^|tree| / gamma(tree)`` (section II.6, theorem 6.1). Arithmetic is
that of the numbers passed in: exact for fractions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from operator import mul
from typing import Any, NamedTuple

Tree = tuple["Tree", ...]
"""A rooted tree: the sorted tuple of the trees that hang from its root."""

# Any real number: int, Fraction and float mix, which the numeric tower of the type checker cannot
# say.
Real = Any


class Condition(NamedTuple):
    """What one rooted tree asks of the weights: ``sum_i b_i stages[i] = 1 / density``."""

    tree: Tree
    order: int
    density: int
    stages: tuple[Real, ...]

    def left(self, weights: Sequence[Real]) -> Real:
        """The left side ``sum_i b_i Phi_i`` (stages without a weight weigh nothing)."""
        return sum(map(mul, weights, self.stages))


@cache
def rooted_trees(order: int) -> tuple[Tree, ...]:
    """All rooted trees of ``order`` nodes, each once: 1, 1, 2, 4, 9, 20, 48, 115, ...

    Example:
        >>> rooted_trees(3)
        (((), ()), (((),),))
    """
    if order == 1:
        return ((),)
    return tuple(sorted({grown for tree in rooted_trees(order - 1) for grown in _grow(tree)}))


@cache
def nodes(tree: Tree) -> int:
    """Number of nodes."""
    return 1 + sum(map(nodes, tree))


@cache
def density(tree: Tree) -> int:
    """``gamma(tree)``: the product of the sizes of all the subtrees.

    Example:
        >>> density((((),),))
        6
    """
    return nodes(tree) * prod(map(density, tree))


def conditions(a: Sequence[Sequence[Real]], order: int) -> Iterator[Condition]:
    """The conditions of all trees of at most ``order`` nodes, for stages with the matrix ``a``.

    Args:
        a: One row for each stage; where it has fewer weights than there are stages, those are the
            weights of the first ones.
        order: Greatest number of nodes.

    Yields:
        One condition for each tree, small trees first.
    """
    hung: dict[Tree, list[Real]] = {}  # a Phi(tree): the factor of a tree that hangs from a root
    for size in range(1, order + 1):
        for tree in rooted_trees(size):
            phi = [prod(column) for column in zip(*(hung[child] for child in tree), strict=True)]
            stages = tuple(phi) if tree else (1,) * len(a)
            hung[tree] = [sum(map(mul, row, stages)) for row in a]
            yield Condition(tree, size, density(tree), stages)


def _grow(tree: Tree) -> Iterator[Tree]:
    """Every tree that has one leaf more."""
    yield tuple(sorted((*tree, ())))
    for index, child in enumerate(tree):
        for grown in _grow(child):
            yield tuple(sorted((*tree[:index], grown, *tree[index + 1 :])))
