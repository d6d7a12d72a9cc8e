"""Whole models on a GPU, by every engine that it has: packing, attention, chunked heads, unpacking and backward."""

import copy
import warnings

import pytest
import torch

import pgcompile
from harness import assert_no_worse_than_eager, compiled, float64_everywhere, random_tree_batch
from pgcompile import chunks
from pgcompile.engines import ENGINES
from pgcompile.passes import head
from tiny_hf import build

DEVICE = torch.device("cuda")
VOCAB = 131
ON_GPUS = [name for name in ENGINES if ENGINES[name].why_not(DEVICE, torch.bfloat16) is None]


def loss(model, ids, mask):
    """Of each row another multiple; ids behind padding don't count."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    kept = (mask[:, 1:] * mask[:, :-1]).float()
    return (logprobs * kept * torch.linspace(-1, 1, len(ids), device=ids.device)[:, None]).sum() / kept.sum()


def batch_on_gpu(seed: int, padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch = random_tree_batch(rows=8, positions=40, padding=padding, seed=seed, vocab=VOCAB)
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    return batch.input_ids.to(DEVICE), mask.to(DEVICE)


@pytest.fixture(params=[False, True], ids=["whole", "chunked"])
def chunked(request, monkeypatch):
    """Does the head run in chunks, of seven tokens? Nothing else in the model is as wide."""
    counts = []
    original = chunks.ChunkedHead.run
    monkeypatch.setattr(chunks.ChunkedHead, "run", lambda *args: counts.append(args[-1]) or original(*args))
    if request.param:
        monkeypatch.setattr(head, "MIN_WIDTH", VOCAB)
        monkeypatch.setattr(head, "MIN_RATIO", 0)
        monkeypatch.setattr(chunks, "WHOLE_BYTES", 0)
        monkeypatch.setattr(chunks, "CHUNK_BYTES", 7 * VOCAB * 2)
        monkeypatch.setattr(chunks, "GPU_WHOLE_SHARE", 1 << 60)
        monkeypatch.setattr(chunks, "GPU_CHUNK_SHARE", 1 << 60)
    yield request.param
    assert bool(counts) == request.param and all(count > 1 for count in counts)


def small_llama():
    return build("llama", vocab_size=VOCAB, hidden_size=64, intermediate_size=24).to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("padding", ["none", "left", "both"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("engine", ON_GPUS)
def test_gradients_are_no_worse_than_eager(engine, inner, padding, chunked):
    model = small_llama()
    truth_model = copy.deepcopy(model).double()
    fast = compiled(loss, {"inner": inner, "engine": engine, "strict": True}, dynamic=True)
    pgcompile.reset_stats()

    def tensors(side, seed):
        batch = batch_on_gpu(seed, padding)
        owner = truth_model if side == "truth" else model
        owner.zero_grad(set_to_none=True)
        if side == "truth":
            with float64_everywhere():
                loss(truth_model, *batch).backward()
        else:
            (fast if side == "compiled" else loss)(model, *batch).backward()
        return {name: p.grad.clone() for name, p in owner.named_parameters()}

    assert_no_worse_than_eager(tensors, torch.finfo(torch.bfloat16).eps)
    assert (pgcompile.stats().packed, pgcompile.stats().dense) == (5, 0)


def test_the_host_waits_once(chunked):
    """For the columns of the batch; where a head runs in chunks, for their ends as well."""
    model = small_llama()
    fast = compiled(loss, {"inner": "eager", "strict": True}, dynamic=True)
    batches = [batch_on_gpu(seed, "both") for seed in range(3)]
    for batch in batches[:2]:
        fast(model, *batch).backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fast(model, *batches[2]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 1 + chunked, waits


def test_each_stream_has_its_own_tree():
    """What one stream copies and works out isn't waited for on another."""
    model = small_llama()
    fast = compiled(loss, {"inner": "eager", "strict": True}, dynamic=True)
    batch = batch_on_gpu(0, "both")
    side = torch.cuda.Stream()
    pgcompile.reset_stats()
    found = []
    for stream in (torch.cuda.current_stream(), side, side):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            fast(model, *batch).backward()
        torch.cuda.synchronize()
        found.append(([p.grad for p in model.parameters()], pgcompile.stats().plans_reused))
    (expected, _), *others = found
    assert [reused for _, reused in found] == [0, 0, 1]
    for gradients, _ in others:
        torch.testing.assert_close(gradients, expected, rtol=2**-6, atol=2**-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_gathers_and_their_gradients(dtype):
    """Against indexing in float64; most copies are of one token, or of none."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-50, 20, (400,), generator=generator).clamp(min=-1)
    index[100:300] = 3
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x = torch.randn(20, 3, 5, dtype=wide, generator=generator).to(dtype)
    grad = torch.randn(400, 3, 5, dtype=wide, generator=generator).to(dtype)
    exact = x.to(wide).requires_grad_()
    expected = exact[index.clamp(min=0)] * (index >= 0)[:, None, None]
    expected.backward(grad.to(wide))
    leaf = x.to(DEVICE).requires_grad_()
    found = torch.ops.pgcompile.gather_tokens(leaf, index.to(DEVICE))
    found.backward(grad.to(DEVICE))
    tolerance = 1e-5 if dtype != torch.bfloat16 else torch.finfo(dtype).eps
    assert torch.equal(found.cpu().to(wide), expected.detach())
    torch.testing.assert_close(leaf.grad.cpu().to(wide), exact.grad, rtol=tolerance, atol=tolerance)


def test_entries_and_their_gradients():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-5, 20, (400,), generator=generator).clamp(min=-1)
    column = torch.randint(0, 9, (400, 1), generator=generator)
    x = torch.randn(20, 9, generator=generator).bfloat16()
    grad = torch.randn(400, 1, generator=generator).bfloat16()
    exact = x.double().requires_grad_()
    (exact[index.clamp(min=0)].gather(1, column) * (index >= 0)[:, None]).backward(grad.double())
    leaf = x.to(DEVICE).requires_grad_()
    torch.ops.pgcompile.gather_entries(leaf, index.to(DEVICE), column.to(DEVICE)).backward(grad.to(DEVICE))
    torch.testing.assert_close(leaf.grad.cpu().double(), exact.grad, rtol=2**-8, atol=1e-5)
