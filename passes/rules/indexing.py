"""Slices, selects and lookups: over plain dims, or a cut of tokens (exact, but nothing may attend to it any more)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..layout import POSITION, ROW, Dim, is_token_factor, plain
from ..reasons import Unsupported
from .common import (
    DENSE,
    PROLOGUE,
    STREAM,
    WEIGHT,
    Op,
    Operand,
    Outcome,
    aligned_dims,
    guard_same_size,
    mixing,
    refuse,
    register,
    same_size,
)

aten = torch.ops.aten


def slice_rule(
    op: Op, x: Operand, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Outcome | Unsupported:
    """A slice of a plain dim, or a cut of rows or positions."""
    dim %= x.tokens.rank
    if x.tokens.is_token_dim(dim):
        if same_size(op.shape[dim], x.shape[dim]) and step == 1:
            return Outcome(x.tokens, action="alias")
        return _cut(op, x, dim, (dim, start, end, step))
    dims = list(x.tokens.dims)
    dims[dim] = plain(op.shape[dim])
    return Outcome(x.tokens.with_dims(dims))


def narrow_rule(op: Op, x: Operand, dim: int, start: Any, length: Any) -> Outcome | Unsupported:
    return slice_rule(op, x, dim, start, (start, length), 1)  # the end only tells cuts apart


def index_select_rule(op: Op, x: Operand, dim: int, index: Operand) -> Outcome | Unsupported:
    if index.kind == STREAM:
        return refuse("token_mixing", "an index computed from tokens picks along a dim")
    dim %= x.tokens.rank
    if x.tokens.is_token_dim(dim):
        return _cut(op, x, dim, (dim, index.node))
    dims = list(x.tokens.dims)
    dims[dim] = plain(op.shape[dim])
    return Outcome(x.tokens.with_dims(dims))


def _cut(op: Op, x: Operand, dim: int, key: Any) -> Outcome | Unsupported:
    """Keep some rows or positions. The packed tokens stay as they are; only the map from the batch to them changes."""
    refusal = _cut_refusal(op, x, dim)
    if refusal is not None:
        return refusal
    old, size = x.tokens.selection, op.shape[dim]
    is_row = x.tokens.dims[dim] == (ROW,)
    rows, positions = (size, old.positions) if is_row else (old.rows, size)
    map_dim = 0 if is_row or old.rows is None else 1
    selection = op.select(old, (op.name, is_row, key[1:]), rows, positions, map_dim)
    return Outcome(type(x.tokens)(x.tokens.dims, selection), action="alias")


def _cut_refusal(op: Op, x: Operand, dim: int) -> Unsupported | None:
    if op.before_mixer or x.tokens.dims[dim] not in ((ROW,), (POSITION,)):
        return mixing(x.tokens, [dim], f"`{op.name}`")
    selection = x.tokens.selection
    if (selection.rows is not None) != x.tokens.has(ROW) or (selection.positions is not None) != x.tokens.has(
        POSITION
    ):
        return mixing(x.tokens, [dim], f"`{op.name}` of a table")
    return None


def select_rule(op: Op, x: Operand, dim: int, index: Any) -> Outcome | Unsupported:
    """One index of a plain dim; or one row or one position of every row."""
    dim %= x.tokens.rank
    dims = x.tokens.dims[:dim] + x.tokens.dims[dim + 1 :]
    if not x.tokens.is_token_dim(dim):
        return Outcome(x.tokens.with_dims(dims))
    refusal = _cut_refusal(op, x, dim)
    if refusal is not None:
        return refusal
    old = x.tokens.selection
    if old.rows is None or old.positions is None:
        return mixing(x.tokens, [dim], "a single token")
    is_row = x.tokens.dims[dim] == (ROW,)
    if not is_row and (ROW,) not in x.tokens.dims:
        return mixing(x.tokens, [dim], "a position of rows that share a dim with others")
    rows, positions = (None, old.positions) if is_row else (old.rows, None)
    selection = op.select(old, ("select", is_row, index), rows, positions, 0 if is_row else 1)
    return Outcome(type(x.tokens)(dims, selection), action="drop_dim", detail=(x.tokens.dim_of(ROW), dim))


def index_rule(op: Op, x: Operand, indices: Sequence[Operand | None]) -> Outcome | Unsupported:
    """`x[rows, positions]` with indices computed from inputs: one token per row, or several."""
    given = {i: index for i, index in enumerate(indices) if index is not None}
    if not isinstance(x, Operand) or x.kind != STREAM:
        return _look_up(op, x, given)
    if any(o.kind not in (PROLOGUE, DENSE) or o.node.meta["val"].dtype == torch.bool for o in given.values()):
        return refuse("token_mixing", "an index computed from tokens, or a boolean mask, picks tokens")
    if all(not x.tokens.is_token_dim(d) for d in given) and len(given) == 1:
        ((dim, index),) = given.items()
        picked = (*x.tokens.dims[:dim], *map(plain, index.shape), *x.tokens.dims[dim + 1 :])
        return Outcome(x.tokens.with_dims(picked))
    if list(given) == [1] and x.tokens.dims[1] == (POSITION,) and len(given[1].shape) == 1:
        return _cut(op, x, 1, (1, given[1].node))
    if list(given) != [0, 1] or x.tokens.dims[:2] != ((ROW,), (POSITION,)):
        return refuse("token_mixing", f"`{op.name}` picks tokens in a way that has no rule")
    refusal = _cut_refusal(op, x, 0)
    if refusal is not None:
        return refusal
    rank = len(op.shape) - (x.tokens.rank - 2)
    old = x.tokens.selection
    key = ("index", *(o.node for o in given.values()))
    if rank == 1:
        selection = op.select(old, key, op.shape[0], None)
        dims: tuple[Dim, ...] = ((ROW,), *x.tokens.dims[2:])
        return Outcome(type(x.tokens)(dims, selection), action="drop_dim", detail=(0, 1))
    if rank == 2:
        selection = op.select(old, key, op.shape[0], op.shape[1])
        return Outcome(type(x.tokens)(x.tokens.dims, selection), action="alias")
    return refuse("token_mixing", "an index with more than two dims picks tokens")


def _look_up(op: Op, table: Operand, given: dict[int, Operand]) -> Outcome | Unsupported:
    """`weight[index]`: an entry of a parameter for each token."""
    index = given.get(0)
    if table.kind != WEIGHT or len(given) != 1 or index is None or index.node.meta["val"].dtype == torch.bool:
        return refuse("unknown_op", "a table is indexed by values computed from tokens")
    return Outcome(index.tokens.with_dims((*index.tokens.dims, *map(plain, table.shape[1:]))))


def gather_rule(op: Op, x: Operand, dim: int, index: Operand, **_: Any) -> Outcome | Unsupported:
    """gather along a plain dim. Labels give an entry of its token for each label of the batch."""
    if not isinstance(x, Operand) or x.kind != STREAM:
        return refuse("unknown_op", "a table is gathered by values computed from tokens")
    rank = x.tokens.rank
    dim %= rank
    if x.tokens.is_token_dim(dim):
        return mixing(x.tokens, [dim], "gather")
    # labels that the caller cuts have sizes of their own, as Dynamo sees it
    is_label = index.kind in (PROLOGUE, DENSE) and not op.before_mixer
    equal = guard_same_size if is_label else same_size
    if not all(equal(index.shape[d], x.shape[d]) for d in range(rank) if d != dim):
        return refuse("token_mixing", "gather by an index that is smaller than the tokens")
    dims = list(x.tokens.dims)
    dims[dim] = plain(op.shape[dim])
    if index.kind == STREAM:
        same = index.tokens.selection is x.tokens.selection and index.tokens.dims[:dim] == x.tokens.dims[:dim]
        if not same or index.tokens.dims[dim + 1 :] != x.tokens.dims[dim + 1 :]:
            return refuse("token_mixing", "gather by an index of other tokens")
        return Outcome(x.tokens.with_dims(dims))
    if op.before_mixer:
        aligned = aligned_dims(index.shape, x.tokens)
        columns = (
            {index.node: (*aligned[:dim], plain(index.shape[dim]), *aligned[dim + 1 :])} if aligned else {}
        )
        return Outcome(x.tokens.with_dims(dims), columns)
    if not is_label:
        return refuse("token_mixing", "gather by an index that isn't known from inputs alone")
    if dim != rank - 1 or not has_one_wide_dim(x):
        return refuse("token_mixing", "labels are gathered from a value of more than one plain dim")
    return Outcome(x.tokens, action="gather_entries", detail=index.node)


def has_one_wide_dim(x: Operand) -> bool:
    """All tokens of a selection, then one plain dim (the vocabulary): what labels are looked up in."""
    *leading, last = x.tokens.dims
    held = [f for dim in leading for f in dim]
    selection = x.tokens.selection
    wanted = {f for f, size in ((ROW, selection.rows), (POSITION, selection.positions)) if size is not None}
    return all(leading) and set(held) == wanted and not any(map(is_token_factor, last))


def embedding_rule(
    op: Op, weight: Operand, index: Operand, padding_idx: int = -1, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Outcome | Unsupported:  # fmt: skip
    """A lookup by integers that were computed from tokens."""
    if scale_grad_by_freq or sparse:
        hint = "turn scale_grad_by_freq and sparse off"
        return refuse("embedding_gradient", "the gradient counts how often a token occurs", hint)
    if not isinstance(index, Operand) or index.kind != STREAM or weight.kind == STREAM:
        return refuse("unknown_op", "an embedding whose table is computed from tokens")
    return Outcome(index.tokens.with_dims((*index.tokens.dims, plain(op.shape[-1]))))


register(slice_rule, aten.slice.Tensor)
register(narrow_rule, aten.narrow.default)
register(select_rule, aten.select.int)
register(index_select_rule, aten.index_select.default)
register(index_rule, aten.index.Tensor)
register(gather_rule, aten.gather.default)
register(embedding_rule, aten.embedding.default)
