"""Which way a call takes, and compiled models in training, threads and memory.

What a model may be called with is in test_models_hf.py; here one compiled model goes through it all in a row.
"""

import copy
import gc
import logging
import threading
import weakref

import pytest
import torch
from torch import nn

from harness import (
    BACKEND,
    assert_no_worse_than_eager,
    compiled,
    differences,
    float64_everywhere,
    random_tree_batch,
    run,
)
from small_models import Seeded, assert_equals_eager, batch_of, small_model

if BACKEND != "pgcompile":
    pytest.skip("tests pgcompile's own behaviour", allow_module_level=True)

import pgcompile
from pgcompile import artifacts, backend, inner
from pgcompile.passes.pipeline import OPTIONAL

pytestmark = pytest.mark.usefixtures("fresh")

NEEDED = ("inline_pass", "opaque_pass", "aten_pass", "analyse_pass", "attention_pass", "lower_pass")


# ---------------------------------------------------------------------------------------------------------------------
# Which way a call takes
# ---------------------------------------------------------------------------------------------------------------------


def test_nothing_shared_runs_dense_and_says_why():
    model = small_model()
    fast = torch.compile(model, backend="pgcompile", options={"inner": "eager"})
    apart = random_tree_batch(rows=3, positions=9, trees=3, duplicates=0, prefixes=0)
    assert_equals_eager(fast, model, apart)
    assert (pgcompile.stats().packed, pgcompile.stats().dense) == (0, 1)
    equal = random_tree_batch(rows=1, positions=9, trees=1, duplicates=0, prefixes=0)
    equal = type(equal)(equal.input_ids.repeat(3, 1), None)
    assert_equals_eager(fast, model, equal)
    assert (pgcompile.stats().packed, pgcompile.stats().dense) == (1, 1)


PRODUCTS = {
    "of tokens without padding": lambda h, mask: (h * mask[..., None]) @ (h * mask[..., None]).mT,
    "with keys that are padding": lambda h, mask: ((h @ h.mT) * mask[..., None]).sum((1, 2)),
    "with one token": lambda h, mask: (h @ h.mT)[:, 0],
    "with some tokens": lambda h, mask: (h @ h.mT)[:, 2:5],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_padding_in_products_of_tokens_with_tokens(name):
    model, batch = small_model("half_rotary"), batch_of(padding="left")
    factors = torch.randn(6, 9, 1)

    def products(input_ids, attention_mask):
        return PRODUCTS[name](model(input_ids, attention_mask) * factors, attention_mask)

    with float64_everywhere():
        expected = products(**batch.inputs)
        found = compiled(products, {"strict": True, "check": 1})(**batch.inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert pgcompile.stats().packed == 1


@pytest.mark.parametrize("wanted, decision", [(0.45, "packed"), (0.55, "dense")])
def test_min_saving_is_a_threshold(wanted, decision):
    model, ids = small_model(), torch.arange(9).repeat(2, 1)  # two equal rows: half of everything
    found = pgcompile.explain(model, ids, options={"min_saving": wanted})
    assert found.batches[0].saving == pytest.approx(0.5)
    assert found.batches[0].decision == decision


def test_short_branches_are_not_worth_a_segment():
    """By default 8 shared tokens are computed twice, 32 once; `min_saving=0` shares both."""
    model = small_model()
    for shared, default in ((8, 80), (32, 48)):
        ids = torch.arange(40).repeat(2, 1) % 31
        ids[1, shared:] = (ids[1, shared:] + 1) % 31
        counts = [
            pgcompile.explain(model, ids, options={"min_saving": s}).batches[0].packed_tokens
            for s in (0, None)
        ]
        assert counts == [80 - shared, default]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_disabled_pass_never_changes_the_result(name):
    """Labels that count padding: without the pass that notices, nothing may be dropped."""
    model, batch = small_model("half_rotary"), batch_of(padding="right", prefixes=2)

    def loss(input_ids, attention_mask):
        logits = model(input_ids, attention_mask)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())

    with float64_everywhere():
        expected = loss(**batch.inputs)
        actual = compiled(loss, {"disable_passes": [name]}, fullgraph=True)(**batch.inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert pgcompile.stats().packed == 1


def test_every_pass_is_optional_or_needed():
    from pgcompile.passes import PASSES

    assert {*OPTIONAL, *NEEDED} == {p.__name__ for p in PASSES}


def test_a_pass_that_is_needed_can_be_disabled():
    model, batch = small_model(), batch_of()
    for name in NEEDED:
        found = pgcompile.explain(model, batch.input_ids, options={"disable_passes": [name]})
        assert found.status == "eager"
        assert found.graphs[0].fallbacks[0].kind == "pass_disabled"
        assert_equals_eager(compiled(model, {"disable_passes": [name]}), model, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Precision and training
# ---------------------------------------------------------------------------------------------------------------------


PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast": (torch.float32, torch.bfloat16),
}


def tensors_of(call, model, batch, autocast):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = call(**batch.inputs)
    logp = logits.masked_fill(~batch.kept[..., None], 0).to(torch.promote_types(logits.dtype, torch.float32))
    (logp.log_softmax(-1)[..., 3] * batch.kept).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logp.detach(), **gradients}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_worse_than_eager_against_float64(precision):
    """Relative L2 error of every tensor: at most twice eager's, or one unit in the last place; median of 5 seeds."""
    dtype, autocast = PRECISIONS[precision]
    model = small_model("half_rotary").to(dtype)
    truth_model = copy.deepcopy(model).double()
    fast = compiled(model)

    def tensors(side, seed):
        batch = batch_of(seed, padding="right", rows=8, positions=16)
        if side == "truth":
            with float64_everywhere():
                return tensors_of(truth_model, truth_model, batch, None)
        found = tensors_of(fast if side == "compiled" else model, model, batch, autocast)
        return {name: tensor.clone() for name, tensor in found.items()}

    assert_no_worse_than_eager(tensors, torch.finfo(autocast or dtype).eps)
    stats = pgcompile.stats()
    assert stats.packed == 5 and stats.dense == stats.eager == 0


def test_three_steps_of_adamw():
    ends = []
    batches = [batch_of(seed, padding="right") for seed in range(3)]
    with float64_everywhere():
        for call in (lambda m: m, lambda m: compiled(m, fullgraph=True)):
            model = small_model("half_rotary")
            forward, optimizer = call(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
            losses = []
            for batch in batches:
                logits = forward(**batch.inputs)[:, :-1]
                labels = batch.input_ids.masked_fill(~batch.kept, -100)[:, 1:]
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            ends.append((losses, {name: p.detach() for name, p in model.named_parameters()}))
    assert pgcompile.stats().packed == 3
    (eager_losses, eager_parameters), (losses, parameters) = ends
    assert losses == pytest.approx(eager_losses, rel=1e-10)
    for name, want in eager_parameters.items():
        assert (parameters[name] - want).abs().max() <= 1e-8 * want.abs().max(), name


# ---------------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------------


def test_one_compiled_llama_in_many_ways():
    """Calls of every kind through one compiled model, twice around: each as eager, none disturbs the next."""
    pytest.importorskip("transformers")
    from tiny_hf import build, install_capturing_hooks

    model = install_capturing_hooks(build("llama"))
    batch = batch_of(padding="left", vocab=31)
    embeds = model.get_input_embeddings()(batch.input_ids).detach()
    N, S = batch.input_ids.shape
    causal = torch.ones(S, S, dtype=torch.bool).tril().expand(N, 1, S, S)
    lowest = torch.finfo(torch.float64).min

    def additive(allowed):
        return torch.zeros(N, 1, S, S, dtype=torch.float64).masked_fill(~allowed, lowest)

    padded = causal & batch.kept[:, None, None, :]
    counted = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    calls = {
        "plain": (dict(input_ids=ids), "packed"),
        "mask": (dict(input_ids=ids, attention_mask=mask), "packed"),
        "positions": (dict(input_ids=ids, attention_mask=mask, position_ids=counted), "packed"),
        "last logits": (dict(input_ids=ids, attention_mask=mask, logits_to_keep=2), "packed"),
        "hidden states": (dict(input_ids=ids, attention_mask=mask, output_hidden_states=True), "packed"),
        "embeds": (dict(inputs_embeds=embeds, attention_mask=mask), "packed"),
        "4-D": (dict(input_ids=ids, attention_mask=additive(causal)), "packed"),
        "4-D padded": (dict(input_ids=ids, attention_mask=additive(padded), position_ids=counted), "packed"),
        "4-D full": (dict(input_ids=ids, attention_mask=additive(torch.ones_like(causal))), "dense"),
        "labels": (
            dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)),
            "packed",
        ),
    }
    fast = compiled(model, {}, fullgraph=True)
    wrong: list[str] = []
    with (
        float64_everywhere(),
        torch._dynamo.config.patch(recompile_limit=32),
    ):  # ten kinds of call, one compile each
        for name, (kwargs, decision) in list(calls.items()) * 2:
            kwargs = {"use_cache": False, **kwargs}
            kept = batch.kept[:, -2:] if name == "last logits" else batch.kept
            kept = None if name in ("plain", "4-D", "4-D full") else kept
            expected = run(model, (), kwargs, kept=kept)
            pgcompile.reset_stats()
            actual = run(fast, (), kwargs, kept=kept, owner=model)
            lines = differences(actual, expected, 1e-10, 1e-9)
            stats = pgcompile.stats()
            if getattr(stats, decision) != 1:
                lines.append(f"expected {decision}: {stats}")
            wrong += [f"{name}: {line}" for line in lines]
    assert not wrong, "\n".join(wrong)


def test_embeddings_that_need_a_gradient():
    pytest.importorskip("transformers")
    from tiny_hf import build

    model = build("llama")
    batch = batch_of(padding="right", vocab=31)
    gradients = []
    with float64_everywhere():
        for call in (model, compiled(model, fullgraph=True)):
            embeds = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
            logits = call(inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False).logits
            (logits.tanh() * batch.kept[..., None] * torch.arange(1.0, 7)[:, None, None]).sum().backward()
            gradients.append(embeds.grad)
    assert (gradients[1] - gradients[0]).abs().max() <= 1e-9 * gradients[0].abs().max()


def cache_tensors(cache):
    return {f"{i}.{n}": getattr(layer, n) for i, layer in enumerate(cache.layers) for n in ("keys", "values")}


def test_the_cache_comes_back_and_can_be_continued():
    pytest.importorskip("transformers")
    from tiny_hf import build

    model = build("llama").eval()
    batch = batch_of(padding="left", vocab=31)
    more = batch_of(seed=5, positions=2, vocab=31).input_ids
    mask = torch.cat([batch.attention_mask, torch.ones_like(more)], 1)
    fast = compiled(model)
    results = []
    with float64_everywhere(), torch.no_grad():
        for call in (model, fast):
            first = call(**batch.inputs)
            cached = {name: t.clone() for name, t in cache_tensors(first.past_key_values).items()}
            if call is fast:
                assert pgcompile.stats().packed == 1
            second = call(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values)
            results.append((first.logits, cached, second.logits))
            assert second.past_key_values.get_seq_length() == mask.shape[1]
    (logits, cached, continued), (fast_logits, fast_cached, fast_continued) = results
    kept = batch.kept
    assert (fast_logits - logits)[kept].abs().max() < 1e-10
    assert cached.keys() == fast_cached.keys() and len(cached) == 4
    for name, want in cached.items():
        assert fast_cached[name].shape == want.shape
        assert (fast_cached[name] - want).transpose(1, 2)[kept].abs().max() < 1e-10, name
    assert (fast_continued - continued).abs().max() < 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# Threads and memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_compiler", ["eager", "aot_eager"])
def test_eight_cold_threads_with_a_hundred_batches_each(inner_compiler):
    model = small_model()
    fast = compiled(model, {"inner": inner_compiler}, dynamic=True)
    batches = [random_tree_batch(rows=4 + seed % 4, positions=9 + seed // 4, seed=seed) for seed in range(8)]
    expected = [model(batch.input_ids) for batch in batches]
    losses = [(e * torch.linspace(0, 1, e.numel()).view_as(e)).sum() for e in expected]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    start, failures = threading.Barrier(len(batches)), []

    def work(number):
        try:
            start.wait(timeout=60)
            for i in range(number, number + 100):
                n = i % 8
                logits = fast(batches[n].input_ids)
                loss = (logits * torch.linspace(0, 1, logits.numel()).view_as(logits)).sum()
                found = torch.autograd.grad(loss, list(model.parameters()))
                torch.testing.assert_close(logits, expected[n], rtol=0, atol=1e-10)
                for got, want in zip(found, gradients[n]):
                    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * want.abs().max().item() + 1e-15)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures[0]
    stats = pgcompile.stats()
    assert stats.recompile_limit_hits == 0
    assert stats.packed == 800 and stats.dense == stats.eager == 0
    assert stats.compiles == 1


def test_cold_threads_compile_the_original_once(monkeypatch):
    compiles = []
    original = inner.compile_inner
    monkeypatch.setattr(
        inner, "compile_inner", lambda *args, **details: (compiles.append(1), original(*args, **details))[1]
    )
    model = small_model()
    shared, different = torch.zeros(5, 6, dtype=torch.int64), torch.arange(30).view(5, 6)
    fast = compiled(model, {"inner": "aot_eager", "min_saving": 0.1})
    fast(shared)  # Dynamo's part is done
    compiles.clear()
    start, failures = threading.Barrier(4), []

    def work():
        try:
            start.wait(timeout=60)
            fast(different)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    assert not failures, failures[0]
    assert len(compiles) == 1
    torch.testing.assert_close(fast(different), model(different), rtol=0, atol=1e-10)
    assert pgcompile.stats().dense == 5


def test_what_compiles_is_no_trace_to_others():
    """Dynamo refuses calls under torch.fx's tracing, which is on for all threads while one of them compiles."""

    class Looks(nn.Module):
        def forward(self, x):
            seen.append(torch.fx._symbolic_trace.is_fx_symbolic_tracing())
            return x

    seen = []
    torch.fx.symbolic_trace(Looks())
    with inner.compiling():
        torch.fx.symbolic_trace(Looks())
    assert seen == [True, False]


@pytest.mark.parametrize("way", ["backward", "forward only", "no_grad", "dense", "failing", "check"])
def test_nothing_keeps_a_batch_alive(way, monkeypatch):
    plans = []
    original = backend.build_plan

    def recording(*args, **kwargs):
        plan = original(*args, **kwargs)
        plans.append(weakref.ref(plan))
        if way == "failing":
            raise Seeded("seeded failure")
        return plan

    monkeypatch.setattr(backend, "build_plan", recording)
    model = small_model("half_rotary")
    options = {"dense": {"min_saving": 1.0}, "check": {"check": 9}}.get(way, {})
    fast = compiled(model, {"inner": "aot_eager", **options}, dynamic=True)

    def call(seed):
        batch = batch_of(seed, rows=5 + seed, padding="right")
        refs = [weakref.ref(t) for t in batch.inputs.values()]
        with torch.set_grad_enabled(way != "no_grad"):
            logits = fast(**batch.inputs)
        refs.append(weakref.ref(logits))
        if way in ("backward", "dense", "failing", "check"):
            (logits * batch.kept[..., None]).sum().backward()
        model.zero_grad(set_to_none=True)
        return refs

    logging.getLogger("pgcompile").setLevel(
        logging.CRITICAL
    )  # pytest keeps the records, and their tracebacks
    try:
        refs = [ref for seed in range(3) for ref in call(seed)]  # the first one compiles
    finally:
        logging.getLogger("pgcompile").setLevel(logging.NOTSET)
    gc.collect()
    assert len(plans) == 3
    assert not [ref() for ref in plans if ref() is not None], "plans"
    assert not [tuple(ref().shape) for ref in refs if ref() is not None], "inputs and outputs"


def test_dynamos_reset_drops_what_was_compiled():
    model, batch = small_model(), batch_of()
    fast = compiled(model, {"inner": "aot_eager"})
    fast(batch.input_ids)
    assert len(artifacts._families) == 1
    torch._dynamo.reset()
    gc.collect()
    assert len(artifacts._families) == 0
    assert_equals_eager(fast, model, batch)
    assert pgcompile.stats().compiles == 2


def test_deterministic_algorithms():
    """torch's own switch, under which operations without a deterministic backward raise."""
    model, batch = small_model("half_rotary").float(), batch_of(padding="right")
    fast = compiled(model, {"inner": "inductor"})
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(2):
            model.zero_grad()
            (fast(**batch.inputs) * batch.kept[..., None]).sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert pgcompile.stats().packed == 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loaders_with_workers(method):
    model, batch = small_model(), batch_of()
    fast = compiled(model)
    fast(batch.input_ids).sum().backward()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(batch.input_ids),
        batch_size=3,
        num_workers=2,
        multiprocessing_context=method,
    )
    for (ids,) in loader:
        torch.testing.assert_close(fast(ids), model(ids))


def test_a_dead_model_leaves_nothing_behind():
    model, batch = small_model(), batch_of()
    ref = weakref.ref(model.lm_head.weight)
    compiled(model, {"inner": "aot_eager"})(batch.input_ids).sum().backward()
    del model
    torch._dynamo.reset()
    gc.collect()
    assert ref() is None
