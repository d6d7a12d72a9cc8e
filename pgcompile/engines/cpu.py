"""Prefix attention by ATen's flash kernel for CPUs: ancestor split with state merge.

Every segment attends itself causally, in halves where it is long, of which the second attends the first in full; every
inner node of the tree is attended, in full, by the tokens below it, a contiguous range in preorder. Partial results
merge by log-sum-exp (Milakov and Gimelshein 2018; Hydragen, arXiv 2402.05099, and FlashInfer's cascade do this for
inference). The backward needs no derivative of the merge: each call's backward runs with the merged out and lse.

Calls of equal lengths are batched, so that many short answers cost one call. Where a window, a hole or a document's end
hides keys, calls are cut into blocks of queries, each with the keys that one of them may see, and get a mask if it
hides any of those.

Shapes by suffix as in reference.py; within a call, B ranges of L queries and S keys.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference
from .common import merge_, result, with_adjacent_columns, with_positive_scale
from .contract import Scores, TreeMask
from .per_plan import once_per_plan

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Queries of a masked call, and elements of its mask: a block's scores, 8 heads of them, stay below 64 MiB.
QUERY_BLOCK = 256
MASK_ELEMENTS = 1 << 21

# Of the longest causal call. The kernel computes whole tiles of 512 keys: of 512 tokens both triangles.
CAUSAL_TOKENS = 256


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """See contract.Engine."""
    if device.type != "cpu":
        return "its kernel is for CPUs"
    return None if dtype in DTYPES else f"its kernel doesn't compute in {dtype}"


def why_not_heads(size: int, scores: Scores) -> str | None:
    """See contract.Engine."""
    return "its kernel doesn't cap scores" if scores.softcap is not None else None


def why_not_call(mask: TreeMask, q_1HTD: Tensor, v_1KTE: Tensor) -> None:
    """See contract.Engine: nothing."""


def attention(
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTE: Tensor,
    mask: TreeMask,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """See reference.attention."""
    q_1HTD, scores, _ = with_positive_scale(q_1HTD, scores)
    q, k, v = of_equal_sizes(q_1HTD, k_1KTD, v_1KTE)
    dtype = reference.compute_dtype(q)
    out_1HTE = token_major(torch.empty_like, q, dtype)
    lse_1HT = q.new_empty(q.shape[:3], dtype=dtype)
    cutter = Cutter(mask)
    for call, hidden_BLS in cutter.apply(calls(mask.segments_M5)):
        part_BHLE, lse_BHL = _forward(
            call.queries.take(q), call.keys.take(k), call.keys.take(v), 0.0, call.is_causal,
            attn_mask=additive(hidden_BLS, q.dtype), scale=scores.scale,
        )  # fmt: skip
        if hidden_BLS is not None:  # for a query that sees no key, the kernel has zeros
            lse_BHL = lse_BHL.masked_fill(blind(call, hidden_BLS)[:, None], -torch.inf)
        part, part_lse = part_BHLE.to(dtype), lse_BHL.to(dtype)
        if call.is_causal:  # no other has reached these
            call.queries.put(out_1HTE, part)
            call.queries.put(lse_1HT, part_lse)
            continue
        seen, seen_lse = call.queries.take(out_1HTE), call.queries.take(lse_1HT)
        merge_(seen, seen_lse, part, part_lse)
        if not call.queries.are_views:
            call.queries.put(out_1HTE, seen)
            call.queries.put(lse_1HT, seen_lse)
    return result(out_1HTE[0].transpose(0, 1), v_1KTE.shape[-1], q.dtype), lse_1HT


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
    q_1HTD, scores, factor = with_positive_scale(q_1HTD, scores)
    q, k, v, grad_out, out = of_equal_sizes(q_1HTD, k_1KTD, v_1KTE, grad_out_1HTE, out_1HTE)
    dtype = reference.compute_dtype(q)
    cutter = Cutter(mask)
    lse = reference.finite(lse_1HT) if cutter.bites else lse_1HT
    grads = [token_major(torch.empty_like, x, dtype) for x in (q, k, v)]
    for call, hidden_BLS in cutter.apply(calls(mask.segments_M5)):
        dq, dk, dv = _backward(
            call.queries.take(grad_out), call.queries.take(q), call.keys.take(k), call.keys.take(v),
            call.queries.take(out), call.queries.take(lse).contiguous(), 0.0, call.is_causal,
            attn_mask=additive(hidden_BLS, q.dtype), scale=scores.scale,
        )  # fmt: skip
        call.queries.add(grads[0], dq, is_first=call.is_causal)
        call.keys.add(grads[1], dk, is_first=call.is_causal)
        call.keys.add(grads[2], dv, is_first=call.is_causal)
    if factor != 1:
        grads[0].mul_(factor)
    dq, dk, dv = (
        result(grad[0].transpose(0, 1), x.shape[-1], q.dtype)
        for grad, x in zip(grads, (q_1HTD, k_1KTD, v_1KTE), strict=True)
    )
    return dq, dk, dv


def of_equal_sizes(*tensors_1HTD: Tensor) -> list[Tensor]:
    """As the kernel wants them: columns side by side, and heads of one size, the smaller ones padded with zeros."""
    size = max(x.shape[-1] for x in tensors_1HTD)
    short = {x.shape[-1] for x in tensors_1HTD} - {size}  # pad copies, even by nothing
    pad = torch.nn.functional.pad
    padded = (pad(x, (0, size - x.shape[-1])) if x.shape[-1] in short else x for x in tensors_1HTD)
    return [with_adjacent_columns(x) for x in padded]


def token_major(like: Callable[..., Tensor], x_1HTD: Tensor, dtype: torch.dtype) -> Tensor:
    """`like(x)`, `[1, heads, T, size]`, in whose memory the heads of a token are neighbours."""
    return like(x_1HTD.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def additive(hidden_BLS: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The kernel's mask, the same for all heads: minus infinity where a key is hidden."""
    if hidden_BLS is None:
        return None
    never, always = (torch.tensor(x, dtype=dtype, device="cpu") for x in (-torch.inf, 0.0))
    return torch.where(hidden_BLS, never, always)[:, None]


class Ranges:
    """B ranges of packed tokens of equal length, none twice.

    Args:
        starts: int64 [B].
        length: L.
    """

    def __init__(self, starts: Tensor, length: int) -> None:
        self.starts, self.length = starts, length

    def __len__(self) -> int:
        return self.starts.shape[0]

    @functools.cached_property
    def indices_BL(self) -> Tensor:
        return self.starts[:, None] + torch.arange(self.length, device="cpu")

    @functools.cached_property
    def first(self) -> int:
        return int(self.starts[0])

    @functools.cached_property
    def step(self) -> int | None:
        """The distance of consecutive starts, if it is always the same (0 for a single one)."""
        if len(self) == 1:
            return 0
        steps = self.starts.diff()
        return int(steps[0]) if bool((steps == steps[0]).all()) else None

    @property
    def are_views(self) -> bool:
        """Does `take` return memory of its argument?"""
        return self.step is not None

    def take(self, x_1HT: Tensor) -> Tensor:
        """`[1, heads, T, ...]` → `[B, heads, L, ...]`; a view where the ranges are evenly spaced."""
        if self.step is None:
            tokens = self._tokens(x_1HT).index_select(0, self.indices_BL.flatten())
            return tokens.unflatten(0, (len(self), self.length)).transpose(1, 2)
        if len(self) == 1:
            return x_1HT.narrow(2, self.first, self.length)
        (_, heads, _, *size), (_, *strides) = x_1HT.shape, x_1HT.stride()
        offset = x_1HT.storage_offset() + self.first * strides[1]
        return x_1HT.as_strided(
            (len(self), heads, self.length, *size), (self.step * strides[1], *strides), offset
        )

    def put(self, into_1HT: Tensor, part: Tensor) -> None:
        """Write `[B, heads, L, ...]` to `[1, heads, T, ...]`."""
        if self.are_views:
            self.take(into_1HT).copy_(part)
        else:  # no token twice: index_copy_, which unlike index_add_ runs in parallel
            tokens = part.transpose(1, 2).flatten(0, 1).to(into_1HT.dtype)
            self._tokens(into_1HT).index_copy_(0, self.indices_BL.flatten(), tokens)

    def add(self, into_1HT: Tensor, part: Tensor, is_first: bool) -> None:
        """Add `[B, heads, L, ...]` to `[1, heads, T, ...]`; who comes first writes."""
        if is_first:
            self.put(into_1HT, part)
        elif self.are_views:
            self.take(into_1HT).add_(part)
        else:
            self.put(into_1HT, self.take(into_1HT) + part)

    def _tokens(self, x_1HT: Tensor) -> Tensor:
        """`[T, heads, ...]`, a view."""
        return x_1HT[0].transpose(0, 1)


@dataclass(frozen=True)
class Call:
    """One kernel call: B ranges of queries and as many of keys, each of these within a segment.

    Args:
        is_causal: tokens attend themselves. Otherwise they attend tokens before all of them.
    """

    queries: Ranges
    keys: Ranges
    is_causal: bool

    def from_to(self, first: int, end: int) -> Call:
        """With these of the keys."""
        return replace(self, keys=Ranges(self.keys.starts + first, end - first))


@dataclass(frozen=True)
class Cutter:
    """Cuts calls where a mask hides keys of a token's own row from it. (Columns are in host memory here.)"""

    mask: TreeMask

    @functools.cached_property
    def bites(self) -> bool:
        """Is any key hidden at all?"""
        if self.mask.window is not None and int(self.mask.depth_T.max()) >= self.mask.window:
            return True
        return bool(self.mask.key_valid or self.mask.same_value)

    def apply(self, calls: Iterable[Call]) -> Iterator[tuple[Call, Tensor | None]]:
        """The calls, cut so that masks stay small, each with what it hides, bool [B, L or 1, S], or None.

        A causal call keeps all of its tokens, so that every token is still in one; of the others, keys that no query
        sees are left out.
        """
        for call in calls:
            if not (self.bites and self.hides(call)):
                yield call, None
                continue
            for block in self.blocks(call):
                hidden = self.hidden(block)
                if not block.is_causal and hidden is not None:
                    seen = (~hidden).flatten(0, 1).any(0).nonzero().flatten()
                    if not len(seen):
                        continue
                    first, end = int(seen[0]), int(seen[-1]) + 1
                    block, hidden = block.from_to(first, end), hidden[..., first:end]
                yield block, hidden

    def blocks(self, call: Call) -> Iterator[Call]:
        """Blocks of a call's queries, with the keys that a window leaves the first of them."""
        length = call.queries.length if call.is_causal else min(call.queries.length, QUERY_BLOCK)
        step = max(1, MASK_ELEMENTS // (length * call.keys.length))
        for queries, keys in zip(call.queries.starts.split(step), call.keys.starts.split(step), strict=True):
            for start in range(0, call.queries.length, length):
                block = Call(
                    Ranges(queries + start, min(length, call.queries.length - start)),
                    Ranges(keys, call.keys.length),
                    call.is_causal,
                )
                gone = 0 if call.is_causal else self.keys_before_window(block)
                if gone < call.keys.length:
                    yield block.from_to(gone, call.keys.length)

    def keys_before_window(self, call: Call) -> int:
        """How many of the first keys lie before every query's window. (Within a segment, depths go up by one.)"""
        if self.mask.window is None:
            return 0
        return max(0, int(self.distances(call).min()) - self.mask.window + 1)

    def distances(self, call: Call) -> Tensor:
        """int64 [B, L]: how many tokens a query is behind the first key."""
        return self.mask.depth_T[call.queries.indices_BL] - self.mask.depth_T[call.keys.starts][:, None]

    def hides(self, call: Call) -> bool:
        """Is a key hidden? Looks at tokens, not at pairs, so it may say yes where one is hidden from nobody."""
        if self.mask.window is not None and int(self.distances(call).max()) >= self.mask.window:
            return True
        queries_BL, keys_BS = call.queries.indices_BL, call.keys.indices_BL
        if not all(valid_T[keys_BS].all() for valid_T in self.mask.key_valid):
            return True
        for value_T in self.mask.same_value:
            of_first_B1 = value_T[queries_BL[:, :1]]
            if (value_T[queries_BL] != of_first_B1).any() or (value_T[keys_BS] != of_first_B1).any():
                return True
        return False

    def hidden(self, call: Call) -> Tensor | None:
        """bool [B, L or 1, S]: keys in a query's row that it may not see. (Tokens after it are not looked for.)"""
        if not self.hides(call):
            return None
        queries_BL1, keys_B1S = call.queries.indices_BL[..., None], call.keys.indices_BL[:, None]
        terms = [~valid_T[keys_B1S] for valid_T in self.mask.key_valid]
        terms += [value_T[keys_B1S] != value_T[queries_BL1] for value_T in self.mask.same_value]
        if self.mask.window is not None:
            terms.append(self.mask.depth_T[keys_B1S] <= self.mask.depth_T[queries_BL1] - self.mask.window)
        return functools.reduce(torch.logical_or, terms)


def blind(call: Call, hidden_BLS: Tensor) -> Tensor:
    """bool [B, L or 1]: queries that see no key."""
    if call.is_causal:
        hidden_BLS = hidden_BLS | (call.keys.indices_BL[:, None] > call.queries.indices_BL[..., None])
    return hidden_BLS.all(-1)


def calls(segments_M5: Tensor) -> list[Call]:
    """The calls of a tree: first those of tokens by themselves (that writes every one), then the others."""
    return once_per_plan(segments_M5, ("calls of the cpu engine",), lambda: list(_calls(segments_M5)))


def _calls(segments_M5: Tensor) -> Iterator[Call]:
    start, end, subtree_end = segments_M5[:, 0], segments_M5[:, 1], segments_M5[:, 2]
    lengths = end - start
    below = subtree_end - end
    # starts of queries, by what cut_triangle says of them
    found: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for length in lengths.unique().tolist():
        for offset, queries, keys in cut_triangle(length):
            found[queries, keys].append(start[lengths == length] + offset)
    inner = below > 0
    for queries, keys in torch.stack([below[inner], lengths[inner]], 1).unique(dim=0).tolist():
        found[queries, keys].append(end[inner & (below == queries) & (lengths == keys)])
    for (queries, keys), starts in sorted(found.items(), key=lambda item: item[0][1] > 0):
        first = torch.cat(starts).sort().values
        by = Ranges(first, queries)
        yield Call(by, Ranges(first - keys, keys) if keys else by, is_causal=not keys)


def cut_triangle(length: int) -> Iterator[tuple[int, int, int]]:
    """A causal segment as (offset, queries, keys): the queries from there attend so many keys right before them.

    No keys: they attend themselves, causally, and are CAUSAL_TOKENS at most. Each pair of tokens is there once.
    """
    if length <= CAUSAL_TOKENS:
        yield 0, length, 0
        return
    # the largest such power of two times CAUSAL_TOKENS: its pieces have the same lengths in all segments
    half = CAUSAL_TOKENS << ((length - 1) // CAUSAL_TOKENS).bit_length() - 1
    yield from cut_triangle(half)
    yield half, length - half, half
    for offset, queries, keys in cut_triangle(length - half):
        yield half + offset, queries, keys
