"""Prefix attention by kernels of our own for CUDA: a tile of queries walks the tiles of keys that it sees.

All segments, of any depth, are one launch in forward and two in backward. No score is computed for a pair of tiles
without a visible pair; block lists say which those are (blocks.py). The kernels are in triton_kernels.py, which is
imported at the first call: Triton is an optional package.

Not yet measured on a GPU. On a CPU it runs in Triton's interpreter, for tests.

Shapes by suffix as in reference.py.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import blocks
from .common import with_adjacent_columns
from .contract import Scores, TreeMask

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Triton's own list of supported GPUs begins with Ampere.
OLDEST_CAPABILITY = (8, 0)


class Tiling(NamedTuple):
    """Queries and keys of a tile, warps of a program, and loads in flight (`num_stages`) of its loop."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Tilings(NamedTuple):
    forward: Tiling
    dq: Tiling
    dkv: Tiling


# By the greatest (padded) head size and bytes of an element. Starting points for Hopper (228 KiB of shared memory and
# 64 Ki registers of 32 bits per multiprocessor), still to be tuned there:
# - The accumulators stay in registers: BLOCK_Q x E floats forward, BLOCK_K x (D + E) for dk and dv. Of the
#   tiles tried, these are the largest that ptxas (sm_90a, Triton 3.6) compiles with no spill, or one of less than 100
#   bytes. (float32 dq of heads over 128 spills whatever its tile.)
# - The tile of the program's own side lies in shared memory once, those of the other side num_stages times.
# - 4 warps multiply 64 rows at a time with wgmma: in 16 bits, BLOCK_Q (for dk and dv, BLOCK_K) is a multiple of 64
#   as long as registers last.
# - float32 is multiplied without tensor cores, from registers: small tiles.
TILINGS = {
    (64, 2): Tilings(Tiling(128, 64, 4, 3), Tiling(128, 64, 8, 3), Tiling(64, 128, 8, 3)),
    (128, 2): Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(32, 128, 8, 2)),
    (256, 2): Tilings(Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 2), Tiling(32, 64, 8, 2)),
    (512, 2): Tilings(Tiling(32, 32, 8, 1), Tiling(32, 32, 8, 1), Tiling(16, 32, 8, 1)),
    (64, 4): Tilings(Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 2)),
    (128, 4): Tilings(Tiling(32, 16, 8, 2), Tiling(32, 16, 8, 2), Tiling(16, 32, 8, 1)),
    (256, 4): Tilings(Tiling(32, 16, 4, 1), Tiling(16, 16, 8, 1), Tiling(16, 32, 8, 1)),
    (512, 4): Tilings(Tiling(16, 16, 8, 1), Tiling(16, 16, 8, 1), Tiling(16, 16, 8, 1)),
}
LARGEST_HEAD = max(size for size, _ in TILINGS)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """See contract.Engine."""
    if dtype not in DTYPES:
        return f"it doesn't compute in {dtype}"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "it needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
        if dtype == torch.bfloat16:
            return "Triton's interpreter has no bfloat16"
    elif device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    return why_no_triton(device)


def why_no_triton(device: torch.device) -> str | None:
    """What keeps Triton itself from compiling for a device."""
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"Triton needs compute capability {OLDEST_CAPABILITY}, the device has {capability}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton can't be imported ({error})"
    return None


def why_not_heads(size: int, scores: Scores) -> str | None:
    """See contract.Engine."""
    return f"it has no tiles for heads of {size}" if padded(size) > LARGEST_HEAD else None


def why_not_call(mask: TreeMask, q_1HTD: Tensor, v_1KTE: Tensor) -> None:
    """See contract.Engine: nothing."""


def attention(
    q_1HTD: Tensor, k_1KTD: Tensor, v_1KTE: Tensor, mask: TreeMask, scores: Scores
) -> tuple[Tensor, Tensor]:
    """See reference.attention."""
    from .triton_kernels import forward_kernel

    q, k, v = (with_adjacent_columns(x) for x in (q_1HTD, k_1KTD, v_1KTE))
    _, heads, tokens, _ = q.shape
    out_1THE = q.new_empty(1, tokens, heads, v.shape[-1])
    lse_1HT = q.new_empty(1, heads, tokens, dtype=torch.float32)
    tiling = tilings(q, v).forward
    lists = blocks.key_lists(mask.segments_M5, tiling.block_q, tiling.block_k, mask.window, q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[(len(lists.rows_R4) * heads,)](
            q, k, v, out_1THE, lse_1HT, *strides(q, k, v),
            **mask_arguments(mask), **size_arguments(q, k, v, scores), **tiling_arguments(tiling, lists),
        )  # fmt: skip
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
    """See reference.attention_backward."""
    from .triton_kernels import dkv_kernel, dq_kernel

    tensors = grad_out_1HTE, q_1HTD, k_1KTD, v_1KTE, out_1HTE
    grad_out, q, k, v, out = (with_adjacent_columns(x) for x in tensors)
    lse = lse_1HT.contiguous()
    delta = torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape) for x in (q, k, v))
    shared = {**mask_arguments(mask), **size_arguments(q, k, v, scores)}
    tiling = tilings(q, v)

    def lists(of: Any, tiling: Tiling) -> blocks.BlockLists:
        return of(mask.segments_M5, tiling.block_q, tiling.block_k, mask.window, q.device)

    key_lists, query_lists = lists(blocks.key_lists, tiling.dq), lists(blocks.query_lists, tiling.dkv)
    with torch.cuda.device_of(q):
        dq_kernel[(len(key_lists.rows_R4) * q.shape[1],)](
            grad_out, q, k, v, out, lse, delta, dq, *strides(grad_out, q, k, v, out),
            **shared, **tiling_arguments(tiling.dq, key_lists),
        )  # fmt: skip
        dkv_kernel[(len(query_lists.rows_R4) * k.shape[1],)](
            grad_out, q, k, v, lse, delta, dk, dv, *strides(grad_out, q, k, v),
            **shared, **tiling_arguments(tiling.dkv, query_lists),
        )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# --- arguments of the kernels


def strides(*tensors_1HTD: Tensor) -> list[int]:
    """Strides of tokens and heads, one after the other."""
    return [x.stride(dim) for x in tensors_1HTD for dim in (2, 1)]


def mask_arguments(mask: TreeMask) -> dict[str, Any]:
    """The mask formula as the kernels read it, without a look at any value: that would wait for the device."""
    valid = list(mask.key_valid)
    same = []
    for column_T in mask.same_value:
        if column_T.is_floating_point():
            valid.append(~column_T.isnan())  # equals nothing, itself included
            # Equal values have equal bits: double is exact, and -0.0 + 0.0 is 0.0.
            column_T = (column_T.double() + 0.0).view(torch.int64)
        same.append(column_T.long())
    for other in valid[1:]:
        valid[0] = valid[0] & other
    return {
        "subtree_end": mask.subtree_end_T.contiguous(),
        "depth": mask.depth_T.contiguous(),
        "key_valid": valid[0].contiguous() if valid else None,
        "same_value": torch.stack(same) if same else None,
        "NUM_SAME": len(same),
        "window": mask.window,
    }


def size_arguments(q_1HTD: Tensor, k_1KTD: Tensor, v_1KTE: Tensor, scores: Scores) -> dict[str, Any]:
    """Sizes, and what becomes of scores, which are powers of 2 in the kernels: natural ones times log2(e)."""
    _, heads, tokens, size = q_1HTD.shape
    value_size = v_1KTE.shape[-1]
    return {
        "num_tokens": tokens,
        "scale": scores.scale * math.log2(math.e),
        "softcap": None if scores.softcap is None else scores.softcap * math.log2(math.e),
        "HEADS": heads,
        "GROUP": heads // k_1KTD.shape[1],
        "D": size,
        "E": value_size,
        "PADDED_D": padded(size),
        "PADDED_E": padded(value_size),
    }


def tiling_arguments(tiling: Tiling, lists: blocks.BlockLists) -> dict[str, Any]:
    return {
        "rows": lists.rows_R4,
        "tiles": lists.tiles_L,
        "BLOCK_Q": tiling.block_q,
        "BLOCK_K": tiling.block_k,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
    }


def padded(size: int) -> int:
    """The next power of 2; tl.dot wants 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def tilings(q_1HTD: Tensor, v_1KTE: Tensor) -> Tilings:
    size = padded(max(q_1HTD.shape[-1], v_1KTE.shape[-1]))
    return TILINGS[min(key for key in TILINGS if key[0] >= size and key[1] == q_1HTD.element_size())]
