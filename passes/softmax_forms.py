"""Softmaxes in another spelling → `softmax`, and `softmax_with_sink` for one with a score that has no value.

    softmax(x - x.max(dim, keepdim=True))         →  softmax(x)
    softmax(cat([x, sink], dim), dim)[..., :-1]   →  softmax_with_sink(x, sink, dim)
    softmax(x) @ v * sigmoid(logsumexp(x) - sink) →  softmax_with_sink(x, sink, -1) @ v

Attention sinks are written so: a score for each head that takes part in the softmax, and whose weight is cut off
again; or the share of all weights that this score leaves to the keys. The operator keeps the tensor's sizes, so that
weights stay weights over keys.

Where a write or a switch of grad mode or autocast lies in between, nothing is rewritten.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.library import Library

from .aliasing import is_anything_between
from .graph import (
    aten,
    bound_args,
    call,
    is_cast,
    is_inactive_dropout,
    is_tensor,
    same_shape,
    same_size,
    shape,
    val,
)

_LIBRARY = Library("pgcompile", "FRAGMENT")
_LIBRARY.define("softmax_with_sink(Tensor x, Tensor sink, int dim, ScalarType? dtype=None) -> Tensor")


def _softmax_with_sink(
    x: torch.Tensor, sink: torch.Tensor, dim: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`softmax(cat([x, sink], dim), dim)` without the last entry; `sink` broadcasts to size 1 in `dim`."""
    sizes = list(x.shape)
    sizes[dim] = 1
    weights = torch.softmax(torch.cat([x, sink.expand(sizes)], dim), dim, dtype)
    return weights.narrow(dim, 0, x.shape[dim])


_LIBRARY.impl("softmax_with_sink", _softmax_with_sink, "CompositeImplicitAutograd")
softmax_with_sink = torch.ops.pgcompile.softmax_with_sink.default


def without_max(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A softmax doesn't depend on what is subtracted from all of its entries."""
    x, dim, *rest = bound_args(node)[0]
    if x.target is not aten.sub.Tensor or x.kwargs.get("alpha", 1) != 1:
        return None
    scores, top = x.args
    while isinstance(top, fx.Node) and top.target in (aten.detach.default, aten.alias.default):
        top = top.args[0]
    if not _is_max_of(top, scores, dim) or is_anything_between(x, node):
        return None
    return graph.call_function(aten.softmax.int, (scores, dim, *rest))


def _is_max_of(top: Any, x: Any, dim: int) -> bool:
    """Is `top` the maximum of `x` along `dim`, with that dim kept?"""
    if not isinstance(top, fx.Node) or not isinstance(x, fx.Node):
        return False
    if top.target is operator.getitem and top.args[1] == 0:
        top = top.args[0]
        if top.target is not aten.max.dim:
            return False
    elif top.target is not aten.amax.default:
        return False
    source, over, keepdim = bound_args(top)[0]
    dims = [over] if isinstance(over, int) else list(over)
    rank = len(shape(x))
    return source is x and keepdim and [d % rank for d in dims] == [dim % rank]


# Starts, ends and steps of a slice that takes all, as in the first dim of `x[:, :n]`.
_EVERYTHING = [(start, end, 1) for start in (None, 0) for end in (None, sys.maxsize)]


def without_sink_column(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The slice that cuts the last weight off, where that is a column of its own before the softmax."""
    weights, at, start, end, step = bound_args(node)[0]
    while weights.target is aten.slice.Tensor and bound_args(weights)[0][2:] in _EVERYTHING:
        weights = weights.args[0]
    if weights.target is not aten.softmax.int or step != 1 or start not in (None, 0):
        return None
    joined, dim, dtype = bound_args(weights)[0]
    if not isinstance(joined, fx.Node) or joined.target is not aten.cat.default:
        return None
    rank = len(shape(weights))
    parts, along = bound_args(joined)[0]
    if len(parts) != 2 or not at % rank == dim % rank == along % rank or is_anything_between(joined, node):
        return None
    x, sink = parts
    end = val(end) if isinstance(end, fx.Node) else end
    if not same_size(shape(sink)[dim], 1) or not (end == -1 or same_size(end, shape(x)[dim])):
        return None
    while sink.target is aten.expand.default and len(shape(sink.args[0])) == rank:
        sink = sink.args[0]  # the operator broadcasts
    return graph.call_function(softmax_with_sink, (x, sink, dim % rank, dtype))


def without_sink_gate(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Attention's output, times the share that a sink leaves to keys.

    Where all scores are minus infinity, that is NaN, and zero by the operator.
    """
    factors: Any = node.args
    for output, gate in itertools.permutations(factors):
        if not is_tensor(output) or output.target not in (aten.matmul.default, aten.bmm.default):
            continue
        softmax, *between = _since_softmax(output.args[0])
        if softmax.target is not aten.softmax.int or not same_shape(output, node):
            continue
        x, dim, _ = bound_args(softmax)[0]
        last = len(shape(x)) - 1
        if dim not in (last, -1) or is_anything_between(x, node):
            continue
        sink = _sink_of_gate(graph, gate, x)
        if sink is None:
            continue
        new = graph.call_function(softmax_with_sink, (x, sink, last, val(softmax).dtype))
        new.meta = dict(softmax.meta)
        for old in (*between, output):
            weights, new = new, graph.node_copy(old)
            new.update_arg(0, weights)
        wide = val(node).dtype
        return new if val(output).dtype == wide else graph.call_function(aten.to.dtype, (new, wide))
    return None


def _since_softmax(weights: Any) -> list[Any]:
    """The softmax, and what becomes of its weights until they meet values."""
    found = [weights]
    while is_cast(found[0]) or is_inactive_dropout(found[0]):
        found.insert(0, found[0].args[0])
    return found


def _sink_of_gate(graph: fx.Graph, gate: Any, x: fx.Node) -> fx.Node | None:
    """The sink in `sigmoid(logsumexp(x, -1) - sink)`, broadcasting to size 1 in the last dim."""
    rank = len(shape(x))
    if not is_tensor(gate) or len(shape(gate)) != rank:
        return None
    share = _before_casts(gate)
    if share.target is not aten.sigmoid.default:
        return None
    difference = _before_casts(share.args[0])
    if difference.target is not aten.sub.Tensor or difference.kwargs.get("alpha", 1) != 1:
        return None
    minuend, sink = difference.args
    if not is_tensor(minuend) or not is_tensor(sink):
        return None
    total = _before_casts(minuend)
    if total.target is not aten.logsumexp.default:
        return None
    source, dims, _ = bound_args(total)[0]
    if source is not x or [d % rank for d in dims] != [rank - 1] or not same_shape(minuend, difference):
        return None
    return sink if len(shape(difference)) == rank else call(graph, aten.unsqueeze.default, sink, -1)


def _before_casts(node: Any) -> Any:
    """The node before casts, and before a last dim of size 1 was added."""
    while is_cast(node) or (
        node.target is aten.unsqueeze.default and node.args[1] in (-1, len(shape(node)) - 1)
    ):
        node = node.args[0]
    return node


SOFTMAXES: dict[Any, Callable[[fx.Graph, fx.Node], fx.Node | None]] = {
    aten.softmax.int: without_max,
    aten.slice.Tensor: without_sink_column,
    aten.mul.Tensor: without_sink_gate,
}
