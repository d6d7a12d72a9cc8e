"""Matrix products: with weights, over plain dims; and the two of attention, whose scores have a KEY dim."""

from __future__ import annotations

from typing import Any

import torch

from ..layout import KEY, POSITION, ROW, Dim, TokenLayout, is_token_factor, plain
from ..reasons import Unsupported
from .common import (
    STREAM,
    WEIGHT,
    Op,
    Operand,
    Outcome,
    aligned_dims,
    broadcast,
    is_per_row,
    mixing,
    refuse,
    register,
)

aten = torch.ops.aten


def linear_rule(op: Op, x: Operand, weight: Operand, bias: Operand | None = None) -> Outcome | Unsupported:
    if not isinstance(x, Operand) or x.kind != STREAM or weight.kind == STREAM:
        return refuse("token_mixing", "a linear layer whose weight is computed from tokens")
    if bias is not None and bias.kind == STREAM:
        return refuse("unknown_op", "a linear layer whose bias is computed from tokens")
    if x.tokens.is_token_dim(x.tokens.rank - 1):
        return mixing(x.tokens, [x.tokens.rank - 1], "a linear layer")
    tail = (plain(weight.shape[0]),) if len(weight.shape) == 2 else ()
    return Outcome(x.tokens.with_dims((*x.tokens.dims[:-1], *tail)))


def addmm_rule(
    op: Op, bias: Operand, x: Operand, weight: Operand, *_: Any, **__: Any
) -> Outcome | Unsupported:
    """`bias + x @ weight`, for baddbmm too; the bias broadcasts against the product."""
    if STREAM not in (x.kind, weight.kind):
        return refuse("unknown_op", f"`{op.name}` adds tokens to a product without tokens")
    found = matmul_rule(op, x, weight)
    if isinstance(found, Unsupported):
        return found
    assert isinstance(found.layout, TokenLayout)
    if found.action != "emit":
        return refuse("unknown_op", f"`{op.name}` adds to the result of attention")
    both = broadcast([bias, Operand(op.node, STREAM, op.shape, found.layout)])
    return both if isinstance(both, Unsupported) else Outcome(both[0], found.columns | both[1])


def matmul_rule(op: Op, a: Operand, b: Operand, *_: Any) -> Outcome | Unsupported:
    """`a @ b`: plain contraction; query·key gives scores with a KEY dim; probabilities @ values is attention."""
    if len(a.shape) < 2 or len(b.shape) < 2:
        return _vector_rule(op, a, b)
    batch = broadcast([_batch(a), _batch(b)], rank=max(len(a.shape), len(b.shape)) - 2)
    if isinstance(batch, Unsupported):
        return batch
    layout, columns = batch
    rows, inner_a, inner_b, cols = _dim(a, -2), _dim(a, -1), _dim(b, -2), _dim(b, -1)
    for o in (a, b):
        if o.kind not in (STREAM, WEIGHT) and (aligned := columns.get(o.node)):
            columns[o.node] = (*aligned, plain(o.shape[-2]), plain(o.shape[-1]))
    if KEY in (*inner_a, *inner_b) or (POSITION in rows and POSITION in cols):
        if not layout.selection.is_whole:
            return refuse("token_mixing", "attention over a slice of the tokens")
    if inner_a == (KEY,):
        if inner_b != (POSITION,) or POSITION in cols or not {a.kind, b.kind} == {STREAM}:
            return refuse(
                "token_mixing", "probabilities over keys are multiplied with something other than values"
            )
        return Outcome(layout.with_dims((*layout.dims, rows, cols)), action="attention")
    for operand, inner in ((a, inner_a), (b, inner_b)):
        if any(is_token_factor(f) for f in inner):
            assert operand.layout is not None
            return mixing(
                operand.layout, [operand.layout.rank + (-1 if operand is a else -2)], f"`{op.name}`"
            )
    if POSITION in cols and (POSITION in rows or layout.has(POSITION)):
        if rows != (POSITION,) or cols != (POSITION,) or a.node is b.node:
            return refuse("token_mixing", "tokens meet other tokens in a product that isn't query times key")
        cols = (KEY,)
    dims = (*layout.dims, rows, cols)
    if any(map(is_per_row, columns.values())):
        return refuse("row_layout", f"`{op.name}` with a matrix per row, which has no dim for positions")
    return _checked(layout, dims, columns, op)


def _vector_rule(op: Op, a: Operand, b: Operand) -> Outcome | Unsupported:
    if (
        a.kind == STREAM
        and len(b.shape) == 1
        and b.kind != STREAM
        and not a.tokens.is_token_dim(a.tokens.rank - 1)
    ):
        return Outcome(a.tokens.with_dims(a.tokens.dims[:-1]))
    return refuse("token_mixing", f"`{op.name}` with a vector over tokens")


def _checked(layout: TokenLayout, dims: tuple[Dim, ...], columns: dict, op: Op) -> Outcome | Unsupported:
    from ..layout import is_well_formed

    if not is_well_formed(dims):
        return refuse("row_mixing", f"`{op.name}` multiplies rows of the batch with other rows")
    return Outcome(layout.with_dims(dims), columns)


def _batch(o: Operand) -> Operand:
    layout = o.layout.with_dims(o.layout.dims[:-2]) if o.layout else None
    return Operand(o.node, o.kind, o.shape[:-2], layout)


def _dim(o: Operand, d: int) -> Dim:
    return o.layout.dims[d] if o.layout else plain(o.shape[d])


def einsum_rule(op: Op, equation: str, tensors: list[Operand], **_: Any) -> Outcome | Unsupported:
    """einsum whose token labels are kept by the result and are the same dims in every operand."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or any(len(set(t)) != len(t) for t in terms):
        return refuse("unknown_op", f"einsum {equation!r} has no rule")
    labels: dict[str, Dim] = {}
    streams = [t for t in tensors if t.kind == STREAM]
    for term, tensor in zip(terms, tensors, strict=True):
        if tensor.kind == STREAM:
            for label, dim in zip(term, tensor.tokens.dims, strict=True):
                if labels.setdefault(label, dim) != dim:
                    return refuse("token_mixing", f"einsum {equation!r} matches token dims with others")
    for label, dim in labels.items():
        if any(is_token_factor(f) for f in dim) and label not in output:
            return refuse("token_mixing", f"einsum {equation!r} sums over rows or positions")
    if any(t.tokens.selection is not streams[0].tokens.selection for t in streams):
        return refuse("token_mixing", "einsum of different tokens")
    for term, tensor in zip(terms, tensors, strict=True):
        if tensor.kind != STREAM:
            if any(is_token_factor(f) for label in term for f in labels.get(label, ())):
                return refuse("row_layout", f"einsum {equation!r} matches a constant with token dims")
            for label, size in zip(term, tensor.shape, strict=True):
                labels.setdefault(label, plain(size))
    sized = zip(output, op.shape, strict=True)  # a plain label may have size 1 here and another size there
    dims = tuple(
        labels[label] if any(is_token_factor(f) for f in labels[label]) else plain(size)
        for label, size in sized
    )
    token_labels = {label for label, dim in labels.items() if any(is_token_factor(f) for f in dim)}
    if len({f for label in token_labels for f in labels[label]}) != sum(
        len(labels[lb]) for lb in token_labels
    ):
        return refuse("token_mixing", f"einsum {equation!r} lets tokens meet other tokens")
    return Outcome(streams[0].tokens.with_dims(dims))


def sdpa_rule(
    op: Op, q: Operand, k: Operand, v: Operand, mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Outcome | Unsupported:  # fmt: skip
    """Attention over positions; its mask and dropout are checked when it is matched (attention_match.py)."""
    if not all(isinstance(o, Operand) and o.kind == STREAM for o in (q, k, v)):
        return refuse("token_mixing", "attention between tokens and something that isn't computed from them")
    if q.tokens.dims[-2] != (POSITION,):
        if dropout_p and op.dropout != "shared":
            return refuse(
                "randomness", f"attention dropout with p={dropout_p}", "set it to 0 or call model.eval()"
            )
        return _token_local_attention(op, q, k, v, mask)
    if k.tokens.dims[-2] != (POSITION,) or v.tokens.dims[-2] != (POSITION,):
        return refuse("token_mixing", "attention whose keys aren't the positions of the queries")
    for o in (q, k, v):
        if o.tokens.is_token_dim(o.tokens.rank - 1) or not _leads_with_row(o.tokens):
            return refuse("row_mixing", f"attention over the layout {o.tokens}: rows are not its batch dim")
        if not o.tokens.selection.is_whole:
            return refuse("token_mixing", "attention over a slice of the tokens")
    for o in (k, v):  # heads may be grouped or broadcast, rows have to stand where those of the queries do
        if [_tokens(d) for d in o.tokens.dims[:-2]] != [_tokens(d) for d in q.tokens.dims[:-2]]:
            return refuse("row_layout", f"attention between the layouts {q.tokens} and {o.tokens}")
    dims = (*q.tokens.dims[:-1], v.tokens.dims[-1])
    return Outcome(q.tokens.with_dims(dims), action="attention")


def _tokens(dim: Dim) -> Dim:
    return tuple(filter(is_token_factor, dim))


def _leads_with_row(layout: TokenLayout) -> bool:
    return (
        bool(layout.dims[0])
        and layout.dims[0][0] == ROW
        and not any(POSITION in dim for dim in layout.dims[:-2])
    )


def _token_local_attention(op: Op, q: Operand, k: Operand, v: Operand, mask: Any) -> Outcome | Unsupported:
    """Attention within a token (over depth, say): tokens are in the batch dims."""
    if any(o.tokens.is_token_dim(d) for o in (q, k, v) for d in (-2 % o.tokens.rank, -1 % o.tokens.rank)):
        return refuse("token_mixing", "attention over rows, or whose queries aren't positions")
    if any(o.tokens.dims[:-2] != q.tokens.dims[:-2] for o in (k, v)):
        return refuse("token_mixing", "attention within a token whose batch dims differ")
    if isinstance(mask, Operand) and (mask.kind == STREAM or aligned_dims(mask.shape[:-2], _head(q))):
        return refuse("mask_not_understood", "attention within a token with a mask by token")
    return Outcome(q.tokens.with_dims((*q.tokens.dims[:-1], v.tokens.dims[-1])))


def _head(o: Operand) -> TokenLayout:
    return o.tokens.with_dims(o.tokens.dims[:-2])


def recurrent_rule(op: Op, *args: Any, **kwargs: Any) -> Unsupported:
    return refuse("token_mixing", f"`{op.name}` carries state from token to token or reads its neighbours")


register(linear_rule, aten.linear.default)
register(matmul_rule, aten.matmul, aten.mm, aten.bmm, aten.mv)
register(addmm_rule, aten.addmm, aten.baddbmm)

register(einsum_rule, aten.einsum.default)
register(sdpa_rule, aten.scaled_dot_product_attention.default)
register(
    recurrent_rule, aten.conv1d, aten.conv2d, aten.convolution, aten._convolution, aten.lstm, aten.gru, aten.rnn_tanh,
    aten.rnn_relu, aten.unfold, aten.im2col, aten.max_pool1d, aten.avg_pool1d, aten.index_put, aten.index_add,
    aten.index_copy, aten.searchsorted, aten.cdist, aten.cov,
    aten.corrcoef, aten.outer, aten.kron, aten.tril, aten.triu, aten.diagonal, aten.trace, aten.adaptive_avg_pool1d,
    aten.linalg_solve, aten.fft_fft, aten.fft_rfft, aten.fft_fft2, aten.fft_fftn, aten.stft,
)  # fmt: skip
