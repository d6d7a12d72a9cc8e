"""Trees of batches seen before: found where all is equal to the byte, and gone with the models that used them."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch

from harness import BACKEND, random_tree_batch
from zoo.gpt2_conv1d import GPT2Conv1D

if BACKEND != "pgcompile":
    pytest.skip("about what pgcompile keeps", allow_module_level=True)

import pgcompile
from pgcompile import packed_tree
from pgcompile.packed_tree import PackedTrees

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    pgcompile.reset_stats()
    monkeypatch.setattr(packed_tree, "_known", weakref.WeakSet())


def model(seed=0):
    torch.manual_seed(seed)
    return GPT2Conv1D(layers=1).double().eval()


def fast(target, **options):
    return torch.compile(
        target, backend="pgcompile", options={"inner": "eager", "min_saving": 0, **options}, dynamic=True
    )


def test_a_policy_and_its_reference_share_one():
    policy, reference = model(0), model(1)
    batch = random_tree_batch(rows=6, positions=12, seed=1).inputs
    for _ in range(2):
        for target in (policy, reference):
            torch.testing.assert_close(fast(target)(**batch), target(**batch))
    assert pgcompile.stats().plans_reused == 3 and len(packed_tree._known) == 1


def test_each_stream_has_its_own(monkeypatch):
    """Copies to a device, and what engines work out there, aren't waited for on another stream."""
    codes, first, end = np.zeros((3, 5), np.uint64), np.zeros(3, np.int64), np.full(3, 5)
    trees = PackedTrees()
    found = []
    for stream in ("one", "other", "one"):
        monkeypatch.setattr(packed_tree, "stream_of", lambda device, stream=stream: stream)
        found.append(trees.find(codes, first, end, 0, CPU))
    (one, _), (other, known), (again, known_again) = found
    assert other is not one and not known and again is one and known_again


def test_a_batch_that_is_changed_in_place():
    target = model()
    call = fast(target)
    batch = random_tree_batch(rows=6, positions=12, seed=1).inputs
    for row in range(6):
        found, expected = call(**batch), target(**batch)
        torch.testing.assert_close(found, expected)
        batch["input_ids"][row, -1] = 1 - batch["input_ids"][row, -1].clamp(max=1)
    assert pgcompile.stats().plans_reused == 0


def test_a_tree_goes_with_its_models():
    policy = model()
    reference = copy.deepcopy(policy)
    calls = [fast(policy), fast(reference)]
    batch = random_tree_batch(rows=6, positions=12, seed=1).inputs
    for call in calls:
        call(**batch)
    del call, calls, policy, reference
    torch._dynamo.reset()
    gc.collect()
    assert not packed_tree._known


ARGUMENTS = dict(
    codes=np.arange(24, dtype=np.uint64).reshape(3, 4, 2) // 8,
    first=np.zeros(3, np.int64),
    end=np.full(3, 4),
    min_shared=0,
    device=CPU,
)


@pytest.mark.parametrize(
    "other",
    [
        dict(codes=ARGUMENTS["codes"] // 2),
        dict(codes=ARGUMENTS["codes"][..., :1]),
        dict(first=np.array([0, 1, 0])),
        dict(end=np.array([4, 4, 3])),
        dict(min_shared=16),
        dict(device=torch.device("meta")),
    ],
    ids=str,
)
def test_another_question_gets_another_tree(other):
    trees = PackedTrees()
    tree, is_known = trees.find(**ARGUMENTS)
    assert not is_known and trees.find(**ARGUMENTS) == (tree, True)
    another, is_known = trees.find(**{**ARGUMENTS, **other})
    assert not is_known and another is not tree


def test_the_latest_are_held_up_to_a_number():
    trees = PackedTrees()
    for n in range(2 * packed_tree.MOST_HELD):
        trees.find(**{**ARGUMENTS, "min_shared": n})
    gc.collect()
    assert {t.min_shared for t in packed_tree._known} == {
        *range(packed_tree.MOST_HELD, 2 * packed_tree.MOST_HELD)
    }


def test_the_latest_are_held_up_to_a_size(monkeypatch):
    trees = PackedTrees()
    sizes = [trees.find(**{**ARGUMENTS, "min_shared": n})[0].nbytes for n in range(4)]
    assert len(set(sizes)) == 1 and len(packed_tree._known) == 4
    monkeypatch.setattr(packed_tree, "HELD_BYTES", 2 * sizes[0])
    assert trees.find(**{**ARGUMENTS, "min_shared": 0})[1]
    gc.collect()
    assert {t.min_shared for t in packed_tree._known} == {0, 3}
    monkeypatch.setattr(packed_tree, "HELD_BYTES", 0)
    assert trees.find(**{**ARGUMENTS, "min_shared": 3})[1]
    gc.collect()
    assert {t.min_shared for t in packed_tree._known} == {3}
