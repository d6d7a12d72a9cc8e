"""Attention, whatever its spelling: match the structure once, then check its properties on the match.

SDPA:     scaled_dot_product_attention(q, k, v, mask | is_causal, scale)
spelled:  scores (attention_scores.py) → softmax over keys, with a sink or without → {cast, inactive dropout}*
          → matmul(·, v)
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .attention_scores import (
    Bias,
    is_scores,
    read_added,
    read_condition,
    read_scores,
    regroups_heads,
    summands,
)
from .graph import aten, bound_args, grad_mode, is_cast, is_inactive_dropout, node_arg, same_size, shape, val
from .layout import KEY, plain_size
from .mask_formula import CAUSAL, MaskFormula, conjoin, require_causal
from .propagate import Analysis
from .reasons import Unsupported
from .rules import WEIGHT
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
        biases: what is added to the scores of a key, before a cap.
        heads_per_key: query heads that share a key head.
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
    biases: tuple[Bias, ...] = ()
    heads_per_key: int = 1
    softcap: float | None = None
    sink: fx.Node | None = None

    @property
    def entries(self) -> int:
        """How many entries more than the model's have its queries and keys, which hold the biases.

        Kernels want head sizes that are multiples of eight.
        """
        if not self.biases:
            return 0
        needed = summands(val(self.node).dtype) * len(self.biases)
        return needed + -(shape(self.q)[-1] + needed) % 8

    def describe(self) -> str:
        """What a query sees, and what becomes of its scores."""
        parts = [self.formula.describe()]
        if self.biases:
            parts.append("bias of keys")
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
    if found.biases and not 2**-14 <= abs(found.scale) <= 2**14:  # its inverse is a number of every dtype
        return Unsupported("token_mixing", node, f"a bias is added to scores with the scale {found.scale:g}")
    if any(val(bias.node).dtype.itemsize > max(4, val(node).dtype.itemsize) for bias in found.biases):
        return Unsupported("token_mixing", node, "a float64 bias is added to scores of lower precision")
    refusal = _heads_refusal(found, analysis)
    if refusal is not None:
        return refusal.at(node)
    heads, key_heads = (math.prod(_head_dims(n, analysis)) for n in (found.q, found.k))
    biases = tuple(bias.limited(found.scale, val(node).dtype, found.formula) for bias in found.biases)
    return replace(found, biases=biases, heads_per_key=heads // key_heads)


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
    scale = kwargs.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(shape(q)[-1])
    if isinstance(scale, fx.Node):
        return Unsupported("size_as_number", node, "the scale of attention isn't a constant")
    terms = _sdpa_terms(node, mask, is_causal, analysis)
    if isinstance(terms, Unsupported):
        return terms
    formula = _causal(conjoin(*(t for t in terms if isinstance(t, MaskFormula))), node, analysis)
    if isinstance(formula, Unsupported):
        return formula
    k, v = (_unrepeated(x, grad_mode(node), analysis) for x in (k, v))
    biases = tuple(t for t in terms if isinstance(t, Bias))
    return AttentionMatch(node, q, k, v, scale, formula, "sdpa", biases=biases)


def _sdpa_terms(
    node: fx.Node, mask: Any, is_causal: bool, analysis: Analysis
) -> list[MaskFormula | Bias] | Unsupported:
    """What is added to the scores of `scaled_dot_product_attention`."""
    if mask is None:
        if is_causal or same_size(analysis.whole.positions, 1):
            return [CAUSAL]
        return Unsupported(
            "not_causal",
            node,
            "attention without a mask sees later tokens",
            "pass is_causal=True or a causal mask",
        )
    if val(mask).dtype != torch.bool:
        return read_added(mask, node_arg(node, 0), node, analysis)
    read = read_condition(mask, node_arg(node, 0), analysis)
    return read if isinstance(read, Unsupported) else [read]


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
    read = read_scores(node_arg(softmax, 0), analysis)
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
        masked_is_zero=False, biases=tuple(read.biases), softcap=read.softcap, sink=sink,
    )  # fmt: skip


def _computed_inside(node: fx.Node, analysis: Analysis) -> set[fx.Node]:
    """An attention's output, and the scores and probabilities that it is computed from."""
    found, todo = {node}, [node]
    while todo:
        inside = {n for n in todo.pop().all_input_nodes if is_scores(n, analysis)} - found
        found |= inside
        todo += inside
    return found


def _is_one_per_head(sink: fx.Node, q: fx.Node, analysis: Analysis) -> bool:
    return analysis.kind(sink) == WEIGHT and list(shape(sink)) == [*_head_dims(q, analysis), 1, 1]


_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default}


def _skip_casts(node: Any, analysis: Analysis) -> Any:
    """Through casts, views and inactive dropout (active dropout was refused by its rule)."""
    while isinstance(node, fx.Node):
        if not (is_cast(node) or is_inactive_dropout(node) or regroups_heads(node, analysis)):
            break
        node = node.args[0]
    return node


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
    return [plain_size(dim) for dim in dims]


def _is_grouped(q: list[int], k: list[int]) -> bool:
    """`k` equals `q` up to some dim, divides it there, and is 1 after it; dims in front without heads don't count."""
    q, k = (list(itertools.dropwhile(lambda size: size == 1, heads)) for heads in (q, k))
    if len(k) > len(q):
        return False
    k = [1] * (len(q) - len(k)) + k
    i = 0
    while i < len(q) and q[i] == k[i]:
        i += 1
    if i == len(q):
        return True
    groups = k[i] == 1 or (i == len(q) - 1 and q[i] % k[i] == 0)
    return groups and all(size == 1 for size in k[i + 1 :])
