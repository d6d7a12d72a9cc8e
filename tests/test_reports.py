"""What is told: stats, explain, strict, warnings, dumps."""

import json
import logging

import pytest
import torch
from torch import nn

from harness import (
    ALWAYS_PACK,
    BACKEND,
    brute_force_packed_tokens,
    compiled,
    rewire,
)
from small_models import ReadsTheFuture, Seeded, batch_of, small_model
from zoo import ZOO

if BACKEND != "pgcompile":
    pytest.skip("tests pgcompile's own behaviour", allow_module_level=True)

import pgcompile
from pgcompile.engines import cpu
from pgcompile.engines.choose import AUTO

pytestmark = pytest.mark.usefixtures("fresh")


def test_stats_add_up_and_reset():
    model, batch = small_model(), batch_of()
    fast = compiled(model)
    fast(batch.input_ids)
    once = pgcompile.stats()
    fast(batch.input_ids)
    twice = pgcompile.stats()
    assert (once.packed, once.dense, once.eager, once.compiles) == (1, 0, 0, 1)
    expected = brute_force_packed_tokens([batch.input_ids, batch.dense_positions], batch.kept)
    assert (
        once.packed_tokens == expected and once.dense_tokens == once.valid_tokens == batch.input_ids.numel()
    )
    assert once.computed_tokens == expected
    for name in ("packed", "dense_tokens", "valid_tokens", "packed_tokens", "computed_tokens"):
        assert getattr(twice, name) == 2 * getattr(once, name)
    assert twice.compiles == 1 and twice.plan_seconds > once.plan_seconds > 0
    with pytest.raises(AttributeError):
        twice.packed = 0
    pgcompile.reset_stats()
    assert pgcompile.stats() == pgcompile.Stats()
    assert all(isinstance(v, int) for k, v in vars(twice).items() if k != "plan_seconds")


def test_a_dense_call_saves_nothing():
    model, batch = small_model(), batch_of()
    compiled(model, {"min_saving": 1.0})(batch.input_ids)
    stats = pgcompile.stats()
    assert (stats.packed, stats.dense) == (0, 1) and stats.packed_tokens < stats.dense_tokens
    assert stats.computed_tokens == stats.dense_tokens == batch.input_ids.numel()
    assert "(0% saved)" in str(stats)


def test_dynamo_giving_up_is_counted():
    fast = torch.compile(lambda x, n: x + n, backend="pgcompile", options={"inner": "eager"}, dynamic=False)
    for n in range(torch._dynamo.config.recompile_limit + 3):
        fast(torch.ones(2), n)
    assert pgcompile.stats().recompile_limit_hits >= 1
    pgcompile.reset_stats()
    assert pgcompile.stats().recompile_limit_hits == 0


def test_explain_a_graph_that_packs():
    model, batch = small_model("half_rotary"), batch_of(padding="right")
    found = pgcompile.explain(model, **batch.inputs, options=ALWAYS_PACK)
    assert found.status == "packed" and len(found.graphs) == len(found.batches) == 1
    assert [a.mask.split(" ∧ ")[0] for a in found.graphs[0].attention] == ["causal"]
    report = found.batches[0]
    assert (report.rows, report.positions) == tuple(batch.input_ids.shape)
    assert report.packed_tokens < report.valid_tokens == batch.kept.sum() < report.dense_tokens
    assert report.decision == "packed" and 0 < report.saving < 1
    assert report.packed_pairs < report.dense_pairs and report.depth >= 1 and report.segments >= 2
    assert report.engines == {found.graphs[0].attention[0].engine: ""}
    assert json.loads(json.dumps(found.to_dict()))["status"] == "packed"
    assert "packed" in str(found) and "causal" in str(found) and str(report.packed_tokens) in str(found)


def test_explain_a_batch_whose_engine_failed(monkeypatch):
    def fail(*call):
        raise Seeded("seeded failure")

    monkeypatch.setattr(cpu, "attention", fail)
    model, batch = small_model(), batch_of()
    found = pgcompile.explain(model, **batch.inputs, options=ALWAYS_PACK)
    [report] = found.batches
    assert report.decision == "dense" and "seeded failure" in report.why and report.engines == {}


def test_explain_a_batch_that_is_nothing_for_its_engine(monkeypatch):
    monkeypatch.setattr(cpu, "why_not_call", lambda *call: "a seeded reason")
    model, batch = small_model(), batch_of()
    found = pgcompile.explain(model, **batch.inputs, options=ALWAYS_PACK)
    assert [a.engine for a in found.graphs[0].attention] == ["cpu"]
    [(engine, why)] = found.batches[0].engines.items()
    passed_over = AUTO[: AUTO.index(engine)]
    assert passed_over[0] == "cpu" and why.startswith("not cpu: a seeded reason; not varlen: ")
    assert [part.split(":")[0] for part in why.split("; ")] == [f"not {name}" for name in passed_over]
    assert f"attention by {engine}, {why}" in str(found)


def test_explain_a_graph_that_does_not():
    model, batch = ReadsTheFuture(), batch_of()
    found = pgcompile.explain(model, batch.input_ids)
    assert found.status == "eager"
    reasons = [reason for graph in found.graphs for reason in graph.fallbacks]
    assert reasons and all(reason.kind and reason.explanation for reason in reasons)
    assert any("small_models.py" in reason.source for reason in reasons)
    assert json.loads(json.dumps(found.to_dict()))["graphs"][0]["fallbacks"]
    assert reasons[0].kind in str(found)


def test_explain_survives_a_break_and_a_dense_batch():
    model = small_model()
    fresh_ids = torch.arange(18).reshape(2, 9)  # nothing shared

    def broken(input_ids):
        logits = model(input_ids)
        torch._dynamo.graph_break()
        return logits.flip(0)

    found = pgcompile.explain(broken, fresh_ids)
    assert found.status == "packed" and [graph.status for graph in found.graphs] == ["packed", "eager"]
    assert found.batches[0].decision == "dense" and "not_worth_it" in found.batches[0].why


class Counts(nn.Module):
    """A model that changes a buffer and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.lm, self.drop = small_model(), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids):
        self.calls += 1
        return self.drop(self.lm(input_ids))


@pytest.mark.parametrize("make", [small_model, Counts, ReadsTheFuture])
def test_explain_changes_nothing(make):
    model, batch = make(), batch_of()
    model(batch.input_ids).sum().backward()  # gradients that must stay
    before = {
        **{n: p.detach().clone() for n, p in model.named_parameters()},
        **{n: b.clone() for n, b in model.named_buffers()},
        **{f"{n}.grad": p.grad.clone() for n, p in model.named_parameters()},
    }
    training, rng = [m.training for m in model.modules()], torch.get_rng_state()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    pgcompile.explain(model, batch.input_ids, options=ALWAYS_PACK)
    after = {
        **dict(model.named_parameters()),
        **dict(model.named_buffers()),
        **{f"{n}.grad": p.grad for n, p in model.named_parameters()},
    }
    assert before.keys() == after.keys()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert not changed
    assert [m.training for m in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert model._compiled_call_impl is None


def test_explain_of_a_training_step_changes_nothing():
    model, batch = small_model(), batch_of()

    def step(input_ids):
        model(input_ids).sum().backward()

    found = pgcompile.explain(step, batch.input_ids, options=ALWAYS_PACK)
    assert found.graphs
    assert all(p.grad is None for p in model.parameters())


def test_explain_leaves_compiled_functions_alone():
    """Neither recompiles nor cache entries of the user's function; and it uses up nobody's recompile limit."""
    model, batch, graphs = small_model(), batch_of(), []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph

    fast = torch.compile(model, backend=record)
    expected = fast(batch.input_ids)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert pgcompile.explain(model, batch.input_ids, options=ALWAYS_PACK).status == "packed"
    assert torch.equal(fast(batch.input_ids), expected)
    assert len(graphs) == 1
    assert pgcompile.stats().recompile_limit_hits == 0


@pytest.mark.parametrize("way", ["module.compile", "torch.compile", "optimize"])
def test_explain_what_is_compiled_already(way):
    model, batch = small_model(), batch_of()
    target = model
    if way == "module.compile":
        model.compile(backend="pgcompile", options=ALWAYS_PACK)
    elif way == "torch.compile":
        target = torch.compile(model, backend="pgcompile", options=ALWAYS_PACK)
    else:
        target = (
            pgcompile.optimize(lambda ids: model(ids))
            if False
            else pgcompile.optimize(**ALWAYS_PACK)(model.forward)
        )
    found = pgcompile.explain(target, batch.input_ids, options=ALWAYS_PACK)
    assert found.status == "packed" and found.graphs and found.batches


def test_strict_raises_what_is_explained():
    model, batch = ReadsTheFuture(), batch_of()
    explained = pgcompile.explain(model, batch.input_ids)
    with pytest.raises(pgcompile.FallbackError) as caught:
        compiled(model, {"strict": True})(batch.input_ids)
    raised = str(caught.value)
    for reason in explained.graphs[0].fallbacks:
        assert (
            f"{reason.kind}: {reason.explanation}" in raised
            and reason.source in raised
            and reason.hint in raised
        )


def test_one_warning_per_graph(caplog):
    model, batch = ReadsTheFuture(), batch_of()
    fast = compiled(model)
    with caplog.at_level(logging.WARNING, "pgcompile"):
        for seed in range(3):
            fast(batch_of(seed).input_ids)
    records = [r for r in caplog.records if r.name == "pgcompile"]
    assert len(records) == 1 and "small_models.py" in records[0].getMessage()
    assert pgcompile.stats().eager == 3
    packs = compiled(small_model())
    with caplog.at_level(logging.WARNING, "pgcompile"):
        packs(batch.input_ids)
    assert len([r for r in caplog.records if r.name == "pgcompile"]) == 1


class Watched(nn.Module):
    """Breaks the graph between two layers."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, *others):
        print(end="")  # the break
        return self.layer(x, *others)


def test_graph_breaks_are_named_with_their_line():
    """In a loop over layers, where Dynamo gives up the function with the loop, and outside of one."""
    model, batch = rewire(ZOO["nano_gpt"](dim=16, layers=3)), batch_of()
    model.blocks[1] = Watched(model.blocks[1])
    in_loop = pgcompile.explain(model, batch.input_ids)
    outside = pgcompile.explain(lambda x: model.blocks[1](model.wte(x)).sum(), batch.input_ids)
    for found in (in_loop, outside):
        assert found.breaks and {reason.kind for reason in found.breaks} == {"graph_break"}
        assert all("test_reports.py" in b.source and "# the break" in b.source for b in found.breaks)
        assert str(found).splitlines()[1].startswith(f"Dynamo broke the call into {len(found.graphs)} graphs")
        assert str(found).count("Dynamo stops tracing") == 1
    assert not pgcompile.explain(model.blocks[0], model.wte(batch.input_ids)).breaks


def test_layers_behind_a_break_are_warned_of(caplog):
    """Not so a batch that shares nothing."""
    model, batch = rewire(ZOO["nano_gpt"](dim=16, layers=3)), batch_of()
    model.blocks[1] = Watched(model.blocks[1])
    with caplog.at_level(logging.WARNING, "pgcompile"):
        compiled(model, {"min_saving": None})(batch.input_ids)
    assert "graph_break: packing would save 0% of the work" in caplog.text
    with pytest.raises(pgcompile.FallbackError, match="graph_break"):
        compiled(model, {"min_saving": None, "strict": True})(batch.input_ids)


def test_a_refused_graph_says_that_it_was_broken(caplog):
    def broken(input_ids):
        x = model(input_ids)
        torch._dynamo.graph_break()
        return x

    model, batch = ReadsTheFuture(), batch_of()
    with caplog.at_level(logging.WARNING, "pgcompile"):
        compiled(broken)(batch.input_ids)
    assert "token_mixing" in caplog.text and "graph_break: Dynamo stops tracing" in caplog.text
    with pytest.raises(pgcompile.FallbackError, match="token_mixing") as caught:
        compiled(broken, {"strict": True})(batch.input_ids)
    assert caught.value.reasons[-1].kind == "graph_break"


def test_a_graph_without_attention_is_no_failure(caplog):
    """Behind a break, a loss is a graph of its own: no warning, and no error with strict=True."""
    model, batch = small_model(), batch_of()

    def loss(input_ids):
        logits = model(input_ids)
        torch._dynamo.graph_break()
        return logits.logsumexp(-1).mean()

    fast = torch.compile(loss, backend="pgcompile", options={"inner": "eager", "strict": True})
    with caplog.at_level(logging.WARNING, "pgcompile"):
        assert torch.allclose(fast(batch.input_ids), loss(batch.input_ids))
    assert not caplog.records
    assert (pgcompile.stats().packed, pgcompile.stats().eager) == (1, 0)


def test_dump_dir_gets_every_pass(tmp_path):
    from pgcompile.passes import PASSES

    batch = batch_of()
    compiled(small_model(), {"dump_dir": str(tmp_path / "new")})(batch.input_ids)
    files = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    for number, run_pass in enumerate(PASSES):
        for when in ("before", "after"):
            (name,) = [n for n in files if f"{number:02d}_{run_pass.__name__}.{when}" in n]
            assert "def forward" in files[name]
    last = next(text for name, text in files.items() if "lower_pass.after" in name)
    assert "prefix_attention" in last and "gather_tokens" in last
    assert len(files) == 2 * len(PASSES) and all(name.startswith("graph0_") for name in files)
