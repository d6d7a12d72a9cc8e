"""The prefix tree of a batch: which tokens are one token class, and in what order the packed tokens lie.

Two tokens are one *token class* when their rows agree on every key column, bitwise, from the first kept token
up to them. The classes form a forest: the parent of a class is the token before it. Found with numpy alone:

1. `encode_columns` folds the key columns `[N, S]` into one exact code `[N, S, W]` per token (W is mostly 1).
2. Rows are sorted by the bytes of their kept codes. That isn't the numeric order of the codes, but any
   lexicographic order serves: rows that share a prefix are neighbours, and a row that is a prefix of others
   comes before them. Neighbours are compared once, which gives the longest-common-prefix (LCP) array.
3. The i-th sorted row shares its first `lcp[i]` tokens with the row before it and adds the rest to the packed
   stream. Appended in that order the tokens *are* in depth-first preorder, so that descendants are contiguous
   and the ancestor test is a range test. Segments are read from the few tokens at which a path splits.

Shape suffixes: N rows, S positions, W words per code, L kept tokens of a row, T packed tokens, M segments.
Source: the textbook construction of a trie from sorted strings and their LCP array (Abouelhoda et al. 2004).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
CodeArray = NDArray[np.uint64]

WORD_BITS = 64
# Tokens that are packed at a time. Their codes and the temporary that columns are shifted into, 256 KiB each,
# stay in a core's L2 cache (1-2 MiB on current servers) while one column after the other is added.
BLOCK_TOKENS = 32_768


def encode_columns(columns: Sequence[NDArray[Any]], shape: tuple[int, int] | None = None) -> CodeArray:
    """Fold key columns into one code per token: two tokens have equal codes iff they agree in every column.

    A column whose values span `[low, high]` needs `bit_length(high - low)` bits, a constant one none. The
    digit of a value would be `(value - low) << shift`; but the lows add up to one constant per word, and
    adding a constant modulo 2**64 changes no equality, so `value << shift` is summed with wrap-around and
    nothing is subtracted. That leaves one pass to find the ranges and one to pack.

    Args:
        columns: arrays `[N, S]` with any strides (broadcast views too) of dtype bool, (u)int8..64 or
            float16..64, in native byte order. Floats are compared by their bits: -0.0 differs from 0.0, a NaN
            equals the same NaN.
        shape: `(N, S)`; needed only when `columns` is empty.

    Returns:
        codes_NSW, uint64, C-contiguous, W >= 1; one word of zeros without columns or when all are constant.
        Codes of different calls aren't comparable.

    Raises:
        TypeError: a dtype that isn't listed. ValueError: shapes that differ, or no columns and no shape.
    """
    if shape is None and not columns:
        raise ValueError("encode_columns needs `shape` when there are no columns")
    shapes = {column.shape for column in columns} | ({tuple(shape)} if shape is not None else set())
    if len(shapes) > 1 or any(len(each) != 2 for each in shapes):
        raise ValueError(f"key columns must all have one shape [N, S], got {sorted(shapes)}")
    num_rows, num_positions = shapes.pop()

    values = [_as_integers(column) for column in columns]
    words = _assign_words([_bit_width(value) for value in values])
    codes_NSW = np.zeros((num_rows, num_positions, max(1, len(words))), dtype=np.uint64)
    block = max(1, BLOCK_TOKENS // max(1, num_positions))
    scratch = np.empty((min(block, num_rows), num_positions), dtype=np.uint64)
    for start in range(0, num_rows, block):
        rows = slice(start, start + block)
        for word, placed in enumerate(words):
            code = codes_NSW[rows, :, word]
            shifted = scratch[: len(code)]
            for index, shift in placed:
                value = values[index][rows]
                if value.itemsize == 8:
                    value = value.view(np.uint64)  # spares the cast; narrower integers are extended in it
                np.left_shift(value, shift, out=shifted, dtype=np.uint64, casting="unsafe")
                np.add(code, shifted, out=code)
    return codes_NSW


def _as_integers(column: NDArray[Any]) -> NDArray[Any]:
    """The column's values as integers of the same width, without a copy: bools and floats by their bits."""
    dtype = column.dtype
    if not dtype.isnative or dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise TypeError(f"a key column must be a bool, integer or float of at most 64 bits, got {dtype}")
    return column if dtype.kind in "iu" else column.view(f"u{dtype.itemsize}")


def _bit_width(value: NDArray[Any]) -> int:
    """Bits that tell the integers of a column apart; 0 when it is constant."""
    return (int(value.max()) - int(value.min())).bit_length() if value.size else 0


def _assign_words(widths: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Place columns of these bit widths, widest first, into the first word with room: (column, shift)s."""
    words: list[list[tuple[int, int]]] = []
    used: list[int] = []  # bits taken in each word
    for index in sorted(range(len(widths)), key=lambda column: -widths[column]):
        if widths[index] == 0:
            continue
        word = next((w for w, bits in enumerate(used) if bits + widths[index] <= WORD_BITS), len(words))
        if word == len(words):
            words.append([])
            used.append(0)
        words[word].append((index, used[word]))
        used[word] += widths[index]
    return words


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """The token classes of a batch, packed in depth-first preorder. All arrays are int64.

    A token k is an ancestor of q, or q itself, iff `k <= q < subtree_end[k]`.

    Attributes:
        class_of: `[N, S]`, the packed index of each (row, position); -1 where the token is dropped.
        row: `[T]`, the original row of each packed token's representative: the first one in sorted order.
        position: `[T]`, the representative's original position in that row.
        depth: `[T]`, the tokens before it on its path, 0 at a root; `position == first[row] + depth`.
        subtree_end: `[T]`, packed index one past the last descendant.
        segments: `[M, 5]`, in preorder: start, end (packed indices), subtree_end, depth of the first token,
            parent segment (-1 for roots). A segment is a maximal run of classes without a branch: each of its
            tokens but the last has exactly one child, and the last has none or several. A row that *ends*
            inside a segment doesn't split it, since no path leaves it there.
    """

    class_of: IntArray
    row: IntArray
    position: IntArray
    depth: IntArray
    subtree_end: IntArray
    segments: IntArray

    @property
    def tokens(self) -> int:
        """T, the number of packed tokens."""
        return len(self.row)

    @property
    def num_segments(self) -> int:
        """M, the number of segments."""
        return len(self.segments)

    @property
    def max_segment_depth(self) -> int:
        """The number of segments on the longest path from a root to a leaf; 0 for an empty tree."""
        levels: list[int] = []
        for parent in self.segments[:, 4].tolist():
            levels.append(1 if parent < 0 else levels[parent] + 1)
        return max(levels, default=0)

    def path(self, token: int) -> IntArray:
        """Packed indices from the root down to `token`, both included: its representative's row up to it."""
        stop = self.position[token] + 1
        return self.class_of[self.row[token], stop - self.depth[token] - 1 : stop]


def build_prefix_tree(
    codes: NDArray[Any], first: NDArray[Any], end: NDArray[Any], min_shared: int = 0
) -> PrefixTree:
    """Build the prefix tree of a batch: O(N·S) work and a sort of N rows, in loops over rows only.

    Deterministic in the values of its arguments; equal rows keep their order.

    Args:
        codes: `[N, S, W]` or `[N, S]`, integers; tokens are equal iff their codes are (see `encode_columns`).
        first: `[N]`, the first kept position of each row.
        end: `[N]`, one past the last; a row with `first == end` is dropped.
        min_shared: cost control; 0 and 1 keep every branch. A branch is kept only if at least this many
            tokens lie between it and the nearest kept branch above it (or the root), judged from the root
            down; otherwise those tokens are repeated in each subtree below it. Guaranteed: every segment that
            has children is at least `min_shared` long; classes are a refinement of those of `min_shared=0`
            (one class means equal prefixes, not always the reverse); equal rows share everything. A row that
            ends inside another makes no branch, so nothing is repeated on its account.

    Raises:
        TypeError: codes that aren't integers. ValueError: unless shapes fit and 0 <= first <= end <= S.
    """
    if codes.dtype.kind not in "biu":
        raise TypeError(f"codes must be integers (they are sorted by their bytes), got {codes.dtype}")
    codes_NSW = codes[:, :, np.newaxis] if codes.ndim == 2 else codes
    num_rows, num_positions, _ = codes_NSW.shape
    first, end = np.asarray(first, dtype=np.int64), np.asarray(end, dtype=np.int64)
    if first.shape != (num_rows,) or end.shape != (num_rows,):
        raise ValueError(f"first and end must have shape [{num_rows}], got {first.shape} and {end.shape}")
    if np.any(first < 0) or np.any(first > end) or np.any(end > num_positions):
        raise ValueError(f"kept tokens must satisfy 0 <= first <= end <= {num_positions}")

    bounds = list(zip(first.tolist(), end.tolist(), strict=True))
    order, lcp = sort_rows([codes_NSW[n, start:stop] for n, (start, stop) in enumerate(bounds)])
    lengths = (end - first)[order]
    if min_shared > 1:
        lcp = _keep_long_branches(lcp, lengths, min_shared)
    offsets = [0, *np.cumsum(lengths - lcp).tolist()]

    class_of = np.empty((num_rows, num_positions), dtype=np.int64)
    row, position, depth = (np.empty(offsets[-1], dtype=np.int64) for _ in range(3))
    ramp = np.arange(num_positions, dtype=np.int64)
    path = ramp[:0]  # the classes of the sorted row before this one
    starts: set[int] = set()  # packed tokens at which a segment starts
    for n, shared, (start, stop) in zip(order, lcp.tolist(), pairwise(offsets), strict=True):
        row_first, row_end = bounds[n]
        fresh = row_first + shared  # the first position that this row adds
        classes = class_of[n]
        classes[:row_first] = -1
        classes[row_first:fresh] = path[:shared]
        np.add(ramp[: stop - start], start, out=classes[fresh:row_end])
        classes[row_end:] = -1
        path = classes[row_first:row_end]
        row[start:stop] = n
        position[start:stop] = ramp[fresh:row_end]
        depth[start:stop] = ramp[shared : len(path)]
        if start == stop:
            continue
        # Preorder puts a token's first child right behind it. If that is this row's first new token, the row
        # only extends the one before it; if another lies there, the path branches and two segments begin.
        first_child = int(path[shared - 1]) + 1 if shared else start
        if shared == 0 or first_child != start:
            starts |= {first_child, start}
    segments = _segments(sorted(starts), depth)
    subtree_end = np.repeat(segments[:, 2], segments[:, 1] - segments[:, 0])
    return PrefixTree(class_of, row, position, depth, subtree_end, segments)


def sort_rows(rows: Sequence[NDArray[Any]]) -> tuple[list[int], IntArray]:
    """Sort rows so that those that share a prefix are neighbours.

    Args:
        rows: codes `[L]` or `[L, W]`, integers of one dtype, L of any length; equal rows keep their order.

    Returns:
        The rows' numbers in sorted order, and the LCP array `[N]`: the tokens that a row has in common with the row
        sorted before it, 0 for the first.
    """
    keys = [codes.tobytes() for codes in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    lcp = np.zeros(len(rows), dtype=np.int64)
    lcp[1:] = [_common_prefix(rows[above], rows[below]) for above, below in pairwise(order)]
    return order, lcp


def _common_prefix(a_LW: NDArray[Any], b_LW: NDArray[Any]) -> int:
    """Tokens that two rows of codes have in common at their start."""
    length = min(len(a_LW), len(b_LW))
    differs = (a_LW[:length] != b_LW[:length]).ravel()
    return int(differs.argmax()) // math.prod(a_LW.shape[1:]) if differs.any() else length


def _keep_long_branches(lcp: IntArray, lengths: IntArray, min_shared: int) -> IntArray:
    """Lower the LCP array so that each branch lies at least `min_shared` tokens below the kept one above it.

    A maximal range of entries >= d with some entries == d is a node of the tree at depth d. Those entries
    stay at d or fall to the depth of the kept branch above, but for those where the row before ends at d: no
    branch. Any lowering is sound: row i then shares fewer tokens. O(N) numpy work per level of nesting.
    """
    lowered = lcp.copy()
    todo = [(1, len(lcp), 0)]  # a range of entries, and the depth of the kept branch above them
    while todo:
        low, high, level = todo.pop()
        if low >= high:
            continue
        depth = int(lcp[low:high].min())
        at = low + np.flatnonzero(lcp[low:high] == depth)
        branch = at[lengths[at - 1] > depth]
        if len(branch) and depth - level >= min_shared:
            level = depth
        lowered[branch] = level
        todo += [(left + 1, right, level) for left, right in pairwise([low - 1, *at.tolist(), high])]
    return lowered


def _segments(starts: list[int], depth: IntArray) -> IntArray:
    """`PrefixTree.segments` from the packed indices at which segments start, in O(M)."""
    segments = np.empty((len(starts), 5), dtype=np.int64)
    segments[:, 0] = starts
    segments[:, 1] = [*starts, len(depth)][1:]
    segments[:, 2] = len(depth)
    segments[:, 3] = depth[segments[:, 0]]
    depths = segments[:, 3].tolist()
    path: list[int] = []  # a stack: the segments from the root down to the one before
    for index, start in enumerate(starts):
        while path and depths[path[-1]] >= depths[index]:
            segments[path.pop(), 2] = start
        segments[index, 4] = path[-1] if path else -1
        path.append(index)
    return segments
