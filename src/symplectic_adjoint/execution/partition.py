"""A joint graph of a value and its vector-Jacobian product, cut in two.

What does not depend on the cotangent is the value's graph; of it the product reads some tensors,
the residuals. Sizes, views, and elementwise functions of what is at hand anyway are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Halves:
    """The two graphs.

    Attributes:
        linearize: ``(*inputs without the cotangent) -> (k, *residuals)``.
        apply: ``(*inputs, *residuals) -> products``, what the joint graph returns but ``k``.
        residuals: Tensors without memory, like the residuals.
    """

    linearize: Callable[..., Sequence[Tensor]]
    apply: Callable[..., Sequence[Tensor | None]]
    residuals: Sequence[Tensor]


def partition(joint: fx.GraphModule, cotangent: int) -> Halves | None:
    """Cut a graph that returns ``(k, *products)``.

    Args:
        joint: The graph.
        cotangent: Which input the cotangent is.

    Returns:
        The two graphs; None where the graph writes into its tensors, so that their order matters.
    """
    calls = joint.graph.find_nodes
    if any(_writes(node) for node in joint.graph.nodes):
        return None
    inputs = calls(op="placeholder")
    (output,) = calls(op="output")
    k, *products = output.args[0]
    late = _dependent(joint.graph, inputs[cotangent])
    saved = _residuals(joint.graph, late, [x for x in products if x is not None])
    early = [x for i, x in enumerate(inputs) if i != cotangent]
    return Halves(
        _extracted(joint, early, [k, *saved]),
        _extracted(joint, [*inputs, *saved], products),
        [node.meta["val"] for node in saved],
    )


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _dependent(graph: fx.Graph, source: fx.Node) -> set[fx.Node]:
    found = {source}
    for node in graph.nodes:
        if node.op != "output" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _residuals(graph: fx.Graph, late: set[fx.Node], products: Sequence[fx.Node]) -> list[fx.Node]:
    """What the late part reads of the early one, less what is easily computed again."""
    needed = {x for node in late for x in node.all_input_nodes} | set(products)
    needed -= late
    # From last to first, so that what is needed to compute one again is seen after it.
    for node in reversed(graph.nodes):
        if node in needed and _free(node):
            needed |= set(node.all_input_nodes)
    at_hand: set[fx.Node] = set()
    saved = []
    for node in graph.nodes:
        cheap = _free(node) or (node in needed and _elementwise(node))
        if not (cheap and at_hand.issuperset(node.all_input_nodes)):
            if node not in needed:
                continue
            saved.append(node)
        at_hand.add(node)
    return saved


def _free(node: fx.Node) -> bool:
    """An input, a size or another number, a constant, or a view."""
    if node.op in ("placeholder", "get_attr") or not isinstance(node.meta.get("val"), Tensor):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _elementwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _extracted(
    joint: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Iterable[fx.Node | None]
) -> fx.GraphModule:
    """The part of a graph between some of its nodes."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    wanted = list(outputs)
    reached = _ancestors([x for x in wanted if x is not None], set(inputs))
    for node in joint.graph.nodes:
        if node in reached:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(None if x is None else copies[x] for x in wanted))
    return fx.GraphModule(joint, graph)


def _ancestors(nodes: Sequence[fx.Node], ends: set[fx.Node]) -> set[fx.Node]:
    """The nodes that these are computed from, and they themselves, without the ends."""
    found: set[fx.Node] = set()
    ahead = [node for node in nodes if node not in ends]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead += [x for x in node.all_input_nodes if x not in ends]
    return found
