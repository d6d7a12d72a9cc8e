"""Bad input, and failures of our own: the original runs."""

import json
import logging

import pytest
import torch
from torch import nn

from harness import (
    ALWAYS_PACK,
    BACKEND,
    compiled,
    differences,
    float64_everywhere,
    named_tensors,
    rewire,
    run,
)
from small_models import ReadsTheFuture, Seeded, assert_equals_eager, batch_of, small_model
from zoo import ZOO

if BACKEND != "pgcompile":
    pytest.skip("tests pgcompile's own behaviour", allow_module_level=True)

import pgcompile
from pgcompile import artifacts, backend, inner
from pgcompile import engines as engine_table

pytestmark = pytest.mark.usefixtures("fresh")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def outcome(call, *args, **kwargs):
    """What a call does: the type of what it raises, or the shapes and values it returns."""
    try:
        return {name: t.detach() for name, t in named_tensors(call(*args, **kwargs)).items()}
    except Exception as error:
        return type(error)


BAD = {
    "mask too long": lambda ids, mask: (ids, torch.ones(6, 10, dtype=torch.int64)),
    "mask for other rows": lambda ids, mask: (ids, mask[:4]),
    "ids of rank 1": lambda ids, mask: (ids[0], mask[0]),
    "ids of rank 3": lambda ids, mask: (ids[None], mask),
    "float ids": lambda ids, mask: (ids.double(), mask),
    "no rows": lambda ids, mask: (ids[:0], mask[:0]),
    "no positions": lambda ids, mask: (ids[:, :0], mask[:, :0]),
    "id too large": lambda ids, mask: (ids + 31, mask),
    "one id too large": lambda ids, mask: (ids.clone().index_fill_(1, torch.tensor([3]), 31), mask),
    "negative id": lambda ids, mask: (ids - 1000, mask),
    "another device": lambda ids, mask: (ids.to("meta"), mask),
}


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_does_what_the_inner_compiler_does(name, warm):
    """warm: after a good call, with dynamic shapes, so that the graph is there already."""
    model = small_model("half_rotary")
    good = torch.arange(54).reshape(6, 9) % 31, torch.ones(6, 9, dtype=torch.int64)
    bad = BAD[name](*good)
    outcomes = []
    for how in ({"backend": "eager"}, {"backend": "pgcompile", "options": ALWAYS_PACK}):
        torch._dynamo.reset()
        fast = torch.compile(model, dynamic=True, **how)
        if warm:
            fast(*good)
        outcomes.append(outcome(fast, *bad))
        again = outcome(fast, *good)
        assert isinstance(again, dict), f"{how}: a bad call broke the next one: {again}"
    expected, actual = outcomes
    if isinstance(expected, type):
        assert actual is expected
    else:
        assert isinstance(actual, dict), actual
        assert {n: (t.shape, t.dtype) for n, t in actual.items()} == {
            n: (t.shape, t.dtype) for n, t in expected.items()
        }


@pytest.mark.parametrize("label", [31, -5])
def test_a_label_out_of_range(label):
    model, batch = small_model(), batch_of()
    labels = batch.input_ids.clone()
    labels[2, 4] = label

    def loss(input_ids, labels):
        return nn.functional.cross_entropy(model(input_ids).flatten(0, 1), labels.flatten())

    expected = outcome(torch.compile(loss, backend="eager"), batch.input_ids, labels)
    assert isinstance(expected, type)
    assert outcome(compiled(loss), batch.input_ids, labels) is expected


@pytest.mark.parametrize("name", ["half_rotary", "llama", "gpt2"])
@pytest.mark.parametrize("rows", [[2], [0, 3], [0, 1, 2, 3, 4, 5]])
def test_rows_that_are_all_padding(name, rows):
    """No NaN where eager has none, in values and in gradients."""
    if name != "half_rotary":
        pytest.importorskip("transformers")
        from tiny_hf import build
    model = small_model(name) if name == "half_rotary" else build(name)
    batch = batch_of(padding="right")
    batch.attention_mask[rows] = 0
    with float64_everywhere():
        fast = compiled(model, fullgraph=True)
        expected = run(model, (), batch.inputs, kept=batch.kept)
        actual = run(fast, (), batch.inputs, kept=batch.kept, owner=model)
    assert not differences(actual, expected, 1e-10, 1e-9)
    for got, want in ((actual.outputs, expected.outputs), (actual.gradients, expected.gradients)):
        for key, tensor in got.items():
            if tensor is not None and want[key] is not None:
                assert not (tensor.isnan() & ~want[key].isnan()).any(), key


# ---------------------------------------------------------------------------------------------------------------------
# Failures of our own
# ---------------------------------------------------------------------------------------------------------------------


def raising(error=Seeded):
    def fail(*args, **kwargs):
        raise error("seeded failure")

    return fail


def break_pass(monkeypatch, error=Seeded):
    def failing_pass(compilation):
        raise error("seeded failure")

    passes = list(backend.PASSES)
    monkeypatch.setattr(backend, "PASSES", (*passes[:4], failing_pass, *passes[4:]))


def break_verification(monkeypatch, error=Seeded):
    from pgcompile.passes import verify

    monkeypatch.setattr(verify, "verify", raising(error))


def break_plan(monkeypatch, error=Seeded):
    monkeypatch.setattr(backend, "build_plan", raising(error))


def break_engine(monkeypatch, error=Seeded):
    for engine in engine_table.ENGINES.values():
        monkeypatch.setattr(engine, "attention", raising(error))


def break_inner(monkeypatch, error=Seeded):
    """The inner compiler rejects everything: the packed graph, and also the original."""
    monkeypatch.setattr(inner, "compile_inner", raising(error))


BREAKS = {
    "pass": break_pass,
    "verification": break_verification,
    "plan": break_plan,
    "engine": break_engine,
    "inner": break_inner,
}


@pytest.mark.parametrize("what", BREAKS)
def test_when_something_fails_the_original_runs(what, monkeypatch, caplog):
    model, batch = small_model(), batch_of()
    BREAKS[what](monkeypatch)
    fast = compiled(model, {"inner": "aot_eager"})
    with caplog.at_level(logging.WARNING, "pgcompile"):
        for _ in range(2):
            assert_equals_eager(fast, model, batch)
    stats = pgcompile.stats()
    assert stats.packed == 0 and stats.dense + stats.eager == 2
    records = [r for r in caplog.records if r.name == "pgcompile"]
    # An inner compiler that fails does so twice: on the packed graph, then on the original.
    assert len(records) == (2 if what == "inner" else 1)
    assert all("seeded failure" in record.getMessage() for record in records)
    assert "Seeded" in records[-1].getMessage()
    kind = "engine_error" if what in ("engine", "inner") else "internal_error"
    assert f"{kind}: " in records[-1].getMessage()


def test_an_inner_compiler_that_fails_is_asked_again(monkeypatch):
    """A disk may have been full. But not at every call for ever, and it may fail for a number of tokens."""
    calls = []
    compile_inner = inner.compile_inner

    def failing(gm, inputs, options, **_):
        calls.append(gm)
        raise Seeded("seeded failure")

    monkeypatch.setattr(inner, "compile_inner", failing)
    model = small_model()
    fast = compiled(model, {"inner": "aot_eager"}, dynamic=True)
    for seed in range(3):
        assert_equals_eager(fast, model, batch_of(seed))
    monkeypatch.setattr(inner, "compile_inner", compile_inner)
    assert_equals_eager(fast, model, batch_of(3))
    assert (pgcompile.stats().dense, pgcompile.stats().packed) == (3, 1)
    monkeypatch.setattr(inner, "compile_inner", failing)
    fast = compiled(small_model("half_rotary"), {"inner": "aot_eager"}, dynamic=True)
    calls.clear()
    for seed in range(2 * artifacts.Family.MOST):
        fast(batch_of(seed).input_ids)
    assert len(calls) == artifacts.Family.MOST + 1  # and once for the original


@pytest.mark.parametrize("what", ["pass", "verification", "plan", "engine"])
def test_failures_are_in_the_report(what, monkeypatch):
    model, batch = small_model(), batch_of()
    BREAKS[what](monkeypatch)
    found = pgcompile.explain(model, batch.input_ids, options=ALWAYS_PACK)
    text = json.dumps(found.to_dict())
    assert "seeded failure" in text and "Seeded" in text
    assert found.status == "eager" or found.batches[0].decision == "dense"


@pytest.mark.parametrize("what", BREAKS)
def test_strict_raises_the_failure(what, monkeypatch):
    model, batch = small_model(), batch_of()
    BREAKS[what](monkeypatch)
    with pytest.raises(pgcompile.FallbackError, match="seeded failure") as caught:
        compiled(model, {"inner": "aot_eager", "strict": True})(batch.input_ids)
    chain, causes = caught.value, []
    while chain is not None:
        causes.append(type(chain))
        chain = chain.__cause__
    assert Seeded in causes


@pytest.mark.parametrize("what", ["pass", "plan", "engine"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_interrupts_and_out_of_memory_pass_through(what, error, monkeypatch):
    if (what, error) == ("pass", torch.OutOfMemoryError):
        pytest.skip("a pass allocates nothing")
    model, batch = small_model(), batch_of()
    BREAKS[what](monkeypatch, error)
    with pytest.raises(error, match="seeded failure"):
        compiled(model)(batch.input_ids)


def test_a_failure_of_one_call_is_over_with_it(monkeypatch):
    model, batch = small_model(), batch_of()
    fast = compiled(model)
    with monkeypatch.context() as patch:
        break_plan(patch)
        assert_equals_eager(fast, model, batch)
    assert_equals_eager(fast, model, batch)
    assert (pgcompile.stats().dense, pgcompile.stats().packed) == (1, 1)


@pytest.mark.parametrize("which", ["attention", "attention_backward"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_engine_that_fails_in_some_layer(which, at, monkeypatch):
    """Forward: the original runs. Backward: an EngineError, and the next call runs as written. Then all is well."""
    torch.manual_seed(0)
    model, batch = rewire(ZOO["nano_gpt"](dim=16, layers=3)), batch_of()
    fast = compiled(model, {"inner": "aot_eager"})
    calls = []

    def sometimes(original):
        def run(*args, **kwargs):
            calls.append(which)
            return raising(Seeded)() if len(calls) == at + 1 else original(*args, **kwargs)

        return run

    for engine in engine_table.ENGINES.values():
        monkeypatch.setattr(engine, which, sometimes(getattr(engine, which)))
    if which == "attention":
        assert_equals_eager(fast, model, batch)
        assert (pgcompile.stats().dense, pgcompile.stats().packed) == (1, 0)
    else:
        with pytest.raises(pgcompile.EngineError, match="seeded failure"):
            fast(batch.input_ids).sum().backward()
        model.zero_grad()
        assert_equals_eager(fast, model, batch)
        assert (pgcompile.stats().dense, pgcompile.stats().packed) == (1, 1)
    assert len(calls) == at + 1
    assert_equals_eager(fast, model, batch)
    assert pgcompile.stats().packed == (1 if which == "attention" else 2)


def break_backward(monkeypatch, error):
    for engine in engine_table.ENGINES.values():
        monkeypatch.setattr(engine, "attention_backward", raising(error))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_failing_backward_is_an_engine_error_and_the_next_call_runs_as_written(inner, monkeypatch):
    model, batch = small_model(), batch_of()
    fast = compiled(model, {"inner": inner})
    with monkeypatch.context() as patch:
        break_backward(patch, Seeded)
        with pytest.raises(pgcompile.EngineError, match="seeded failure") as caught:
            fast(batch.input_ids).sum().backward()
    assert isinstance(caught.value.__cause__, Seeded)
    model.zero_grad()
    for dense in (1, 1):  # the next call, and no other one
        assert_equals_eager(fast, model, batch)
        assert pgcompile.stats().dense == dense
    assert pgcompile.stats().packed == 2


def test_running_out_of_memory_in_backward_passes_through(monkeypatch):
    model, batch = small_model(), batch_of()
    fast = compiled(model)
    with monkeypatch.context() as patch:
        break_backward(patch, torch.OutOfMemoryError)
        with pytest.raises(torch.OutOfMemoryError, match="seeded failure"):
            fast(batch.input_ids).sum().backward()
    assert_equals_eager(fast, model, batch)
    assert pgcompile.stats().dense == 0


def test_inner_fallback_runs_refused_graphs_compiled(monkeypatch):
    compiled_graphs = []
    original = inner.compile_inner

    def recording(graph, *args, **details):
        compiled_graphs.append(graph)
        return original(graph, *args, **details)

    monkeypatch.setattr(inner, "compile_inner", recording)
    model = ReadsTheFuture()
    fast = compiled(model, {"inner": "aot_eager", "fallback": "inner"}, dynamic=True)
    for seed in range(3):
        assert_equals_eager(fast, model, batch_of(seed, rows=4 + seed, positions=9 + seed))
    assert len(compiled_graphs) == 1 and pgcompile.stats().eager == 3
