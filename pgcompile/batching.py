"""Micro-batches that keep their groups: rows that share prefixes go into one micro-batch, so that there is something
to share.

A prefix is computed once in every micro-batch that has a row with it, so a batch that is shuffled before it is cut (as
GRPO trainers do) shares little. Here the prefix tree is built over all rows at once, as BatchLLM (arXiv 2412.03594)
does for inference, and micro-batches are runs of its leaves in depth-first order: the distinct tokens of a run are its
first row and, of each further row, what it doesn't share with the row before it.

Shape suffixes: N rows, S positions, L tokens of a row.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from .prefix_tree import IntArray, encode_columns, sort_rows

Seed = int | Sequence[int] | None  # as numpy's default_rng takes it
Rows = Sequence[Any] | Tensor | NDArray[Any]

# Work of a query-key pair, relative to that of one token's linear layers: 2d of 12d² multiply-adds in a transformer
# layer of width d; this is d = 2048.
PAIR_COST = 1 / (6 * 2048)


def plan_microbatches(
    rows: Rows,
    budget: int,
    *,
    attention_mask: Any = None,
    position_ids: Any = None,
    max_rows: int | None = None,
    pair_cost: float = PAIR_COST,
    seed: Seed = None,
) -> list[list[int]]:
    """Cut a batch into micro-batches of at most `budget` distinct tokens.

    Of all ways to cut the leaves of the prefix tree, in one depth-first order, into runs, this takes the least number
    of runs, and among those the least work of the largest one (linear work by distinct token, attention by query-key
    pair).

    The packed graph repeats branches shorter than 16 tokens rather than keep them (`min_saving=0` keeps all), so it may
    run on a few more tokens than are counted here.

    Args:
        rows: token ids: `[N, S]`, or N sequences of any lengths (lists, arrays, tensors).
        budget: the most distinct tokens of a micro-batch.
        attention_mask: `[N, S]`, for rows that are `[N, S]`: leading and trailing zeros are padding and cost nothing.
        position_ids: `[N, S]`, likewise. Without them, rows that begin at different columns share nothing, since
            most models number positions by column then.
        max_rows: the most rows of a micro-batch.
        pair_cost: work of a query-key pair, in units of the work of one token in linear layers: about
            1 / (6 × hidden size).
        seed: shuffles the children of every node of the tree; without one, they come in a fixed order.

    Returns:
        The rows' numbers, one list per micro-batch; every row is in exactly one.

    Raises:
        ValueError: a row alone exceeds the budget, shapes that don't fit, or limits that aren't positive. TypeError:
            rows that aren't integers.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget must be a number of tokens, at least 1, got {budget!r}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    if not 0 <= pair_cost < math.inf:
        raise ValueError(f"pair_cost must be a number of at least 0, got {pair_cost}")
    codes = _codes(rows, attention_mask, position_ids)
    if not codes:
        return []
    order, lcp = _leaves(codes, seed)
    lengths = np.array([len(codes[n]) for n in order], dtype=np.int64)
    if lengths.max() > budget:
        at = int(lengths.argmax())
        raise ValueError(f"row {order[at]} has {lengths[at]:,} tokens, more than the budget of {budget:,}")
    tokens = _Runs(lengths, lengths - lcp)
    work_of = [n + pair_cost * n * (n + 1) / 2 for n in (lengths.astype(float), lcp.astype(float))]
    work = _Runs(work_of[0], work_of[0] - work_of[1])

    def cut(most_work: float) -> list[int]:
        """Where runs begin that are each as long as the limits allow: no cut into runs has fewer."""
        starts, at = [], 0
        while at < len(order):
            starts.append(at)
            end = min(tokens.end(at, budget), work.end(at, most_work), at + (max_rows or len(order)))
            at = max(end, at + 1)  # rounding may leave no room for a row that is the limit itself
        return starts

    starts = cut(np.inf)
    low, high = float(work_of[0].max()), work.total()
    while high - low > 1e-3 * low:  # a tenth of a percent of the work of the longest row
        middle = (low + high) / 2
        tried = cut(middle)
        if len(tried) == len(starts):
            high, starts = middle, tried
        else:
            low = middle
    return [order[a:b] for a, b in zip(starts, [*starts[1:], len(order)], strict=True)]


def shuffle_groups(
    rows: Rows, *, attention_mask: Any = None, position_ids: Any = None, seed: Seed = 0
) -> list[int]:
    """Shuffle rows so that those that share a prefix stay together, at every depth of the prefix tree.

    The order is a depth-first walk that visits the children of each node in random order: groups change places, and so
    do the rows of a group. Cutting it into equal parts separates few groups, and none if all have one size which
    divides that of a part or is divided by it.

    Args:
        rows, attention_mask, position_ids: see `plan_microbatches`.
        seed: of the shuffle; None takes a fixed order instead.

    Returns:
        The rows' numbers, each once.
    """
    return _leaves(_codes(rows, attention_mask, position_ids), seed)[0]


class MicrobatchSampler(Sampler[list[int]]):
    """`plan_microbatches` for a data loader: `DataLoader(dataset, batch_sampler=MicrobatchSampler(rows, budget))`.

    As with PyTorch's `DistributedSampler`, `set_epoch` before each epoch gives every epoch an order of its own.

    Args:
        rows: token ids of the data set's rows, see `plan_microbatches`.
        budget: the most distinct tokens of a micro-batch.
        shuffle: shuffle groups, the rows in them, and micro-batches; else they come in a fixed order.
        seed: of the shuffle.
        options: further arguments of `plan_microbatches`.
    """

    def __init__(
        self, rows: Rows, budget: int, *, shuffle: bool = True, seed: int = 0, **options: Any
    ) -> None:
        self._rows, self._budget, self._options = rows, budget, options
        self._shuffle, self._seed = shuffle, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Plan the micro-batches of this epoch."""
        seed = (self._seed, epoch) if self._shuffle else None
        self._planned = plan_microbatches(self._rows, self._budget, seed=seed, **self._options)
        if self._shuffle:
            np.random.default_rng(seed).shuffle(self._planned)

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(rows) for rows in self._planned])

    def __len__(self) -> int:
        return len(self._planned)


class _Runs:
    """Costs of runs of leaves: a row costs `alone` at the start of a run, and `added` after the row before it."""

    def __init__(self, alone: NDArray[Any], added: NDArray[Any]) -> None:
        self.alone: list[Any] = alone.tolist()
        self.up_to: list[Any] = np.cumsum(added).tolist()

    def end(self, start: int, limit: float) -> int:
        """One past the last row of the longest run from `start` on that costs at most `limit`."""
        return bisect_right(self.up_to, limit - self.alone[start] + self.up_to[start], lo=start)

    def total(self) -> float:
        return self.up_to[-1]


def _leaves(codes: Sequence[NDArray[Any]], seed: Seed) -> tuple[list[int], IntArray]:
    """The rows as leaves of their prefix tree, in depth-first order, and what each shares with the one before it.

    In sorted order, the leaves below a node are a range whose LCP entries are at least its depth, and its children
    are what lies between the entries equal to it. Whatever the order of the children, neighbours that are leaves of
    two of them share just the path to the node.
    """
    order, lcp = sort_rows(codes)
    if seed is None:
        return order, lcp
    rng = np.random.default_rng(seed)
    leaves: list[int] = []
    shared: list[int] = []
    # ranges of sorted rows, and what their first leaf shares with the leaf before it
    todo = [(0, len(order), 0)]
    while todo:
        low, high, before = todo.pop()
        if high - low == 1:
            leaves.append(order[low])
            shared.append(before)
        if high - low < 2:
            continue
        inside = lcp[low + 1 : high]
        depth = int(inside.min())
        bounds = [low, *(low + 1 + np.flatnonzero(inside == depth)).tolist(), high]
        walk = rng.permutation(len(bounds) - 1).tolist()
        children = [(bounds[i], bounds[i + 1], depth if at else before) for at, i in enumerate(walk)]
        todo += reversed(children)
    return leaves, np.array(shared, dtype=np.int64)


def _codes(rows: Rows, attention_mask: Any, position_ids: Any) -> list[NDArray[Any]]:
    """One array of integers per row, `[L]` or `[L, W]`: tokens are equal iff their codes are."""
    columns = {"attention_mask": attention_mask, "position_ids": position_ids}
    given = {name: _array(value) for name, value in columns.items() if value is not None}
    if not isinstance(rows, (Tensor, np.ndarray)):
        if given:
            raise ValueError(f"{', '.join(given)}: only for rows in one array [N, S]; leave padding out")
        return [_integers(_array(row), 1) for row in rows]
    ids_NS = _integers(_array(rows), 2)
    for name, value in given.items():
        if value.shape != ids_NS.shape:
            raise ValueError(f"{name} has shape {value.shape}, and the rows have {ids_NS.shape}")
    if not given:
        return list(ids_NS)
    num_rows, num_positions = ids_NS.shape
    kept_NS = given.get("attention_mask", np.ones_like(ids_NS)) != 0
    if num_rows == 0 or num_positions == 0:
        return list(ids_NS)
    first = kept_NS.argmax(1)
    end = np.where(kept_NS.any(1), num_positions - kept_NS[:, ::-1].argmax(1), first)
    positions = given.get("position_ids")
    if positions is None:
        positions = np.broadcast_to(first[:, None], ids_NS.shape)
    codes_NSW = encode_columns([ids_NS, kept_NS, positions])
    return [codes[start:stop] for codes, start, stop in zip(codes_NSW, first, end, strict=True)]


def _array(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _integers(value: NDArray[Any], dims: int) -> NDArray[Any]:
    if value.ndim != dims:
        raise ValueError(
            f"rows must be [N, S] or sequences of token ids, got an array of shape {value.shape}"
        )
    if value.size and value.dtype.kind not in "iu":
        raise TypeError(f"token ids must be integers, got {value.dtype}")
    return np.ascontiguousarray(value, dtype=np.int64)
