"""Graphs that packed once gave other values than eager: masks, softmaxes, dtypes, memory that aren't what they seem.

Each case says what has to become of it: packed, or refused with a kind. Values and gradients are eager's in any case.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pgcompile
from harness import ALWAYS_PACK, BACKEND, assert_same

pytestmark = pytest.mark.skipif(BACKEND != "pgcompile", reason="about what pgcompile packs")

VOCAB, WIDTH, ROWS, POSITIONS = 11, 8, 3, 9
INF, LOWEST = math.inf, torch.finfo(torch.float64).min


def causal():
    """Made in the graph: a tensor from outside would be data."""
    return torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril()


class Model(nn.Module):
    def __init__(self, heads=2):
        super().__init__()
        self.heads = heads
        self.emb, self.qkv = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.by_freq = nn.Embedding(VOCAB, WIDTH, scale_grad_by_freq=True)
        self.table = nn.Parameter(torch.randn(32, WIDTH))
        self.register_buffer("tril", torch.ones(32, 32, dtype=torch.bool).tril()[None, None])

    def split(self, x):
        return [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]

    def merge(self, o):
        return self.out(o.transpose(1, 2).flatten(2))

    def spelled(self, ids, weights):
        """A layer whose attention weights are `weights(q kᵀ)`."""
        x = self.emb(ids)
        q, k, v = self.split(x)
        return x + self.merge(weights(q @ k.mT) @ v)

    def body(self, ids):
        x = self.emb(ids)
        return x + self.merge(F.scaled_dot_product_attention(*self.split(x), is_causal=True))


def batch(rows=ROWS):
    ids = torch.randint(VOCAB, (rows, POSITIONS), generator=torch.Generator().manual_seed(1))
    ids[1:, :6] = ids[0, :6]
    return ids


def model(heads=2, dtype=torch.float64):
    torch.manual_seed(0)
    return Model(heads).to(dtype)


def hole(row, position, rows=ROWS):
    """A padding mask [N, S] with one hole."""
    mask = torch.ones(rows, POSITIONS, dtype=torch.long)
    mask[row, position] = 0
    return mask


# -- masks of one attention ------------------------------------------------------------------------------------------


def buffer_and_padding(m, ids, mask):
    bias = (1.0 - mask[:, None, None, :].bool().double()) * LOWEST
    lowest = torch.finfo(torch.float64).min
    return m.spelled(
        ids, lambda s: (torch.where(m.tril[:, :, :POSITIONS, :POSITIONS], s, lowest) + bias).softmax(-1)
    )


def data_and_padding(m, ids, mask, square):
    return m.spelled(ids, lambda s: (s + square).masked_fill(mask[:, None, None, :] == 0, -INF).softmax(-1))


def mask_by_key_head(m, ids, mask):
    """Scores [N, KV, G, S, S] and a mask [N, 1, S, S], whose rows meet the key heads."""
    x = m.emb(ids)
    q, k, v = m.split(x)
    q, k, v = q.unflatten(1, (2, 2)), k[:, :2].unsqueeze(2), v[:, :2].unsqueeze(2)
    allowed = causal() & (mask[:, None, None, :] != 0)
    return x + m.merge(((q @ k.mT).masked_fill(~allowed, -INF).softmax(-1) @ v).flatten(1, 2))


def heads_before_rows(m, ids, mask):
    """Scores [H, N, S, S] and a mask [N, 1, S, S], whose rows meet the heads."""
    x = m.emb(ids)
    q, k, v = (t.transpose(0, 1) for t in m.split(x))
    allowed = causal() & (mask[:, None, None, :] != 0)
    return x + m.merge(((q @ k.mT).masked_fill(~allowed, -INF).softmax(-1) @ v).transpose(0, 1))


def rows_merged_with_heads(m, ids, mask):
    """Scores [N·H, 1, S, S] and a mask for each of them."""
    x = m.emb(ids)
    q, k, v = (t.reshape(-1, 1, *t.shape[2:]) for t in m.split(x))
    allowed = causal() & (mask.repeat_interleave(m.heads, 0)[:, None, None, :] != 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return x + m.merge(out.reshape(ids.shape[0], m.heads, POSITIONS, -1))


def no_heads(m, ids, mask):
    """Scores [N, S, S] and a mask of the same rank."""
    x = m.emb(ids)
    q, k, v = m.qkv(x).chunk(3, -1)
    return x + (q @ k.mT).masked_fill(~(causal() & mask[:, None, :].bool()), -INF).softmax(-1) @ v


def segments_with_a_hole(m, ids, mask):
    segment = (torch.arange(POSITIONS) >= 3)[None].expand(ids.shape[0], -1)
    same = segment[:, None, :, None] == segment[:, None, None, :]
    allowed = causal() & (mask[:, None, None, :] != 0) & same
    return m.spelled(ids, lambda s: s.masked_fill(~allowed, LOWEST).softmax(-1))


SQUARE = torch.zeros(ROWS, 1, POSITIONS, POSITIONS, dtype=torch.float64).masked_fill(~causal(), -INF)


@pytest.mark.parametrize(
    ("graph", "options", "status"),
    [
        (buffer_and_padding, dict(mask=hole(1, 2)), "packed"),
        (data_and_padding, dict(mask=hole(1, 2), square=SQUARE), "packed"),
        (mask_by_key_head, dict(mask=hole(1, 3, 2), heads=4), "eager"),
        (heads_before_rows, dict(mask=hole(1, 3, 2)), "eager"),
        (rows_merged_with_heads, dict(mask=hole(1, 3)), "packed"),
        (no_heads, dict(mask=hole(1, 3)), "packed"),
        (segments_with_a_hole, dict(mask=hole(1, 3)), "dense"),
    ],
)
def test_masks(graph, options, status):
    heads, mask = options.pop("heads", 2), options.pop("mask")
    args = (model(heads), batch(mask.shape[0]), mask, *options.values())
    assert_same(graph, args, expect_status=status)


# -- between scores and weights --------------------------------------------------------------------------------------


def masked(scores, value=-INF):
    return scores.masked_fill(~causal(), value)


WEIGHTS = {
    "softmax over heads": lambda s: masked(s, LOWEST).softmax(1),
    "scores as integers": lambda s: masked((s * 3).to(torch.int32).to(s.dtype)).softmax(-1),
    "weights as integers": lambda s: masked(s * 3).softmax(-1).to(torch.int64).to(s.dtype),
    "a constant as an integer": lambda s: masked(s * torch.tensor(1.7).to(torch.int64)).softmax(-1),
    "scaled by zero when masked": lambda s: (masked(s) * 0.0).softmax(-1),
    "negated when masked": lambda s: (masked(s) * -1.0).softmax(-1),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name):
    """`1 * scores` packs, everything else that looks like a cast or a scale is refused."""
    status = "packed" if name == "a constant as an integer" else "eager"
    assert_same(lambda m, ids: m.spelled(ids, WEIGHTS[name]), (model(), batch()), expect_status=status)


def test_constant_written_in_place():
    def graph(m, ids):
        factor = torch.full((1,), 0.5, dtype=torch.float64)
        factor[0] = 3.0
        return m.spelled(ids, lambda s: masked(s * factor).softmax(-1))

    assert_same(graph, (model(), batch()), expect_status="eager")


def test_query_and_key_of_other_ranks():
    """Eager aligns the rows of keys [N, S, D] with the heads of queries [N, H, S, D]."""

    def graph(m, ids):
        x = m.emb(ids)
        q, k, v = m.split(x)
        return x + m.merge(F.scaled_dot_product_attention(q, k[:, 0], v[:, 0], is_causal=True))

    assert_same(graph, (model(), batch(2)), expect_status="eager")


# -- lookups and randomness ------------------------------------------------------------------------------------------


def frequencies(m, ids):
    h = m.body(ids)
    return h + m.by_freq(m.head(h).argmax(-1))


def table_of_tokens(m, ids):
    h = m.body(ids)
    return h + F.embedding(ids.clamp(max=8), h[0])


def table_of_positions(m, ids):
    table = m.table[: ids.shape[1]]
    h = m.emb(ids) + table
    h = h + F.embedding(ids.clamp(max=8), table)
    return h + m.merge(F.scaled_dot_product_attention(*m.split(h), is_causal=True))


@pytest.mark.parametrize("graph", [frequencies, table_of_tokens, table_of_positions])
def test_lookups(graph):
    assert_same(graph, (model(), batch()))


def test_negative_indices_into_a_parameter():
    """`parameter[ids]` counts from the end, an embedding doesn't."""

    def graph(m, ids):
        x = m.table[ids - 5]
        return x + m.merge(F.scaled_dot_product_attention(*m.split(x), is_causal=True))

    assert_same(graph, (model(), batch()), expect_status="packed")


def test_dropout_within_tokens_is_not_shared():
    def graph(m, ids):
        z = m.body(ids).unflatten(-1, (4, 2))
        return F.scaled_dot_product_attention(z, z, z, dropout_p=0.5)

    out = torch.compile(graph, backend="pgcompile", options=ALWAYS_PACK)(model(), batch())
    assert not torch.equal(out[0, :6], out[1, :6])


def test_a_dense_fallback_draws_no_random_numbers_twice():
    def graph(m, ids):
        noise = torch.rand(ids.shape[0], ids.shape[1], 1, dtype=torch.float64)
        return m.body(ids) + noise.cumsum(1)

    assert_same(graph, (model(), batch()), options={"min_saving": 0.99})
    assert_same(graph, (model(), batch()))


# -- outputs ---------------------------------------------------------------------------------------------------------


def test_outputs_that_share_memory():
    def graph(m, ids):
        h = m.body(ids) * 1.0
        return h, h[:, -1]

    with torch.no_grad():
        h, last = torch.compile(graph, backend="pgcompile", options=ALWAYS_PACK)(model(), batch())
        assert last.count_nonzero()
        h.zero_()
    assert not last.count_nonzero()


def test_a_failing_engine_leaves_the_grad_mode_alone(monkeypatch):
    from pgcompile.engines import ENGINES

    def fail(*args):
        raise ValueError("broken")

    monkeypatch.setattr(ENGINES["cpu"], "attention", fail)

    def graph(m, ids):
        h = m.out(m.emb(ids)).cumsum(1)
        with torch.no_grad():
            t = m.body(ids)
        return h + t

    m = model()
    out = torch.compile(graph, backend="pgcompile", options=ALWAYS_PACK)(m, batch())
    assert torch.is_grad_enabled() and out.requires_grad
    torch.testing.assert_close(out, graph(m, batch()))


# -- autocast --------------------------------------------------------------------------------------------------------


def attention_region(m, ids):
    q, k, v = m.split(m.emb(ids))
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def spelled_region(m, ids):
    q, k, v = m.split(m.emb(ids))
    with torch.autocast("cpu", torch.bfloat16):
        return masked(q @ k.mT).softmax(-1) @ v


def head_region(m, ids):
    h = m.body(ids)
    with torch.autocast("cpu", torch.bfloat16):
        return m.head(h)


def loss_region(m, ids):
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(m.head(m.body(ids)).flatten(0, 1), ids.flatten())


def region_off(m, ids):
    x = m.emb(ids)
    q, k, v = (t.float() for t in m.split(x))
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def losses(reduction="mean", smoothing=0.0):
    def loss(m, ids):
        logits = m.head(m.body(ids)).flatten(0, 1)
        return F.cross_entropy(logits, ids.flatten(), reduction=reduction, label_smoothing=smoothing)

    return loss


def nll(m, ids):
    return F.nll_loss(m.head(m.body(ids)).log_softmax(-1).flatten(0, 1), ids.flatten())


AUTOCAST = [
    (attention_region, False), (spelled_region, False), (head_region, False), (loss_region, False), (region_off, True),
    (losses(), True), (losses("sum"), True), (losses("none"), True), (losses("mean", 0.1), True), (nll, True),
]  # fmt: skip


@pytest.mark.parametrize(("graph", "around"), AUTOCAST)
def test_autocast(graph, around):
    """Dtypes are eager's; errors against float64 are at most twice eager's (or one eps)."""

    def errors(call, m):
        m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            out = call(m, batch())
        out.float().square().sum().backward()
        return out.dtype, [
            out.detach().double(),
            *(p.grad.double() for p in m.parameters() if p.grad is not None),
        ]

    _, truth = errors(lambda m, ids: graph_without_autocast(graph, m, ids), model())
    m = model(dtype=torch.float32)
    dtype, eager = errors(graph, m)
    pgcompile.reset_stats()
    packed_dtype, packed = errors(torch.compile(graph, backend="pgcompile", options=ALWAYS_PACK), m)
    assert pgcompile.stats().packed == 1 and packed_dtype == dtype
    for t, e, p in zip(truth, eager, packed, strict=True):
        floor = torch.finfo(torch.bfloat16).eps * t.norm()
        assert (p - t).norm() <= max(2 * (e - t).norm(), floor)


def graph_without_autocast(graph, m, ids):
    """The same in float64: autocast regions are switched off."""
    original = torch.autocast.__enter__
    torch.autocast.__enter__ = lambda self: self
    leave, torch.autocast.__exit__ = torch.autocast.__exit__, lambda self, *args: None
    try:
        return graph(m, ids)
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = original, leave


# -- padding, whatever follows it ------------------------------------------------------------------------------------


def right_padding():
    mask = torch.ones(ROWS, POSITIONS, dtype=torch.long)
    mask[1, 7:], mask[2, 8:] = 0, 0
    return mask


def padded_body(m, ids, mask):
    x = m.emb(ids)
    allowed = causal() & mask.bool()[:, None, None, :]
    return x + m.merge(F.scaled_dot_product_attention(*m.split(x), attn_mask=allowed))


def probability(m, ids, mask):
    return m.head(padded_body(m, ids, mask)).softmax(-1).gather(-1, ids[..., None])[..., 0]


def log_of_a_probability(m, ids, mask):
    return (probability(m, ids, mask).log() * mask).sum() / mask.sum()


def ratio(m, ids, mask):
    return (0.5 / probability(m, ids, mask) * mask).sum()


def chosen_after_a_log(m, ids, mask):
    """The derivative of what isn't chosen must be finite, too."""
    return torch.where(mask.bool(), (probability(m, ids, mask) * m.table[0, 0].exp()).log(), 0).sum()


def unit_vectors(m, ids, mask):
    h = padded_body(m, ids, mask) * (ids + 1.0)[..., None]
    return (h / h.norm(dim=-1, keepdim=True) * mask[..., None]).sum()


@pytest.mark.parametrize("graph", [log_of_a_probability, ratio, chosen_after_a_log, unit_vectors])
def test_dropped_padding_makes_nothing_infinite(graph):
    report = assert_same(
        graph, (model(), batch(), right_padding()), options=ALWAYS_PACK, expect_status="packed"
    )
    assert report.stats.valid_tokens == ROWS * POSITIONS - 3
    assert all(g is None or g.isfinite().all() for g in report.compiled.gradients.values())


def test_outputs_computed_late_are_zero_where_padding_was_dropped():
    mask = right_padding()
    fast = torch.compile(
        lambda m, ids, mask: (probability(m, ids, mask).log() + 1, probability(m, ids, mask) > 0), backend="pgcompile",
        options=ALWAYS_PACK,
    )  # fmt: skip
    logs, signs = fast(model(), batch(), mask)
    assert (logs[mask == 0] == 0).all() and (logs[mask == 1] != 0).all()
    assert signs.dtype == torch.bool and torch.equal(signs, mask.bool())


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda x, y, **k: F.nll_loss(x.log_softmax(-1), y, **k)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_labels_of_an_impossible_class(loss, reduction):
    def graph(m, ids, mask):
        logits = m.head(padded_body(m, ids, mask)).masked_fill(torch.arange(VOCAB) == 0, -INF)
        labels = torch.where(mask.bool() & (torch.arange(POSITIONS) > 3), ids.clamp(min=1), -100)
        return loss(logits.flatten(0, 1), labels.flatten(), reduction=reduction)

    assert_same(graph, (model(), batch(), right_padding()), options=ALWAYS_PACK, expect_status="packed")


# -- copies and writes -----------------------------------------------------------------------------------------------


def copied_then_written(m, ids):
    h = m.body(ids)
    k = torch.empty_like(h)
    k.copy_(h)
    h.mul_(2)
    return k + h


def assigned_then_written(m, ids):
    h = m.body(ids)
    k = torch.zeros_like(h)
    k[:] = h
    h.mul_(2)
    return h + k


def shared_expert(m, ids):
    """A constant with a column that is always on, then scattered into."""
    h = m.body(ids).flatten(0, 1)
    top = h.softmax(-1).topk(2, -1)
    z = torch.zeros(h.shape[0], WIDTH, dtype=h.dtype)
    z[:, 0] = 1.0
    gate = z.scatter(1, top.indices, top.values)
    return (h * gate).view(ROWS, POSITIONS, WIDTH)


def written_without_gradient(m, ids):
    h = m.body(ids)
    with torch.no_grad():
        h.mul_(2)
    return h * 3


def written_through_data(m, ids):
    h = m.body(ids)
    h.data.mul_(2)
    return h * 3


@pytest.mark.parametrize(
    ("graph", "status"),
    [
        (copied_then_written, "packed"),
        (assigned_then_written, "packed"),
        (shared_expert, "packed"),
        (written_without_gradient, "eager"),
        (written_through_data, "eager"),
    ],
)
def test_writes(graph, status):
    assert_same(graph, (model(), batch()), options=ALWAYS_PACK, expect_status=status)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: torch.empty_like(x).copy_(x),
        lambda x: torch.stack(list(x)),
        lambda x: torch.cat(x.split(1)),
    ],
)
def test_a_copy_has_memory_of_its_own(copy):
    fast = torch.compile(
        lambda m, ids, mask: (m.body(ids), copy(mask)), backend="pgcompile", options=ALWAYS_PACK
    )
    mask = right_padding()
    _, copied = fast(model(), batch(), mask)
    copied.zero_()
    assert mask.sum() == ROWS * POSITIONS - 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_times_numbers_keep_their_dtype(dtype):
    """A number in each lane has no say in type promotion; all of them in one tensor would."""

    def graph(m, ids, advantages):
        return torch.stack([row * a for row, a in zip(m.body(ids), advantages)])

    advantages = torch.randn(ROWS, dtype=torch.float64)
    assert_same(
        graph, (model(dtype=dtype), batch(), advantages), options=ALWAYS_PACK, tol=0.02, gradient_tol=0.05
    )


# -- check -----------------------------------------------------------------------------------------------------------


def banned_token(m, ids, mask):
    return m.head(padded_body(m, ids, mask)).masked_fill(torch.arange(VOCAB) == 0, -INF).log_softmax(-1)


def log_at_padding(m, ids, mask):
    return probability(m, ids, mask).log()


@pytest.mark.parametrize("graph", [banned_token, log_at_padding])
def test_check_accepts_infinities_that_are_eagers(graph):
    pgcompile.reset_stats()
    fast = torch.compile(graph, backend="pgcompile", options={**ALWAYS_PACK, "check": 1})
    fast(model(), batch(), right_padding())
    assert (pgcompile.stats().packed, pgcompile.stats().checked) == (1, 1)
