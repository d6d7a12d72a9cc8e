"""Small models and batches for the tests of what is around the compiler."""

import copy

import torch
from torch import nn

from harness import (
    differences,
    random_tree_batch,
    rewire,
    run,
)
from zoo import ZOO

BATCH = dict(rows=6, positions=9)


def small_model(name: str = "nano_gpt") -> nn.Module:
    """One layer, small: what is tested here is around the model."""
    torch.manual_seed(0)
    return rewire(ZOO[name](dim=16, layers=1))


class ReadsTheFuture(nn.Module):
    """Every token also sees the next one: never packs."""

    def __init__(self):
        super().__init__()
        self.lm = small_model()
        first = self.lm.blocks[0]
        self.lm.blocks[0] = nn.Sequential(Roll(), first)

    def forward(self, input_ids):
        return self.lm(input_ids)


class Roll(nn.Module):
    def forward(self, x):
        return x + x.roll(-1, 1)


def batch_of(seed: int = 0, **details):
    return random_tree_batch(**{**BATCH, "seed": seed, **details})


def assert_equals_eager(fast, original, batch, **details):
    expected = run(copy.deepcopy(original), (), batch.inputs, kept=batch.kept, **details)
    actual = run(fast, (), batch.inputs, kept=batch.kept, owner=original, **details)
    lines = differences(actual, expected, 1e-10, 1e-9)
    assert not lines, "\n".join(lines)
    return actual


class Seeded(Exception):
    """What the tests make something raise."""
