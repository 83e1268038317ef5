"""Rewriting graphs where what they compute can be had in less time.

A call of a product takes two to four microseconds, whatever its size, and the hyperbolic tangents
of a hidden layer take as long as the product before them: a network of a few hundred neurons
spends most of its time so.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.codegen.cpp import CppOverrides, CppVecOverrides
from torch._inductor.custom_graph_pass import CustomGraphPass

aten = torch.ops.aten

SMALL = 2**20
"""Operands of up to so many bytes in all are kept to be multiplied at once."""

NARROW = 48
"""Matrices of fewer columns, if they are no multiple of sixteen, are multiplied transposed."""

Pair = tuple[fx.Node, fx.Node]


class Quicker(CustomGraphPass):
    """Fewer and simpler products: run on each graph before its code."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place."""
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            if node.args[0].meta["val"].ndim == 2:
                _merge(graph, node)
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            if node.args[0].meta["val"].ndim == 1 and not node.kwargs:
                _split(graph, node)
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            if _on_cpu(node) and _is_narrow(_value(node)):
                _turn(graph, node)

    def uuid(self) -> str:
        """Names this version, and that of ``rational_tanh``, for caches of compiled code."""
        return "symplectic_adjoint.quicker.4"


def _split(graph: fx.Graph, node: fx.Node) -> None:
    """``addmm(bias, a, b)`` as ``mm(a, b) + bias``, which is quicker for a bias of one row."""
    bias, a, b = node.args
    with graph.inserting_before(node):
        product = _like(graph, node, aten.mm.default, (a, b))
        total = _like(graph, node, aten.add.Tensor, (product, bias))
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _is_narrow(value: Tensor) -> bool:
    rows, columns = (_hint(size) for size in value.shape)
    fixed = isinstance(value.shape[1], int)
    return fixed and 1 < columns < min(rows, NARROW) and columns % 16 > 0


def _turn(graph: fx.Graph, node: fx.Node) -> None:
    """``a b`` as the transpose of ``b' a'``: MKL writes long rows in less time."""
    value = _value(node)
    with graph.inserting_before(node):
        a, b = (_transposed(graph, x) for x in node.args)
        product = _call(graph, aten.mm.default, (b, a), value.new_empty(value.shape[::-1]))
        # As contiguous as before, which is checked; whoever reads it elementwise reads the product.
        result = _like(graph, node, aten.clone.default, (_transposed(graph, product),))
        result.kwargs = {"memory_format": torch.contiguous_format}
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _transposed(graph: fx.Graph, node: Any) -> fx.Node:
    return _call(graph, aten.permute.default, (node, [1, 0]), _value(node).permute(1, 0))


# tanh(x) = x p(x^2) / q(x^2) for |x| <= 9, where all that is beyond rounds to one; coefficients of
# the highest power first. The largest relative error is 2.1e-8 (minimax, by iteratively reweighted
# least squares), to which float32 adds its rounding: 4e-7 in all.
_P = (1.335471729213722e-8, 2.0609123841112724e-5, 3.495590688381881e-3, 0.1338102779941799, 1.0)
_Q = (7.776581531073415e-7, 3.285638984671164e-4, 2.587699195969825e-2, 0.4671434339175261, 1.0)
_SATURATED = 9

# How code for scalars and for vectors is written, and there the lesser and the greater of two.
_WRITERS: dict[Any, tuple[str, str]] = {
    CppOverrides: ("min_propagate_nan", "max_propagate_nan"),
    CppVecOverrides: ("at::vec::minimum", "at::vec::maximum"),
}
_writing = threading.RLock()


@contextlib.contextmanager
def rational_tanh() -> Generator[None]:
    """Let the compiler write ``tanh`` in float32 on the CPU as a quotient of polynomials.

    In C++ and not in the graph, where its thirty operations would each be read, analysed and
    written several times over. Only for the thread that asks.
    """
    with _writing:
        before = {writer: writer.__dict__["tanh"] for writer in _WRITERS}
        for writer, bounds in _WRITERS.items():
            writer.tanh = staticmethod(_quotient(writer.tanh, *bounds))
        try:
            yield
        finally:
            for writer, tanh in before.items():
                writer.tanh = tanh


def _quotient(tanh: Callable[[Any], str], least: str, greatest: str) -> Callable[[Any], str]:
    """Writes what ``tanh`` would write, or in this thread and in float32 the quotient."""
    asking = threading.get_ident()

    def clamped(x: str, most: int) -> str:
        return f"{least}({greatest}({x}, T(-{most})), T({most}))"

    def polynomial(first: float, *others: float) -> str:
        return functools.reduce(lambda total, c: f"({total} * s + T({c}))", others, f"T({first})")

    quotient = clamped(f"y * {polynomial(*_P)} / {polynomial(*_Q)}", 1)
    body = f"const T y = {clamped('x', _SATURATED)}; const T s = y * y; return {quotient};"

    def write(x: Any) -> str:
        if getattr(x, "dtype", None) != torch.float32 or threading.get_ident() != asking:
            return tanh(x)
        return f"[](auto x) {{ using T = decltype(x); {body} }}({x})"

    return write


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
        return _transposed(graph, _joined(graph, [x.all_input_nodes[0] for x in parts], 1 - dim))
    value = torch.cat([_value(x) for x in parts], dim)
    return _call(graph, aten.cat.default, (list(parts), dim), value)


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def nbytes(value: Tensor) -> int:
    """Bytes of a tensor without memory, where sizes that change are as they were at first."""
    return value.element_size() * math.prod(map(_hint, value.shape))


def _hint(size: Any) -> int:
    """A size, or what one that changes was at first."""
    return size if isinstance(size, int) else size.node.hint


def _on_cpu(node: fx.Node) -> bool:
    return _value(node).device.type == "cpu"


def _like(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    return _call(graph, target, args, _value(node))


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], value: Tensor) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node
