"""The batch of the bench: a tree of depth two, rows of different lengths, padding on the right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = 24
SYSTEM, PROMPT = 6, 14  # tokens that all rows share; tokens that the two rows of a group share
LENGTHS = (
    24,
    19,
    24,
    22,
)  # as many rows as the tiny models have heads, so that equal sizes can't hide a mistake


@dataclass(frozen=True)
class BenchBatch:
    """input_ids and attention_mask, int64 [4, 24]."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def kept(self) -> Tensor:
        """bool [N, S]: which tokens aren't padding."""
        return self.attention_mask.bool()

    @property
    def distinct_tokens(self) -> int:
        """The number of distinct prefixes, counted one by one."""
        rows = [row[:length].tolist() for row, length in zip(self.input_ids, LENGTHS, strict=True)]
        return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


def bench_batch(vocab_size: int, seed: int = 0) -> BenchBatch:
    """Two groups of two rows under one system prompt. Padding carries random ids, so that reading it shows."""
    generator = torch.Generator().manual_seed(seed)
    # ids 0 to 2 and the last ones are special tokens of the tiny models
    ids = torch.randint(3, min(vocab_size, 118), (len(LENGTHS), POSITIONS), generator=generator)
    ids[:, :SYSTEM] = ids[0, :SYSTEM]
    ids[1, :PROMPT], ids[3, :PROMPT] = ids[0, :PROMPT], ids[2, :PROMPT]
    mask = torch.arange(POSITIONS) < torch.tensor(LENGTHS)[:, None]
    return BenchBatch(ids, mask.long())
