"""Around the compiler: options, reports, modes of running, and what happens when something fails.

What a model may be called with is in test_models_hf.py; here one compiled model goes through it all in a row.
"""

import copy
import gc
import json
import logging
import os
import random
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from harness import (
    ALWAYS_PACK,
    BACKEND,
    assert_no_worse_than_eager,
    brute_force_packed_tokens,
    compiled,
    differences,
    float64_everywhere,
    named_tensors,
    random_tree_batch,
    rewire,
    run,
)
from zoo import ZOO

if BACKEND != "pgcompile":
    pytest.skip("tests pgcompile's own behaviour", allow_module_level=True)

import pgcompile
from pgcompile import backend, inner, modes
from pgcompile import engines as engine_table
from pgcompile.options import Options
from pgcompile.passes.graph import size_hint
from pgcompile.passes.pipeline import OPTIONAL

BATCH = dict(rows=6, positions=9)

NEEDED = ("inline_pass", "opaque_pass", "aten_pass", "analyse_pass", "attention_pass", "lower_pass")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    inner._families.clear()  # else a model like one of an earlier test finds its packed graph compiled
    pgcompile.reset_stats()
    yield
    torch._dynamo.reset()


def zoo(name: str = "nano_gpt") -> nn.Module:
    """One layer, small: what is tested here is around the model."""
    torch.manual_seed(0)
    return rewire(ZOO[name](dim=16, layers=1))


class ReadsTheFuture(nn.Module):
    """Every token also sees the next one: never packs."""

    def __init__(self):
        super().__init__()
        self.lm = zoo()
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


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, nearest, some_valid",
    [
        ({"iner": "eager"}, "inner", "min_saving"),
        ({"inner": "inductr"}, "inductor", "aot_eager"),
        ({"fallback": "eagr"}, "eager", "inner"),
        ({"dropout": "share"}, "shared", "fallback"),
        ({"engine": "referenc"}, "reference", "auto"),
        ({"inner_mode": "max-autotun"}, "max-autotune", "reduce-overhead"),
        ({"disable_passes": ["verify"]}, "verify_pass", "lower_pass"),
    ],
)
@pytest.mark.parametrize("make", [Options.of, lambda options: Options(**options)])
def test_unknown_options_name_the_valid_and_the_nearest(make, options, nearest, some_valid):
    with pytest.raises(ValueError) as caught:
        make(options)
    text = str(caught.value)
    assert f"did you mean {nearest!r}" in text and repr(some_valid) in text


@pytest.mark.parametrize(
    "options",
    [
        {"min_saving": -0.1},
        {"min_saving": 1.5},
        {"min_saving": "0"},
        {"min_saving": float("nan")},
        {"min_saving": True},
        {"check": -1},
        {"check": True},
        {"check": 1.0},
        {"strict": "yes"},
        {"strict": 1},
        {"disable_passes": "verify_pass"},
        {"disable_passes": 3},
        {"dump_dir": 3},
        {"inner": None},
        {"inner_mode": 3},
    ],
)
def test_values_of_the_wrong_kind(options):
    with pytest.raises(ValueError):
        Options.of(options)


def test_options_are_frozen_and_pass_through():
    options = Options(inner="eager")
    assert Options.of(options) is options
    assert Options.of({}) == Options.of(None) == Options()
    assert Options.of(None, mode="default") == Options()
    assert Options.of(None, mode="reduce-overhead").inner_mode == "reduce-overhead"
    with pytest.raises(AttributeError):
        options.inner = "inductor"


@pytest.mark.parametrize("way", ["torch.compile", "module.compile", "optimize", "explain"])
def test_a_wrong_option_is_a_value_error_wherever_it_is_given(way):
    model, ids = zoo(), batch_of().input_ids
    with pytest.raises(ValueError, match="did you mean 'inner'"):
        if way == "torch.compile":
            torch.compile(model, backend="pgcompile", options={"iner": "eager"})(ids)
        elif way == "module.compile":
            model.compile(backend="pgcompile", options={"iner": "eager"})
            model(ids)
        elif way == "optimize":
            pgcompile.optimize(iner="eager")
        else:
            pgcompile.explain(model, ids, options={"iner": "eager"})


# ---------------------------------------------------------------------------------------------------------------------
# Ways in
# ---------------------------------------------------------------------------------------------------------------------


def test_optimize_a_function():
    @pgcompile.optimize(**ALWAYS_PACK)
    def logits(model, input_ids):
        return model(input_ids) * 2

    model, batch = zoo(), batch_of()
    torch.testing.assert_close(logits(model, batch.input_ids), model(batch.input_ids) * 2)
    assert pgcompile.stats().packed == 1


def test_optimize_an_instance():
    model, other, batch = zoo(), zoo(), batch_of()
    assert pgcompile.optimize(**ALWAYS_PACK)(model) is model
    torch.testing.assert_close(model(batch.input_ids), other(batch.input_ids))
    assert pgcompile.stats().packed == 1  # the other one was not touched


def test_optimize_a_class():
    @pgcompile.optimize(**ALWAYS_PACK)
    class Own(ZOO["nano_gpt"]):
        def forward(self, input_ids):
            return super().forward(input_ids)

    torch.manual_seed(0)
    first, second = rewire(Own()), rewire(Own(), seed=1)
    batch = batch_of()
    for model in (first, second):
        expected = ZOO["nano_gpt"].forward(model, batch.input_ids)
        torch.testing.assert_close(model(batch.input_ids), expected)
    assert pgcompile.stats().packed == 2
    assert isinstance(first, Own) and Own.__name__ == "Own"


def test_optimize_without_parentheses_takes_the_defaults():
    model = zoo()
    assert pgcompile.optimize(model) is model
    with pytest.raises(TypeError, match="function"):
        pgcompile.optimize(3)
    with pytest.raises(TypeError, match="function"):
        pgcompile.optimize(dict)


IN_A_FRESH_PROCESS = """
    import sys, torch
    sys.path.insert(0, {tests!r})
    from zoo import ZOO
    ids = torch.randint(0, 31, (1, 9)).repeat(4, 1)
    print("imported before:", "pgcompile" in sys.modules)
    fast = torch.compile(ZOO["nano_gpt"](), backend="pgcompile", options=dict(inner="eager", min_saving=0))
    fast(ids)
    refused = torch.compile(lambda x: x.softmax(-1), backend="pgcompile", options=dict(inner="eager"))
    for _ in range(3):
        refused(torch.ones(3, 4))
    print(sys.modules["pgcompile"].stats())
"""


@pytest.mark.parametrize("logs", [None, "+pgcompile"])
def test_entry_point_and_torch_logs(logs):
    """Nothing imports pgcompile before torch.compile finds it; one warning per graph; TORCH_LOGS makes it talk."""
    code = textwrap.dedent(IN_A_FRESH_PROCESS.format(tests=os.path.dirname(__file__)))
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_LOGS"}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **({"TORCH_LOGS": logs} if logs else {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert "1 packed, 0 dense, 3 eager" in finished.stdout
    assert logs or "imported before: False" in finished.stdout
    lines = finished.stderr.splitlines()
    assert sum("isn't packed" in line for line in lines) == 1, finished.stderr
    debug = [line for line in lines if "pgcompile" in line and "packs (" in line]
    assert bool(debug) == bool(logs), finished.stderr


# ---------------------------------------------------------------------------------------------------------------------
# stats, explain, strict, warnings
# ---------------------------------------------------------------------------------------------------------------------


def test_stats_add_up_and_reset():
    model, batch = zoo(), batch_of()
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
    for name in ("packed", "dense_tokens", "valid_tokens", "packed_tokens"):
        assert getattr(twice, name) == 2 * getattr(once, name)
    assert twice.compiles == 1 and twice.plan_seconds > once.plan_seconds > 0
    with pytest.raises(AttributeError):
        twice.packed = 0
    pgcompile.reset_stats()
    assert pgcompile.stats() == pgcompile.Stats()
    assert all(isinstance(v, int) for k, v in vars(twice).items() if k != "plan_seconds")


def test_dynamo_giving_up_is_counted():
    fast = torch.compile(lambda x, n: x + n, backend="pgcompile", options={"inner": "eager"}, dynamic=False)
    for n in range(torch._dynamo.config.recompile_limit + 3):
        fast(torch.ones(2), n)
    assert pgcompile.stats().recompile_limit_hits >= 1
    pgcompile.reset_stats()
    assert pgcompile.stats().recompile_limit_hits == 0


def test_explain_a_graph_that_packs():
    model, batch = zoo("half_rotary"), batch_of(padding="right")
    found = pgcompile.explain(model, **batch.inputs, options=ALWAYS_PACK)
    assert found.status == "packed" and len(found.graphs) == len(found.batches) == 1
    assert [a.mask.split(" ∧ ")[0] for a in found.graphs[0].attention] == ["causal"]
    report = found.batches[0]
    assert (report.rows, report.positions) == tuple(batch.input_ids.shape)
    assert report.packed_tokens < report.valid_tokens == batch.kept.sum() < report.dense_tokens
    assert report.decision == "packed" and 0 < report.saving < 1
    assert report.packed_pairs < report.dense_pairs and report.depth >= 1 and report.segments >= 2
    assert json.loads(json.dumps(found.to_dict()))["status"] == "packed"
    assert "packed" in str(found) and "causal" in str(found) and str(report.packed_tokens) in str(found)


def test_explain_a_graph_that_does_not():
    model, batch = ReadsTheFuture(), batch_of()
    found = pgcompile.explain(model, batch.input_ids)
    assert found.status == "eager"
    reasons = [reason for graph in found.graphs for reason in graph.fallbacks]
    assert reasons and all(reason.kind and reason.explanation for reason in reasons)
    assert any("test_runtime.py" in reason.source for reason in reasons)
    assert json.loads(json.dumps(found.to_dict()))["graphs"][0]["fallbacks"]
    assert reasons[0].kind in str(found)


def test_explain_survives_a_break_and_a_dense_batch():
    model = zoo()
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
        self.lm, self.drop = zoo(), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids):
        self.calls += 1
        return self.drop(self.lm(input_ids))


@pytest.mark.parametrize("make", [zoo, Counts, ReadsTheFuture])
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
    model, batch = zoo(), batch_of()

    def step(input_ids):
        model(input_ids).sum().backward()

    found = pgcompile.explain(step, batch.input_ids, options=ALWAYS_PACK)
    assert found.graphs
    assert all(p.grad is None for p in model.parameters())


def test_explain_leaves_compiled_functions_alone():
    """Neither recompiles nor cache entries of the user's function; and it uses up nobody's recompile limit."""
    model, batch, graphs = zoo(), batch_of(), []

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
    model, batch = zoo(), batch_of()
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
    assert len(records) == 1 and "test_runtime.py" in records[0].getMessage()
    assert pgcompile.stats().eager == 3
    packs = compiled(zoo())
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
        assert all("test_runtime.py" in b.source and "# the break" in b.source for b in found.breaks)
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
    model, batch = zoo(), batch_of()

    def loss(input_ids):
        logits = model(input_ids)
        torch._dynamo.graph_break()
        return logits.logsumexp(-1).mean()

    fast = torch.compile(loss, backend="pgcompile", options={"inner": "eager", "strict": True})
    with caplog.at_level(logging.WARNING, "pgcompile"):
        assert torch.allclose(fast(batch.input_ids), loss(batch.input_ids))
    assert not caplog.records
    assert (pgcompile.stats().packed, pgcompile.stats().eager) == (1, 0)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm, self.scale = zoo(), 0.5

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


class KeyBias(nn.Module):
    """One attention whose scores get `bias`, broadcast to [N, H, S, S], in float32."""

    def __init__(self, dtype=torch.float64, scale=0.3):
        super().__init__()
        self.scale = scale
        self.embed, self.head = nn.Embedding(31, 32, dtype=dtype), nn.Linear(32, 31, dtype=dtype)

    def forward(self, ids, bias):
        q = self.embed(ids).unflatten(-1, (4, 8)).transpose(1, 2)
        s = torch.arange(ids.shape[1])
        scores = (q @ q.mT * self.scale).to(torch.promote_types(q.dtype, torch.float32)) + bias
        weights = scores.masked_fill(s[:, None] < s, -torch.inf).softmax(-1)
        return self.head((weights.to(q.dtype) @ q).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_of_keys_is_not_rounded(dtype):
    """Numbers of which half precision knows every eighth or so: as errors they would be exponents."""
    model, ids = KeyBias(), batch_of().input_ids
    bias = torch.randn(1, 4, 1, ids.shape[1]) + 3000
    truth = model(ids, bias.double())
    half = KeyBias(dtype)
    half.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()})
    fast = compiled(half, {"inner": "inductor", "strict": True})
    errors = [(out.double() - truth).norm() / truth.norm() for out in (half(ids, bias), fast(ids, bias))]
    assert errors[1] <= 2 * errors[0] < 0.05
    assert pgcompile.stats().packed == 1


def errors_with_bias(dtype, bias, scale=0.3, engine="auto"):
    """Of eager, and of ours."""
    model, ids = KeyBias(scale=scale), batch_of().input_ids
    low = KeyBias(dtype, scale)
    low.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()})
    model.load_state_dict({name: value.double() for name, value in low.state_dict().items()})
    truth = model(ids, bias.double())
    fast = compiled(low, {"engine": engine})
    return [
        float(((out - truth).norm() / truth.norm()).detach()) for out in (low(ids, bias), fast(ids, bias))
    ]


@pytest.mark.parametrize("scale", [1e-6, 1e8])
def test_a_bias_next_to_a_scale_whose_inverse_is_no_half_precision_number(scale):
    eager, ours = errors_with_bias(torch.float16, torch.randn(4, 1, BATCH["positions"]), scale)
    assert ours <= 2 * eager or eager != eager
    model, ids = KeyBias(scale=scale), batch_of().input_ids
    (graph,) = pgcompile.explain(model, ids, torch.zeros(ids.shape[1])).graphs
    assert [reason.kind for reason in graph.fallbacks] == ["token_mixing"]


def test_a_bias_that_overflows_once_it_is_divided_by_the_scale():
    eager, ours = errors_with_bias(torch.float32, torch.randn(4, 1, BATCH["positions"]) * 1e37, 1e-3)
    assert ours <= 2 * eager


def test_a_bias_of_higher_precision_than_queries_and_keys():
    """Eager adds it to float64 scores."""
    bias = torch.randn(4, 1, BATCH["positions"], dtype=torch.float64) + 1e6
    eager, ours = errors_with_bias(torch.float32, bias)
    assert ours <= 10 * eager


def test_a_bias_where_products_are_rounded():
    """`set_float32_matmul_precision` is about products; what eager adds isn't rounded (or it would be off by 8)."""
    torch.set_float32_matmul_precision("medium")
    try:
        bias = torch.randn(4, 1, BATCH["positions"]) + 3000
        eager, ours = errors_with_bias(torch.float32, bias, engine="reference")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert ours <= 10 * eager


@pytest.mark.parametrize("number", [-torch.inf, torch.finfo(torch.float32).min, torch.nan])
def test_a_bias_that_may_be_a_mask_runs_dense(number):
    model, ids = KeyBias(), batch_of().input_ids
    bias = torch.zeros(len(ids), 1, 1, ids.shape[1])
    fast = compiled(model)
    assert torch.allclose(fast(ids, bias), model(ids, bias))
    assert pgcompile.stats().packed == 1
    bias[0, ..., -1] = number
    assert torch.allclose(fast(ids, bias), model(ids, bias), rtol=0, atol=0, equal_nan=True)
    assert pgcompile.stats().dense == 1
    (batch,) = pgcompile.explain(model, ids, bias, options={"min_saving": 0}).batches
    assert batch.decision == "dense" and "a bias of the scores is infinite" in batch.why


def test_dump_dir_gets_every_pass(tmp_path):
    from pgcompile.passes import PASSES

    batch = batch_of()
    compiled(zoo(), {"dump_dir": str(tmp_path / "new")})(batch.input_ids)
    files = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    for number, run_pass in enumerate(PASSES):
        for when in ("before", "after"):
            (name,) = [n for n in files if f"{number:02d}_{run_pass.__name__}.{when}" in n]
            assert "def forward" in files[name]
    last = next(text for name, text in files.items() if "lower_pass.after" in name)
    assert "prefix_attention" in last and "gather_tokens" in last
    assert len(files) == 2 * len(PASSES) and all(name.startswith("graph0_") for name in files)


# ---------------------------------------------------------------------------------------------------------------------
# Which way a call takes
# ---------------------------------------------------------------------------------------------------------------------


def test_nothing_shared_runs_dense_and_says_why():
    model = zoo()
    fast = torch.compile(model, backend="pgcompile", options={"inner": "eager"})
    apart = random_tree_batch(rows=3, positions=9, trees=3, duplicates=0, prefixes=0)
    assert_equals_eager(fast, model, apart)
    assert (pgcompile.stats().packed, pgcompile.stats().dense) == (0, 1)
    equal = random_tree_batch(rows=1, positions=9, trees=1, duplicates=0, prefixes=0)
    equal = type(equal)(equal.input_ids.repeat(3, 1), None)
    assert_equals_eager(fast, model, equal)
    assert (pgcompile.stats().packed, pgcompile.stats().dense) == (1, 1)


@pytest.mark.parametrize("wanted, decision", [(0.45, "packed"), (0.55, "dense")])
def test_min_saving_is_a_threshold(wanted, decision):
    model, ids = zoo(), torch.arange(9).repeat(2, 1)  # two equal rows: half of everything
    found = pgcompile.explain(model, ids, options={"min_saving": wanted})
    assert found.batches[0].saving == pytest.approx(0.5)
    assert found.batches[0].decision == decision


def test_short_branches_are_not_worth_a_segment():
    """By default 8 shared tokens are computed twice, 32 once; `min_saving=0` shares both."""
    model = zoo()
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
    model, batch = zoo("half_rotary"), batch_of(padding="right", prefixes=2)

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
    model, batch = zoo(), batch_of()
    for name in NEEDED:
        found = pgcompile.explain(model, batch.input_ids, options={"disable_passes": [name]})
        assert found.status == "eager"
        assert found.graphs[0].fallbacks[0].kind == "pass_disabled"
        assert_equals_eager(compiled(model, {"disable_passes": [name]}), model, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Inner compiles
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = [(6, 9), (5, 12), (3, 17), (7, 7), (2, 4)]


@pytest.mark.parametrize("dynamic", [True, None])
def test_new_shapes_do_not_compile_the_packed_graph_again(dynamic):
    """With `dynamic=None` Dynamo traces twice, first with fixed sizes: even those two share one packed graph."""
    model = zoo()
    fast = compiled(model, {"inner": "aot_eager"}, dynamic=dynamic)
    for seed, (rows, positions) in enumerate(SHAPES):
        assert_equals_eager(fast, model, random_tree_batch(rows=rows, positions=positions, seed=seed))
    stats = pgcompile.stats()
    assert stats.packed == len(SHAPES) and stats.compiles == 1


def test_static_shapes_share_the_packed_graph_too():
    model = zoo()
    fast = compiled(model, {"inner": "aot_eager"}, dynamic=False)
    for seed, (rows, positions) in enumerate(SHAPES):
        assert_equals_eager(fast, model, random_tree_batch(rows=rows, positions=positions, seed=seed))
    stats = pgcompile.stats()
    assert stats.packed == len(SHAPES) and stats.compiles == 1


def test_a_static_and_a_dynamic_trace_of_a_loss_are_one_packed_graph():
    model = zoo()

    def loss(input_ids):
        logits = model(input_ids)[:, :-1]
        return logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)[:, 3:].sum(1).mean()

    fast = compiled(loss, {"inner": "aot_eager"})
    for seed, (rows, positions) in enumerate(SHAPES):
        ids = random_tree_batch(rows=rows, positions=positions, seed=seed).input_ids
        torch.testing.assert_close(fast(ids), loss(ids), rtol=0, atol=1e-10)
    stats = pgcompile.stats()
    assert stats.packed == len(SHAPES) and stats.compiles == 1


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
    model = zoo()
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


def specialising(gm, inputs, options):
    """An inner compiler that makes a graph for each number of tokens."""
    assert sum(map(int, numbers_of_tokens(inputs))) > 0
    return gm


def comparing(gm, inputs, options):
    """An inner compiler that asks whether there are 8 tokens."""
    assert [bool(size == 8) for size in numbers_of_tokens(inputs)]
    return gm


def test_graphs_for_each_side_of_a_number_of_tokens(monkeypatch):
    monkeypatch.setattr(inner, "compile_inner", comparing)
    model = zoo()
    fast = compiled(model, {"inner": "aot_eager"}, dynamic=True)
    for tokens in (12, 10, 8, 6, 5, 8, 14):
        ids = sharing_a_prompt(tokens)
        torch.testing.assert_close(fast(ids), model(ids), rtol=0, atol=1e-10)
    stats = pgcompile.stats()
    assert (stats.packed, stats.compiles) == (7, 3)


def test_graphs_for_single_numbers_of_tokens(monkeypatch):
    """Each is right, and there is an end to them."""
    monkeypatch.setattr(inner, "compile_inner", specialising)
    model = zoo()
    fast = compiled(model, {"inner": "aot_eager"}, dynamic=True)
    for seed in range(20):
        assert_equals_eager(fast, model, random_tree_batch(rows=4 + seed, positions=9, seed=seed))
    stats = pgcompile.stats()
    assert stats.compiles == inner.Family.MOST <= stats.packed < 20 and stats.packed + stats.dense == 20


@pytest.mark.slow
def test_inductor_compiles_once():
    model = zoo()
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
    monkeypatch.setattr(inner, "compile_inner", lambda *args: calls.append(args) or compile_inner(*args))
    model = zoo()
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
    model, batch = zoo(), batch_of()
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
    model, batch = zoo(), batch_of(padding="right")
    fast = compiled(model, {"inner": inner_compiler, "strict": True})
    with torch.inference_mode():
        fast(**batch.inputs)
    with float64_everywhere():
        assert_equals_eager(fast, model, batch)
    stats = pgcompile.stats()
    assert (stats.packed, stats.plans_reused) == (2, 1)


@pytest.mark.parametrize("way", ["prologue", "packed"])
def test_modes_that_a_failing_graph_switched_on_are_off_again(way, monkeypatch):
    """The original runs after it, and what it runs into is the caller's."""
    entered = []

    def failing(*args):
        torch.autocast("cpu", torch.bfloat16).__enter__()
        torch.set_grad_enabled(False)
        entered.append(1)
        raise Seeded("stopped between two switches")

    model, batch = zoo(), batch_of()
    fast = compiled(model)
    monkeypatch.setattr(backend, "build_plan" if way == "prologue" else "compiled_packed", failing)
    before = modes.modes(), modes._autocast_nesting()
    assert_equals_eager(fast, model, batch)
    assert entered and (modes.modes(), modes._autocast_nesting()) == before
    assert pgcompile.stats().dense == 1


class SeveralOutputs(nn.Module):
    """Logits, positions first, and what each head gets: each laid out in memory as said."""

    def __init__(self):
        super().__init__()
        self.lm = zoo()

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
    model = zoo("half_rotary").to(dtype)
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
            model = zoo("half_rotary")
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
    model = zoo("half_rotary")
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
    model, batch = zoo(), batch_of()
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
    model = zoo(name) if name == "half_rotary" else build(name)
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


class Seeded(Exception):
    """What the tests make something raise."""


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
    model, batch = zoo(), batch_of()
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

    def failing(gm, inputs, options):
        calls.append(gm)
        raise Seeded("seeded failure")

    monkeypatch.setattr(inner, "compile_inner", failing)
    model = zoo()
    fast = compiled(model, {"inner": "aot_eager"}, dynamic=True)
    for seed in range(3):
        assert_equals_eager(fast, model, batch_of(seed))
    monkeypatch.setattr(inner, "compile_inner", compile_inner)
    assert_equals_eager(fast, model, batch_of(3))
    assert (pgcompile.stats().dense, pgcompile.stats().packed) == (3, 1)
    monkeypatch.setattr(inner, "compile_inner", failing)
    fast = compiled(zoo("half_rotary"), {"inner": "aot_eager"}, dynamic=True)
    calls.clear()
    for seed in range(2 * inner.Family.MOST):
        fast(batch_of(seed).input_ids)
    assert len(calls) == inner.Family.MOST + 1  # and once for the original


@pytest.mark.parametrize("what", ["pass", "verification", "plan", "engine"])
def test_failures_are_in_the_report(what, monkeypatch):
    model, batch = zoo(), batch_of()
    BREAKS[what](monkeypatch)
    found = pgcompile.explain(model, batch.input_ids, options=ALWAYS_PACK)
    text = json.dumps(found.to_dict())
    assert "seeded failure" in text and "Seeded" in text
    assert found.status == "eager" or found.batches[0].decision == "dense"


@pytest.mark.parametrize("what", BREAKS)
def test_strict_raises_the_failure(what, monkeypatch):
    model, batch = zoo(), batch_of()
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
    model, batch = zoo(), batch_of()
    BREAKS[what](monkeypatch, error)
    with pytest.raises(error, match="seeded failure"):
        compiled(model)(batch.input_ids)


def test_a_failure_of_one_call_is_over_with_it(monkeypatch):
    model, batch = zoo(), batch_of()
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
    model, batch = zoo(), batch_of()
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
    model, batch = zoo(), batch_of()
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

    def recording(graph, inputs, options):
        compiled_graphs.append(graph)
        return original(graph, inputs, options)

    monkeypatch.setattr(inner, "compile_inner", recording)
    model = ReadsTheFuture()
    fast = compiled(model, {"inner": "aot_eager", "fallback": "inner"}, dynamic=True)
    for seed in range(3):
        assert_equals_eager(fast, model, batch_of(seed, rows=4 + seed, positions=9 + seed))
    assert len(compiled_graphs) == 1 and pgcompile.stats().eager == 3


# ---------------------------------------------------------------------------------------------------------------------
# check
# ---------------------------------------------------------------------------------------------------------------------


def test_check_compares_the_first_batches(monkeypatch):
    from pgcompile import check

    checked = []
    original = check.compare
    monkeypatch.setattr(check, "compare", lambda *args: (checked.append(1), original(*args)))
    model = zoo("half_rotary")
    fast = compiled(model, {"check": 2})
    with float64_everywhere():
        for seed in range(4):
            assert_equals_eager(
                fast, model, batch_of(seed, padding="right")
            )  # its backward runs after the check's
    assert len(checked) == 2


def test_check_without_gradients():
    model, batch = zoo(), batch_of()
    with torch.no_grad():
        assert_equals_eager(compiled(model, {"check": 1}), model, batch)


@pytest.mark.parametrize("how", ["autocast", "loss in float32"])
def test_check_is_as_coarse_as_what_computes(how):
    model, batch = zoo(), batch_of(rows=8, positions=40)
    model = model.float() if how == "autocast" else model.bfloat16()

    def loss(input_ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return model(input_ids).float().log_softmax(-1)[..., 3]

    compiled(loss, {"check": 1, "strict": True})(batch.input_ids).sum().backward()
    assert pgcompile.stats().checked == 1


def test_check_leaves_out_what_is_drawn(caplog):
    model, batch = zoo(), batch_of()

    def noisy(input_ids):
        logits = model(input_ids)
        return logits + torch.rand_like(logits)

    with caplog.at_level(logging.WARNING, "pgcompile"):
        compiled(noisy, {"check": 1, "strict": True})(batch.input_ids)
    assert "not checked: the graph draws random numbers" in caplog.text and pgcompile.stats().checked == 0


@pytest.mark.parametrize("early_stop", [False, True])
def test_check_inside_of_checkpointing_compares_values(early_stop, monkeypatch):
    model, batch = zoo(), batch_of()
    fast = compiled(model, {"check": 2, "strict": True})

    def whole(call):
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            logits = torch.utils.checkpoint.checkpoint(call, batch.input_ids, use_reentrant=False)
        return torch.autograd.grad(logits.square().sum(), list(model.parameters()))

    for ours, theirs in zip(whole(fast), whole(model)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert (
        pgcompile.stats().checked == 2 - early_stop
    )  # the second time, when backward recomputes the whole call
    original = backend.pack_column
    monkeypatch.setattr(backend, "pack_column", lambda *args: original(*args).roll(1, -1))
    torch._dynamo.reset()
    with pytest.raises(pgcompile.CheckError, match="output 0"):
        whole(compiled(model, {"check": 1}))


def test_check_misses_no_gradient(monkeypatch):
    """One that packing loses altogether."""
    model, batch = zoo(), batch_of()
    fast = compiled(model, {"check": 1})
    kept = next(iter(model.parameters()))
    late = backend.PackedCall._late
    monkeypatch.setattr(
        backend.PackedCall,
        "_late",
        lambda self, args, results, packed, plan: late(
            self, args, results, [p.detach() + 0 * kept.sum() for p in packed], plan
        ),
    )
    with pytest.raises(pgcompile.CheckError, match="gradient of argument"):
        fast(batch.input_ids)


def test_check_notices_wrong_values(monkeypatch):
    original = backend.pack_column
    monkeypatch.setattr(
        backend, "pack_column", lambda value, dims, plan: original(value, dims, plan).roll(1, -1)
    )
    model, batch = zoo(), batch_of()
    with pytest.raises(pgcompile.CheckError, match="output 0"):
        compiled(model, {"check": 1})(batch.input_ids)


def test_check_notices_wrong_gradients(monkeypatch):
    """The forward is right; the gradient of what is unpacked is halved."""
    from pgcompile import ops

    original = ops._segment_sum
    monkeypatch.setattr(ops, "_segment_sum", lambda *args: original(*args) / 2)
    model, batch = zoo(), batch_of()
    with pytest.raises(pgcompile.CheckError, match="gradient"):
        compiled(model, {"check": 1})(batch.input_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Threads and memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_compiler", ["eager", "aot_eager"])
def test_eight_cold_threads_with_a_hundred_batches_each(inner_compiler):
    model = zoo()
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
    monkeypatch.setattr(inner, "compile_inner", lambda *args: (compiles.append(1), original(*args))[1])
    model = zoo()
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
    model = zoo("half_rotary")
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
    model, batch = zoo(), batch_of()
    fast = compiled(model, {"inner": "aot_eager"})
    fast(batch.input_ids)
    assert len(inner._families) == 1
    torch._dynamo.reset()
    gc.collect()
    assert len(inner._families) == 0
    assert_equals_eager(fast, model, batch)
    assert pgcompile.stats().compiles == 2


def test_deterministic_algorithms():
    """torch's own switch, under which operations without a deterministic backward raise."""
    model, batch = zoo("half_rotary").float(), batch_of(padding="right")
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
    model, batch = zoo(), batch_of()
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
    model, batch = zoo(), batch_of()
    ref = weakref.ref(model.lm_head.weight)
    compiled(model, {"inner": "aot_eager"})(batch.input_ids).sum().backward()
    del model
    torch._dynamo.reset()
    gc.collect()
    assert ref() is None
