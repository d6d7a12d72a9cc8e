"""Records as a table for the terminal; the cells serve the page as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .machine import peak_rate
from .results import OURS, Record, Row

COLORS = {
    "measured": "",
    "unavailable": "dim",
    "wrong": "bold red",
    "out of memory": "yellow",
    "error": "red",
}
Cell = Callable[[Record, Row], str]


def _time(record: Record, row: Row) -> str:
    """The median, or why there is none."""
    return _seconds([row.median]) if row.median is not None else row.status


def _range(record: Record, row: Row) -> str:
    return _seconds([min(row.seconds), max(row.seconds)]) if row.median is not None else ""


def _seconds(values: Sequence[float]) -> str:
    """In one unit."""
    scale, unit = (1000, "ms") if max(values) < 0.1 else (1, "s")
    return "–".join(f"{value * scale:#.3g}".rstrip(".") for value in values) + f" {unit}"


def _tokens(record: Record, row: Row) -> str:
    """What the contestant computes, as far as it is known: pgcompile says. More than are distinct, where it repeats
    short branches or padding can't be told from tokens."""
    if row.median is None:
        return ""
    if row.is_dense:
        return _of(record.tokens["dense"], record.tokens["valid"], "valid")
    decision = row.packing.get("decision", "")
    if decision != "packed":
        return decision
    return _of(row.packing["tokens"], record.tokens["distinct"], "distinct")


def _of(count: int, part: int, name: str) -> str:
    return f"{count:,}" if part == count else f"{count:,} ({part:,} {name})"


def _depth(record: Record, row: Row) -> str:
    return str(row.packing["depth"]) if row.packing.get("decision") == "packed" else ""


def _memory(record: Record, row: Row) -> str:
    if row.peak_bytes is None or row.median is None:
        return ""
    return f"{row.peak_bytes / 2**20:,.0f} MiB"


def _utilization(record: Record, row: Row) -> str:
    rate = peak_rate(record.machine.get("device", ""), record.settings.get("dtype", ""))
    return _cell(record.utilization(row, rate), "{:.0%}")


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _only_sharing(form: Callable[[Record, Row], float | None], text: str) -> Cell:
    return lambda record, row: "" if row.is_dense else _cell(form(record, row), text)


COLUMNS: dict[str, Cell] = {
    "median": _time,
    "speed-up": lambda record, row: _cell(record.speedup(row), "{:.2f}"),
    "ideal": _only_sharing(lambda record, row: None if row.median is None else record.ideal, "{:.2f}"),
    "efficiency": lambda record, row: _cell(record.efficiency(row), "{:.0%}"),
    "min–max": _range,
    "reported": lambda record, row: reported(record) if row.name == OURS else "",
    "peak memory": _memory,
    "of dense": lambda record, row: _cell(record.memory_ratio(row), "{:.0%}"),
    "of ideal": lambda record, row: _cell(record.memory_overhead(row), "{:.0%}"),
    "MFU": _utilization,
    "tokens": _tokens,
    "depth": _depth,
    "compile": lambda record, row: _cell(row.compile_seconds, "{:.1f} s"),
    "planning": lambda record, row: _cell(row.planning_share, "{:.1%}"),
}


def used_columns(records: Sequence[Record]) -> dict[str, Cell]:
    """Those that have something to say about one of the rows."""
    return {
        name: cell for name, cell in COLUMNS.items() if any(cell(r, row) for r in records for row in r.rows)
    }


def reported(record: Record) -> str:
    """What somebody else got for this shape, and what of it they didn't say."""
    assumed = record.case.get("assumed")
    return record.case.get("published", "") + (f" ({assumed} assumed)" if assumed else "")


def name_of(record: Record) -> str:
    """The case, and what is timed if that isn't a step."""
    return record.name + (", forward" if record.phase == "forward" else "")


def headline(record: Record) -> str:
    """What pgcompile makes of the case, in a line."""
    ours, baseline = record.ours, record.baseline
    speedup = record.speedup(ours)
    if ours.median is None:
        said = f"{OURS}: {ours.status}"
    elif speedup is None or baseline is None:
        said = f"{_time(record, ours)}, and nothing dense to compare with"
    else:
        said = f"{speedup:.2f} times as fast as {baseline.name}, {record.efficiency(ours):.0%} of the ideal"
    return f"{name_of(record)}: {said}"


def terminal_tables(records: Sequence[Record], width: int) -> list[Table]:
    """A section for each case; several tables below each other where the terminal is too narrow for all columns."""
    lines: list[tuple[Record, Row | None]] = []
    for record in records:
        lines += [(record, None), *((record, row) for row in record.rows)]
    labels = [
        Text(name_of(record), "bold") if row is None else Text(f"  {row.name}", COLORS[row.status])
        for record, row in lines
    ]
    gap = 2  # a space of padding, and one between columns
    room = width - max(map(len, labels)) - gap - 2  # the box has a space on each side
    groups: list[dict[str, list[str]]] = []
    left = 0
    for name, cell in used_columns(records).items():
        cells = ["" if row is None else cell(record, row) for record, row in lines]
        needed = max(map(len, (name, *cells))) + gap
        if needed > left or not groups:
            groups.append({})
            left = room
        left -= needed
        groups[-1][name] = cells
    return [_table(labels, group) for group in groups]


def _table(labels: Sequence[Text], columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for label, *cells in zip(labels, *columns.values(), strict=True):
        table.add_row(label, *(Text(cell, label.style if cell in COLORS else "") for cell in cells))
    return table


def reasons(record: Record) -> list[str]:
    """A line for each contestant without figures, and for a pgcompile that doesn't pack."""
    lines = [f"{row.name}: {row.status}: {row.reason}" for row in record.rows if row.status != "measured"]
    lines += [f"{row.name}: {why}" for row in record.rows for why in row.packing.get("why", [])]
    return lines
