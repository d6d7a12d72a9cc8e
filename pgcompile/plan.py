"""The plan of a batch: which tokens are distinct, and everything the packed graph needs to know about them.

Key columns are whatever entered the token stream: ids, positions, mask bits, tables. Two tokens are one class when
their rows agree on every key column, bitwise, from the first kept token up to them; so sharing needs no metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .columns import (
    MASK_PROBLEMS,
    Columns,
    DenseCall,
    batch_sizes,
    key_groups,
    part_columns,
    read_columns,
    select_map,
)
from .packed_tree import PackedTree, PackedTrees
from .passes.layout import POSITION, ROW, TokenLayout, is_token_factor
from .passes.packed_graphs import PackedGraphs
from .prefix_tree import encode_columns
from .scored import Scored, find_scored

# A branch makes every engine handle a segment more; measured on CPU that costs about as much as 16 tokens.
MIN_SHARED = 16


@dataclass(frozen=True)
class Plan:
    """One batch, N rows of S positions, T distinct tokens in depth-first preorder.

    Args:
        rows, positions: N and S.
        tree: which tokens are distinct, with its tensors on the batch's device.
        scored: the tokens that the head is computed for, if that aren't all.
        hides: for each of `PackedGraphs.mask_columns`, on the host, bool [2]: does `key_valid` hide a token that wasn't
            dropped, and does `same_value` hide one in a token's own row?
        data_valid: for each mask that is data, bool [N, S]: which keys it allows.
        valid_tokens: tokens that weren't dropped.
        kept_padding: of those, leading and trailing ones that every attention masks: something else reads them.
        dense_pairs, packed_pairs: query-key pairs of causal attention over the batch and over the packed tokens.
        is_known: the tree was built for an earlier call.
    """

    rows: int
    positions: int
    tree: PackedTree
    scored: Scored | None
    hides: list[Tensor]
    data_valid: list[Tensor]
    valid_tokens: int
    dense_pairs: int
    packed_pairs: int
    kept_padding: int
    is_known: bool

    @property
    def tokens(self) -> int:
        return self.tree.prefix_tree.tokens

    @property
    def dense_tokens(self) -> int:
        return self.rows * self.positions


def build_plan(graphs: PackedGraphs, results: Sequence[Tensor], keep_all: bool, trees: PackedTrees) -> Plan:
    """Plan a batch from the prologue's results.

    Args:
        trees: those of earlier batches.
        keep_all: share every branch, however short.

    Raises:
        DenseCall: if this batch can't be packed (a mask that isn't causal, an empty batch, a fully masked query).
    """
    n, s = batch_sizes(graphs, results)
    if n == 0 or s == 0:
        raise DenseCall("empty_batch", f"a batch of {n} rows and {s} positions has no token")
    columns, wide, data_valid = read_columns(graphs, results, n, s)
    device = columns.keys[0].device
    columns = columns.on_host()
    masked = _masked(graphs, columns)
    dropped = None if masked is None or columns.droppable is None else masked & columns.droppable
    first, end = _kept_range(dropped, n, s)
    codes = encode_columns(columns.keys, (n, s))
    tree, is_known = trees.find(codes, first, end, 0 if keep_all else MIN_SHARED, device)
    on_host = tree.prefix_tree
    if on_host.tokens == 0:
        raise DenseCall("empty_batch", "every token is padding")
    padding_first, padding_end = _kept_range(masked, n, s)
    kept_padding = int((end - first).sum() - (padding_end - padding_first).sum())
    kept = on_host.class_of >= 0
    holes = {group: kept & ~v for group, v in zip(key_groups(graphs), columns.valid, strict=True)}
    _refuse_masks(graphs, columns, kept, holes)
    plan = Plan(
        n, s, tree, find_scored(graphs, results, tree), _hides(graphs, columns, kept, holes), data_valid,
        valid_tokens=int((end - first).sum()),
        dense_pairs=n * s * (s + 1) // 2,
        packed_pairs=int((on_host.depth + 1).sum()),
        kept_padding=kept_padding,
        is_known=is_known,
    )  # fmt: skip
    for column in wide:
        if not bool(column.is_equal_within(tree.class_of, tree.row, tree.position)):
            raise DenseCall("internal_error", "two different columns have the same fingerprint")
    return plan


def kept_elements(
    value: Tensor, layout: TokenLayout, plan: Plan, results: Sequence[Tensor], graphs: PackedGraphs
) -> Tensor:
    """bool, of the shape of an output with the given layout: which of its elements belong to tokens that were kept."""
    kept = select_map(plan.tree.class_of >= 0, layout.selection, results, graphs)
    factors = [f for dim in layout.dims for f in (dim or (1,))]
    present = [f for f in (ROW, POSITION) if f in factors]
    kept = kept.permute([present.index(f) for f in factors if is_token_factor(f)])
    sizes = iter(kept.shape)
    spread = [next(sizes) if is_token_factor(f) else 1 for f in factors]
    whole = [size if is_token_factor(f) else f for size, f in zip(spread, factors, strict=True)]
    return kept.reshape(spread).expand(whole).reshape(value.shape)


# -- masks -----------------------------------------------------------------------------------------------------------


def _masked(graphs: PackedGraphs, columns: Columns) -> np.ndarray | None:
    """bool [N, S]: tokens that every attention masks; None if one masks none."""
    if not columns.valid or not all(c.key_valid for c in graphs.mask_columns):
        return None
    return ~np.logical_or.reduce(columns.valid)


def _kept_range(dropped: np.ndarray | None, n: int, s: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last kept position of each row: only leading and trailing runs are dropped."""
    if dropped is None or not dropped.any():
        return np.zeros(n, np.int64), np.full(n, s, np.int64)
    kept = ~dropped
    any_kept = kept.any(1)
    first = np.where(any_kept, kept.argmax(1), 0)
    end = np.where(any_kept, s - kept[:, ::-1].argmax(1), 0)
    return first.astype(np.int64), end.astype(np.int64)


Holes = dict[tuple[int, ...], np.ndarray]  # by key group, bool [N, S]: kept tokens that are no valid keys


def _refuse_masks(graphs: PackedGraphs, columns: Columns, kept: np.ndarray, holes: Holes) -> None:
    """Raise DenseCall if a kept token's row of a mask that is data is no row of causal and padding, or if a kept token
    is masked from everything: softmax would attend to all keys, later ones included."""
    if any(column.any() for column in columns.excessive):  # dropped ones, too: nothing masks a NaN
        text = "a bias of the scores is infinite, or so large that it might be meant as a mask"
        raise DenseCall("mask_not_understood", text)
    for problem in columns.problems:
        found = int((problem * kept).max())
        if found:
            raise DenseCall("mask_not_understood", MASK_PROBLEMS[found])
    rules = dict.fromkeys(
        (graphs.mask_columns[i].key_valid, bool(m.formula.same_value), m.formula.window)
        for i, m in zip(graphs.mask_of, graphs.matches, strict=True)
        if not (m.masked_is_zero and m.formula.minus_inf)  # that is zero in the original and here
    )
    for group, has_parts, window in rules:
        if not group:
            continue
        hole = holes[group]
        if not hole.any():
            continue
        if has_parts:
            text = "a masked token that isn't dropped may have nothing to attend to in its part of the row"
            raise DenseCall("fully_masked_query", text)
        seen = (kept & ~hole).cumsum(1)
        if window is not None:
            seen[:, window:] -= seen[:, :-window].copy()
        if (hole & (seen == 0)).any():
            raise DenseCall("fully_masked_query", "a token that isn't dropped may attend to nothing")


def _hides(graphs: PackedGraphs, columns: Columns, kept: np.ndarray, holes: Holes) -> list[Tensor]:
    """For each set of mask columns: is a kept key invalid; is a kept token in another part than the one before it?"""
    has_holes = {group: bool(hole.any()) for group, hole in holes.items()}
    splits = {
        i: bool((changes[:, 1:] & kept[:, 1:] & kept[:, :-1]).any())
        for i, changes in zip(part_columns(graphs), columns.changes, strict=True)
    }
    return [
        torch.tensor([has_holes.get(c.key_valid, False), any(splits[i] for i in c.same_value)], device="cpu")
        for c in graphs.mask_columns
    ]
