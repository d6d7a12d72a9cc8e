"""The prefix tree of a batch with its tensors, and those of batches seen before.

A policy, its old version and a reference model look at one batch, and epochs come back to it. A tree depends on the
codes of the tokens alone (see `encode_columns`), so graphs on one stream share it wherever these are equal, byte for
byte. Each graph holds the latest ones that it used; a weak set finds them, so a tree goes when the last of its graphs
does.
"""

from __future__ import annotations

import threading
import weakref
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .devices import stream_of, to_device
from .prefix_tree import CodeArray, IntArray, PrefixTree, build_prefix_tree

# What one graph holds: enough for a few epochs over a step's micro-batches; in bytes, ten of 64 rows of 2048 tokens.
MOST_HELD = 16
HELD_BYTES = 1 << 26


class PackedTree:
    """The tree of one batch, N rows of S positions, T distinct tokens in depth-first preorder.

    Args:
        codes: uint64 [N, S, W], equal where tokens are; not to be changed any more.
        first, end: int64 [N], the kept range of each row.
        min_shared: how short a branch may be, as in `build_prefix_tree`.
        device: where the tensors shall be.

    Attributes:
        prefix_tree: on the host.
        class_of: int64 [N, S], packed index of each token, -1 where dropped.
        token_of: the same, with any token where one was dropped.
        row, position: int64 [T], where each packed token's representative stands.
        subtree_end, depth: int64 [T]; token k is an ancestor of q (or q) iff `k <= q < subtree_end[k]`.
        segments: int64 [M, 5] on the host: start, end, subtree end, depth, parent.
        stream: where the copies to the device run, and everything that uses them.
    """

    def __init__(
        self, codes: CodeArray, first: IntArray, end: IntArray, min_shared: int, device: torch.device
    ) -> None:
        def move(a: IntArray) -> Tensor:
            return to_device(torch.from_numpy(np.ascontiguousarray(a)), device)

        self.codes, self.first, self.end = codes, first, end
        self.min_shared, self.device, self.stream = min_shared, device, stream_of(device)
        self.prefix_tree: PrefixTree = build_prefix_tree(codes, first, end, min_shared)
        with torch.inference_mode(False):  # or training couldn't save them for its backward pass
            tree = self.prefix_tree
            self.class_of, self.row, self.position = map(move, (tree.class_of, tree.row, tree.position))
            self.token_of = self.class_of.clamp(min=0)
            self.subtree_end, self.depth = move(tree.subtree_end), move(tree.depth)
            self.segments = torch.from_numpy(tree.segments)

    @property
    def nbytes(self) -> int:
        """Of its large arrays, wherever they are; without what engines worked out from it."""
        tensors = (self.class_of, self.class_of, self.row, self.position, self.subtree_end, self.depth)
        return self.codes.nbytes + sum(t.nbytes for t in tensors)

    def is_for(
        self, codes: CodeArray, first: IntArray, end: IntArray, min_shared: int, device: torch.device
    ) -> bool:
        """Would these arguments build the same, for the same stream?"""
        return (
            (self.min_shared, self.device, self.codes.shape) == (min_shared, device, codes.shape)
            and self.stream == stream_of(device)  # another one would have to wait for the copies
            and np.array_equal(self.first, first)
            and np.array_equal(self.end, end)
            and np.array_equal(self.codes[:1], codes[:1])  # another batch mostly differs here already
            and np.array_equal(self.codes, codes)
        )


_known: weakref.WeakSet[PackedTree] = weakref.WeakSet()
_lock = threading.Lock()


class PackedTrees:
    """The trees that one graph used last."""

    def __init__(self) -> None:
        self._held: list[PackedTree] = []

    def find(
        self, codes: CodeArray, first: IntArray, end: IntArray, min_shared: int, device: torch.device
    ) -> tuple[PackedTree, bool]:
        """The tree for arguments of `PackedTree`, and whether it was known."""
        with _lock:
            known = list(_known)
        found = next((p for p in known if p.is_for(codes, first, end, min_shared, device)), None)
        tree = found or PackedTree(codes, first, end, min_shared, device)
        with _lock:
            self._hold(tree)
        return tree, found is not None

    def _hold(self, tree: PackedTree) -> None:
        """The latest first, up to `MOST_HELD` and `HELD_BYTES`; at least one."""
        _known.add(tree)
        latest = [tree, *(t for t in self._held if t is not tree)][:MOST_HELD]
        sizes = accumulate(t.nbytes for t in latest)
        self._held = [t for t, size in zip(latest, sizes, strict=True) if size <= HELD_BYTES] or [tree]
