"""Activation checkpointing inside of what is compiled: packed, and still checkpointed."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from harness import BACKEND, differences, named_tensors, random_tree_batch, run
from tiny_hf import build
from zoo.gpt2_conv1d import GPT2Conv1D

if BACKEND != "pgcompile":
    pytest.skip("about what pgcompile packs", allow_module_level=True)

import pgcompile
from pgcompile import inner
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
def attention_calls(monkeypatch):
    """How often attention ran forward."""
    calls = []
    forward = reference.attention
    monkeypatch.setattr(reference, "attention", lambda *a, **k: calls.append(1) or forward(*a, **k))
    torch._dynamo.reset()
    inner._families.clear()
    pgcompile.reset_stats()
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


@pytest.mark.parametrize("inner_compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("nested", [False, True])
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
