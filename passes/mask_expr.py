"""Symbolic expressions for one element of a tensor, as a function of the tensor's indices.

A mask `[N, 1, S, S]` is read as an expression of `(n, h, q, k)`: arange becomes the index itself (`Index`), a tensor
that isn't looked into becomes an `Element` of it at affine indices, and everything between is an `Op` on those.
Dims are followed by index (see affine.py); no size is ever compared to find out what a dim means.

Every expression has the dtype that the original tensor had, and every cast is explicit, so that replaying an
expression (`mask_columns.emit_column`) rounds and overflows as the original did. Constants are folded by torch itself.

The constructors simplify: `where` with constant branches *is* a condition, and operations on constants move into its
branches, so that `(1.0 - allowed.to(dtype)) * finfo.min` becomes `where(allowed, 0, finfo.min)` without a rule of
its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from .affine import NO_SIZES, Affine, Part, is_exact

aten = torch.ops.aten

# limit on the branches of a `where` tree that operations are moved into: masks have 2 to 8
MAX_BRANCHES = 64

OPS: dict[str, Any] = {
    "eq": aten.eq.Tensor,
    "ne": aten.ne.Tensor,
    "lt": aten.lt.Tensor,
    "le": aten.le.Tensor,
    "gt": aten.gt.Tensor,
    "ge": aten.ge.Tensor,
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
    "floor_divide": aten.floor_divide.default,
    "remainder": aten.remainder.Tensor,
    "maximum": aten.maximum.default,
    "minimum": aten.minimum.default,
    "neg": aten.neg.default,
    "abs": aten.abs.default,
    "bitwise_and": aten.bitwise_and.Tensor,
    "bitwise_or": aten.bitwise_or.Tensor,
    "bitwise_xor": aten.bitwise_xor.Tensor,
    "bitwise_not": aten.bitwise_not.default,
    "and": aten.logical_and.default,
    "or": aten.logical_or.default,
    "not": aten.logical_not.default,
    "where": aten.where.self,
}
FLIPPED = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


@dataclass(frozen=True)
class Const:
    value: bool | int | float
    dtype: torch.dtype


@dataclass(frozen=True)
class Index:
    """An affine function of the indices, as a number of `dtype`."""

    index: Affine
    dtype: torch.dtype


@dataclass(frozen=True)
class Element:
    """`node[indices]` for a tensor that isn't looked into; one affine index per dim of `node`."""

    node: fx.Node
    indices: tuple[Affine, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Op:
    """`OPS[name]`, or `to` for a cast to `dtype`; the arguments have the dtype that they are computed in."""

    name: str
    args: tuple[Expr, ...]
    dtype: torch.dtype


Expr = Const | Index | Element | Op
TRUE, FALSE = Const(True, torch.bool), Const(False, torch.bool)


def constant(value: bool | int | float, dtype: torch.dtype) -> Const:
    """`value` as torch rounds it to `dtype`."""
    with _disable_current_modes():
        return Const(torch.tensor(value, dtype=_wide(value), device="cpu").to(dtype).item(), dtype)


def _wide(value: Any) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.float64


def index(affine: Affine, dtype: torch.dtype) -> Expr:
    return Index(affine, dtype) if affine.terms else constant(affine.offset, dtype)


def affine_of(expr: Expr) -> Affine | None:
    """The expression as an affine function of indices, where it is one. Nothing is computed with a `Part`."""
    if isinstance(expr, Index):
        return None if any(isinstance(dim, Part) for dim, _ in expr.index.terms) else expr.index
    if isinstance(expr, Const) and math.isfinite(expr.value) and expr.value == int(expr.value):
        return Affine((), int(expr.value))
    return None


def dims(expr: Expr) -> set[int]:
    """The indices that the expression depends on."""
    if isinstance(expr, Index):
        return expr.index.dims
    if isinstance(expr, Element):
        return set().union(*(i.dims for i in expr.indices))
    return set().union(*map(dims, expr.args)) if isinstance(expr, Op) else set()


def size(expr: Expr) -> int:
    return 1 + sum(map(size, expr.args)) if isinstance(expr, Op) else 1


def elements(expr: Expr) -> Iterator[Element]:
    """All elements of opaque tensors in the expression."""
    if isinstance(expr, Element):
        yield expr
    for arg in expr.args if isinstance(expr, Op) else ():
        yield from elements(arg)


def substitute(expr: Expr, mapping: Mapping[int, Affine], sizes: Mapping[int, int] = NO_SIZES) -> Expr:
    """The expression with every index `d` replaced by `mapping[d]`; `sizes`: what is known of the dims in there."""
    if isinstance(expr, Index):
        return index(expr.index.substitute(mapping, sizes), expr.dtype)
    if isinstance(expr, Element):
        return Element(expr.node, tuple(i.substitute(mapping, sizes) for i in expr.indices), expr.dtype)
    return rebuild(expr, lambda arg: substitute(arg, mapping, sizes))


def replace(expr: Expr, table: Mapping[Expr, Expr]) -> Expr:
    """The expression with whole subexpressions replaced."""
    return table[expr] if expr in table else rebuild(expr, lambda arg: replace(arg, table))


def rebuild(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """An `Op` with changed arguments, simplified again; anything else as it is."""
    if not isinstance(expr, Op):
        return expr
    args = tuple(map(change, expr.args))
    return cast(args[0], expr.dtype) if expr.name == "to" else apply(expr.name, args, expr.dtype)


def negate(expr: Expr) -> Expr:
    """Logical not, moved inwards. Comparisons of floats keep it: `not (x < nan)` isn't `x >= nan`."""
    if isinstance(expr, Const):
        return FALSE if expr.value else TRUE
    if not isinstance(expr, Op):
        return Op("not", (expr,), torch.bool)
    if expr.name == "not":
        return expr.args[0]
    if expr.name == "and":
        return disjoin(*map(negate, expr.args))
    if expr.name == "or":
        return conjoin(*map(negate, expr.args))
    if expr.name in ("eq", "ne") or (expr.name in FLIPPED and not any(map(_may_be_nan, expr.args))):
        return apply(FLIPPED[expr.name], expr.args, torch.bool)
    return Op("not", (expr,), torch.bool)


def _may_be_nan(expr: Expr) -> bool:
    return expr.dtype.is_floating_point and affine_of(expr) is None


def conjoin(a: Expr, b: Expr) -> Expr:
    if FALSE in (a, b):
        return FALSE
    if a == TRUE or a == b:
        return b
    return a if b == TRUE else Op("and", (a, b), torch.bool)


def disjoin(a: Expr, b: Expr) -> Expr:
    if TRUE in (a, b):
        return TRUE
    if a == FALSE or a == b:
        return b
    return a if b == FALSE else Op("or", (a, b), torch.bool)


def conjuncts(expr: Expr) -> list[Expr]:
    """The terms of a conjunction, each once; none for a constant true."""
    if isinstance(expr, Op) and expr.name == "and":
        return list(dict.fromkeys(term for arg in expr.args for term in conjuncts(arg)))
    return [] if expr == TRUE else [expr]


def where(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    if isinstance(condition, Const):
        return then if condition.value else otherwise
    if (
        isinstance(condition, Op)
        and condition.name in ("eq", "ne")
        and condition.args[1] == _zero(condition.args[1])
    ):
        # `x.masked_fill(x != 0, v)`: where the fill isn't, x is zero
        if condition.name == "ne" and condition.args[0] == otherwise:
            otherwise = _zero(otherwise)
        if condition.name == "eq" and condition.args[0] == then:
            then = _zero(then)
    if then == otherwise:
        return then
    if then.dtype != torch.bool:
        return Op("where", (condition, then, otherwise), then.dtype)
    if then == TRUE:
        return disjoin(condition, otherwise)
    if otherwise == TRUE:
        return disjoin(negate(condition), then)
    return disjoin(conjoin(condition, then), conjoin(negate(condition), otherwise))


def _zero(expr: Expr) -> Const:
    return constant(0, expr.dtype)


def branches(expr: Expr) -> list[Expr]:
    """What the leaves of a `where` tree select from."""
    if isinstance(expr, Op) and expr.name == "where":
        return branches(expr.args[1]) + branches(expr.args[2])
    return [expr]


def cast(expr: Expr, dtype: torch.dtype) -> Expr:
    if expr.dtype == dtype:
        return expr
    if isinstance(expr, Const):
        return constant(expr.value, dtype)
    if expr.dtype == torch.bool:
        return where(expr, constant(1, dtype), constant(0, dtype))
    if isinstance(expr, Op) and expr.name == "where":
        return where(expr.args[0], cast(expr.args[1], dtype), cast(expr.args[2], dtype))
    if dtype == torch.bool:
        return apply("ne", (expr, _zero(expr)), torch.bool)
    if isinstance(expr, Index) and is_exact(expr.index, dtype):
        return Index(expr.index, dtype)
    return Op("to", (expr,), dtype)


def apply(name: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr:
    """`OPS[name]` of arguments that have been cast to their common dtype, with result `dtype`, simplified."""
    if name == "where":
        return where(*args)
    if dtype == torch.bool and name in BOOLEAN and all(a.dtype == torch.bool for a in args):
        return BOOLEAN[name](*args)
    constants = [a for a in args if isinstance(a, Const)]
    if len(constants) == len(args):
        with _disable_current_modes():
            result = OPS[name](*(torch.tensor(a.value, dtype=a.dtype, device="cpu") for a in constants))
            return Const(result.item(), dtype)
    affines = [affine for affine in map(affine_of, args) if affine is not None]
    if len(affines) == len(args):
        known = _compare(name, *affines) if name in FLIPPED else _arithmetic(name, affines, dtype)
        if known is not None:
            return known
    return _into_branches(name, args, dtype) or Op(name, args, dtype)


def _exclusive(a: Expr, b: Expr) -> Expr:
    return disjoin(conjoin(a, negate(b)), conjoin(negate(a), b))


BOOLEAN: dict[str, Callable[..., Expr]] = {
    **dict.fromkeys(("and", "bitwise_and", "mul"), conjoin),
    **dict.fromkeys(("or", "bitwise_or", "add"), disjoin),
    **dict.fromkeys(("not", "bitwise_not"), negate),
    "bitwise_xor": _exclusive,
}


def _arithmetic(name: str, args: list[Affine], dtype: torch.dtype) -> Expr | None:
    result = None
    if name == "add":
        result = args[0] + args[1]
    elif name == "sub":
        result = args[0] - args[1]
    elif name == "neg":
        result = args[0] * -1
    elif name == "mul" and not (args[0].terms and args[1].terms):
        a, b = args if args[0].terms else reversed(args)
        result = a * b.offset
    return index(result, dtype) if result is not None and is_exact(result, dtype) else None


def _compare(name: str, a: Affine, b: Affine) -> Expr:
    """A comparison of indices in its one form: `Σ coefficient · index <= constant`, or `==`, `!=`.

    It is constant where it holds, or fails, at every index, since no index is negative (`q >= 0`).
    """
    difference = a - b if name in ("le", "lt", "eq", "ne") else b - a
    if name in ("eq", "ne") and difference.terms and difference.terms[0][1] < 0:
        difference = difference * -1
    scale = math.gcd(*(c for _, c in difference.terms)) or 1
    terms = Affine(tuple((d, c // scale) for d, c in difference.terms))
    bound, rest = divmod(-difference.offset - (name in ("lt", "gt")), scale)
    low = 0 if all(c > 0 for _, c in terms.terms) else -math.inf
    high = 0 if all(c < 0 for _, c in terms.terms) else math.inf
    if name in ("eq", "ne"):
        always, never = low == high == bound, rest != 0 or not low <= bound <= high
        always, never = (always, never) if name == "eq" else (never, always)
    else:
        name, always, never = "le", high <= bound, low > bound
    if always or never:
        return TRUE if always else FALSE
    return Op(name, (Index(terms, torch.int64), Const(bound, torch.int64)), torch.bool)


def _into_branches(name: str, args: tuple[Expr, ...], dtype: torch.dtype) -> Expr | None:
    """An operation on `where` trees of constants: the same trees of its results."""
    trees = [branches(a) for a in args]
    if not all(isinstance(leaf, Const) for tree in trees for leaf in tree):
        booleans = [a for a in args if a.dtype == torch.bool and not isinstance(a, Const)]
        if len(booleans) != 1 or not all(isinstance(a, Const) for a in args if a is not booleans[0]):
            return None
        results = (
            apply(name, tuple(v if a is booleans[0] else a for a in args), dtype) for v in (TRUE, FALSE)
        )
        return where(booleans[0], *results)
    if name in ("eq", "ne") and sum(len(tree) > 1 for tree in trees) > 1:
        return None  # may be `same_value` of two conditions: keep it whole
    if math.prod(map(len, trees)) > MAX_BRANCHES:
        return None
    at, tree = next((i, a) for i, a in enumerate(args) if isinstance(a, Op) and a.name == "where")
    condition, *cases = tree.args
    return where(condition, *(apply(name, (*args[:at], case, *args[at + 1 :]), dtype) for case in cases))
