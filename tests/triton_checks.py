"""What is particular to the triton engine. The contract is in test_ops.py; test_triton.py runs both in an interpreter.

On a machine with a GPU: `python -m pytest tests/test_ops.py tests/triton_checks.py` runs the kernels as compiled.
"""

import gc

import pytest
import torch

import pgcompile
from harness import compiled, random_tree_batch, rewire
from pgcompile.engines import Scores, blocks, per_plan, triton
from test_ops import (
    SAME_VALUE,
    assert_equals_brute_force,
    attend,
    brute_force,
    close_to,
    columns,
    gradients,
    home,
    inputs,
    use_small_tiles,
)
from trees import random_tree, tree_of_rows
from zoo import ZOO

TREE = random_tree(0)

# A prompt and its answers: enough tokens in a row that some tiles are full.
PROMPT = list(range(50))
ANSWERS = tree_of_rows([PROMPT + [100 * n + i for i in range(20)] for n in range(1, 3)])


@pytest.mark.parametrize("masked", ["nothing", "columns"])
@pytest.mark.parametrize("window", [None, 53])
def test_full_tiles(window, masked, monkeypatch):
    use_small_tiles(monkeypatch, 3)
    tiling = next(iter(triton.TILINGS.values())).forward
    for lists in (blocks.key_lists, blocks.query_lists):
        _, begin, split, end = lists(ANSWERS.segments, *tiling[:2], window, torch.device("cpu")).rows_R4.T
        assert (begin < split).any() and (split < end).any()
    mask = {}
    if masked == "columns":  # they hide something in full tiles, but not all
        mask = {"key_valid": columns(ANSWERS)["key_valid"], "same_value": [ANSWERS.depth // 45]}
    assert_equals_brute_force(ANSWERS, inputs(ANSWERS, heads=2, key_heads=1), "triton", window=window, **mask)


@pytest.mark.parametrize("size, value_size", [(1, 1), (20, 3), (16, 33), (3, 80)])
def test_head_sizes_that_are_no_powers_of_two(size, value_size, monkeypatch):
    use_small_tiles(monkeypatch, 3)
    assert_equals_brute_force(TREE, inputs(TREE, size=size, value_size=value_size), "triton")


def test_heads_that_are_too_large_run_on_the_next_engine():
    qkv = inputs(TREE, size=triton.LARGEST_HEAD + 1)
    assert "513" in triton.why_not_heads(513, Scores(1.0))
    expected = brute_force(TREE, *qkv)[0]
    found = attend(TREE, *qkv, engine="triton")[0].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


LAYOUTS = {
    "rows are not adjacent columns": lambda x: x.mT.contiguous().mT,
    "heads first": lambda x: x.contiguous(),
    "slice of a wider tensor": lambda x: torch.cat([x + 1, x], -1)[..., x.shape[-1] :],
    "every other token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "one head for all": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout, monkeypatch):
    use_small_tiles(monkeypatch, 128)
    qkv = [LAYOUTS[layout](x) for x in inputs(TREE)]
    expected = gradients(lambda *x: brute_force(TREE, *x)[0], [x.contiguous() for x in qkv])
    device = home("triton")
    q, k, v = (LAYOUTS[layout](x.float().to(device)).detach().requires_grad_() for x in qkv)
    assert q.stride() != inputs(TREE)[0].stride()
    out = attend(TREE, q, k, v, engine="triton")[0]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    grad = LAYOUTS[layout](grad.to(device)) if layout != "one head for all" else grad.to(device)
    for a, e in zip([out, *torch.autograd.grad(out, (q, k, v), grad)], expected, strict=True):
        close_to(a.cpu(), e, "triton")


def test_output_gradients_without_strides():
    """What `out.sum().backward()` gives: one number, expanded."""
    qkv = [x.requires_grad_() for x in inputs(TREE)]
    expected = torch.autograd.grad(brute_force(TREE, *qkv)[0].sum(), qkv)
    actual = torch.autograd.grad(attend(TREE, *qkv, engine="triton")[0].sum(), qkv)
    for a, e in zip(actual, expected, strict=True):
        close_to(a, e, "triton")


def test_offsets_beyond_32_bits():
    """Keys 2³¹ elements apart in all. (Only what is touched of the 4 GiB takes memory.)"""
    stride = (1 << 31) // (TREE.tokens - 1) + 1
    q, k, v = (x.half() for x in inputs(TREE, heads=1, key_heads=1))
    space = torch.empty(TREE.tokens * stride, dtype=torch.half, device=home("triton"))
    far = space.as_strided(k.shape, (0, 0, stride, 1)).copy_(k)
    for a, b in zip(
        gradients(lambda k: attend(TREE, q, k, v, engine="triton"), [far]),
        gradients(lambda k: attend(TREE, q, k, v, engine="triton"), [k]),
        strict=True,
    ):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("name", SAME_VALUE)
def test_values_that_must_agree(name, monkeypatch):
    use_small_tiles(monkeypatch, 3)
    values = [SAME_VALUE[name](TREE.depth), TREE.depth // 5]
    assert_equals_brute_force(TREE, inputs(TREE), "triton", same_value=values)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_model_equals_its_original_and_block_lists_are_built_once_for_all_layers(inner, monkeypatch):
    use_small_tiles(monkeypatch, 3)  # one tiling: forward and dq read the same lists
    torch._dynamo.reset()
    pgcompile.reset_stats()
    torch.manual_seed(0)
    model = rewire(ZOO["nano_gpt"](dim=16, layers=2)).to(home("triton"), torch.float32)
    fast = compiled(model, {"inner": inner, "engine": "triton", "check": 1})
    built, before = [], len(per_plan._built)
    build = blocks.Pairs.of
    monkeypatch.setattr(blocks.Pairs, "of", lambda *args: built.append(args) or build(*args))
    for batches in (1, 2):
        batch = random_tree_batch(rows=6, positions=9, seed=batches)
        fast(batch.input_ids.to(home("triton"))).square().sum().backward()
        assert len(built) == 2 * batches
    assert (pgcompile.stats().packed, pgcompile.stats().checked) == (2, 1)
    del fast, model
    torch._dynamo.reset()
    gc.collect()
    assert len(per_plan._built) == before, "lists that outlive their plan"


def test_an_engine_that_cannot_run_is_refused_at_the_call():
    model = rewire(ZOO["nano_gpt"](dim=16, layers=1)).to(home("triton"))
    fast = compiled(model, {"engine": "triton"})
    with pytest.raises(ValueError, match=r"'triton' can't run torch.float64"):
        fast(random_tree_batch(rows=6, positions=9, seed=0).input_ids.to(home("triton")))
