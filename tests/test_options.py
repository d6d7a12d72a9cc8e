"""Options, and the ways in."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from harness import (
    ALWAYS_PACK,
    BACKEND,
    rewire,
)
from small_models import batch_of, small_model
from zoo import ZOO

if BACKEND != "pgcompile":
    pytest.skip("tests pgcompile's own behaviour", allow_module_level=True)

import pgcompile
from pgcompile.options import Options

pytestmark = pytest.mark.usefixtures("fresh")


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
    model, ids = small_model(), batch_of().input_ids
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

    model, batch = small_model(), batch_of()
    torch.testing.assert_close(logits(model, batch.input_ids), model(batch.input_ids) * 2)
    assert pgcompile.stats().packed == 1


def test_optimize_an_instance():
    model, other, batch = small_model(), small_model(), batch_of()
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
    model = small_model()
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
