"""Micro-batches: every row once, groups together, and the counts are those of the packed graph."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import pgcompile
from pgcompile.batching import PAIR_COST, MicrobatchSampler, plan_microbatches, shuffle_groups
from zoo.gpt2_conv1d import GPT2Conv1D

ROWS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=7)
SEEDS = st.none() | st.integers(0, 3)


def prefixes(rows):
    return {tuple(row[: n + 1]) for row in rows for n in range(len(row))}


def work(rows, pair_cost):
    return sum(1 + pair_cost * len(prefix) for prefix in prefixes(rows))


@settings(deadline=None)
@given(ROWS, st.integers(6, 20), SEEDS, st.none() | st.integers(1, 4))
def test_every_row_is_in_one_microbatch_within_the_budget(rows, budget, seed, max_rows):
    planned = plan_microbatches(rows, budget, seed=seed, max_rows=max_rows)
    assert sorted(n for batch in planned for n in batch) == list(range(len(rows)))
    for batch in planned:
        assert len(prefixes(rows[n] for n in batch)) <= budget
        assert len(batch) <= (max_rows or len(rows))


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(6, 20), SEEDS, st.sampled_from([0.0, PAIR_COST, 0.5]))
def test_no_cut_of_the_same_order_has_fewer_runs_or_a_smaller_largest(rows, budget, seed, pair_cost):
    planned = plan_microbatches(rows, budget, seed=seed, pair_cost=pair_cost)
    order = [n for batch in planned for n in batch]
    largest = max(work([rows[n] for n in batch], pair_cost) for batch in planned)
    for count in range(len(planned)):
        for inner in combinations(range(1, len(order)), count):
            runs = [[rows[n] for n in order[a:b]] for a, b in pairwise([0, *inner, len(order)])]
            if all(len(prefixes(run)) <= budget for run in runs):
                assert len(runs) == len(planned)
                assert largest <= max(work(run, pair_cost) for run in runs) * 1.002


@settings(deadline=None)
@given(ROWS, SEEDS)
def test_rows_that_share_a_prefix_stay_together(rows, seed):
    order = shuffle_groups(rows, seed=seed)
    assert sorted(order) == list(range(len(rows)))
    assert order == shuffle_groups(rows, seed=seed)
    for prefix in prefixes(rows):
        at = [i for i, n in enumerate(order) if tuple(rows[n][: len(prefix)]) == prefix]
        assert at == list(range(at[0], at[0] + len(at))), prefix


def test_every_order_of_the_children_comes_up():
    rows = [[1, 2], [1, 3], [4]]
    orders = {tuple(shuffle_groups(rows, seed=seed)) for seed in range(64)}
    assert orders == {(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)}


def test_all_spellings_of_the_rows_give_the_same_plan():
    rows = np.random.default_rng(0).integers(0, 2, (32, 6))
    expected = plan_microbatches(rows, 12, seed=5)
    assert len(expected) > 3
    ones = torch.ones(32, 6)
    for spelling in (
        rows.tolist(),
        torch.from_numpy(rows),
        list(torch.from_numpy(rows).to(torch.int32)),
        rows.astype(np.uint8),
    ):
        assert plan_microbatches(spelling, 12, seed=5) == expected
    masked = plan_microbatches(torch.from_numpy(rows), 12, attention_mask=ones)
    assert sorted(len(batch) for batch in masked) == sorted(len(b) for b in plan_microbatches(rows, 12))


def test_padding_costs_nothing_and_positions_count():
    left, right = [0, 0, 5, 6], [5, 6, 0, 0]
    mask = [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert len(plan_microbatches(np.array([right, right]), 2, attention_mask=[mask[1], mask[1]])) == 1
    ids = np.array([left, right])
    assert len(plan_microbatches(ids, 2, attention_mask=mask)) == 2  # by column, positions differ
    assert len(plan_microbatches(ids, 4, attention_mask=mask)) == 1
    counted = [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert len(plan_microbatches(ids, 2, attention_mask=mask, position_ids=counted)) == 1
    hole = [[1, 0, 1, 1], [1, 1, 1, 1]]
    same = np.array([[7, 8, 9, 9], [7, 8, 9, 9]])
    assert len(plan_microbatches(same, 6, attention_mask=hole)) == 2  # a masked token isn't the token


def grpo_like(generator):
    """Six groups of four rows, shuffled; answers of several lengths."""
    prompts = torch.randint(1, 31, (6, 20), generator=generator).repeat_interleave(4, 0)
    ids = torch.cat([prompts, torch.randint(1, 31, (24, 6), generator=generator)], 1)
    lengths = torch.randint(21, 27, (24, 1), generator=generator)
    mask = (torch.arange(26) < lengths).long()
    order = torch.randperm(24, generator=generator)
    return (ids * mask)[order], mask[order]


def test_the_counts_are_those_of_the_packed_graph():
    ids, mask = grpo_like(torch.Generator().manual_seed(0))
    model = torch.compile(
        GPT2Conv1D().double(), backend="pgcompile", options={"inner": "eager", "min_saving": 0}
    )
    budget, tokens = 60, []
    for batch in plan_microbatches(ids, budget, attention_mask=mask):
        pgcompile.reset_stats()
        model(ids[batch], mask[batch])
        tokens.append(pgcompile.stats().packed_tokens)
    distinct = len({tuple(ids[n, : s + 1].tolist()) for n in range(24) for s in range(mask[n].sum())})
    assert max(tokens) <= budget and len(tokens) > 3
    assert sum(tokens) <= distinct + 20 * (len(tokens) - 1)  # each cut repeats at most one prompt


def test_accumulated_gradients_are_those_of_the_whole_batch():
    ids, mask = grpo_like(torch.Generator().manual_seed(1))
    model = GPT2Conv1D().double()

    def accumulate(step, batches):
        model.zero_grad()
        for batch in batches:
            logits = step(ids[batch], mask[batch])
            (logits.square().mean(-1) * mask[batch]).sum().div(mask.sum()).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = accumulate(model, [list(range(24))])
    packed = torch.compile(model, backend="pgcompile", options={"inner": "eager"})
    pgcompile.reset_stats()
    actual = accumulate(packed, plan_microbatches(ids, 60, attention_mask=mask, seed=3))
    assert pgcompile.stats().packed > 3
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_sampler_plans_each_epoch():
    ids, mask = grpo_like(torch.Generator().manual_seed(2))
    sampler = MicrobatchSampler(ids, 60, attention_mask=mask, seed=1)
    loader = DataLoader(TensorDataset(ids, mask), batch_sampler=sampler)
    first = list(sampler)
    assert len(loader) == len(first) == len(list(loader))
    assert sorted(n for batch in first for n in batch) == list(range(24))
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first == list(MicrobatchSampler(ids, 60, attention_mask=mask, seed=1))
    plain = MicrobatchSampler(ids, 60, attention_mask=mask, shuffle=False)
    assert list(plain) == plan_microbatches(ids, 60, attention_mask=mask)


@pytest.mark.parametrize("budget", [0, -5, None, "10", True])
def test_bad_budgets(budget):
    with pytest.raises(ValueError, match="budget must be a number of tokens, at least 1"):
        plan_microbatches([[1]], budget)


@pytest.mark.parametrize(
    ("rows", "options", "error", "says"),
    [
        ([[1, 2, 3], [1]], {}, ValueError, "row 0 has 3 tokens, more than the budget of 2"),
        ([[1.5]], {}, TypeError, "token ids must be integers, got float64"),
        ([1, 2], {}, ValueError, "got an array of shape"),
        ([[1]], {"attention_mask": [[1]]}, ValueError, "attention_mask: only for rows in one array"),
        (np.ones((2, 2), int), {"attention_mask": [[1]]}, ValueError, r"has shape \(1, 1\)"),
        ([[1]], {"max_rows": 0}, ValueError, "max_rows must be at least 1, got 0"),
        ([[1]], {"pair_cost": -1}, ValueError, "pair_cost must be a number of at least 0, got -1"),
    ],
)
def test_bad_input(rows, options, error, says):
    with pytest.raises(error, match=says):
        plan_microbatches(rows, 2, **options)


def test_no_rows():
    assert plan_microbatches([], 5) == [] == shuffle_groups([])
    assert plan_microbatches(np.zeros((0, 4), int), 5, attention_mask=np.zeros((0, 4))) == []
    assert plan_microbatches([[]], 5) == [[0]]
