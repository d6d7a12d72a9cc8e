"""`pgcompile run`: a script's models go through pgcompile, and nothing else of it changes."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from harness import BACKEND, random_tree_batch
from tiny_hf import build
from zoo.gpt2_conv1d import GPT2Conv1D

if BACKEND != "pgcompile":
    pytest.skip("about pgcompile's command line", allow_module_level=True)

import pgcompile
from pgcompile.cli.everywhere import Everywhere, switch_off, switch_on
from pgcompile.cli.run import after_import, parse_options
from pgcompile.options import Options

SCRIPT = """
import os, pickle, signal, sys
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(64, 32), nn.Linear(32, 96), nn.Linear(32, 64)

    def forward(self, ids):
        q, k, v = self.qkv(self.embed(ids))[:, None].chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


torch.manual_seed(0)
model = Model().double()
ids = torch.randint(64, (8, 40))
ids[:, :32] = ids[0, :32].clone()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.10f}")
print(__name__, sys.argv, os.path.basename(__file__), os.path.basename(sys.path[0]), sys.stdin.read())
print(list(model.state_dict()), sorted(k for k in vars(pickle.loads(pickle.dumps(model))) if "compiled" in k))
match sys.argv[1]:
    case "raise":
        raise ValueError("my own")
    case "exit":
        sys.exit(3)
    case "interrupt":
        signal.raise_signal(signal.SIGINT)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def execute(*command, cwd):
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        input="a line",
        text=True,
        capture_output=True,
    )


def test_a_report_stays_where_it_was_asked_for(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "leaves.py").write_text("import os; os.chdir('other')")
    execute("-m", "pgcompile", "run", "--report", "out.json", "leaves.py", cwd=tmp_path)
    assert [path.parent for path in tmp_path.rglob("out.json")] == [tmp_path]


@pytest.mark.parametrize("ending", ["return", "raise", "exit", "interrupt"])
def test_the_script_is_as_without(script, ending, tmp_path):
    plain = execute(script, ending, "--report", "mine", cwd=tmp_path)
    report = tmp_path / "report.json"
    ours = execute(
        "-m", "pgcompile", "run", "--options", "inner=eager", "--report", report, script, ending, "--report", "mine",
        cwd=tmp_path,
    )  # fmt: skip
    assert (ours.stdout, ours.returncode) == (plain.stdout, plain.returncode)
    if ending == "raise":
        assert ours.stderr == plain.stderr and "ValueError: my own" in plain.stderr
    found = json.loads(report.read_text())
    assert [model["model"] for model in found["models"]] == ["Model"]
    model = found["models"][0]
    assert model["graphs"] == ["packed"] and model["decisions"] == {"packed": 3} and model["reasons"] == []
    assert (model["dense_tokens"], model["packed_tokens"]) == (3 * 320, 3 * (32 + 8 * 8))
    assert found["stats"]["packed"] == 3 and found["stats"]["recompile_limit_hits"] == 0


SURROUNDINGS = """
import dataclasses, sys
@dataclasses.dataclass
class A:
    x: int = 0
print(dataclasses.fields(A)[0].type, hasattr(__builtins__, "print"), __annotations__, __spec__, __package__, __doc__)
print(type(__loader__).__name__, sorted(vars()), __file__, sys.argv)
"""


@pytest.mark.parametrize("text", [SURROUNDINGS, "x = (\n"], ids=["names", "syntax_error"])
def test_surroundings(text, tmp_path):
    (tmp_path / "script.py").write_text(text)
    plain = execute("script.py", cwd=tmp_path)
    ours = execute("-m", "pgcompile", "run", "script.py", cwd=tmp_path)
    lines = [line for line in ours.stderr.splitlines() if "no model was compiled" not in line]
    assert (ours.stdout, lines, ours.returncode) == (
        plain.stdout,
        plain.stderr.splitlines(),
        plain.returncode,
    )
    assert len(lines) == len(ours.stderr.splitlines()) - 1


def test_a_module_and_ranks(script, tmp_path):
    package = tmp_path / "job"
    package.mkdir()
    (package / "__init__.py").touch()
    script.rename(package / "__main__.py")
    plain = execute("-m", "job", "return", cwd=tmp_path)
    ours = execute(
        "-c", "import os; os.environ['RANK'] = '1'; from pgcompile.cli.main import main; main()",
        "run", "--options", "inner=eager", "--report", "out.json", "-m", "job", "return", cwd=tmp_path,
    )  # fmt: skip
    assert (ours.stdout, ours.returncode) == (plain.stdout, plain.returncode), ours.stderr
    assert [path.name for path in tmp_path.glob("*.json")] == ["out.rank1.json"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothere.py"], "can't open nothere.py: No such file or directory"),
        (["--optoins", "inner=eager", "train.py"], "No such option '--optoins'"),
        (["-m", "nothere"], "there is no module nothere that can be run"),
        (["--options", "inner", "train.py"], "'inner' isn't key=value"),
        (["--options", "iner=eager", "train.py"], "did you mean 'inner'?"),
        (["--options", "strict=yes", "train.py"], "strict must be True or False, not 'yes'"),
        (["--report", "no/where.json", "train.py"], "there is no folder"),
    ],
)
def test_bad_command_lines(arguments, says, monkeypatch, capsys):
    from pgcompile.cli import main as cli

    monkeypatch.setattr(sys, "argv", ["pgcompile", "run", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == (1 if arguments[0] == "-m" else 2) and says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        (["strict=True", "min_saving=0.5"], {"strict": True, "min_saving": 0.5}),
        (["strict=true", "min_saving=none"], {"strict": True, "min_saving": None}),
        (["engine=reference", "dump_dir=true/x"], {"engine": "reference", "dump_dir": "true/x"}),
    ],
)
def test_options_on_a_command_line(pairs, found):
    assert parse_options(pairs) == Options(**found)


@contextlib.contextmanager
def switched_on(options):
    torch._dynamo.reset()
    pgcompile.reset_stats()
    found = Everywhere(options)
    # not by monkeypatch: pytest 9.2 undoes by deleting, and torch's settings can't be deleted
    with torch._functorch.config.patch(donated_buffer=True), torch._dynamo.config.patch(optimize_ddp=True):
        switch_on(found)
        try:
            yield found
        finally:
            switch_off()


@pytest.fixture
def everywhere():
    with switched_on(Options(inner="eager", min_saving=0)) as found:
        yield found
    assert nn.Linear(2, 2)._compiled_call_impl is None


BATCH = random_tree_batch(rows=6, positions=12, seed=1)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)


def test_the_outermost_model_is_compiled_once(everywhere):
    model = Wrapper(GPT2Conv1D().double())
    expected = model.model._call_impl(**BATCH.inputs)
    for _ in range(2):
        actual = model(**BATCH.inputs)
    kept = BATCH.kept[..., None]
    torch.testing.assert_close(actual * kept, expected * kept)
    assert [(m.model, dict(m.decisions)) for m in everywhere.models] == [("Wrapper", {"packed": 2})]


def test_other_modules_are_left_alone(everywhere):
    layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert torch.equal(layer(torch.ones(2, 4)), layer[1](layer[0](torch.ones(2, 4))))
    embedding = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    embedding(torch.ones(3, dtype=torch.int64))  # not [N, S]
    assert everywhere.models == []


def test_a_run_without_a_model_says_so(everywhere, caplog):
    everywhere.only = "Llama*"
    Wrapper(GPT2Conv1D().double())(**BATCH.inputs)
    with caplog.at_level("WARNING", "pgcompile"):
        everywhere.warn_if_unused()
    (record,) = caplog.records
    assert "no model was compiled" in record.getMessage() and "'Llama*'" in record.getMessage()
    assert "seen: GPT2Conv1D, Wrapper" in record.getMessage()


def test_only_some_classes(everywhere):
    everywhere.only = "GPT2*"
    Wrapper(GPT2Conv1D().double())(**BATCH.inputs)
    assert [m.model for m in everywhere.models] == ["GPT2Conv1D"]


def test_a_model_that_the_script_compiles_itself(everywhere):
    """As a part of a compiled function, and in place."""
    model = GPT2Conv1D().double()
    expected = model._call_impl(**BATCH.inputs).sum()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def total(**inputs):
        return model(**inputs).sum()

    torch.testing.assert_close(total(**BATCH.inputs), expected)
    assert everywhere.models == []
    model.compile(backend="aot_eager")
    torch.testing.assert_close(model(**BATCH.inputs).sum(), expected)
    assert everywhere.models == []


def counting(calls):
    def backend(gm, example_inputs):
        calls.append(1)
        return gm

    return backend


@pytest.mark.parametrize("part", ["whole", "inner"])
def test_a_wrapper_that_the_script_compiles(part, everywhere, caplog):
    calls = []
    model = Wrapper(GPT2Conv1D().double())
    if part == "whole":
        model = torch.compile(model, backend=counting(calls))
    else:
        model.model = torch.compile(model.model, backend=counting(calls))
    with caplog.at_level("WARNING", "pgcompile"):
        model(**BATCH.inputs)
        model(**BATCH.inputs)
    assert calls == [1] and sum("itself" in record.getMessage() for record in caplog.records) == 1
    assert [(m.decisions, m.reasons) for m in everywhere.models] == [
        ({}, ["the script compiles it, or a part of it, itself"])
    ]


def test_many_models_of_one_class(everywhere):
    """Dynamo guards on the backend: one for each would use up its cache."""
    for seed in range(12):
        torch.manual_seed(seed)
        model = GPT2Conv1D().double()
        torch.testing.assert_close(
            model(**BATCH.inputs) * BATCH.kept[..., None],
            model._call_impl(**BATCH.inputs) * BATCH.kept[..., None],
        )
    assert [m.decisions for m in everywhere.models] == [{"packed": 1}] * 12
    assert pgcompile.stats().recompile_limit_hits == 0


def test_threads_that_call_small_modules(everywhere):
    """Whether a module is compiled is asked twice; the answers have to fit whatever other threads do."""
    layers, failures = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(200)], []

    def work():
        try:
            for layer in layers:
                layer(torch.ones(1, 2))
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures and everywhere.models == []


def test_other_tracers(everywhere):
    """They trace the model itself, before it was compiled and after."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model, ids = GPT2Conv1D().double(), BATCH.input_ids
    for _ in range(2):
        traced = make_fx(lambda ids: model(ids))(ids)
        torch.testing.assert_close(traced(ids), model._call_impl(ids))
        torch.testing.assert_close(torch.jit.trace(model, ids, check_trace=False)(ids), model._call_impl(ids))
        model(ids)
    assert [m.decisions for m in everywhere.models] == [{"packed": 2}]


def test_backward_twice():
    with switched_on(Options(inner="inductor", min_saving=0)):
        model = GPT2Conv1D(layers=1)
        loss = model(**BATCH.inputs).square().sum()
        loss.backward(retain_graph=True)
        first = model.wte.weight.grad.clone()
        loss.backward()
        torch.testing.assert_close(model.wte.weight.grad, 2 * first)


def test_it_says_that_padding_is_zero(everywhere, caplog):
    batch = random_tree_batch(rows=6, positions=12, padding="right", seed=1)
    model = GPT2Conv1D().double()
    with caplog.at_level("WARNING", "pgcompile"):
        for _ in range(2):
            model(**batch.inputs)
    assert sum("outputs are zero there" in record.getMessage() for record in caplog.records) == 1


def test_generation_and_pickling(everywhere):
    model = build("qwen3").float().eval()
    ids = torch.randint(1, 30, (2, 6))
    switch_off()
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    switch_on(everywhere)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)
    assert everywhere.models == []
    model(ids, use_cache=False)
    assert [m.model for m in everywhere.models] == ["Qwen3ForCausalLM"]
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)
    copy = pickle.loads(pickle.dumps(model))
    assert "_compiled_call_impl" not in vars(copy) and copy.state_dict().keys() == model.state_dict().keys()
    assert pgcompile.stats().recompile_limit_hits == 0 and sum(everywhere.models[0].decisions.values()) == 1


def test_after_import(tmp_path, monkeypatch):
    (tmp_path / "imported_late.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders, seen = list(sys.meta_path), []
    after_import("imported_late", lambda module: seen.append(module.value))
    assert seen == []
    import imported_late

    assert seen == [1] and sys.meta_path == finders
    assert Path(imported_late.__spec__.origin) == tmp_path / "imported_late.py"
    assert (
        type(imported_late.__loader__).__name__
        == type(imported_late.__spec__.loader).__name__
        == "SourceFileLoader"
    )
    after_import("imported_late", lambda module: seen.append(2))
    assert seen == [1, 2]
