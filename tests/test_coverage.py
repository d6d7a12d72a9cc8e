"""`pgcompile coverage`, and the types that must pack: forward and backward, exact, one token per distinct prefix."""

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

pytest.importorskip("transformers")
from pgcompile.cli.main import commands
from pgcompile.coverage import command
from pgcompile.coverage.batch import LENGTHS, bench_batch
from pgcompile.coverage.measure import BOUNDS, CLASSES, Row, is_causal, measure
from pgcompile.coverage.table import totals
from pgcompile.coverage.tiny_models import MODEL_TYPES
from pgcompile.engines import cpu

ROOT = Path(__file__).parent.parent
CLASS_A = [name for name in MODEL_TYPES if CLASSES.get(name) == "A"]


def _slow_if_twice(name):
    """The decoder of a type that is there, too."""
    twice = name.endswith("_text") and name.removesuffix("_text") in CLASS_A
    return pytest.param(name, marks=pytest.mark.slow) if twice else name


@pytest.mark.parametrize("model_type", [_slow_if_twice(name) for name in CLASS_A])
def test_class_a_packs_exactly(model_type):
    row = measure(model_type)
    assert (row.status, row.reasons) == ("packed", [])
    assert row.packed_tokens == row.distinct_tokens
    assert row.precision == "float64"
    assert row.value_error <= BOUNDS["float64"][0] and row.gradient_error <= BOUNDS["float64"][1]
    assert row.float32_ratio is None or row.float32_ratio <= 2


def test_class_a_is_complete():
    assert len([name for name, kind in CLASSES.items() if kind == "A"]) == 111
    assert len(CLASS_A) >= 100  # an older transformers lacks some


# -- a bench that can fail -------------------------------------------------------------------------------------------


# A mixture of experts has a second run, in float32.
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_other_values_are_wrong(monkeypatch, model_type):
    original = cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *args: (original(*args)[0] * (1 + 1e-8), original(*args)[1]))
    row = measure(model_type)
    assert row.status == "wrong" and row.value_error > 1e-10


def test_other_gradients_are_wrong(monkeypatch):
    original = cpu.attention_backward
    monkeypatch.setattr(
        cpu, "attention_backward", lambda *args: (original(*args)[0] * (1 + 1e-7), *original(*args)[1:])
    )
    row = measure("qwen3")
    assert row.status == "wrong" and row.value_error <= 1e-10 and row.gradient_error > 1e-9


def test_float32_errors_count_for_mixtures_of_experts(monkeypatch):
    original = cpu.attention

    def coarse(q, *args):
        out, lse = original(q, *args)
        return (out.bfloat16().float() if q.dtype == torch.float32 else out), lse

    monkeypatch.setattr(cpu, "attention", coarse)
    row = measure("mixtral")
    assert row.status == "wrong" and row.value_error <= 1e-10 and row.float32_ratio > 2


def test_a_type_that_cannot_be_built_is_an_error():
    row = measure("no_such_type")
    assert row.status == "error" and "no_such_type" in row.reasons[0]


def test_reasons_lead_to_the_models_code():
    row = measure("mamba")
    assert row.status == "eager"
    assert re.search(r"conv1d.*, at transformers/models/mamba/modeling_mamba.py:\d+ in ", row.reasons[0])


class Mean(nn.Module):
    """Adds the mean over `dim` to every token's logits."""

    def __init__(self, dim):
        super().__init__()
        self.embed, self.dim = nn.Embedding(128, 8), dim

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return x + x.mean(self.dim, keepdim=True) if self.dim is not None else x.cumsum(1)


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_causality_is_seen(dim):
    batch = bench_batch(128)
    assert is_causal(Mean(dim), {"input_ids": batch.input_ids}, batch) == (dim is None)


def test_the_batch_is_a_tree_of_depth_two_with_padding():
    batch = bench_batch(128)
    assert batch.kept.sum(1).tolist() == list(LENGTHS)
    rows = [row.tolist() for row in batch.input_ids]
    shared = {
        (a, b): next(i for i in range(24) if rows[a][i] != rows[b][i]) for a in range(4) for b in range(a)
    }
    assert shared[1, 0] == shared[3, 2] == 14 and shared[2, 0] == 6
    assert batch.distinct_tokens == 6 + 2 * 8 + sum(length - 14 for length in LENGTHS)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Types are not measured but given a status; which ones were asked for."""
    asked = []

    def give(name):
        asked.append(name)
        status = {"mamba": "eager", "xlnet": "not causal"}.get(name, "packed")
        reasons = [] if status == "packed" else ["token_mixing: why | because, at a.py:3 in f"] * 2
        return Row(
            name,
            status,
            CLASSES[name],
            ["sdpa: causal"],
            "cpu",
            55,
            55,
            "float64",
            1e-15,
            2e-15,
            None,
            reasons,
        )

    monkeypatch.setattr(command, "measure", give)
    return asked


def run(*args):
    return CliRunner().invoke(commands, ["coverage", *map(str, args)], env={"COLUMNS": "160"})


def test_the_last_line_counts(measured):
    result = run("--only", "llama,qwen3*,mamba,xlnet")
    qwen = [name for name in MODEL_TYPES if name.startswith("qwen3")]
    assert sorted(measured) == sorted(["llama", "mamba", "xlnet", *qwen])
    count = len(qwen) + 1
    last = f"packed {count}, islands 0, eager 1, wrong 0, not causal 1 of {count + 2}"
    assert result.exit_code == 0 and result.output.splitlines()[-1] == last
    assert "token_mixing: why | because, at a.py:3 in f" in result.output


def test_all_types_by_default(measured):
    assert run().exit_code == 0
    assert measured == list(MODEL_TYPES)


def test_a_class(measured):
    run("--class", "A2, E")
    assert measured == [name for name in MODEL_TYPES if CLASSES.get(name) in ("A2", "E")]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--only", "lama"], "'lama' matches no causal-LM type; did you mean 'llama'?"),
        (["--class", "F"], "no type has the class 'F'"),
        (["--class", "C", "--only", "llama"], "'llama' matches no causal-LM type of class C"),
        (["--resume"], "--resume needs --json"),
        (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["--json", __file__], "exists: --resume keeps its rows"),
    ],
)
def test_bad_arguments(args, message, measured):
    result = run(*args)
    assert result.exit_code == 2 and message in result.output and not measured


def test_wrong_types_fail_the_command(monkeypatch):
    monkeypatch.setattr(
        command, "measure", lambda name: Row(name, "wrong", value_error=1.0, gradient_error=0.0)
    )
    assert run("--only", "llama").exit_code == 1


def test_json_is_kept_and_resumed(measured, tmp_path):
    file = tmp_path / "rows.json"
    run("--only", "llama,mamba", "--json", file)
    rows = json.loads(file.read_text())
    assert [row["model_type"] for row in rows] == ["llama", "mamba"]
    assert rows[1]["reasons"][0].startswith("token_mixing")
    measured.clear()
    result = run("--only", "llama,mamba,gpt2", "--json", file, "--resume")
    assert measured == ["gpt2"] and "packed 2" in result.output
    assert {row["model_type"] for row in json.loads(file.read_text())} == {"gpt2", "llama", "mamba"}


def test_an_interrupted_run_keeps_its_rows(measured, tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    give = command.measure

    def interrupted(name):
        if name == "llama":
            raise KeyboardInterrupt
        return give(name)

    monkeypatch.setattr(command, "measure", interrupted)
    result = run("--only", "gpt2,llama", "--json", file)
    assert result.exit_code == 130 and "interrupted after 1 of 2 types" in result.output
    assert [row["model_type"] for row in json.loads(file.read_text())] == ["gpt2"]


def test_a_file_of_something_else_is_not_resumed(measured, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('{"no": "rows"}')
    result = run("--only", "llama", "--json", file, "--resume")
    assert result.exit_code == 1 and "has no rows of `pgcompile coverage`" in result.output
    assert file.read_text() == '{"no": "rows"}'


def test_the_page(measured, tmp_path):
    page = tmp_path / "coverage.md"
    run("--only", "llama,mamba", "--markdown", page)
    text = page.read_text()
    assert "**packed 1, islands 0, eager 1, wrong 0, not causal 0 of 2**" in text
    assert "| llama | packed | sdpa: causal | cpu | 55/55 | 1e-15 | 2e-15 |  |" in text
    assert "token_mixing: why \\| because, at a.py:3 in f (and 1 more)" in text


def test_the_committed_page_counts_its_rows():
    text = (ROOT / "docs" / "coverage.md").read_text()
    statuses = re.findall(
        r"^\| [\w.-]+ \| (packed|islands|eager|wrong|not causal|error) \|", text, re.MULTILINE
    )
    assert totals([Row("", status) for status in statuses]) in text
    assert len(statuses) >= 189


def test_nothing_but_the_benches_names_models():
    """A model is accepted because its graph is understood, not because of its name."""
    files = [*(ROOT / "passes").rglob("*.py"), *(ROOT / "pgcompile").rglob("*.py")]
    names = re.compile("|".join(rf"(?<![a-z]){re.escape(name)}(?![a-z])" for name in CLASSES), re.IGNORECASE)
    for file in files:
        if not {"coverage", "bench"} & set(file.parts):
            assert names.search(file.read_text()) is None, file
