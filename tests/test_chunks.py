"""The head in chunks: the same values and gradients, and nothing as wide as the vocabulary for more than a chunk."""

import contextlib
import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pgcompile
from harness import BACKEND, assert_no_worse_than_eager, assert_same, compiled, float64_everywhere, rewire

pytest.importorskip("transformers")
from pgcompile import chunks, inner
from pgcompile.passes import head
from test_losses import LOGPROBS, LOSSES, NARROW, batch_of, columns_of, distillation, with_value_head
from tiny_hf import VOCAB, build

pytestmark = pytest.mark.skipif(BACKEND != "pgcompile", reason="looks at reports")


@pytest.fixture
def small_chunks(monkeypatch):
    """Seven tokens to a chunk, of a vocabulary of 31."""
    monkeypatch.setattr(head, "MIN_WIDTH", VOCAB)
    monkeypatch.setattr(head, "MIN_RATIO", 0)
    monkeypatch.setattr(chunks, "WHOLE_BYTES", 0)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 7 * VOCAB * 8)
    counts = []
    original = chunks.ChunkedHead.run

    def counting(*args):
        counts.append(args[-1])
        return original(*args)

    monkeypatch.setattr(chunks.ChunkedHead, "run", counting)
    return counts


def test_chunks_of_a_gpu_are_a_share_of_its_memory(monkeypatch):
    """float32 logits of 50,000 words: 200 kB for each token."""
    found = SimpleNamespace(token_bytes=50_000 * 4)
    memory = SimpleNamespace(total_memory=128 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [chunks.number_of_chunks(found, tokens, cpu) for tokens in (5000, 6000)] == [0, 18]
    assert [chunks.number_of_chunks(found, tokens, gpu) for tokens in (11_000, 85_000, 86_000)] == [0, 0, 9]
    memory.total_memory = 16 << 30
    assert [chunks.number_of_chunks(found, tokens, gpu) for tokens in (10_000, 11_000)] == [0, 9]


def small_llama(name="llama"):
    """Nothing in it is as wide as the vocabulary."""
    return build(name, hidden_size=16, intermediate_size=24)


def check(function, *args, chunked, model=None, **details):
    batch = batch_of()
    with float64_everywhere():
        assert_same(
            function, (model or small_llama(), batch.input_ids, batch.attention_mask, *args),
            kept=batch.kept[:, 1:], fullgraph=True, expect_status="packed", **details,
        )  # fmt: skip
    assert len(chunked) == 1 and chunked[0] > 1  # fewer where logits are asked for at some positions only


@pytest.mark.parametrize("spelling", LOGPROBS, ids=lambda f: f.__name__)
def test_logprobs(spelling, small_chunks):
    def function(model, ids, mask):
        return spelling(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], ids[:, 1:])

    check(function, chunked=small_chunks)


@pytest.mark.parametrize(
    "spelling", [s for s in NARROW if s.__name__ != "top_two_margin"], ids=lambda f: f.__name__
)
def test_narrow_values(spelling, small_chunks):
    def function(model, ids, mask):
        return spelling(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1])

    check(function, chunked=small_chunks)


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, small_chunks):
    check(LOSSES[name], columns_of(batch_of()), chunked=small_chunks)


def look_ups(model, ids, mask):
    """Three of them, into two values; the first tokens' values aren't looked up."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 2:-1]
    logps = logits.log_softmax(-1)
    some = torch.stack([ids[:, 3:], ids[:, 2:-1], torch.zeros_like(ids[:, 3:])], dim=-1)
    label = logps.gather(-1, ids[:, 3:, None]).squeeze(-1)
    return label, logps.gather(-1, some).logsumexp(-1), logits.gather(-1, some[..., :2]).sum(-1)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_several_look_ups(compiler, small_chunks, monkeypatch, fresh):
    """In chunks of two tokens, some of which answer for no label or for one, and the last of which has one token."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * VOCAB * 8)
    asked, original = set(), chunks.ChunkedHead._run_chunk

    def counting(head, part, requests):
        asked.add((part[0].shape[1], len(requests[0][0])))
        return original(head, part, requests)

    monkeypatch.setattr(chunks.ChunkedHead, "_run_chunk", counting)
    for seed in (3, 5):
        batch = batch_of(seed)
        with float64_everywhere():
            assert_same(
                look_ups, (small_llama(), batch.input_ids, batch.attention_mask), kept=batch.kept[:, 3:],
                options={"inner": compiler}, expect_status="packed", tol=1e-5, gradient_tol=1e-5,
            )  # fmt: skip
    assert len(small_chunks) == 2
    assert {(2, 0), (2, 1)} < asked and any(tokens == 1 for tokens, _ in asked)


def test_a_teacher_without_gradient(small_chunks):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.models = nn.ModuleList([small_llama(), small_llama("qwen2").requires_grad_(False)])

        def forward(self, ids, mask):
            return distillation(self.models, ids, mask)

    check(lambda model, ids, mask: model(ids, mask), model=Both(), chunked=small_chunks)


def test_values_that_leave_before_the_head(small_chunks):
    torch.manual_seed(1)
    check(with_value_head, rewire(nn.Linear(16, 1)), chunked=small_chunks)


def test_frozen_head(small_chunks):
    model = small_llama()
    model.lm_head.requires_grad_(False)
    check(LOSSES["reinforce"], columns_of(batch_of()), model=model, chunked=small_chunks)


def test_without_gradient(small_chunks):
    with torch.no_grad():
        check(LOSSES["grpo"], columns_of(batch_of()), chunked=small_chunks, backward=False)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_trunk_and_head_are_compiled_once(compiler, small_chunks, fresh):
    """For any number of chunks, and of tokens in a chunk."""
    model, reference = small_llama(), small_llama()
    fast = compiled(LOSSES["reinforce"], {"inner": compiler}, dynamic=True)
    for seed in range(4):
        batch = batch_of(seed)
        losses = [
            call(owner, batch.input_ids, batch.attention_mask, columns_of(batch))
            for call, owner in ((fast, model), (LOSSES["reinforce"], reference))
        ]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    assert len(small_chunks) == 4 and len(set(small_chunks)) > 1
    assert (pgcompile.stats().packed, pgcompile.stats().compiles) == (4, 2)


def in_32_bits(gm, inputs, options, **_):
    """An inner compiler that asks of each size whether it is small enough for kernels of 32 bits, as Triton's are."""
    shapes = [x.shape for x in inputs if isinstance(x, torch.Tensor)]
    assert all(bool(VOCAB * size <= 2**31 - 1) for shape in shapes for size in shape)
    return gm


def test_bounds_on_sizes_are_no_specialisation(small_chunks, monkeypatch, fresh):
    monkeypatch.setattr(inner, "compile_inner", in_32_bits)
    fast = compiled(LOSSES["reinforce"], {"inner": "inductor"}, dynamic=True)
    for seed in range(4):
        batch = batch_of(seed)
        fast(small_llama(), batch.input_ids, batch.attention_mask, columns_of(batch)).backward()
    assert len(small_chunks) == 4 and pgcompile.stats().compiles == 2


def test_a_label_out_of_range_raises(small_chunks, fresh):
    """Compiled kernels, which would end the process, never see it."""

    def function(model, ids, mask, labels):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, labels[:, 1:, None])

    batch = batch_of()
    labels = batch.input_ids.clone()
    fast = compiled(function, {"inner": "inductor"})
    fast(small_llama(), batch.input_ids, batch.attention_mask, labels)
    assert len(small_chunks) == 1
    labels[0, 3] = VOCAB
    with pytest.raises((RuntimeError, IndexError), match="out of"):
        fast(small_llama(), batch.input_ids, batch.attention_mask, labels)
    assert len(small_chunks) == 1


def candidates(model, ids, mask, labels):
    """Several entries for each token."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, labels[:, 1:]).logsumexp(-1)


@pytest.mark.parametrize("in_chunks", [False, True])
def test_any_number_of_entries_compiles_once(in_chunks, small_chunks, monkeypatch, fresh):
    if not in_chunks:
        monkeypatch.setattr(chunks, "WHOLE_BYTES", 1 << 30)
    model, batch = small_llama(), batch_of()
    fast = compiled(candidates, {"inner": "aot_eager"}, dynamic=True)
    n, s = batch.input_ids.shape
    for entries in (2, 5, 3, 9):
        args = model, batch.input_ids, batch.attention_mask, torch.randint(VOCAB, (n, s, entries))
        kept = batch.kept[:, 1:]
        torch.testing.assert_close(fast(*args)[kept], candidates(*args)[kept], rtol=1e-4, atol=1e-4)
    assert len(small_chunks) == 4 * in_chunks
    assert (pgcompile.stats().packed, pgcompile.stats().compiles) == (4, 1 + in_chunks)


def test_a_head_that_the_compiler_fails_on_runs_eagerly(small_chunks, monkeypatch, fresh, caplog):
    """Once it is known, nothing is compiled in vain."""
    original, attempts = inner.compile_inner, []

    def failing(gm, *args, **details):
        if not any("prefix_attention" in str(node.target) for node in gm.graph.nodes):
            attempts.append(gm)
            raise RuntimeError("no kernels for heads")
        return original(gm, *args, **details)

    monkeypatch.setattr(inner, "compile_inner", failing)
    model, reference = small_llama(), small_llama()
    fast = compiled(LOSSES["reinforce"], {"inner": "aot_eager"}, dynamic=True)
    for seed in range(2):
        batch = batch_of(seed)
        args = batch.input_ids, batch.attention_mask, columns_of(batch)
        losses = fast(model, *args), LOSSES["reinforce"](reference, *args)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert len(small_chunks) == 2 == pgcompile.stats().packed and len(attempts) == 1
    assert "no kernels for heads" in caplog.text


def test_logits_that_are_asked_for_are_not_chunked(small_chunks):
    def function(model, ids, mask):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return logits, logits.logsumexp(-1)

    batch = batch_of()
    with float64_everywhere():
        assert_same(
            function, (small_llama(), batch.input_ids, batch.attention_mask), kept=batch.kept[:, 1:],
            expect_status="packed",
        )  # fmt: skip
    assert small_chunks == []


def test_small_batches_run_whole():
    batch = batch_of()
    found = pgcompile.explain(
        LOSSES["reinforce"], small_llama(), batch.input_ids, batch.attention_mask, columns_of(batch),
        options={"min_saving": 0},
    )  # fmt: skip
    assert found.batches[0].head_chunks == 0 and found.graphs[0].head == []


def test_the_report_says_what_is_computed_again(small_chunks):
    batch = batch_of()
    found = pgcompile.explain(
        LOSSES["reinforce"], small_llama(), batch.input_ids, batch.attention_mask, columns_of(batch),
        options={"min_saving": 0},
    )  # fmt: skip
    assert found.batches[0].head_chunks == small_chunks[0] > 3
    assert any("linear" in name for name in found.graphs[0].head)
    assert any("log_softmax" in name for name in found.graphs[0].head)
    assert not any("attention" in name for name in found.graphs[0].head)
    assert f"the head runs in {small_chunks[0]} chunks" in str(found)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor with the vocabulary's width that any operation returned, in backward too; and what
    memory those tensors of tokens were in."""

    def __init__(self):
        super().__init__()
        self.most, self.seen = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 1 and leaf.shape[-1] == VOCAB:
                self.most = max(self.most, leaf.numel())
                if leaf.shape[-2] != 16:  # as weights have
                    self.seen.append(weakref.ref(leaf.untyped_storage()))
        return result


def test_nothing_wide_is_larger_than_a_chunk(small_chunks, monkeypatch):
    """Weights of the head are [V, D], and transposed [D, V] in backward: they have 16 rows."""
    mode, original = Largest(), chunks.ChunkedHead.run

    def watched(*args):
        with mode:
            return original(*args)

    monkeypatch.setattr(chunks.ChunkedHead, "run", watched)
    batch = batch_of()
    fast = compiled(LOSSES["reinforce"])
    loss = fast(small_llama(), batch.input_ids, batch.attention_mask, columns_of(batch))
    assert mode.seen and all(storage() is None for storage in mode.seen)  # nothing is kept for backward
    with mode:
        loss.backward()
    assert 0 < mode.most <= 16 * VOCAB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_chunks_are_rounded_once(dtype, small_chunks, monkeypatch):
    """Half-precision weights: no worse than eager, although their gradients are sums over chunks."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 7 * VOCAB * 2)
    model = small_llama().to(dtype)
    truth_model = copy.deepcopy(model).double()
    fast = compiled(LOSSES["reinforce"])

    def tensors(side, seed):
        batch = batch_of(seed)
        owner = truth_model if side == "truth" else model
        owner.zero_grad(set_to_none=True)
        call = fast if side == "compiled" else LOSSES["reinforce"]
        context = float64_everywhere() if side == "truth" else contextlib.nullcontext()
        with context:
            call(owner, batch.input_ids, batch.attention_mask, columns_of(batch)).backward()
        return {n: p.grad.clone() for n, p in owner.named_parameters()}

    assert_no_worse_than_eager(tensors, torch.finfo(dtype).eps)
    assert len(small_chunks) == 5 and min(small_chunks) > 1


def test_gradients_of_chunks_add_up_in_float32_under_autocast(small_chunks, monkeypatch):
    """Chunks that ran in bfloat16 each give float32 weights a gradient; autocast would let them share a cast."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * VOCAB * 4)
    casts, original = [], chunks.ChunkedHead._run_chunk

    def counting(*args):
        casts.append(torch.is_autocast_cache_enabled())
        return original(*args)

    monkeypatch.setattr(chunks.ChunkedHead, "_run_chunk", counting)
    batch, model = batch_of(), small_llama()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(LOSSES["reinforce"])(model, batch.input_ids, batch.attention_mask, columns_of(batch))
        assert torch.is_autocast_cache_enabled()
    added = []
    model.lm_head.weight.register_hook(lambda gradient: added.append(gradient.bfloat16().float() - gradient))
    loss.backward()
    assert len(casts) == small_chunks[0] > 1 and not any(casts)
    assert added[0].abs().max() > 0  # a sum of bfloat16 numbers, added up in bfloat16, were one
