"""Rewriting graphs where products of small matrices cost more by their calls than by their sums.

A call of a product takes two to four microseconds, whatever its size; a network of a few hundred
neurons spends most of its time so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

aten = torch.ops.aten

SMALL = 2**20
"""Operands of up to so many bytes in all are kept to be multiplied at once."""

Pair = tuple[fx.Node, fx.Node]


class SmallProducts(CustomGraphPass):
    """Fewer and simpler products, to be run on each graph before its code is generated."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place."""
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            if node.args[0].meta["val"].ndim == 2:
                _merge(graph, node)
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            if node.args[0].meta["val"].ndim == 1 and not node.kwargs:
                _split(graph, node)

    def uuid(self) -> str:
        """Names this version, for caches of compiled code."""
        return "symplectic_adjoint.small_products.2"


def _split(graph: fx.Graph, node: fx.Node) -> None:
    """``addmm(bias, a, b)`` as ``mm(a, b) + bias``, which is quicker for a bias of one row."""
    bias, a, b = node.args
    with graph.inserting_before(node):
        product = _like(graph, node, aten.mm.default, (a, b))
        total = _like(graph, node, aten.add.Tensor, (product, bias))
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _merge(graph: fx.Graph, node: fx.Node) -> None:
    """``a1 b1 + a2 b2 + ...``, the gradient of a weight in a step, as one product."""
    if any(user.target is aten.addmm.default and user.args[0] is node for user in node.users):
        return  # not the last of its chain
    pairs, nodes = _chain(node)
    if not pairs or sum(nbytes(_value(x)) for pair in pairs for x in pair) > SMALL:
        return
    with graph.inserting_before(node):
        a = _joined(graph, [a for a, _ in pairs], 1)
        b = _joined(graph, [b for _, b in pairs], 0)
        product = _like(graph, node, aten.mm.default, (a, b))
    node.replace_all_uses_with(product)
    for each in nodes:
        graph.erase_node(each)


def _chain(node: fx.Node) -> tuple[list[Pair], list[fx.Node]]:
    """The factors of a chain of ``addmm`` that begins with an ``mm``, and its nodes, last first."""
    pairs: list[Pair] = []
    nodes: list[fx.Node] = []
    current: Any = node
    while current.target is aten.addmm.default and not current.kwargs:
        before, a, b = current.args
        pairs.append((a, b))
        nodes.append(current)
        if not isinstance(before, fx.Node) or len(before.users) > 1:
            return [], []
        current = before
    if current.target is not aten.mm.default:
        return [], []
    a, b = current.args
    return [*pairs, (a, b)], [*nodes, current]


def _joined(graph: fx.Graph, parts: Sequence[fx.Node], dim: int) -> fx.Node:
    """Matrices side by side, or one below the other; transposed ones before they are transposed."""
    if all(x.target is aten.permute.default and x.args[1] == [1, 0] for x in parts):
        whole = _joined(graph, [x.args[0] for x in parts], 1 - dim)  # type: ignore[misc]
        return _call(graph, aten.permute.default, (whole, [1, 0]), _value(whole).permute(1, 0))
    value = torch.cat([_value(x) for x in parts], dim)
    return _call(graph, aten.cat.default, (list(parts), dim), value)


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def nbytes(value: Tensor) -> int:
    """Bytes of a tensor without memory, where sizes that change are as they were at first."""
    sizes: Sequence[Any] = value.shape
    hints = (size if isinstance(size, int) else size.node.hint for size in sizes)
    return value.element_size() * math.prod(hints)


def _like(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    return _call(graph, target, args, _value(node))


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], value: Tensor) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node
