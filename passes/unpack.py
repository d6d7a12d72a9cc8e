"""What the late graph calls to get from packed tokens back to the batch.

Everything goes through `pgcompile`'s own gathers, whose backward sums the copies of a token in float32,
deterministically (docs/design.md, "The unpack").
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import POSITION, ROW, Dim, is_token_factor


def tokens_first(x: Tensor, dims: tuple[Dim, ...]) -> Tensor:
    """A packed value with the layout `dims` as `[T, ...]`: the plain factors, one dim each, in their order."""
    holder = POSITION if any(POSITION in dim for dim in dims) else ROW
    factors = [f for dim in dims for f in (dim or (1,))]
    x = x.reshape([-1 if f == holder else 1 if is_token_factor(f) else f for f in factors])
    x = x.movedim(factors.index(holder), 0)
    dropped = [i for i, f in enumerate([f for f in factors if f != holder], start=1) if is_token_factor(f)]
    return x.squeeze(dropped) if dropped else x


def unpack_tokens(
    x: Tensor, token_map: Tensor, dims: tuple[Dim, ...], order: tuple[int, ...] | None = None
) -> Tensor:
    """Packed tokens in the caller's shape: `[1, T, ...]` → `[N, S, ...]`; zeros where a token was dropped.

    Args:
        x: packed value with the layout `dims`.
        token_map: int64 `[N, S]`, or `[M]` after a select: packed index of each token, -1 where dropped.
        order: the result's dims as they shall follow each other in memory, the last one in steps of 1; None: any.
    """
    flat = tokens_first(x, dims)
    dense = torch.ops.pgcompile.gather_tokens(flat, token_map.reshape(-1))
    dense = dense.reshape([*token_map.shape, *flat.shape[1:]])
    factors = [f for dim in dims for f in (dim or (1,))]
    present = [f for f in (ROW, POSITION) if f in factors]
    rest = iter(range(len(present), dense.dim()))
    permuted = [present.index(f) if is_token_factor(f) else next(rest) for f in factors]
    if permuted != sorted(permuted):
        dense = dense.permute(permuted)
    for i, dim in enumerate(dims):
        if len(dim) > 1:
            dense = dense.flatten(i, i + len(dim) - 1)
    if order is None:
        return dense
    return dense.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])


def flat_map(token_map: Tensor, dims: tuple[Dim, ...]) -> Tensor:
    """The map in the order in which `dims` has its rows and positions, as `[M]`."""
    factors = [f for dim in dims for f in dim if is_token_factor(f)]
    return (token_map.t() if factors == [POSITION, ROW] else token_map).reshape(-1)


def unpack_numbers(x: Tensor, token_map: Tensor, dims: tuple[Dim, ...]) -> Tensor:
    """A number of each packed token, `[T]` or `[1, T]`, for the tokens of the batch: `[M]`."""
    return torch.ops.pgcompile.gather_tokens(x.reshape(-1), flat_map(token_map, dims))


def label_request(token_map: Tensor, dims: tuple[Dim, ...], index: Tensor) -> tuple[Tensor, Tensor]:
    """Packed index [M] of each token of the batch, and the entries [M, K] that are looked up there."""
    column = index.reshape(-1, index.shape[-1])
    return flat_map(token_map, dims).contiguous(), column.to(torch.int64).contiguous()


def loss_request(
    token_map: Tensor, dims: tuple[Dim, ...], target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The same for a loss against class indices."""
    return label_request(token_map, dims, torch.where(target != ignore_index, target, 0)[:, None])


def label_loss(
    entries: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int,
    smooth: Tensor | None, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """cross_entropy_loss and nll_loss from the labels' log-probabilities.

    Args:
        entries: `[M, 1]`, anything where labels are ignored.
        target: int64 `[M]` class indices.
        reduction: 0 none, 1 mean, 2 sum, as ATen has it.
        smooth: `[M]`, the (weighted) mean of each token's log-probabilities, if labels are smoothed.
    """
    kept = target != ignore_index
    label = torch.where(kept, target, 0)
    weights = kept.to(entries.dtype)
    if weight is not None:
        weights = torch.where(kept, weight[label].to(entries.dtype), 0)
    loss = torch.where(kept, -entries[:, 0], 0) * weights  # an ignored label may be impossible: -inf
    if smooth is not None:
        loss = (1 - label_smoothing) * loss - label_smoothing * torch.where(kept, smooth, 0)
    if reduction == 0:
        return loss
    wide = torch.float32 if loss.dtype in (torch.float16, torch.bfloat16) else loss.dtype
    total = loss.sum(dtype=wide)
    return (total if reduction == 2 else total / weights.sum(dtype=wide)).to(loss.dtype)
