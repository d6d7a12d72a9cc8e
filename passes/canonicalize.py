"""Operations that only look at another tensor's dtype, device or sizes, spelled without that tensor.

    y.type_as(x)          →  y.to(x's dtype)
    x.new_zeros([4])      →  full([4], 0, x's dtype and device), and so zeros and ones

Otherwise a table computed from positions would seem to be computed from tokens, because it was cast like them.

And a lookup in a parameter is one, however it is spelled (joined_lookups.py has the second):

    weight[ids]                               →  embedding(weight, ids), negative ids counted from the end
    cat([weight[ids], other[other_ids]], 1)   →  where(is other's, embedding(other, …), embedding(weight, …))

Broadcasting, slices and losses have one spelling, too:

    x[:]                                      →  x (so that static and dynamic traces are one packed graph)
    broadcast_tensors([x, y])[0]              →  x, or expand(x, …)
    cross_entropy_loss(x[N, V, S], t[N, S])   →  cross_entropy_loss(x[N·S, V], t[N·S])
    kl_div(x, y, reduction=sum)               →  sum(sum(kl_div(x, y, reduction=none), -1))
    mean(x[N, S, V])                          →  mean(mean(x, -1))

so that what runs over the vocabulary can be computed for each distinct token, and what is unpacked is narrow.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from .graph import aten, bound_args, call, requires_grad, same_size, schema_of, shape, sizes, val
from .joined_lookups import join_lookups
from .rules.losses import ELEMENTWISE_LOSSES

Spell = Callable[[fx.Graph, fx.Node], fx.Node | None]


def canonicalize(gm: fx.GraphModule, table: Mapping[Any, Spell] | None = None) -> None:
    """Rewrite `gm` (an ATen graph) in place, by CANONICAL or another table: operation → what spells it, or None."""
    table = CANONICAL if table is None else table
    nodes = dict.fromkeys(gm.graph.nodes)
    for node in nodes:
        spell = table.get(node.target)
        if spell is None:
            continue
        with gm.graph.inserting_before(node):
            new = spell(gm.graph, node)
        if new is None:
            continue
        if new not in nodes:
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        _erase_unused(gm.graph, node)
    gm.recompile()


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node, and what only it used."""
    unused = [node]
    while unused:
        node = unused.pop()
        sources = node.all_input_nodes
        graph.erase_node(node)
        unused += [n for n in sources if n.op == "call_function" and not n.users and not n.is_impure()]


def _cast_like(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.to.dtype, (node.args[0], val(node).dtype))


def _filled(value: Any) -> Spell:
    def spell(graph: fx.Graph, node: fx.Node) -> fx.Node:
        args = bound_args(node)[0]
        fill = args[2] if value is None else value
        options = {"dtype": val(node).dtype, "device": val(node).device}
        return graph.call_function(aten.full.default, (args[1], fill), options)

    return spell


def _zeros_or_ones(value: int) -> Spell:
    def spell(graph: fx.Graph, node: fx.Node) -> fx.Node:
        fill = bool(value) if val(node).dtype == torch.bool else value
        options = {"dtype": val(node).dtype, "device": val(node).device}
        return graph.call_function(aten.full.default, (node.args[0], fill), options)

    return spell


def _empty(graph: fx.Graph, node: fx.Node) -> fx.Node:
    options = {"dtype": val(node).dtype, "device": val(node).device}
    return graph.call_function(aten.empty.memory_format, (bound_args(node)[0][1],), options)


def _whole(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    x, _, start, end, step = bound_args(node)[0]
    is_whole = start in (None, 0) and end in (None, sys.maxsize) and step == 1
    return x if is_whole and all(user.op != "output" for user in node.users) else None


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


def _broadcast_item(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    source, index = node.args
    if not isinstance(source, fx.Node) or source.target is not aten.broadcast_tensors.default:
        return None
    (tensors,) = bound_args(source)[0]
    x, result = tensors[index], shape(node)
    new: list[Any] = []
    for d, size in enumerate(reversed(result)):
        if d < len(shape(x)) and same_size(shape(x)[-1 - d], size):
            new.append(-1)
        elif isinstance(size, int):
            new.append(size)
        else:
            like = next(t for t in tensors if d < len(shape(t)) and same_size(shape(t)[-1 - d], size))
            new.append(sizes(graph, like)[-1 - d])
    if new == [-1] * len(shape(x)):
        return graph.call_function(aten.alias.default, (x,))
    return graph.call_function(aten.expand.default, (x, new[::-1]))


def _flat_loss(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Classes in dim 1 of more than two, indices as targets: in dim 1 of two."""
    x, target, *rest = bound_args(node)[0]
    rank = len(shape(x))
    if rank <= 2 or val(target).is_floating_point():
        return None
    last = call(graph, aten.permute.default, x, [0, *range(2, rank), 1])
    flat = call(graph, aten.flatten.using_ints, last, 0, rank - 2)
    flat_target = call(graph, aten.flatten.using_ints, target)
    loss = call(graph, node.target, flat, flat_target, *rest)
    return (
        loss
        if len(shape(node)) == 0
        else graph.call_function(aten.view.default, (loss, sizes(graph, target)))
    )


def _total(mean: bool) -> Spell:
    def spell(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
        (x,), options = bound_args(node)
        dtype = val(node).dtype
        if (
            len(shape(x)) < 3
            or not dtype.is_floating_point
            or options.get("dtype") not in (None, val(x).dtype)
        ):
            return None
        return _in_two_steps(graph, x, mean, dtype)

    return spell


def _in_two_steps(graph: fx.Graph, x: fx.Node, mean: bool, dtype: torch.dtype) -> fx.Node:
    """Over the last dim, then over the rest; in between, half precision isn't rounded."""
    wide = torch.promote_types(dtype, torch.float32)
    over_last = aten.mean.dim if mean else aten.sum.dim_IntList
    over_rest = aten.mean.default if mean else aten.sum.default
    if len(shape(x)) >= 3:
        x = call(graph, over_last, x, [-1], dtype=wide)
    total = call(graph, over_rest, x)
    return total if val(total).dtype == dtype else graph.call_function(aten.to.dtype, (total, dtype))


def _unreduced(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A loss between two values of one shape, its reduction apart."""
    args, options = bound_args(node)
    schema = schema_of(node)
    assert schema is not None
    at = next(i for i, argument in enumerate(schema.arguments) if argument.name == "reduction")
    if args[at] == 0:
        return None
    each = call(graph, node.target, *args[:at], 0, *args[at + 1 :], **options)
    return _in_two_steps(graph, each, args[at] == 1, val(node).dtype)


CANONICAL: dict[Any, Spell] = {
    aten.type_as.default: _cast_like,
    aten.to.other: _cast_like,
    aten.zeros.default: _zeros_or_ones(0),
    aten.ones.default: _zeros_or_ones(1),
    aten.new_zeros.default: _filled(0),
    aten.new_ones.default: _filled(1),
    aten.new_full.default: _filled(None),
    aten.new_empty.default: _empty,
    aten.slice.Tensor: _whole,
    aten.index.Tensor: _lookup,
    aten.cat.default: join_lookups,
    operator.getitem: _broadcast_item,
    aten.cross_entropy_loss.default: _flat_loss,
    aten.nll_loss_nd.default: _flat_loss,
    aten.sum.default: _total(mean=False),
    aten.mean.default: _total(mean=True),
    **dict.fromkeys((getattr(aten, name).default for name in ELEMENTWISE_LOSSES), _unreduced),
}
