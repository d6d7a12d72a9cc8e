"""Writes into part of a value, out of place: scatter, slice_scatter, select_scatter. Along plain dims only."""

from __future__ import annotations

from typing import Any

import torch

from ..aliasing import is_constant_fill
from ..layout import Dim, TokenLayout, is_token_factor, plain
from ..reasons import Unsupported
from .common import (
    DENSE,
    PROLOGUE,
    STREAM,
    Op,
    Operand,
    Outcome,
    aligned_dims,
    mixing,
    refuse,
    register,
    same_selection,
    same_size,
)

aten = torch.ops.aten


def scatter_rule(
    op: Op, x: Operand, dim: int, index: Operand, src: Any, *_: Any, **__: Any
) -> Outcome | Unsupported:
    """scatter, scatter_add, scatter_reduce: `x[n, s, index[n, s, i]] = src[n, s, i]`."""
    rank = len(x.shape)
    dim %= rank or 1
    parts = [o for o in (x, index, src) if isinstance(o, Operand) and o.shape]
    if any(len(o.shape) != rank for o in parts):
        return refuse("unknown_op", f"`{op.name}` of a single number")
    return _merged(op, parts, dim, plain(x.shape[dim]))


def slice_scatter_rule(op: Op, x: Operand, src: Operand, dim: int = 0, *_: Any) -> Outcome | Unsupported:
    dim %= len(x.shape)
    return _merged(op, [x, src], dim, plain(x.shape[dim]))


def select_scatter_rule(op: Op, x: Operand, src: Operand, dim: int, index: Any) -> Outcome | Unsupported:
    dim %= len(x.shape)
    layout = src.layout
    if layout is not None:
        layout = layout.with_dims((*layout.dims[:dim], (), *layout.dims[dim:]))
    wide = Operand(src.node, src.kind, (*src.shape[:dim], 1, *src.shape[dim:]), layout)
    found = _merged(op, [x, wide], dim, plain(x.shape[dim]), same_rank=False)
    if isinstance(found, Unsupported) or src.node not in found.columns:
        return found
    narrow = found.columns[src.node]
    return Outcome(found.layout, found.columns | {src.node: (*narrow[:dim], *narrow[dim + 1 :])})


def _merged(
    op: Op, parts: list[Operand], dim: int, written: Dim, same_rank: bool = True
) -> Outcome | Unsupported:
    """The first part, with some of its entries along `dim` replaced: the other dims must be those of the tokens.

    A constant has no tokens and needs no column: it is filled in anew, as large as the packed tokens are.
    """
    streams = [o for o in parts if o.kind == STREAM]
    selection = same_selection(streams)
    if isinstance(selection, Unsupported):
        return selection
    if any(o.tokens.is_token_dim(dim) for o in streams):
        worst = next(o for o in streams if o.tokens.is_token_dim(dim))
        return mixing(worst.tokens, [dim], f"`{op.name}`")
    dims = list(streams[0].tokens.dims)
    for o in streams[1:]:
        for d, (a, b) in enumerate(zip(dims, o.tokens.dims, strict=True)):
            if d != dim and a != b and any(map(is_token_factor, (*a, *b))):
                return refuse("token_mixing", f"`{op.name}` writes tokens over other tokens")
    for d, size in enumerate(parts[0].shape):
        if not any(map(is_token_factor, dims[d])):
            dims[d] = plain(size)
    dims[dim] = written
    layout = TokenLayout(tuple(dims), selection)
    columns = {}
    is_constant = parts[0].kind in (PROLOGUE, DENSE) and is_constant_fill(parts[0].node)
    is_filled = is_constant and same_rank
    for o in parts:
        if o.kind == STREAM:
            continue
        own = tuple(plain(s) if d == dim else dims[d] for d, s in enumerate(o.shape))
        whole = all(same_size(s, _size(layout, d)) for d, s in enumerate(o.shape) if layout.is_token_dim(d))
        if is_filled and whole and o is parts[0]:
            continue
        if o.kind != PROLOGUE or not whole or not aligned_dims(o.shape, layout) or not selection.is_whole:
            return refuse(
                "row_layout", f"`{op.name}` joins tokens with a value that has none", operand=o.node
            )
        columns[o.node] = tuple(
            d if any(map(is_token_factor, d)) else plain(s) for d, s in zip(own, o.shape, strict=True)
        )
    return Outcome(layout, columns, action="filled" if is_filled else "emit")


def _size(layout: TokenLayout, d: int) -> Any:
    size: Any = 1
    for factor in layout.dims[d]:
        size = size * layout.selection.size(factor)
    return size


register(scatter_rule, aten.scatter, aten.scatter_add, aten.scatter_reduce)
register(slice_scatter_rule, aten.slice_scatter.default)
register(select_scatter_rule, aten.select_scatter.default)
