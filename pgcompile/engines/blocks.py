"""Block lists: which tiles of keys a tile of queries needs, for engines that walk the packed tokens tile by tile.

In depth-first preorder a token's descendants are a range, so the queries that see some key of a tile are one, too: from
the tile's first token to its last subtree's end. All lists follow from a few numbers per tile, read off the segments in
host memory: nothing looks at T² pairs, and nothing waits for the device.

Shapes by suffix: T packed tokens, M segments, P pieces (segments, cut at tiles), L listed pairs of tiles, R rows: tiles
of one side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..devices import to_device
from .per_plan import once_per_plan


@dataclass(frozen=True)
class Tiles:
    """Tiles of `size` tokens from packed index 0 on; the last one may be cut short.

    Args:
        start: packed index of each tile's first token.
        least_end, greatest_end: of the subtree ends in a tile.
        least_depth, greatest_depth: of its tokens.
    """

    size: int
    start: np.ndarray
    least_end: np.ndarray
    greatest_end: np.ndarray
    least_depth: np.ndarray
    greatest_depth: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    @staticmethod
    def of(segments_M5: np.ndarray, size: int) -> Tiles:
        segment_start_M, segment_end_M = segments_M5[:, 0], segments_M5[:, 1]
        start = np.arange(0, segment_end_M[-1] if len(segments_M5) else 0, size)
        if len(start) == 0:
            return Tiles(size, *[start] * 5)
        start_P = np.union1d(segment_start_M, start)
        length_P = np.diff(start_P, append=segment_end_M[-1])
        segment_P = np.searchsorted(segment_start_M, start_P, side="right") - 1
        end_P = segments_M5[segment_P, 2]
        depth_P = segments_M5[segment_P, 3] + start_P - segment_start_M[segment_P]
        first = np.searchsorted(start_P, start)
        return Tiles(
            size,
            start,
            np.minimum.reduceat(end_P, first),
            np.maximum.reduceat(end_P, first),
            np.minimum.reduceat(depth_P, first),
            np.maximum.reduceat(depth_P + length_P - 1, first),
        )


@dataclass(frozen=True)
class Pairs:
    """The pairs of a query tile and a key tile that have something to compute.

    Args:
        queries, keys: how many tiles there are on either side.
        query_L, key_L: the pairs, ordered by key tile, then by query tile.
        full_L: every query of the tile sees every key of the tile, as far as the tree and the window decide. Never so
            where the end of the tokens cuts a tile short: full tiles need no bounds.
    """

    queries: int
    keys: int
    query_L: np.ndarray
    key_L: np.ndarray
    full_L: np.ndarray

    @staticmethod
    def of(segments_M5: np.ndarray, block_q: int, block_k: int, window: int | None) -> Pairs:
        """The pairs in which a query sees a key by the tree: exactly those.

        A window drops a pair where even the shallowest query is too deep for the deepest key. (Both needn't lie on one
        path, so that some pairs are kept without need.)
        """
        queries, keys = Tiles.of(segments_M5, block_q), Tiles.of(segments_M5, block_k)
        first = keys.start // block_q
        count = (keys.greatest_end - 1) // block_q + 1 - first
        key_L = np.repeat(np.arange(len(keys)), count)
        query_L = np.arange(len(key_L)) + np.repeat(first - (np.cumsum(count) - count), count)
        full_L = (keys.start[key_L] + block_k - 1 <= queries.start[query_L]) & (
            queries.start[query_L] + block_q <= keys.least_end[key_L]
        )
        if window is not None:
            full_L &= queries.greatest_depth[query_L] - keys.least_depth[key_L] < window
            near_L = queries.least_depth[query_L] - keys.greatest_depth[key_L] < window
            query_L, key_L, full_L = query_L[near_L], key_L[near_L], full_L[near_L]
        return Pairs(len(queries), len(keys), query_L, key_L, full_L)


@dataclass(frozen=True)
class BlockLists:
    """For each tile of one side, the tiles of the other side: partial ones first, then full ones.

    Args:
        rows_R4: int32 on the device: tile, begin, split, end: `tiles_L[begin:split]` are partial, `tiles_L[split:end]`
            full. In order of decreasing work, so that no long row starts last and is waited for.
        tiles_L: int32 on the device, ascending in either part of a row.
    """

    rows_R4: Tensor
    tiles_L: Tensor

    @staticmethod
    def of(
        row_L: np.ndarray, tile_L: np.ndarray, full_L: np.ndarray, rows: int, device: torch.device
    ) -> BlockLists:
        order = stable_order(2 * row_L + full_L, 2 * rows)  # tiles stay in order
        partial = np.bincount(row_L[~full_L], minlength=rows)
        length = np.bincount(row_L, minlength=rows)
        end = np.cumsum(length)
        table_R4 = np.stack([np.arange(rows), end - length, end - length + partial, end], 1)
        table_R4 = table_R4[np.argsort(-length, kind="stable")]
        flat = np.concatenate([table_R4.ravel(), tile_L[order]]).astype(np.int32)
        flat_L = to_device(torch.from_numpy(flat), device)
        return BlockLists(flat_L[: 4 * rows].view(rows, 4), flat_L[4 * rows :])


def stable_order(key_L: np.ndarray, limit: int) -> np.ndarray:
    """What sorts keys from 0 to `limit`: in linear time where they fit into 16 bits, by which numpy sorts by radix."""
    return np.argsort(key_L.astype(np.min_scalar_type(limit)), kind="stable")


def key_lists(
    segments_M5: Tensor, block_q: int, block_k: int, window: int | None, device: torch.device
) -> BlockLists:
    """For each query tile its key tiles."""

    def build() -> BlockLists:
        pairs = Pairs.of(segments_M5.numpy(), block_q, block_k, window)
        return BlockLists.of(pairs.query_L, pairs.key_L, pairs.full_L, pairs.queries, device)

    return once_per_plan(segments_M5, ("keys", block_q, block_k, window, device), build)


def query_lists(
    segments_M5: Tensor, block_q: int, block_k: int, window: int | None, device: torch.device
) -> BlockLists:
    """For each key tile its query tiles."""

    def build() -> BlockLists:
        pairs = Pairs.of(segments_M5.numpy(), block_q, block_k, window)
        return BlockLists.of(pairs.key_L, pairs.query_L, pairs.full_L, pairs.keys, device)

    return once_per_plan(segments_M5, ("queries", block_q, block_k, window, device), build)
