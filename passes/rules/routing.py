"""Tokens sorted by expert and back: mixture-of-experts routing, whatever a batch's tokens are.

    ids [N·S·k] → sort → values, permutation      entries of tokens in another order: a `Sorted` dim
    x[permutation // k]                           each entry gets its token's value
    offsets = cumsum(histc(values))               where each expert's entries end
    grouped_mm(x, weights, offsets)               row i is multiplied with the weight of expert values[i]
    y[inverse]                                    back in the order of the tokens

A sort moves entries, but what it says about an entry depends on that entry alone, if one only ever asks for it through
the same sort. So a dim of sorted entries is followed by its factors, and integers that number or count entries
(`Numbers`) may be used for that and for nothing else: an operation that gets them has its rule in `NUMBER_RULES` or is
refused. In the packed graph fewer entries are sorted, and the numbers are other ones; the values are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..graph import bound_args
from ..layout import Numbers, Sorted, is_token_factor, plain
from ..reasons import Unsupported
from .common import (
    PROLOGUE,
    WEIGHT,
    Op,
    Operand,
    Outcome,
    Rule,
    overloads_of,
    refuse,
    register,
    register_named,
    same_size,
)
from .reductions import along_rule

aten = torch.ops.aten


def sort_rule(op: Op, x: Operand, dim: int = -1, *_: Any, **__: Any) -> Outcome | Unsupported:
    """sort and argsort: along a plain dim, or of all tokens in a single dim, whose entries are then `Sorted`."""
    if x.tokens.rank != 1 or not x.tokens.is_token_dim(0):
        return along_rule(op, x, dim)
    (factors,) = x.tokens.dims
    if any(isinstance(f, Sorted) for f in factors):
        return refuse("token_mixing", "sorted tokens are sorted once more")
    by = Sorted(factors, op.node)
    values = x.tokens.with_dims(((by,),))
    permutation = x.tokens.with_dims(((by,),), Numbers("index", op.node, factors))
    return Outcome(permutation if isinstance(op.result, torch.Tensor) else (values, permutation))


def inverse_sort_rule(op: Op, permutation: Operand, *_: Any, **__: Any) -> Outcome | Unsupported:
    """argsort of a permutation is its inverse."""
    if not _is_permutation(permutation) or not isinstance(op.result, torch.Tensor) or _is_descending(op.node):
        return refuse("token_mixing", "numbers of sorted tokens are sorted")
    return _inverse(permutation)


def _is_permutation(o: Operand) -> bool:
    """Not divided by the entries of a token, and not inverted."""
    holds, dims = o.tokens.holds, o.tokens.dims
    return holds is not None and holds.what == "index" and dims == ((Sorted(holds.into, holds.by),),)


def _inverse(permutation: Operand, action: str = "emit", detail: Any = None) -> Outcome:
    layout = permutation.tokens
    assert layout.holds is not None
    numbers = Numbers("index", layout.holds.by, layout.dims[0])
    return Outcome(layout.with_dims((layout.holds.into,), numbers), action=action, detail=detail)


def inverse_put_rule(
    op: Op, x: Operand, indices: Sequence[Operand | None], values: Operand, accumulate: bool = False
) -> Outcome | Unsupported:
    """`inverse[permutation] = arange(n)`: every entry is written, so it doesn't matter what was there before."""
    (permutation,) = indices if len(indices) == 1 else (None,)
    if (
        permutation is None
        or accumulate
        or not _is_permutation(permutation)
        or not _counts_up(values, permutation)
    ):
        return refuse("token_mixing", f"`{op.name}` writes to numbers of sorted tokens")
    return _inverse(permutation, "inverse", permutation.node)


def inverse_scatter_rule(op: Op, x: Operand, dim: int, index: Operand, src: Operand) -> Outcome | Unsupported:
    """`inverse.scatter(0, permutation, arange(n))`."""
    return inverse_put_rule(op, x, [index], src)


def _counts_up(o: Operand, like: Operand) -> bool:
    """0, 1, 2, …: one number for each entry."""
    if o.kind != PROLOGUE or len(o.shape) != 1 or not same_size(o.shape[0], like.shape[0]):
        return False
    args = bound_args(o.node)[0]
    if o.node.target is aten.arange.default:
        return True
    return o.node.target is aten.arange.start and args[0] == 0


def token_of_entry_rule(op: Op, x: Operand, divisor: Any, **kwargs: Any) -> Outcome | Unsupported:
    """`permutation // k`: the numbers of the tokens, where every token has k entries next to each other."""
    into = x.tokens.holds.into if isinstance(x, Operand) and x.tokens.holds else ()
    if (
        not _is_permutation(x)
        or kwargs.get("rounding_mode", "floor") != "floor"
        or not isinstance(divisor, int)
    ):
        return refuse("token_mixing", f"`{op.name}` computes with numbers of sorted tokens")
    size, kept = 1, list(into)
    while kept and size != divisor and not is_token_factor(kept[-1]):
        size *= kept.pop()
    if size != divisor or not kept:
        return refuse(
            "token_mixing",
            f"the number of a sorted entry is divided by {divisor}, not the entries of a token",
        )
    assert x.tokens.holds is not None
    return Outcome(x.tokens.with_dims(x.tokens.dims, Numbers("index", x.tokens.holds.by, tuple(kept))))


def take_rule(op: Op, x: Operand, indices: Sequence[Operand | None]) -> Outcome | Unsupported:
    """`x[index]`: the entries of x's first dim in the order of the index."""
    (index,) = indices if len(indices) == 1 else (None,)
    if index is None or not isinstance(x, Operand) or x.layout is None or x.tokens.holds is not None:
        return refuse("token_mixing", f"`{op.name}` with numbers of sorted tokens")
    holds = index.tokens.holds
    if holds is None or holds.what != "index" or x.tokens.dims[0] != holds.into:
        return refuse("token_mixing", f"`{op.name}` picks from {x.tokens} by numbers of other tokens")
    if x.tokens.selection is not index.tokens.selection:
        return refuse("token_mixing", f"`{op.name}` picks by numbers of other tokens")
    return Outcome(x.tokens.with_dims((*index.tokens.dims, *x.tokens.dims[1:])))


def take_dim_rule(op: Op, x: Operand, dim: int, index: Operand) -> Outcome | Unsupported:
    """index_select along the first dim."""
    return (
        take_rule(op, x, [index])
        if dim == 0
        else refuse("token_mixing", "numbers of tokens pick along another dim")
    )


def add_to_tokens_rule(
    op: Op, x: Operand, dim: int, index: Operand, source: Operand, **_: Any
) -> Outcome | Unsupported:
    """`x.index_add(0, permutation // k, y)`: each token gets the sum over its own entries."""
    holds = index.tokens.holds if isinstance(index, Operand) and index.layout else None
    if dim != 0 or holds is None or holds.what != "index" or x.layout is None or source.layout is None:
        return refuse("token_mixing", f"`{op.name}` with numbers of sorted tokens")
    fits = x.tokens.dims[0] == holds.into and source.tokens.dims[0] == index.tokens.dims[0]
    if (
        not fits
        or x.tokens.dims[1:] != source.tokens.dims[1:]
        or x.tokens.selection is not index.tokens.selection
    ):
        return refuse("token_mixing", f"`{op.name}` adds to other tokens")
    return Outcome(x.tokens)


def histogram_rule(
    op: Op, x: Operand, bins: int = 100, least: Any = 0, most: Any = 0
) -> Outcome | Unsupported:
    """How many entries each key has: of use only as the offsets of a grouped product."""
    (dim,) = x.tokens.dims if x.tokens.rank == 1 else ((),)
    by = dim[0].by if len(dim) == 1 and isinstance(dim[0], Sorted) else None
    if by is None or (least, most) != (0, bins - 1) or _key_of(x.node) is not _key_of(by.args[0]):
        return refuse("token_mixing", f"`{op.name}` runs over the rows and positions of the batch")
    return Outcome(x.tokens.with_dims((plain(bins),), Numbers("counts", by)))


def _key_of(node: Any) -> Any:
    """What integers were before casts, and before they were put into the order of a sort."""
    while isinstance(node, fx.Node):
        if node.target in _CASTS:
            node = node.args[0]
        elif node.target is aten.index.Tensor and len(node.args[1]) == 1 and _sort_of(node.args[1][0]):  # type: ignore[arg-type, index]
            sorts = _sort_of(node.args[1][0])  # type: ignore[index]
            if _key_of(sorts.args[0]) is not _key_of(node.args[0]):
                return node
            node = node.args[0]
        elif _is_item(node, 0):
            node = node.args[0].args[0]  # type: ignore[union-attr]
        else:
            return node
    return node


_CASTS = {aten.to.dtype, aten._to_copy.default, aten.alias.default, aten.detach.default}
_SORTS = {aten.sort.default, aten.sort.stable}
_ARGSORTS = {aten.argsort.default, aten.argsort.stable}


def _is_item(node: fx.Node, index: int) -> bool:
    """Values (0) or permutation (1) of a sort."""
    source = node.args[0] if node.op == "call_function" and len(node.args) == 2 else None
    return isinstance(source, fx.Node) and source.target in _SORTS and bool(node.args[1] == index)


def _sort_of(node: Any) -> Any:
    """The sort whose permutation `node` is."""
    if not isinstance(node, fx.Node):
        return None
    return node if node.target in _ARGSORTS else node.args[0] if _is_item(node, 1) else None


def offsets_rule(op: Op, x: Operand, dim: int, **_: Any) -> Outcome | Unsupported:
    """cumsum of counts."""
    holds = x.tokens.holds
    if holds is None or holds.what != "counts":
        return refuse("token_mixing", "a cumulative sum of numbers of sorted tokens")
    return Outcome(x.tokens.with_dims(x.tokens.dims, Numbers("offsets", holds.by)))


def same_numbers_rule(op: Op, x: Operand, *_: Any, **__: Any) -> Outcome | Unsupported:
    """Casts to another integer type."""
    holds = x.tokens.holds
    if holds is None or (op.result.dtype.is_floating_point and holds.what == "index"):
        return refuse("token_mixing", "numbers of sorted tokens become floats")
    return Outcome(x.tokens)


def new_entries_rule(op: Op, x: Operand, *_: Any, **__: Any) -> Outcome | Unsupported:
    """empty_like and zeros_like."""
    return Outcome(x.tokens.with_dims(x.tokens.dims))


def grouped_mm_rule(
    op: Op, x: Operand, weight: Operand, offsets: Operand | None = None, bias: Any = None, *_: Any
) -> Outcome | Unsupported:
    """Row i times the matrix of its group; the groups are those of the sort that ordered x."""
    if (
        offsets is None
        or bias is not None
        or offsets.layout is None
        or x.layout is None
        or weight.kind != WEIGHT
    ):
        return refuse("token_mixing", f"`{op.name}` of something other than sorted tokens with weights")
    holds, dim = offsets.tokens.holds, x.tokens.dims[0]
    if holds is None or holds.what != "offsets" or len(x.shape) != 2 or len(weight.shape) != 3:
        return refuse("token_mixing", f"`{op.name}` with offsets that aren't those of sorted tokens")
    if (
        len(dim) != 1
        or not isinstance(dim[0], Sorted)
        or dim[0].by is not holds.by
        or _is_descending(holds.by)
    ):
        return refuse("token_mixing", f"`{op.name}` with the offsets of other tokens")
    if x.tokens.is_token_dim(1) or not same_size(weight.shape[0], offsets.shape[0]):
        return refuse("token_mixing", f"`{op.name}` has not one matrix for each group")
    return Outcome(x.tokens.with_dims((dim, plain(weight.shape[2]))))


def _is_descending(sort: fx.Node) -> bool:
    args, given = bound_args(sort)
    arguments = sort.target._schema.arguments  # type: ignore[union-attr]
    given |= {a.name: value for a, value in zip(arguments, args, strict=False)}
    return bool(given.get("descending", False))


# Rules for operations that get `Numbers`; any other such operation is refused.
NUMBER_RULES: dict[Any, Rule] = {}


def _register_numbers(rule: Rule, *packets: Any) -> None:
    for packet in packets:
        for overload in [packet] if isinstance(packet, torch._ops.OpOverload) else overloads_of(packet):
            NUMBER_RULES[overload] = rule


register(sort_rule, aten.sort, aten.argsort)
register(histogram_rule, aten.histc.default)
_register_numbers(inverse_sort_rule, aten.argsort)
_register_numbers(inverse_put_rule, aten.index_put.default)
_register_numbers(inverse_scatter_rule, aten.scatter.src)
_register_numbers(token_of_entry_rule, aten.floor_divide, aten.div.Scalar_mode, aten.div.Tensor_mode)
_register_numbers(take_rule, aten.index.Tensor)
_register_numbers(take_dim_rule, aten.index_select.default)
_register_numbers(add_to_tokens_rule, aten.index_add.default)
_register_numbers(offsets_rule, aten.cumsum.default)
_register_numbers(same_numbers_rule, aten.to, aten._to_copy, aten.alias)
_register_numbers(new_entries_rule, aten.empty_like, aten.zeros_like)
_register_numbers(grouped_mm_rule, aten._grouped_mm.default)
register_named(grouped_mm_rule, "transformers::grouped_mm_fallback")
