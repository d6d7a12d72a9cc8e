"""Softmaxes in another spelling → `softmax`, and `softmax_with_sink` for one with a score that has no value.

    softmax(x - x.max(dim, keepdim=True))         →  softmax(x)
    softmax(cat([x, sink], dim), dim)[..., :-1]   →  softmax_with_sink(x, sink, dim)

Attention sinks are written so: a score for each head that takes part in the softmax, and whose weight is cut off
again. The operator keeps the tensor's sizes, so that weights stay weights over keys.

Where a write or a switch of grad mode or autocast lies in between, nothing is rewritten.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.library import Library

from .graph import aten, bound_args, is_anything_between, same_size, shape, val

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


SOFTMAXES: dict[Any, Callable[[fx.Graph, fx.Node], fx.Node | None]] = {
    aten.softmax.int: without_max,
    aten.slice.Tensor: without_sink_column,
}
