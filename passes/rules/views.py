"""Views and shape changes: dims are followed by index; sizes in arguments become the packed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..layout import POSITION, ROW, Dim, is_plain_one, is_token_factor, is_well_formed, plain, view_dims
from ..reasons import Unsupported
from .common import WEIGHT, Op, Operand, Outcome, broadcast, mixing, operands_in, refuse, register, same_size

aten = torch.ops.aten


def view_rule(op: Op, x: Operand, *_: Any, **__: Any) -> Outcome | Unsupported:
    """view, reshape, flatten, unflatten: factors keep their row-major order and are dealt out anew."""
    dims = view_dims(x.tokens, op.shape)
    if dims is None:
        return refuse(
            "token_mixing", f"`{op.name}` to {list(op.shape)} tears rows or positions of {x.tokens} apart"
        )
    if any(not is_token_factor(f) and not isinstance(f, int) for dim in dims for f in dim):
        return refuse("size_as_number", f"`{op.name}` makes a plain dim whose size depends on the batch")
    return Outcome(x.tokens.with_dims(dims), action="reshape")


def view_as_rule(op: Op, x: Operand, other: Operand) -> Outcome | Unsupported:
    if not isinstance(x, Operand) or x.layout is None:
        return refuse("row_layout", "a value without tokens is viewed in the shape of tokens")
    return view_rule(op, x)


def unsqueeze_rule(op: Op, x: Operand, dim: int) -> Outcome | Unsupported:
    dims = list(x.tokens.dims)
    dims.insert(dim % (len(dims) + 1), ())
    return Outcome(x.tokens.with_dims(dims))


def squeeze_rule(op: Op, x: Operand, dim: Any = None) -> Outcome | Unsupported:
    """Removes plain dims of size 1. A row or position dim of size 1 is still a token dim: not handled."""
    if dim is None:
        return refuse("row_layout", "squeeze without a dim drops a token dim when its size is 1")
    wanted = {d % x.tokens.rank for d in ([dim] if isinstance(dim, int) else dim)}
    if any(x.tokens.is_token_dim(d) for d in wanted):
        sizes_differ = all(not same_size(x.shape[d], 1) for d in wanted if x.tokens.is_token_dim(d))
        if not sizes_differ:
            return refuse("row_layout", "squeeze drops a row or position dim of size 1")
        return refuse("size_as_number", "squeeze of a token dim does nothing here, but would at size 1")
    dims = [d for i, d in enumerate(x.tokens.dims) if i not in wanted or not is_plain_one(d)]
    return Outcome(x.tokens.with_dims(dims))


def transpose_rule(op: Op, x: Operand, dim0: int, dim1: int) -> Outcome | Unsupported:
    dims = list(x.tokens.dims)
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return Outcome(x.tokens.with_dims(dims))


def t_rule(op: Op, x: Operand) -> Outcome | Unsupported:
    return Outcome(x.tokens.with_dims(x.tokens.dims[::-1]))


def matrix_transpose_rule(op: Op, x: Operand) -> Outcome | Unsupported:
    return transpose_rule(op, x, -2, -1)


def permute_rule(op: Op, x: Operand, order: Sequence[int]) -> Outcome | Unsupported:
    return Outcome(x.tokens.with_dims([x.tokens.dims[d] for d in order]))


def movedim_rule(op: Op, x: Operand, source: Any, destination: Any) -> Outcome | Unsupported:
    rank = x.tokens.rank
    sources = [s % rank for s in ([source] if isinstance(source, int) else source)]
    targets = [t % rank for t in ([destination] if isinstance(destination, int) else destination)]
    rest = iter([d for d in range(rank) if d not in sources])
    order = [sources[targets.index(d)] if d in targets else next(rest) for d in range(rank)]
    return permute_rule(op, x, order)


def expand_rule(op: Op, x: Operand, *_: Any, **__: Any) -> Outcome | Unsupported:
    """A dim of size 1 grows: to a plain size, or (for a table by position) to all rows of the batch."""
    shape = op.shape
    offset = len(shape) - x.tokens.rank
    dims: list[Dim] = []
    for d, size in enumerate(shape):
        dim = x.tokens.dims[d - offset] if d >= offset else ()
        if not is_plain_one(dim) and same_size(x.shape[d - offset], 1) and not same_size(size, 1):
            return refuse("row_mixing", f"`{op.name}` repeats the only row or position")
        if not is_plain_one(dim) or same_size(size, 1):
            dims.append(dim)
        elif isinstance(size, int) and not (d == 0 and _is_missing_row(x, size)):
            dims.append(plain(size))
        elif _is_missing_row(x, size):
            dims.append((ROW,))
        else:
            return refuse("size_as_number", "a dim grows to a size that depends on the batch")
    if not is_well_formed(dims):
        return refuse("token_mixing", "an expanded dim repeats the rows of the batch")
    return Outcome(x.tokens.with_dims(dims), action="expand")


def expand_as_rule(op: Op, x: Operand, other: Operand) -> Outcome | Unsupported:
    """`other` gives its sizes only; a value computed from inputs alone would have to be expanded on the dense batch."""
    if (
        isinstance(x, Operand)
        and x.kind == WEIGHT
        and isinstance(other, Operand)
        and other.layout is not None
    ):
        found = broadcast([x, other])
        return found if isinstance(found, Unsupported) else Outcome(found[0])
    if not isinstance(x, Operand) or x.layout is None:
        return refuse("row_layout", "a value without tokens is expanded to the shape of tokens")
    return expand_rule(op, x)


def _is_missing_row(x: Operand, size: Any) -> bool:
    """A table by position expanded to the number of rows; a wrong guess meets the stream elsewhere and is refused."""
    return x.tokens.has(POSITION) and not x.tokens.has(ROW) and same_size(size, x.tokens.selection.rows)


def cat_rule(op: Op, tensors: Sequence[Operand], dim: int = 0) -> Outcome | Unsupported:
    """cat along a plain dim; the other dims are those of the stream.

    An empty 1-D tensor is skipped, as cat does: a key-value cache begins as one.
    """
    tensors = [t for t in operands_in(tensors) if tuple(t.shape) != (0,)]
    if len(tensors) == 1:
        same = tensors[0].node.meta["val"].dtype == op.result.dtype  # else the empty one's dtype still counts
        return Outcome(tensors[0].tokens, action="alias" if same else "emit", detail=tensors[0].node)
    streams = [t for t in operands_in(tensors) if t.layout is not None]
    rank = streams[0].tokens.rank
    dim %= rank
    if any(s.tokens.is_token_dim(dim) for s in streams):
        worst = next(s for s in streams if s.tokens.is_token_dim(dim))
        if any(t.kind == "prologue" and len(t.shape) == 4 for t in tensors):
            return refuse(
                "kv_cache",
                "keys or values are appended to others that the caller gave",
            )
        return mixing(worst.tokens, [dim], "cat")
    others = [_without(t, dim) for t in operands_in(tensors)]
    found = broadcast(others)
    if isinstance(found, Unsupported):
        return found
    layout, columns = found
    if any(t.kind == "weight" for t in operands_in(tensors)) or any(
        s.tokens.dims[:dim] + s.tokens.dims[dim + 1 :] != layout.dims for s in streams
    ):
        return refuse("row_layout", "the tensors that cat joins have different token dims")
    dims = [*layout.dims[:dim], plain(op.shape[dim]), *layout.dims[dim:]]
    full = {node: (*c[:dim], _plain_dim(tensors, node, dim), *c[dim:]) for node, c in columns.items()}
    if len(full) + len(streams) != len(operands_in(tensors)):
        return refuse("row_layout", "cat joins tokens with a constant that has no token dims")
    return Outcome(layout.with_dims(dims), full)


def _without(t: Operand, dim: int) -> Operand:
    layout = t.layout.with_dims(t.layout.dims[:dim] + t.layout.dims[dim + 1 :]) if t.layout else None
    return Operand(t.node, t.kind, t.shape[:dim] + t.shape[dim + 1 :], layout)


def _plain_dim(tensors: Sequence[Operand], node: Any, dim: int) -> Dim:
    return plain(next(t.shape[dim] for t in operands_in(tensors) if t.node is node))


def stack_rule(op: Op, tensors: Sequence[Operand], dim: int = 0) -> Outcome | Unsupported:
    found = broadcast(operands_in(tensors))
    if isinstance(found, Unsupported):
        return found
    layout, columns = found
    if any(t.layout is None or t.tokens.dims != layout.dims for t in operands_in(tensors)):
        return refuse("row_layout", "stack joins tokens with values that have no token dims")
    dims = list(layout.dims)
    dims.insert(dim % (len(dims) + 1), plain(len(tensors)))
    return Outcome(layout.with_dims(dims), columns)


def pieces_rule(op: Op, x: Operand, sizes: Any, dim: int = 0) -> Outcome | Unsupported:
    """split, split_with_sizes, chunk, tensor_split along a plain dim."""
    dim %= x.tokens.rank
    if x.tokens.is_token_dim(dim):
        return mixing(x.tokens, [dim], f"`{op.name}`")
    layouts = []
    for piece in op.result:
        dims = list(x.tokens.dims)
        dims[dim] = plain(piece.shape[dim])
        layouts.append(x.tokens.with_dims(dims))
    return Outcome(tuple(layouts))


def unbind_rule(op: Op, x: Operand, dim: int = 0) -> Outcome | Unsupported:
    dim %= x.tokens.rank
    if x.tokens.is_token_dim(dim):
        return mixing(x.tokens, [dim], "unbind")
    layout = x.tokens.with_dims(x.tokens.dims[:dim] + x.tokens.dims[dim + 1 :])
    return Outcome((layout,) * len(op.result))


def repeat_rule(op: Op, x: Operand, repeats: Sequence[Any]) -> Outcome | Unsupported:
    """repeat and tile: copies of a token dim get a factor of their own, outermost."""
    repeats = [1] * (x.tokens.rank - len(repeats)) + list(repeats)
    offset = len(repeats) - x.tokens.rank
    dims: list[Dim] = []
    for d, times in enumerate(repeats):
        dim = x.tokens.dims[d - offset] if d >= offset else ()
        if any(map(is_token_factor, dim)) and times != 1:
            if not isinstance(times, int) or times < 1:
                return refuse(
                    "size_as_number", f"`{op.name}` repeats tokens as often as the batch's size says"
                )
            dims.append((times, *dim))
        else:
            dims.append(dim if times == 1 else plain(op.shape[d]))
    return Outcome(x.tokens.with_dims(dims))


def repeat_interleave_rule(
    op: Op, x: Operand, repeats: Any, dim: int | None = None, **_: Any
) -> Outcome | Unsupported:
    """Copies of a token dim, next to each other, get a factor of their own, innermost."""
    if dim is None or not isinstance(repeats, int) or repeats < 1:
        return refuse(
            "row_mixing", "repeat_interleave of a whole tensor, or as often as the batch's size says"
        )
    dims = list(x.tokens.dims)
    dims[dim] = (*dims[dim], *plain(repeats)) if x.tokens.is_token_dim(dim) else plain(op.shape[dim])
    return Outcome(x.tokens.with_dims(dims))


register(view_rule, aten.view.default, aten.reshape, aten._unsafe_view, aten.flatten.using_ints)
register(view_rule, aten.unflatten.int, aten._reshape_alias)
register(unsqueeze_rule, aten.unsqueeze)
register(squeeze_rule, aten.squeeze)
register(transpose_rule, aten.transpose.int, aten.swapaxes, aten.swapdims)
register(t_rule, aten.t, aten.numpy_T)
register(matrix_transpose_rule, aten.mT, aten.adjoint)
register(permute_rule, aten.permute)
register(movedim_rule, aten.movedim)
register(expand_rule, aten.expand, aten.broadcast_to)
register(expand_as_rule, aten.expand_as)
register(view_as_rule, aten.view_as, aten.reshape_as)
register(cat_rule, aten.cat.default, aten.concat.default, aten.concatenate.default)
register(stack_rule, aten.stack)
register(
    pieces_rule, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes, aten.chunk, aten.tensor_split
)
register(unbind_rule, aten.unbind.int)
register(repeat_rule, aten.repeat, aten.tile)
register(repeat_interleave_rule, aten.repeat_interleave.self_int)
