"""Prefix attention by ATen's flash kernel for CPUs: ancestor split with state merge.

Every segment attends itself causally; every inner node of the tree is attended, in full, by the tokens below it, a
contiguous range in preorder. Partial results merge by log-sum-exp (Milakov and Gimelshein 2018; Hydragen,
arXiv 2402.05099, and FlashInfer's cascade do this for inference). Exactly the pairs of causal attention are computed.
The backward needs no derivative of the merge: each call's backward runs with the merged out and lse.

Calls of equal lengths are batched, so that many short answers cost one call. The kernel has no windows or masks of
its own that would pay here: where a mask column hides a key, `reference` runs.

Shapes by suffix as in reference.py; within a call, B ranges of L queries and S keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTE: Tensor,
    subtree_end_T: Tensor,
    depth_T: Tensor,
    segments_M5: Tensor,
    key_valid: Sequence[Tensor],
    same_value: Sequence[Tensor],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See reference.attention."""
    if masks_bite(depth_T, key_valid, same_value, window):
        return reference.attention(
            q_1HTD, k_1KTD, v_1KTE, subtree_end_T, depth_T, segments_M5, key_valid, same_value, scale, window
        )
    value_size = v_1KTE.shape[-1]
    q, k, v = token_major(q_1HTD, k_1KTD, v_1KTE)
    dtype = reference.compute_dtype(q)
    out_THE = q.new_empty(q.shape, dtype=dtype)
    lse_TH = q.new_empty(q.shape[:2], dtype=dtype)
    for call in calls(segments_M5):
        part_BHLE, lse_BHL = _forward(
            call.queries(q), call.keys(k), call.keys(v), 0.0, call.is_causal, scale=scale
        )
        part, part_lse = part_BHLE.transpose(1, 2).to(dtype), lse_BHL.transpose(1, 2).to(dtype)
        if not call.is_causal:
            part, part_lse = merge(call.queries_of(out_THE), call.queries_of(lse_TH), part, part_lse)
        call.write_queries(out_THE, part)
        call.write_queries(lse_TH, part_lse)
    out_1THE = out_THE[None, ..., :value_size].to(q.dtype).contiguous()
    return out_1THE.transpose(1, 2), lse_TH.t().contiguous()[None]


def attention_backward(
    grad_out_1HTE: Tensor,
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTE: Tensor,
    out_1HTE: Tensor,
    lse_1HT: Tensor,
    subtree_end_T: Tensor,
    depth_T: Tensor,
    segments_M5: Tensor,
    key_valid: Sequence[Tensor],
    same_value: Sequence[Tensor],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.attention_backward."""
    if masks_bite(depth_T, key_valid, same_value, window):
        return reference.attention_backward(
            grad_out_1HTE, q_1HTD, k_1KTD, v_1KTE, out_1HTE, lse_1HT, subtree_end_T, depth_T, segments_M5,
            key_valid, same_value, scale, window,
        )  # fmt: skip
    sizes = (q_1HTD.shape[-1], k_1KTD.shape[-1], v_1KTE.shape[-1])
    q, k, v, grad_out, out = token_major(q_1HTD, k_1KTD, v_1KTE, grad_out_1HTE, out_1HTE)
    lse_TH = lse_1HT[0].t()
    dtype = reference.compute_dtype(q)
    grads = [torch.empty_like(x, dtype=dtype) for x in (q, k, v)]
    for call in calls(segments_M5):
        dq, dk, dv = _backward(
            call.queries(grad_out), call.queries(q), call.keys(k), call.keys(v), call.queries(out),
            call.queries_of(lse_TH).transpose(1, 2).contiguous(), 0.0, call.is_causal, scale=scale,
        )  # fmt: skip
        call.add_queries(grads[0], dq)
        call.add_keys(grads[1], dk)
        call.add_keys(grads[2], dv)
    dq, dk, dv = (
        grad[None, ..., :size].to(q.dtype).contiguous().transpose(1, 2)
        for grad, size in zip(grads, sizes, strict=True)
    )
    return dq, dk, dv


def masks_bite(
    depth_T: Tensor, key_valid: Sequence[Tensor], same_value: Sequence[Tensor], window: int | None
) -> bool:
    """Does anything but ancestry hide a key? (Columns are on the host here: looking costs no synchronisation.)"""
    if window is not None and int(depth_T.max()) >= window:
        return True
    return not all(bool(c.all()) for c in key_valid) or any(
        bool((c != c.flatten()[0]).any()) for c in same_value
    )


def token_major(*tensors_1HTD: Tensor) -> list[Tensor]:
    """`[T, heads, size]` each; the kernel wants equal head sizes, so the smaller ones are padded with zeros."""
    size = max(x.shape[-1] for x in tensors_1HTD)
    short = {x.shape[-1] for x in tensors_1HTD} - {size}  # pad copies, even by nothing
    pad = torch.nn.functional.pad
    return [
        pad(x[0].transpose(0, 1), (0, size - x.shape[-1])) if x.shape[-1] in short else x[0].transpose(0, 1)
        for x in tensors_1HTD
    ]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys → over both: `[..., E]` outputs, `[...]` log-sum-exps."""
    weight_b = torch.sigmoid(lse_b - lse_a)
    return torch.lerp(out_a, out_b, weight_b[..., None]), torch.logaddexp(lse_a, lse_b)


@dataclass(frozen=True)
class Call:
    """One kernel call: B ranges of equal length.

    Args:
        query_starts, key_starts: int64 [B], packed indices. Ranges of queries don't overlap, nor do those of keys.
        num_queries, num_keys: their lengths.
        is_causal: a segment attends itself; otherwise a node is attended in full from below.
    """

    query_starts: Tensor
    key_starts: Tensor
    num_queries: int
    num_keys: int
    is_causal: bool

    def queries(self, x_THD: Tensor) -> Tensor:
        return self.queries_of(x_THD).transpose(1, 2)

    def keys(self, x_TKD: Tensor) -> Tensor:
        return _take(x_TKD, self.key_starts, self.num_keys).transpose(1, 2)

    def queries_of(self, x: Tensor) -> Tensor:
        """`[T, ...]` → `[B, L, ...]`."""
        return _take(x, self.query_starts, self.num_queries)

    def write_queries(self, into: Tensor, part: Tensor) -> None:
        """Write `[B, L, ...]` to `[T, ...]`."""
        _put(into, self.query_starts, part)

    def add_queries(self, into: Tensor, grad_BHLD: Tensor) -> None:
        self._add(into, self.query_starts, grad_BHLD.transpose(1, 2))

    def add_keys(self, into: Tensor, grad_BKSD: Tensor) -> None:
        self._add(into, self.key_starts, grad_BKSD.transpose(1, 2))

    def _add(self, into: Tensor, starts: Tensor, grad: Tensor) -> None:
        """Segments by themselves come first and reach every token once: they write, the others add."""
        grad = grad.to(into.dtype)
        _put(into, starts, grad if self.is_causal else grad + _take(into, starts, grad.shape[1]))


def _take(x: Tensor, starts: Tensor, length: int) -> Tensor:
    """Ranges of `[T, ...]` as `[B, L, ...]`; a view where they are evenly spaced."""
    step = _spacing(starts)
    if step is None:
        return x.index_select(0, _indices(starts, length)).view(len(starts), length, *x.shape[1:])
    first = x[int(starts[0]) :]
    return first.as_strided((len(starts), length, *x.shape[1:]), (step * x.stride(0), *x.stride()))


def _put(into: Tensor, starts: Tensor, part: Tensor) -> None:
    if _spacing(starts) is not None:
        _take(into, starts, part.shape[1]).copy_(part)
    else:  # no range twice: index_copy_, which unlike index_add_ runs in parallel
        into.index_copy_(0, _indices(starts, part.shape[1]), part.flatten(0, 1))


def _spacing(starts: Tensor) -> int | None:
    """The distance of consecutive starts, if it is always the same (0 for a single one)."""
    if len(starts) == 1:
        return 0
    steps = starts.diff()
    return int(steps[0]) if bool((steps == steps[0]).all()) else None


def _indices(starts: Tensor, length: int) -> Tensor:
    return (starts[:, None] + torch.arange(length)).flatten()


def calls(segments_M5: Tensor) -> Iterator[Call]:
    """The calls of a tree: first all segments by themselves (that writes every token), then all inner nodes."""
    start, end, subtree_end = segments_M5[:, 0], segments_M5[:, 1], segments_M5[:, 2]
    lengths = end - start
    for length in lengths.unique().tolist():
        starts = start[lengths == length]
        yield Call(starts, starts, length, length, True)
    inner = subtree_end > end
    below = subtree_end - end
    for num_queries, num_keys in torch.stack([below[inner], lengths[inner]], 1).unique(dim=0).tolist():
        chosen = inner & (below == num_queries) & (lengths == num_keys)
        yield Call(end[chosen], start[chosen], num_queries, num_keys, False)
