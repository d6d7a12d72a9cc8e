"""Operations that only look at another tensor's dtype, device or sizes, spelled without that tensor.

    y.type_as(x)          →  y.to(x's dtype)
    x.new_zeros([4])      →  full([4], 0, x's dtype and device)

Otherwise a table computed from positions would seem to be computed from tokens, because it was cast like them.

And a lookup in a parameter is one, however it is spelled:

    weight[ids]           →  embedding(weight, ids), negative ids counted from the end
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .graph import aten, bound_args, call, requires_grad, shape, val


def canonicalize(gm: fx.GraphModule) -> None:
    """Rewrite `gm` (an ATen graph) in place."""
    for node in list(gm.graph.nodes):
        spell = CANONICAL.get(node.target)
        if spell is None:
            continue
        with gm.graph.inserting_before(node):
            new = spell(gm.graph, node)
        if new is None:
            continue
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


def _lookup(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    table, indices = bound_args(node)[0]
    if len(indices) != 1 or not isinstance(indices[0], fx.Node) or len(shape(table)) != 2:
        return None
    if not (table.meta.get("is_parameter") or requires_grad(table)):
        return None
    (index,) = indices
    if val(index).dtype not in (torch.int32, torch.int64):
        return None
    rows = shape(table)[0]
    negative = call(graph, aten.lt.Scalar, index, 0)
    from_end = call(graph, aten.add.Tensor, index, rows)
    return graph.call_function(
        aten.embedding.default, (table, call(graph, aten.where.self, negative, from_end, index))
    )


CANONICAL: dict[Any, Callable[[fx.Graph, fx.Node], fx.Node | None]] = {
    aten.type_as.default: _cast_like,
    aten.to.other: _cast_like,
    aten.new_zeros.default: _filled(0),
    aten.new_ones.default: _filled(1),
    aten.new_full.default: _filled(None),
    aten.new_empty.default: _empty,
    aten.index.Tensor: _lookup,
}
