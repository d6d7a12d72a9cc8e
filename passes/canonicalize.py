"""Operations that only look at another tensor's dtype, device or sizes, spelled without that tensor.

    y.type_as(x)          →  y.to(x's dtype)
    x.new_zeros([4])      →  full([4], 0, x's dtype and device)

Otherwise a table computed from positions would seem to be computed from tokens, because it was cast like them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from .graph import aten, bound_args, val


def canonicalize(gm: fx.GraphModule) -> None:
    """Rewrite `gm` (an ATen graph) in place."""
    for node in list(gm.graph.nodes):
        spell = CANONICAL.get(node.target)
        if spell is None:
            continue
        with gm.graph.inserting_before(node):
            new = spell(gm.graph, node)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.recompile()


def _cast_like(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.to.dtype, (node.args[0], val(node).dtype))


def _filled(value: Any) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    def spell(graph: fx.Graph, node: fx.Node) -> fx.Node:
        args = bound_args(node)[0]
        fill = args[2] if value is None else value
        options = {"dtype": val(node).dtype, "device": val(node).device}
        return graph.call_function(aten.full.default, (args[1], fill), options)

    return spell


def _empty(graph: fx.Graph, node: fx.Node) -> fx.Node:
    options = {"dtype": val(node).dtype, "device": val(node).device}
    return graph.call_function(aten.empty.memory_format, (bound_args(node)[0][1],), options)


CANONICAL: dict[Any, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    aten.type_as.default: _cast_like,
    aten.to.other: _cast_like,
    aten.new_zeros.default: _filled(0),
    aten.new_ones.default: _filled(1),
    aten.new_full.default: _filled(None),
    aten.new_empty.default: _empty,
}
