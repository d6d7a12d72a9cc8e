"""One call of variable-length flash attention: PyTorch's own, or, where scores are capped, the package flash-attn's.

PyTorch's is called as ATen's operator, because the public `torch.nn.attention.varlen.varlen_attn` has no backward that
takes out and lse. It is FlashAttention-2, until `torch.nn.attention.activate_flash_attention_impl("FA3")` (or "FA4")
puts that package's kernels in its place: that is the user's choice for the whole process.

Shapes by suffix as in reference.py; within a call, L queries, S keys and B sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from .contract import Scores

# Window sizes (left, right): tokens before and after the diagonal that a query sees, -1 for all.
EVERYTHING = (-1, -1)
CAUSAL = (-1, 0)

# Since this one, the package's operators know caps and both sides of a window apart.
OLDEST_PACKAGE = "2.7"

Tokens = slice | Tensor


class Call(NamedTuple):
    """B sequences of queries, and of keys, none of them empty.

    Args:
        queries: the packed tokens that ask, sequence after sequence; no token twice.
        keys: those that are asked. In a path gather, a token once for each path that it is on.
        cu_queries, cu_keys: int32 [B + 1] on the device, where sequences start among the queries (keys).
        max_queries, max_keys: the longest sequence.
        window_size: which keys a query sees, (left, right), from the bottom right corner.
    """

    queries: Tokens
    keys: Tokens
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    window_size: tuple[int, int]

    @property
    def is_causal(self) -> bool:
        return self.window_size == CAUSAL

    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        return self.cu_queries, self.cu_keys, self.max_queries, self.max_keys

    def window(self) -> dict[str, int]:
        """A window in keyword arguments. Without one there are none: FlashAttention-4 takes any number for a window."""
        if self.window_size in (CAUSAL, EVERYTHING):
            return {}
        return dict(zip(("window_size_left", "window_size_right"), self.window_size, strict=True))


@functools.cache
def why_no_package() -> str | None:
    """What keeps flash-attn from being called, as half a sentence; None if nothing does."""
    try:
        import flash_attn
        import flash_attn.flash_attn_interface
    except ImportError as error:
        return f"flash-attn can't be imported ({error})"
    version = flash_attn.__version__
    return None if TorchVersion(version) >= OLDEST_PACKAGE else f"flash-attn {version} is too old"


def forward(call: Call, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """out `[L, H, D]` and lse `[H, L]`, natural logarithm, float32."""
    tensors = q_THD[call.queries], k_TKD[call.keys], v_TKD[call.keys]
    if scores.softcap is None:
        out_LHD, lse_HL, *_ = torch.ops.aten._flash_attention_forward(
            *tensors, *call.lengths(), 0.0, call.is_causal, False, scale=scores.scale, **call.window()
        )
        return out_LHD, lse_HL
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out_LHD, lse_HL, *_ = _flash_attn_varlen_forward(
        *tensors,
        *call.lengths(),
        0.0,
        scores.scale,
        call.is_causal,
        *call.window_size,
        softcap=scores.softcap,
    )
    return out_LHD, lse_HL


def backward(
    call: Call, tensors: Sequence[Tensor], lse_TH: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq `[L, H, D]`, dk and dv `[S, K, D]`) of this call's pairs.

    Args:
        tensors: gradient of out, q, k, v, out: token-major, out over all keys of a query.
        lse_TH: over all of them, too.
    """
    asking, asked = call.queries, call.keys
    parts = [x[at] for x, at in zip(tensors, (asking, asking, asked, asked, asking), strict=True)]
    lse_HL = lse_TH[asking].t().contiguous()
    if scores.softcap is None:
        random = lse_HL.new_empty(2, dtype=torch.uint64)  # the state of dropout, which is off: not read
        return torch.ops.aten._flash_attention_backward(
            *parts, lse_HL, *call.lengths(), 0.0, call.is_causal, random, random,
            scale=scores.scale, **call.window(),
        )  # fmt: skip
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in parts[1:4])
    _flash_attn_varlen_backward(
        *parts, lse_HL, dq, dk, dv, *call.lengths(), 0.0, scores.scale, call.is_causal, *call.window_size,
        softcap=scores.softcap, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv
