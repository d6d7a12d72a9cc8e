"""What is given to the inner compiler, and how often."""

import importlib
import random

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from harness import (
    BACKEND,
    compiled,
    float64_everywhere,
    random_tree_batch,
)
from small_models import Seeded, assert_equals_eager, batch_of, small_model

if BACKEND != "pgcompile":
    pytest.skip("tests pgcompile's own behaviour", allow_module_level=True)

import pgcompile
from pgcompile import artifacts, backend, inner, modes, ops
from pgcompile.passes.graph import size_hint

pytestmark = pytest.mark.usefixtures("fresh")


VOCAB = 31  # of the small model
SHAPES = [(6, 9), (5, 12), (3, 17), (7, 7), (2, 4)]


@pytest.mark.parametrize("dynamic", [True, None])
def test_new_shapes_do_not_compile_the_packed_graph_again(dynamic):
    """With `dynamic=None` Dynamo traces twice, first with fixed sizes: even those two share one packed graph."""
    model = small_model()
    fast = compiled(model, {"inner": "aot_eager"}, dynamic=dynamic)
    for seed, (rows, positions) in enumerate(SHAPES):
        assert_equals_eager(fast, model, random_tree_batch(rows=rows, positions=positions, seed=seed))
    stats = pgcompile.stats()
    assert stats.packed == len(SHAPES) and stats.compiles == 1


def test_static_shapes_share_the_packed_graph_too():
    model = small_model()
    fast = compiled(model, {"inner": "aot_eager"}, dynamic=False)
    for seed, (rows, positions) in enumerate(SHAPES):
        assert_equals_eager(fast, model, random_tree_batch(rows=rows, positions=positions, seed=seed))
    stats = pgcompile.stats()
    assert stats.packed == len(SHAPES) and stats.compiles == 1


def test_a_static_and_a_dynamic_trace_of_a_loss_are_one_packed_graph():
    model = small_model()

    def loss(input_ids):
        logits = model(input_ids)[:, :-1]
        return logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)[:, 3:].sum(1).mean()

    fast = compiled(loss, {"inner": "aot_eager"})
    for seed, (rows, positions) in enumerate(SHAPES):
        ids = random_tree_batch(rows=rows, positions=positions, seed=seed).input_ids
        torch.testing.assert_close(fast(ids), loss(ids), rtol=0, atol=1e-10)
    stats = pgcompile.stats()
    assert stats.packed == len(SHAPES) and stats.compiles == 1


def logprobs(model, input_ids):
    logits = model(input_ids).float()
    return logits.log_softmax(-1).gather(-1, input_ids[..., None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_kept_for_backward_as_the_model_has_them(dtype):
    """Not their log-probabilities, which are twice as large."""
    model, ids = small_model().to(dtype), random_tree_batch(rows=6, positions=9).input_ids
    kept = []
    fast = compiled(logprobs, {"inner": "inductor"}, dynamic=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fast(model, ids)
    stats = pgcompile.stats()
    assert stats.packed == 1
    assert [x.dtype for x in kept if x.numel() == stats.packed_tokens * VOCAB] == [dtype]


def test_the_keys_of_inductors_caches_name_our_operators(monkeypatch):
    """What they are traced to is in what is cached, and changes with pgcompile."""
    ids = random_tree_batch(rows=6, positions=9).input_ids

    def hits():
        torch._dynamo.reset()
        artifacts._families.clear()
        before = counters["aot_autograd"]["autograd_cache_hit"]
        compiled(small_model(), {"inner": "inductor"}, dynamic=True)(ids)
        return counters["aot_autograd"]["autograd_cache_hit"] - before

    with fresh_cache():
        assert (hits(), hits()) == (0, 1)
        monkeypatch.setattr(ops, "DIGEST", "of another version")
        assert hits() == 0


class Mix(nn.Module):
    """Slices of a token's vector, mixed. Inductor compares the sizes of views, and so asks whether `T` is 8."""

    def forward(self, x):
        a = x.reshape(-1, 8, 2)
        return torch.baddbmm(a[:, :1], a, a.mT @ a).view(x.shape)


def sharing_a_prompt(tokens):
    """Rows of four positions with as many distinct tokens: they differ in the last one."""
    ids = torch.arange(4).repeat(tokens - 3, 1)
    ids[:, -1] = torch.arange(tokens - 3)
    return ids


@pytest.mark.slow
def test_a_number_of_tokens_that_inductor_excludes():
    """`T != 8` is a guard. A graph serves the side of it that it was compiled on."""
    model = small_model()
    model.ln_f = nn.Sequential(Mix(), model.ln_f)
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        fast = compiled(model, {"inner": "inductor"}, dynamic=True)
        for tokens in (12, 10, 8, 6):
            ids = sharing_a_prompt(tokens)
            torch.testing.assert_close(fast(ids), model(ids), rtol=0, atol=1e-10)
    stats = pgcompile.stats()
    assert (stats.packed, stats.compiles) == (4, 3)


def numbers_of_tokens(inputs):
    """The symbolic sizes among what an inner compiler gets, but those of segments, whose hint is large."""
    shapes = [tensor.shape for tensor in inputs if isinstance(tensor, torch.Tensor)]
    return [s for shape in shapes for s in shape if isinstance(s, torch.SymInt) and size_hint(s) < 1000]


def specialising(gm, inputs, options, **_):
    """An inner compiler that makes a graph for each number of tokens."""
    assert sum(map(int, numbers_of_tokens(inputs))) > 0
    return gm


def comparing(gm, inputs, options, **_):
    """An inner compiler that asks whether there are 8 tokens."""
    assert [bool(size == 8) for size in numbers_of_tokens(inputs)]
    return gm


def test_graphs_for_each_side_of_a_number_of_tokens(monkeypatch):
    monkeypatch.setattr(inner, "compile_inner", comparing)
    model = small_model()
    fast = compiled(model, {"inner": "aot_eager"}, dynamic=True)
    for tokens in (12, 10, 8, 6, 5, 8, 14):
        ids = sharing_a_prompt(tokens)
        torch.testing.assert_close(fast(ids), model(ids), rtol=0, atol=1e-10)
    stats = pgcompile.stats()
    assert (stats.packed, stats.compiles) == (7, 3)


def test_graphs_for_single_numbers_of_tokens(monkeypatch):
    """Each is right, and there is an end to them."""
    monkeypatch.setattr(inner, "compile_inner", specialising)
    model = small_model()
    fast = compiled(model, {"inner": "aot_eager"}, dynamic=True)
    for seed in range(20):
        assert_equals_eager(fast, model, random_tree_batch(rows=4 + seed, positions=9, seed=seed))
    stats = pgcompile.stats()
    assert stats.compiles == artifacts.Family.MOST <= stats.packed < 20 and stats.packed + stats.dense == 20


@pytest.mark.slow
def test_inductor_compiles_once():
    model = small_model()
    fast = compiled(model, {"inner": "inductor"}, dynamic=True)
    for seed, (rows, positions) in enumerate(SHAPES):
        assert_equals_eager(fast, model, random_tree_batch(rows=rows, positions=positions, seed=seed))
    stats = pgcompile.stats()
    assert stats.packed == len(SHAPES) and stats.compiles == 1


@pytest.mark.slow
def test_twenty_more_shapes_compile_nothing(monkeypatch):
    """After two shapes, by inductor: neither Dynamo, nor a packed artifact, nor a dense one."""
    calls = []
    compile_inner = inner.compile_inner
    monkeypatch.setattr(
        inner, "compile_inner", lambda *args, **details: calls.append(args) or compile_inner(*args, **details)
    )
    model = small_model()
    fast = compiled(model, {"inner": "inductor", "min_saving": None})
    chance = random.Random(0)
    for number in range(22):
        rows, positions = chance.randint(2, 12), chance.randint(18, 60)
        shared = torch.randint(13, (rows, positions))
        shared[:, :-1] = shared[:1, :-1].clone()
        apart = torch.randint(13, (rows, positions))
        apart[:, 0] = torch.arange(rows)
        for ids in (shared, apart):
            fast(ids).square().mean().backward()
        if number == 1:
            frames = counters["stats"]["unique_graphs"]
            compiles = len(calls)
    stats = pgcompile.stats()
    assert (stats.packed, stats.dense) == (22, 22)
    assert len(calls) == compiles and counters["stats"]["unique_graphs"] == frames


@pytest.mark.parametrize("inner_compiler", ["eager", "aot_eager"])
def test_modes_of_running(inner_compiler):
    """One compiled model: training, evaluation, no_grad, inference_mode, frozen parameters, and back."""
    model, batch = small_model(), batch_of()
    fast = compiled(model, {"inner": inner_compiler})
    for turn in range(2):
        with float64_everywhere():
            model.train()
            trained = assert_equals_eager(fast, model, batch)
            assert all(g is not None for g in trained.gradients.values())
            model.eval()
            assert_equals_eager(fast, model, batch)
            with torch.no_grad():
                assert_equals_eager(fast, model, batch)
                assert not fast(batch.input_ids).requires_grad
            with torch.inference_mode():
                assert fast(batch.input_ids).is_inference()
            for parameter in list(model.parameters())[::2]:
                parameter.requires_grad_(False)
            frozen = assert_equals_eager(fast, model, batch)
            assert len(frozen.gradients) < len(trained.gradients)
            for parameter in model.parameters():
                parameter.requires_grad_(True)
        if turn == 0:
            compiles = pgcompile.stats().compiles
    stats = pgcompile.stats()
    assert stats.dense == stats.eager == stats.recompile_limit_hits == 0
    assert stats.compiles == compiles >= 3, "the second turn compiles nothing"


@pytest.mark.parametrize("inner_compiler", ["eager", "aot_eager"])
def test_a_batch_that_was_scored_in_inference_mode_before(inner_compiler):
    """Its plan is known, and training saves what is in it."""
    model, batch = small_model(), batch_of(padding="right")
    fast = compiled(model, {"inner": inner_compiler, "strict": True})
    with torch.inference_mode():
        fast(**batch.inputs)
    with float64_everywhere():
        assert_equals_eager(fast, model, batch)
    stats = pgcompile.stats()
    assert (stats.packed, stats.plans_reused) == (2, 1)


def test_cuda_graphs_are_for_the_original_alone(monkeypatch):
    """Each number of tokens would be recorded anew."""
    patches = []
    monkeypatch.setattr(
        importlib.import_module("torch._inductor.compile_fx"),
        "compile_fx",
        lambda gm, inputs, config_patches, **_: (patches.append(config_patches), gm)[1],
    )
    model, batch = small_model(), batch_of()
    for min_saving, decision in [(0, "packed"), (1, "dense")]:
        torch._dynamo.reset()
        options = {"inner_mode": "reduce-overhead", "min_saving": min_saving}
        assert_equals_eager(torch.compile(model, backend="pgcompile", options=options), model, batch)
        assert getattr(pgcompile.stats(), decision) == 1
    assert [given["triton.cudagraphs"] for given in patches] == [False, True]


@pytest.mark.parametrize("name", ["cuda", "mkldnn"])
def test_the_precision_of_products_by_backend(name):
    """Set there, as transformers does, `torch.get_float32_matmul_precision` raises."""
    matmul = getattr(torch.backends, name).matmul
    model, batch = small_model(), batch_of()
    before, usual = matmul.fp32_precision, modes.modes()
    fast = compiled(model, {"inner": "aot_eager", "strict": True})
    assert_equals_eager(fast, model, batch)
    matmul.fp32_precision = "tf32"
    try:
        assert modes.modes() != usual
        assert_equals_eager(fast, model, batch)
    finally:
        matmul.fp32_precision = before
    assert pgcompile.stats().packed == pgcompile.stats().compiles == 2


@pytest.mark.parametrize("way", ["prologue", "packed"])
def test_modes_that_a_failing_graph_switched_on_are_off_again(way, monkeypatch):
    """The original runs after it, and what it runs into is the caller's."""
    entered = []

    def failing(*args):
        torch.autocast("cpu", torch.bfloat16).__enter__()
        torch.set_grad_enabled(False)
        entered.append(1)
        raise Seeded("stopped between two switches")

    model, batch = small_model(), batch_of()
    fast = compiled(model)
    where, name = (backend, "build_plan") if way == "prologue" else (artifacts, "family_of")
    monkeypatch.setattr(where, name, failing)
    before = modes.modes(), modes._autocast_nesting()
    assert_equals_eager(fast, model, batch)
    assert entered and (modes.modes(), modes._autocast_nesting()) == before
    assert pgcompile.stats().dense == 1


class SeveralOutputs(nn.Module):
    """Logits, positions first, and what each head gets: each laid out in memory as said."""

    def __init__(self):
        super().__init__()
        self.lm = small_model()

    def forward(self, input_ids):
        logits = self.lm(input_ids)
        heads = torch.cat([logits, logits[..., :1]], -1).unflatten(-1, (2, -1)).transpose(1, 2)
        return logits.transpose(0, 1).contiguous(), heads, heads.contiguous(), logits.mT.contiguous().mT


def test_outputs_lie_in_memory_as_the_originals():
    model, batch = SeveralOutputs(), batch_of()
    found, expected = compiled(model, {"strict": True})(batch.input_ids), model(batch.input_ids)
    assert [x.stride() for x in found] == [x.stride() for x in expected]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm, self.scale = small_model(), 0.5

    def forward(self, input_ids):
        return self.lm(input_ids) * self.scale


def test_a_number_of_the_module_when_everything_is_dynamic():
    """Dynamo makes it symbolic. It is taken at its value, and guarded."""
    model, batch = Scaled(), batch_of()
    options = {"inner": "inductor", "strict": True, "min_saving": 0}
    fast = torch.compile(model, backend="pgcompile", dynamic=True, options=options)
    for scale in (0.5, 0.25, 0.5):
        model.scale = scale
        torch.testing.assert_close(fast(batch.input_ids), model(batch.input_ids))
    assert pgcompile.stats().packed == 3
