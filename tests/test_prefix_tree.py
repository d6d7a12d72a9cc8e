"""The prefix tree against brute force: every property is recomputed from the rows as Python tuples."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcompile.prefix_tree import PrefixTree, build_prefix_tree, encode_columns

Prefix = tuple[tuple[int, ...], ...]
deterministic = settings(max_examples=300, derandomize=True, deadline=None, database=None)


@dataclass(frozen=True)
class Batch:
    """Codes `[N, S, W]` and the kept range of each row."""

    codes: np.ndarray
    first: np.ndarray
    end: np.ndarray

    def tree(self, min_shared: int = 0) -> PrefixTree:
        return build_prefix_tree(self.codes, self.first, self.end, min_shared)

    def prefix(self, n: int, s: int) -> Prefix:
        """The kept tokens of row n up to position s, included."""
        return tuple(tuple(word.tolist()) for word in self.codes[n, self.first[n] : s + 1])

    def rows(self) -> list[Prefix]:
        return [self.prefix(n, self.end[n] - 1) for n in range(len(self.codes))]

    def kept(self) -> list[tuple[int, int]]:
        return [(n, s) for n in range(len(self.codes)) for s in range(self.first[n], self.end[n])]


def batch_of(*rows: str, pad: int = 0) -> Batch:
    """One row per string, one letter per token; `pad` dropped positions before it, at least one after it."""
    size = pad + max(map(len, rows)) + 1
    codes = np.full((len(rows), size, 1), 7, dtype=np.uint64)
    for n, row in enumerate(rows):
        codes[n, pad : pad + len(row), 0] = [ord(letter) for letter in row]
    return Batch(codes, np.full(len(rows), pad), np.array([pad + len(row) for row in rows]))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Up to 8 rows x 12 positions x 2 words over three letters; rows often start as copies of others."""
    # 256 is above 1 as a number and below it as little-endian bytes: sorted order and numeric order differ.
    letters = st.sampled_from([0, 1, 256])
    size, width = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2]))
    rows: list[list[Any]] = []
    bounds: list[tuple[int, int]] = []
    for n in range(draw(st.integers(1, 8))):
        token = st.tuples(*[letters] * width)
        row = draw(st.lists(token, min_size=size, max_size=size))
        first = draw(st.just(0) | st.integers(0, size))
        if n and draw(st.booleans()):
            source = draw(st.integers(0, n - 1))
            copied = draw(st.integers(0, size))
            first = bounds[source][0]
            row = rows[source][:copied] + row[copied:]
        rows.append(row)
        bounds.append((first, draw(st.just(size) | st.integers(first, size))))
    codes = np.array(rows, dtype=np.uint64).reshape(len(rows), size, width)
    return Batch(codes, *np.array(bounds).T)


def children(tree: PrefixTree) -> dict[int, set[int]]:
    """Child tokens of every packed token, and the roots under -1, read from the paths of all rows."""
    result: dict[int, set[int]] = {token: set() for token in range(-1, tree.tokens)}
    for row in tree.class_of.tolist():
        for parent, child in pairwise([-1] + [token for token in row if token >= 0]):
            result[parent].add(child)
    return result


def check_structure(batch: Batch, tree: PrefixTree) -> None:
    """Everything that must hold of any tree, whichever branches it keeps."""
    kept = set(batch.kept())
    for n, s in product(*map(range, tree.class_of.shape)):
        assert (tree.class_of[n, s] >= 0) == ((n, s) in kept)
    assert set(tree.class_of[tree.class_of >= 0].tolist()) == set(range(tree.tokens))
    for field in fields(tree):
        assert getattr(tree, field.name).dtype == np.int64

    # Representatives, depth and paths.
    keys = [batch.codes[n, batch.first[n] : batch.end[n]].tobytes() for n in range(len(batch.codes))]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    for token in range(tree.tokens):
        n, s = tree.row[token], tree.position[token]
        assert tree.class_of[n, s] == token
        members = set(np.argwhere(tree.class_of == token)[:, 0].tolist())
        assert n == next(row for row in order if row in members)
        assert tree.depth[token] == s - batch.first[n] == len(tree.path(token)) - 1

    # Preorder and subtrees: the ancestor test is the prefix relation of class paths.
    paths = [tree.path(token).tolist() for token in range(tree.tokens)]
    assert paths == sorted(paths)
    for k, q in product(range(tree.tokens), repeat=2):
        assert (k <= q < tree.subtree_end[k]) == (k in paths[q])

    # Segments tile the stream, are linked as the tokens are, and are maximal runs without a branch.
    below = children(tree)
    parent_of = {child: parent for parent, tokens in below.items() for child in tokens}
    segment_of = {t: m for m, (a, b, *_) in enumerate(tree.segments.tolist()) for t in range(a, b)}
    assert tree.segments[:, :2].ravel().tolist() == sorted(
        [0] * bool(tree.tokens) + 2 * tree.segments[1:, 0].tolist() + [tree.tokens] * bool(tree.tokens)
    )
    for start, end, subtree_end, depth, parent in tree.segments.tolist():
        assert start < end
        assert (tree.subtree_end[start:end] == subtree_end).all()
        assert depth == tree.depth[start]
        assert parent == (segment_of[parent_of[start]] if parent_of[start] >= 0 else -1)
        assert all(below[token] == {token + 1} for token in range(start, end - 1))
        assert len(below[end - 1]) != 1
    assert tree.num_segments == len(tree.segments)
    assert tree.max_segment_depth == max((len({segment_of[t] for t in path}) for path in paths), default=0)


@deterministic
@given(batches())
def test_tree_is_the_trie_of_the_rows(batch: Batch) -> None:
    tree = batch.tree()
    prefixes = {(n, s): batch.prefix(n, s) for n, s in batch.kept()}
    assert tree.tokens == len(set(prefixes.values()))
    for (n, s), (m, t) in product(prefixes, repeat=2):
        assert (tree.class_of[n, s] == tree.class_of[m, t]) == (prefixes[n, s] == prefixes[m, t])
    representative = [prefixes[n, s] for n, s in zip(tree.row.tolist(), tree.position.tolist(), strict=True)]
    for k, q in product(range(tree.tokens), repeat=2):
        is_prefix = representative[q][: len(representative[k])] == representative[k]
        assert (k <= q < tree.subtree_end[k]) == is_prefix
    check_structure(batch, tree)


def expected_tokens(rows: list[Prefix], min_shared: int, level: int = 0) -> int:
    """Packed tokens below `level` of rows that agree up to there, by the definition of `min_shared`."""
    depth = level
    while all(len(row) > depth for row in rows) and len({row[depth] for row in rows}) == 1:
        depth += 1
    while len(groups := {row[depth] for row in rows if len(row) > depth}) == 1:
        depth += 1  # some rows end here: no branch
    if not groups:
        return max(map(len, rows)) - level
    shared = depth - level if depth - level >= min_shared else 0
    parts = [[row for row in rows if len(row) > depth and row[depth] == token] for token in groups]
    return shared + sum(expected_tokens(part, min_shared, level + shared) for part in parts)


@deterministic
@given(batches(), st.integers(0, 6))
def test_min_shared_refines_and_keeps_only_long_branches(batch: Batch, min_shared: int) -> None:
    full, tree = batch.tree(), batch.tree(min_shared)
    check_structure(batch, tree)
    # A refinement: every class lies within one class of the full tree.
    pairs = {(tree.class_of[n, s], full.class_of[n, s]) for n, s in batch.kept()}
    assert len(pairs) == tree.tokens >= full.tokens
    inner = set(tree.segments[:, 4].tolist()) - {-1}
    assert all(tree.segments[m, 1] - tree.segments[m, 0] >= min_shared for m in inner)
    assert tree.tokens == expected_tokens(batch.rows(), min_shared)
    for n, m in product(range(len(batch.codes)), repeat=2):
        if batch.rows()[n] == batch.rows()[m]:
            of_n, of_m = (tree.class_of[row, batch.first[row] : batch.end[row]] for row in (n, m))
            np.testing.assert_array_equal(of_n, of_m)
    if min_shared <= 1:
        assert_same(tree, full)


def assert_same(a: PrefixTree, b: PrefixTree) -> None:
    for field in fields(PrefixTree):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def test_worked_example() -> None:
    """Two answers to one prompt, one of them twice, a shorter row, an unrelated row and an empty one."""
    tree = batch_of("pqrx", "pqry", "z", "pq", "", "pqrx", pad=2).tree()
    #  packed: p0 q1 r2 x3 y4 z5
    np.testing.assert_array_equal(
        tree.class_of[:, 2:6],
        [[0, 1, 2, 3], [0, 1, 2, 4], [5, -1, -1, -1], [0, 1, -1, -1], [-1] * 4, [0, 1, 2, 3]],
    )
    assert (tree.class_of[:, :2] == -1).all()
    assert tree.row.tolist() == [3, 3, 0, 0, 1, 2]
    assert tree.position.tolist() == [2, 3, 4, 5, 5, 2]
    assert tree.depth.tolist() == [0, 1, 2, 3, 3, 0]
    assert tree.subtree_end.tolist() == [5, 5, 5, 4, 5, 6]
    assert tree.segments.tolist() == [[0, 3, 5, 0, -1], [3, 4, 4, 3, 0], [4, 5, 5, 3, 0], [5, 6, 6, 0, -1]]
    assert (tree.tokens, tree.num_segments, tree.max_segment_depth) == (6, 4, 2)
    assert tree.path(4).tolist() == [0, 1, 2, 4]


def test_row_that_ends_inside_another_splits_nothing() -> None:
    """The turns of one dialogue are one segment, whatever the order of the rows."""
    tree = batch_of("abcdef", "ab", "abcd", "abcdef").tree()
    assert tree.segments.tolist() == [[0, 6, 6, 0, -1]]
    assert tree.row.tolist() == [1, 1, 2, 2, 0, 0]


def test_row_that_ends_at_a_branch() -> None:
    tree = batch_of("ab", "abx", "aby").tree()
    assert tree.segments.tolist() == [[0, 2, 4, 0, -1], [2, 3, 3, 2, 0], [3, 4, 4, 2, 0]]


def test_min_shared_is_judged_against_the_nearest_kept_branch() -> None:
    batch = batch_of("abcdx", "abcdy", "abe", "z")
    assert batch.tree(2).tokens == 8  # ab cd x y e z: two shared tokens at each branch
    tree = batch.tree(3)
    # The branch at 2 goes, so "abe" stands alone; the branch at 4 is then four tokens below the root, and
    # stays.
    assert tree.tokens == 4 + 2 + 3 + 1
    assert tree.class_of[0, :4].tolist() == tree.class_of[1, :4].tolist()
    assert set(tree.class_of[2, :3].tolist()).isdisjoint(tree.class_of[0, :5].tolist())
    assert batch.tree(4).tokens == tree.tokens
    assert batch.tree(5).tokens == 5 + 5 + 3 + 1
    # "abc" is kept, and "d" below it, too short a branch, is repeated in both of its subtrees.
    assert batch_of("abcdx", "abcdy", "abcz").tree(3).tokens == 3 + 2 + 2 + 1


def test_min_shared_ignores_rows_that_end_inside_another() -> None:
    assert batch_of("ab", "ab", "abcd").tree(100).tokens == 4
    # The end of "abc" is no branch: the one after "abcd" is judged from the root, and stays.
    assert batch_of("abc", "abcdx", "abcdy").tree(3).tokens == 6


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("min_shared", [0, 3])
def test_small_shapes(shape: tuple[int, int], min_shared: int) -> None:
    """A batch of equal tokens packs to one row; an empty one to nothing."""
    num_rows, num_positions = shape
    batch = Batch(np.zeros((*shape, 1), np.uint64), np.zeros(num_rows, int), np.full(num_rows, num_positions))
    tree = batch.tree(min_shared)
    check_structure(batch, tree)
    assert tree.tokens == (num_positions if num_rows else 0)
    assert tree.num_segments == tree.max_segment_depth == min(1, tree.tokens)


def test_all_dropped() -> None:
    batch = Batch(np.zeros((3, 4, 1), np.uint64), np.array([0, 2, 4]), np.array([0, 2, 4]))
    tree = batch.tree()
    assert (tree.class_of == -1).all()
    assert (tree.tokens, tree.num_segments, tree.max_segment_depth) == (0, 0, 0)
    check_structure(batch, tree)


@deterministic
@given(batches())
def test_memory_layout_does_not_matter(batch: Batch) -> None:
    strided = np.asfortranarray(batch.codes)
    assert_same(Batch(strided, batch.first, batch.end).tree(), batch.tree())
    if batch.codes.shape[2] == 1:
        assert_same(Batch(batch.codes[:, :, 0], batch.first, batch.end).tree(), batch.tree())


def test_many_nested_branches_need_no_recursion() -> None:
    """Row n leaves the others' path after n tokens: 1500 nested branches, beyond the recursion limit."""
    num_rows = 1500
    codes = np.eye(num_rows, dtype=np.uint64)
    tree = build_prefix_tree(codes, np.zeros(num_rows, int), np.arange(num_rows) + 1, min_shared=2)
    inner = set(tree.segments[:, 4].tolist()) - {-1}
    lengths = tree.segments[:, 1] - tree.segments[:, 0]
    assert inner
    assert min(lengths[m] for m in inner) >= 2


@pytest.mark.parametrize(
    ("first", "end"),
    [([-1], [2]), ([2], [1]), ([0], [4]), ([0, 0], [1, 1])],
    ids=["below 0", "crossed", "above S", "wrong N"],
)
def test_bad_ranges_are_refused(first: list[int], end: list[int]) -> None:
    with pytest.raises(ValueError, match="first"):
        build_prefix_tree(np.zeros((1, 3), np.uint64), np.array(first), np.array(end))


def test_float_codes_are_refused() -> None:
    with pytest.raises(TypeError, match="integers"):
        build_prefix_tree(np.zeros((1, 3)), np.array([0]), np.array([3]))


EXTREMES: dict[str, list[Any]] = {
    "bool": [False, True],
    **{
        f"{kind}{bits}": [np.iinfo(f"{kind}{bits}").min, np.iinfo(f"{kind}{bits}").max, 1, 2]
        + [-1, 0] * (kind == "int")
        for kind, bits in product(["int", "uint"], [8, 16, 32, 64])
    },
    **{f"float{bits}": [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan] for bits in [16, 32, 64]},
}


def bitwise(column: np.ndarray) -> np.ndarray:
    """A column with floats as their bits, so that Python finds -0.0 != 0.0 and a NaN equal to itself."""
    return column.view(f"u{column.itemsize}") if column.dtype.kind == "f" else column


def assert_injective(columns: list[np.ndarray]) -> np.ndarray:
    """Codes of two tokens are equal iff the tuples of their column values are."""
    codes = encode_columns(columns)
    num_rows, num_positions = columns[0].shape
    assert codes.dtype == np.uint64
    assert codes.shape[:2] == (num_rows, num_positions)
    assert codes.flags.c_contiguous
    values = list(zip(*(bitwise(column).ravel().tolist() for column in columns), strict=True))
    words = [tuple(code) for code in codes.reshape(num_rows * num_positions, -1).tolist()]
    assert len(set(values)) == len(set(words)) == len(set(zip(values, words, strict=True)))
    return codes


@st.composite
def column_lists(draw: st.DrawFn) -> list[np.ndarray]:
    """One to five columns of any dtype with extreme and nearby values, and any strides."""
    num_rows, num_positions = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    columns = []
    for name in draw(st.lists(st.sampled_from(sorted(EXTREMES)), min_size=1, max_size=5)):
        pool = draw(st.lists(st.sampled_from(EXTREMES[name]), min_size=1, max_size=4))
        picks = draw(st.lists(st.sampled_from(pool), min_size=num_rows * num_positions, max_size=None))
        column = np.array(picks[: num_rows * num_positions], dtype=name).reshape(num_rows, num_positions)
        match draw(st.sampled_from(["C", "F", "every second", "broadcast"])):
            case "F":
                column = np.asfortranarray(column)
            case "every second":
                column = np.repeat(column, 2, axis=1)[:, ::2]
            case "broadcast":
                column = np.broadcast_to(column[:1], column.shape)
        columns.append(column)
    return columns


@deterministic
@given(column_lists())
def test_codes_are_injective(columns: list[np.ndarray]) -> None:
    assert_injective(columns)


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_values_of_one_dtype(name: str) -> None:
    column = np.array([EXTREMES[name] * 2], dtype=name)
    codes = assert_injective([column])
    assert len(np.unique(codes)) == len(EXTREMES[name])


def test_every_combination_of_two_full_range_columns() -> None:
    """All pairs of extreme values: a code that loses carries or overlaps digits confuses some of them."""
    for name, other in product(["int64", "int32", "int8", "float32", "uint64"], repeat=2):
        pairs = list(product(EXTREMES[name], EXTREMES[other]))
        columns = [
            np.array([values], dtype=d)
            for values, d in zip(zip(*pairs, strict=True), [name, other], strict=True)
        ]
        assert_injective(columns)


def test_columns_share_a_word_up_to_its_last_bit() -> None:
    def column(bits: int, low: int = -5) -> np.ndarray:
        return np.array([[low, low + 2**bits - 1, low + 1, low + 2 ** (bits - 1)]])

    assert assert_injective([column(30), column(34)]).shape[2] == 1
    assert assert_injective([column(30), column(35)]).shape[2] == 2
    assert assert_injective([column(40), column(50), column(14), column(24)]).shape[2] == 2
    grid = np.stack(np.meshgrid(column(30)[0], column(34)[0]), axis=0)
    assert len(np.unique(assert_injective(list(grid)))) == 16


def test_columns_of_a_typical_batch_fill_one_word() -> None:
    rng = np.random.default_rng(0)
    shape = (16, 3000)  # more than one block of rows
    columns = [
        rng.integers(151_936, size=shape),
        np.broadcast_to(np.arange(shape[1]), shape),
        rng.integers(10, size=shape),
        rng.integers(2, size=shape, dtype=np.int64),
    ]
    assert assert_injective(columns).shape[2] == 1


def test_constant_or_missing_columns_give_one_word_of_zeros() -> None:
    constants = [np.full((2, 3), 7), np.full((2, 3), np.nan, dtype=np.float32), np.ones((2, 3), dtype=bool)]
    for codes in [encode_columns(constants), encode_columns([], shape=(2, 3))]:
        np.testing.assert_array_equal(codes, np.zeros((2, 3, 1), dtype=np.uint64))
    for shape in [(0, 3), (2, 0)]:
        assert encode_columns([np.zeros(shape, dtype=np.int64)]).shape == (*shape, 1)


def test_refused_columns() -> None:
    with pytest.raises(ValueError, match="shape"):
        encode_columns([])
    with pytest.raises(ValueError, match="shape"):
        encode_columns([np.zeros((2, 3)), np.zeros((2, 1))])
    with pytest.raises(ValueError, match="shape"):
        encode_columns([np.zeros(3)])
    for dtype in ["complex64", "object", ">i4", "longdouble"]:
        with pytest.raises(TypeError, match="key column"):
            encode_columns([np.zeros((2, 3), dtype=dtype)])


def test_columns_to_tree() -> None:
    """Two rows share tokens exactly while all their columns agree bitwise: here until -0.0 meets 0.0."""
    ids = np.array([[5, 6, 7, 8], [5, 6, 7, 8]])
    values = np.array([[np.nan, 1.0, 0.0, 2.0], [np.nan, 1.0, -0.0, 2.0]], dtype=np.float32)
    tree = build_prefix_tree(encode_columns([ids, values]), np.zeros(2, int), np.full(2, 4))
    np.testing.assert_array_equal(tree.class_of[:, :2], [[0, 1], [0, 1]])
    assert tree.tokens == 6
