"""Runs the head of a packed graph a few tokens at a time, and again in backward (see passes/head.py).

Nothing as wide as the vocabulary outlives its chunk. Copies that look up labels are sorted by token, so that each
chunk answers for its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .passes.packed_graphs import Head
from .passes.unpack import Gathered

# Above WHOLE_BYTES, [T, V] runs in chunks of CHUNK_BYTES. Each chunk reads the weight and adds to its gradient, which
# has to be little beside its tokens' work, and runs uncompiled, twice. So on a large GPU both are larger, shares of
# its memory (not yet measured): whole, the head takes about four times the size of [T, V] in half precision.
WHOLE_BYTES, CHUNK_BYTES = 1 << 30, 1 << 26
GPU_WHOLE_SHARE, GPU_CHUNK_SHARE = 32, 64


def number_of_chunks(head: Head, tokens: int, device: torch.device) -> int:
    """0 where the head runs whole."""
    nbytes = tokens * head.width * head.itemsize
    whole, chunk = WHOLE_BYTES, CHUNK_BYTES
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        whole, chunk = max(whole, memory // GPU_WHOLE_SHARE), max(chunk, memory // GPU_CHUNK_SHARE)
    return -(-nbytes // chunk) if nbytes > whole else 0


def run_head(
    head: Head,
    values: Sequence[Any],
    inputs: Sequence[Any],
    lookups: Sequence[Lookup],
    tokens: int,
    chunks: int,
) -> list[Any]:
    """The packed graph's outputs, with a `Gathered` for each that is wide.

    Args:
        values: the trunk's results; `inputs`: those of the packed graph.
        lookups: of labels, one for each of the head's requests.
        tokens, chunks: T, and in how many parts.
    """
    arguments = [(values if s.kind == "trunk" else inputs)[s.index] for s in head.sources]
    size = chunk_size(tokens, chunks)
    pieces = [
        a.split(size, dim=s.token_dim) if s.token_dim is not None else _shared(a)
        for a, s in zip(arguments, head.sources, strict=True)
    ]
    narrow: list[list[Tensor]] = [[] for o in head.outputs if not o.is_wide]
    found: list[list[Tensor]] = [[] for _ in lookups]
    for number in range(-(-tokens // size)):
        part = [p[number] if isinstance(p, tuple) else p for p in pieces]
        asked = [lookup.of(number) for lookup in lookups]
        results = _run_chunk(head, part, asked)
        for into, result in zip((*narrow, *found), results, strict=True):
            into.append(result)
    dims = [o.token_dim for o in head.outputs if not o.is_wide]
    whole = iter(torch.cat(parts, dim=dim) for parts, dim in zip(narrow, dims, strict=True))
    entries = [lookup.collect(parts) for lookup, parts in zip(lookups, found, strict=True)]
    out: list[Any] = [None] * (len(head.trunk_outputs) + len(head.outputs))
    for at, value in zip(head.trunk_outputs, values, strict=False):
        out[at] = value
    for output in head.outputs:
        if output.is_wide:
            own = [e for e, index in zip(entries, head.request_outputs, strict=True) if index == output.index]
            out[output.index] = Gathered(own, own[0].dtype, head.width)
        else:
            out[output.index] = next(whole)
    return out


def chunk_size(tokens: int, chunks: int) -> int:
    """In tokens."""
    return -(-tokens // chunks)


def _shared(x: Any) -> Any:
    """Weights of half precision: chunks' gradients add up in float32, and are rounded once."""
    is_half = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) and x.requires_grad
    return x.float() if is_half and torch.is_grad_enabled() else x


def _run_chunk(head: Head, part: list[Any], asked: list[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = head.head(*(t.to(s.dtype) for t, s in zip(tensors, head.sources, strict=True)))
        by_output = {o.index: r for o, r in zip(head.outputs, results, strict=True)}
        narrow = [by_output[o.index] for o in head.outputs if not o.is_wide]
        entries = [
            torch.ops.pgcompile.gather_entries(by_output[index].reshape(-1, head.width), *request)
            for index, request in zip(head.request_outputs, asked, strict=True)
        ]
        return (*narrow, *entries)

    if not torch.is_grad_enabled():
        return run(*part)
    return checkpoint(run, *part, use_reentrant=False, preserve_rng_state=False)


class Lookup:
    """One label lookup, its copies sorted by token and cut where chunks end.

    The host reads back where that is: to be made before the trunk runs, or it waits for all of that.

    Args:
        index: packed index [M], -1 where dropped.
        column: [M, K].
        tokens, size: T, and of a chunk.
    """

    def __init__(self, index: Tensor, column: Tensor, tokens: int, size: int) -> None:
        sorted_index, self.order = index.sort(stable=True)
        self.column, self.size = column[self.order], size
        edges = torch.arange(0, tokens + size, size, device=index.device).clamp(max=tokens)
        self.edges = torch.searchsorted(sorted_index, edges).tolist()
        self.index = sorted_index
        self.copies = len(index)

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """Tokens within the chunk [m] and columns [m, K]."""
        part = slice(self.edges[number], self.edges[number + 1])
        return self.index[part] - number * self.size, self.column[part]

    def collect(self, parts: list[Tensor]) -> Tensor:
        """Entries [M, K] in the order of the batch; zeros at dropped tokens, which came first."""
        found = torch.cat(parts)
        dropped = found.new_zeros(self.edges[0], found.shape[1])
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(self.copies, device=back.device)
        return torch.cat([dropped, found])[back]
