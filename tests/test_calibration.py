"""The cost model of a calibrated device: fitted, kept, read again, and asked for each batch."""

import itertools
import json
import logging
import math
import pathlib
import sys
import types
from dataclasses import asdict

import pytest
import torch
from click.testing import CliRunner

import pgcompile
from harness import compiled, random_tree_batch, rewire
from pgcompile.bench import calibrate, measure
from pgcompile.bench.cases import build
from pgcompile.bench.command import bench
from pgcompile.calibration import calibration_file, read_speed, write_speed
from pgcompile.cli.doctor import self_test
from pgcompile.cost import Speed, Work, why_not_worth_it
from zoo import ZOO

CPU = torch.device("cpu")
SPEED = Speed(
    linear=2e-11, dense_attention=5e-11, packed_attention=7e-11, segment=3e-5, unpacked=4e-8, call=2e-4
)
FREE = Speed(1e-30, 1e-9, 0.0, 0.0, 0.0, 0.0)  # a packed call takes next to no time
SLOW = Speed(1e-30, 0.0, 0.0, 0.0, 0.0, 60.0)  # a packed call takes a minute


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PGCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made_up_samples(speed, count=30, both=1e-3):
    """Batches of all sorts, with the seconds that a speed gives them; `both` is what either side takes anyway."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        linear, attention, kept, segments, unpacked = torch.rand(5, generator=generator).tolist()
        dense = Work(int(1e9 * linear), int(1e8 * attention))
        packed = Work(
            int(dense.linear * kept), int(dense.attention * kept**2), int(100 * segments), int(4e3 * unpacked)
        )
        found.append(calibrate.Sample(dense, packed, speed.dense(dense) + both, speed.packed(packed) + both))
    return found


@pytest.mark.parametrize("without", ["nothing", "segment", "unpacked"])
def test_fit_finds_the_speed(without):
    speed = Speed(**{**asdict(SPEED), **({without: 0.0} if without != "nothing" else {})})
    found = asdict(calibrate.fit(made_up_samples(speed)))
    for name, value in asdict(speed).items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-10), name


def test_no_term_is_negative():
    """Where least squares would have one, the others fit without it."""
    speed = Speed(**{**asdict(SPEED), "segment": -3e-6})
    found = asdict(calibrate.fit(made_up_samples(speed)))
    assert found["segment"] == 0 and all(value >= 0 for value in found.values())
    assert found["linear"] == pytest.approx(SPEED.linear, rel=0.2)
    with pytest.raises(ValueError, match="6 batches can't fit 7 terms"):
        calibrate.fit(made_up_samples(speed, count=6))


def test_the_share_of_right_answers():
    work = Work(10, 0), Work(5, 0, 1, 10)
    faster, slower, tie = (calibrate.Sample(*work, 1.0, packed) for packed in (0.5, 1.5, 1.01))
    assert calibrate.share_right([faster, slower, tie], FREE) == pytest.approx(2 / 3)
    assert calibrate.share_right([faster, slower, slower, slower], SLOW) == 0.75
    assert calibrate.share_right([faster, slower], None) == 0.5  # counted work says pack


def test_what_is_worth_it():
    dense, packed = Work(100, 100), Work(80, 70, 3, 10)
    assert why_not_worth_it(dense, packed, None, None) is None
    assert "save 5% of the work, less than 10%" in why_not_worth_it(dense, Work(95, 95), None, None)
    assert why_not_worth_it(dense, packed, None, FREE) is None
    assert "6e+04 ms, as it is" in why_not_worth_it(dense, packed, None, SLOW)
    assert why_not_worth_it(dense, packed, 0.2, SLOW) is None  # asked for by number: counted work
    assert why_not_worth_it(dense, packed, 0.3, FREE) is not None
    assert why_not_worth_it(dense, Work(200, 200), 0, SLOW) is None


def test_a_calibration_is_read_as_it_was_written(cache):
    assert read_speed(CPU, torch.float32, "cpu") is None
    write_speed(calibration_file(CPU, torch.float32, "cpu"), SPEED, {"command": "a test"})
    assert read_speed(CPU, torch.float32, "cpu") == SPEED
    assert read_speed(CPU, torch.bfloat16, "cpu") is None, "another dtype"
    assert read_speed(CPU, torch.float32, "reference") is None, "another engine"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert read_speed(CPU, torch.float32, "cpu") is None, "another number of threads"
    finally:
        torch.set_num_threads(threads)
    assert read_speed(torch.device("meta"), torch.float32, "cpu") is None
    (file,) = cache.iterdir()
    assert file.name == file.name.lower() and " " not in file.name


def broken(**changes):
    return json.dumps({"seconds": {**asdict(SPEED), **changes}})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", '{"seconds": 3}', broken(linear="fast"), broken(call=-1), broken(call=math.nan),
     json.dumps({"seconds": {"linear": 1.0}}), "[" * 100_000, broken(linear=0.0), broken(call=10**400)],
)  # fmt: skip
def test_a_file_that_is_no_calibration_is_named_and_left_alone(text, cache, caplog):
    file = calibration_file(CPU, torch.float32, "cpu")
    cache.mkdir()
    file.write_text(text)
    with caplog.at_level(logging.WARNING, "pgcompile"):
        assert read_speed(CPU, torch.float32, "cpu") is None
    assert str(file) in caplog.text and file.read_text() == text


def test_without_a_home_nothing_is_calibrated(monkeypatch, tmp_path):
    monkeypatch.delenv("PGCOMPILE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file(CPU, torch.float32, "cpu").parent == tmp_path / "pgcompile"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert read_speed(CPU, torch.float32, "cpu") is None


@pytest.mark.parametrize("speed, decision", [(FREE, "packed"), (SLOW, "dense"), (None, "packed")])
def test_a_model_asks_it(speed, decision, cache):
    torch._dynamo.reset()
    if speed is not None:
        write_speed(calibration_file(CPU, torch.float64, "cpu"), speed, {})
    model = rewire(ZOO["nano_gpt"](dim=16, layers=2)).double()
    ids = random_tree_batch(rows=8, positions=40, seed=0).input_ids
    ids[:, :20] = ids[:1, :20].clone()
    found = pgcompile.explain(model, ids)
    assert [batch.decision for batch in found.batches] == [decision]
    assert ("calibrated" in found.batches[0].why) == (decision == "dense")
    before = pgcompile.stats().packed
    compiled(model, {"min_saving": 0.01})(ids)
    assert pgcompile.stats().packed == before + 1, "asked for by number"


def test_the_self_test_does_not_ask_it(cache):
    torch._dynamo.reset()
    write_speed(calibration_file(CPU, torch.float32, "cpu"), SLOW, {})
    assert self_test("eager", CPU) is None


@pytest.mark.parametrize("scale", [1, 8])
def test_random_batches(scale):
    """The same every time, of all kinds, and no longer than said."""
    cases, again, others = (
        list(itertools.islice(calibrate.random_cases(scale, seed), 200)) for seed in (0, 0, 1)
    )
    assert cases == again != others
    shares = []
    for case in cases[:50]:
        tokens = build(case, 1000).tokens
        assert tokens["dense"] <= calibrate.MOST_TOKENS * scale
        shares.append(tokens["distinct"] / tokens["dense"])
    assert min(shares) < 0.4 and sum(share > 0.9 for share in shares) > 3, "hard ones, too"


def test_bench_calibrate(cache, monkeypatch):
    monkeypatch.setattr(calibrate, "FITTED", 7)
    monkeypatch.setattr(calibrate, "BASELINE", "eager")
    monkeypatch.setattr(calibrate, "OPTIONS", {**calibrate.OPTIONS, "inner": "eager"})
    original = measure.timed_step

    def timed(runner, *rest):
        """A step as it is, by a clock that takes a millisecond for each token."""
        _, logprobs = original(runner, *rest)
        tokens = runner.setup.batch.tokens["dense" if runner.row.name == "dense" else "distinct"]
        return 1e-3 * tokens, logprobs

    monkeypatch.setattr(measure, "timed_step", timed)
    torch._dynamo.reset()
    command = ["--calibrate", "--test-batches", "2", "--layers", "1", "--repeats", "1", "--device", "cpu"]
    done = CliRunner().invoke(bench, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    file = calibration_file(CPU, torch.float32, "cpu")
    assert str(file) in done.output.replace("\n", "")
    assert "tried on 2 more, it names the faster side of 100.0%" in done.output
    speed = read_speed(CPU, torch.float32, "cpu")
    assert speed is not None and speed.linear > 0
    about = json.loads(file.read_text())
    assert "--calibrate --test-batches 2" in about["command"] and about["batches"] == 7


class _ReadsTheFuture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50)

    def forward(self, ids):
        return self.head(self.embed(ids).flip(1))


def test_a_model_that_is_not_packed(cache, monkeypatch):
    monkeypatch.setattr(calibrate, "BASELINE", "eager")
    made_up = types.ModuleType("made_up_models")
    made_up.future = _ReadsTheFuture
    monkeypatch.setitem(sys.modules, "made_up_models", made_up)
    done = CliRunner().invoke(bench, ["--calibrate", "--model", "made_up_models:future", "--device", "cpu"])
    assert done.exit_code == 1 and "the model isn't packed: " in done.output
    assert not cache.exists()


@pytest.mark.parametrize(
    "other", [["--grid", "cpu"], ["--prompt", "3"], ["--json", "x.json"], ["--plot", "x.png"]]
)
def test_calibrate_has_batches_of_its_own(other):
    done = CliRunner().invoke(bench, ["--calibrate", *other])
    assert done.exit_code == 2 and f"leave out {other[0]}" in done.output
