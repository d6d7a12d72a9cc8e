"""Records as docs/performance.md."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from .cases import GRIDS
from .results import Record
from .table import name_of, reasons, used_columns

# Of the ideal; what is below is explained, or said not to be.
ENOUGH = 0.95
ENOUGH_ALONE = 0.98  # where all tokens are distinct, and nothing can be saved

PAGE = """# Performance

Written by `{command}`.

A step is the forward and backward pass of a loss over the answers' log-probabilities, each times its row's advantage;
logits are computed for the answers only, and the optimizer isn't included. Where *forward* stands behind a case, it is
the forward pass alone, under `no_grad`. Weights are random. Contestants take turns in one process, after each has been
checked: its log-probabilities and its gradient are no further from those of the dense model in higher precision than
twice what dense eager is (that of a single parameter: four times). What differs more gets no figure. Each turn has
other tokens, with the same common prefixes: as in training, every step finds out anew what is shared.

*speed-up*: over the faster of those dense contestants that are listed (`dense` is eager, `dense-compiled` inductor), on
SDPA's causal fast path and without a mask. As `torch.compile` does, inductor compiles the first shape of a process for
itself, and the second for all that follow.
*ideal*: the operations of the dense batch (linear layers by tokens, logits by predictions, attention by query-key
pairs) over those of its distinct tokens. *efficiency*: speed-up over ideal. *peak memory*: above what was allocated
before the step; *of dense*: of the leaner dense contestant's; *of ideal*: of what that one needs for a batch of as
many tokens and predictions as are distinct, which shares nothing (gradients of weights are as large for any batch, so
dense's memory times a share of its tokens would be less than anything needs). *MFU*: operations of what the contestant
computes (distinct tokens, unless it is dense) over what the device could do in that time. *compile*: the first call
less the median of the others, with inductor's cache on the disk as it was; next to nothing where a case before this
one, in the same process, has compiled a graph for such sizes. *planning*: share of pgcompile's step in which it finds
what is shared; it is part of the step. pgcompile's version ends in a digest of its sources.
"""


def page(records: Sequence[Record], notes: Mapping[str, str], command: str) -> str:
    """A section for each machine, model and setting.

    Args:
        notes: by case, why its efficiency is below 95%; a key may be a pattern (`fnmatch`), the first that fits counts.
        command: that writes the page.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(repr((record.machine, record.settings)), []).append(record)
    sections = [_section(group, notes) for group in groups.values()]
    left = _not_measured(records)
    last = [f"Not measured: {', '.join(left)}.\n"] if left else []
    return "\n".join([PAGE.format(command=command), *sections, *last])


def _section(records: Sequence[Record], notes: Mapping[str, str]) -> str:
    machine, settings = records[0].machine, records[0].settings
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    if "sdpa" in machine:
        versions += f"; SDPA's choice for bfloat16 heads of 128: {machine['sdpa']}"
    where = (
        machine["processor"]
        if machine["device"] == "CPU"
        else f"{machine['device']} ({machine['processor']})"
    )
    layers = f", {_count(settings['layers'], 'layer')}" if settings.get("layers") else ""
    dates = sorted({record.date[:10] for record in records})
    commands = list(dict.fromkeys(record.command for record in records))
    lines = [
        f"## {settings['model']}{layers}, {settings['dtype']}, {machine['device']}", "",
        f"{where}, {_count(machine['threads'], 'thread')}, Python {machine['python']}, {versions}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {_timed_steps(records)} of each.", "",
        "```sh", *commands, "```", "",
    ]  # fmt: skip
    columns = used_columns(records)
    lines += [_line(["", *columns]), "|---|" + "---:|" * len(columns)]
    for record in records:
        lines.append(_line([f"**{name_of(record)}**", *[""] * len(columns)]))
        for row in record.rows:
            if row.status in ("measured", "wrong", "out of memory", "error"):
                lines.append(_line([row.name, *(cell(record, row) for cell in columns.values())]))
    missing = _without_figures(records)
    lines += ["", "Without figures:", "", *missing] if missing else []
    below = [_below(record, notes) for record in records]
    explained = [text for text in below if text is not None]
    lines += (
        ["", "Below 95% of the ideal, or 98% where nothing can be saved:", "", *explained]
        if explained
        else []
    )
    return "\n".join([*lines, ""])


def _without_figures(records: Sequence[Record]) -> list[str]:
    """Each reason with its cases, if these aren't all."""
    cases: dict[str, list[str]] = {}
    for record in records:
        for reason in reasons(record):
            cases.setdefault(reason, []).append(record.name)
    return [
        f"- {reason}" if len(names) == len(records) else f"- {'; '.join(names)}: {reason}"
        for reason, names in cases.items()
    ]


def _timed_steps(records: Sequence[Record]) -> str:
    counts = [len(row.seconds) for record in records for row in record.rows if row.median is not None] or [0]
    fewest, most = min(counts), max(counts)
    return f"{f'{fewest} to ' * (most > fewest)}{_count(most, 'timed step')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _below(record: Record, notes: Mapping[str, str]) -> str | None:
    efficiency = record.efficiency(record.ours)
    enough = ENOUGH if record.tokens["distinct"] < record.tokens["dense"] else ENOUGH_ALONE
    if efficiency is None or efficiency >= enough:
        return None
    why = next((text for case, text in notes.items() if fnmatchcase(record.name, case)), "not explained yet")
    return f"- {record.name}, {efficiency:.1%}: {why}"


def _not_measured(records: Sequence[Record]) -> list[str]:
    """Cases of the grids that these commands name."""
    words = [word for record in records for word in shlex.split(record.command)]
    grids = {grid for option, grid in pairwise(words) if option == "--grid"}
    names = {record.name for record in records}
    return [case.name for grid in GRIDS if grid in grids for case in GRIDS[grid] if case.name not in names]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def read_notes(path: Path) -> dict[str, str]:
    """A TOML file with a table `notes` of texts by case.

    Raises:
        click.ClickException: if it isn't that.
    """
    try:
        found: Any = tomllib.loads(path.read_text())
    except OSError as error:
        raise click.ClickException(f"can't open {path}: {error.strerror}") from None
    except ValueError as error:
        raise click.ClickException(f"{path} isn't TOML: {error}") from None
    notes = found.get("notes")
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise click.ClickException(f"{path} has no table [notes] of texts by case")
    return notes
