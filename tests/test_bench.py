"""`pgcompile bench`: what a case is, what is counted, who is refused, and what is kept."""

import dataclasses
import importlib.util
import json
import os
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

pytest.importorskip("transformers")
import pgcompile
from pgcompile.bench import agreement, command, contestants, machine, measure, peers
from pgcompile.bench.agreement import Errors, Outcome, Yardstick, by_rows
from pgcompile.bench.cases import GRIDS, Case, build, group_case, tree_case
from pgcompile.bench.contestants import CONTESTANTS, Contestant, Setup
from pgcompile.bench.models import SIZES, Model, ModelWork, build_model, count_work, token_logprobs
from pgcompile.bench.page import page
from pgcompile.bench.results import Record, Row, read, write
from pgcompile.cli.main import commands

CPU = torch.device("cpu")
WIDTH, LAYERS, HEADS, SIZE, VOCABULARY = 64, 2, 4, 16, 257
CONFIG = dict(
    model_type="qwen3",
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    head_dim=SIZE,
)
SHAPES = [
    group_case(24, 8, 4),
    group_case(20, 4, 2, batch=3),
    tree_case(3, 2, 5, 5),
    tree_case(3, 3, 2, 9, batch=2),
    Case("ragged", 24, 12, 5, shortest=3, masked=True),
    Case("nothing shared", answer=20, group=4),
    Case("nothing shared, padded", answer=20, group=4, shortest=4, masked=True),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture(scope="module")
def model(config):
    return build_model(config, None, 64, torch.float32, CPU)


# -- cases -----------------------------------------------------------------------------------------------------------


def prefixes(batch):
    """The rows' prefixes, one by one: what distinct tokens are."""
    rows = [row[:length].tolist() for row, length in zip(batch.ids, batch.lengths)]
    return [[tuple(row[: end + 1]) for end in range(len(row))] for row in rows]


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_tokens_pairs_and_predictions_by_brute_force(case):
    batch = build(case, VOCABULARY)
    rows = prefixes(batch)
    distinct = {prefix for row in rows for prefix in row}
    n, s = batch.ids.shape
    assert (n, s) <= (case.most_rows, case.most_tokens)
    assert batch.tokens == {"dense": n * s, "valid": sum(map(len, rows)), "distinct": len(distinct)}
    assert batch.pairs == {
        "dense": n * sum(range(1, s + 1)),
        "valid": sum(len(prefix) for row in rows for prefix in row),
        "distinct": sum(map(len, distinct)),
    }
    starts = [len(row) - int((w != 0).sum()) for row, w in zip(rows, batch.weights)]
    predicting = [row[start - 1 : -1] for row, start in zip(rows, starts)]
    assert batch.predictions == {
        "dense": n * (s - min(starts)),
        "valid": sum(map(len, predicting)),
        "distinct": len({prefix for row in predicting for prefix in row}),
    }


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_classes_are_prefixes_in_depth_first_order(case):
    batch = build(case, VOCABULARY)
    number = {}
    for row, classes in zip(prefixes(batch), batch.class_of.tolist()):
        for prefix, found in zip(row, classes):
            assert number.setdefault(prefix, found) == found
    assert sorted(number.values()) == list(range(len(number)))
    ends = peers.subtree_ends(batch).tolist()
    for prefix, k in number.items():
        below = {number[other] for other in number if other[: len(prefix)] == prefix}
        assert below == set(range(k, ends[k]))


def test_answers_count_as_often_as_rows_have_them():
    batch = build(SHAPES[4], VOCABULARY)
    per_row = batch.weights * (batch.weights != 0).sum()
    for row, length in zip(per_row, batch.lengths.tolist()):
        assert (row != 0).tolist() == [24 + k < length for k in range(batch.answer_positions)]
        assert len(row[row != 0].unique()) == 1
    assert batch.lengths.min() < batch.lengths.max()


def test_grids_name_each_case_once():
    for grid in GRIDS.values():
        assert len({case.name for case in grid}) == len(grid)
    assert len(GRIDS["paper"]) == len(GRIDS["cpu"]) == 3 * 6 * 4
    assert {(c.prompt // c.answer, c.prompt) for c in GRIDS["cpu"]} == {
        (ratio, prompt) for ratio in (1, 2, 4, 8, 16, 32) for prompt in (512, 1024, 2048)
    }
    assert all(case.published for case in GRIDS["published"])


# -- work ------------------------------------------------------------------------------------------------------------


def test_work_is_what_the_shapes_say(model):
    work = count_work(model)
    kv = 2 * SIZE
    layer = WIDTH * (2 * HEADS * SIZE + 2 * kv) + 3 * WIDTH * 96
    assert work.per_pair == LAYERS * HEADS * 2 * SIZE
    assert work.per_prediction == WIDTH * VOCABULARY
    rotary = SIZE // 2  # transformers multiplies positions and frequencies as matrices
    assert work.per_token - LAYERS * layer in (0, rotary)


def test_ideal_is_the_ratio_of_counted_work():
    work = ModelWork(per_token=100, per_pair=7, per_prediction=30)
    record = Record.of(group_case(6, 2, 3), build(group_case(6, 2, 3), VOCABULARY), work, "step")
    dense = 100 * 3 * 8 + 7 * 3 * 36 + 30 * 3 * 2
    distinct = 100 * (6 + 3 * 2) + 7 * (21 + 3 * (7 + 8)) + 30 * (1 + 3)
    assert record.ideal == dense / distinct
    assert record.operations["dense"] == 6 * dense
    assert Record.of(group_case(6, 2, 3), build(group_case(6, 2, 3), VOCABULARY), work, "forward").operations[
        "distinct"
    ] == (2 * distinct)


@pytest.mark.parametrize("case", [group_case(6, 2, 3), tree_case(3, 2, 2, 9), group_case(0, 5, 3)])
def test_a_batch_of_as_many_tokens_and_predictions_that_shares_nothing(case):
    batch = build(case, VOCABULARY)
    alone = batch.distinct()
    rows, length = alone.ids.shape
    assert (
        length <= batch.ids.shape[1]
        and batch.tokens["distinct"] - rows < alone.ids.numel() <= batch.tokens["distinct"]
    )
    assert alone.tokens["distinct"] == alone.ids.numel()
    assert batch.predictions["distinct"] - rows < alone.weights.numel() <= batch.predictions["distinct"]
    assert alone.weights.sum() == pytest.approx(1)
    assert torch.equal(alone.ids[0, : int(batch.lengths[0])], batch.ids[0, : int(batch.lengths[0])][:length])


def test_figures_of_a_record():
    record = Record({"name": "a"}, "step", {}, {"dense": 800, "valid": 800, "distinct": 200})
    fast, slow = Row("dense-compiled", is_dense=True), Row("dense", is_dense=True)
    ours = Row("pgcompile", seconds=[1.0, 1.0, 3.0], first_seconds=5.0, planning_seconds=[0.1, 0.1, 0.2])
    fast.seconds, slow.seconds, fast.peak_bytes, slow.peak_bytes, ours.peak_bytes = [3.0], [9.0], 100, 50, 20
    record.rows = [slow, fast, ours]
    assert record.baseline is fast and record.speedup(ours) == 3 and record.efficiency(ours) == 0.75
    assert record.memory_ratio(ours) == 0.4 and ours.compile_seconds == 4 and ours.planning_share == 0.1
    assert record.memory_overhead(ours) is None
    fast.ideal_bytes, slow.ideal_bytes = 30, 16
    assert record.memory_overhead(ours) == 1.25 and record.memory_overhead(slow) is None
    assert record.utilization(ours, 400) == 0.5 and record.utilization(fast, 400) == pytest.approx(2 / 3)
    slow.status = fast.status = "out of memory"
    assert record.speedup(ours) is record.efficiency(ours) is record.memory_ratio(ours) is None


# -- models ----------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_models():
    """Parameters as published, embeddings included."""
    expected = {
        "qwen3-0.6b": 596e6,
        "qwen3-4b": 4.02e9,
        "qwen3-8b": 8.19e9,
        "llama-3.2-1b": 1.236e9,
        "gpt2": 124e6,
    }
    assert set(expected) < set(SIZES)
    for name, count in expected.items():
        with torch.device("meta"):
            module = build_model(name, None, 16, torch.bfloat16, torch.device("meta")).module
        assert sum(p.numel() for p in module.parameters()) == pytest.approx(count, rel=0.01), name


def test_layers_are_cut(config):
    assert len(build_model(config, 1, 64, torch.float32, CPU).module.model.layers) == 1
    gpt2 = build_model("gpt2", 1, 2048, torch.bfloat16, torch.device("meta")).module
    assert len(gpt2.transformer.h) == 1 and gpt2.transformer.wpe.num_embeddings == 2048


def test_dense_attention_takes_the_causal_path(model, monkeypatch):
    """Without a mask tensor, compiled too; with padding the mask is there."""
    seen = []
    original = nn.functional.scaled_dot_product_attention
    batch = build(SHAPES[4], VOCABULARY)

    def record(gm, inputs):
        seen.extend(
            (node.kwargs.get("attn_mask"), node.kwargs["is_causal"])
            for node in gm.graph.nodes
            if node.target is original
        )
        return gm

    torch._dynamo.reset()
    torch.compile(token_logprobs, backend=record)(model, batch.ids, 4)
    assert seen == [(None, True)] * LAYERS
    seen.clear()
    torch.compile(token_logprobs, backend=record)(model, batch.ids, 4, attention_mask=batch.mask.long())
    assert [mask is None for mask, _ in seen] == [False] * LAYERS


def test_twins_share_parameters(model):
    twin = model.twin("eager").module
    assert twin is not model.module and twin.config._attn_implementation == "eager"
    assert all(a is b for a, b in zip(twin.parameters(), model.module.parameters()))
    assert model.module.config._attn_implementation == "causal_sdpa"


class Plain(nn.Module):
    """A model of one's own: ids [N, S] → logits [N, S, 64], and takes nothing else."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(64, 32), nn.Linear(32, 96), nn.Linear(32, 64)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return self.head(x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


def test_a_model_of_ones_own():
    name = f"{__name__}:Plain"
    own = build_model(name, None, 64, torch.float32, CPU)
    assert count_work(own) == ModelWork(32 * 96 + 32 * 64, 2 * 32, 0)
    result = run("--device", "cpu", "--model", name, *SMALL, "--against", "dense,prefix-grouper,flex-tree")
    assert result.exit_code == 0 and "needs a transformers model" in result.output
    assert "--layers" in run("--device", "cpu", "--model", name, "--layers", 1).output


# -- contestants -----------------------------------------------------------------------------------------------------


def setup(model, case, phase="step"):
    return Setup(model, build(case, VOCABULARY), case.masked, phase, {"inner": "eager", "min_saving": 0})


def why_wrong(model, case, run_of):
    """The judgement of a contestant in float32."""
    made = setup(model, case)
    yardstick = Yardstick.of(model, made.batch, "step")
    runner = measure.Runner(Row(""), made, run_of(made))
    measure._check_first_call(runner, model, "step", yardstick)
    assert (runner.row.status == "wrong") == bool(runner.row.reason)
    return runner.row.reason or None, runner.row.errors


@pytest.mark.parametrize("case", [SHAPES[i] for i in (0, 3, 4, 6)], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["dense", "pgcompile"])
def test_ours_agree(model, case, name):
    reason, ratios = why_wrong(model, case, CONTESTANTS[name].prepare)
    assert reason is None and ratios.keys() == {"logprobs", "gradient", "parameter"}


def test_a_gradient_that_is_a_sum_over_tokens_may_round():
    """A norm's weight: as far as a float32 sum of so many terms is, and named where it is further."""
    truth = Outcome(torch.ones(1, 1, dtype=torch.float64), [torch.ones(4, dtype=torch.float64)] * 2)
    yardstick = Yardstick(
        truth, Errors(1, 3, (2, 2)), Errors(1e-6, 1e-5, (1e-7, 1e-7)), ("a", "norm.weight"), 1
    )
    found = Outcome(truth.logprobs, [truth.gradients[0], truth.gradients[1] + 4e-6])
    reason, ratios = yardstick.why_wrong(found)
    assert (
        reason is not None and reason.startswith("the gradient of norm.weight: ") and ratios["gradient"] < 1
    )
    reason, ratios = dataclasses.replace(yardstick, tokens=8192).why_wrong(found)
    assert reason is None and 0.5 < ratios["parameter"] < 1
    matrices = Outcome(truth.logprobs, [g.view(2, 2) for g in truth.gradients])
    off = Outcome(truth.logprobs, [g.view(2, 2) for g in found.gradients])
    assert dataclasses.replace(yardstick, truth=matrices, tokens=8192).why_wrong(off)[0] is not None
    further = Outcome(truth.logprobs, [truth.gradients[0], truth.gradients[1] + 4e-5])
    wide = dataclasses.replace(yardstick, own=Errors(1e-6, 1e-4, (1e-7, 1e-7)), tokens=8192)
    assert wide.why_wrong(further)[0] is not None


def test_a_model_whose_rows_depend_on_each_other_is_said_to_be_one():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(40, 8), nn.Linear(8, 40)

        def forward(self, ids):
            x = self.embedding(ids)
            return self.head(x + x.mean((0, 1)))

    torch.manual_seed(0)
    mixes = Model(Mixes(), 40, {}, False, False)
    record = measure.measure(
        SHAPES[0], mixes, ModelWork(1, 1, 1), {"dense": CONTESTANTS["dense"]}, "step", 1, {}
    )
    [row] = record.rows
    assert row.status == "wrong" and "do this model's rows depend on each other?" in row.reason


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_prefix_grouper_agrees_or_says_why_not(model, case):
    pytest.importorskip("prefix_grouper")
    why = CONTESTANTS["prefix-grouper"].why_not(setup(model, case))
    if case.tree or not case.prompt:
        assert why in ("shares one prompt per group, not a tree", "needs a prompt")
    else:
        assert why is None and why_wrong(model, case, CONTESTANTS["prefix-grouper"].prepare)[0] is None


def visible(block_mask):
    """bool [T, T] of a block mask."""
    t = block_mask.seq_lengths[0]
    return block_mask.mask_mod(0, 0, torch.arange(t)[:, None], torch.arange(t)[None, :])


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_flex_tree_agrees_with_its_kernel_replaced(model, case, monkeypatch):
    """FlexAttention has no backward pass on CPU: plain attention under its mask stands in."""
    import torch.nn.attention.flex_attention as flex

    def attend(query, key, value, block_mask, scale, enable_gqa):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, visible(block_mask), scale=scale, enable_gqa=enable_gqa
        )

    monkeypatch.setattr(flex, "flex_attention", attend)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert why_wrong(model, case, CONTESTANTS["flex-tree"].prepare)[0] is None


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_trl_tree_agrees_with_its_kernel_replaced(model, case, monkeypatch):
    """FlashAttention-3 needs a GPU: a loop over its sequences stands in."""
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")

    class Kernel:
        @staticmethod
        def flash_attn_varlen_func(q, k, v, ends_q, ends_k, *_, softmax_scale, causal, window_size):
            assert causal and window_size == (-1, -1)
            parts = []
            bounds = zip(ends_q, ends_q[1:], ends_k, ends_k[1:])
            for q0, q1, k0, k1 in bounds:
                lengths = int(q1 - q0), int(k1 - k0)
                mask = torch.ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0])
                part = nn.functional.scaled_dot_product_attention(
                    *(x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])),
                    mask,
                    scale=softmax_scale,
                    enable_gqa=True,
                )
                parts.append(part[0].transpose(0, 1))
            return torch.cat(parts)

    monkeypatch.setattr(packing, "_flash_attn", lambda: Kernel)
    assert why_wrong(model, case, CONTESTANTS["trl-tree"].prepare)[0] is None


def test_who_can_not_run_says_why(model, monkeypatch):
    made = setup(model, SHAPES[0])
    assert CONTESTANTS["flex-tree"].why_not(made) == "FlexAttention has no backward pass on CPU"
    assert CONTESTANTS["trl-tree"].why_not(made) == "needs CUDA and FlashAttention-3"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in CONTESTANTS["prefix-grouper"].why_not(made)


def shifted_weights(made):
    """A wrong contestant: the first answer token of each row isn't trained (its predictor is the prompt's last)."""
    run = contestants.dense(made)

    def call():
        logprobs = run()
        return torch.cat([logprobs[:, :1].detach(), logprobs[:, 1:]], 1)

    return call


def slightly_off(made):
    """Another: 1 + 1e-5 times the values. Gradients of float32 are about 1e-6 from the truth."""
    run = contestants.dense(made)
    return lambda: run() * (1 + 1e-5)


@pytest.mark.parametrize("wrong", [shifted_weights, slightly_off])
def test_a_wrong_contestant_gets_no_figure(model, wrong):
    chosen = {"dense": CONTESTANTS["dense"], "wrong": Contestant(wrong)}
    record = measure.measure(SHAPES[0], model, count_work(model), chosen, "step", 1, {})
    right, found = record.rows
    assert right.status == "measured" and len(right.seconds) == 1
    assert found.status == "wrong" and "times as far from the truth" in found.reason
    assert found.seconds == [] and found.peak_bytes is None and record.speedup(found) is None


def test_bfloat16_is_judged_by_eagers_own_error(config):
    low = build_model(config, None, 64, torch.bfloat16, CPU)
    for name in ("dense", "pgcompile"):
        reason, ratios = why_wrong(low, SHAPES[0], CONTESTANTS[name].prepare)
        assert reason is None, (name, ratios)
    off = dataclasses.replace(
        CONTESTANTS["dense"], prepare=lambda made: lambda: contestants.dense(made)() * 1.01
    )
    assert why_wrong(low, SHAPES[0], off.prepare)[0] is not None


def test_the_truth_needs_no_batch(model):
    """Row by row without padding gives the gradients of the padded batch."""
    case = SHAPES[4]
    batch = build(case, VOCABULARY)
    wide = model.wider(torch.float64)
    for parameter in wide.module.parameters():
        parameter.grad = torch.ones_like(parameter)  # of something else; it must not count
    truth = by_rows(wide, batch, "step", torch.float64)
    logprobs = token_logprobs(wide, batch.ids, batch.answer_positions)
    (logprobs * batch.weights).sum().backward()
    for found, parameter in zip(truth.gradients, wide.module.parameters()):
        assert torch.allclose(found, parameter.grad, rtol=1e-9, atol=1e-14)
    assert torch.allclose(truth.logprobs, logprobs.detach() * (batch.weights != 0))


def test_a_truth_that_needs_too_much_memory_is_checkpointed(model, monkeypatch):
    wide = model.wider(torch.float64)
    batch = build(SHAPES[0], VOCABULARY)
    expected = by_rows(wide, batch, "step", torch.float64)
    calls, rows = [], []
    layer = next(child for child in wide.module.modules() if isinstance(child, nn.ModuleList))[0]
    next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def full(*given, **arguments):
        rows.append(1)
        if len(rows) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return token_logprobs(*given, **arguments)

    monkeypatch.setattr(agreement, "token_logprobs", full)
    before = {name: set(vars(child)) for name, child in wide.module.named_modules()}
    found = by_rows(wide, batch, "step", torch.float64)
    assert {name: set(vars(child)) for name, child in wide.module.named_modules()} == before
    assert len(rows) == 2 + len(batch.ids) and len(calls) == 1 + 2 * len(batch.ids) and all(calls)
    for a, b in zip((found.logprobs, *found.gradients), (expected.logprobs, *expected.gradients)):
        assert torch.equal(a, b)
    rows[:] = [1]
    with (
        pytest.raises(torch.OutOfMemoryError),
        torch.no_grad(),
    ):  # without a backward pass there is nothing to keep
        by_rows(wide, batch, "forward", torch.float64)


def test_out_of_memory_and_errors_stay_with_their_contestant(model):
    def full(made):
        def call():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

        return call

    def broken(made):
        raise KeyError("no")

    chosen = {"full": Contestant(full), "broken": Contestant(broken), "dense": CONTESTANTS["dense"]}
    record = measure.measure(SHAPES[0], model, count_work(model), chosen, "step", 1, {})
    assert [row.status for row in record.rows] == ["out of memory", "error", "measured"]
    assert record.rows[1].reason == "KeyError: 'no'"


def test_steps_are_timed_until_they_took_long_enough(model, monkeypatch):
    timed = measure.timed_step
    monkeypatch.setattr(measure, "timed_step", lambda *given: (0.25, timed(*given)[1]))
    chosen = dict.fromkeys(("one", "other"), CONTESTANTS["dense"])

    def steps(repeats, min_run_time):
        record = measure.measure(
            SHAPES[0], model, count_work(model), chosen, "step", repeats, {}, min_run_time=min_run_time
        )
        return [len(row.seconds) for row in record.rows]

    assert steps(1, 1.2) == [3, 3]
    assert steps(4, 1.2) == [4, 4]
    chosen = {"broken": Contestant(lambda made: lambda: 1 / 0)}
    assert steps(1, 1.2) == [0]


def test_each_timed_step_plans(model, monkeypatch):
    """As in training, where no batch comes twice; the tree is the case's every time."""
    reused = []
    timed = measure.timed_step

    def watched(*given):
        before = pgcompile.stats().plans_reused
        result = timed(*given)
        reused.append(pgcompile.stats().plans_reused - before)
        return result

    monkeypatch.setattr(measure, "timed_step", watched)
    chosen = {"pgcompile": CONTESTANTS["pgcompile"]}
    record = measure.measure(SHAPES[0], model, count_work(model), chosen, "step", 3, {"inner": "eager"})
    assert reused[1:] == [0, 0, 0]  # the first is the check: its batch may be known from other cases
    assert record.rows[0].packing["tokens"] == record.tokens["distinct"]


def test_the_version_names_the_state_of_the_sources(monkeypatch):
    version = machine.describe(CPU)["versions"]["pgcompile"]
    assert re.fullmatch(r"[\d.]+\+[0-9a-f]{8}", version)
    assert machine.describe(CPU)["versions"]["pgcompile"] == version
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"changed")
    assert machine.describe(CPU)["versions"]["pgcompile"] != version


def test_sources_that_are_reached_through_links_have_the_same_version(monkeypatch, tmp_path):
    """As in the tree that mypy reads, where folders are links too."""
    version = machine.describe(CPU)["versions"]["pgcompile"]
    package = tmp_path / "pgcompile"
    package.mkdir()
    for part in Path(pgcompile.__file__).parent.iterdir():
        (package / part.name).symlink_to(part)
    (package / "passes").unlink(missing_ok=True)
    (package / "passes").symlink_to(pgcompile.passes.__path__[0])
    monkeypatch.setattr(machine, "__file__", str(package / "bench" / "machine.py"))
    monkeypatch.setattr(pgcompile.passes, "__path__", [str(package / "passes")])
    assert machine.describe(CPU)["versions"]["pgcompile"] == version


def test_the_kernels_of_dense_attention_have_a_name():
    assert machine._dense_attention(CPU) == "FLASH_ATTENTION"


def test_peak_memory_is_the_highest_level():
    x = torch.ones(1000)

    def step():
        a = x + 1
        b = a + 1
        del a
        c = b + 1
        return c

    step()
    assert 8000 <= machine.peak_memory(CPU, step) < 8100  # and some scalars


def test_the_last_of_the_memory_is_refused_and_not_promised():
    """Nothing is written to it; and afterwards, the limit is as before."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    lines = Path("/proc/meminfo").read_text().splitlines()
    (free,) = (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    with machine.limited_memory():
        torch.empty(free // 2, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as found:
            torch.empty(free // 100 * 98, dtype=torch.uint8)
    assert machine.is_out_of_memory(found.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


# -- the command -----------------------------------------------------------------------------------------------------


def run(*args, width=200):
    return CliRunner().invoke(commands, ["bench", *map(str, args)], env={"COLUMNS": str(width)})


SMALL = ("--prompt", 48, "--answer", 8, "--group", 4, "--repeats", 2, "--options", "inner=eager")


def test_a_whole_run(config, tmp_path):
    file, picture, text = tmp_path / "r.json", tmp_path / "p.png", tmp_path / "p.md"
    result = run(
        "--device", "cpu", "--model", config, *SMALL, "--against", "dense,prefix-grouper,trl-tree",
        "--budget-seconds", 1234567, "--json", file, "--plot", picture, "--markdown", text,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "P=48 R=8 G=4: pgcompile, first call\n" in result.output  # a log shows no bar
    (record,) = read(file)
    assert [row.name for row in record.rows] == ["dense", "prefix-grouper", "trl-tree", "pgcompile"]
    ours = record.rows[-1]
    assert ours.status == "measured" and ours.packing["decision"] == "packed"
    assert ours.packing["tokens"] == record.tokens["distinct"] == 48 + 4 * 8 and ours.packing["depth"] == 2
    assert len(ours.seconds) == 2 and ours.peak_bytes < record.rows[0].peak_bytes
    assert record.machine["device"] == "CPU" and record.machine["versions"]["torch"] == torch.__version__
    assert record.settings["options"] == ["inner=eager"] and "--prompt 48 --answer 8" in record.command
    assert "--budget-seconds 1234567 --json" in record.command  # as it was typed
    assert ours.ideal_bytes is None and 0 < record.rows[0].ideal_bytes < record.rows[0].peak_bytes
    for word in (
        "P=48 R=8 G=4",
        "median",
        "efficiency",
        "of dense",
        "of ideal",
        "trl-tree: unavailable",
        "planning",
    ):
        assert word in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert record.command in text.read_text() and "needs CUDA and FlashAttention-3" in text.read_text()


@pytest.fixture
def measured(monkeypatch):
    """Cases aren't measured but given a figure; which ones were asked for."""
    asked = []

    def give(case, model, work, chosen, phase, repeats, options, tell, min_run_time):
        asked.append(case.name)
        record = Record.of(case, build(case, model.vocab_size), work, phase)
        for name, contestant in chosen.items():
            dense = contestant.is_dense
            seconds = 1.0 if dense else 1.25 / record.ideal
            row = Row(name, is_dense=dense, seconds=[seconds] * repeats, first_seconds=9.0, peak_bytes=2**30)
            record.rows.append(row)
        record.rows[-1].packing = {"decision": "packed", "tokens": record.tokens["distinct"], "depth": 2}
        return record

    monkeypatch.setattr(command, "measure", give)
    monkeypatch.setitem(
        GRIDS, "cpu", [group_case(p, p // r, g) for p in (16, 32) for r in (1, 4) for g in (2, 4)]
    )
    return asked


def test_a_grid_is_resumed(config, measured, tmp_path):
    file = tmp_path / "r.json"
    arguments = ("--device", "cpu", "--model", config, "--grid", "cpu", "--json", file)
    names = [case.name for case in GRIDS["cpu"]]
    result = run(*arguments, "--budget-seconds", 0)
    assert result.exit_code == 3 and "the budget is spent: 8 cases left" in result.output and not measured
    result = run(*arguments)
    assert result.exit_code == 0 and measured == names
    said = [
        line
        for line in result.output.splitlines()
        if line.endswith("times as fast as dense, 80% of the ideal")
    ]
    assert [line.split(": ")[0] for line in said] == names  # each as soon as it is measured
    first = file.read_text()
    measured.clear()
    result = run(*arguments)
    assert result.exit_code == 0 and measured == [] and file.read_text() == first
    assert f"8 of 8 cases are in {file}" in result.output
    assert run(*arguments, "--against", "dense").exit_code == 0 and measured == []  # it has more than that
    run(*arguments, "--against", "dense,flex-tree")
    assert measured == names and len(read(file)) == 8
    measured.clear()
    run(*arguments, "--layers", 1)
    assert measured == names and len(read(file)) == 16  # other settings: kept beside


def test_a_case_that_would_not_end_in_time_does_not_begin(config, measured, tmp_path, monkeypatch):
    """Each token takes a second, by a clock that nothing else moves: 80 s, then 160 or 40, some of which compiles."""
    now, give = [0.0], command.measure

    def slow(case, *rest):
        now[0] += case.most_rows * case.most_tokens
        return give(case, *rest)

    monkeypatch.setattr(command, "measure", slow)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setitem(GRIDS, "cpu", [group_case(32, 8, 2), group_case(32, 8, 4), group_case(16, 4, 2)])
    arguments = ("--device", "cpu", "--model", config, "--grid", "cpu", "--json", tmp_path / "r.json")
    result = run(*arguments, "--budget-seconds", 130)
    assert result.exit_code == 3 and "the budget is spent" in result.output
    assert measured == ["P=32 R=8 G=2", "P=16 R=4 G=2"]
    measured.clear()
    result = run(
        *arguments, "--budget-seconds", 90
    )  # too little, the file says; but else it would never go on
    assert result.exit_code == 0 and measured == ["P=32 R=8 G=4"]


def test_building_the_model_is_not_of_the_budget(config, measured, tmp_path, monkeypatch):
    """Else the same command would never go on."""
    now, build_model = [0.0], command.build_model

    def slowly(*given):
        now[0] += 1000
        return build_model(*given)

    monkeypatch.setattr(command, "build_model", slowly)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: now[0]))
    result = run("--device", "cpu", "--model", config, "--grid", "cpu", "--budget-seconds", 130)
    assert result.exit_code == 0 and len(measured) == 8


def test_what_compiling_and_failing_took_says_nothing_about_others(config, measured, tmp_path, monkeypatch):
    """By a clock that nothing else moves: 9 s of compiling for each row, of which one failed, and 30 for its ideal."""
    now, give = [0.0], command.measure

    def slow(case, *rest):
        record = give(case, *rest)
        record.rows[0].status, record.rows[0].seconds = "wrong", []
        record.rows[0].ideal_compile_seconds = 30.0
        now[0] += 100 + 30 + 9 * len(record.rows)
        return record

    monkeypatch.setattr(command, "measure", slow)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: now[0]))
    file = tmp_path / "r.json"
    run("--device", "cpu", "--model", config, "--grid", "cpu", "--json", file, "--repeats", 1)
    for record in read(file):
        others = sum(row.seconds[0] for row in record.rows if row.seconds)
        assert record.took == pytest.approx(100 + others)


def test_the_file_says_what_would_not_end_in_time(config, measured, tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    monkeypatch.setitem(GRIDS, "cpu", [group_case(16, 4, 2), group_case(32, 8, 4), group_case(32, 8, 2)])
    arguments = ("--device", "cpu", "--model", config, "--grid", "cpu", "--json", file)
    run(*arguments, "--budget-seconds", 1000)
    records = read(file)
    records[0].took = 40.0
    write(file, records[:1])
    measured.clear()
    result = run(*arguments, "--budget-seconds", 130)
    assert result.exit_code == 3 and measured == ["P=32 R=8 G=2"]


def test_an_interrupted_grid_keeps_its_cases(config, measured, tmp_path, monkeypatch):
    give = command.measure

    def interrupted(case, *rest):
        if len(measured) == 3:
            raise KeyboardInterrupt
        return give(case, *rest)

    monkeypatch.setattr(command, "measure", interrupted)
    file = tmp_path / "r.json"
    result = run("--device", "cpu", "--model", config, "--grid", "cpu", "--json", file)
    assert result.exit_code == 130 and "interrupted: 5 cases left; the same command goes on" in result.output
    assert [record.name for record in read(file)] == measured and len(measured) == 3


def test_an_interrupt_before_the_first_case_ends(config, measured, tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupted)
    file = tmp_path / "r.json"
    result = run("--device", "cpu", "--model", config, "--grid", "cpu", "--json", file)
    assert result.exit_code == 130 and "interrupted: 8 cases left\n" in result.output and not file.exists()


def test_files_are_shown_drawn_and_written_as_a_page(config, measured, tmp_path):
    file, picture, text = tmp_path / "r.json", tmp_path / "p.png", tmp_path / "p.md"
    notes = tmp_path / "notes.toml"
    notes.write_text(
        '[notes]\n"P=32 R=8" = "no pattern"\n"P=16 R=1? *" = "gathers | copies"\n"P=16 *" = "second"\n'
    )
    run("--device", "cpu", "--model", config, "--grid", "cpu", "--json", file)
    measured.clear()
    result = run("--plot", picture, "--markdown", text, "--notes", notes, file)
    assert result.exit_code == 0 and not measured and "P=32 R=8 G=4" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = text.read_text()
    assert "- P=16 R=16 G=2, 80.0%: gathers | copies" in found
    assert "- P=32 R=8 G=4, 80.0%: not explained yet" in found
    assert "Not measured" not in found
    write(file, read(file)[:-2])
    run("--markdown", text, file)
    assert "\nNot measured: P=32 R=8 G=2, P=32 R=8 G=4.\n" in text.read_text()
    assert found.startswith("# Performance") and "Written by `pgcompile bench --plot" in found


@pytest.mark.parametrize("status", ["wrong", "error"])
def test_a_wrong_or_failing_pgcompile_fails_the_command(config, status, monkeypatch):
    def give(case, model, work, *rest):
        record = Record.of(case, build(case, model.vocab_size), work, "step")
        record.rows = [Row("pgcompile", status, "the gradient: far off")]
        return record

    monkeypatch.setattr(command, "measure", give)
    result = run("--device", "cpu", "--model", config, *SMALL)
    assert result.exit_code == 1 and "the gradient: far off" in result.output


@pytest.mark.parametrize(
    "status, is_again", [("error", True), ("out of memory", True), ("unavailable", False)]
)
def test_failures_are_kept_with_their_reasons_until_a_retry(
    config, measured, status, is_again, tmp_path, monkeypatch
):
    give = command.measure

    def failing(*args):
        record = give(*args)
        record.rows[0].status, record.rows[0].reason, record.rows[0].seconds = status, "no luck", []
        return record

    monkeypatch.setattr(command, "measure", failing)
    arguments = ("--device", "cpu", "--model", config, *SMALL, "--json", tmp_path / "r.json")
    run(*arguments)
    again = run(*arguments)
    assert len(measured) == 1 and f"dense: {status}: no luck" in again.output
    run(*arguments, "--retry")
    assert len(measured) == 1 + is_again


def test_what_others_measured_is_not_lost(config, tmp_path):
    """A contestant more: the case is measured again with those of the file, which keep their figures."""
    file = tmp_path / "r.json"
    run("--device", "cpu", "--model", config, *SMALL, "--json", file, "--against", "dense")
    result = run("--device", "cpu", "--model", config, *SMALL, "--json", file, "--against", "dense-compiled")
    assert "measured before, and again beside the others: dense\n" in result.output
    (record,) = read(file)
    assert [row.name for row in record.rows] == ["dense", "dense-compiled", "pgcompile"]
    assert all(row.median is not None for row in record.rows)


def test_nothing_is_written_of_no_records(tmp_path):
    empty, text = tmp_path / "empty.json", tmp_path / "p.md"
    empty.write_text("[]")
    result = run(empty, "--markdown", text)
    assert result.exit_code == 1 and "no records to write a page" in result.output and not text.exists()


def test_a_model_that_fails_itself_is_a_reason(model, monkeypatch):
    def fails(*_):
        raise IndexError("index out of range in self")

    monkeypatch.setattr(measure.Yardstick, "of", fails)
    chosen = {name: CONTESTANTS[name] for name in ("dense", "pgcompile")}
    record = measure.measure(SHAPES[0], model, count_work(model), chosen, "step", 1, {})
    assert [row.status for row in record.rows] == ["error", "error"]
    assert all(row.reason.endswith("IndexError: index out of range in self") for row in record.rows)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits(config, measured, width):
    result = run("--device", "cpu", "--model", config, "--grid", "published", "--repeats", 1, width=width)
    assert result.exit_code == 0
    assert "…" not in result.output and "verl 1.26× (R assumed)" in result.output
    table = [line for line in result.output.splitlines() if "times as fast" not in line]
    assert max(map(len, table)) <= width
    assert result.output.index("efficiency") < result.output.index("─")  # in the first table, however narrow


def record_on_a_page(name, device, dtype, operations=2):
    record = Record(
        {"name": name, "prompt": 1}, "step", dict.fromkeys(("dense", "valid", "distinct"), 8),
        {"dense": operations, "valid": operations, "distinct": operations / 2},
    )  # fmt: skip
    record.machine = dict(
        device=device, processor="Xeon", threads=2, python="3.12", versions={"torch": "2.13"}
    )
    record.settings = dict(model="m", layers=None, dtype=dtype, repeats=1)
    record.date, record.command = "2026-01-02T03:04:05+00:00", "pgcompile bench"
    return record


def test_the_page_keeps_machines_and_settings_apart():
    records = []
    for device, dtype in (("NVIDIA H200", "bf16"), ("CPU", "fp32")):
        record = record_on_a_page("a|b", device, dtype, 2e15)
        steps = 3 if device == "CPU" else 1
        record.rows = [Row("dense", is_dense=True, seconds=[4.0]), Row("pgcompile", seconds=[2.0] * steps)]
        records.append(record)
    text = page(records, {}, "pgcompile bench --markdown x")
    assert text.count("\n## ") == 2 and "NVIDIA H200 (Xeon), 2 threads" in text
    assert "1 timed step of each" in text and "1 to 3 timed steps of each" in text
    assert "| **a\\|b** |" in text and "| pgcompile | 2.00 s | 2.00 | 2.00 | 100% | 2.00–2.00 s |" in text
    assert text.count("51%") == 2  # 1e15 in 2 s and 2e15 in 4 s, of 989e12, on the H200 only
    assert "Below 95%" not in text and "Without figures" not in text


@pytest.mark.parametrize(
    "distinct, seconds, is_listed",
    [(8, 4.05, False), (8, 4.12, True), (4, 2.08, False), (4, 2.15, True)],
)
def test_the_page_says_what_is_below_the_goal(distinct, seconds, is_listed):
    """A step may take 2% longer than dense where nothing can be saved, and 5% longer than the ideal elsewhere."""
    record = record_on_a_page("case", "CPU", "fp32", operations=16)
    record.tokens["distinct"] = distinct
    record.operations["distinct"] = 2 * distinct
    record.rows = [Row("dense", is_dense=True, seconds=[4.0]), Row("pgcompile", seconds=[seconds])]
    text = page([record], {"case": "chance"}, "pgcompile bench --markdown x")
    assert (": chance" in text) == is_listed


def test_the_page_says_how_many_of_the_tokens_are_distinct():
    record = record_on_a_page("case", "CPU", "fp32")
    record.tokens = {"dense": 8, "valid": 7, "distinct": 5}
    packings = {tokens: dict(decision="packed", tokens=tokens, depth=2) for tokens in (5, 6)}
    record.rows = [Row("dense", is_dense=True, seconds=[4.0])]
    record.rows += [Row(f"pgcompile{n}", seconds=[2.0], packing=packing) for n, packing in packings.items()]
    text = page([record], {}, "pgcompile bench --markdown x")
    cells = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert "8 (7 valid)" in cells["| dense"]
    assert "5" in cells["| pgcompile5"] and "6 (5 distinct)" in cells["| pgcompile6"]


def test_the_page_says_in_which_cases_there_are_no_figures():
    records = []
    for name in ("one", "two", "three"):
        record = record_on_a_page(name, "CPU", "fp32")
        status = "measured" if name == "two" else "out of memory"
        record.rows = [Row("dense", status, "tried"), Row("trl-tree", "unavailable", "needs CUDA")]
        records.append(record)
    text = page(records, {}, "pgcompile bench --markdown x")
    found = text.split("Without figures:\n\n")[1]
    assert found == "- one; three: dense: out of memory: tried\n- trl-tree: unavailable: needs CUDA\n"


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "qwen3-0.6"], "did you mean 'qwen3-0.6b'?"),
        (["--model", "no/config.json"], "can't open no/config.json"),
        (["--model", "json:loads2"], "can't import json:loads2"),
        (["--model", "collections:OrderedDict"], "collections:OrderedDict() gives OrderedDict, no nn.Module"),
        (["--model", "tiny-cpu", "--layers", "5"], "tiny-cpu has 4 layers, not 5"),
        (["--against", "dense,flex-treee"], "did you mean 'flex-tree'?"),
        (["--prompt", "-1"], "-1 is not in the range x>=0"),
        (["--answer", "0"], "0 is not in the range x>=1"),
        (["--tree", "3,2"], "isn't DEPTH,BRANCH,TURN"),
        (["--tree", "3,0,5"], "numbers are at least 1"),
        (["--tree", "3,2,9-5"], "ranges ascend"),
        (["--tree", "3,2,5", "--prompt", "4"], "--tree replaces --prompt"),
        (["--grid", "cpu", "--group", "4"], "--grid has shapes of its own; leave out --group"),
        (["--prompt", "0", "--answer", "1"], "rows need two tokens"),
        (["--tree", "1,3,1-9"], "rows need two tokens"),
        (["--grid", "papers"], "'papers' is not one of"),
        (["--options", "iner=eager"], "did you mean 'inner'?"),
        (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["--options", "inner"], "Invalid value for --options: 'inner' isn't key=value"),
        (["--notes", __file__], "--notes needs --markdown"),
        (["--retry"], "--retry needs --json"),
        (["--plot", "a.xyz"], "a.xyz: matplotlib writes"),
        (["--plot", "a.png", "--tree", "3,2,5"], "--plot draws prompts with answers of one length"),
    ],
)
def test_bad_arguments(args, message):
    result = run("--device", "cpu", *args)
    assert result.exit_code != 0 and message in " ".join(result.output.split())
    assert not isinstance(result.exception, AssertionError | TypeError | KeyError)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "isn't JSON"),
        ("{}", "has no model_type"),
        ('{"model_type": "no_such"}', "is no config of transformers"),
    ],
)
def test_bad_config_files(text, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    result = run("--device", "cpu", "--model", file)
    assert result.exit_code != 0 and message in " ".join(result.output.split())


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "isn't JSON"),
        ("{}", "no records"),
        ("[]", "no records"),
        ('["a"]', "has no records"),
        ("[{}]", "has no records"),
    ],
)
def test_files_without_records(text, message, tmp_path):
    file = tmp_path / "r.json"
    file.write_text(text)
    result = run(file)
    assert message in " ".join(result.output.split()) and isinstance(result.exception, SystemExit | None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_cuda_device_is_said():
    assert "there is no CUDA device" in run("--device", "cuda").output


def test_json_is_replaced_whole(tmp_path):
    from pgcompile.files import write_atomically

    file = Path(tmp_path / "a.json")
    write_atomically(file, "one")
    write_atomically(file, "two")
    assert file.read_text() == "two" and [f.name for f in tmp_path.iterdir()] == ["a.json"]
    link = Path(tmp_path / "link.json")
    link.symlink_to(file)
    write_atomically(link, "three")
    assert link.is_symlink() and file.read_text() == "three"


def test_what_is_no_file_is_written_to(tmp_path):
    """/dev/stdout, say."""
    from pgcompile.files import write_atomically

    pipe = Path(tmp_path / "pipe")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "text")
    assert os.read(reader, 99) == b"text" and pipe.is_fifo()
    os.close(reader)
    assert read(pipe) == []
