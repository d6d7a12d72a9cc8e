"""The tokens of a batch that the head is computed for (see passes/scored.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .columns import select_map
from .devices import to_device
from .packed_tree import PackedTree
from .passes.packed_graphs import PackedGraphs


@dataclass(frozen=True)
class Scored:
    """T' of the T packed tokens.

    Args:
        index: int64 [T'], ascending packed indices.
        class_of: int64 [N, S], which of them each token is; -1 where it is none, or was dropped.
        token_of: the same, with any of them where it is none.
        dense: tokens that the original computes the head for.
    """

    index: Tensor
    class_of: Tensor
    token_of: Tensor
    dense: int

    @property
    def tokens(self) -> int:
        return self.index.shape[0]


def find_scored(graphs: PackedGraphs, results: Sequence[Tensor], tree: PackedTree) -> Scored | None:
    """The tokens that the slices leave; None where the graph picks none out. The host waits for nothing."""
    if not graphs.scored:
        return None
    class_of = torch.from_numpy(tree.prefix_tree.class_of)
    read = [select_map(class_of, selection, results, graphs).numpy().ravel() for selection in graphs.scored]
    is_read = np.zeros(tree.prefix_tree.tokens, dtype=bool)
    for classes in read:
        is_read[classes[classes >= 0]] = True
    if not is_read.any():
        is_read[0] = True  # nothing is read, but graphs have no use for empty tensors
    rank = np.where(is_read, np.cumsum(is_read) - 1, -1)
    index, rank_T = (to_device(torch.from_numpy(a), tree.device) for a in (np.flatnonzero(is_read), rank))
    scored_of = torch.where(tree.class_of < 0, -1, rank_T[tree.token_of])
    return Scored(index, scored_of, scored_of.clamp(min=0), sum(map(len, read)))
