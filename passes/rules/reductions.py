"""Operations over some dims of a value: fine over plain dims, refused over rows, positions and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..layout import KEY, Dim, is_token_factor, plain
from ..reasons import Unsupported
from ..softmax_forms import softmax_with_sink
from .common import (
    PROLOGUE,
    WEIGHT,
    Op,
    Operand,
    Outcome,
    broadcast,
    mixing,
    normalize_dims,
    operands_in,
    refuse,
    register,
)

aten = torch.ops.aten


def reduction_rule(
    op: Op, x: Operand, dim: Any = None, keepdim: bool = False, *_: Any, **__: Any
) -> Outcome | Unsupported:
    """sum, mean, amax, logsumexp, argmax, any, …: over plain dims."""
    return _reduced(op, x, normalize_dims(dim, x.tokens.rank), keepdim)


def full_reduction_rule(op: Op, x: Operand, *_: Any, **__: Any) -> Outcome | Unsupported:
    return mixing(x.tokens, range(x.tokens.rank), f"`{op.name}` over everything")


def norm_rule(
    op: Op, x: Operand, p: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Outcome | Unsupported:
    """norm, linalg_vector_norm: like a reduction, with the order before the dims."""
    return _reduced(op, x, normalize_dims(dim, x.tokens.rank), keepdim)


def variance_rule(
    op: Op, x: Operand, dim: Any = None, *args: Any, keepdim: bool = False, **_: Any
) -> Outcome | Unsupported:
    """var, std and var_mean; the overload with `unbiased` has `keepdim` after it."""
    if isinstance(dim, bool):
        dim = None
    keepdim = keepdim or (len(args) > 1 and bool(args[1]))
    return _reduced(op, x, normalize_dims(dim, x.tokens.rank), keepdim)


def _reduced(op: Op, x: Operand, over: Sequence[int], keepdim: bool) -> Outcome | Unsupported:
    layout = x.tokens
    if any(layout.is_token_dim(d) for d in over):
        return mixing(layout, [d for d in over if layout.is_token_dim(d)], f"`{op.name}`")
    dims = tuple(() if d in over else dim for d, dim in enumerate(layout.dims) if keepdim or d not in over)
    out = layout.with_dims(dims)
    return Outcome((out,) * len(op.result) if isinstance(op.result, (list, tuple)) else out)


def along_rule(op: Op, x: Operand, dim: int = -1, *_: Any, **__: Any) -> Outcome | Unsupported:
    """softmax, log_softmax, cumsum, sort, flip, …: along plain dims, same shape. Softmax over keys is attention."""
    rank = x.tokens.rank
    over = normalize_dims(dim, rank)
    token_dims = [d for d in over if x.tokens.is_token_dim(d)]
    if token_dims and not (op.name in SOFTMAX and all(x.tokens.dims[d] == (KEY,) for d in token_dims)):
        return mixing(x.tokens, token_dims, f"`{op.name}`")
    many = isinstance(op.result, (list, tuple))
    return Outcome((x.tokens,) * len(op.result) if many else x.tokens)


def sink_rule(op: Op, x: Operand, sink: Operand, dim: int, *_: Any) -> Outcome | Unsupported:
    """`softmax_with_sink`: over keys it is attention; over plain dims, the sink broadcasts."""
    dim %= x.tokens.rank
    if x.tokens.dims[dim] == (KEY,) and sink.kind in (WEIGHT, PROLOGUE):  # which ones, the match says
        return Outcome(x.tokens)
    if x.tokens.is_token_dim(dim):
        return mixing(x.tokens, [dim], f"`{op.name}`")
    found = broadcast([x, sink])
    return found if isinstance(found, Unsupported) else Outcome(*found)


def roll_rule(op: Op, x: Operand, shifts: Any, dims: Any = ()) -> Outcome | Unsupported:
    return along_rule(op, x, dims)


def topk_rule(op: Op, x: Operand, k: int, dim: int = -1, *_: Any, **__: Any) -> Outcome | Unsupported:
    dim %= x.tokens.rank
    if x.tokens.is_token_dim(dim):
        return mixing(x.tokens, [dim], "topk")
    dims = list(x.tokens.dims)
    dims[dim] = plain(k)
    return Outcome((x.tokens.with_dims(dims),) * 2)


def layer_norm_rule(
    op: Op, x: Operand, normalized: Sequence[int], *parameters: Any, **_: Any
) -> Outcome | Unsupported:
    """layer_norm, rms_norm: over the last dims, which must be plain; scale and bias broadcast along them."""
    over = range(x.tokens.rank - len(normalized), x.tokens.rank)
    if any(x.tokens.is_token_dim(d) for d in over):
        return mixing(x.tokens, [d for d in over if x.tokens.is_token_dim(d)], f"`{op.name}`")
    if any(p.kind == "stream" for p in operands_in(parameters)):
        return refuse("unknown_op", f"`{op.name}` with a scale computed from tokens")
    if isinstance(op.result, (list, tuple)):  # with the statistics, which keep the normalized dims as ones
        statistics = x.tokens.with_dims([() if d in over else dim for d, dim in enumerate(x.tokens.dims)])
        return Outcome((x.tokens, *(statistics for _ in op.result[1:])))
    return Outcome(x.tokens)


def batch_norm_rule(op: Op, x: Operand, *_: Any, **__: Any) -> Outcome | Unsupported:
    return refuse("row_mixing", f"`{op.name}` may use statistics of the whole batch")


def pad_rule(op: Op, x: Operand, pad: Sequence[int], *_: Any, **__: Any) -> Outcome | Unsupported:
    """Padding of plain dims (the list runs from the last dim backwards, two numbers a dim)."""
    dims: list[Dim] = list(x.tokens.dims)
    for i in range(len(pad) // 2):
        d = x.tokens.rank - 1 - i
        if pad[2 * i] == 0 and pad[2 * i + 1] == 0:
            continue
        if x.tokens.is_token_dim(d):
            return mixing(x.tokens, [d], f"`{op.name}`")
        dims[d] = plain(op.shape[d])
    return Outcome(x.tokens.with_dims(dims))


def one_hot_rule(op: Op, x: Operand, classes: int = -1) -> Outcome | Unsupported:
    if classes < 0:
        return refuse("row_mixing", "one_hot without a number of classes looks at the whole batch")
    return Outcome(x.tokens.with_dims((*x.tokens.dims, plain(classes))))


def distance_rule(op: Op, a: Operand, b: Operand, dim: int = 1, *_: Any, **__: Any) -> Outcome | Unsupported:
    """cosine_similarity: broadcast, then reduce one plain dim."""
    found = broadcast([a, b])
    if isinstance(found, Unsupported):
        return found
    layout, columns = found
    dim %= layout.rank
    if any(map(is_token_factor, layout.dims[dim])):
        return mixing(layout, [dim], f"`{op.name}`")
    return Outcome(layout.with_dims(layout.dims[:dim] + layout.dims[dim + 1 :]), columns)


SOFTMAX = ("softmax", "_softmax", "_safe_softmax", "special_softmax")

register(
    reduction_rule, aten.sum.dim_IntList, aten.mean.dim, aten.amax, aten.amin, aten.prod.dim_int, aten.logsumexp,
    aten.argmax, aten.argmin, aten.any.dim, aten.any.dims, aten.all.dim, aten.all.dims, aten.max.dim, aten.min.dim,
    aten.median.dim, aten.count_nonzero.dim_IntList, aten.special_logsumexp,
)  # fmt: skip
register(
    full_reduction_rule, aten.sum.default, aten.mean.default, aten.max.default, aten.min.default, aten.any.default,
    aten.all.default, aten.prod.default, aten.norm.Scalar, aten.std.default, aten.var.default, aten.median.default,
    aten.bincount, aten.unique_dim, aten._unique2, aten.nonzero, aten.item, aten._local_scalar_dense,
)  # fmt: skip
register(
    norm_rule,
    aten.norm.ScalarOpt_dim,
    aten.norm.ScalarOpt_dim_dtype,
    aten.linalg_vector_norm,
    aten.linalg_norm,
)
register(variance_rule, aten.var.dim, aten.var.correction, aten.std.dim, aten.std.correction)
register(variance_rule, aten.var_mean.dim, aten.var_mean.correction)
register(
    along_rule, aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax, aten.log_softmax,
    aten._log_softmax, aten.special_log_softmax, aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.cummax,
    aten.cummin, aten.flip,
)  # fmt: skip
register(sink_rule, softmax_with_sink)
register(roll_rule, aten.roll)
register(topk_rule, aten.topk)
register(layer_norm_rule, aten.layer_norm, aten.rms_norm, aten.native_layer_norm, aten._fused_rms_norm)
register(batch_norm_rule, aten.batch_norm, aten.native_batch_norm, aten.instance_norm, aten.group_norm)
register(batch_norm_rule, aten._native_batch_norm_legit, aten._batch_norm_impl_index)
register(pad_rule, aten.constant_pad_nd, aten.pad)
register(one_hot_rule, aten.one_hot)
register(distance_rule, aten.cosine_similarity)
