"""How engine cpu splits a tree into calls of its kernel; what it computes is in test_ops.py, for all engines."""

import pytest
import torch

from pgcompile.engines import cpu
from trees import random_tree, tree_of_rows

TREES = {
    **{f"random {seed}": lambda seed=seed: random_tree(seed, rows=14, length=12) for seed in range(4)},
    **{
        f"one row of {length}": lambda length=length: tree_of_rows([range(length)])
        for length in (1, 4, 5, 8, 9, 31)
    },
    "group": lambda: tree_of_rows([[0] * 16 + [n] * 16 for n in range(1, 4)]),
    "ragged": lambda: tree_of_rows([[0] * 13 + [n] * (3 * n) for n in range(1, 6)]),
}


@pytest.mark.parametrize("causal_tokens", [1, 4, 256])
@pytest.mark.parametrize("name", TREES)
def test_every_pair_is_computed_once(name, causal_tokens, monkeypatch):
    monkeypatch.setattr(cpu, "CAUSAL_TOKENS", causal_tokens)
    tree = TREES[name]()
    times = torch.zeros(tree.tokens, tree.tokens, dtype=torch.int64)
    for call in cpu.calls(tree.segments):
        queries, keys = call.queries.indices_BL, call.keys.indices_BL
        assert len(queries.unique()) == queries.numel() and len(keys.unique()) == keys.numel()
        pairs = torch.ones(len(queries), queries.shape[1], keys.shape[1], dtype=torch.int64)
        times[queries[..., None], keys[:, None]] += pairs.tril() if call.is_causal else pairs
    assert torch.equal(times, tree.visible().long())


@pytest.mark.parametrize("causal_tokens", [1, 4, 256])
@pytest.mark.parametrize("name", TREES)
def test_tokens_by_themselves_come_first_and_are_few(name, causal_tokens, monkeypatch):
    monkeypatch.setattr(cpu, "CAUSAL_TOKENS", causal_tokens)
    tree = TREES[name]()
    calls = cpu.calls(tree.segments)
    first = [call for call in calls if call.is_causal]
    assert calls[: len(first)] == first
    written = torch.cat([call.queries.indices_BL.flatten() for call in first])
    assert torch.equal(written.sort().values, torch.arange(tree.tokens))
    assert all(call.queries.length <= causal_tokens for call in first)


def test_pieces_of_one_length_are_one_call(monkeypatch):
    """Of all segments: the group has 4 of 16 tokens, so 4 pieces each, and of halves 4 of 8 and 8 of 4."""
    monkeypatch.setattr(cpu, "CAUSAL_TOKENS", 4)
    calls = cpu.calls(TREES["group"]().segments)
    assert [(len(c.queries), c.queries.length, c.keys.length) for c in calls] == [
        (16, 4, 4), (8, 4, 4), (4, 8, 8), (1, 48, 16),
    ]  # fmt: skip
    assert all(c.queries.are_views and c.keys.are_views for c in calls)
