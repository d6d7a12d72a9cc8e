"""Every engine that a GPU can run against the specification, on ragged trees of a few thousand tokens.

Truth is the reference engine in float64 on the same inputs. The yardstick is what a user has without pgcompile:
scaled_dot_product_attention of the dtype on the dense rows, each token's gradients added up in float64.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pgcompile import ops  # noqa: F401  (registers the operators)
from pgcompile.engines import ENGINES, varlen
from pgcompile.prefix_tree import build_prefix_tree

DEVICE = torch.device("cuda")
SCALE = 0.125
# What a sum of thousands of float32 terms rounds, added one by one; a wrong key shows at 1e-3 or more.
FLOAT32 = 5e-5


@dataclasses.dataclass(frozen=True)
class Batch:
    """A prefix tree and the rows it was made of: `class_of` [N, S], -1 behind a row's end."""

    class_of: Tensor
    row: Tensor
    position: Tensor
    subtree_end: Tensor
    depth: Tensor
    segments: Tensor


def batch_of_rows(ids: np.ndarray, lengths: np.ndarray) -> Batch:
    tree = build_prefix_tree(ids, np.zeros_like(lengths), lengths)
    arrays = (tree.class_of, tree.row, tree.position, tree.subtree_end, tree.depth)
    return Batch(*(torch.from_numpy(x).to(DEVICE) for x in arrays), torch.from_numpy(tree.segments))


def branching(rows: int, longest: int, vocabulary: int = 1000) -> Batch:
    """Each row goes on from some place in an earlier one, or starts afresh."""
    generator = np.random.default_rng(rows)
    ids = generator.integers(0, vocabulary, (rows, longest))
    lengths = generator.integers(longest // 4, longest + 1, rows)
    for n in range(1, rows):
        shared = generator.integers(0, longest)
        ids[n, :shared] = ids[generator.integers(0, n), :shared]
    return batch_of_rows(ids, lengths)


def answers(prompt: int, count: int, longest: int) -> Batch:
    """Answers to one prompt, of one token and more."""
    generator = np.random.default_rng(prompt)
    ids = generator.integers(0, 1000, (count, prompt + longest))
    ids[:, :prompt] = ids[0, :prompt]
    ids[:, prompt] = np.arange(count)
    return batch_of_rows(ids, prompt + generator.integers(1, longest + 1, count))


BATCHES = {
    "branching": lambda: branching(24, 400),
    "deep": lambda: branching(40, 150, vocabulary=2),
    "answers": lambda: answers(700, 16, 200),
    "answers of one token": lambda: answers(1000, 64, 1),
    "nothing shared": lambda: batch_of_rows(np.arange(4000).reshape(10, 400), np.arange(40, 440, 40)),
}
SHAPES = {  # query heads, key heads, size of queries and keys, size of values
    "mha": (4, 4, 64, 64),
    "gqa": (8, 2, 128, 128),
    "short values": (4, 1, 96, 60),
    "large": (2, 1, 256, 256),
}


@functools.cache
def batch(name: str) -> Batch:
    return BATCHES[name]()


def can_run(name: str, dtype: torch.dtype) -> bool:
    return ENGINES[name].why_not(DEVICE, dtype) is None


def inputs(batch: Batch, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of out, token-major."""
    heads, key_heads, size, value_size = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = [(heads, size), (key_heads, size), (key_heads, value_size), (heads, value_size)]
    return [
        torch.randn(1, len(batch.row), *s, device=DEVICE, generator=generator).to(dtype).transpose(1, 2)
        for s in sizes
    ]


def attend(
    batch: Batch,
    q,
    k,
    v,
    grad,
    engine: str,
    window: int | None = None,
    key_valid=(),
    softcap=None,
    sinks=None,
) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    hides = torch.tensor([len(key_valid) > 0, False])
    mask = batch.subtree_end, batch.depth, batch.segments, hides, list(key_valid), []
    out, lse = torch.ops.pgcompile.prefix_attention(q, k, v, sinks, *mask, SCALE, softcap, window, engine)
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert out.transpose(1, 2).is_contiguous()
    return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), grad)]


def dense(
    batch: Batch, q, k, v, grad, window: int | None, key_valid=(), softcap=None, sinks=None
) -> list[Tensor]:
    """The same from SDPA on the rows, which is spelled out where that has no word for it; a token's gradient stands
    where its representative does.
    """
    index = batch.class_of.clamp(min=0)
    q, k, v = (x[0][:, index].transpose(0, 1).detach().requires_grad_() for x in (q, k, v))
    grad_rows = torch.zeros(*q.shape[:3], grad.shape[-1], dtype=grad.dtype, device=DEVICE)
    grad_rows[batch.row, :, batch.position] = grad[0].transpose(0, 1)
    mask = None
    if window is not None or key_valid:
        position = torch.arange(index.shape[1], device=DEVICE)
        distance = position[:, None] - position
        mask = ((distance >= 0) & (distance < (window or len(position))))[None, None]
        for valid in key_valid:
            mask = mask & valid[index][:, None, None]
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=SCALE, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        out = spelled(q, k, v, softcap, sinks)
    grads = torch.autograd.grad(out, (q, k, v), grad_rows)
    packed = [out.detach()[batch.row, :, batch.position].transpose(0, 1)[None]]
    kept = batch.class_of >= 0
    for x in grads:
        total = x.new_zeros(len(batch.row), x.shape[1], x.shape[3], dtype=torch.float64)
        total.index_put_((batch.class_of[kept],), x.transpose(1, 2)[kept].double(), accumulate=True)
        packed.append(total.transpose(0, 1)[None])
    return packed


def spelled(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Causal attention as models write it."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


def check(batch: Batch, shape, dtype: torch.dtype, engine: str, **mask) -> None:
    tensors = inputs(batch, shape, dtype)
    truth = attend(batch, *(x.double() for x in tensors), "reference", **mask)
    theirs = dense(batch, *tensors, **{"window": None, **mask})
    ours = attend(batch, *tensors, engine, **mask)
    true_lse, lse = truth.pop(1), ours.pop(1)
    # scores of a few dozen at most: products of float32 and less, but summed and kept in float32
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=1e-3)
    for name, t, a, b in zip(["out", "dq", "dk", "dv"], truth, ours, theirs, strict=True):
        our_error, their_error = (a.double() - t).abs().max(), (b.double() - t).abs().max()
        assert a.dtype == dtype, name
        assert our_error <= max(2 * their_error, FLOAT32), (name, float(our_error), float(their_error))


CASES = [
    (name, dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for name in ENGINES
    if can_run(name, dtype)
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_error_is_at_most_twice_that_of_sdpa(engine, dtype, name, shape):
    check(batch(name), SHAPES[shape], dtype, engine)


@pytest.mark.skipif("varlen" not in [engine for engine, _ in CASES], reason="no flash attention here")
@pytest.mark.parametrize("way", ["split", "gather"])
@pytest.mark.parametrize("name", BATCHES)
def test_both_ways_of_varlen(name, way, monkeypatch):
    """Whatever they cost."""

    def calls(mask, heads, key_heads, device):
        if way == "split":
            return varlen.ancestor_split(mask.segments_M5, device)
        return [varlen.path_gather(mask.segments_M5, None, device)]

    monkeypatch.setattr(varlen, "calls", calls)
    check(batch(name), SHAPES["gqa"], torch.bfloat16, "varlen")


@pytest.mark.parametrize("window", [1, 30, 5000])
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_windows(engine, dtype, window):
    check(batch("branching"), SHAPES["gqa"], dtype, engine, window=window)


@pytest.mark.parametrize("softcap", [None, 0.5, 50.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_capped_scores_and_sinks(engine, dtype, with_sinks, softcap):
    sinks = torch.linspace(-2, 8, 8, device=DEVICE) if with_sinks else None
    check(batch("branching"), SHAPES["gqa"], dtype, engine, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_holes(engine, dtype):
    """The first token stays, so that everyone sees something: nothing is what SDPA and engines disagree about."""
    tree = batch("answers")
    valid = torch.ones(len(tree.row), dtype=torch.bool, device=DEVICE)
    valid[10:50] = False
    check(tree, SHAPES["gqa"], dtype, engine, key_valid=[valid])


@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_bit_equal_between_runs_when_algorithms_are_deterministic(engine, dtype):
    tensors = inputs(batch("branching"), SHAPES["gqa"], dtype)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [attend(batch("branching"), *tensors, engine) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize(("engine", "dtype"), CASES)
def test_no_engine_waits_for_the_device(engine, dtype):
    """The host plans ahead of the GPU: whatever synchronises raises."""
    tensors = inputs(batch("branching"), SHAPES["gqa"], dtype)
    attend(batch("branching"), *tensors, engine)  # compiles
    other = branching(25, 400)  # which no engine has planned for
    tensors = inputs(other, SHAPES["gqa"], dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(other, *tensors, engine)
    finally:
        torch.cuda.set_sync_debug_mode("default")
