"""Masks read as formulas: against the mask itself, by enumeration, and near misses with their reasons.

`check` traces a function that builds a mask, reads the graph, evaluates the formula in plain Python on fresh random
inputs (of another shape, where the trace is symbolic) and compares every `(n, q, k)` with what the function returns.
"""

import functools
import itertools
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from pgcompile.passes.affine import Affine, Part
from pgcompile.passes.mask_columns import emit_column
from pgcompile.passes.mask_expr import OPS, Const, Element, Index
from pgcompile.passes.mask_formula import (
    CAUSAL,
    conjoin,
    read_additive,
    read_allowed,
    require_causal,
)
from pgcompile.passes.mask_reader import MaskReader
from pgcompile.passes.reasons import Unsupported
from pgcompile.passes.trace import to_aten

MIN = torch.finfo(torch.float32).min
INF = float("inf")
both_modes = pytest.mark.parametrize("mode", ["fake", "symbolic"])


# ---------------------------------------------------------------------------------------------------------------------
# the oracle
# ---------------------------------------------------------------------------------------------------------------------


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def run_node(self, node):
        value = super().run_node(node)
        self.values[node] = value.clone() if isinstance(value, torch.Tensor) else value
        return value

    def record(self, *args):
        self.values = {}
        super().run(*args, enable_io_processing=False)
        return self.values


def index_at(dim, at):
    if not isinstance(dim, Part):
        return at[dim]
    index = dim.index.offset + sum(c * index_at(d, at) for d, c in dim.index.terms)
    return index % dim.divisor if dim.remainder else index // dim.divisor


def value_at(expr, at, values):
    """An expression at the indices `at`, as a tensor without dims: plain enumeration."""
    place = lambda affine: affine.offset + sum(c * index_at(d, at) for d, c in affine.terms)  # noqa: E731
    if isinstance(expr, Const):
        return torch.tensor(expr.value, dtype=expr.dtype)
    if isinstance(expr, Index):
        return torch.tensor(place(expr.index), dtype=expr.dtype)
    if isinstance(expr, Element):
        return values[expr.node][tuple(map(place, expr.indices))]
    args = [value_at(a, at, values) for a in expr.args]
    return args[0].to(expr.dtype) if expr.name == "to" else OPS[expr.name](*args)


def column_values(column, values, rows, length):
    return torch.stack(
        [torch.stack([value_at(column.expr, (n, s), values) for s in range(length)]) for n in range(rows)]
    )


def evaluate(formula, values, rows, length):
    """The formula as a dense `[N, 1, S, S]` condition."""
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    allowed = torch.ones(rows, 1, length, length, dtype=torch.bool)
    if formula.causal:
        allowed &= k <= q
    if formula.window is not None:
        allowed &= q - k < formula.window
    for column in formula.key_valid:
        allowed &= column_values(column, values, rows, length).bool()[:, None, None, :]
    for column in formula.same_value:
        c = column_values(column, values, rows, length)
        allowed &= (c[:, :, None] == c[:, None, :])[:, None]
    return allowed


def tokens(rows=3, length=7, seed=0):
    """A padding mask, segment numbers and positions, all integer `[N, S]`."""
    generator = torch.Generator().manual_seed(seed)
    padding = torch.randint(0, 2, (rows, length), generator=generator)
    segments = torch.randint(0, 3, (rows, length), generator=generator)
    positions = torch.randint(0, length, (rows, length), generator=generator)
    return padding, segments, positions


def trace(build, mode="fake", inputs=None):
    gm = make_fx(build, tracing_mode=mode, pre_dispatch=True)(*(inputs or tokens()))
    gm.graph.eliminate_dead_code()
    return gm


def output(gm):
    return next(n for n in gm.graph.nodes if n.op == "output").args[0]


def is_allowed(mask):
    return mask if mask.dtype == torch.bool else mask == 0


def read(build, mode="fake", inputs=None, **options):
    mask = output(trace(build, mode, inputs))
    reader = read_allowed if mask.meta["val"].dtype == torch.bool else read_additive
    return reader(mask, **options)


def check(build, words, mode="fake", inputs=tokens, negated=False, shapes=((3, 7), (5, 4)), **options):
    """The formula has these words and is the mask; returns it."""
    gm = trace(build, mode, inputs(*shapes[0]))
    mask = output(gm)
    reader = functools.partial(read_allowed, negated=negated)
    formula = (reader if mask.meta["val"].dtype == torch.bool else read_additive)(mask, **options)
    assert not isinstance(formula, Unsupported), formula
    assert formula.describe() == words
    for seed, (rows, length) in enumerate(shapes[:1] if mode == "fake" else shapes):
        given = inputs(rows, length, seed + 1)
        values = Recorder(gm).record(*given)
        expected = is_allowed(build(*given)) != negated
        assert_same(evaluate(formula, values, rows, length), expected, "lead" in options)
        check_emitted(gm, formula, given, rows, length)
    return formula


def assert_same(formula, mask, merged_heads=False):
    """A formula `[N, 1, S, S]` and a mask that broadcasts to all rows and heads."""
    if merged_heads and mask.dim() == 3 and mask.shape[0] > 1:
        mask = mask.unflatten(0, (formula.shape[0], -1))
    formula = formula.view(formula.shape[0], *[1] * (max(mask.dim(), 4) - 3), *formula.shape[2:])
    assert torch.equal(*torch.broadcast_tensors(formula, mask))


def check_emitted(gm, formula, given, rows, length):
    """`emit_column` computes what enumeration does."""
    columns = (*formula.key_valid, *formula.same_value)
    copied = fx.Graph()
    nodes = {}
    copied.output(copied.graph_copy(gm.graph, nodes))
    copied_gm = fx.GraphModule(gm, copied)
    like = next(n for n in copied.nodes if n.op == "placeholder")
    out = next(n for n in copied.nodes if n.op == "output")
    for column in columns:
        moved = replace(column, expr=_renamed(column.expr, nodes))
        with copied.inserting_before(out):
            emitted = emit_column(copied, moved, like)
        copied_gm.recompile()
        values = Recorder(copied_gm).record(*given)
        assert values[emitted].shape in ((rows, length), (1, length))
        assert emitted.meta["val"].dim() == 2 and emitted.meta["val"].dtype == values[emitted].dtype
        assert torch.equal(values[emitted].expand(rows, length), column_values(moved, values, rows, length))


def _renamed(expr, nodes):
    if isinstance(expr, Element):
        return replace(expr, node=nodes[expr.node])
    return replace(expr, args=tuple(_renamed(a, nodes) for a in expr.args)) if hasattr(expr, "args") else expr


def assert_refused(found, kind, part=""):
    assert isinstance(found, Unsupported), found
    assert found.kind == kind and part in found.explanation, found


def positions_of(x):
    return torch.arange(x.shape[1])


def causal(x):
    i = positions_of(x)
    return i[None, :] <= i[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# spellings that are understood
# ---------------------------------------------------------------------------------------------------------------------

BOOLEAN = {
    "le": (lambda p, s, x: causal(p), "causal"),
    "not gt": (lambda p, s, x: ~(positions_of(p) > positions_of(p)[:, None]), "causal"),
    "lt one more": (lambda p, s, x: positions_of(p) < positions_of(p)[:, None] + 1, "causal"),
    "shifted arange": (
        lambda p, s, x: torch.arange(5, p.shape[1] + 5) <= torch.arange(5, p.shape[1] + 5)[:, None],
        "causal",
    ),
    "doubled": (lambda p, s, x: positions_of(p) * 2 <= positions_of(p)[:, None] * 2 + 1, "causal"),
    "difference": (lambda p, s, x: positions_of(p)[:, None] - positions_of(p) >= 0, "causal"),
    "float arange": (
        lambda p, s, x: positions_of(p).float() <= positions_of(p).float().view(-1, 1),
        "causal",
    ),
    "tril of ones": (lambda p, s, x: torch.ones(p.shape[1], p.shape[1]).tril() == 1, "causal"),
    "tril bool": (
        lambda p, s, x: p.new_ones(p.shape[1], p.shape[1], dtype=torch.bool).tril()[None, None],
        "causal",
    ),
    "not triu": (lambda p, s, x: ~torch.ones(p.shape[1], p.shape[1], dtype=torch.bool).triu(1), "causal"),
    "rank 3 with size 1": (lambda p, s, x: causal(p)[None], "causal"),
    "true & causal": (
        lambda p, s, x: torch.ones((), dtype=torch.bool) & causal(p) & (positions_of(p) >= 0)[:, None],
        "causal",
    ),
    "causal or never": (lambda p, s, x: causal(p) | (positions_of(p) < 0), "causal"),
    "in place": (lambda p, s, x: causal(p).logical_and_(torch.ones((), dtype=torch.bool)), "causal"),
    "window": (
        lambda p, s, x: causal(p) & (positions_of(p) > positions_of(p)[:, None] - 3),
        "causal ∧ window(3)",
    ),
    "window ge": (
        lambda p, s, x: causal(p) & (positions_of(p) >= positions_of(p)[:, None] - 3),
        "causal ∧ window(4)",
    ),
    "window by triu": (
        lambda p, s, x: torch.ones(p.shape[1], p.shape[1]).tril().triu(-2).bool(),
        "causal ∧ window(3)",
    ),
    "narrower window": (
        lambda p, s, x: (
            causal(p)
            & (positions_of(p)[:, None] - positions_of(p) < 5)
            & ~(positions_of(p)[:, None] - positions_of(p) >= 2)
        ),
        "causal ∧ window(2)",
    ),
    "itself": (lambda p, s, x: positions_of(p) == positions_of(p)[:, None], "causal ∧ window(1)"),
    "padding": (lambda p, s, x: causal(p) & p.bool()[:, None, None, :], "causal ∧ key_padding(p_1)"),
    "padding by index": (
        lambda p, s, x: (
            causal(p)
            & p.bool()[torch.arange(p.shape[0])[:, None, None, None], positions_of(p)[None, None, None, :]]
        ),
        "causal ∧ key_padding(p_1)",
    ),
    "padding by any expression": (
        lambda p, s, x: causal(p) & ((p * 3 - s) % 2 == 1)[:, None, None].expand(-1, 1, p.shape[1], -1),
        "causal ∧ key_padding(p_1, s_1)",
    ),
    "either of two paddings": (
        lambda p, s, x: causal(p) & ((p > 0) | (s == 2))[:, None, None],
        "causal ∧ key_padding(p_1, s_1)",
    ),
    "padding of opaque": (
        lambda p, s, x: causal(p) & (p.cumsum(-1) > 1)[:, None, None],
        "causal ∧ key_padding(cumsum)",
    ),
    "padding from a slice": (
        lambda p, s, x: causal(p) & torch.nn.functional.pad(p, (2, 0))[:, 2:].bool()[:, None, None],
        "causal ∧ key_padding(pad)",
    ),
    "padding from a table": (
        lambda p, s, x: causal(p) & torch.cat([p[0], p[1]])[1 : p.shape[1] + 1].bool(),
        "causal ∧ key_padding(cat)",
    ),
    "padding by index, rows kept": (
        lambda p, s, x: causal(p) & p.bool()[:, positions_of(p)][:, None, None],
        "causal ∧ key_padding(p_1)",
    ),
    "padding by split indices": (
        lambda p, s, x: (
            causal(p)
            & p.bool()[:, None, :][torch.arange(p.shape[0])[:, None], :, positions_of(p)[None]].transpose(
                1, 2
            )[:, None]
        ),
        "causal ∧ key_padding(p_1)",
    ),
    "one condition for the batch": (lambda p, s, x: causal(p) & (p.sum() > 2), "causal ∧ key_padding(sum_1)"),
    "every second key": (
        lambda p, s, x: causal(p) & (positions_of(p) % 2 == 0),
        "causal ∧ key_padding(position)",
    ),
    "rows of their own": (
        lambda p, s, x: causal(p) & (p.sum(-1) >= 0)[:, None, None, None],
        "causal ∧ key_padding(sum_1)",
    ),
    "another row's padding": (
        lambda p, s, x: causal(p) & p.roll(1, 0).bool()[:, None, None],
        "causal ∧ key_padding(roll)",
    ),
    "documents": (
        lambda p, s, x: causal(p) & (s[:, None, :, None] == s[:, None, None, :]),
        "causal ∧ same_value(s_1)",
    ),
    "documents, not ne": (
        lambda p, s, x: causal(p) & ~(s[:, None, None] != s[:, None, :, None]),
        "causal ∧ same_value(s_1)",
    ),
    "two conditions": (
        lambda p, s, x: causal(p) & ((s > 0)[:, None, None] == (s > 0)[:, None, :, None]),
        "causal ∧ same_value(s_1)",
    ),
    "chunks": (
        lambda p, s, x: causal(p) & (positions_of(p) // 3 == positions_of(p)[:, None] // 3),
        "causal ∧ same_value(position)",
    ),
    "chunks after padding": (
        lambda p, s, x: (
            causal(p)
            & ((positions_of(p) - s[:, 0, None]) // 3)[:, None, None].eq(
                ((positions_of(p) - s[:, 0, None]) // 3)[:, None, :, None]
            )
        ),
        "causal ∧ same_value(s_1)",
    ),
    "all": (
        lambda p, s, x: (
            (causal(p) & (positions_of(p) > positions_of(p)[:, None] - 4))[None, None]
            & p.bool()[:, None, None]
            & (x[:, None, None] == x[:, None, :, None])
        ),
        "causal ∧ window(4) ∧ key_padding(p_1) ∧ same_value(x_1)",
    ),
    "where": (
        lambda p, s, x: torch.where(causal(p), p.bool()[:, None, None], False),
        "causal ∧ key_padding(p_1)",
    ),
    "masked_fill": (
        lambda p, s, x: causal(p).masked_fill(p[:, None, None] == 0, False),
        "causal ∧ key_padding(p_1)",
    ),
    "product of integers": (
        lambda p, s, x: (causal(p).long() * p.bool()[:, None, None].long()).bool(),
        "causal ∧ key_padding(p_1)",
    ),
    "views": (
        lambda p, s, x: (
            causal(p).t().transpose(0, 1).unsqueeze(0).squeeze(0).reshape(1, 1, p.shape[1], p.shape[1])
            & p.view(p.shape[0], 1, 1, p.shape[1]).permute(0, 2, 1, 3).bool().expand(-1, -1, p.shape[1], -1)
        ),
        "causal ∧ key_padding(p_1)",
    ),
}


@both_modes
@pytest.mark.parametrize("name", BOOLEAN)
def test_boolean_masks_are_read(name, mode):
    check(*BOOLEAN[name], mode)


@both_modes
def test_negated_masks_are_read(mode):
    future = lambda p, s, x: ~causal(p) | (p == 0)[:, None, None]  # noqa: E731
    check(future, "causal ∧ key_padding(p_1)", mode, negated=True)


def allowed(p):
    return causal(p) & p.bool()[:, None, None]


ADDITIVE = {
    "where": (lambda p, s, x: torch.where(allowed(p), 0.0, MIN), "causal ∧ key_padding(p_1)", False),
    "where tensors": (
        lambda p, s, x: torch.where(allowed(p), torch.tensor(0.0), torch.tensor(-INF)),
        "causal ∧ key_padding(p_1)",
        True,
    ),
    "masked_fill": (
        lambda p, s, x: torch.zeros(p.shape[1], p.shape[1]).masked_fill(~causal(p), -INF),
        "causal",
        True,
    ),
    "one minus": (lambda p, s, x: (1.0 - allowed(p).float()) * MIN, "causal ∧ key_padding(p_1)", False),
    "triu of full": (
        lambda p, s, x: torch.triu(torch.full((p.shape[1], p.shape[1]), -INF), 1),
        "causal",
        True,
    ),
    "triu times later": (
        lambda p, s, x: (
            torch.full((p.shape[1], p.shape[1]), MIN).triu(1).mul_(positions_of(p) > positions_of(p)[:, None])
        ),
        "causal",
        False,
    ),
    "sum": (
        lambda p, s, x: (
            torch.full((p.shape[1], p.shape[1]), -INF).triu(1) + torch.where(p > 0, 0.0, -INF)[:, None, None]
        ),
        "causal ∧ key_padding(p_1)",
        True,
    ),
    "sum that overflows": (
        lambda p, s, x: (1.0 - causal(p).float()) * MIN + (1.0 - p.bool().float())[:, None, None] * MIN,
        "causal ∧ key_padding(p_1)",
        False,
    ),
    "inverted fill": (
        lambda p, s, x: (
            (1.0 - p.float()).masked_fill((1.0 - p.float()).bool(), MIN)[:, None, None]
            + torch.where(causal(p), 0.0, MIN)
        ),
        "causal ∧ key_padding(p_1)",
        False,
    ),
    "what is zero stays": (
        lambda p, s, x: (
            torch.where(p.float() == 0, p.float(), MIN)[:, None, None] + torch.where(causal(p), 0.0, MIN)
        ),
        "causal ∧ key_padding(p_1)",
        False,
    ),
    "bfloat16": (
        lambda p, s, x: torch.where(
            allowed(p), torch.zeros((), dtype=torch.bfloat16), torch.finfo(torch.bfloat16).min
        ),
        "causal ∧ key_padding(p_1)",
        False,
    ),
    "bfloat16 min in float32": (
        lambda p, s, x: torch.where(
            allowed(p), torch.zeros((), dtype=torch.bfloat16), torch.finfo(torch.bfloat16).min
        ).float(),
        "causal ∧ key_padding(p_1)",
        False,
    ),
    "float32 min rounds to -inf": (
        lambda p, s, x: torch.where(causal(p), 0.0, MIN).bfloat16(),
        "causal",
        True,
    ),
}


@both_modes
@pytest.mark.parametrize("name", ADDITIVE)
def test_additive_masks_are_read(name, mode):
    build, words, minus_inf = ADDITIVE[name]
    assert check(build, words, mode).minus_inf is minus_inf


@both_modes
def test_parts_of_a_mask_need_not_be_causal(mode):
    padding = lambda p, s, x: p.bool()[:, None, None, :]  # noqa: E731
    part = check(padding, "key_padding(p_1)", mode, alone=False)
    assert_refused(read(padding, mode), "not_causal")
    assert_refused(require_causal(conjoin(part), None), "not_causal")
    whole = conjoin(CAUSAL, part, replace(CAUSAL, window=4, depth=1e38), replace(CAUSAL, window=2))
    assert whole.describe() == "causal ∧ window(2) ∧ key_padding(p_1)" and not whole.minus_inf
    assert require_causal(whole, None) is whole


@pytest.mark.parametrize("rows, length", [(1, 6), (6, 6), (4, 4)])
def test_sizes_have_no_meaning(rows, length):
    """N = S = H, and N = 1."""
    build = lambda p, s, x: (  # noqa: E731
        causal(p)[None, None].expand(p.shape[0], 1, -1, -1)
        & p.bool()[:, None, None]
        & (s[:, None, None] == s[:, None, :, None])
    )
    formula = read(build, inputs=tokens(rows, length))
    assert formula.describe() == "causal ∧ key_padding(p_1) ∧ same_value(s_1)"
    transposed = lambda p, s, x: causal(p) & p.t().bool()[:, None, None]  # noqa: E731
    if rows == length:
        given = tokens(rows, length, 1)
        gm = trace(transposed, inputs=given)
        found = read_allowed(output(gm))
        values = Recorder(gm).record(*given)
        assert torch.equal(evaluate(found, values, rows, length), transposed(*given))
        check_emitted(gm, found, given, rows, length)


# ---------------------------------------------------------------------------------------------------------------------
# views that merge and split dims
# ---------------------------------------------------------------------------------------------------------------------


def merged(p, heads=4):
    """Padding as `[N·H, 1, S]`, as nn.MultiheadAttention spells it."""
    rows, length = p.shape
    return p.bool().view(rows, 1, 1, length).expand(-1, heads, -1, -1).reshape(rows * heads, 1, length)


def split(mask, p, heads=4):
    return mask.view(p.shape[0], heads, -1, p.shape[1])


VIEWS = {
    "expand": lambda p, s, x: split(causal(p)[None] & merged(p), p),
    "one head": lambda p, s, x: split(causal(p)[None] & merged(p, 1), p, 1),
    "repeat": lambda p, s, x: split(causal(p) & p.bool()[:, None].repeat(1, 4, 1).view(-1, 1, p.shape[1]), p),
    "repeat_interleave": lambda p, s, x: split((causal(p) & p.bool()[:, None]).repeat_interleave(4, 0), p),
    "repeat_interleave from the end": lambda p, s, x: (
        causal(p) & p.bool()[:, None, None].expand(-1, 2, -1, -1).repeat_interleave(2, -3)
    ),
    "flatten": lambda p, s, x: (
        (causal(p) & p.bool()[:, None, None].expand(-1, 4, -1, -1)).flatten(0, 1).unflatten(0, (-1, 4))
    ),
    "grouped heads": lambda p, s, x: split(
        (causal(p) & p.bool()[:, None, None, None].expand(-1, 2, 3, -1, -1)).reshape(
            -1, p.shape[1], p.shape[1]
        ),
        p,
        6,
    ),
    "other groups": lambda p, s, x: (
        causal(p)
        & split(merged(p, 12).view(p.shape[0] * 4, 3, -1).flatten(0, 1).view(-1, 6, 1, p.shape[1]), p, 12)
    ),
    "chosen while merged": lambda p, s, x: (
        causal(p) & split(split(merged(p, 8), p, 8)[:, 2:6].flatten(0, 1), p)
    ),
    "heads in front": lambda p, s, x: (
        causal(p)
        & p.bool()[None, :, None].expand(4, -1, 1, -1).flatten(0, 1).unflatten(0, (4, -1)).transpose(0, 1)
    ),
    "keys from pairs": lambda p, s, x: (
        causal(p) & torch.stack([p, p], 2).flatten(1).view(p.shape[0], -1, 2)[:, :, 1][:, None, None].bool()
    ),
    "rank 5": lambda p, s, x: causal(p) & p.bool()[:, None, None, None],
    "rank 5 with heads": lambda p, s, x: causal(p) & p.bool()[:, None, None, None].expand(-1, 2, 3, -1, -1),
}


@both_modes
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_followed(name, mode):
    leaf = "stack" if name == "keys from pairs" else "p_1"
    if (name, mode) == ("heads in front", "symbolic"):  # the inner dim that was merged has no number
        assert_refused(read(VIEWS[name], mode), UNCLEAR, "heads")
    else:
        check(VIEWS[name], f"causal ∧ key_padding({leaf})", mode)


def test_parts_of_an_index_are_emitted():
    """Every second row's and every second key's padding, for both."""
    pairs = lambda p: p.view(-1, 2, p.shape[1] // 2, 2)[:, 0, :, 1].bool()  # noqa: E731
    twice = lambda p: pairs(p)[:, None, :, None].expand(-1, 2, -1, 2).reshape(p.shape)  # noqa: E731
    padding = lambda p, s, x: causal(p) & twice(p)[:, None, None]  # noqa: E731
    check(padding, "causal ∧ key_padding(p_1)", shapes=[(4, 6)])
    repeated = lambda p, s, x: causal(p) & p[:2, :3].bool().repeat(2, 2)[:, None, None]  # noqa: E731
    check(repeated, "causal ∧ key_padding(p_1)", shapes=[(4, 6)])
    chunk = lambda p: torch.arange(p.shape[1] // 3)[:, None].expand(-1, 3).flatten()  # noqa: E731
    check(
        lambda p, s, x: causal(p) & (chunk(p) == chunk(p)[:, None]),
        "causal ∧ same_value(position)",
        shapes=[(2, 6)],
    )


def test_parts_are_simplified_by_sizes():
    n, h, m = map(Affine.dim, (0, 1, 2))
    row, head = m.part(4, False, {}), m.part(4, True, {})
    assert (
        (row * 4 + head).dims == {2}
        and head.part(4, True, {}) == head
        and head.part(8, False, {}) == Affine()
    )
    assert row.substitute({2: n * 4 + h}, {1: 4}) == n and head.substitute({2: n * 4 + h}, {1: 4}) == h
    assert row.substitute({2: n * 4 + h}, {1: 5}).dims == {0, 1}
    assert row.substitute({2: n * 4 + h}).dims == {0, 1}
    assert row.substitute({2: m + Affine((), 8)}) == row + Affine((), 2)
    assert head.substitute({2: Affine((), 7)}) == Affine((), 3)
    assert (n * 2 + h * 3).substitute({0: row * 2, 1: head}).terms == (row * 4 + head * 3).terms
    assert (n * 2 + h).substitute({0: row * 2, 1: head}) == m
    assert (n * 8 + m).part(4, False, {}).substitute({0: n, 2: h}, {1: 8}).part(2, False, {1: 8}) == n


MERGED = {
    "expand": lambda p, s, x: causal(p) & merged(p),
    "additive": lambda p, s, x: torch.where(merged(p), 0.0, -INF) + torch.where(causal(p), 0.0, -INF)[None],
    "repeat_interleave": lambda p, s, x: (causal(p) & p.bool()[:, None]).repeat_interleave(4, 0),
    "repeat": lambda p, s, x: causal(p) & p.bool()[:, None].repeat(1, 4, 1).view(-1, 1, p.shape[1]),
}


@both_modes
@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("rows, length", [(3, 7), (4, 4), (1, 4), (1, 6)])
def test_rows_and_heads_in_one_dim(name, rows, length, mode):
    check(MERGED[name], "causal ∧ key_padding(p_1)", mode, shapes=[(rows, length)], lead=[("N", 4)])


@both_modes
def test_masks_that_broadcast_over_rows_and_heads(mode):
    check(lambda p, s, x: causal(p), "causal", mode, lead=[("N", 4)])
    check(lambda p, s, x: causal(p)[None], "causal", mode, lead=[("N", 4)])
    check(lambda p, s, x: causal(p) & p.bool()[:, None], "causal ∧ key_padding(p_1)", mode, lead=[("N",)])
    same = lambda p, s, x: causal(p) & (s[:, None] == s[:, :, None]).repeat_interleave(4, 0)  # noqa: E731
    check(same, "causal ∧ same_value(s_1)", mode, lead=[("N", 4)])


HEADS_DIFFER = {
    "repeat": lambda p, s, x: causal(p) & p.bool()[:, None].repeat(4, 1, 1),
    "heads outermost": lambda p, s, x: (
        causal(p) & p.bool()[None].expand(4, -1, -1).reshape(-1, 1, p.shape[1])
    ),
    "each its own": lambda p, s, x: causal(p) & torch.stack([p] * 4, 1).flatten(0, 1)[:, None].bool(),
    "fewer heads": lambda p, s, x: causal(p) & p.bool().repeat_interleave(2, 0).repeat(2, 1)[:, None],
    "more copies": lambda p, s, x: causal(p) & p.bool().repeat_interleave(8, 0)[: p.shape[0] * 4, None],
    "by head": lambda p, s, x: (
        causal(p) & (merged(p) & (torch.arange(4) > 1).repeat(p.shape[0])[:, None, None])
    ),
    "by position": lambda p, s, x: causal(p) & (torch.arange(p.shape[0] * 4) > 3)[:, None, None],
}


@both_modes
@pytest.mark.parametrize("name", HEADS_DIFFER)
@pytest.mark.parametrize("rows", [3, 4])
def test_merged_masks_that_differ_between_heads_are_refused(name, rows, mode):
    build = HEADS_DIFFER[name]
    assert_refused(read(build, mode, tokens(rows), lead=[("N", 4)]), UNCLEAR, "heads")
    assert_refused(read(lambda p, s, x: split(build(p, s, x), p), mode, tokens(rows)), UNCLEAR, "heads")


@both_modes
def test_grouped_heads_that_differ_are_refused(mode):
    group, member = (lambda: torch.arange(3)[:, None, None, None]), (lambda: torch.arange(3)[:, None, None])
    by = lambda condition: lambda p, s, x: causal(p) & p.bool()[:, None, None, None] & condition()  # noqa: E731
    for condition in (lambda: group() > 1, lambda: member() > 1, lambda: group() <= member()):
        assert_refused(read(by(condition), mode), UNCLEAR, "heads")
    assert_refused(read(lambda p, s, x: causal(p)[None, None], mode, lead=[("N", 2)]), UNCLEAR, "rank 4")


def test_data_of_rank_5_is_refused():
    assert_refused(read(lambda b, m, p: m[:, None], inputs=masks()), UNCLEAR, "a mask that is data")
    assert_refused(
        read(lambda b, m, p: torch.where(m, 0.0, -INF)[:, None], inputs=masks()),
        UNCLEAR,
        "a mask that is data",
    )


def test_bits_read_as_another_type_are_values():
    view = lambda p, s, x: causal(p) & (p.view(torch.float64) != 0)[:, None, None]  # noqa: E731
    check(view, "causal ∧ key_padding(view)")


def test_merged_positions_are_no_steps_of_one():
    """`s + s // 2` has jumps."""
    position = lambda x: positions_of(x) + torch.arange(3)[:, None].expand(-1, 2).flatten()  # noqa: E731
    build = lambda x: causal(x) & within(segments_of(position(x)[None].expand(x.shape[0], -1)))  # noqa: E731
    check(build, "causal ∧ same_value(cumsum)", inputs=packed_positions, shapes=[(3, 6)])


@pytest.mark.parametrize("seed", range(40))
def test_random_views_are_followed(seed):
    """Every element, through five views of one tensor."""
    random = Random(seed)

    def view(x):
        kind, dim = random.randrange(6), random.randrange(x.dim())
        if kind == 0:
            return x.permute(random.sample(range(x.dim()), x.dim()))
        if kind == 1 and x.numel() < 200:
            return x.unsqueeze(dim).expand(*x.shape[:dim], 2, *x.shape[dim:])
        if kind == 2 and x.shape[dim] > 3:
            return x[(slice(None),) * dim + (slice(1, x.shape[dim] - 1),)]
        if kind == 3 and x.numel() < 200:
            return x.repeat([random.choice((1, 2)) for _ in x.shape])
        if kind == 4 and x.numel() < 200:
            return x.repeat_interleave(2, dim)
        rest, sizes = x.numel(), []
        while rest > 1 and len(sizes) < 3:
            sizes.append(random.choice([d for d in range(1, rest + 1) if rest % d == 0]))
            rest //= sizes[-1]
        return x.reshape(*sizes, rest)

    def build(x):
        for _ in range(5):
            x = view(x)
        return x

    gm = trace(build, inputs=(torch.arange(24).view(3, 4, 2),))
    values = Recorder(gm).record(torch.arange(24).view(3, 4, 2))
    result = values[output(gm)]
    expr = MaskReader(gm.graph).read(output(gm)).expr
    for at in itertools.product(*map(range, result.shape)):
        assert value_at(expr, at, values) == result[at]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "heads, dynamic, shapes",
    [
        (4, False, [(3, 7)]),
        (4, False, [(4, 4), (1, 4), (1, 6)]),
        (1, False, [(3, 7), (1, 5)]),
        (4, True, [(3, 7), (5, 9)]),
        (1, True, [(3, 7)]),
    ],
)
def test_multihead_attention(weights, batch_first, heads, dynamic, shapes):
    attention = torch.nn.MultiheadAttention(16, heads, batch_first=batch_first)
    places = {torch.ops.aten.scaled_dot_product_attention.default: 3, torch.ops.aten.baddbmm.default: 0}
    found = []

    def module(x, padding):
        future = torch.ones(padding.shape[1], padding.shape[1], dtype=torch.bool).triu(1)
        given = dict(attn_mask=future, need_weights=weights)
        return attention(x, x, x, key_padding_mask=padding == 0, **given)[0] + attention(x, x, x, **given)[0]

    def backend(gm, _):
        traced = to_aten(gm)
        both = [n.args[places[n.target]] for n in traced.graph.nodes if n.target in places]

        def run(*args):
            found.append((both, Recorder(traced).record(*args)))
            return gm(*args)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, dynamic=dynamic)
    for n, s in shapes:
        compiled(torch.randn(*((n, s) if batch_first else (s, n)), 16), tokens(n, s)[0])
    for (both, values), (n, s) in zip(found, shapes, strict=True):
        for mask, words in zip(both, ("causal ∧ key_padding(padding)", "causal"), strict=True):
            formula = read_additive(mask, lead=[("N", heads)] if weights else None)
            assert not isinstance(formula, Unsupported), formula
            assert formula.describe() == words and formula.minus_inf
            assert_same(evaluate(formula, values, n, s), is_allowed(values[mask]), weights)


# ---------------------------------------------------------------------------------------------------------------------
# near misses
# ---------------------------------------------------------------------------------------------------------------------

UNCLEAR = "mask_not_understood"
REFUSED = {
    "strictly before": (lambda p, s, x: positions_of(p) < positions_of(p)[:, None], UNCLEAR, "not to itself"),
    "tril -1": (lambda p, s, x: torch.ones(p.shape[1], p.shape[1]).tril(-1).bool(), UNCLEAR, "not to itself"),
    "one ahead": (lambda p, s, x: positions_of(p) <= positions_of(p)[:, None] + 1, "not_causal", ""),
    "tril 1": (lambda p, s, x: torch.ones(p.shape[1], p.shape[1]).tril(1).bool(), "not_causal", ""),
    "everything": (lambda p, s, x: torch.ones(p.shape[1], p.shape[1], dtype=torch.bool), "not_causal", ""),
    "nothing": (lambda p, s, x: causal(p) & torch.zeros((), dtype=torch.bool), UNCLEAR, "masks everything"),
    "padding only": (lambda p, s, x: p.bool()[:, None, None], "not_causal", ""),
    "documents only": (lambda p, s, x: s[:, None, None] == s[:, None, :, None], "not_causal", ""),
    "key and query swapped": (lambda p, s, x: causal(p).t(), "not_causal", ""),
    "later only": (lambda p, s, x: positions_of(p) > positions_of(p)[:, None], UNCLEAR, "after it"),
    "window of none": (lambda p, s, x: causal(p) & (positions_of(p) > positions_of(p)[:, None]), UNCLEAR, ""),
    "window without causal": (
        lambda p, s, x: positions_of(p) > positions_of(p)[:, None] - 3,
        "not_causal",
        "",
    ),
    "symbolic window": (
        lambda p, s, x: causal(p) & (positions_of(p) > positions_of(p)[:, None] - s[0, 0]),
        UNCLEAR,
        "",
    ),
    "causal or padding": (lambda p, s, x: causal(p) | p.bool()[:, None, None], UNCLEAR, ""),
    "causal or window": (lambda p, s, x: causal(p) | (positions_of(p) < 2), UNCLEAR, ""),
    "prefix language model": (
        lambda p, s, x: causal(p) | (s[:, None, None] == s[:, None, :, None]),
        UNCLEAR,
        "",
    ),
    "query mask": (lambda p, s, x: causal(p) & p.bool()[:, None, :, None], UNCLEAR, "whole queries"),
    "query mask by index": (
        lambda p, s, x: causal(p) & (positions_of(p) > 1)[:, None],
        UNCLEAR,
        "whole queries",
    ),
    "by values": (lambda p, s, x: x[:, None, None] <= x[:, None, :, None], UNCLEAR, ""),
    "by values and index": (lambda p, s, x: positions_of(p) <= x[:, None, :, None], UNCLEAR, ""),
    "doubled key": (lambda p, s, x: positions_of(p) * 2 <= positions_of(p)[:, None], UNCLEAR, ""),
    "not itself": (lambda p, s, x: causal(p) & (positions_of(p) != positions_of(p)[:, None]), UNCLEAR, ""),
    "same value of two columns": (
        lambda p, s, x: causal(p) & (s[:, None, None] == x[:, None, :, None]),
        UNCLEAR,
        "",
    ),
    "same value of the next row": (
        lambda p, s, x: causal(p) & (s.roll(1, 0)[:, None, None] == s[:, None, :, None]),
        UNCLEAR,
        "",
    ),
    "same value of the next token": (
        lambda p, s, x: (
            causal(p)
            & (
                torch.cat([s, s], 1)[:, 1 : s.shape[1] + 1][:, None, None]
                == torch.cat([s, s], 1)[:, None, : s.shape[1], None]
            )
        ),
        UNCLEAR,
        "",
    ),
    "other value": (lambda p, s, x: causal(p) & (s[:, None, None] != s[:, None, :, None]), UNCLEAR, ""),
    "same float": (
        lambda p, s, x: causal(p) & (s.float()[:, None, None] == s.float()[:, None, :, None]),
        UNCLEAR,
        "",
    ),
    "by head": (lambda p, s, x: causal(p) & (torch.arange(4) > 1)[:, None, None], UNCLEAR, "heads"),
    "window by head": (
        lambda p, s, x: positions_of(p) > positions_of(p)[:, None] - torch.arange(4)[:, None, None],
        UNCLEAR,
        "heads",
    ),
    "rows where heads are": (lambda p, s, x: causal(p) & p.bool()[:, None, :], UNCLEAR, "heads"),
    "rounded index": (
        lambda p, s, x: positions_of(p).bfloat16() <= positions_of(p).bfloat16()[:, None],
        UNCLEAR,
        "",
    ),
    "rounded by an offset": (
        lambda p, s, x: positions_of(p).float() + 1e8 <= positions_of(p).float()[:, None] + 1e8,
        UNCLEAR,
        "",
    ),
    "rounded by a start": (
        lambda p, s, x: torch.arange(10**8, p.shape[1] + 10**8).float() <= positions_of(p)[:, None] + 1e8,
        UNCLEAR,
        "",
    ),
    "rank 1": (lambda p, s, x: positions_of(p) >= 0, UNCLEAR, "rank 1"),
    "integers": (lambda p, s, x: causal(p).long(), UNCLEAR, "int64"),
    "-10000": (lambda p, s, x: (1.0 - causal(p).float()) * -10000.0, "finite_mask", "-10000"),
    "-1e9": (lambda p, s, x: torch.where(causal(p), 0.0, -1e9), "finite_mask", ""),
    "0 * -inf": (lambda p, s, x: (1.0 - causal(p).float()) * -INF, "finite_mask", "nan"),
    "ones": (lambda p, s, x: torch.where(causal(p), 1.0, MIN), "finite_mask", "1.0"),
    "another dtype's min": (
        lambda p, s, x: torch.where(causal(p), 0.0, torch.finfo(torch.float16).min),
        "finite_mask",
        "",
    ),
    "additive without causal": (
        lambda p, s, x: torch.where(p > 0, 0.0, -INF)[:, None, None],
        "not_causal",
        "",
    ),
    "reversed additive": (lambda p, s, x: torch.where(causal(p), -INF, 0.0), UNCLEAR, ""),
    "alibi": (
        lambda p, s, x: (
            torch.where(causal(p), 0.0, -INF) + (positions_of(p) - positions_of(p)[:, None]) * 0.5
        ),
        UNCLEAR,
        "query and key",
    ),
    "alibi by head": (
        lambda p, s, x: torch.where(causal(p), 0.0, -INF) + positions_of(p) * torch.rand(4)[:, None, None],
        UNCLEAR,
        "heads",
    ),
    "alibi by values": (
        lambda p, s, x: torch.where(causal(p), 0.0, -INF) + (x[:, None, None] - x[:, None, :, None]) * 0.5,
        UNCLEAR,
        "",
    ),
}


@both_modes
@pytest.mark.parametrize("name", REFUSED)
def test_near_misses_are_refused(name, mode):
    build, kind, part = REFUSED[name]
    found = read(build, mode)
    assert_refused(found, kind, part)
    assert found.node is not None


def written_view(p, s, x):
    mask = causal(p)[None].clone()
    view = mask[0]
    view.fill_(True)
    return mask


def written_between(p, s, x):
    scores = torch.zeros(p.shape[1], p.shape[1])
    row = scores[:, :]
    scores.masked_fill_(~causal(p), -INF)
    return row * 1.0


@both_modes
@pytest.mark.parametrize("build", [written_view, written_between])
def test_views_that_are_written_are_refused(build, mode):
    assert_refused(read(build, mode), UNCLEAR, "in place")


def test_a_leaf_that_is_written_later_is_refused():
    def build(p, s, x):
        q = p * 1
        column = q.cumsum(1)
        mask = causal(p) & (column > 2)[:, None, None]
        column.add_(1)
        return mask, column

    mask = output(trace(build))[0]
    assert_refused(read_allowed(mask), UNCLEAR, "in place")


# ---------------------------------------------------------------------------------------------------------------------
# masks that are data
# ---------------------------------------------------------------------------------------------------------------------


def masks(rows=3, length=7, seed=0):
    """A tril buffer, a caller's 4-D mask and padding."""
    tril = torch.ones(1, 1, 16, 16).tril()
    return tril, torch.ones(rows, 1, length, length).tril() > 0, tokens(rows, length, seed)[0]


DATA = {
    "caller's": (lambda b, m, p: m, {}),
    "caller's and padding": (lambda b, m, p: m & p.bool()[:, None, None], {}),
    "caller's and causal": (lambda b, m, p: m & causal(p), {}),
    "caller's or padding": (lambda b, m, p: m | p.bool()[:, None, None], {}),
    "caller's 3-D": (lambda b, m, p: m[:, 0][:, None], {}),
    "caller's 2-D": (lambda b, m, p: m[0, 0], {}),
    "buffer": (lambda b, m, p: b[:, :, : p.shape[1], : p.shape[1]].bool(), {}),
    "buffer == 1": (lambda b, m, p: b[:, :, : p.shape[1], : p.shape[1]] == 1, {}),
    "cumsum of rank 4": (lambda b, m, p: m.cumsum(-1) > 0, {}),
    "additive": (lambda b, m, p: torch.where(m, 0.0, MIN), {"data_additive": True}),
    "additive as given": (lambda b, m, p: b[:, :, : p.shape[1], : p.shape[1]] * 1.0, {"data_additive": True}),
    "additive and padding": (
        lambda b, m, p: torch.where(m, 0.0, MIN) + torch.where(p > 0, 0.0, MIN)[:, None, None],
        {"data_additive": True},
    ),
    "additive per key": (lambda b, m, p: ((1.0 - p.float()) * MIN)[:, None, None], {"data_additive": True}),
}


@pytest.mark.parametrize("name", DATA)
def test_masks_that_are_data(name):
    build, fields = DATA[name]
    mask = output(trace(build, inputs=masks()))
    found = (read_allowed if mask.meta["val"].dtype == torch.bool else read_additive)(mask)
    assert not isinstance(found, Unsupported), found
    assert found.data is mask and found.leaves == (mask,)
    assert {f: getattr(found, f) for f in ("data_additive", "data_negated")} == {
        "data_additive": False,
        "data_negated": False,
    } | fields
    assert not found.causal and not found.key_valid


def test_negated_data_and_two_data_masks():
    gm = trace(lambda b, m, p: (b[:, :, : p.shape[1], : p.shape[1]] == 0, m), inputs=masks())
    first, second = output(gm)
    formula = read_allowed(first, negated=True)
    assert formula.data is first and formula.data_negated
    assert conjoin(formula, CAUSAL).data is first and conjoin(formula, formula) == formula
    assert_refused(conjoin(formula, read_allowed(second)), UNCLEAR, "two masks")


def test_data_by_head_and_finite_data_are_refused():
    heads = lambda b, m, p: m.expand(-1, 4, -1, -1).clone() & (torch.rand(4) > 0.5)[:, None, None]  # noqa: E731
    assert_refused(read(heads, inputs=masks()), UNCLEAR, "heads")
    finite = lambda b, m, p: torch.where(m, 0.0, -1e4)  # noqa: E731
    assert_refused(read(finite, inputs=masks()), "finite_mask")


# ---------------------------------------------------------------------------------------------------------------------
# packed sequences by position ids
# ---------------------------------------------------------------------------------------------------------------------


def packed_positions(rows=3, length=7, seed=0):
    """Positions that restart, as a trainer packs documents into rows; and arbitrary ones in the last row."""
    restart = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    index = torch.arange(length).expand(rows, -1)
    start = torch.where(restart, index, 0).cummax(1).values
    positions = index - start
    positions[-1] = torch.randint(0, 3, (length,), generator=torch.Generator().manual_seed(seed))
    return (positions,)


def segments_of(x, prepend=1, by=1):
    return (torch.diff(x, prepend=x[:, :1] - prepend, dim=-1) != by).cumsum(-1)


def within(c):
    return c[:, None, None] == c[:, None, :, None]


PACKED = {
    "causal": (
        lambda x: within(segments_of(x)) & (x[:, None, None] <= x[:, None, :, None]),
        "causal ∧ same_value(cumsum)",
    ),
    "window": (
        lambda x: (
            within(segments_of(x))
            & (x[:, None, None] <= x[:, None, :, None])
            & (x[:, None, None] > x[:, None, :, None] - 2)
        ),
        "causal ∧ window(2) ∧ same_value(cumsum)",
    ),
    "indices": (
        lambda x: within(segments_of(positions_of(x)[None].expand(x.shape[0], -1))) & causal(x),
        "causal",
    ),
}


@both_modes
@pytest.mark.parametrize("name", PACKED)
def test_positions_within_a_segment_are_indices(name, mode):
    build, words = PACKED[name]
    check(build, words, mode, inputs=packed_positions)


NOT_PACKED = {
    "no segments": lambda x: x[:, None, None] <= x[:, None, :, None],
    "other segments": lambda x: within(segments_of(x + 0, by=2)) & (x[:, None, None] <= x[:, None, :, None]),
    "other start": lambda x: within(segments_of(x, prepend=2)) & (x[:, None, None] <= x[:, None, :, None]),
    "segments of other positions": lambda x: (
        within(segments_of(x * 2)) & (x[:, None, None] <= x[:, None, :, None])
    ),
    "segments down the rows": lambda x: (
        within((torch.diff(x, prepend=x[:1] - 1, dim=0) != 1).cumsum(0))
        & (x[:, None, None] <= x[:, None, :, None])
    ),
    "segment numbers that wrap": lambda x: (
        within((torch.diff(x, prepend=x[:, :1] - 1, dim=-1) != 1).cumsum(-1, dtype=torch.int8))
        & (x[:, None, None] <= x[:, None, :, None])
    ),
    "position against index": lambda x: within(segments_of(x)) & (positions_of(x) <= x[:, None, :, None]),
    "sums of positions": lambda x: within(segments_of(x)) & (x[:, None, None] + x[:, None, :, None] <= 9),
}


@both_modes
@pytest.mark.parametrize("name", NOT_PACKED)
def test_positions_elsewhere_are_values(name, mode):
    assert_refused(read(NOT_PACKED[name], mode, packed_positions()), UNCLEAR)


def test_segments_of_floats_are_values():
    def build(x):
        return within(segments_of(x.float())) & (x.float()[:, None, None] <= x.float()[:, None, :, None])

    assert_refused(read(build, inputs=packed_positions()), UNCLEAR)


# ---------------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------------

TINY = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    vocab_size=64,
)


def model_masks(kind, calls, *, dynamic=False, attention="sdpa", dtype=torch.float32, **config):
    """Every call's `(mask node, values of all nodes)` in a compiled transformers model."""
    transformers = pytest.importorskip("transformers")
    settings = getattr(transformers, kind)(**{**TINY, **config})
    model = transformers.AutoModelForCausalLM.from_config(
        settings, attn_implementation=attention, dtype=dtype
    )
    found = []

    def backend(gm, _):
        traced = to_aten(gm)

        def run(*args):
            found.append((_mask_of(traced.graph), Recorder(traced).record(*args)))
            return gm(*args)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for call in calls:
        compiled(**call, use_cache=False)
    return found


def _mask_of(graph):
    for node in graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            return node.args[3]
        if node.target is torch.ops.aten.softmax.int:
            return node.args[0].args[1]
    raise AssertionError("no attention")


def batch(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    padding = torch.ones(rows, length, dtype=torch.long)
    padding[0, :2] = 0
    padding[1, -3:] = 0
    return {"input_ids": torch.randint(0, 64, (rows, length), generator=generator), "attention_mask": padding}


def without_mask(call):
    return {"input_ids": call["input_ids"]}


def check_model(found, words, shapes):
    assert len(found) == len(shapes)
    for (mask, values), (rows, length) in zip(found, shapes, strict=True):
        formula = (read_allowed if mask.meta["val"].dtype == torch.bool else read_additive)(mask)
        assert not isinstance(formula, Unsupported), formula
        assert formula.describe() == words
        actual = is_allowed(values[mask])
        assert torch.equal(evaluate(formula, values, rows, length), actual.expand(rows, 1, length, length))
    return formula


SHAPES = [(3, 12), (4, 9)]
PADDING = "key_padding(attention_mask)"


@pytest.mark.parametrize("dynamic", [False, True])
def test_llama(dynamic):
    calls = [batch(*shape) for shape in SHAPES]
    check_model(model_masks("LlamaConfig", calls, dynamic=dynamic), f"causal ∧ {PADDING}", SHAPES)
    found = model_masks("LlamaConfig", map(without_mask, calls), dynamic=dynamic)
    check_model(found, "causal", SHAPES)


@pytest.mark.parametrize("dynamic", [False, True])
def test_mistral_window(dynamic):
    calls = [batch(*shape) for shape in SHAPES]
    found = model_masks("MistralConfig", calls, dynamic=dynamic, sliding_window=8)
    check_model(found, f"causal ∧ window(8) ∧ {PADDING}", SHAPES)


@pytest.mark.parametrize(
    "kind, words, config",
    [
        ("LlamaConfig", "causal ∧ same_value(cumsum)", {}),
        ("MistralConfig", "causal ∧ window(3) ∧ same_value(cumsum)", {"sliding_window": 3}),
    ],
)
def test_packed_documents(kind, words, config):
    calls = [{**without_mask(batch(*s)), "position_ids": packed_positions(*s)[0]} for s in SHAPES]
    check_model(model_masks(kind, calls, dynamic=True, **config), words, SHAPES)


def test_bfloat16_additive():
    calls = [batch(*shape) for shape in SHAPES]
    found = model_masks("LlamaConfig", calls, attention="eager", dtype=torch.bfloat16)
    assert not check_model(found, f"causal ∧ {PADDING}", SHAPES).minus_inf


def test_a_mask_that_the_caller_gives():
    mask = torch.ones(3, 1, 12, 12).tril().bool()
    [(node, _)] = model_masks("LlamaConfig", [{**batch(3, 12), "attention_mask": mask}])
    assert read_allowed(node).data is node
