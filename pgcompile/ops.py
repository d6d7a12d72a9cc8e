"""The operators of a packed graph: prefix attention, and the two gathers that repeat packed tokens.

    prefix_attention   every packed token attends to the tokens before it in its own row
    gather_tokens      packed [T, ...] to any list of its tokens, as unpacking needs
    gather_entries     packed [T, V] to single entries of its rows, as a loss over labels needs

Each has a schema, one implementation for CPU and CUDA, a fake for tracing (no size is baked in) and an
autograd formula whose backward is an operator too, so that ahead-of-time autograd keeps both whole. The
gathers are operators of our own because their backward sums: see copies.py.

Shapes by suffix: T packed tokens, H query heads, K key heads, D size of a query or key head, E size of a
value head, M copies (segments in `segments_M5`), V vocabulary, N entries per copy.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .copies import sum_dtype, sums_of_copies
from .engines import Scores, TreeMask
from .engines.choose import engine_for
from .engines.reference import compute_dtype, finite
from .errors import raises_engine_error

# prefix_attention


def without_autocast(operator: Callable) -> Callable:
    """Engines choose the dtypes that they compute in; autocast, where a graph runs uncompiled, would choose others."""

    @functools.wraps(operator)
    def run(x: Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return operator(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return operator(x, *args)

    return run


@without_autocast
def _prefix_attention(
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTE: Tensor,
    sinks_H: Tensor | None,
    subtree_end_T: Tensor,
    depth_T: Tensor,
    segments_M5: Tensor,
    hides_2: Tensor,
    key_valid: Sequence[Tensor],
    same_value: Sequence[Tensor],
    scale: float,
    softcap: float | None,
    window: int | None,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """Attention over packed tokens in depth-first preorder: (out `[1, H, T, E]`, lse `[1, H, T]`).

    Query t sees key s iff s is t or an ancestor of it (`s <= t < subtree_end[s]`), every `key_valid` column
    (bool [T]) holds at s, every `same_value` column ([T]) agrees at s and t, and `depth[t] - depth[s] <
    window` where there is a window. H is a multiple of K; query head h uses key head h // (H // K).
    `segments_M5` (int64, host memory) holds start, end, subtree_end, depth of the first token, and parent (-1
    for roots) of every segment, in preorder. `hides_2` (bool, host memory) says whether `key_valid` and
    `same_value` hide anything in this batch; where not, they aren't looked at.

    Scores are `scale * q·k`, with a softcap `softcap * tanh(score / softcap)`. Each query head may have a sink, a score
    that competes in the softmax and has no value (StreamingLLM, arXiv 2309.17453); lse counts it.

    A query that sees no key has out = 0, lse = -inf (or its sink) and zero gradients. lse is not differentiable. Raises
    ValueError for an unknown engine and for tensors that don't fit together.
    """
    _check_heads(q_1HTD, k_1KTD, v_1KTE, sinks_H)
    tokens = q_1HTD.shape[2]
    for name, x, length in [
        ("k", k_1KTD, k_1KTD.shape[2]),
        ("v", v_1KTE, v_1KTE.shape[2]),
        ("subtree_end", subtree_end_T, subtree_end_T.numel()),
        ("depth", depth_T, depth_T.numel()),
        *((f"key_valid[{i}]", x, x.numel()) for i, x in enumerate(key_valid)),
        *((f"same_value[{i}]", x, x.numel()) for i, x in enumerate(same_value)),
    ]:
        if length != tokens or x.device != q_1HTD.device:
            expected, found = f"{tokens} tokens on {q_1HTD.device}", f"{length} on {x.device}"
            raise ValueError(f"prefix_attention: q has {expected}, {name} has {found}")
    if not (segments_M5.is_cpu and hides_2.is_cpu):
        raise ValueError(
            "prefix_attention: segments and hides must be in host memory (reading them must not wait)"
        )
    mask = _tree_mask(subtree_end_T, depth_T, segments_M5, hides_2, key_valid, same_value, window)
    scores = Scores(scale, softcap)
    chosen = engine_for(engine, q_1HTD, v_1KTE, mask, scores)
    out_1HTE, lse_1HT = chosen.attention(q_1HTD, k_1KTD, v_1KTE, mask, scores)
    return (out_1HTE, lse_1HT) if sinks_H is None else _with_sinks(out_1HTE, lse_1HT, sinks_H)


def _tree_mask(
    subtree_end_T: Tensor, depth_T: Tensor, segments_M5: Tensor, hides_2: Tensor, key_valid: Sequence[Tensor],
    same_value: Sequence[Tensor], window: int | None,
) -> TreeMask:  # fmt: skip
    has_holes, has_parts = hides_2.tolist()
    columns = (key_valid if has_holes else (), same_value if has_parts else ())
    return TreeMask(subtree_end_T, depth_T, segments_M5, *columns, window)


def _with_sinks(out_1HTE: Tensor, lse_1HT: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Merged with one more key, of score `sinks_H` and value 0, as engines merge parts of a tree; overwrites out.

    So engines needn't know: their backward takes probabilities from lse and delta from out.
    """
    sinks_H1 = sinks_H.to(lse_1HT.dtype)[:, None]
    total_1HT = torch.logaddexp(lse_1HT, sinks_H1)
    share_1HT = (lse_1HT - finite(total_1HT)).exp()
    return out_1HTE.mul_(share_1HT[..., None]), total_1HT


def _sinks_gradient(grad_out_1HTE: Tensor, out_1HTE: Tensor, lse_1HT: Tensor, sinks_H: Tensor) -> Tensor:
    """-Σ p · rowsum(grad_out * out) over queries, p the sink's probability: its value is 0."""
    p_1HT = (sinks_H.to(lse_1HT.dtype)[:, None] - finite(lse_1HT)).exp()
    delta_1HT = (grad_out_1HTE.to(lse_1HT.dtype) * out_1HTE.to(lse_1HT.dtype)).sum(-1)
    return (p_1HT * delta_1HT).sum(-1)[0].neg().to(sinks_H.dtype)


def _check_heads(q_1HTD: Tensor, k_1KTD: Tensor, v_1KTE: Tensor, sinks_H: Tensor | None) -> None:
    """Raise ValueError for heads that don't fit. No look at token counts: tracing must put no guard on T."""
    q, k, v = (tuple(x.shape[i] for i in range(x.dim()) if i != 2) for x in (q_1HTD, k_1KTD, v_1KTE))
    if not (len(q) == len(k) == len(v) == 3 and q[0] == k[0] == v[0] == 1):
        raise ValueError(
            f"prefix_attention: q, k, v must be [1, heads, T, size], are {q}, {k}, {v} without T"
        )
    if k[1] != v[1] or q[1] % k[1] != 0 or q[2] != k[2]:
        raise ValueError(f"prefix_attention: (1, heads, size) of q {q}, k {k}, v {v} don't fit")
    if not q_1HTD.dtype == k_1KTD.dtype == v_1KTE.dtype:
        raise ValueError(f"prefix_attention: q is {q_1HTD.dtype}, k {k_1KTD.dtype}, v {v_1KTE.dtype}")
    if sinks_H is not None and sinks_H.shape != q_1HTD.shape[1:2]:
        raise ValueError(f"prefix_attention: {q[1]} query heads, but sinks are {tuple(sinks_H.shape)}")


def _prefix_attention_fake(
    q_1HTD: Tensor, k_1KTD: Tensor, v_1KTE: Tensor, sinks_H: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    _check_heads(q_1HTD, k_1KTD, v_1KTE, sinks_H)
    heads, tokens = q_1HTD.shape[1:3]
    out_1THE = q_1HTD.new_empty(1, tokens, heads, v_1KTE.shape[-1])
    return out_1THE.transpose(1, 2), q_1HTD.new_empty(1, heads, tokens, dtype=compute_dtype(q_1HTD))


def _prefix_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, subtree_end, depth, segments, hides, key_valid, same_value, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(
        q, k, v, sinks, out, lse, subtree_end, depth, segments, hides, *key_valid, *same_value
    )
    ctx.counts = len(key_valid), len(same_value)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # else every backward fills a gradient of lse with zeros


def _prefix_attention_autograd(ctx: Any, grad_out: Tensor | None, grad_lse: None) -> tuple[Any, ...]:
    valid, same = ctx.counts
    dq = dk = dv = dsinks = None
    if grad_out is not None:
        # asked for once: under activation checkpointing that computes them again
        saved = ctx.saved_tensors
        tensors, columns = saved[:10], saved[10:]
        dq, dk, dv, dsinks = prefix_attention_backward(
            grad_out, *tensors, columns[:valid], columns[valid:], *ctx.options
        )
        if tensors[3] is None:
            dsinks = None
    return dq, dk, dv, dsinks, None, None, None, None, [None] * valid, [None] * same, None, None, None, None


@raises_engine_error
@without_autocast
def _prefix_attention_backward(
    grad_out_1HTE: Tensor,
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTE: Tensor,
    sinks_H: Tensor | None,
    out_1HTE: Tensor,
    lse_1HT: Tensor,
    subtree_end_T: Tensor,
    depth_T: Tensor,
    segments_M5: Tensor,
    hides_2: Tensor,
    key_valid: Sequence[Tensor],
    same_value: Sequence[Tensor],
    scale: float,
    softcap: float | None,
    window: int | None,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsinks) from out and lse; no probabilities are kept. dsinks is empty where there are no sinks."""
    mask = _tree_mask(subtree_end_T, depth_T, segments_M5, hides_2, key_valid, same_value, window)
    scores = Scores(scale, softcap)
    chosen = engine_for(engine, q_1HTD, v_1KTE, mask, scores)
    grads = chosen.attention_backward(grad_out_1HTE, q_1HTD, k_1KTD, v_1KTE, out_1HTE, lse_1HT, mask, scores)
    if sinks_H is None:
        return *grads, lse_1HT.new_empty(0)
    return *grads, _sinks_gradient(grad_out_1HTE, out_1HTE, lse_1HT, sinks_H)


def _prefix_attention_backward_fake(
    grad_out_1HTE: Tensor, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTE: Tensor, sinks_H: Tensor | None,
    out_1HTE: Tensor, lse_1HT: Tensor, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q_1HTD, k_1KTD, v_1KTE))
    return dq, dk, dv, lse_1HT.new_empty(0) if sinks_H is None else sinks_H.new_empty(sinks_H.shape)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """The graph of a backward (create_graph=True) exists for the gathers, which are linear, but not here."""
    raise NotImplementedError("prefix_attention has no second derivative: don't use create_graph=True")


# gather_tokens


def _gather_tokens(x: Tensor, index_M: Tensor) -> Tensor:
    """`out[m] = x[index[m]]` for x `[T, ...]` of any dtype; zeros at index -1 (a dropped position)."""
    hole_M = index_M < 0
    if x.shape[0] == 0:
        return x.new_zeros(index_M.shape[0], *x.shape[1:])
    out = x.index_select(0, index_M.clamp_min(0))
    if out.is_cpu:  # touch the few holes only; on a device, counting them would make the host wait
        return out.index_fill_(0, hole_M.nonzero().flatten(), 0)
    return out.masked_fill_(hole_M.view(-1, *[1] * (x.dim() - 1)), 0)


@raises_engine_error
def _gather_tokens_backward(grad: Tensor, index_M: Tensor, num_tokens: int) -> Tensor:
    """Sum of the gradients of each token's copies, `[T, ...]`: deterministic, in float32, cast once."""
    return sums_of_copies(index_M, num_tokens, grad.dtype)(grad)


def _gather_tokens_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.num_tokens = x.shape[0]


def _gather_tokens_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return gather_tokens_backward(grad, *ctx.saved_tensors, ctx.num_tokens), None


def _gather_tokens_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gather_tokens_backward_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gather_tokens(grad, *ctx.saved_tensors), None, None


# gather_entries


def _gather_entries(x_TV: Tensor, index_M: Tensor, column_MN: Tensor) -> Tensor:
    """`out[m, n] = x[index[m], column[m, n]]`, zeros at index -1, without the `[M, V]` rows in between.

    At index -1 the column may be anything: an ignored label stays what it is. Elsewhere it is checked.
    """
    check_columns(index_M, column_MN, x_TV.shape[1])
    if x_TV.numel() == 0:
        return x_TV.new_zeros(column_MN.shape)
    return _gather_entries_inlined(x_TV, index_M, column_MN)


def _gather_entries_inlined(x_TV: Tensor, index_M: Tensor, column_MN: Tensor) -> Tensor:
    """The same for columns that were checked (`check_columns`), in operations that a compiler fuses with what makes
    `x`, which is then never written."""
    hole_M1 = (index_M < 0)[:, None]
    return x_TV[index_M.clamp_min(0)[:, None], column_MN.masked_fill(hole_M1, 0)].masked_fill(hole_M1, 0)


def check_columns(index_M: Tensor, column_MN: Tensor, vocab: int) -> None:
    """Raises RuntimeError, like torch.gather, for a column outside [0, vocab), but at index -1 (on CUDA a device-side
    assertion)."""
    if column_MN.is_cpu and column_MN.numel() > 0:
        low, high = (int(x) for x in column_MN.aminmax())
        if low >= 0 and high < vocab:  # nearly always, and read once
            return
    inside_MN = (column_MN >= 0) & (column_MN < vocab)
    message = f"gather_entries: column out of range for a vocabulary of {vocab}"
    torch._assert_async((inside_MN | (index_M < 0)[:, None]).all(), message)


@raises_engine_error
def _gather_entries_backward(
    grad_MN: Tensor, index_M: Tensor, column_MN: Tensor, num_tokens: int, vocab: int
) -> Tensor:
    """Dense gradient `[T, V]`: copies of one entry are summed as in gather_tokens, then written once.

    Only M x N entries are held in float32: a dense float32 accumulator would be twice the gradient itself.
    """
    size = num_tokens * vocab
    entry = torch.where((index_M < 0)[:, None], -1, index_M[:, None] * vocab + column_MN).flatten()
    if grad_MN.is_cpu and sum_dtype(grad_MN.dtype) == grad_MN.dtype:  # no wider sums needed: no sort either
        return sums_of_copies(entry, size, grad_MN.dtype)(grad_MN.flatten()).view(num_tokens, vocab)
    entry, order = entry.sort(stable=True)
    is_first = entry.diff(prepend=entry.new_full((1,), -1)) != 0
    rank = is_first.cumsum(0) - 1  # of the entry among the distinct ones; of holes, which come first, -1
    sums = sums_of_copies(rank, rank.shape[0], grad_MN.dtype)(grad_MN.flatten()[order])
    out = grad_MN.new_zeros(size + 1)  # holes write to the last entry, which is cut off
    out[entry] = sums[rank]  # copies of one entry all write the same sum
    return out[:size].view(num_tokens, vocab)


def _gather_entries_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, index, column = inputs
    ctx.save_for_backward(index, column)
    ctx.shape = x.shape


def _gather_entries_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return gather_entries_backward(grad, *ctx.saved_tensors, *ctx.shape), None, None


def _gather_entries_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _gather_entries_backward_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gather_entries(grad, *ctx.saved_tensors), None, None, None, None


# registration

_LIBRARY = Library("pgcompile", "DEF")


def _register(
    schema: str, implementation: Callable, fake: Callable, backward: Callable, setup_context: Callable | None
) -> Any:
    """Define one operator and return its overload, the target of a graph node.

    Tags: the operator reads tensors of any strides (no copies before it), and is safe to trace. If it reads tensors in
    host memory, it isn't for CUDA graphs: replayed for another batch, they would still compute on this one's tree.
    """
    name = schema.partition("(")[0]
    tags = [torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag]
    _LIBRARY.define(schema, tags=tags + [torch.Tag.cudagraph_unsafe] * ("Tensor segments" in schema))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pgcompile::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"pgcompile::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.pgcompile, name).default


_MASK = (
    "Tensor subtree_end, Tensor depth, Tensor segments, Tensor hides, Tensor[] key_valid, Tensor[] same_value, "
    "float scale, float? softcap, int? window, str engine"
)

prefix_attention = _register(
    f"prefix_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_MASK}) -> (Tensor out, Tensor lse)",
    _prefix_attention,
    _prefix_attention_fake,
    _prefix_attention_autograd,
    _prefix_attention_setup,
)
prefix_attention_backward = _register(
    "prefix_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, Tensor lse, "
    f"{_MASK}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    _prefix_attention_backward,
    _prefix_attention_backward_fake,
    _refuse_second_derivative,
    None,
)
gather_tokens = _register(
    "gather_tokens(Tensor x, Tensor index) -> Tensor",
    _gather_tokens,
    lambda x, index: x.new_empty(index.shape[0], *x.shape[1:]),
    _gather_tokens_autograd,
    _gather_tokens_setup,
)
gather_tokens_backward = _register(
    "gather_tokens_backward(Tensor grad, Tensor index, SymInt num_tokens) -> Tensor",
    _gather_tokens_backward,
    lambda grad, index, num_tokens: grad.new_empty(num_tokens, *grad.shape[1:]),
    _gather_tokens_backward_autograd,
    _gather_tokens_backward_setup,
)
gather_entries = _register(
    "gather_entries(Tensor x, Tensor index, Tensor column) -> Tensor",
    _gather_entries,
    lambda x, index, column: x.new_empty(column.shape),
    _gather_entries_autograd,
    _gather_entries_setup,
)
gather_entries_backward = _register(
    "gather_entries_backward(Tensor grad, Tensor index, Tensor column, SymInt num_tokens, SymInt vocab)"
    " -> Tensor",
    _gather_entries_backward,
    lambda grad, index, column, num_tokens, vocab: grad.new_empty(num_tokens, vocab),
    _gather_entries_backward_autograd,
    _gather_entries_backward_setup,
)

# For inner compilers: operators as others that they can fuse.
DECOMPOSITIONS = {gather_entries: _gather_entries_inlined}

# Of this file, which says what operators are traced to: their derivatives, and the above.
DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
