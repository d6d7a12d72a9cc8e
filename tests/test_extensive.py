"""What `make test-all` adds: inductor on fourteen models, every dtype and padding, larger trees."""

import copy

import pytest
import torch

import pgcompile
from harness import (
    BACKEND,
    assert_no_worse_than_eager,
    assert_same,
    brute_force_packed_tokens,
    compiled,
    float64_everywhere,
    random_tree_batch,
)

pytest.importorskip("transformers")
from test_models_hf import key_columns, shifted_labels
from tiny_hf import CONFIGS, VOCAB, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BACKEND != "pgcompile", reason="compares pgcompile with eager"),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_inductor(name, dynamic):
    """In float64; casts to float32 inside of the models cost digits."""
    batch = random_tree_batch(rows=7, positions=11, padding="right", prefixes=2, vocab=VOCAB, seed=5)
    kwargs = batch.inputs | {"labels": shifted_labels(batch), "use_cache": False}
    assert_same(
        build(name), (), kwargs, options={"inner": "inductor"}, kept=batch.kept, dynamic=dynamic, tol=1e-5,
        gradient_tol=1e-4, expect_status="packed",
    )  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "right", "left", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_no_worse_than_eager(name, dtype, padding):
    model = build(name).to(dtype)
    truth_model = copy.deepcopy(model).double()
    fast = compiled(model)

    def tensors(side, seed):
        batch = random_tree_batch(rows=8, positions=16, padding=padding, vocab=VOCAB, seed=seed)
        inputs = batch.inputs | {"use_cache": False}
        owner = truth_model if side == "truth" else model
        owner.zero_grad(set_to_none=True)
        if side == "truth":
            with float64_everywhere():
                logits = owner(**inputs).logits
        else:
            logits = (fast if side == "compiled" else model)(**inputs).logits
        logits = (logits * batch.kept[..., None]).to(torch.promote_types(dtype, torch.float32))
        (logits.log_softmax(-1)[..., 3] * batch.kept).sum().backward()
        return {"logits": logits.detach()} | {
            n: p.grad.clone()
            for n, p in owner.named_parameters()
            if p.grad is not None and p.grad.norm() > 1e-9
        }

    pgcompile.reset_stats()
    assert_no_worse_than_eager(tensors, torch.finfo(dtype).eps)
    assert (pgcompile.stats().packed, pgcompile.stats().dense, pgcompile.stats().eager) == (5, 0, 0)


@pytest.mark.parametrize("padding", ["none", "right", "left", "both"])
@pytest.mark.parametrize("name", CONFIGS)
def test_larger_trees(name, padding):
    batch = random_tree_batch(
        rows=40, positions=60, trees=3, duplicates=4, prefixes=4, padding=padding, vocab=VOCAB, seed=1
    )
    with float64_everywhere():
        report = assert_same(
            build(name), (), batch.inputs | {"use_cache": False}, kept=batch.kept, fullgraph=True,
            expect_status="packed",
        )  # fmt: skip
    assert report.stats.packed_tokens == brute_force_packed_tokens(key_columns(name, batch), batch.kept)
