"""How the elements of ATen operations' results follow from those of their arguments: functions, then one table.

A rule has the operation's own signature after `out`, the fake value of the result; tensors arrive as `Value`.
It returns the element at indices `(i_0, ..., i_{r-1})` of the result, or None: then the result is opaque, which is
always sound, since an opaque tensor is only ever used through its values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .affine import Affine, is_exact
from .graph import same_size
from .mask_expr import Const, Expr, Index, affine_of, apply, cast, constant, index, substitute, where


@dataclass(frozen=True)
class Value:
    """A tensor as rules see it: its element, and the fake tensor for shape and dtype."""

    expr: Expr
    fake: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.fake.shape


# --- views: which index of the argument each index of the result is


def is_one(size: Any) -> bool:
    """A size that broadcasts; symbolic sizes are never one (Dynamo specialises on it)."""
    return isinstance(size, int) and size == 1


def broadcast(x: Value, shape: Sequence[Any]) -> Expr:
    shift = len(shape) - len(x.shape)
    ones = map(is_one, x.shape)
    return substitute(x.expr, {d: Affine() if one else Affine.dim(d + shift) for d, one in enumerate(ones)})


def _expand(out, x, *_sizes, **_):
    return broadcast(x, out.shape)


def _unsqueeze(out, x, dim):
    dim %= out.dim()
    return substitute(x.expr, {d: Affine.dim(d + (d >= dim)) for d in range(len(x.shape))})


def _view(out, x, *_sizes, **_):
    """Dims in row-major order, apart from those of size one: from the right, as few as possible of the argument are
    paired with as many elements of the result, merged to one position and split again."""
    if out.dtype != x.fake.dtype:  # `view.dtype` reads the bits as another type
        return None
    old = [d for d, size in enumerate(x.shape) if not is_one(size)]
    new = [d for d, size in enumerate(out.shape) if not is_one(size)]
    sizes = known(out.shape)
    mapping = {d: Affine() for d in range(len(x.shape))}
    while old and new:
        merged = _last_dims(x.shape, old, out.shape[new[-1]])
        split = new[-1:] if merged else _last_dims(out.shape, new, x.shape[old[-1]])
        merged, split = (merged or old[-1:], split) if split else (old, new)
        inner = [x.shape[d] for d in merged[1:]] + [out.shape[d] for d in split[1:]]
        if not all(isinstance(size, int) and size > 0 for size in inner):
            return None
        position = Affine.dim(split[0])
        for d in split[1:]:
            position = position * out.shape[d] + Affine.dim(d)
        for d in reversed(merged[1:]):
            mapping[d] = position.part(x.shape[d], True, sizes)
            position = position.part(x.shape[d], False, sizes)
        mapping[merged[0]] = position
        old, new = old[: -len(merged)], new[: -len(split)]
    return None if old or new else substitute(x.expr, mapping, sizes)


def _last_dims(shape: Sequence[Any], dims: list[int], count: Any) -> list[int]:
    """The last of `dims` that hold `count` elements together; none if there are none."""
    total = 1
    for i in reversed(range(len(dims))):
        total = total * shape[dims[i]]
        if same_size(total, count):
            return dims[i:]
    return []


def known(shape: Sequence[Any]) -> dict[int, int]:
    return {d: size for d, size in enumerate(shape) if isinstance(size, int)}


def _repeat(out, x, repeats):
    """Copies one after another: of each dim, the index in its copy."""
    shift, sizes = out.dim() - len(x.shape), known(out.shape)
    mapping = {d: Affine() if is_one(size) else Affine.dim(d + shift) for d, size in enumerate(x.shape)}
    for d, size in enumerate(x.shape):
        if mapping[d].terms and not same_size(repeats[d + shift], 1):
            if not isinstance(size, int) or size == 0:
                return None
            mapping[d] = mapping[d].part(size, True, sizes)
    return substitute(x.expr, mapping, sizes)


def _repeat_interleave(out, x, repeats=None, dim=None, **_):
    if not isinstance(repeats, int) or repeats == 0 or not isinstance(dim, int):
        return None
    mapping, sizes = {d: Affine.dim(d) for d in range(out.dim())}, known(out.shape)
    dim %= out.dim()
    return substitute(x.expr, mapping | {dim: mapping[dim].part(repeats, False, sizes)}, sizes)


def _permute(out, x, dims):
    return substitute(x.expr, {d % out.dim(): Affine.dim(i) for i, d in enumerate(dims)})


def _transpose(out, x, dim0, dim1):
    order = list(range(out.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(out, x, order)


def _t(out, x):
    return _transpose(out, x, 0, 1) if out.dim() == 2 else x.expr


def _select(out, x, dim, index):
    dim %= len(x.shape)
    at = _from_start(index, x.shape[dim])
    if at is None:
        return None
    mapping = {d: Affine.dim(d - (d > dim)) for d in range(len(x.shape))}
    return substitute(x.expr, mapping | {dim: Affine((), at)})


def _slice(out, x, dim=0, start=None, end=None, step=1):
    dim %= out.dim()
    at = _from_start(0 if start is None else start, x.shape[dim])
    if at is None or not isinstance(step, int):
        return None
    mapping = {d: Affine.dim(d) for d in range(out.dim())}
    return substitute(x.expr, mapping | {dim: Affine.dim(dim) * step + Affine((), at)})


def _narrow(out, x, dim, start, length):
    return _slice(out, x, dim, start) if not isinstance(start, Value) else None


def _from_start(index: Any, size: Any) -> int | None:
    if not isinstance(index, int):
        return None
    return index if index >= 0 else max(index + size, 0) if isinstance(size, int) else None


def _index(out, x, indices):
    """`x[rows, columns]` with indices that are affine and can't be negative (those would wrap)."""
    places = [d for d, i in enumerate(indices) if i is not None]
    chosen = [indices[d] for d in places]
    affines = [affine_of(i.expr) for i in chosen]
    if any(a is None or a.offset < 0 or any(c < 0 for _, c in a.terms) for a in affines):
        return None
    if any(i.fake.dtype not in (torch.int64, torch.int32) for i in chosen):
        return None
    width = max(len(i.shape) for i in chosen)
    at = (
        places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    )  # torch puts split indices first
    rest = [d for d in range(len(x.shape)) if d not in places]
    mapping = {d: Affine.dim(i if i < at else i + width) for i, d in enumerate(rest)}
    for d, value in zip(places, chosen, strict=True):
        # an index tensor, broadcast against the others, spans the dims `at : at + width` of the result
        affine = affine_of(broadcast(value, out.shape[at : at + width]))
        assert affine is not None  # as it was before broadcasting
        mapping[d] = affine.substitute({i: Affine.dim(i + at) for i in range(width)})
    return substitute(x.expr, mapping)


def _identity(out, x, *_, **__):
    return cast(x.expr, out.dtype)


# --- elementwise


def _operand(x: Any, out: torch.Tensor, dtype: torch.dtype) -> Expr | None:
    """An argument of arithmetic, broadcast and promoted; None for a number that the kernel may round differently."""
    if isinstance(x, Value):
        expr = broadcast(x, out.shape)
        if not isinstance(expr, Const):
            return cast(expr, dtype)
        x = expr.value
    if not isinstance(x, (bool, int, float)):
        return None
    result = constant(x, dtype)
    return None if dtype in (torch.float16, torch.bfloat16) and result.value != x else result


def _operands(args: Sequence[Any], out: torch.Tensor, dtype: torch.dtype) -> tuple[Expr, ...] | None:
    """`_operand` of every argument; None if it is None for one."""
    found = tuple(expr for x in args if (expr := _operand(x, out, dtype)) is not None)
    return found if len(found) == len(args) else None


def _elementwise(name: str, dtype_of: Callable[..., torch.dtype]) -> Callable[..., Expr | None]:
    def rule(out, *args):
        if not all(isinstance(x, (Value, bool, int, float)) for x in args):
            return None
        dtype = dtype_of(out, *args)
        operands = _operands(args, out, dtype)
        return None if operands is None else cast(apply(name, operands, _result(name, dtype)), out.dtype)

    return rule


def _result(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.bool if name in ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not") else dtype


def _promoted(out, a, b):
    return torch.result_type(*(x.fake if isinstance(x, Value) else x for x in (a, b)))


def _own(out, *args):
    return out.dtype


def _boolean(out, *args):
    return torch.bool


def _with_alpha(name: str, flip: bool = False) -> Callable[..., Expr | None]:
    def rule(out, a, b, alpha=1):
        operands = _operands((a, b, alpha), out, out.dtype)
        if operands is None or (alpha != 1 and out.dtype == torch.bool):
            return None
        a, b, factor = operands
        b = b if alpha == 1 else apply("mul", (b, factor), out.dtype)
        return apply(name, (b, a) if flip else (a, b), out.dtype)

    return rule


def _div(out, a, b, rounding_mode=None):
    return (
        RULES["floor_divide"](out, a, b)
        if rounding_mode == "floor" and not out.dtype.is_floating_point
        else None
    )


def _chosen(x: Any, out: torch.Tensor) -> Expr | None:
    """A branch of a selection: rounded to the result, never computed with."""
    if isinstance(x, Value):
        return cast(broadcast(x, out.shape), out.dtype)
    return constant(x, out.dtype) if isinstance(x, (bool, int, float)) else None


def _where(out, condition, *cases):
    then, otherwise = (_chosen(x, out) for x in cases) if len(cases) == 2 else (None, None)
    if then is None or otherwise is None:
        return None
    return where(cast(broadcast(condition, out.shape), torch.bool), then, otherwise)


def _masked_fill(out, x, mask, value):
    return _where(out, mask, value, x)


def _triangle(name: str) -> Callable[..., Expr | None]:
    def rule(out, x, diagonal=0):
        if not isinstance(diagonal, int):
            return None
        row, column = Affine.dim(out.dim() - 2), Affine.dim(out.dim() - 1)
        sides = Index(column - row, torch.int64), constant(diagonal, torch.int64)
        return where(apply(name, sides, torch.bool), x.expr, constant(0, out.dtype))

    return rule


# --- creation


def _filled(value: Any) -> Callable[..., Expr | None]:
    return lambda out, *_, **__: constant(value, out.dtype)


def _full(position: int) -> Callable[..., Expr | None]:
    """Filled with the argument at `position`."""
    return lambda out, *args, **_: _chosen(args[position], out)


def _arange(out, *bounds, **_):
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
    if not (isinstance(start, int) and isinstance(step, int)):
        return None
    affine = Affine.dim(0) * step + Affine((), start)
    return index(affine, out.dtype) if is_exact(affine, out.dtype) else None


# In-place twins (`mul_`) share their rule; `MaskReader` sees to it that nobody reads the old value.
RULES: dict[str, Callable[..., Expr | None]] = {
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "to", "_to_copy", "positive"), _identity),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "view_as", "reshape_as"), _view),
    **dict.fromkeys(("flatten", "unflatten", "squeeze"), _view),
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "unsqueeze": _unsqueeze,
    "permute": _permute,
    "transpose": _transpose,
    "t": _t,
    "select": _select,
    "slice": _slice,
    "narrow": _narrow,
    "index": _index,
    **{name: _elementwise(name, _promoted) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{
        name: _elementwise(name, _own)
        for name in ("mul", "neg", "abs", "maximum", "minimum", "floor_divide", "remainder", "bitwise_not")
    },
    **{
        spelling.format(name): _elementwise(f"bitwise_{name}", _own)
        for name in ("and", "or", "xor")
        for spelling in ("bitwise_{}", "__{}__", "__i{}__")
    },
    **{f"logical_{name}": _elementwise(name, _boolean) for name in ("and", "or", "not")},
    "logical_xor": _elementwise("bitwise_xor", _boolean),
    "add": _with_alpha("add"),
    "sub": _with_alpha("sub"),
    "rsub": _with_alpha("sub", flip=True),
    "div": _div,
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle("le"),
    "triu": _triangle("ge"),
    "arange": _arange,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), _filled(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("full", "full_like", "fill", "copy"), _full(1)),
    "new_full": _full(2),
    "scalar_tensor": _full(0),
}
