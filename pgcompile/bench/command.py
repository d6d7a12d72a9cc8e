"""`pgcompile bench`: measure what was asked for (choices.py), keep the records, show them."""

from __future__ import annotations

import datetime
import importlib.util
import logging
import math
import shlex
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..calibration import calibration_file, write_speed
from ..engines.choose import choose
from ..files import write_atomically
from . import calibrate
from .cases import GRIDS, Case
from .choices import DTYPES, Choices, read_choices
from .contestants import CONTESTANTS
from .machine import keep_freed_memory, limited_memory
from .measure import measure
from .models import SIZES, Model, ModelWork, build_model, count_work
from .page import page, read_notes
from .plot import check_format, draw, is_drawn
from .results import OURS, Record, read, write
from .table import headline, reasons, terminal_tables

CASES_ARE_LEFT = 3  # the exit code
_FILE = click.Path(dir_okay=False, path_type=Path)
_POSITIVE = click.IntRange(min=1)


@click.command()
@click.option(
    "--model",
    metavar="MODEL",
    help=f"{', '.join(SIZES)}, a path to a config.json, or module:factory. Default: qwen3-0.6b, on CPU tiny-cpu.",
)
@click.option("--layers", type=_POSITIVE, help="Keep only so many layers of the model.")
@click.option("--dtype", type=click.Choice([*DTYPES]), help="Default: bf16, on CPU fp32.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is one.")
@click.option("--prompt", type=click.IntRange(min=0), help="Tokens of a prompt. Default: 4096, on CPU 512.")
@click.option("--answer", type=_POSITIVE, help="Tokens of an answer. Default: 512, on CPU 64.")
@click.option("--group", type=_POSITIVE, help="Answers to a prompt. Default: 8.")
@click.option("--batch", type=_POSITIVE, help="Prompts, or trees. Default: 1.")
@click.option(
    "--tree", metavar="DEPTH,BRANCH,TURN",
    help="Instead of groups all dialogues of a tree: turns of a dialogue, continuations of each turn, and tokens of a "
    "turn (or a range, as in 4,3,200-800).",
)  # fmt: skip
@click.option(
    "--grid", type=click.Choice([*GRIDS]), help="Many cases instead of one; docs/api.md says which."
)
@click.option(
    "--phase",
    type=click.Choice(["step", "forward"]),
    default="step",
    show_default=True,
    help="What is timed.",
)
@click.option(
    "--against", metavar="NAMES", default="dense,dense-compiled",
    help=f"Whom to measure besides pgcompile, comma-separated: {', '.join(n for n in CONTESTANTS if n != OURS)}. "
    "Default: dense,dense-compiled.",
)  # fmt: skip
@click.option(
    "--options", "pairs", metavar="KEY=VALUE", multiple=True,
    help="An option of the backend, see pgcompile.Options; may be repeated.",
)  # fmt: skip
@click.option(
    "--repeats", type=_POSITIVE, default=5, show_default=True, help="Timed steps of each contestant."
)
@click.option(
    "--min-run-time",
    type=click.FloatRange(min=0),
    default=0,
    metavar="SECONDS",
    help="Time more steps than that, until all of a case took so long together.",
)
@click.option(
    "--budget-seconds",
    type=click.FloatRange(min=0),
    help="Start no case after so long, nor one that wouldn't end by then, but at least one; exit with 3 if some are "
    "left.",
)
@click.option(
    "--json", "json_file", type=_FILE, help="Keep records here; cases that it has aren't measured again."
)
@click.option("--retry", is_flag=True, help="With --json, measure cases again in which something failed.")
@click.option("--plot", "picture", type=_FILE, help="Draw speed-up and memory over P/R.")
@click.option("--markdown", "page_file", type=_FILE, help="Write the records as a page.")
@click.option(
    "--notes", type=_FILE, help="With --markdown, a TOML file that says why a case is below 95% of the ideal."
)
@click.option(
    "--calibrate", is_flag=True,
    help="Instead of cases, time random batches, dense and packed, and keep what their seconds say about this device: "
    "from then on pgcompile packs a batch if that is faster. Some minutes.",
)  # fmt: skip
@click.option(
    "--test-batches", type=_POSITIVE, default=20, show_default=True,
    help="With --calibrate, other batches to try the result on.",
)  # fmt: skip
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def bench(**given: Any) -> None:
    """Time a training step: packed by pgcompile, dense, and as others share prefixes.

    Weights are random and nothing is downloaded. With FILES, which --json wrote, nothing is measured: their records are
    shown, and drawn or written as a page.

    Exits with 1 if pgcompile fails or computes something else than the dense model, with 3 if cases are left.
    """
    files: tuple[Path, ...] = given["files"]
    to_measure = [p.opts[0] for p in _typed() if p.name not in ("files", "picture", "page_file", "notes")]
    if files and to_measure:
        raise click.UsageError(f"with FILES nothing is measured; leave out {to_measure[0]}")
    for file in (given["json_file"], given["picture"], given["page_file"]):
        if file is not None and not file.absolute().parent.is_dir():
            raise click.UsageError(f"there is no folder {file.parent}")
    if given["notes"] is not None and given["page_file"] is None:
        raise click.UsageError("--notes needs --markdown, the page that they go into")
    if given["retry"] and given["json_file"] is None:
        raise click.UsageError("--retry needs --json, the file with the cases")
    if given["picture"] is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise click.ClickException('matplotlib is not installed; pip install "pgcompile[bench]"')
        check_format(given["picture"])
    notes = read_notes(given["notes"]) if given["notes"] is not None else {}
    console = Console(highlight=False)
    code = 0
    if given["calibrate"]:
        known = ("calibrate", "test_batches", "device", "dtype", "model", "layers", "repeats")
        other = [p.opts[0] for p in _typed() if p.name not in known]
        if other:
            raise click.UsageError(f"--calibrate has batches of its own; leave out {other[0]}")
        return _calibrate(read_choices(given), given, console)
    if any(p.name == "test_batches" for p in _typed()):
        raise click.UsageError("--test-batches belongs to --calibrate")
    if files:
        records = [record for file in files for record in read(file)]
        _tell_reasons(records, console)
    else:
        wanted = read_choices(given)
        if given["picture"] is not None and not any(is_drawn(vars(case)) for case in wanted.cases):
            raise click.UsageError("--plot draws prompts with answers of one length, which no case here has")
        records, code = _measure_all(wanted, given, console)
    if not records:
        if given["page_file"] is not None or given["picture"] is not None:
            raise click.ClickException("no records to write a page or draw a picture of")
        console.print("no records")
    else:
        for table in terminal_tables(records, console.width):
            console.print(table)
        if given["page_file"] is not None:
            write_atomically(given["page_file"], page(records, notes, _command_line()))
        if given["picture"] is not None:
            draw(records, given["picture"])
    failures = ("wrong", "error")
    if code == 0 and any(record.ours.status in failures for record in records):
        code = 1
    raise SystemExit(code)


def _measure_all(wanted: Choices, given: dict[str, Any], console: Console) -> tuple[list[Record], int]:
    """The records of the wanted cases, those in the file among them, and the exit code."""
    file: Path | None = given["json_file"]
    known = read(file) if file is not None else []
    found = [
        (c, r) for c in wanted.cases for r in known if r.has(c, wanted.names, wanted.settings, wanted.machine)
    ]
    kept = {case.name: record for case, record in found if not (given["retry"] and record.failed)}
    _tell_reasons(kept.values(), console)
    left = [case for case in wanted.cases if case.name not in kept]
    _measure_others_again(wanted, left, known, console)
    if kept:
        console.print(f"{len(kept)} of {len(wanted.cases)} cases are in {file}", soft_wrap=True)
    why, code = "the budget is spent", CASES_ARE_LEFT
    try:
        for case, record in _measured(left, kept.values(), wanted, given, console) if left else ():
            kept[case.name] = record
            if file is not None:
                known = [r for r in known if not r.has(case, (), wanted.settings, wanted.machine)] + [record]
                write(file, known)
    except KeyboardInterrupt:
        why, code = "interrupted", 130
    missing = len(wanted.cases) - len(kept)
    if missing:
        where = f"; the same command goes on, {file} has the others" if file is not None and kept else ""
        console.print(f"{why}: {missing} case{'s' * (missing > 1)} left{where}", soft_wrap=True)
    return [kept[case.name] for case in wanted.cases if case.name in kept], code if missing else 0


def _measure_others_again(
    wanted: Choices, left: Sequence[Case], known: Sequence[Record], console: Console
) -> None:
    """Nothing measured is lost: a record that lacks a contestant is replaced by one with all of both."""
    replaced = [r for case in left for r in known if r.has(case, (), wanted.settings, wanted.machine)]
    measured = {row.name for record in replaced for row in record.rows}
    others = [name for name in CONTESTANTS if name in measured and name not in wanted.names]
    if others:
        wanted.names = [name for name in CONTESTANTS if name in {*wanted.names, *others}]
        console.print(f"measured before, and again beside the others: {', '.join(others)}", soft_wrap=True)


def _measured(
    cases: Sequence[Case], known: Iterable[Record], wanted: Choices, given: dict[str, Any], console: Console
) -> Iterator[tuple[Case, Record]]:
    """Measure one after the other, as far as the budget goes, by the time that the known ones took."""
    chosen = {name: CONTESTANTS[name] for name in wanted.names}
    longest = max(case.most_tokens for case in wanted.cases)
    with _model_of(longest, given) as model, _progress(console) as progress:
        work = count_work(model)
        work_of = {case.name: _most_work(case, work, wanted.settings["phase"]) for case in wanted.cases}
        smallest = min(cases, key=lambda case: work_of[case.name])
        # by work, which says more about the time left than the number of cases
        task = progress.add_task("", total=sum(work_of[case.name] for case in cases), number="")
        measured = list(known)
        is_first = True
        # not before the model is built: if that took the whole budget, it would the next time, too
        started = time.monotonic()
        for number, case in enumerate(cases, 1):
            begun = time.monotonic()
            # what failed says nothing about the time that others take
            telling = [record for record in measured if record.took and not record.failed]
            rate = sum(r.took for r in telling) / max(1, sum(work_of[r.name] for r in telling))
            left = (
                math.inf if given["budget_seconds"] is None else given["budget_seconds"] - (begun - started)
            )
            # a smaller one may end in time; if none does, the smallest is begun, or the same command would never go on
            must_begin = case is smallest and is_first
            if left < (0 if must_begin else rate * work_of[case.name] + given["min_run_time"]):
                continue
            is_first = False

            def tell(text: str, often: bool = False, name: str = case.name, number: int = number) -> None:
                progress.update(task, description=f"{name}: {text}", number=f"{number}/{len(cases)}")
                if not console.is_terminal and not often:  # a log shows no bar
                    click.echo(f"{name}: {text}", err=True)

            record = measure(
                case, model, work, chosen, wanted.settings["phase"], given["repeats"], wanted.options,
                tell, given["min_run_time"],
            )  # fmt: skip
            record.settings, record.machine, record.command = wanted.settings, wanted.machine, _command_line()
            record.date = _now()
            _tell_reasons([record], console)
            if len(cases) > 1:
                console.print(headline(record), markup=False, soft_wrap=True)
            progress.advance(task, work_of[case.name])
            record.took = max(time.monotonic() - begun - _not_for_others(record, given["repeats"]), 0.0)
            measured.append(record)
            yield case, record


def _not_for_others(record: Record, repeats: int) -> float:
    """Seconds that say nothing about the next cases: of compiling, and of steps for the sake of --min-run-time."""
    found = 0.0
    for row in record.rows:
        compiling = row.first_seconds if row.median is None else row.compile_seconds
        found += (compiling or 0.0) + row.ideal_compile_seconds + sum(row.seconds[repeats:])
    return found


def _most_work(case: Case, work: ModelWork, phase: str) -> int:
    """Of its rows, as if none were padded; backward is twice forward."""
    rows, positions = case.most_rows, case.most_tokens
    forward = work.of(
        rows * positions, rows * positions * (positions + 1) // 2, rows * (case.answer or positions)
    )
    return forward * (3 if (case.phase or phase) == "step" else 1)


def _tell_reasons(records: Iterable[Record], console: Console) -> None:
    """Why contestants have no figures."""
    for record in records:
        for line in reasons(record):
            console.print(f"{record.name}: {line}", markup=False, soft_wrap=True)


def _calibrate(wanted: Choices, given: dict[str, Any], console: Console) -> None:
    """Measure, fit, keep, and say how good it is."""
    device, dtype = torch.device(given["device"]), DTYPES[given["dtype"]]
    count = calibrate.FITTED + given["test_batches"]
    scale = calibrate.scale_of(device)
    if given["model"] in SIZES:
        given["layers"] = given["layers"] or calibrate.LAYERS
    with _model_of(calibrate.MOST_TOKENS * scale, given) as model, _progress(console) as progress:
        task = progress.add_task("", total=count, number="")
        try:
            samples = calibrate.sample(
                calibrate.random_cases(scale, seed=0), count, model, given["repeats"],
                lambda done: progress.update(task, completed=done, number=f"{done}/{count} batches"),
            )  # fmt: skip
            speed = calibrate.fit(samples[: calibrate.FITTED])
        except ValueError as error:
            raise click.ClickException(str(error)) from None
    tested = samples[calibrate.FITTED :]
    right, rule = (calibrate.share_right(tested, s) for s in (speed, None))
    text = f"tried on {len(tested)} more, it names the faster side of {right:.1%}; counted work alone, of {rule:.1%}"
    if right < rule:
        raise click.ClickException(f"not kept: {text}")
    file = calibration_file(device, dtype, choose("auto", device, dtype)[0])
    about = {
        "command": _command_line(), "date": _now(), "machine": wanted.machine, "batches": calibrate.FITTED,
        "tested": len(tested), "faster side named": right,
    }  # fmt: skip
    write_speed(file, speed, about)
    console.print(f"{text}\nkept in {file}; remove the file to go back", soft_wrap=True)


@contextmanager
def _model_of(longest: int, given: dict[str, Any]) -> Iterator[Model]:
    """The model for rows of up to `longest` tokens, while Dynamo compiles as often as it takes."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of models, inductor and the profiler
    device = torch.device(given["device"])
    on_host = device.type == "cpu"
    if on_host:
        keep_freed_memory()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64), limited_memory() if on_host else nullcontext():
        yield build_model(given["model"], given["layers"], longest, DTYPES[given["dtype"]], device)


def _progress(console: Console) -> Progress:
    columns = (
        BarColumn(),
        TextColumn("{task.fields[number]}"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _typed() -> list[click.Parameter]:
    """The parameters that stand on the command line."""
    context = click.get_current_context()
    return [
        parameter
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]


def _command_line() -> str:
    """What the user typed."""
    words = ["pgcompile", "bench"]
    for parameter in _typed():
        value: Any = click.get_current_context().params[parameter.name or ""]
        values: Sequence[Any] = value if isinstance(value, tuple) else (value,)
        name = [parameter.opts[0]] if isinstance(parameter, click.Option) else []
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words += name
        else:
            texts = [f"{v:.15g}" if isinstance(v, float) else str(v) for v in values]
            words += [word for text in texts for word in (*name, text)]
    return shlex.join(words)
