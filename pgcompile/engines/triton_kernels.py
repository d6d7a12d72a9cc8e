"""The kernels of the triton engine: flash attention (Dao et al. 2022, arXiv 2205.14135) over lists of tiles.

A program owns one tile of queries (or of keys, for dk and dv) of one head and walks the tiles of the other side that
`blocks.BlockLists` names: partial tiles with the mask formula, full ones with the columns alone, if there are any.
Nothing is added up by atomics: every run gives the same bits.

Scores are powers of 2 inside; lse leaves as a natural logarithm. Every dot product
of float32 is exact in its factors ("ieee"; tensor cores would round them to tf32).

Shapes by suffix: B queries and S keys of a tile, D size of a query or key head, E size of a value head, both padded to
a power of 2. Memory: q `[T, H, D]`, k `[T, K, D]`, v `[T, K, E]`, out and grad_out `[T, H, E]` in any strides with
adjacent columns; what a kernel writes is contiguous, token-major, and lse and delta `[H, T]`.

Arguments that all kernels have:
    subtree_end, depth: int [T]; key_valid: bool [T] or None; same_value: int [NUM_SAME, T] or None; window or None:
        the mask, as in `contract.TreeMask`.
    scale; softcap or None: as in `contract.Scores`, both multiplied by log2(e).
    rows, tiles: `blocks.BlockLists`.
    *_token, *_head: strides in elements.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def load_tile(
    base, start, token_stride, num_tokens, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """`[BLOCK, PADDED]` from token `start` on, zeros beyond SIZE columns and, if RAGGED, beyond the tokens."""
    token = start + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    pointer = base + token.to(tl.int64)[:, None] * token_stride + column[None, :]
    if RAGGED:
        return tl.load(pointer, mask=(token < num_tokens)[:, None] & (column < SIZE)[None, :], other=0.0)
    if SIZE != PADDED:
        return tl.load(pointer, mask=(column < SIZE)[None, :], other=0.0)
    return tl.load(pointer)


@triton.jit
def store_tile(
    base, tile, start, token_stride, num_tokens, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    token = start + tl.arange(0, BLOCK)
    column = tl.arange(0, PADDED)
    pointer = base + token.to(tl.int64)[:, None] * token_stride + column[None, :]
    inside = (token < num_tokens)[:, None] & (column < SIZE)[None, :]
    tl.store(pointer, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def hide(
    scores, query, key, subtree_end, depth, key_valid, same_value, window, num_tokens, NUM_SAME: tl.constexpr,
    PARTIAL: tl.constexpr,
):  # fmt: skip
    """Scores, -inf where the mask formula hides the key; `query` and `key` are packed indices that broadcast.

    A tile that isn't PARTIAL has no key that the tree or the window hides, and none beyond the tokens.
    """
    if PARTIAL:
        end = tl.load(subtree_end + key, mask=key < num_tokens, other=0)
        scores = tl.where((key <= query) & (query < end), scores, -INF)
        if window is not None:
            query_depth = tl.load(depth + query, mask=query < num_tokens, other=0)
            key_depth = tl.load(depth + key, mask=key < num_tokens, other=0)
            scores = tl.where(query_depth - key_depth < window, scores, -INF)
    if key_valid is not None:
        scores = tl.where(tl.load(key_valid + key, mask=key < num_tokens, other=0) != 0, scores, -INF)
    for i in tl.static_range(NUM_SAME):
        column = same_value + i * num_tokens
        query_value = tl.load(column + query, mask=query < num_tokens, other=0)
        key_value = tl.load(column + key, mask=key < num_tokens, other=0)
        scores = tl.where(query_value == key_value, scores, -INF)
    return scores


@triton.jit
def cap(scores, softcap):
    """softcap * tanh(scores / softcap), by exponentials that don't overflow.

    1 - exp(-2x) cancels for small x: below 1/5 four terms of the series are exact to float32.
    """
    x = scores / softcap
    small = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    size = softcap * (1.0 - small) / (1.0 + small)
    square = x * x
    series = scores * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0.0, -size, size))


@triton.jit
def slope(capped, softcap):
    """The derivative of `cap`, from its result."""
    tanh = capped / softcap
    return 1.0 - tanh * tanh


@triton.jit
def forward_tiles(
    acc_BE, total_B, top_B, q_BD, k, v, k_token, v_token, query_start, tiles, begin, end,
    subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap,
    NUM_SAME: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Online softmax: the weighted sum of values, the sum of weights and the greatest score so far."""
    query_B1 = (query_start + tl.arange(0, BLOCK_Q))[:, None]
    for i in range(begin, end):
        key_start = tl.load(tiles + i) * BLOCK_K
        key_1S = (key_start + tl.arange(0, BLOCK_K))[None, :]
        k_SD = load_tile(k, key_start, k_token, num_tokens, D, PADDED_D, BLOCK_K, PARTIAL)
        v_SE = load_tile(v, key_start, v_token, num_tokens, E, PADDED_E, BLOCK_K, PARTIAL)
        s_BS = tl.dot(q_BD, tl.trans(k_SD), input_precision="ieee") * scale
        if softcap is not None:
            s_BS = cap(s_BS, softcap)
        s_BS = hide(
            s_BS, query_B1, key_1S, subtree_end, depth, key_valid, same_value, window, num_tokens, NUM_SAME,
            PARTIAL,
        )  # fmt: skip
        new_top_B = tl.maximum(top_B, tl.max(s_BS, 1))
        # Where nothing has been seen yet, -inf - -inf would be NaN.
        base_B = tl.where(new_top_B == -INF, 0.0, new_top_B)
        p_BS = tl.exp2(s_BS - base_B[:, None])
        shrink_B = tl.exp2(top_B - base_B)
        total_B = total_B * shrink_B + tl.sum(p_BS, 1)
        acc_BE = acc_BE * shrink_B[:, None]
        acc_BE += tl.dot(p_BS.to(v_SE.dtype), v_SE, input_precision="ieee")
        top_B = new_top_B
    return acc_BE, total_B, top_B


@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    q, k, v, out, lse,
    q_token, q_head, k_token, k_head, v_token, v_head,
    subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap, rows, tiles,
    NUM_SAME: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries of one head; the heads of a tile follow each other, for their keys' sake."""
    row = rows + tl.program_id(0) // HEADS * 4
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    query_start = tl.load(row) * BLOCK_Q
    begin, split, end = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    q_BD = load_tile(q + head * q_head, query_start, q_token, num_tokens, D, PADDED_D, BLOCK_Q, True)

    acc_BE = tl.zeros([BLOCK_Q, PADDED_E], tl.float32)
    total_B = tl.zeros([BLOCK_Q], tl.float32)
    top_B = tl.full([BLOCK_Q], -INF, tl.float32)
    acc_BE, total_B, top_B = forward_tiles(
        acc_BE, total_B, top_B, q_BD, k, v, k_token, v_token, query_start, tiles, begin, split,
        subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap,
        NUM_SAME, D, E, PADDED_D, PADDED_E, BLOCK_Q, BLOCK_K, True,
    )  # fmt: skip
    acc_BE, total_B, top_B = forward_tiles(
        acc_BE, total_B, top_B, q_BD, k, v, k_token, v_token, query_start, tiles, split, end,
        subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap,
        NUM_SAME, D, E, PADDED_D, PADDED_E, BLOCK_Q, BLOCK_K, False,
    )  # fmt: skip

    total_B = tl.where(total_B == 0.0, 1.0, total_B)  # sees no key: out = 0, lse = -inf
    out_BE = acc_BE / total_B[:, None]
    store_tile(out + head * E, out_BE, query_start, HEADS * E, num_tokens, E, PADDED_E, BLOCK_Q)
    query_B = query_start + tl.arange(0, BLOCK_Q)
    tl.store(lse + head * num_tokens + query_B, (top_B + tl.log2(total_B)) * LN2, mask=query_B < num_tokens)


@triton.jit
def dq_tiles(
    dq_BD, q_BD, grad_out_BE, lse_B, delta_B, k, v, k_token, v_token, query_start, tiles, begin, end,
    subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap,
    NUM_SAME: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    query_B1 = (query_start + tl.arange(0, BLOCK_Q))[:, None]
    for i in range(begin, end):
        key_start = tl.load(tiles + i) * BLOCK_K
        key_1S = (key_start + tl.arange(0, BLOCK_K))[None, :]
        k_SD = load_tile(k, key_start, k_token, num_tokens, D, PADDED_D, BLOCK_K, PARTIAL)
        v_SE = load_tile(v, key_start, v_token, num_tokens, E, PADDED_E, BLOCK_K, PARTIAL)
        s_BS = tl.dot(q_BD, tl.trans(k_SD), input_precision="ieee") * scale
        if softcap is not None:
            s_BS = cap(s_BS, softcap)
        hidden_BS = hide(
            s_BS, query_B1, key_1S, subtree_end, depth, key_valid, same_value, window, num_tokens, NUM_SAME,
            PARTIAL,
        )  # fmt: skip
        p_BS = tl.exp2(hidden_BS - lse_B[:, None])
        dp_BS = tl.dot(grad_out_BE, tl.trans(v_SE), input_precision="ieee")
        ds_BS = p_BS * (dp_BS - delta_B[:, None])
        if softcap is not None:
            ds_BS *= slope(s_BS, softcap)
        dq_BD += tl.dot(ds_BS.to(k_SD.dtype), k_SD, input_precision="ieee")
    return dq_BD


@triton.jit(do_not_specialize=["num_tokens"])
def dq_kernel(
    grad_out, q, k, v, out, lse, delta, dq,
    grad_out_token, grad_out_head, q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap, rows, tiles,
    NUM_SAME: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head, and delta = rowsum(grad_out * out), which the next kernel reads."""
    row = rows + tl.program_id(0) // HEADS * 4
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    query_start = tl.load(row) * BLOCK_Q
    begin, split, end = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    grad_out += head * grad_out_head
    q_BD = load_tile(q + head * q_head, query_start, q_token, num_tokens, D, PADDED_D, BLOCK_Q, True)
    grad_out_BE = load_tile(grad_out, query_start, grad_out_token, num_tokens, E, PADDED_E, BLOCK_Q, True)
    out_BE = load_tile(out + head * out_head, query_start, out_token, num_tokens, E, PADDED_E, BLOCK_Q, True)

    query_B = query_start + tl.arange(0, BLOCK_Q)
    delta_B = tl.sum(grad_out_BE.to(tl.float32) * out_BE.to(tl.float32), 1)
    tl.store(delta + head * num_tokens + query_B, delta_B, mask=query_B < num_tokens)
    lse_B = load_lse(lse + head * num_tokens, query_B, num_tokens)
    dq_BD = tl.zeros([BLOCK_Q, PADDED_D], tl.float32)
    dq_BD = dq_tiles(
        dq_BD, q_BD, grad_out_BE, lse_B, delta_B, k, v, k_token, v_token, query_start, tiles, begin, split,
        subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap,
        NUM_SAME, D, E, PADDED_D, PADDED_E, BLOCK_Q, BLOCK_K, True,
    )  # fmt: skip
    dq_BD = dq_tiles(
        dq_BD, q_BD, grad_out_BE, lse_B, delta_B, k, v, k_token, v_token, query_start, tiles, split, end,
        subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap,
        NUM_SAME, D, E, PADDED_D, PADDED_E, BLOCK_Q, BLOCK_K, False,
    )  # fmt: skip
    store_tile(dq + head * D, dq_BD * (scale * LN2), query_start, HEADS * D, num_tokens, D, PADDED_D, BLOCK_Q)


@triton.jit
def load_lse(lse, query, num_tokens):
    """As a power of 2; +inf for a query that sees no key or doesn't exist, so that its probabilities are 0."""
    lse = tl.load(lse + query, mask=query < num_tokens, other=INF)
    return tl.where(lse == -INF, INF, lse) * LOG2E


@triton.jit
def dkv_tiles(
    dk_SD, dv_SE, k_SD, v_SE, q, grad_out, lse, delta, q_token, grad_out_token, key_start, tiles, begin, end,
    subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap,
    NUM_SAME: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Scores are kept transposed, [S, B], so that both products take them as they are."""
    key_S1 = (key_start + tl.arange(0, BLOCK_K))[:, None]
    for i in range(begin, end):
        query_start = tl.load(tiles + i) * BLOCK_Q
        query_B = query_start + tl.arange(0, BLOCK_Q)
        q_BD = load_tile(q, query_start, q_token, num_tokens, D, PADDED_D, BLOCK_Q, PARTIAL)
        grad_out_BE = load_tile(
            grad_out, query_start, grad_out_token, num_tokens, E, PADDED_E, BLOCK_Q, PARTIAL
        )
        lse_B = load_lse(lse, query_B, num_tokens)
        delta_B = tl.load(delta + query_B, mask=query_B < num_tokens, other=0.0)
        s_SB = tl.dot(k_SD, tl.trans(q_BD), input_precision="ieee") * scale
        if softcap is not None:
            s_SB = cap(s_SB, softcap)
        hidden_SB = hide(
            s_SB, query_B[None, :], key_S1, subtree_end, depth, key_valid, same_value, window, num_tokens, NUM_SAME,
            PARTIAL,
        )  # fmt: skip
        p_SB = tl.exp2(hidden_SB - lse_B[None, :])
        dv_SE += tl.dot(p_SB.to(grad_out_BE.dtype), grad_out_BE, input_precision="ieee")
        dp_SB = tl.dot(v_SE, tl.trans(grad_out_BE), input_precision="ieee")
        ds_SB = p_SB * (dp_SB - delta_B[None, :])
        if softcap is not None:
            ds_SB *= slope(s_SB, softcap)
        dk_SD += tl.dot(ds_SB.to(q_BD.dtype), q_BD, input_precision="ieee")
    return dk_SD, dv_SE


@triton.jit(do_not_specialize=["num_tokens"])
def dkv_kernel(
    grad_out, q, k, v, lse, delta, dk, dv,
    grad_out_token, grad_out_head, q_token, q_head, k_token, k_head, v_token, v_head,
    subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap, rows, tiles,
    NUM_SAME: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys of one key head, summed over the GROUP of query heads that use it."""
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    row = rows + tl.program_id(0) // KEY_HEADS * 4
    key_head = (tl.program_id(0) % KEY_HEADS).to(tl.int64)
    key_start = tl.load(row) * BLOCK_K
    begin, split, end = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    k_SD = load_tile(k + key_head * k_head, key_start, k_token, num_tokens, D, PADDED_D, BLOCK_K, True)
    v_SE = load_tile(v + key_head * v_head, key_start, v_token, num_tokens, E, PADDED_E, BLOCK_K, True)

    dk_SD = tl.zeros([BLOCK_K, PADDED_D], tl.float32)
    dv_SE = tl.zeros([BLOCK_K, PADDED_E], tl.float32)
    for head in range(key_head * GROUP, key_head * GROUP + GROUP):
        dk_SD, dv_SE = dkv_tiles(
            dk_SD, dv_SE, k_SD, v_SE, q + head * q_head, grad_out + head * grad_out_head, lse + head * num_tokens,
            delta + head * num_tokens, q_token, grad_out_token, key_start, tiles, begin, split,
            subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap,
            NUM_SAME, D, E, PADDED_D, PADDED_E, BLOCK_Q, BLOCK_K, True,
        )  # fmt: skip
        dk_SD, dv_SE = dkv_tiles(
            dk_SD, dv_SE, k_SD, v_SE, q + head * q_head, grad_out + head * grad_out_head, lse + head * num_tokens,
            delta + head * num_tokens, q_token, grad_out_token, key_start, tiles, split, end,
            subtree_end, depth, key_valid, same_value, window, num_tokens, scale, softcap,
            NUM_SAME, D, E, PADDED_D, PADDED_E, BLOCK_Q, BLOCK_K, False,
        )  # fmt: skip
    dk_SD *= scale * LN2
    store_tile(dk + key_head * D, dk_SD, key_start, KEY_HEADS * D, num_tokens, D, PADDED_D, BLOCK_K)
    store_tile(dv + key_head * E, dv_SE, key_start, KEY_HEADS * E, num_tokens, E, PADDED_E, BLOCK_K)
