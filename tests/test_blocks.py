"""Block lists against the dense visible matrix, and how often they are built."""

import gc

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcompile.engines import blocks, per_plan
from trees import Tree, random_tree, tree_of_rows

CPU = torch.device("cpu")
block = st.sampled_from([1, 2, 3, 4, 5, 7, 16, 64])


def visible_TT(tree: Tree, window: int | None = None) -> np.ndarray:
    """Which key (second dim) each query (first dim) sees, by parent pointers."""
    visible = np.zeros((tree.tokens, tree.tokens), dtype=bool)
    for token in range(tree.tokens):
        path = tree.path(token)
        visible[token, path if window is None else path[-window:]] = True
    return visible


def tiled(visible: np.ndarray, block_q: int, block_k: int):
    """Every pair of tiles with its part of the matrix."""
    for query, start_q in enumerate(range(0, len(visible), block_q)):
        for key, start_k in enumerate(range(0, len(visible), block_k)):
            yield (query, key), visible[start_q : start_q + block_q, start_k : start_k + block_k]


def listed(lists: blocks.BlockLists) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Partial and full tiles of each row."""
    partial, full = {}, {}
    for row, begin, split, end in lists.rows_R4.tolist():
        partial[row], full[row] = lists.tiles_L[begin:split].tolist(), lists.tiles_L[split:end].tolist()
    return partial, full


def pairs(rows: dict[int, list[int]]) -> set[tuple[int, int]]:
    return {(row, tile) for row, tiles in rows.items() for tile in tiles}


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 24), block, block)
def test_lists_are_the_tiles_with_a_visible_pair(seed, rows, length, block_q, block_k):
    tree = random_tree(seed, rows, length)
    visible = visible_TT(tree)
    seen = {pair for pair, part in tiled(visible, block_q, block_k) if part.any()}
    whole = {
        p for p, part in tiled(visible, block_q, block_k) if part.all() and part.shape == (block_q, block_k)
    }
    partial, full = listed(blocks.key_lists(tree.segments, block_q, block_k, None, CPU))
    assert pairs(full) == whole and pairs(partial) == seen - whole
    assert all(tiles == sorted(tiles) for tiles in [*partial.values(), *full.values()])
    for there, back in zip(
        (partial, full), listed(blocks.query_lists(tree.segments, block_q, block_k, None, CPU))
    ):
        assert {(query, key) for key, query in pairs(back)} == pairs(there)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 24), block, block, st.integers(1, 30))
def test_a_window_drops_no_tile_that_is_seen_and_calls_none_full_that_it_cuts(
    seed, rows, length, block_q, block_k, window
):
    tree = random_tree(seed, rows, length)
    by_tree = {p for p, part in tiled(visible_TT(tree), block_q, block_k) if part.any()}
    visible = dict(tiled(visible_TT(tree, window), block_q, block_k))
    partial, full = listed(blocks.key_lists(tree.segments, block_q, block_k, window, CPU))
    assert {pair for pair, part in visible.items() if part.any()} <= pairs(partial) | pairs(full) <= by_tree
    assert all(visible[pair].all() for pair in pairs(full))
    if rows == 1:  # one path: nothing to be careful about
        near = {pair for pair, part in visible.items() if part.any()}
        assert pairs(partial) | pairs(full) == near


def test_every_tile_has_a_row_and_the_longest_come_first():
    tree = random_tree(3, rows=12, length=24)
    for lists, size in (
        (blocks.key_lists(tree.segments, 4, 8, None, CPU), 4),
        (blocks.query_lists(tree.segments, 4, 8, None, CPU), 8),
    ):
        row, begin, _, end = lists.rows_R4.T
        assert sorted(row.tolist()) == list(range(-(-tree.tokens // size)))
        assert ((end - begin).diff() <= 0).all() and lists.rows_R4.dtype == lists.tiles_L.dtype == torch.int32


def test_no_tokens():
    lists = blocks.key_lists(torch.empty(0, 5, dtype=torch.int64), 4, 4, None, CPU)
    assert lists.rows_R4.shape == (0, 4) and len(lists.tiles_L) == 0


def test_lists_are_built_once_for_a_plan_and_go_with_it():
    before = len(per_plan._built)
    tree = tree_of_rows([[1, 2, 3], [1, 2, 4]])
    other = tree_of_rows([[1, 2, 3], [1, 2, 4]])
    first = blocks.key_lists(tree.segments, 2, 2, None, CPU)
    assert blocks.key_lists(tree.segments, 2, 2, None, CPU) is first
    assert blocks.key_lists(other.segments, 2, 2, None, CPU) is not first
    for changed in ((4, 2, None), (2, 4, None), (2, 2, 1)):
        assert blocks.key_lists(tree.segments, *changed, CPU) is not first
    assert blocks.query_lists(tree.segments, 2, 2, None, CPU) is not first
    assert len(per_plan._built) == before + 2
    del tree, other
    gc.collect()
    assert len(per_plan._built) == before


def test_work_is_that_of_the_listed_tiles():
    """2²⁶ tokens in 2¹⁵ rows: 2³⁶ pairs of tiles, of which 2²⁰ or so are listed."""
    length = 2048
    start = np.arange(1 << 15) * length
    segments = np.stack([start, start + length, start + length, 0 * start, 0 * start - 1], 1)
    lists = blocks.key_lists(torch.from_numpy(segments), 256, 256, None, CPU)
    assert len(lists.tiles_L) == len(start) * 8 * 9 // 2
