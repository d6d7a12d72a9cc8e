"""Random batches against eager: one dynamic compile per property, thousands of shapes, trees, paddings and columns.

A batch is drawn as a tree: each row repeats the beginning of an earlier row and goes on with letters of its own, at
most five forks deep, over an alphabet of three. Rows are placed left, right or anywhere; masks get holes; position ids
are counted by column, by mask, or shifted by row. What is drawn is always the same (`derandomize`).

Shapes: N rows, S positions, V letters, T packed tokens.
"""

import contextlib
import dataclasses
import random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from torch import nn

from harness import ALWAYS_PACK, BACKEND, brute_force_packed_tokens, kept_positions

LETTERS = "abc"
VOCAB = len(LETTERS) + 1
DEPTH = 5
LONGEST = 9
OFFSETS = 3  # how far position ids of a row can be shifted
VALUES, GRADIENTS = 1e-10, 1e-9

needs_pgcompile = pytest.mark.skipif(BACKEND != "pgcompile", reason="looks at plans")


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Columns:
    """What a model reads: ids, mask, position ids and document ids, all int64 [N, S]."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor

    @property
    def kept(self) -> torch.Tensor:
        return kept_positions(self.ids, self.mask)

    def kept_where_read(self, counts: torch.Tensor) -> torch.Tensor:
        """Padding whose next token counts in a loss, too: the last pad on the left predicts a row's first token."""
        reads = F.pad(counts[:, 1:].bool(), (0, 1))
        return kept_positions(self.ids, self.mask.bool() | reads)

    def packed_tokens(self, kept: torch.Tensor) -> int:
        return brute_force_packed_tokens([self.ids, self.mask, self.positions, self.documents], kept)

    def random(self, *shape: int) -> torch.Tensor:
        """Uniform float64 numbers, the same for the same shape; [N, S] by default."""
        generator = torch.Generator().manual_seed(self.ids.numel())
        return torch.rand(shape or self.ids.shape, generator=generator, dtype=torch.float64)


row = st.tuples(
    st.integers(0, 7),  # which earlier row to repeat
    st.integers(0, LONGEST),  # how much of it
    st.text(LETTERS, max_size=4),
    st.integers(0, LONGEST),  # where it stands in its padding
    st.integers(0, OFFSETS - 1),  # shift of its position ids
)


def tree_rows(drawn: list[tuple[int, int, str, int, int]], longest: int) -> list[str]:
    rows: list[tuple[str, int]] = [("", 0)]
    for parent, keep, letters, _, _ in drawn:
        text, level = rows[parent % len(rows)]
        if level == DEPTH or not text[:keep]:
            text, level = "", 0
        rows.append(((text[:keep] + letters)[:longest], level + 1))
    return [text for text, _ in rows[1:]]


@st.composite
def batches(
    draw,
    rows: tuple[int, int] = (2, 8),
    shortest: int = 2,
    longest: int = LONGEST,
    paddings: tuple[str, ...] = ("none", "left", "right", "both"),
    masked_rows: bool = False,
    holes: bool = True,
    documents: bool = False,
) -> Columns:
    """masked_rows: a row may be padding only. documents: a second column of small integers, else zeros."""
    drawn = draw(st.lists(row, min_size=rows[0], max_size=rows[1]))
    padding = draw(st.sampled_from(paddings))
    numbering = draw(st.sampled_from(["column", "mask", "shifted", "anything"]))
    junk = random.Random(draw(st.integers(0, 2**16)))
    texts = tree_rows(drawn, longest)
    width = min(max(shortest, *map(len, texts)), longest)
    if padding == "none":
        texts = [(text + text[-1:] * width + LETTERS * width)[:width] for text in texts]
    elif not masked_rows:
        texts = [text or LETTERS[0] for text in texts]
    ids = torch.tensor([[junk.randrange(VOCAB) for _ in range(width)] for _ in texts])
    mask = torch.zeros_like(ids)
    for n, (text, (_, _, _, place, _)) in enumerate(zip(texts, drawn)):
        room = width - len(text)
        start = {"none": 0, "right": 0, "left": room, "both": min(place, room)}[padding]
        ids[n, start : start + len(text)] = torch.tensor([LETTERS.index(c) for c in text], dtype=torch.int64)
        mask[n, start : start + len(text)] = 1
    if holes:
        for place in draw(st.lists(st.integers(0, ids.numel() - 1), max_size=3)):
            n, s = divmod(place, width)
            if mask[n, :s].any() and mask[n, s + 1 :].any():
                mask[n, s] = 0
    index = torch.arange(width).expand_as(ids)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    positions = {
        "column": index,
        "mask": counted,
        "shifted": counted + torch.tensor([shift for *_, shift in drawn])[:, None],
        "anything": torch.tensor([[junk.randrange(2) for _ in range(width)] for _ in texts]),
    }[numbering]
    docs = torch.tensor([[junk.randrange(2) for _ in range(width)] for _ in texts])
    return Columns(ids, mask, positions.contiguous(), docs if documents else torch.zeros_like(ids))


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def rotate(x_NHSD: torch.Tensor, positions_NS: torch.Tensor) -> torch.Tensor:
    half = x_NHSD.shape[-1] // 2
    frequencies = 10.0 ** -torch.arange(half, dtype=torch.float64)
    angles = positions_NS[:, None, :, None] * frequencies
    cos, sin = angles.cos().to(x_NHSD.dtype), angles.sin().to(x_NHSD.dtype)
    first, second = x_NHSD[..., :half], x_NHSD[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class TinyLM(nn.Module):
    """Learned and rotary positions, two query heads on one key head, a mask of every kind that has a formula."""

    def __init__(self, dim: int = 8, window: int | None = None, documents: bool = False):
        super().__init__()
        self.window, self.documents, self.half = window, documents, dim // 2
        self.wte, self.wpe = nn.Embedding(VOCAB, dim), nn.Embedding(LONGEST + OFFSETS, dim)
        self.norm, self.out_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, dim * 2), nn.Linear(dim, dim)
        self.up, self.down, self.head = nn.Linear(dim, 12), nn.Linear(12, dim), nn.Linear(dim, VOCAB)

    def forward(self, ids, mask, positions, documents):
        N, S = ids.shape
        index = torch.arange(S)
        allowed = (index[:, None] >= index) & mask[:, None, None, :].bool()
        if self.window is not None:
            allowed = allowed & (index[:, None] - index < self.window)
        if self.documents:
            allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
        x = self.wte(ids) + self.wpe(positions)
        for _ in range(2):  # the same layer twice: a leak in the first attention shows after the second
            q, k, v = self.qkv(self.norm(x)).split([self.half * 2, self.half, self.half], -1)
            q = rotate(q.view(N, S, 2, self.half).transpose(1, 2), positions)
            k = rotate(k.view(N, S, 1, self.half).transpose(1, 2), positions)
            v = v.view(N, S, 1, self.half).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
            x = x + self.proj(y.transpose(1, 2).reshape(N, S, -1))
            x = x + self.down(F.gelu(self.up(x)))
        return self.head(self.out_norm(x))


def tiny_lm(dtype: torch.dtype = torch.float64, **details: Any) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(**details).double().to(dtype)


def grpo_loss(model, ids, mask, positions, documents, labels, advantages, old, loss_mask):
    """PPO's clipped loss over the tokens that `loss_mask` marks: their sum, the mean of the rows' means, log-probs."""
    logits = model(ids, mask, positions, documents)[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, labels[:, 1:, None]).squeeze(-1)
    ratio = (logp - old[:, 1:]).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    tokens = -gain * loss_mask[:, 1:]
    counts = loss_mask[:, 1:].sum(1)
    return tokens.sum(), (tokens.sum(1) / counts.clamp(min=1)).mean(), logp * loss_mask[:, 1:]


def label_loss(model, ids, mask, positions, documents, labels):
    """The loss of a trainer, with labels shifted inside: mean, sum, and one number per token."""
    logits = model(ids, mask, positions, documents)[:, :-1].reshape(-1, VOCAB)
    target = labels[:, 1:].reshape(-1)
    return tuple(F.cross_entropy(logits, target, reduction=how) for how in ("mean", "sum", "none"))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


class Compiled:
    """A function and its one dynamic compile; counts how often Dynamo came to the backend."""

    def __init__(self, function, example: tuple[Any, ...], model: nn.Module):
        self.function, self.model, self.compiles = function, model, 0
        self.fast = torch.compile(function, backend=self.backend, dynamic=True, fullgraph=True)
        self.fast(*example)

    def backend(self, graph, example_inputs):
        self.compiles += 1
        if BACKEND != "pgcompile":
            from torch._dynamo.backends.registry import lookup_backend

            return lookup_backend(BACKEND)(graph, example_inputs)
        import pgcompile

        return pgcompile.pgcompile(graph, example_inputs, options=ALWAYS_PACK)

    def check(self, *arguments: Any, kept: torch.Tensor | None = None, decision: str | None = "packed"):
        """Eager and packed agree on values and gradients; returns the packed call's counters (None without)."""
        expected = self.value_and_gradients(self.function, arguments, kept)
        with counted() as stats:
            actual = self.value_and_gradients(self.fast, arguments, kept)
        assert self.compiles == 1, f"recompiled at {[list(a.shape) for a in arguments if torch.is_tensor(a)]}"
        for name, want in expected.items():
            assert_close(name, actual[name], want, largest_gradient(expected))
        if BACKEND != "pgcompile":
            return None
        assert decision is None or getattr(stats[0], decision) == 1, stats[0]
        return stats[0]

    def value_and_gradients(self, call, arguments, kept):
        self.model.zero_grad(set_to_none=True)
        outputs = call(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results, total = {}, torch.zeros((), dtype=torch.float64)
        for i, output in enumerate(outputs):
            if kept is not None and output.shape[:2] == kept.shape:
                output = output.masked_fill(~kept.reshape(*kept.shape, *[1] * (output.dim() - 2)), 0)
            weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).reshape(output.shape)
            total = (
                total + (output * weights.to(output.dtype)).sum()
                if output.dim()
                else total + output * (i + 1)
            )
            results[f"output {i}"] = output.detach()
        total.backward()
        for name, parameter in self.model.named_parameters():
            results[f"gradient {name}"] = parameter.grad.clone()
        return results


def largest_gradient(results: dict[str, torch.Tensor]) -> float:
    return max(t.abs().max().item() for name, t in results.items() if name.startswith("gradient"))


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, largest: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, name
    if not want.numel():
        return
    scale = want.abs().max().item()
    if name.startswith("gradient"):
        bound = GRADIENTS * max(scale, 1e-6 * largest)
    else:
        bound = VALUES * max(scale, 1.0)
    difference = (got - want).abs().max().item()
    assert difference <= bound, f"{name} differs by {difference:.3g}, allowed {bound:.3g}"


@contextlib.contextmanager
def counted():
    """A list that holds pgcompile's counters of what ran inside, once it is left."""
    found: list[Any] = []
    if BACKEND == "pgcompile":
        import pgcompile

        pgcompile.reset_stats()
    yield found
    if BACKEND == "pgcompile":
        found.append(pgcompile.stats())


def example(N: int = 5, S: int = 7) -> tuple[torch.Tensor, ...]:
    """Sizes that differ, so that Dynamo gives each a symbol of its own."""
    ids = torch.arange(N * S).reshape(N, S) % VOCAB
    return ids, torch.ones_like(ids), torch.arange(S).repeat(N, 1), torch.zeros_like(ids)


def columns(batch: Columns) -> tuple[torch.Tensor, ...]:
    return batch.ids, batch.mask, batch.positions, batch.documents


def assert_counts(stats: Any, batch: Columns, kept: torch.Tensor | None = None) -> None:
    if stats is not None:
        kept = batch.kept if kept is None else kept
        assert stats.valid_tokens == kept.sum()
        assert stats.packed_tokens == batch.packed_tokens(kept)
        assert stats.dense_tokens == batch.ids.numel()


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo():
    """Before the first and after the last compile of this module: a reset in between would compile again."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def fixture_of(build):
    return pytest.fixture(scope="module")(lambda fresh_dynamo: build())


# ---------------------------------------------------------------------------------------------------------------------
# The model by itself
# ---------------------------------------------------------------------------------------------------------------------


def compile_model(model: TinyLM, **sizes: int) -> Compiled:
    return Compiled(model, example(**sizes), model)


plain = fixture_of(lambda: compile_model(tiny_lm()))
one_row = fixture_of(lambda: compile_model(tiny_lm(), N=1))
one_position = fixture_of(lambda: compile_model(tiny_lm(), S=1))
windowed = fixture_of(lambda: compile_model(tiny_lm(window=3, documents=True)))


@fuzz(600)
@given(batch=batches())
def test_values_gradients_and_counts(plain, batch):
    stats = plain.check(*columns(batch), kept=batch.kept)
    assert_counts(stats, batch)


@fuzz(150)
@given(batch=batches(rows=(1, 1)))
def test_one_row(one_row, batch):
    stats = one_row.check(*columns(batch), kept=batch.kept)
    assert_counts(stats, batch)


@fuzz(150)
@given(batch=batches(shortest=1, longest=1, paddings=("none",), holes=False))
def test_one_position(one_position, batch):
    stats = one_position.check(*columns(batch), kept=batch.kept)
    assert_counts(stats, batch)


@fuzz(100)
@given(batch=batches(rows=(1, 1), paddings=("none",), holes=False), copies=st.integers(2, 8))
def test_equal_rows_need_as_many_tokens_as_one(plain, batch, copies):
    batch = Columns(*(column.repeat(copies, 1) for column in columns(batch)))
    stats = plain.check(*columns(batch), kept=batch.kept)
    assert stats is None or stats.packed_tokens == batch.ids.shape[1]


@fuzz(100)
@given(batch=batches(rows=(2, 4), paddings=("none",), holes=False))
def test_rows_that_differ_in_their_positions_only(plain, batch):
    """Equal ids, each row's position ids shifted by its index: nothing may be shared but rows that also agree there."""
    rows = batch.ids.shape[0]
    ids = batch.ids[:1].expand(rows, -1).contiguous()
    shift = torch.arange(rows)[:, None] % OFFSETS
    batch = Columns(ids, batch.mask, torch.arange(ids.shape[1]) + shift, batch.documents)
    stats = plain.check(*columns(batch), kept=batch.kept)
    assert_counts(stats, batch)
    assert stats is None or stats.packed_tokens == min(rows, OFFSETS) * ids.shape[1]


@fuzz(150)
@given(batch=batches(masked_rows=True))
def test_rows_of_padding_only(plain, batch):
    """Their values are the caller's problem, but must not become anybody else's: no NaN that eager doesn't have."""
    assume(bool(batch.kept.any()))
    stats = plain.check(*columns(batch), kept=batch.kept, decision=None)
    if stats is not None and stats.packed:
        assert_counts(stats, batch)


@fuzz(250)
@given(batch=batches(documents=True))
def test_window_and_documents(windowed, batch):
    """A hole whose window is masked sees nothing: such a batch may run dense, and is equal in any case."""
    stats = windowed.check(*columns(batch), kept=batch.kept, decision=None)
    if stats is not None and stats.packed:
        assert_counts(stats, batch)
    if stats is not None and bool(batch.mask.all()):
        assert stats.packed == 1, stats


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def compile_loss(loss, *late) -> Compiled:
    model = tiny_lm()
    return Compiled(loss, (model, *example(), *late), model)


grpo = fixture_of(
    lambda: compile_loss(
        grpo_loss, example()[0], *(torch.ones(n, dtype=torch.float64) for n in [5, (5, 7), (5, 7)])
    )
)
labelled = fixture_of(lambda: compile_loss(label_loss, example()[0]))


@fuzz(400)
@given(
    batch=batches(shortest=3),
    own_labels=st.booleans(),
    marked=st.sampled_from(["answers", "some", "padding too", "nothing"]),
)
def test_grpo_loss(grpo, batch, own_labels, marked):
    """Labels, advantages, old log-probs and the loss mask differ everywhere: none of them may split the tree."""
    noise = batch.random()
    labels = (noise * 1e6).long() % VOCAB if own_labels else batch.ids.clone()
    advantages = batch.random(batch.ids.shape[0]) * 4 - 2
    old = -0.5 - 2 * batch.random(*batch.ids.shape)
    loss_mask = {
        "answers": batch.mask * (torch.arange(batch.ids.shape[1]) >= 2),
        "some": batch.mask * (noise > 0.5),
        "padding too": torch.ones_like(batch.mask),
        "nothing": torch.zeros_like(batch.mask),
    }[marked].double()
    stats = grpo.check(grpo.model, *columns(batch), labels, advantages, old, loss_mask)
    assert_counts(stats, batch, batch.kept_where_read(loss_mask))


@fuzz(400)
@given(
    batch=batches(shortest=3),
    ignored=st.sampled_from(["padding", "nothing", "anything", "all but one"]),
    own_labels=st.booleans(),
)
def test_labels(labelled, batch, ignored, own_labels):
    """`labels=input_ids` counts padding in the loss: then it may not be dropped."""
    noise = batch.random()
    labels = (noise * 1e6).long() % VOCAB if own_labels else batch.ids.clone()
    hidden = {
        "padding": ~batch.mask.bool(),
        "nothing": torch.zeros_like(batch.mask, dtype=torch.bool),
        "anything": noise > 0.5,
        "all but one": torch.ones_like(batch.mask, dtype=torch.bool),
    }[ignored].clone()
    if hidden[:, 1:].all():
        hidden[0, 1] = False
    stats = labelled.check(labelled.model, *columns(batch), labels.masked_fill(hidden, -100))
    assert_counts(stats, batch, batch.kept_where_read(~hidden))


# ---------------------------------------------------------------------------------------------------------------------
# Lower precision
# ---------------------------------------------------------------------------------------------------------------------

in_float32 = fixture_of(lambda: compile_model(tiny_lm(torch.float32)))
in_bfloat16 = fixture_of(lambda: compile_model(tiny_lm(torch.bfloat16)))


def errors(packed: Compiled, batch: Columns) -> dict[str, tuple[float, float]]:
    """Relative L2 error of (packed, eager) against float64, of all outputs and of all gradients together."""
    truth = Compiled.__new__(Compiled)
    truth.model = tiny_lm(next(packed.model.parameters()).dtype).double()
    exact = truth.value_and_gradients(truth.model, columns(batch), batch.kept)
    found = {}
    sides = [
        packed.value_and_gradients(call, columns(batch), batch.kept)
        for call in (packed.fast, packed.function)
    ]
    assert packed.compiles == 1
    for kind in ("output", "gradient"):
        want = torch.cat([t.flatten() for name, t in exact.items() if name.startswith(kind)])
        found[kind] = tuple(
            (torch.cat([t.flatten() for name, t in side.items() if name.startswith(kind)]) - want)
            .norm()
            .item()
            / want.norm().item()
            for side in sides
        )
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_is_no_worse_than_eager(dtype, in_float32, in_bfloat16):
    packed = {"float32": in_float32, "bfloat16": in_bfloat16}[dtype]
    eps = torch.finfo(getattr(torch, dtype)).eps

    @fuzz(100)
    @given(batch=batches())
    def check(batch):
        for kind, (mine, eager) in errors(packed, batch).items():
            # One batch at a time: twice eager's error as everywhere, and a unit in the last place for luck.
            assert mine <= 2 * eager + eps, f"{kind}: {mine:.2e}, eager {eager:.2e}"

    check()


# ---------------------------------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------------------------------


@needs_pgcompile
@fuzz(400)
@given(batch=batches(masked_rows=True), keep_all=st.booleans())
def test_plan(plain, batch, keep_all):
    """A plan says who is whose ancestor exactly as the batch does, in depth-first preorder."""
    assume(bool(batch.kept.any()))
    plan = plan_of(plain, batch, keep_all)
    keys = torch.stack([batch.ids, batch.mask, batch.positions], -1)
    tree = plan.tree
    T, kept, class_of = plan.tokens, batch.kept, tree.class_of
    if keep_all:
        assert T == batch.packed_tokens(kept)
    assert batch.packed_tokens(kept) <= T <= kept.sum() == plan.valid_tokens
    assert torch.equal(class_of >= 0, kept)
    assert class_of[kept].unique().tolist() == list(range(T))
    assert torch.equal(class_of[tree.row, tree.position], torch.arange(T)), "representatives"
    first = kept.int().argmax(1)
    token = torch.arange(T)
    sees = (token <= token[:, None]) & (token[:, None] < tree.subtree_end)  # [query, key]
    for n in range(kept.shape[0]):
        path = class_of[n][kept[n]]
        start = int(first[n])
        for depth, t in enumerate(path.tolist()):
            assert tree.depth[t] == depth
            assert sees[t].nonzero().flatten().tolist() == path[: depth + 1].tolist()
        there = tree.row[path], tree.position[path]
        assert torch.equal(keys[there], keys[n, start : start + len(path)]), "columns of the representative"
    start, end, subtree_end, depth, parent = tree.segments.unbind(1)
    assert start.tolist() == [0, *end[:-1].tolist()] and end[-1] == T
    assert torch.equal(tree.depth[start], depth) and torch.equal(tree.subtree_end[end - 1], subtree_end)
    assert all(p < m for m, p in enumerate(parent.tolist()))
    assert plan.packed_pairs == int(sees.sum())


def plan_of(compiled: Compiled, batch: Columns, keep_all: bool):
    """The plan that a call builds."""
    from pgcompile import backend

    plans = []
    original = backend.build_plan

    def recording(graphs, results, _, trees):
        plans.append(original(graphs, results, keep_all, trees))
        return plans[-1]

    backend.build_plan = recording
    try:
        compiled.fast(*columns(batch))
    finally:
        backend.build_plan = original
    assert compiled.compiles == 1
    return plans[0]
