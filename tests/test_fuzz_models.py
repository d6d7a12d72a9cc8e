"""Models of randomly drawn parts on random trees: all of them pack, exactly, one token per distinct prefix."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from harness import (
    BACKEND,
    assert_same,
    brute_force_packed_tokens,
    float64_everywhere,
    random_tree_batch,
    rewire,
)
from zoo.random_lm import CHOICES, Parts, RandomLM

VOCAB = 7


@st.composite
def drawn_parts(draw):
    parts = {name: draw(st.sampled_from(values)) for name, values in CHOICES.items()}
    if parts["norm"] == "none":
        parts["scale"] = 0.1  # without a norm, scores grow
    if parts["positions"] == "partial":
        parts["head_size"] = 4
    return Parts(**parts)


def check(parts: Parts, padding: str, seed: int, dynamic: bool) -> None:
    torch.manual_seed(seed)
    model = rewire(RandomLM(parts, VOCAB), seed=seed)
    batch = random_tree_batch(
        rows=3 + seed % 6, positions=4 + seed % 9, padding=padding, vocab=VOCAB, seed=seed
    )
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    ignores_mask = parts.mask == "is_causal" and parts.attention == "sdpa" and not is_local_only(parts)
    with float64_everywhere():
        report = assert_same(
            model,
            (batch.input_ids, mask),
            kept=batch.kept,
            dynamic=dynamic,
            fullgraph=True,
            expect_status="packed",
        )
    if BACKEND == "pgcompile" and not ignores_mask:
        expected = brute_force_packed_tokens([batch.input_ids, batch.dense_positions, mask], batch.kept)
        if parts.positions == "none":  # rows at other columns may share tokens, within a chunk or anywhere
            assert report.stats.packed_tokens <= expected
        else:
            assert report.stats.packed_tokens == expected


def is_local_only(parts: Parts) -> bool:
    return parts.window_every == 1 and (parts.window is not None or parts.chunk is not None)


def fuzz(examples):
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def draws(test):
    arguments = dict(
        parts=drawn_parts(),
        padding=st.sampled_from(["none", "right", "left"]),
        seed=st.integers(0, 999),
        dynamic=st.sampled_from([False, True]),
    )
    return given(**arguments)(test)


@fuzz(14)
@draws
def test_drawn_models(parts, padding, seed, dynamic):
    check(parts, padding, seed, dynamic)


@pytest.mark.slow
@settings(fuzz(400), derandomize=False)
@draws
def test_many_drawn_models(parts, padding, seed, dynamic):
    check(parts, padding, seed, dynamic)


@pytest.mark.parametrize(
    "field, value", [(name, value) for name, values in CHOICES.items() for value in values]
)
def test_each_part_by_itself(field, value):
    """So that a part that is refused has a test that says so."""
    check(Parts(**{field: value}), "right", 5, False)
