"""`pgcompile coverage`: measure every causal-LM type, keep the rows, print the table."""

from __future__ import annotations

import difflib
import fnmatch
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import write_atomically
from .measure import CLASSES, Row, measure
from .table import COLORS, markdown, terminal_table, totals


@click.command()
@click.option("--only", metavar="PATTERNS", help="Types by name, comma-separated, with * as a wildcard.")
@click.option(
    "--class",
    "classes",
    metavar="CLASSES",
    help="Types by class, comma-separated: A, A2, B, C, D, E; docs/coverage.md says what they are.",
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows here."
)
@click.option("--resume", is_flag=True, help="Keep the rows that the --json file has already.")
@click.option(
    "--markdown",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the table here, as a page.",
)
def coverage(
    only: str | None, classes: str | None, json_file: Path | None, resume: bool, page: Path | None
) -> None:
    """Pack a tiny instance of every causal-LM type of transformers and compare it with eager.

    Exits with 1 if a packed type gives other values or gradients than eager.
    """
    try:
        import transformers

        from .tiny_models import MODEL_TYPES
    except ImportError:
        raise click.ClickException('transformers is not installed; pip install "pgcompile[hf]"') from None
    if resume and json_file is None:
        raise click.UsageError("--resume needs --json, the file with the rows to keep")
    for file in (json_file, page):
        if file is not None and not file.parent.is_dir():
            raise click.UsageError(f"there is no folder {file.parent}")
    if json_file is not None and json_file.exists() and not resume:
        raise click.UsageError(f"{json_file} exists: --resume keeps its rows, or remove it")
    names = choose_types(MODEL_TYPES, only, classes)
    rows = {row.model_type: row for row in read_rows(json_file)} if resume and json_file is not None else {}
    console = Console()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # the models' own, hundreds of them
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            if name not in rows:
                try:
                    rows[name] = measure(name)
                except KeyboardInterrupt:
                    where = f"; {json_file} has them, go on with --resume" if json_file is not None else ""
                    console.print(
                        f"interrupted after {len(rows)} of {len(names)} types{where}", soft_wrap=True
                    )
                    raise SystemExit(130) from None
                if json_file is not None:
                    write_rows(json_file, list(rows.values()))
            if rows[name].status != "packed":
                print_reasons(console, rows[name])
            progress.advance(task)
    measured = [rows[name] for name in names]
    console.print(terminal_table(measured))
    if page is not None:
        command = ["pgcompile coverage", *(f"--only '{only}'" for _ in range(only is not None))]
        command += [*(f"--class {classes}" for _ in range(classes is not None)), f"--markdown {page}"]
        versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
        write_atomically(page, markdown(measured, versions, " ".join(command)))
    console.print(totals(measured), highlight=False)
    if any(row.status == "wrong" for row in measured):
        raise SystemExit(1)


def print_reasons(console: Console, row: Row) -> None:
    """The type and its first reasons: what follows them is mostly their consequence."""
    console.print(f"[{COLORS[row.status]}]{row.status}[/] {row.model_type}", highlight=False)
    for reason in row.reasons[:3]:
        console.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)


def choose_types(known: Sequence[str], only: str | None, classes: str | None) -> list[str]:
    """Names by pattern and by class; both together narrow the choice.

    Raises:
        click.BadParameter: for a pattern or a class that matches nothing.
    """
    names = list(known)
    if classes is not None:
        wanted = [c.strip() for c in classes.split(",")]
        unknown = [c for c in wanted if c not in CLASSES.values()]
        if unknown:
            raise click.BadParameter(f"no type has the class {unknown[0]!r}", param_hint="--class")
        names = [n for n in names if CLASSES.get(n) in wanted]
    if only is not None:
        patterns = [p.strip() for p in only.split(",")]
        unknown = [p for p in patterns if not fnmatch.filter(names, p)]
        if unknown:
            near = difflib.get_close_matches(unknown[0], names, 1)
            of = f" of class {classes}" if classes is not None else ""
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise click.BadParameter(
                f"{unknown[0]!r} matches no causal-LM type{of}{hint}", param_hint="--only"
            )
        names = [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]
    return names


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run; none if there is no such file.

    Raises:
        click.ClickException: if it isn't a file of rows.
    """
    if not path.exists():
        return []
    try:
        return [Row(**row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise click.ClickException(f"{path} has no rows of `pgcompile coverage`: {error}") from error


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """All rows as JSON; a run that is cut off leaves the last complete file."""
    write_atomically(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
