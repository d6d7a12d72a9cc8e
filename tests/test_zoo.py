"""The plain-PyTorch models pack, exactly, and compute one token per distinct prefix."""

import pytest
import torch

from harness import (
    BACKEND,
    assert_same,
    brute_force_packed_tokens,
    compiled,
    differences,
    float64_everywhere,
    random_tree_batch,
    rewire,
    run,
)
from zoo import ZOO

BATCHES = {
    "full": dict(rows=7, positions=10, padding="none", duplicates=2),
    "right": dict(rows=8, positions=11, padding="right", prefixes=2, holes=2),
    "left": dict(rows=8, positions=11, padding="left", prefixes=2, holes=2),
    "anywhere": dict(rows=6, positions=9, padding="both"),
    "adjacent_groups": dict(rows=9, positions=8, padding="none", trees=3, shuffle=False),
    "one_row": dict(rows=1, positions=7, padding="none", trees=1, duplicates=0),
    "one_position": dict(rows=6, positions=1, padding="none"),
    "rows_equal_heads": dict(rows=4, positions=8, padding="none"),
    "square": dict(rows=6, positions=6, padding="none"),
    "positions_equal_hidden": dict(rows=3, positions=32, padding="none"),
}
NEEDS_PADDING = {"right", "left", "anywhere"}


def model(name):
    torch.manual_seed(0)
    return rewire(ZOO[name]())


def is_supported(name, batch_name):
    return batch_name not in NEEDS_PADDING or ZOO[name].supports_padding


def key_columns(name, batch):
    columns = [batch.input_ids]
    if batch.attention_mask is not None:
        columns.append(batch.attention_mask)
    if ZOO[name].positions == "dense":
        columns.append(batch.dense_positions)
    return columns


def cases():
    return [(name, batch_name) for name in ZOO for batch_name in BATCHES if is_supported(name, batch_name)]


@pytest.mark.parametrize("name, batch_name", cases())
def test_packs_exactly(name, batch_name):
    batch = random_tree_batch(**BATCHES[batch_name], seed=3)
    with float64_everywhere():
        report = assert_same(model(name), (), batch.inputs, fullgraph=True, expect_status="packed")
    if BACKEND != "pgcompile":
        return
    expected = brute_force_packed_tokens(key_columns(name, batch), batch.kept)
    assert report.stats.packed_tokens == expected
    assert report.stats.valid_tokens == batch.kept.sum()
    assert report.stats.dense_tokens == batch.input_ids.numel()
    assert expected < report.stats.dense_tokens or batch_name == "one_row"


@pytest.mark.parametrize("name", ZOO)
def test_one_dynamic_compile_serves_many_batches(name):
    """Values and gradients stay exact over shapes and trees; the packed graph is compiled for them once."""
    original = model(name)
    fast = compiled(original, dynamic=True, fullgraph=True)
    if BACKEND == "pgcompile":
        import pgcompile

        pgcompile.reset_stats()
    expected_tokens = 0
    padding = ZOO[name].supports_padding and "right"
    for seed, (rows, positions) in enumerate([(5, 9), (8, 12), (3, 17), (6, 6), (4, 32)]):
        batch = random_tree_batch(rows=rows, positions=positions, seed=seed, padding=padding or "none")
        with float64_everywhere():
            expected = run(original, (), batch.inputs, kept=batch.kept)
            actual = run(fast, (), batch.inputs, kept=batch.kept, owner=original)
        assert not differences(actual, expected, 1e-10, 1e-9)
        expected_tokens += brute_force_packed_tokens(key_columns(name, batch), batch.kept)
    if BACKEND == "pgcompile":
        stats = pgcompile.stats()
        assert (stats.packed, stats.dense, stats.eager) == (5, 0, 0)
        assert stats.packed_tokens == expected_tokens
        assert stats.compiles == 1


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].supports_padding])
def test_padding_comes_back_as_zeros(name):
    if BACKEND != "pgcompile":
        pytest.skip("eager computes padding")
    batch = random_tree_batch(rows=5, positions=9, padding="right", seed=1)
    with torch.no_grad(), float64_everywhere():
        logits = compiled(model(name), fullgraph=True)(**batch.inputs)
    assert logits[~batch.kept].count_nonzero() == 0
    assert logits[batch.kept].count_nonzero() > 0


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name].supports_padding])
def test_a_fully_masked_row_is_harmless(name):
    batch = random_tree_batch(rows=5, positions=9, padding="right", seed=1)
    batch.attention_mask[2] = 0
    with float64_everywhere():
        report = assert_same(model(name), (), batch.inputs, fullgraph=True)
    assert all(not gradient.isnan().any() for gradient in report.compiled.gradients.values())


@pytest.mark.parametrize("name", ["nano_gpt", "half_rotary", "torch_mha"])
def test_frozen_parameters_and_no_grad(name):
    frozen = model(name)
    for index, parameter in enumerate(frozen.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    batch = random_tree_batch(rows=5, positions=8, seed=2)
    with float64_everywhere():
        assert_same(frozen, (), batch.inputs, fullgraph=True, expect_status="packed")
        with torch.no_grad():
            assert_same(frozen, (), batch.inputs, fullgraph=True, expect_status="packed")
        with torch.inference_mode():
            # The copies are made outside: an inference tensor's deepcopy is one too, and that is not what is tested.
            assert_same(frozen, (), batch.inputs, fullgraph=True, expect_status="packed")
