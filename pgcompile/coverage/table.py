"""The table of all rows: for a terminal, and as docs/coverage.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from .measure import Row

STATUSES = ("packed", "islands", "eager", "wrong", "not causal", "error")
COLORS = dict(zip(STATUSES, ("green", "yellow", "yellow", "bold red", "dim", "red"), strict=True))

CLASSES = {
    "A": "One graph; scaled_dot_product_attention is the only token mixer.",
    "A2": "One graph; scaled_dot_product_attention with a mask computed from activations.",
    "B": "One graph; attention spelled matmul-softmax-matmul, baddbmm, bmm or einsum.",
    "C": "One graph; linear-attention, state-space, convolution or recurrent token mixers.",
    "D": "Graph breaks.",
    "E": "Not a causal LM under this interface.",
    "": "Types that are in none of these classes yet.",
}

PAGE = """# Coverage

Every causal-LM type of transformers, tiny and with random weights, packed against eager
({versions}). This page is written by

```sh
{command}
```

**{totals}**

Each type runs forward and backward on four rows of up to 24 tokens with a common beginning, two and two of which share
a longer one, padded on the right. *packed/distinct*: tokens computed, and the number of different prefixes, counted one
by one. *values* and *gradients*: the largest difference of an entry from eager's, relative to the tensor's largest
entry, in float64 with casts inside of the model promoted. Mixtures of experts run so with `batched_mm` experts, and
once more in float32 with `grouped_mm`, where the packed errors may be at most twice eager's own.
"""


def totals(rows: Sequence[Row]) -> str:
    """`packed P, islands I, eager E, wrong W, not causal C of N`, and types that don't run at all, if there are any."""
    counts = Counter(row.status for row in rows)
    shown = [f"{status} {counts[status]}" for status in STATUSES[:-1]]
    return ", ".join(shown) + f" of {len(rows)}" + (f" (error {counts['error']})" if counts["error"] else "")


def terminal_table(rows: Sequence[Row]) -> Table:
    """All rows, colored by status; reasons are printed as they are found."""
    table = Table("type", "class", "status", "packed/distinct", "values", "gradients", "why")
    for row in rows:
        why = row.reasons[0].partition(":")[0] if row.reasons else ""
        status = Text(row.status, COLORS[row.status])
        table.add_row(row.model_type, row.model_class, status, *_numbers(row), why)
    return table


def markdown(rows: Sequence[Row], versions: str, command: str) -> str:
    """The page docs/coverage.md."""
    parts = [PAGE.format(versions=versions, command=command, totals=totals(rows))]
    for name, meaning in CLASSES.items():
        group = [row for row in rows if row.model_class == name]
        if group:
            title = f"## Class {name}" if name else "## Others"
            parts.append(f"{title}\n\n{meaning} {totals(group)}.\n\n" + "\n".join(_grid(group)) + "\n")
    return "\n".join(parts)


def _grid(rows: Sequence[Row]) -> list[str]:
    headings = ("type", "status", "attention", "engine", "packed/distinct", "values", "gradients", "reason")
    lines = [_line(headings), "|" + "---|" * len(headings)]
    for row in rows:
        more = len(row.reasons) - 1
        reason = (row.reasons[0] + (f" (and {more} more)" if more > 0 else "")) if row.reasons else ""
        attention = "<br>".join(row.attention)
        lines.append(_line((row.model_type, row.status, attention, row.engine, *_numbers(row), reason)))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _numbers(row: Row) -> tuple[str, str, str]:
    if row.status not in ("packed", "islands", "wrong"):
        return "", "", ""
    tokens = f"{row.packed_tokens}/{row.distinct_tokens}"
    return tokens, f"{row.value_error:.0e}", f"{row.gradient_error:.0e}"
