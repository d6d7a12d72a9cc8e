"""Attention, whatever its spelling: match the structure once, then check its properties on the match.

SDPA:     scaled_dot_product_attention(q, k, v, mask | is_causal, scale)
spelled:  matmul(q, kᵀ) → scale* → {tanh → scale}? → {scale, mask}* → softmax over keys, with a sink or without
          → {cast, inactive dropout}* → matmul(·, v)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from .graph import aten, bound_args, grad_mode, node_arg, same_size, shape, val
from .layout import KEY, Dim, is_token_factor
from .mask_expr import Const
from .mask_formula import CAUSAL, MaskFormula, conjoin, read_additive, read_allowed, require_causal
from .mask_reader import MaskReader
from .propagate import Analysis
from .reasons import Unsupported
from .rules import PROLOGUE, WEIGHT
from .softmax_forms import softmax_with_sink


@dataclass(frozen=True)
class AttentionMatch:
    """Causal attention over positions.

    Args:
        node: the node whose value is the attention output.
        q, k, v: stream nodes; `k_transposed` if k is given as `[..., D, S]`.
        scale: factor of the scores.
        formula: what a query may see.
        spelling: "sdpa" or "matmul-softmax-matmul".
        masked_is_zero: is the output zero for a query that may see nothing? (SDPA; softmax gives NaN or a mean.)
        softcap: c of `c * tanh(score / c)`, which scores go through before they are masked.
        sink: parameters, one for each query head: scores that compete with those of keys.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    formula: MaskFormula
    spelling: str
    k_transposed: bool = False
    masked_is_zero: bool = True
    softcap: float | None = None
    sink: fx.Node | None = None

    def describe(self) -> str:
        """What a query sees, and what becomes of its scores."""
        parts = [self.formula.describe()]
        if self.softcap is not None:
            parts.append(f"softcap({self.softcap:g})")
        if self.sink is not None:
            parts.append("sinks")
        return ", ".join(parts)


def match_attention(node: fx.Node, analysis: Analysis) -> AttentionMatch | Unsupported:
    """Match the attention whose output is `node` and check that it is causal in a way the engines compute."""
    if node.target is aten.scaled_dot_product_attention.default:
        found = _match_sdpa(node, analysis)
    else:
        found = _match_spelled(node, analysis)
    if isinstance(found, Unsupported):
        return found.at(node)
    refusal = _heads_refusal(found, analysis)
    return refusal.at(node) if refusal else found


def _match_sdpa(node: fx.Node, analysis: Analysis) -> AttentionMatch | Unsupported:
    args, kwargs = bound_args(node)
    q, k, v, mask, dropout_p, is_causal = args
    if dropout_p:
        return Unsupported(
            "randomness",
            node,
            f"attention dropout with p={dropout_p}",
            "set attention_dropout to 0 or call model.eval()",
        )
    formula = _sdpa_formula(node, mask, is_causal, analysis)
    if isinstance(formula, Unsupported):
        return formula
    scale = kwargs.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(shape(q)[-1])
    if isinstance(scale, fx.Node):
        return Unsupported("size_as_number", node, "the scale of attention isn't a constant")
    k, v = (_unrepeated(x, grad_mode(node), analysis) for x in (k, v))
    return AttentionMatch(node, q, k, v, scale, formula, "sdpa")


def _sdpa_formula(node: fx.Node, mask: Any, is_causal: bool, analysis: Analysis) -> MaskFormula | Unsupported:
    if mask is None:
        if is_causal or same_size(analysis.whole.positions, 1):
            return CAUSAL
        return Unsupported(
            "not_causal",
            node,
            "attention without a mask sees later tokens",
            "pass is_causal=True or a causal mask",
        )
    if analysis.kind(mask) != PROLOGUE:
        return Unsupported(
            "mask_not_understood", node, "the attention mask is computed from activations or parameters"
        )
    read = read_allowed if val(mask).dtype == torch.bool else read_additive
    return _causal(read(mask, alone=False, lead=_lead(node_arg(node, 0), analysis)), node, analysis)


def _causal(
    formula: MaskFormula | Unsupported, node: fx.Node, analysis: Analysis
) -> MaskFormula | Unsupported:
    """The formula, if it is causal; a single position always is."""
    if isinstance(formula, Unsupported):
        return formula
    if same_size(analysis.whole.positions, 1):
        return replace(formula, causal=True)
    return require_causal(formula, node)


def _match_spelled(node: fx.Node, analysis: Analysis) -> AttentionMatch | Unsupported:
    softmax = _skip_casts(node.args[0], analysis)
    if not isinstance(softmax, fx.Node) or softmax.target not in (*_SOFTMAX, softmax_with_sink):
        return Unsupported("token_mixing", node, "weights over keys that aren't the result of a softmax")
    has_sink = softmax.target is softmax_with_sink
    _, *between, dim = bound_args(softmax)[0][: 3 if has_sink else 2]
    sink = between[0] if has_sink else None
    if analysis.values[softmax].layout.dims[dim] != (KEY,):
        return Unsupported("token_mixing", softmax, "a softmax over another dim than the keys")
    if len({grad_mode(n) for n in _computed_inside(node, analysis)}) > 1:
        return Unsupported("token_mixing", node, "a part of the attention is computed under no_grad")
    read = _read_scores(node_arg(softmax, 0), analysis)
    if isinstance(read, Unsupported):
        return read
    formula = _causal(conjoin(*read.masks), node, analysis)
    if isinstance(formula, Unsupported):
        return formula
    product: Any = read.product
    q, k = product.args[-2:]
    v = node_arg(node, 1)
    if sink is not None and not _is_one_per_head(sink, q, analysis):
        return Unsupported("token_mixing", softmax, "a sink that isn't one parameter for each head")
    return AttentionMatch(
        node, q, k, v, read.scale * read.after_cap, formula, "matmul-softmax-matmul", k_transposed=True,
        masked_is_zero=False, softcap=read.softcap, sink=sink,
    )  # fmt: skip


def _computed_inside(node: fx.Node, analysis: Analysis) -> set[fx.Node]:
    """An attention's output, and the scores and probabilities that it is computed from."""
    found, todo = {node}, [node]
    while todo:
        inside = {n for n in todo.pop().all_input_nodes if _is_scores(n, analysis)} - found
        found |= inside
        todo += inside
    return found


@dataclass
class _Scores:
    """What is read between a softmax and the product of queries and keys.

    Args:
        product: the last node that was read.
        scale: factor of the scores; since the cap, if one was read: nodes are read backwards.
        softcap, after_cap: `after_cap * tanh(…)`, and its size.
    """

    product: fx.Node
    masks: list[MaskFormula] = field(default_factory=list)
    scale: float = 1.0
    softcap: float | None = None
    after_cap: float = 1.0


def _read_scores(node: fx.Node, analysis: Analysis) -> _Scores | Unsupported:
    read = _Scores(node)
    while read.product.target not in _PRODUCTS:
        node = read.product
        if node.target is aten.tanh.default and read.softcap is None and read.scale != 0:
            read.softcap, read.after_cap, read.scale = abs(read.scale), read.scale, 1.0
            read.product = node_arg(node, 0)
            continue
        is_product = node.target is aten.baddbmm.default
        step = (_read_baddbmm if is_product else _read_step)(node, analysis)
        if isinstance(step, Unsupported):
            return step
        read.product, factor, mask = step
        if mask is not None and read.softcap is not None:
            return Unsupported("finite_mask", node, "scores are capped after they were masked")
        if mask is not None and read.scale != 1.0 and not (mask.minus_inf and read.scale > 0):
            return Unsupported("finite_mask", node, "scores are scaled after they were masked")
        read.masks += [mask] if mask is not None else []
        read.scale *= factor
        if is_product:
            break
    return read


def _is_one_per_head(sink: fx.Node, q: fx.Node, analysis: Analysis) -> bool:
    return analysis.kind(sink) == WEIGHT and list(shape(sink)) == [*_head_dims(q, analysis), 1, 1]


_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default}
_CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.clone.default,
    aten.contiguous.default, aten.type_as.default, aten.alias.default,
}  # fmt: skip


def _is_cast(node: fx.Node) -> bool:
    """A cast between floating types, or a copy."""
    return node.target in _CASTS and val(node).dtype.is_floating_point


def _skip_casts(node: Any, analysis: Analysis) -> Any:
    """Through casts and inactive dropout (active dropout was refused by its rule, or is shared: not supported here)."""
    while isinstance(node, fx.Node):
        inactive = node.target is aten.dropout.default and not (node.args[1] and node.args[2])
        if not _is_cast(node) and not inactive:
            break
        node = node.args[0]
    return node


def _read_step(node: fx.Node, analysis: Analysis) -> tuple[fx.Node, float, MaskFormula | None] | Unsupported:
    """One operation between the scores and the softmax: `(its scores, its factor, its mask)`."""
    args, kwargs = bound_args(node)
    target = node.target
    if _is_cast(node):
        return args[0], 1.0, None
    if target in (
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.true_divide.Tensor,
    ):
        is_mul = target in (aten.mul.Tensor, aten.mul.Scalar)
        x, y = (
            args[:2] if _is_scores(args[0], analysis) else (args[1], args[0]) if is_mul else (args[0], None)
        )
        number = _constant(y, node)
        if number is not None:
            return x, number if is_mul else 1 / number, None
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        value = _is_masked_value(args[2], node)
        if value is not None:
            return _masked(args[0], args[1], True, value, analysis)
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        keeps = _is_scores(args[1], analysis)
        value = _is_masked_value(args[2] if keeps else args[1], node)
        if value is not None:
            return _masked(args[1] if keeps else args[2], args[0], not keeps, value, analysis)
    if target is aten.add.Tensor and kwargs.get("alpha", 1) == 1:
        scores, mask = (args[0], args[1]) if _is_scores(args[0], analysis) else (args[1], args[0])
        if isinstance(mask, fx.Node):
            if analysis.kind(mask) != PROLOGUE:
                return Unsupported(
                    "mask_not_understood",
                    node,
                    "a bias computed from activations or parameters is added to the scores",
                )
            found = read_additive(mask, alone=False, lead=_lead(scores, analysis))
            return found if isinstance(found, Unsupported) else (scores, 1.0, found)
    text = f"`{target}` between attention scores and softmax has no rule"
    hint = "understood is: scores × scale (→ tanh × cap) + mask → softmax; biased scores aren't yet"
    return Unsupported("token_mixing", node, text, hint)


def _read_baddbmm(
    node: fx.Node, analysis: Analysis
) -> tuple[fx.Node, float, MaskFormula | None] | Unsupported:
    """`baddbmm(mask, q, kᵀ)`: itself, the factor of the product, and the mask."""
    args, kwargs = bound_args(node)
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if analysis.kind(args[0]) != PROLOGUE:
        return Unsupported(
            "mask_not_understood",
            node,
            "a bias computed from activations or parameters is added to the scores",
        )
    if beta == 0:
        return node, float(alpha), None
    found = read_additive(args[0], alone=False, lead=_lead(node, analysis))
    if isinstance(found, Unsupported) or (beta != 1 and not (found.minus_inf and beta > 0)):
        return (
            found
            if isinstance(found, Unsupported)
            else Unsupported("finite_mask", node, "a finite mask is scaled")
        )
    return node, float(alpha), found


def _lead(scores: fx.Node, analysis: Analysis) -> tuple[Dim, ...]:
    """The dims of attention scores before those of queries and keys."""
    return analysis.values[scores].layout.dims[:-2]


def _masked(
    scores: fx.Node, condition: Any, negated: bool, minus_inf: bool, analysis: Analysis
) -> tuple[fx.Node, float, MaskFormula | None] | Unsupported:
    if analysis.kind(condition) != PROLOGUE:
        return Unsupported(
            "mask_not_understood", condition, "the attention mask is computed from activations or parameters"
        )
    formula = read_allowed(condition, negated=negated, alone=False, lead=_lead(scores, analysis))
    if isinstance(formula, Unsupported):
        return formula
    return scores, 1.0, replace(formula, minus_inf=minus_inf)


def _is_scores(node: Any, analysis: Analysis) -> bool:
    value = analysis.values.get(node) if isinstance(node, fx.Node) else None
    return value is not None and bool(value.layouts) and value.layout.has(KEY)


def _constant(x: Any, user: fx.Node) -> float | None:
    """A number, or the constant that a node computes (`torch.tensor(-inf)`, `full([], v)`)."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if not isinstance(x, fx.Node) or not isinstance(val(x), torch.Tensor):
        return None
    reader = MaskReader(user.graph)
    found = reader.read_final(x).expr
    return float(found.value) if isinstance(found, Const) and reader.stale is None else None


def _is_masked_value(value: Any, node: fx.Node) -> bool | None:
    """True for -inf, False for the lowest finite number of the scores' dtype, None for anything else (a bias)."""
    number = _constant(value, node)
    if number is None:
        return None
    if number == -math.inf:
        return True
    return False if number == torch.finfo(val(node).dtype).min else None


def _unrepeated(node: fx.Node, mode: bool, analysis: Analysis) -> fx.Node:
    """`repeat_kv` folded back: keys and values before their heads were repeated for grouped-query attention.

    x [N, KV, S, D] → unsqueeze(2) → expand [N, KV, G, S, D] → reshape [N, KV*G, S, D]     becomes     x
    x [N, KV, S, D] → repeat_interleave(G, dim=1)                                          becomes     x

    Args:
        mode: the attention's grad mode; what was repeated in another one stays so.
    """
    source: Any = node
    if source.target is aten.repeat_interleave.self_int and bound_args(source)[0][2] in (1, -3):
        return source.args[0] if grad_mode(source) == mode else node
    if source.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return node
    repeated = source.args[0]
    while repeated.target in (aten.clone.default, aten.contiguous.default):
        repeated = repeated.args[0]
    if repeated.target is not aten.expand.default or repeated.args[0].target is not aten.unsqueeze.default:
        return node
    unsqueezed = repeated.args[0]
    original = unsqueezed.args[0]
    layouts = [analysis.values[n].layout.dims for n in (original, repeated, source)]
    before, middle, after = layouts
    is_repeat = (
        len(before) == 4 and unsqueezed.args[1] in (2, -3)
        and middle[:2] == before[:2] and middle[3:] == before[2:]
        and after[0] == before[0] and after[2:] == before[2:]
        and all(grad_mode(n) == mode for n in (unsqueezed, repeated, source))
    )  # fmt: skip
    return original if is_repeat else node


def _heads_refusal(match: AttentionMatch, analysis: Analysis) -> Unsupported | None:
    """Key and value heads must be the query heads, or groups of consecutive ones share a head."""
    q, k, v = (_head_dims(n, analysis) for n in (match.q, match.k, match.v))
    for heads in (k, v):
        if not _is_grouped(q, heads):
            return Unsupported(
                "row_layout", match.node, f"heads {heads} of keys or values don't group the query heads {q}"
            )
    if math.prod(k) != math.prod(v):
        return Unsupported("row_layout", match.node, "keys and values have different numbers of heads")
    return None


def _head_dims(node: fx.Node, analysis: Analysis) -> list[int]:
    dims = analysis.values[node].layout.dims[:-2]
    return [math.prod(f for f in dim if not is_token_factor(f)) for dim in dims]


def _is_grouped(q: list[int], k: list[int]) -> bool:
    """`k` equals `q` up to some dim, divides it there, and is 1 after it."""
    k = [1] * (len(q) - len(k)) + k
    i = 0
    while i < len(q) and q[i] == k[i]:
        i += 1
    if i == len(q):
        return True
    groups = k[i] == 1 or (i == len(q) - 1 and q[i] % k[i] == 0)
    return groups and all(size == 1 for size in k[i + 1 :])
