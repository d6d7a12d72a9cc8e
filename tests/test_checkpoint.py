"""Activation checkpointing inside of what is compiled: packed, and still checkpointed."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from harness import BACKEND, differences, named_tensors, random_tree_batch, run
from tiny_hf import build
from zoo.gpt2_conv1d import GPT2Conv1D

if BACKEND != "pgcompile":
    pytest.skip("about what pgcompile packs", allow_module_level=True)

import pgcompile
from pgcompile import passes
from pgcompile.engines import reference

LAYERS = 3


class Checkpointed(nn.Module):
    """A block whose forward runs under checkpoint."""

    def __init__(self, block, nested=False, **options):
        super().__init__()
        self.block, self.nested, self.options = block, nested, options

    def forward(self, *args):
        body = self.block
        if self.nested:
            body = functools.partial(checkpoint, self.block, **self.options)
        return checkpoint(body, *args, **self.options)


def model(**options):
    torch.manual_seed(0)
    found = GPT2Conv1D(layers=LAYERS).double()
    if options:
        found.h = nn.ModuleList(Checkpointed(block, **options) for block in found.h)
    return found


@pytest.fixture
def attention_calls(fresh, monkeypatch):
    """How often attention ran forward."""
    calls = []
    forward = reference.attention
    monkeypatch.setattr(reference, "attention", lambda *a, **k: calls.append(1) or forward(*a, **k))
    return calls


BATCH = random_tree_batch(rows=6, positions=12, seed=1)


def fast(target, inner_compiler, **options):
    options = {"inner": inner_compiler, "engine": "reference", "min_saving": 0, **options}
    return torch.compile(target, backend="pgcompile", options=options)


def assert_as_eager(target, inner_compiler, **options):
    expected = run(target, (), BATCH.inputs, kept=BATCH.kept)
    actual = run(fast(target, inner_compiler, **options), (), BATCH.inputs, kept=BATCH.kept, owner=target)
    assert not differences(actual, expected, 1e-10, 1e-9)
    assert pgcompile.stats().packed == 1


@pytest.mark.parametrize(
    "inner_compiler, nested",
    [("eager", False), ("eager", True), ("aot_eager", False), ("aot_eager", True), ("inductor", False)],
)
def test_attention_runs_again_in_backward(inner_compiler, nested, attention_calls):
    assert_as_eager(model(use_reentrant=False, nested=nested), inner_compiler)
    assert len(attention_calls) >= 2 * LAYERS
    attention_calls.clear()
    torch._dynamo.reset()
    pgcompile.reset_stats()
    assert_as_eager(model(), inner_compiler)
    assert len(attention_calls) == LAYERS


def test_with_and_without_share_no_artifact(attention_calls):
    for options in ({}, {"use_reentrant": False}):
        torch._dynamo.reset()
        fast(model(**options), "aot_eager")(**BATCH.inputs).sum().backward()
    assert len(attention_calls) == 3 * LAYERS


def test_reentrant_is_the_same_to_dynamo(attention_calls):
    assert_as_eager(model(use_reentrant=True), "aot_eager")
    assert len(attention_calls) == 2 * LAYERS


def test_without_the_pass_nothing_is_recomputed(attention_calls):
    assert_as_eager(model(use_reentrant=False), "aot_eager", disable_passes=["checkpoint_pass"])
    assert len(attention_calls) == LAYERS


def test_what_chooses_what_is_kept_is_refused():
    def policy(context, op, *args, **kwargs):
        return torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    target = model(
        use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, policy)
    )
    explanation = pgcompile.explain(target, **BATCH.inputs)
    assert explanation.status == "eager"
    assert {r.kind for graph in explanation.graphs for r in graph.fallbacks} == {"trace_failed"}
    assert "context_fn" in str(explanation)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "opt"])
def test_transformers_own_switch(name, attention_calls):
    target = build(name).double().train()
    target.gradient_checkpointing_enable()
    layers = target.config.num_hidden_layers
    inputs = {**BATCH.inputs, "use_cache": False}
    compiled = fast(target, "aot_eager")
    expected, actual = target(**inputs).logits, compiled(**inputs).logits
    assert pgcompile.stats().packed == 1
    kept = BATCH.kept[..., None]
    torch.testing.assert_close(actual * kept, expected * kept, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected) * kept
    gradients = []
    for logits in (expected, actual):
        target.zero_grad()
        (logits * weight).sum().backward()
        gradients.append(named_tensors({n: p.grad for n, p in target.named_parameters()}))
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name
    assert len(attention_calls) == 2 * layers


# Dropout: a recomputed body has to draw what it drew before, whoever runs it.


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def body(self, layer, x):
        q, k, v = layer(x)[:, None].chunk(3, dim=-1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return x + nn.functional.dropout(y, 0.5, self.training)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(self.body, layer, x, use_reentrant=False)
        return self.head(x)


def value(call, ids):
    torch.manual_seed(5)
    return call(ids).square().sum()


@pytest.mark.parametrize("ids", [(6, 24), (6, 1)], ids=["tokens", "one_token"])
@pytest.mark.parametrize(
    "options",
    [
        {"inner": "aot_eager"},  # refused: dropout is active
        {"inner": "aot_eager", "fallback": "inner"},
        {"inner": "eager", "dropout": "shared", "min_saving": 0},
        {"inner": "aot_eager", "dropout": "shared", "min_saving": 0},
        {"inner": "eager", "dropout": "shared", "min_saving": 1},
        {"inner": "aot_eager", "dropout": "shared", "min_saving": 1},
    ],
    ids=["eager", "inner", "packed_eager", "packed", "dense_eager", "dense"],
)
def test_dropout_is_drawn_again(options, ids):
    """By finite differences, since every path draws other numbers."""
    torch._dynamo.reset()
    target = Dropping().double()
    ids = torch.ones(ids, dtype=torch.int64)
    call = torch.compile(target, backend="pgcompile", options=options)
    parameters = list(target.parameters())
    gradients = torch.autograd.grad(value(call, ids), parameters)
    directions = [torch.randn_like(p) for p in parameters]
    step, values = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter.add_(sign * step * direction)
        values.append(value(call, ids).item())
    expected = (values[0] - values[1]) / (2 * step)
    actual = sum((g * d).sum().item() for g, d in zip(gradients, directions))
    assert abs(actual - expected) <= 1e-5 * abs(expected)


# Bodies with switches, and values that go in and out of them.


def no_grad_inside(m, a, b, c, x):
    def body(x):
        with torch.no_grad():
            scale = b(x)
        return x * m.weight + scale * x

    return c(m.checkpoint(body, a(x)))


def no_grad_at_the_end(m, a, b, c, x):
    def body(x):
        y = b(x)
        with torch.no_grad():
            scale = y * m.weight
        return y, scale

    y, scale = m.checkpoint(body, a(x))
    with torch.no_grad():
        other = c(y) * scale
    return c(y + scale + other)


def grad_inside_no_grad(m, a, b, c, x):
    def body(x):
        y = b(x)
        with torch.enable_grad():
            z = c(x * m.weight)
        return y * m.weight, z

    x = a(x)
    with torch.no_grad():
        y, z = m.checkpoint(body, x)
    return c(x + y + z)


def values_of_one_in_the_next(m, a, b, c, x):
    y, z = m.checkpoint(lambda x: (a(x), x * m.weight), x)
    v, w = m.checkpoint(lambda y, z: (b(y) * z, z + 1), y, z)
    return m.checkpoint(lambda y, z, v, w: c(y + z * v) - w, y, z, v, w)


def outputs_that_nobody_uses(m, a, b, c, x):
    y, _ = m.checkpoint(lambda x: (a(x), b(x) * m.weight), x)
    m.checkpoint(lambda x: c(x) * m.weight, y)
    return b(y)


def inputs_and_numbers_returned(m, a, b, c, x):
    same, number, _, y = m.checkpoint(lambda x, n: (x, n + 1, None, a(x)), x, 3)
    return c(b(same * number + y))


def weights_shared(m, a, b, c, x):
    return m.checkpoint(a, m.checkpoint(a, m.checkpoint(a, x) * m.weight))


BODIES = [
    no_grad_inside, no_grad_at_the_end, grad_inside_no_grad, values_of_one_in_the_next, outputs_that_nobody_uses,
    inputs_and_numbers_returned, weights_shared,
]  # fmt: skip


class Bodies(nn.Module):
    """A language model of three attentions, wired by `wiring`."""

    checkpoint = staticmethod(functools.partial(checkpoint, use_reentrant=False))

    def __init__(self, wiring):
        super().__init__()
        torch.manual_seed(0)
        self.wiring = wiring
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(16))

    def attend(self, layer, x):
        q, k, v = layer(x)[:, None].chunk(3, dim=-1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]

    def forward(self, ids):
        layers = [functools.partial(self.attend, layer) for layer in self.layers]
        return self.head(self.wiring(self, *layers, self.embed(ids)))


@pytest.mark.parametrize("inner_compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("wiring", BODIES, ids=lambda f: f.__name__)
def test_bodies(wiring, inner_compiler):
    torch._dynamo.reset()
    pgcompile.reset_stats()
    target = Bodies(wiring).double()
    ids = BATCH.input_ids % 32
    call = fast(target, inner_compiler, strict=True)
    expected, actual = target(ids), call(ids)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    parameters = list(target.parameters())
    for a, b in zip(
        torch.autograd.grad((actual * weight).sum(), parameters, allow_unused=True),
        torch.autograd.grad((expected * weight).sum(), parameters, allow_unused=True),
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    assert pgcompile.stats().packed == 1


def test_marks_that_tracing_lost_are_noticed(monkeypatch):
    """A packed graph that isn't checkpointed would need more memory than was asked for."""
    to_aten = passes.trace.to_aten

    def forgetful(gm):
        traced = to_aten(gm)
        for node in traced.graph.nodes:
            node.meta.pop("custom", None)
        return traced

    monkeypatch.setattr(passes.trace, "to_aten", forgetful)
    found = pgcompile.explain(model(use_reentrant=False), **BATCH.inputs)
    assert "lost which nodes" in str(found)


def test_a_body_that_leaves_nothing():
    """A size, say: no mark is missing."""

    class Model(Bodies):
        def forward(self, ids):
            return super().forward(ids) * checkpoint(lambda x: x.shape[0], ids, use_reentrant=False)

    found = pgcompile.explain(Model(lambda m, a, b, c, x: c(b(a(x)))), BATCH.input_ids % 32)
    assert found.status == "packed" or "lost which nodes" not in str(found)


class LateBody(nn.Module):
    """Checkpoints what comes after packing: a mean over tokens."""

    def __init__(self):
        super().__init__()
        self.model = Bodies(lambda m, a, b, c, x: c(b(a(x))))

    def forward(self, ids):
        norm = self.model(ids).logsumexp(-1)
        return checkpoint(lambda norm: norm.mean() * self.model.weight[0], norm, use_reentrant=False)


@pytest.mark.parametrize("inner_compiler", ["eager", "aot_eager"])
def test_a_body_behind_the_packed_graph(inner_compiler, attention_calls):
    target = LateBody().double()
    ids = BATCH.input_ids % 32
    gradients = [
        torch.autograd.grad(call(ids), list(target.parameters()))
        for call in (target, fast(target, inner_compiler, strict=True))
    ]
    torch.testing.assert_close(*gradients)
    assert pgcompile.stats().packed == 1 and len(attention_calls) == LAYERS


@pytest.mark.parametrize("inner_compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_checkpoint_around_what_is_compiled(early_stop, inner_compiler, attention_calls):
    """The first call compiles in it, which must save nothing; the second run of a call stops by an exception."""
    target = model()
    compiled_target = fast(target, inner_compiler)

    def gradients(call, rows):
        with set_checkpoint_early_stop(early_stop):
            logits = call(*[x[:rows] for x in BATCH.inputs.values()])
            loss = logits[BATCH.kept[:rows]].square().sum()
            return torch.autograd.grad(loss, list(target.parameters()))

    for rows in (6, 6, 4):
        expected = gradients(target, rows)
        actual = gradients(functools.partial(checkpoint, compiled_target, use_reentrant=False), rows)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert pgcompile.stats().packed == (3 if early_stop else 6) and pgcompile.stats().dense == 0
