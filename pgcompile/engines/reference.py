"""Prefix attention in plain PyTorch: the specification of every engine, and the oracle of their tests.

It computes what the words say, in float32 (float64 for float64 input): scores, mask, softmax, weighted sum.
Only work that is zero by construction is skipped. No token sees another root tree, so every tree is computed
by itself, in blocks of queries against the keys from the tree's first token to the block's last. Memory is
O(block x tree), never O(T²).

Shapes by suffix: T packed tokens, H query heads, K key heads, D size of a query or key head, E size of a
value head, M segments. Within one block: B queries, S keys, and R = (H // K) * B rows, the queries of all
heads that share a key head (grouped-query attention): folding them into one matrix needs no copy of keys and
values.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import Scores, TreeMask

# Queries per block. The scores of a block (8 heads x 128 x 400 keys x 4 bytes: 1.6 MB) stay in a CPU core's
# cache between the passes of the softmax; 64 and 256 were no faster on trees of 400 tokens.
QUERY_BLOCK = 128


def why_not(device: torch.device, dtype: torch.dtype) -> None:
    """See contract.Engine: nothing is too much for the specification."""


def why_not_heads(size: int, scores: Scores) -> None:
    """See contract.Engine."""


def why_not_call(mask: TreeMask, q_1HTD: Tensor, v_1KTE: Tensor) -> None:
    """See contract.Engine."""


def attention(
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTE: Tensor,
    mask: TreeMask,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """Attention of every packed token to the keys that `visible_mask` shows it.

    Returns `out_1HTE` in q's dtype and `lse_1HT`, the log-sum-exp of each query's scores, in the compute dtype. A query
    that sees no key gets out = 0 and lse = -inf.
    """
    _, heads, tokens, _ = q_1HTD.shape
    dtype = compute_dtype(q_1HTD)
    out_1THE = q_1HTD.new_empty(1, tokens, heads, v_1KTE.shape[-1])
    lse_1HT = q_1HTD.new_empty(1, heads, tokens, dtype=dtype)
    for forest in forests(mask.segments_M5):
        k_KFD, v_KFE = k_1KTD[0, :, forest].to(dtype), v_1KTE[0, :, forest].to(dtype)
        for block in query_blocks(forest):
            keys = slice(forest.start, block.stop)
            k_KSD, v_KSE = k_KFD[:, : keys.stop - keys.start], v_KFE[:, : keys.stop - keys.start]
            q_KRD = fold_group(q_1HTD[0, :, block], k_KSD) * scores.scale
            visible_BS = visible_mask(block, keys, mask)

            scores_KRS = hide(capped_scores(q_KRD, k_KSD, scores.softcap), visible_BS)
            top_KR1 = finite(scores_KRS.amax(-1, keepdim=True))
            p_KRS = exp_(scores_KRS.sub_(top_KR1))
            total_KR1 = p_KRS.sum(-1, keepdim=True)
            out_KRE = torch.bmm(p_KRS, v_KSE).div_(total_KR1.masked_fill(total_KR1 == 0, 1))

            out_1THE[0, block] = out_KRE.view(heads, -1, v_KSE.shape[-1]).transpose(0, 1)
            lse_1HT[0, :, block] = total_KR1.log_().add_(top_KR1).view(heads, -1)
    return out_1THE.transpose(1, 2), lse_1HT


def attention_backward(
    grad_out_1HTE: Tensor,
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTE: Tensor,
    out_1HTE: Tensor,
    lse_1HT: Tensor,
    mask: TreeMask,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `attention`'s out, with the dtypes and shapes of q, k and v.

    The formulas of flash attention (Dao et al. 2022, appendix B.2): p = exp(score - lse) is computed again
    instead of kept, dv = pᵀ dout, dscore = p * (dout vᵀ - delta) with delta = rowsum(dout * out), dq = dscore
    k, dk = dscoreᵀ q; with a cap, dscore is multiplied by its slope. The products over R rows also sum the
    gradients of the heads that share a key head, in the compute dtype.
    """
    heads = q_1HTD.shape[1]
    dtype = compute_dtype(q_1HTD)
    dq_1THD, dk_1TKD, dv_1TKE = (x.new_empty(x.transpose(1, 2).shape) for x in (q_1HTD, k_1KTD, v_1KTE))
    for forest in forests(mask.segments_M5):
        k_KFD, v_KFE = k_1KTD[0, :, forest].to(dtype), v_1KTE[0, :, forest].to(dtype)
        dk_KFD, dv_KFE = k_KFD.new_zeros(k_KFD.shape), v_KFE.new_zeros(v_KFE.shape)
        for block in query_blocks(forest):
            keys = slice(forest.start, block.stop)
            k_KSD, v_KSE = k_KFD[:, : keys.stop - keys.start], v_KFE[:, : keys.stop - keys.start]
            dk_KSD, dv_KSE = dk_KFD[:, : keys.stop - keys.start], dv_KFE[:, : keys.stop - keys.start]
            q_KRD = fold_group(q_1HTD[0, :, block], k_KSD) * scores.scale
            dout_KRE, out_KRE = (fold_group(x[0, :, block], v_KSE) for x in (grad_out_1HTE, out_1HTE))
            lse_KR1 = finite(lse_1HT[0, :, block]).reshape(*q_KRD.shape[:2], 1)
            delta_KR1 = (dout_KRE * out_KRE).sum(-1, keepdim=True)
            visible_BS = visible_mask(block, keys, mask)

            scores_KRS, slope_KRS = capped_scores(q_KRD, k_KSD, scores.softcap), None
            if scores.softcap is not None:
                slope_KRS = 1 - (scores_KRS / scores.softcap).square_()
            p_KRS = exp_(hide(scores_KRS, visible_BS).sub_(lse_KR1))
            dscore_KRS = torch.bmm(dout_KRE, v_KSE.mT).sub_(delta_KR1).mul_(p_KRS)
            if slope_KRS is not None:
                dscore_KRS.mul_(slope_KRS)
            dv_KSE.baddbmm_(p_KRS.mT, dout_KRE)
            dk_KSD.baddbmm_(dscore_KRS.mT, q_KRD)
            dq_KRD = torch.bmm(dscore_KRS, k_KSD).mul_(scores.scale)

            dq_1THD[0, block] = dq_KRD.view(heads, -1, q_KRD.shape[-1]).transpose(0, 1)
        dk_1TKD[0, forest] = dk_KFD.transpose(0, 1)
        dv_1TKE[0, forest] = dv_KFE.transpose(0, 1)
    return dq_1THD.transpose(1, 2), dk_1TKD.transpose(1, 2), dv_1TKE.transpose(1, 2)


def visible_mask(queries: slice, keys: slice, mask: TreeMask) -> Tensor:
    """Which key each query sees, bool [B, S], for ranges of packed tokens: the mask formula, word for word.

    Query t sees key s if s is t or an ancestor of t (`s <= t < subtree_end[s]`: in depth-first preorder a
    subtree is a range), every `key_valid` column holds at s, every `same_value` column is equal at s and t,
    and s is fewer than `window` tokens up the path (`depth` counts the tokens before one in its row).
    """
    query_B1 = torch.arange(queries.start, queries.stop, device=mask.depth_T.device)[:, None]
    key_S = torch.arange(keys.start, keys.stop, device=mask.depth_T.device)
    visible_BS = (key_S <= query_B1) & (query_B1 < mask.subtree_end_T[keys])
    for valid_T in mask.key_valid:
        visible_BS &= valid_T[keys]
    for value_T in mask.same_value:
        visible_BS &= value_T[keys] == value_T[queries, None]
    if mask.window is not None:
        visible_BS &= mask.depth_T[queries, None] - mask.depth_T[keys] < mask.window
    return visible_BS


def capped_scores(q_KRD: Tensor, k_KSD: Tensor, softcap: float | None) -> Tensor:
    """Scores `[K, R, S]` of scaled queries."""
    scores_KRS = torch.bmm(q_KRD, k_KSD.mT)
    return scores_KRS if softcap is None else scores_KRS.div_(softcap).tanh_().mul_(softcap)


def hide(scores_KRS: Tensor, visible_BS: Tensor) -> Tensor:
    """-inf in place where the key is hidden; one mask serves all heads."""
    # Adding a float mask is vectorised on CPU, masked_fill_ with a broadcast mask is not (8 times slower).
    scores_KRS.view(-1, *visible_BS.shape).add_(torch.where(visible_BS, 0.0, -torch.inf))
    return scores_KRS


def exp_(x: Tensor) -> Tensor:
    """exp(x) in place, as a power of 2: exp on CPU is 4 to 30 times slower where it underflows (at -inf)."""
    return x.mul_(math.log2(math.e)).exp2_()


def finite(x: Tensor) -> Tensor:
    """x with 0 for -inf (a query that sees no key), so that exp(-inf - x) is 0 and not NaN."""
    return x.masked_fill(x == -torch.inf, 0)


def fold_group(x_HBD: Tensor, like_KSD: Tensor) -> Tensor:
    """`[H, B, D]` as `[K, R, D]`, in the dtype of `like_KSD`: heads that share a key head become rows."""
    return x_HBD.to(like_KSD.dtype).reshape(like_KSD.shape[0], -1, x_HBD.shape[-1])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores, softmax and lse: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forests(segments_M5: Tensor) -> Iterator[slice]:
    """Ranges of packed tokens that see nothing outside: one root tree, or several that fit in a query block.

    A segment is (start, end, subtree_end, depth, parent); root segments have parent -1, and their trees cover
    all tokens. Joining small trees keeps a batch of many short rows from paying operator launches per row.
    """
    start = stop = 0
    roots_M = segments_M5[:, 4] < 0
    for tree_start, tree_stop in segments_M5[roots_M][:, [0, 2]].tolist():
        if tree_stop - start > QUERY_BLOCK and stop > start:
            yield slice(start, stop)
            start = tree_start
        stop = tree_stop
    if stop > start:
        yield slice(start, stop)


def query_blocks(forest: slice) -> Iterator[slice]:
    """The forest in ranges of at most QUERY_BLOCK tokens."""
    for start in range(forest.start, forest.stop, QUERY_BLOCK):
        yield slice(start, min(start + QUERY_BLOCK, forest.stop))
