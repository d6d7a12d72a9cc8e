"""What engines share around their kernels; most of it for those that split attention over a tree into calls."""

import torch
from torch import Tensor

from .contract import Scores


def with_adjacent_columns(x: Tensor) -> Tensor:
    """Kernels step from head to head and from token to token as a tensor says, but take its columns for neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def with_positive_scale(q: Tensor, scores: Scores) -> tuple[Tensor, Scores, float]:
    """Queries, scores, and what the queries were multiplied by: the kernel multiplies its -inf by the scale, too."""
    scale = scores.scale
    if scale > 0:
        return q, scores, 1.0
    factor, scale = (-1.0, -scale) if scale < 0 else (0.0, 1.0)  # exact, unlike a product with the scale
    return q * factor, scores._replace(scale=scale), factor


def merge_(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Attention over two disjoint sets of keys → over both, in place of a: outputs `[..., E]`, log-sum-exps `[...]`.

    A side that sees nothing has lse -inf and doesn't count.
    """
    weight_b = torch.sigmoid(lse_b - lse_a).nan_to_num_(nan=0.0)  # NaN: neither side sees anything
    out_a.lerp_(out_b, weight_b[..., None])
    torch.logaddexp(lse_a, lse_b, out=lse_a)


def result(x_THD: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`[1, heads, T, size]` as the contract has it, token-major, without the columns that were padded."""
    return x_THD[None, ..., :size].to(dtype).contiguous().transpose(1, 2)
