"""An attention mask, read as a formula: causal ∧ window ∧ key padding ∧ same value of a column.

A mask `[N, 1, S, S]` is a function of `(n, h, q, k)`: batch row, head, query and key position. `read_allowed` and
`read_additive` find that function in the ATen graph (`mask_reader`), split it into a conjunction and name each term.
What can't be named is a reason to fall back, except a mask that is *data* (the caller's own 4-D mask, a registered
`tril` buffer): that one has to be compared with its formula at each call.

    le = aten.le(k_idx, q_idx); pad = aten.index(attention_mask, [n_idx, k_idx]); mask = aten.and(le, pad)
    →  causal ∧ key_padding(attention_mask)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from . import layout
from .affine import Affine, Part
from .graph import input_name
from .layout import Dim
from .mask_expr import (
    FALSE,
    TRUE,
    Const,
    Element,
    Expr,
    Index,
    Op,
    affine_of,
    branches,
    conjuncts,
    dims,
    elements,
    index,
    negate,
    replace,
    substitute,
    where,
)
from .mask_reader import MaskReader
from .mask_rules import is_one
from .reasons import Unsupported

N, H, Q, K = range(4)
AHEAD = Affine.dim(K) - Affine.dim(Q)
# indices of a column, and a mask's index → theirs
ROW, POSITION = range(2)
AT_QUERY = {N: Affine.dim(ROW), Q: Affine.dim(POSITION)}
AT_KEY = {N: Affine.dim(ROW), K: Affine.dim(POSITION)}


@dataclass(frozen=True)
class Column:
    """A value per token: an expression of `(n, s)`, dims `ROW` and `POSITION`."""

    expr: Expr

    @property
    def leaves(self) -> tuple[fx.Node, ...]:
        return tuple(dict.fromkeys(e.node for e in elements(self.expr)))

    def describe(self) -> str:
        return ", ".join(map(input_name, self.leaves)) or "position"


@dataclass(frozen=True)
class MaskFormula:
    """Which keys `k` a query `q` of row `n` may attend: the conjunction of the parts that are given.

    Args:
        causal: `k <= q`.
        window: `q - k < window`.
        key_valid: columns that are true at `(n, k)`.
        same_value: integer columns with the same value at `(n, q)` and at `(n, k)`.
        data: a mask node that isn't a formula and has to be checked at each call. It broadcasts to `[N, H, Q, K]`.
            What the mask says besides isn't listed again in the other fields.
        data_additive: `data` is added to the scores (0 or the lowest value), not a condition.
        data_negated: `data` is true where attention is *not* allowed.
        depth: masked scores are at most minus this. A query that is masked from everything attends uniformly with
            `finfo.min`, and is NaN or zero with minus infinity.
    """

    causal: bool = False
    window: int | None = None
    key_valid: tuple[Column, ...] = ()
    same_value: tuple[Column, ...] = ()
    data: fx.Node | None = None
    data_additive: bool = False
    data_negated: bool = False
    depth: float = math.inf

    @property
    def minus_inf(self) -> bool:
        return self.depth == math.inf

    @property
    def leaves(self) -> tuple[fx.Node, ...]:
        """Every node that the formula reads; all of them have to belong to the prologue."""
        nodes = [leaf for column in (*self.key_valid, *self.same_value) for leaf in column.leaves]
        return tuple(dict.fromkeys([*nodes, *([self.data] if self.data is not None else [])]))

    def describe(self) -> str:
        """In words, for reports: `causal ∧ window(8) ∧ key_padding(attention_mask)`."""
        words = ["causal"] if self.causal else []
        words += [f"window({self.window})"] if self.window is not None else []
        words += [f"key_padding({c.describe()})" for c in self.key_valid]
        words += [f"same_value({c.describe()})" for c in self.same_value]
        words += [f"data({input_name(self.data)})"] if self.data is not None else []
        return " ∧ ".join(words) or "everything"


CAUSAL = MaskFormula(causal=True)


def conjoin(*formulas: MaskFormula) -> MaskFormula | Unsupported:
    """All of them at once; refused where two of them are data, since only one node can be checked."""
    data = list(
        dict.fromkeys((f.data, f.data_additive, f.data_negated) for f in formulas if f.data is not None)
    )
    if len(data) > 1:
        return _unclear(data[1][0], "two masks of one attention are data")
    node, additive, negated = data[0] if data else (None, False, False)
    windows = [f.window for f in formulas if f.window is not None]
    return MaskFormula(
        causal=any(f.causal for f in formulas),
        window=min(windows, default=None),
        key_valid=tuple(dict.fromkeys(c for f in formulas for c in f.key_valid)),
        same_value=tuple(dict.fromkeys(c for f in formulas for c in f.same_value)),
        data=node,
        data_additive=additive,
        data_negated=negated,
        depth=min((f.depth for f in formulas), default=math.inf),
    )


def require_causal(formula: MaskFormula | Unsupported, node: fx.Node) -> MaskFormula | Unsupported:
    """The formula of a whole attention at `node`: refused unless no query can attend to a later token."""
    if isinstance(formula, Unsupported) or formula.causal or formula.data is not None:
        return formula
    found = f"the mask is {formula.describe()}: it lets tokens attend to later ones"
    return Unsupported("not_causal", node, found, "packing needs causal attention")


def read_allowed(
    node: fx.Node, negated: bool = False, *, alone: bool = True, lead: Sequence[Dim] | None = None
) -> MaskFormula | Unsupported:
    """Read a boolean mask.

    Args:
        node: the mask, true where a query may attend. Of rank 2 to 4, it is aligned right to `[N, H, Q, K]`; of a
            higher rank, every dim between the first and the last two is one of heads.
        negated: true where it may *not*, as for `masked_fill`.
        alone: no other mask applies, so that this one has to be causal. Otherwise `conjoin` it with the others
            and call `require_causal`.
        lead: the dims of the scores before queries and keys, if they aren't rows and heads.
    """
    reader = MaskReader(node.graph)
    read = _read_mask(reader, node, lead)
    if isinstance(read, Unsupported):
        return read
    if read.dtype != torch.bool:
        return _unclear(node, f"a mask of dtype {read.dtype} is no condition")
    data = _as_data(MaskFormula(data=node, data_negated=negated), node, lead)
    return _formula(reader, node, negate(read) if negated else read, data, alone)


def read_additive(
    node: fx.Node, *, alone: bool = True, lead: Sequence[Dim] | None = None
) -> MaskFormula | Unsupported:
    """Read a float mask that is added to the scores: 0 where allowed, -inf or its dtype's `finfo.min` where not.

    Args:
        node, alone, lead: as for `read_allowed`.
    """
    reader = MaskReader(node.graph)
    read = _read_mask(reader, node, lead)
    if isinstance(read, Unsupported):
        return read
    if not read.dtype.is_floating_point:
        return _unclear(node, f"a mask of dtype {read.dtype} is added to the scores")
    values = branches(read)
    masks = lowest(read.dtype)
    finite = [v.value for v in values if isinstance(v, Const) and v.value != 0 and not v.value <= masks]
    if finite:
        found = f"the mask adds {finite[0]} to scores, which is neither 0, -inf nor the lowest {read.dtype}"
        return Unsupported("finite_mask", node, found, "mask with torch.finfo(dtype).min or -inf")
    data = _as_data(MaskFormula(data=node, data_additive=True, depth=-masks), node, lead)
    biases = [v for v in values if not isinstance(v, Const)]
    if biases:
        # numbers read per key or pair can only be checked as data; numbers per query or position are a bias (ALiBi)
        is_data = all(any(elements(v)) and (_reads_pairs(v) or not _reads_queries(v)) for v in biases)
        return (
            data
            if is_data
            else _unclear(node, "numbers that depend on query and key are added to the scores")
        )
    depth = min((-v.value for v in values if isinstance(v, Const) and v.value != 0), default=math.inf)
    return _formula(reader, node, _unmasked(read), data, alone, depth)


def lowest(dtype: torch.dtype) -> float:
    """Numbers up to this one mask scores: next to it no score counts. bfloat16's lowest is one for float32 too."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)


def _unmasked(expr: Expr) -> Expr:
    """The condition under which a `where` tree of constants is zero."""
    if isinstance(expr, Const):
        return TRUE if expr.value == 0 else FALSE
    assert isinstance(expr, Op) and expr.name == "where"
    return where(expr.args[0], *map(_unmasked, expr.args[1:]))


def _read_mask(reader: MaskReader, node: fx.Node, lead: Sequence[Dim] | None) -> Expr | Unsupported:
    """The element of a mask at `(n, q, k)`; where a dim has size one, the mask doesn't depend on its index."""
    shape = node.meta["val"].shape
    rank = len(shape)
    if lead is None:
        lead = ((layout.ROW,), *[(2,)] * max(1, rank - 3))
    if rank < 2 or rank > len(lead) + 2:
        return _unclear(node, f"a mask of rank {rank} for scores of rank {len(lead) + 2}")
    sizes: dict[int, int] = {}
    places: list[Affine] = []
    for i, dim in enumerate(lead):
        heads = layout.plain_size(dim)
        if not any(map(layout.is_token_factor, dim)):
            places.append(Affine.dim(4 + i))  # a fresh index: heads, or a part of them
        elif dim[0] != layout.ROW or any(map(layout.is_token_factor, dim[1:])):
            return _unclear(node, "a mask for scores whose rows aren't the outermost part of a dim")
        else:
            merged = Affine.dim(N) * heads + Affine.dim(H)
            places.append(Affine.dim(N) if is_one(heads) else merged)
            sizes |= {} if is_one(heads) else {H: heads}
    places = [*places, Affine.dim(Q), Affine.dim(K)][len(lead) + 2 - rank :]
    mapping = {d: Affine() if is_one(size) else places[d] for d, size in enumerate(shape)}
    expr = substitute(reader.read_final(node).expr, mapping, sizes)
    if reader.stale is not None:
        return _unclear(node, f"`{reader.stale.name}` is changed in place while the mask is built from it")
    return expr if dims(expr) <= {N, Q, K} else _unclear(node, "the mask differs between heads")


def _formula(
    reader: MaskReader,
    node: fx.Node,
    allowed: Expr,
    data: MaskFormula | Unsupported,
    alone: bool,
    depth: float = math.inf,
) -> MaskFormula | Unsupported:
    """Name the terms of a condition; if one of them is data, the whole mask is `data`."""
    terms = conjuncts(allowed)
    if any(_reads_pairs(term) for term in terms):
        return data
    atoms = []
    for term in _by_index(reader, terms):
        atom = _atom(term, node)
        if isinstance(atom, Unsupported):
            return atom
        atoms.append(atom)
    formula = conjoin(MaskFormula(depth=depth), *atoms)
    return require_causal(formula, node) if alone else formula


def _as_data(data: MaskFormula, node: fx.Node, lead: Sequence[Dim] | None) -> MaskFormula | Unsupported:
    """Only masks that broadcast to `[N, H, Q, K]` can be checked at each call."""
    shape = node.meta["val"].shape
    rows_then_heads = lead is None or (
        len(lead) == 2 and lead[0] == (layout.ROW,) and not any(map(layout.is_token_factor, lead[1]))
    )
    if len(shape) > 4 or not (rows_then_heads or all(is_one(size) for size in shape[:-2])):
        return _unclear(node, "a mask that is data, for scores that aren't [rows, heads, queries, keys]")
    return data


def _reads_queries(expr: Expr) -> bool:
    """Does it read a tensor at the query's position?"""
    return any(Q in set().union(*(i.dims for i in e.indices)) for e in elements(expr))


def _reads_pairs(expr: Expr) -> bool:
    """Does it read a tensor that has both query and key dims?"""
    return any({Q, K} <= set().union(*(i.dims for i in e.indices)) for e in elements(expr))


def _atom(term: Expr, node: fx.Node) -> MaskFormula | Unsupported:
    """Name one term of a conjunction."""
    if term == FALSE:
        return _unclear(node, "the mask masks everything")
    used = dims(term)
    if Q not in used:
        return MaskFormula(key_valid=(Column(substitute(term, AT_KEY)),))
    if K not in used:
        return _unclear(node, "the mask masks whole queries", "mask keys only")
    bounds = _distance_bounds(term)
    if bounds is not None:
        return _band(*bounds, node)
    column = _same_value(term)
    if column is not None:
        return MaskFormula(same_value=(column,))
    return _unclear(node, f"a term of the mask is no known relation of query and key: {_outline(term)}")


def _band(ahead: float, behind: float, node: fx.Node) -> MaskFormula | Unsupported:
    """`k - q <= ahead` and `q - k <= behind`."""
    if ahead < 0:
        return _unclear(node, f"a token attends only to tokens at least {-ahead} before it, not to itself")
    if behind < 0:
        return _unclear(node, f"a token attends only to tokens at least {-behind} after it, not to itself")
    # a bound beyond the diagonal says nothing next to a causal term; alone, `require_causal` refuses
    return MaskFormula(causal=ahead == 0, window=None if behind == math.inf else int(behind) + 1)


def _distance_bounds(term: Expr) -> tuple[float, float] | None:
    """A comparison of the positions of query and key alone, as `k - q <= ahead` and `q - k <= behind`."""
    if not isinstance(term, Op) or term.name not in ("le", "eq") or not isinstance(term.args[0], Index):
        return None
    distance, limit = term.args[0].index, affine_of(term.args[1])
    if limit is None or distance not in (AHEAD, AHEAD * -1):
        return None
    bound = limit.offset if distance == AHEAD else -limit.offset
    if term.name == "eq":
        return bound, -bound
    return (bound, math.inf) if distance == AHEAD else (math.inf, -bound)


def _same_value(term: Expr) -> Column | None:
    """`f(n, q) == f(n, k)` for an integer or boolean `f`; floats differ from bits at NaN and -0.0."""
    if not isinstance(term, Op) or term.name != "eq" or term.args[0].dtype.is_floating_point:
        return None
    query, key = term.args if Q in dims(term.args[0]) else reversed(term.args)
    if K in dims(query) or Q in dims(key):
        return None
    column = substitute(key, AT_KEY)
    return Column(column) if substitute(query, AT_QUERY) == column else None


def _by_index(reader: MaskReader, terms: list[Expr]) -> list[Expr]:
    """Positions that rise by one within a segment, compared within it, are as good as indices.

    transformers compares `position_ids` instead of indices where sequences are packed into a row, next to a
    `same_value` of the segment numbers that it computes from them (`MaskReader.unit_step_base`). In such a
    conjunction `p(n, q) - p(n, k) = q - k`, hence comparisons of that difference are comparisons of indices.
    """
    for column in filter(None, map(_same_value, terms)):
        number = column.expr
        if not isinstance(number, Element) or number.indices != (Affine.dim(ROW), Affine.dim(POSITION)):
            continue
        base = reader.unit_step_base(number.node)
        if base is None:
            continue
        first = 4  # a fresh index: where the segment's positions start
        table = {
            substitute(base, {ROW: Affine.dim(N), POSITION: Affine.dim(at)}): Index(
                Affine.dim(at) + Affine.dim(first), base.dtype
            )
            for at in (Q, K)
        }
        renamed = [replace(term, table) for term in terms]
        # only where the start cancels was it a difference
        terms = [
            new if _distance_bounds(new) is not None else old for old, new in zip(terms, renamed, strict=True)
        ]
    return terms


def _outline(expr: Expr) -> str:
    """The expression in short, for reasons."""
    names = dict(enumerate("nhqk"))
    if isinstance(expr, Const):
        return str(expr.value)
    if isinstance(expr, Index):
        terms = [
            f"{c if c != 1 else ''}{_outline_part(d) if isinstance(d, Part) else names.get(d, d)}"
            for d, c in expr.index.terms
        ]
        return " + ".join([*terms, *([str(expr.index.offset)] if expr.index.offset else [])])
    if isinstance(expr, Element):
        at = ", ".join(_outline(index(i, torch.int64)) for i in expr.indices)
        return f"{input_name(expr.node)}[{at}]"
    return f"{expr.name}({', '.join(map(_outline, expr.args))})"


def _outline_part(part: Part) -> str:
    return f"({_outline(index(part.index, torch.int64))} {'%' if part.remainder else '//'} {part.divisor})"


def _unclear(node: fx.Node | None, explanation: str, hint: str = "") -> Unsupported:
    return Unsupported("mask_not_understood", node, explanation, hint)
