"""Runs the head of a packed graph a few tokens at a time, and again in backward (see passes/head.py).

Nothing as wide as the vocabulary outlives its chunk. Copies that look up labels are sorted by token, so that each
chunk answers for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .artifacts import Families, Size
from .errors import belongs_to_caller
from .options import Options
from .passes.packed_graphs import Head, Source
from .report import log
from .requests import Request, request_key, request_shapes, request_sizes

# Above WHOLE_BYTES, [T, V] runs in chunks of CHUNK_BYTES. Each chunk reads the weight and adds to its gradient, which
# has to be little beside its tokens' work, and runs twice; weights of half precision are held in float32 besides. So on
# a large GPU both are larger, shares of its memory (not yet measured): whole, the head takes two to three times the
# size of [T, V], of its widest dtype. (The original takes as much, at least.)
WHOLE_BYTES, CHUNK_BYTES = 1 << 30, 1 << 26
GPU_WHOLE_SHARE, GPU_CHUNK_SHARE = 8, 64


def number_of_chunks(head: Head, tokens: int, device: torch.device) -> int:
    """0 where the head runs whole."""
    nbytes = tokens * head.token_bytes
    whole, chunk = WHOLE_BYTES, CHUNK_BYTES
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        whole, chunk = max(whole, memory // GPU_WHOLE_SHARE), max(chunk, memory // GPU_CHUNK_SHARE)
    return -(-nbytes // chunk) if nbytes > whole else 0


def _chunk_size(tokens: int, chunks: int) -> int:
    """In tokens."""
    return -(-tokens // chunks)


class ChunkedHead:
    """A head that runs in chunks, compiled on first use for any number of tokens in them.

    Args:
        options: name the inner compiler.
    """

    def __init__(self, head: Head, options: Options) -> None:
        self.head, self.families = head, Families(options)
        self.failed = False  # the inner compiler: it runs eagerly

    def lookups(self, inputs: Sequence[Any], tokens: int, chunks: int) -> list[Lookup]:
        """The head's requests; the host reads back where chunks end: to be called before the trunk runs.

        Args:
            inputs: of the packed graph.
            tokens, chunks: T, and in how many parts.
        """
        size = _chunk_size(tokens, chunks)
        return [Lookup(inputs[index], inputs[column], tokens, size) for index, column in self.head.requests]

    def run(
        self,
        values: Sequence[Any],
        inputs: Sequence[Any],
        lookups: Sequence[Lookup],
        tokens: int,
        chunks: int,
    ) -> list[Any]:
        """The packed graph's outputs.

        Args:
            values: the trunk's results; `inputs`: those of the packed graph.
        """
        head, size = self.head, _chunk_size(tokens, chunks)
        arguments = [(values if s.kind == "trunk" else inputs)[s.index] for s in head.sources]
        pieces = [
            _shared(a) if s.token_dim is None else a.split(size, dim=s.token_dim)
            for a, s in zip(arguments, head.sources, strict=True)
        ]
        results = []
        with _without_autocast_cache():
            for number in range(-(-tokens // size)):
                part = [p[number].contiguous() if isinstance(p, tuple) else p for p in pieces]
                results.append(self._run_chunk(part, [lookup.of(number) for lookup in lookups]))
        out: list[Any] = [None] * (len(head.trunk_outputs) + len(head.outputs))
        for at, value in zip(head.trunk_outputs, values, strict=False):
            out[at] = value
        for output, parts in zip(head.outputs, zip(*results, strict=True), strict=True):
            out[output.index] = (
                torch.cat(parts, dim=output.token_dim)
                if output.request is None
                else lookups[output.request].collect(parts)
            )
        return out

    def _run_chunk(self, part: list[Tensor], asked: list[Request]) -> Sequence[Tensor]:
        call = self._compiled(part, asked)

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            typed = [t.to(s.dtype) for t, s in zip(tensors, self.head.sources, strict=True)]
            results: Sequence[Tensor] = call(*typed, *(x for request in asked for x in request))
            return results

        if not torch.is_grad_enabled():
            return run(*part)
        results: Sequence[Tensor] = checkpoint(run, *part, use_reentrant=False, preserve_rng_state=False)
        return results

    def _compiled(self, part: list[Tensor], asked: list[Request]) -> Callable[..., Any]:
        graph, sources = self.head.head, self.head.sources
        tokens = next(
            x.shape[s.token_dim] for x, s in zip(part, sources, strict=True) if s.token_dim is not None
        )
        if tokens == 1 or self.failed:  # sizes of 1 are special to compilers
            return graph

        def examples(sizes: Sequence[Any]) -> list[Any]:
            made = [_like(x, s, sizes[0]) for x, s in zip(part, sources, strict=True)]
            for (index, column), shape in zip(asked, request_shapes(asked, sizes[1:]), strict=True):
                made.append(torch.empty(shape[:1], dtype=index.dtype, device=index.device))
                made.append(torch.empty(shape, dtype=column.dtype, device=column.device))
            return made

        sizes = [Size(tokens), *request_sizes(asked)]
        try:
            return self.families.compiled(graph, examples, sizes, request_key(asked))
        except Exception as error:  # of somebody else's compiler, with the trunk behind us
            if belongs_to_caller(error):
                raise
            self.failed = True
            text = "the inner compiler failed on the model's head, which runs eagerly in chunks: %s: %s"
            log.warning(text, type(error).__name__, error)
            return graph


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Each chunk casts weights by itself, or their gradients would add up in half precision."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _shared(x: Any) -> Any:
    """Weights of half precision: chunks' gradients add up in float32, and are rounded once."""
    is_half = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) and x.requires_grad
    return x.float() if is_half and torch.is_grad_enabled() else x


def _like(x: Tensor, source: Source, tokens: Any) -> Tensor:
    """What the compiler shall see of an input of the head, under the active fake mode."""
    shape = [tokens if dim == source.token_dim else size for dim, size in enumerate(x.shape)]
    if source.token_dim is None:
        made = torch.empty_strided(shape, x.stride(), dtype=source.dtype, device=x.device)
    else:
        made = torch.empty(shape, dtype=source.dtype, device=x.device)
    return made.requires_grad_(x.requires_grad)


class Lookup:
    """What is looked up, sorted by token and cut where chunks end.

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

    def collect(self, parts: Sequence[Tensor]) -> Tensor:
        """Entries [M, K] in the order of the batch; zeros at dropped tokens, which came first."""
        found = torch.cat(list(parts))
        dropped = found.new_zeros(self.edges[0], found.shape[1])
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(self.copies, device=back.device)
        return torch.cat([dropped, found])[back]
