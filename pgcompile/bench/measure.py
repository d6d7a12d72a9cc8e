"""One case: check all contestants, then time them in turns."""

from __future__ import annotations

import functools
import itertools
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..report import BatchReport, GraphReport
from ..stats import stats
from .agreement import Outcome, Yardstick
from .cases import Batch, Case, build
from .contestants import Contestant, Run, Setup
from .machine import free_memory, is_out_of_memory, peak_memory, synchronize
from .models import Model, ModelWork
from .results import Record, Row


class Tell(Protocol):
    """Gets a word about what is being done; `often`: too often for a log."""

    def __call__(self, text: str, often: bool = False) -> None: ...


def _silent(text: str, often: bool = False) -> None: ...


@dataclass
class Runner:
    """A contestant at work."""

    row: Row
    setup: Setup
    run: Run | None = None

    @property
    def is_running(self) -> bool:
        return self.row.status == "measured"


def measure(
    case: Case, model: Model, work: ModelWork, chosen: Mapping[str, Contestant], phase: str, repeats: int,
    options: Mapping[str, Any], tell: Tell = _silent, min_run_time: float = 0,
) -> Record:  # fmt: skip
    """Measure one case.

    Args:
        work: what `count_work` counted.
        chosen: contestants by name.
        phase: "step" (forward and backward) or "forward", unless the case has its own.
        repeats: the fewest steps that are timed of each contestant.
        options: of the pgcompile backend.
        min_run_time: seconds that the timed steps of all contestants take together, at least.
    """
    device = next(model.module.parameters()).device
    phase = case.phase or phase
    batch = build(case, model.vocab_size).to(device)
    record = Record.of(case, batch, work, phase)
    runners = []
    for name, contestant in chosen.items():
        row = Row(name, is_dense=contestant.is_dense)
        runner = Runner(row, Setup(model, batch, case.masked, phase, options))
        record.rows.append(row)
        runners.append(runner)
        with _judged(row):
            row.reason = contestant.why_not(runner.setup) or ""
            if row.reason:
                row.status = "unavailable"
            else:
                runner.run = contestant.prepare(runner.setup)
    _check(runners, model, batch, phase, tell)
    for runner in runners:
        if runner.is_running:
            tell(f"{runner.row.name}, memory")
            with _judged(runner.row):
                runner.row.peak_bytes = _peak(runner, model, phase)
                if runner.row.is_dense:
                    _measure_alone(runner, chosen[runner.row.name], phase)
    spent = 0.0
    for repeat in itertools.count():
        running = [runner for runner in runners if runner.is_running]
        if not running or (repeat >= repeats and spent >= min_run_time):
            break
        batch.ids.copy_(batch.other_ids(0, model.vocab_size))  # a tree that nobody has seen: each step plans
        for runner in running:
            tell(f"{runner.row.name}, step {repeat + 1}", often=True)
            with _judged(runner.row):
                before = stats().plan_seconds
                seconds = timed(runner, model, phase)
                runner.row.seconds.append(seconds)
                runner.row.planning_seconds.append(stats().plan_seconds - before)
                spent += seconds
    _clear(model)
    for runner in runners:
        _take_reports(runner)
    return record


def _measure_alone(runner: Runner, contestant: Contestant, phase: str) -> None:
    """The memory that a dense contestant needs for distinct tokens alone."""
    model = runner.setup.model
    # compiled apart, so that what is timed isn't compiled for other shapes, too
    setup = replace(
        runner.setup, model=replace(model, compiled=model.alone), batch=runner.setup.batch.distinct()
    )
    alone = Runner(Row(runner.row.name), setup)
    with _judged(alone.row):
        alone.run = contestant.prepare(setup)
        first = timed(alone, model, phase)
        begun = time.perf_counter()
        runner.row.ideal_bytes = _peak(alone, model, phase)
        runner.row.ideal_compile_seconds = max(first - (time.perf_counter() - begun), 0.0)


def _check(runners: list[Runner], model: Model, batch: Batch, phase: str, tell: Tell) -> None:
    """Each contestant's first call, compared with the truth."""
    if not any(runner.is_running for runner in runners):
        return
    tell("the truth, row by row")
    truth = Row("the truth")
    with _judged(truth):
        yardstick = Yardstick.of(model, batch, phase)
    free_memory()
    if truth.status != "measured":
        for runner in runners:
            if runner.is_running:
                runner.row.status = truth.status
                runner.row.reason = f"computing what to compare with: {truth.reason}"
        return
    for runner in runners:
        if runner.is_running:
            tell(f"{runner.row.name}, first call")
            with _judged(runner.row):
                _check_first_call(runner, model, phase, yardstick)


def _check_first_call(runner: Runner, model: Model, phase: str, yardstick: Yardstick) -> None:
    """Keeps nothing of what came out: the next contestant needs the memory."""
    row = runner.row
    row.first_seconds, logprobs = timed_step(runner, model, phase)
    logprobs = logprobs.detach().masked_fill(runner.setup.batch.weights == 0, 0)
    gradients = [p.grad for p in model.module.parameters()] if phase == "step" else []
    reason, row.errors = yardstick.why_wrong(Outcome(logprobs, gradients))
    if reason is not None:
        row.status, row.reason = "wrong", reason
        if row.name == "dense":
            row.reason += "; the truth is computed row by row: do this model's rows depend on each other?"


def timed(runner: Runner, model: Model, phase: str) -> float:
    """Seconds of a step. Log-probabilities are dropped: they would be held through what is measured next."""
    return timed_step(runner, model, phase)[0]


def timed_step(runner: Runner, model: Model, phase: str) -> tuple[float, Tensor]:
    """A step: seconds, and log-probabilities. Gradients are dropped before it, the optimizer isn't part of it."""
    device = runner.setup.batch.ids.device
    _clear(model)
    synchronize(device)
    started = time.perf_counter()
    logprobs = _step(runner, phase)
    synchronize(device)
    return time.perf_counter() - started, logprobs


def _step(runner: Runner, phase: str) -> Tensor:
    assert runner.run is not None
    if phase == "forward":
        with torch.no_grad():
            return runner.run()
    logprobs = runner.run()
    (logprobs * runner.setup.batch.weights).sum().backward()
    return logprobs


def _peak(runner: Runner, model: Model, phase: str) -> int:
    _clear(model)
    device = runner.setup.batch.ids.device
    return peak_memory(device, functools.partial(_step, runner, phase))


def _clear(model: Model) -> None:
    model.module.zero_grad(set_to_none=True)


@contextmanager
def _judged(row: Row) -> Iterator[None]:
    """What a contestant raises becomes its status; others go on."""
    try:
        yield
    except Exception as error:  # whatever somebody else's code may raise
        text = next(iter(str(error).strip().splitlines()), "")
        row.status = "out of memory" if is_out_of_memory(error) else "error"
        row.reason = f"{type(error).__name__}: {text}"[:300]
        row.seconds = []
        traceback.clear_frames(error.__traceback__)  # they hold what was computed
    if row.status != "measured":
        free_memory()


def _take_reports(runner: Runner) -> None:
    """What pgcompile says about its last batch, and about graphs that it left alone."""
    batches = [r for r in runner.setup.reports if isinstance(r, BatchReport)]
    graphs = [r for r in runner.setup.reports if isinstance(r, GraphReport)]
    if batches:
        last = batches[-1]
        runner.row.packing = {
            "decision": last.decision, "tokens": last.packed_tokens, "segments": last.segments, "depth": last.depth,
            "saving": last.saving, "head_chunks": last.head_chunks,
            "engines": list(last.engines),
        }  # fmt: skip
    elif graphs:
        reasons = [str(reason) for g in graphs for reason in g.fallbacks]
        runner.row.packing = {"decision": "eager", "why": reasons[:3]}
