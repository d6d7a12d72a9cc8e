"""Heads behind a slice: computed for the tokens that the slice leaves."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import BACKEND
from tiny_hf import build

if BACKEND != "pgcompile":
    pytest.skip("about what pgcompile computes", allow_module_level=True)

import pgcompile
from pgcompile import chunks

KEPT = 5
ROWS, PROMPT, POSITIONS = 6, 14, 20


class Model(nn.Module):
    """Attention, then `head(self, hidden)`."""

    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.out = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(16, 2048)
        self.head = functools.partial(head, self)

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        allowed = None
        if mask is not None:
            at = torch.arange(ids.shape[1])
            allowed = (at <= at[:, None]) & mask[:, None, None, :].bool()
        x = x + F.scaled_dot_product_attention(q, k, v, allowed, is_causal=mask is None)[:, 0]
        return self.head(x, ids)


def last(m, x, ids):
    return m.out(x[:, -KEPT:])


def last_by_baddbmm(m, x, ids):
    kept = x[:, -KEPT:].flatten(0, 1)
    return torch.baddbmm(m.out.bias, kept[None], m.out.weight.mT[None])[0]


def last_without_the_very_last(m, x, ids):
    return m.out(x[:, -KEPT:])[:, :-1]


def logprobs(m, x, ids):
    logits = m.out(x[:, -KEPT - 1 :])[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, -KEPT:, None]).squeeze(-1)


def loss(m, x, ids):
    logits = m.out(x[:, -KEPT - 1 :])[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, -KEPT:].flatten())


def very_last(m, x, ids):
    return m.out(x[:, -1])


def some_rows(m, x, ids):
    return m.out(x[:2])


def two_slices(m, x, ids):
    return m.out(x[:, -KEPT:]), m.qkv(x[:, 3:6]).sin()


def slice_and_all(m, x, ids):
    return m.out(x[:, -KEPT:]), m.qkv(x)


def nested(m, x, ids):
    return m.out(x[:, -KEPT - 3 :][:, 1:-1].flatten(0, 1))


def merged(m, x, ids):
    return m.out(x[:, -KEPT:].reshape(-1, 16)).unflatten(0, (ids.shape[0], -1))


def behind_the_head(m, x, ids):
    return m.out(x)[:, -KEPT:]


def all_but_one(m, x, ids):
    return m.out(x[:, :-1])


def by_tensor(m, x, ids):
    return m.out(x[torch.arange(ids.shape[0]), ids.argmax(1)])


def distinct(ids, positions):
    """How many distinct prefixes of rows end at some of the positions."""
    return len({tuple(row[: s + 1]) for row in ids.tolist() for s in positions})


def batch(rows=ROWS, positions=POSITIONS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(32, (rows, positions), generator=generator)
    ids[:, :PROMPT] = ids[0, :PROMPT].clone()
    return ids


LAST = range(POSITIONS - KEPT, POSITIONS)
SCORED = {  # positions that the head is computed for; None: all
    last: LAST,
    last_by_baddbmm: LAST,
    last_without_the_very_last: LAST,
    logprobs: range(POSITIONS - KEPT - 1, POSITIONS),
    loss: range(POSITIONS - KEPT - 1, POSITIONS),
    very_last: [POSITIONS - 1],
    some_rows: None,
    two_slices: [*LAST, 3, 4, 5],
    slice_and_all: LAST,
    nested: range(POSITIONS - KEPT - 3, POSITIONS),
    merged: LAST,
    behind_the_head: None,
    all_but_one: None,
    by_tensor: None,
}


def assert_as_eager(model, fast, *inputs):
    gradients, found = [], []
    for call in (model, fast):
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found.append([o.detach() for o in outputs])
        total = sum(
            (o * torch.randn(o.shape, generator=torch.Generator().manual_seed(1))).sum() for o in outputs
        )
        gradients.append(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients)


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """Those of the packed calls."""
    torch._dynamo.reset()
    pgcompile.reset_stats()
    found, build_plan = [], pgcompile.backend.build_plan
    monkeypatch.setattr(
        pgcompile.backend, "build_plan", lambda *args: found.append(build_plan(*args)) or found[-1]
    )
    return found


def fast(model, inner="eager", dynamic=None):
    options = {"inner": inner, "min_saving": 0, "strict": True}
    return torch.compile(model, backend="pgcompile", options=options, dynamic=dynamic)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("head", SCORED, ids=lambda head: head.__name__)
def test_the_head_is_computed_for_what_is_left(head, inner, plans):
    model = Model(head).double()
    assert_as_eager(model, fast(model, inner), batch())
    (plan,) = plans
    wanted = SCORED[head]
    assert plan.tokens == distinct(batch(), range(POSITIONS))
    if head is some_rows:
        assert plan.scored.tokens == distinct(batch()[:2], range(POSITIONS))
    else:
        assert (plan.scored and plan.scored.tokens) == (wanted and distinct(batch(), wanted))
    assert pgcompile.stats().packed == 1


def masks():
    ones = torch.ones(ROWS, POSITIONS, dtype=torch.int64)
    left, right = ones.clone(), ones.clone()
    for n in range(ROWS):
        left[n, :n], right[n, POSITIONS - n :] = 0, 0
    return {
        "left": left,
        "right": right,
        "rows of the slice without a token": right.index_fill(1, torch.arange(15, 20), 0),
    }


@pytest.mark.parametrize("padding", masks())
@pytest.mark.parametrize("head", [last, loss, two_slices], ids=lambda head: head.__name__)
def test_padding(head, padding, plans):
    """What is left may be padding; that is zero, or switched off by what the loss multiplies with."""
    mask = masks()[padding]

    def masked(m, x, ids):
        found = head(m, x, ids)
        if head is loss:
            logits = m.out(x[:, -KEPT - 1 :])[:, :-1]
            each = F.cross_entropy(logits.transpose(1, 2), ids[:, -KEPT:], reduction="none")
            return (each * mask[:, -KEPT - 1 : -1] * mask[:, -KEPT:]).sum()
        found = found if isinstance(found, tuple) else (found,)
        cuts = [mask[:, -KEPT:], mask[:, 3:6]]
        return tuple(f * cut[..., None] for f, cut in zip(found, cuts))

    model = Model(masked).double()
    assert_as_eager(model, fast(model), batch(), mask)
    assert pgcompile.stats().packed == 1 and plans[0].scored.tokens < plans[0].tokens


@pytest.mark.parametrize("head", [logprobs, loss], ids=lambda head: head.__name__)
def test_in_chunks(head, plans, monkeypatch):
    """And what is left runs a few tokens at a time."""
    monkeypatch.setattr(chunks, "WHOLE_BYTES", 1)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2048 * 8 * 7)
    model = Model(head).double()
    reports = []
    backend = functools.partial(
        pgcompile.pgcompile,
        options={"inner": "eager", "min_saving": 0, "strict": True},
        collector=reports.append,
    )
    assert_as_eager(model, torch.compile(model, backend=backend), batch())
    report = reports[-1]
    assert report.head_chunks == -(-plans[0].scored.tokens // 7) > 1


def test_one_compiled_graph_for_all_sizes(plans):
    """As many tokens as there are, and as many of them left as there are: whatever was compiled first."""
    model = Model(logprobs).double()
    call = fast(model, "inductor", dynamic=True)
    for seed, (rows, positions) in enumerate([(6, 20), (4, 24), (9, 18), (3, 33)]):
        assert_as_eager(model, call, batch(rows, positions, seed))
    assert len({(p.tokens, p.scored.tokens) for p in plans}) == 4
    assert pgcompile.stats().packed == 4 and pgcompile.stats().compiles <= 2


def test_a_single_token_is_left(plans):
    model = Model(very_last).double()
    ids = batch()[:1].expand(ROWS, -1).clone()
    assert_as_eager(model, fast(model, "inductor"), ids)
    assert plans[0].scored.tokens == 1 and pgcompile.stats().packed == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype, plans):
    model = Model(logprobs)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        expected, found = model(batch()), fast(model)(batch())
    torch.testing.assert_close(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert plans[0].scored is not None


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_logits_to_keep(name, plans):
    model = build(name).double().eval()
    ids = batch() % 30
    expected = model(input_ids=ids, use_cache=False, logits_to_keep=KEPT).logits
    found = fast(model)(input_ids=ids, use_cache=False, logits_to_keep=KEPT).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert plans[0].scored.tokens == distinct(ids, LAST)
