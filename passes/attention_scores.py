"""Attention scores: what becomes of the product of queries and keys before the softmax.

    matmul(q, kᵀ) → {cast, scale, bias of keys}* → {tanh → scale}? → {cast, scale, bias of keys, mask}*
                  → {at least the lowest number}?

Read backwards, from the softmax to the product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from .graph import aten, bound_args, is_cast, node_arg, shape, val
from .layout import KEY, POSITION, Dim, plain_size
from .mask_expr import Const
from .mask_formula import MaskFormula, lowest, read_additive, read_allowed
from .mask_reader import MaskReader
from .mask_rules import is_one
from .propagate import Analysis
from .reasons import Unsupported
from .rules import PROLOGUE


@dataclass(frozen=True)
class Bias:
    """Numbers that are added to the scores of a key, whoever asks (ALiBi, arXiv 2108.12409).

    ALiBi's `slope * (k - q)` differs from `slope * k`, as models add it, by a constant of the query, which the softmax
    cancels.

    Args:
        node: prologue value that broadcasts to the scores; the same for all queries.
        dims: of `node`, aligned right to those of the scores; its keys are positions.
        heads: of the scores, in each of their dims before those of queries and keys; 1 each if it is the same for all.
        factor: of the numbers.
        limit: of their size; checked at each call.
    """

    node: fx.Node
    dims: tuple[Dim, ...]
    heads: tuple[int, ...]
    factor: float = 1.0
    limit: float = math.inf

    @property
    def differs_by_head(self) -> bool:
        return any(size != 1 for size in self.heads)

    def limited(self, scale: float, dtype: torch.dtype, formula: MaskFormula) -> Bias:
        """With the limit up to which no sum or product overflows, and the bias is far from what masks.

        Args:
            scale, dtype, formula: of the attention.
        """
        wide = torch.finfo(torch.promote_types(dtype, torch.float32)).max * abs(scale)
        limit = min(torch.finfo(dtype).max, wide, formula.depth) / abs(self.factor)
        return replace(self, limit=min(limit, torch.finfo(val(self.node).dtype).max) / 4)


def summands(dtype: torch.dtype) -> int:
    """Entries of a key that add up to a bias, where queries and keys have this dtype."""
    return 1 if dtype == torch.float64 else 3


@dataclass
class AttentionScores:
    """`softcap * tanh((scale * product + bias) / softcap)` behind masks; without a cap, only what is in the tanh.

    Args:
        product: the product of queries and keys; while reading, the last node that was read.
        scale: while reading, the factor since the cap, if one was read.
        grows: while reading, whether there was a factor larger than 1, which makes the lowest number infinite.
        least: what scores are raised to at the end, masked ones too.
        after_cap: the factor of the tanh; `softcap` is its size.
    """

    product: fx.Node
    masks: list[MaskFormula] = field(default_factory=list)
    scale: float = 1.0
    grows: bool = False
    least: float = -math.inf
    softcap: float | None = None
    after_cap: float = 1.0
    biases: list[Bias] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Were only casts and views read until here?"""
        return self == AttentionScores(self.product)

    def cap(self) -> None:
        self.softcap, self.after_cap, self.scale = abs(self.scale), self.scale, 1.0

    def why_not(self, added: MaskFormula | Bias) -> str | None:
        """Why what is added here can't be part of the formula."""
        if isinstance(added, Bias):
            return None
        if self.softcap is not None:
            return "scores are capped after they were masked"
        is_low = not self.grows and (self.scale == 1 or added.depth * self.scale > _DEPTH)
        if self.scale <= 0 or not (added.minus_inf or is_low):
            return "scores are scaled after they were masked"
        return None

    def add(self, added: MaskFormula | Bias) -> None:
        if isinstance(added, Bias):
            self.biases.append(replace(added, factor=added.factor * self.scale * self.after_cap))
        else:
            self.masks.append(replace(added, depth=min(added.depth * self.scale, -self.least)))

    def multiply(self, factor: float) -> None:
        self.scale *= factor
        self.grows |= abs(factor) > 1


@dataclass(frozen=True)
class _Step:
    """One operation: the scores that it takes, their factor, what it adds to them, and what they are raised to."""

    scores: fx.Node
    factor: float = 1.0
    added: Sequence[MaskFormula | Bias] = ()
    least: float | None = None


@dataclass(frozen=True)
class _Masking:
    """A `masked_fill` or `where` that keeps some numbers, and makes the others minus infinity or the lowest."""

    kept: fx.Node
    condition: fx.Node
    negated: bool
    depth: float

    def read(self, scores: fx.Node, analysis: Analysis) -> MaskFormula | Unsupported:
        found = read_condition(self.condition, scores, analysis, self.negated)
        return found if isinstance(found, Unsupported) else replace(found, depth=self.depth)


def read_scores(node: fx.Node, analysis: Analysis) -> AttentionScores | Unsupported:
    """What a softmax gets, back to the product of queries and keys."""
    read = AttentionScores(node)
    while read.product.target not in _PRODUCTS:
        node = read.product
        if node.target is aten.tanh.default and read.softcap is None and read.scale != 0:
            if read.biases:
                return Unsupported("token_mixing", node, "a bias is added to capped scores")
            read.cap()
            read.product = node_arg(node, 0)
            continue
        is_product = node.target is aten.baddbmm.default
        step = (_read_baddbmm if is_product else _read_step)(node, analysis)
        if isinstance(step, Unsupported):
            return step
        if (
            not is_product
            and not regroups_heads(node, analysis)
            and lead(node, analysis) != lead(step.scores, analysis)
        ):
            return Unsupported(
                "row_layout", node, "something gives scores heads or rows that queries don't have"
            )
        if step.least is not None:
            if not read.is_empty:
                text = "scores are raised to the lowest number, and changed after that"
                return Unsupported("finite_mask", node, text)
            read.least = step.least
        for term in step.added:
            refusal = read.why_not(term)
            if refusal is not None:
                return Unsupported("finite_mask", node, refusal)
            read.add(term)
        read.product = step.scores
        read.multiply(step.factor)
        if is_product:
            break
    return read


def is_scores(node: Any, analysis: Analysis) -> bool:
    """Attention scores or probabilities: values that have keys."""
    value = analysis.values.get(node) if isinstance(node, fx.Node) else None
    return value is not None and bool(value.layouts) and value.layout.has(KEY)


def regroups_heads(node: fx.Node, analysis: Analysis) -> bool:
    """A view of scores or probabilities that leaves queries and keys alone: `[N*H, S, S]` as `[N, H, S, S]`."""
    if node.target not in _VIEWS:
        return False
    before, after = (analysis.values[n].layout.dims[-2:] for n in (node_arg(node, 0), node))
    return before == after and after[1] == (KEY,)


def lead(scores: fx.Node, analysis: Analysis) -> tuple[Dim, ...]:
    """The dims of attention scores before those of queries and keys."""
    return analysis.values[scores].layout.dims[:-2]


# What no score comes near: the lowest number may be divided and still masks.
_DEPTH = 1e30
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_MULTIPLICATIONS = {aten.mul.Tensor, aten.mul.Scalar}
_DIVISIONS = {aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor}
_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip
_WHERES = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}


def _read_step(node: fx.Node, analysis: Analysis) -> _Step | Unsupported:
    args, kwargs = bound_args(node)
    target = node.target
    if is_cast(node) or regroups_heads(node, analysis):
        return _Step(args[0])
    if target in _MULTIPLICATIONS | _DIVISIONS:
        is_first = is_scores(args[0], analysis)
        number = _constant(args[1], node) if is_first else None
        if number is not None and (number or target in _MULTIPLICATIONS):
            return _Step(args[0], number if target in _MULTIPLICATIONS else 1 / number)
        number = _constant(args[0], node) if target in _MULTIPLICATIONS else None
        if number is not None:
            return _Step(args[1], number)
    clamped = _as_clamped(node)
    if clamped is not None:
        return clamped
    masking = _as_masking(node)
    if masking is not None:
        found = masking.read(masking.kept, analysis)
        return found if isinstance(found, Unsupported) else _Step(masking.kept, added=[found])
    if target is aten.add.Tensor and kwargs.get("alpha", 1) == 1:
        scores, added = args[:2] if is_scores(args[0], analysis) else (args[1], args[0])
        if isinstance(added, fx.Node):
            terms = read_added(added, scores, node, analysis)
            return terms if isinstance(terms, Unsupported) else _Step(scores, added=terms)
    text = f"`{target}` between attention scores and softmax has no rule"
    hint = "understood is: scores × scale + bias of keys (→ tanh × cap) + mask → softmax"
    return Unsupported("token_mixing", node, text, hint)


def _read_baddbmm(node: fx.Node, analysis: Analysis) -> _Step | Unsupported:
    """`baddbmm(mask | bias, q, kᵀ)`: of the product, which is the node itself."""
    args, kwargs = bound_args(node)
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if beta == 0:
        return _Step(node, float(alpha))
    terms = read_added(args[0], node, node, analysis)
    if isinstance(terms, Unsupported):
        return terms
    if beta != 1 and any(isinstance(t, MaskFormula) and not (t.minus_inf and beta > 0) for t in terms):
        return Unsupported("finite_mask", node, "a finite mask is scaled")
    terms = [replace(t, factor=t.factor * beta) if isinstance(t, Bias) else t for t in terms]
    return _Step(node, float(alpha), terms)


def read_condition(
    condition: fx.Node, scores: fx.Node, analysis: Analysis, negated: bool = False
) -> MaskFormula | Unsupported:
    """A boolean mask: true where attention is allowed, or `negated`.

    Args:
        scores: a node with the dims of the scores, up to those of queries and keys.
    """
    if analysis.kind(condition) != PROLOGUE:
        text = "the attention mask is computed from activations or parameters"
        return Unsupported("mask_not_understood", condition, text)
    return read_allowed(condition, negated=negated, alone=False, lead=lead(scores, analysis))


def read_added(
    added: fx.Node, scores: fx.Node, user: fx.Node, analysis: Analysis
) -> list[MaskFormula | Bias] | Unsupported:
    """The terms of what `user` adds to the scores: masks where they can be read as such, else biases of keys.

    Args:
        scores: a node with the dims of the scores, up to those of queries and keys.
    """
    if analysis.kind(added) != PROLOGUE:
        text = "a bias computed from activations or parameters is added to the scores"
        return Unsupported("mask_not_understood", user, text)
    mask = read_additive(added, alone=False, lead=lead(scores, analysis))
    if isinstance(mask, MaskFormula) and mask.depth < -lowest(val(user).dtype):
        text = f"the mask's lowest number, {-mask.depth:g}, is one that scores may have"
        mask = Unsupported("finite_mask", user, text, "mask with torch.finfo(dtype).min or -inf")
    is_read = not isinstance(mask, Unsupported) and mask.data is None
    bias = None if is_read else _as_bias(added, scores, analysis)
    if bias is not None:
        return [bias]
    if not isinstance(mask, Unsupported):
        return [mask]
    if MaskReader(added.graph).is_written(added):
        return mask
    args, kwargs = bound_args(added)
    if added.target is aten.expand.default:
        return read_added(args[0], scores, user, analysis)
    masking = _as_masking(added)
    parts: list[Any] = []
    if masking is not None:
        parts = [masking.read(scores, analysis), read_added(masking.kept, scores, user, analysis)]
    elif added.target is aten.add.Tensor and kwargs.get("alpha", 1) == 1 and isinstance(args[1], fx.Node):
        parts = [read_added(x, scores, user, analysis) for x in args[:2]]
    if not parts or any(isinstance(part, Unsupported) for part in parts):
        return mask
    return [term for part in parts for term in (part if isinstance(part, list) else [part])]


def _as_bias(added: fx.Node, scores: fx.Node, analysis: Analysis) -> Bias | None:
    """What is added, if it is a number for each key, the same for all queries."""
    sizes, value = shape(added), val(added)
    is_of_keys = (
        0 < len(sizes) <= len(lead(scores, analysis)) + 2
        and not is_one(sizes[-1])
        and all(map(is_one, sizes[-2:-1]))
    )
    if not (value.dtype.is_floating_point and is_of_keys):
        return None
    reader = MaskReader(added.graph)
    reader.read_final(added)
    if reader.stale is not None:
        return None
    first = lead(scores, analysis)
    aligned = (*first, (), (POSITION,))[-len(sizes) :]
    dims = tuple(() if is_one(size) else dim for size, dim in zip(sizes, aligned, strict=True))
    differs = any(plain_size(dim) != 1 for dim in dims)
    return Bias(added, dims, tuple(plain_size(dim) if differs else 1 for dim in first))


def _as_masking(node: fx.Node) -> _Masking | None:
    args, _ = bound_args(node)
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        choices = [(args[0], args[1], True, args[2])]
    elif node.target in _WHERES:
        choices = [(args[1], args[0], False, args[2]), (args[2], args[0], True, args[1])]
    else:
        return None
    for kept, condition, negated, value in choices:
        number = _constant(value, node)
        if number is not None and number <= lowest(val(node).dtype) and isinstance(kept, fx.Node):
            return _Masking(kept, condition, negated, -number)
    return None


def _as_clamped(node: fx.Node) -> _Step | None:
    """What raises scores, if only to the lowest number."""
    args, _ = bound_args(node)
    if node.target in (aten.maximum.default, aten.max.other):
        choices = [args, args[::-1]]
    elif node.target in (aten.clamp_min.default, aten.clamp.default) and args[2:] in ((), (None,)):
        choices = [args[:2]]
    else:
        return None
    for scores, number in choices:
        least = _constant(number, node)
        if least is not None and least <= lowest(val(node).dtype):
            return _Step(scores, least=least)
    return None


def _constant(x: Any, user: fx.Node) -> float | None:
    """A number, or the constant that a node computes (`torch.tensor(-inf)`, `full([], v)`)."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if not isinstance(x, fx.Node) or not isinstance(val(x), torch.Tensor):
        return None
    reader = MaskReader(user.graph)
    found = reader.read_final(x).expr
    return float(found.value) if isinstance(found, Const) and reader.stale is None else None
