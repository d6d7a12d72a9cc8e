"""Thousands of random batches through one compiled model: right every time, and nothing grows."""

import gc
import itertools
import random
import resource
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from harness import BACKEND, kept_positions, random_tree_batch
from zoo.gpt2_conv1d import GPT2Conv1D

if BACKEND != "pgcompile":
    pytest.skip("about pgcompile's state", allow_module_level=True)

import pgcompile

BATCHES, WARM = 2000, 200
SIZES = [(3, 7), (6, 12), (8, 20)]  # few: without dynamic shapes, Dynamo compiles for each
PAGE = resource.getpagesize()


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def live_tensors():
    gc.collect()
    return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())


def step(call, ids, mask, with_grad, autocast):
    with torch.set_grad_enabled(with_grad), torch.autocast("cpu", torch.bfloat16, autocast):
        logits = call(ids, mask).float() * kept_positions(ids, mask)[..., None]
        loss = logits.square().mean()
    if with_grad:
        loss.backward()
    return logits.detach()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_soak(dynamic):
    torch._dynamo.reset()
    pgcompile.reset_stats()
    draw = random.Random(0)
    model = GPT2Conv1D(layers=2)
    options = {"inner": "aot_eager", "min_saving": 0}
    fast = torch.compile(model, backend="pgcompile", dynamic=dynamic, options=options)
    modes = list(itertools.product(*[(False, True)] * 3, SIZES))
    tensors, memory, frames = [], [], []
    with torch._dynamo.config.patch(recompile_limit=64):
        for number in range(BATCHES):
            training, with_grad, autocast, size = modes[number] if number < len(modes) else draw.choice(modes)
            if dynamic and number >= len(modes):
                size = draw.randint(2, 9), draw.randint(2, 24)
            padding = draw.choice(["none", "right", "left"])
            batch = random_tree_batch(rows=size[0], positions=size[1], padding=padding, seed=number)
            ids, mask = batch.input_ids, batch.attention_mask
            mask = torch.ones_like(ids) if mask is None else mask
            model.train(training)
            model.zero_grad(set_to_none=True)

            actual = step(fast, ids, mask, with_grad, autocast)
            if number % 20 == 0:
                found = [p.grad.clone() for p in model.parameters()] if with_grad else []
                model.zero_grad(set_to_none=True)
                expected = step(model, ids, mask, with_grad, autocast)
                tolerance = 0.1 if autocast else 1e-4
                assert (actual - expected).norm() <= tolerance * expected.norm(), (number, padding, size)
                for a, p in zip(found, model.parameters()):
                    assert (a - p.grad).norm() <= tolerance * p.grad.norm() + 1e-6, (number, padding, size)
            del actual
            if number >= WARM and number % 100 == 0:
                model.zero_grad(set_to_none=True)
                tensors.append(live_tensors())
                memory.append(resident())
                frames.append(sum(counters["frames"].values()))
    stats = pgcompile.stats()
    assert stats.packed == BATCHES and stats.recompile_limit_hits == 0, str(stats)
    assert frames[0] == frames[-1], "Dynamo compiled again"
    assert max(tensors[-5:]) <= max(tensors[:5]), tensors
    # oneDNN keeps kernels for the sizes it has seen, ever fewer of which are new; a leak would grow evenly
    half = len(memory) // 2
    assert memory[-1] - memory[half] <= (memory[half] - memory[0]) / 2 + 16e6, memory
