"""What was measured: records in a JSON file that grows case by case."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from ..files import write_atomically
from .cases import Batch, Case
from .models import ModelWork

OURS = "pgcompile"


@dataclass
class Row:
    """One contestant in one case.

    Args:
        status: "measured", "unavailable", "wrong" (it computes something else), "out of memory" or "error".
        reason: of another status than the first.
        seconds: of each timed step.
        planning_seconds: pgcompile's planning in each of them.
        first_seconds: of the first call, which compiles.
        peak_bytes: needed above what was allocated before the step.
        ideal_bytes: the same, of a dense contestant, for as many tokens and predictions as are distinct.
        ideal_compile_seconds: what it took to compile for those.
        errors: distances from the truth, as multiples of dense eager's own; see agreement.py.
        packing: what pgcompile decided.
    """

    name: str
    status: str = "measured"
    reason: str = ""
    is_dense: bool = False
    seconds: list[float] = field(default_factory=list)
    planning_seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    peak_bytes: int | None = None
    ideal_bytes: int | None = None
    ideal_compile_seconds: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    packing: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.status == "measured" and self.seconds else None

    @property
    def compile_seconds(self) -> float | None:
        """What the first call took more than the others."""
        if self.median is None or self.first_seconds is None:
            return None
        return max(self.first_seconds - self.median, 0.0)

    @property
    def planning_share(self) -> float | None:
        if self.median is None or not any(self.planning_seconds):
            return None
        return statistics.median(self.planning_seconds) / self.median


@dataclass
class Record:
    """One case, measured: everything that a figure needs to be understood and repeated.

    Args:
        tokens, operations: of the dense batch, of its tokens without padding, and of distinct ones. Operations are
            those of linear layers and attention, forward (and backward, twice as many, in a step).
        settings: what of the command line has an influence on figures.
        took: seconds of measuring all rows, less those of compiling, and of steps for the sake of --min-run-time.
    """

    case: dict[str, Any]
    phase: str
    tokens: dict[str, int]
    operations: dict[str, int]
    rows: list[Row] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    command: str = ""
    took: float = 0.0

    @classmethod
    def of(cls, case: Case, batch: Batch, work: ModelWork, phase: str) -> Record:
        passes = 2 * (
            3 if phase == "step" else 1
        )  # a multiply-add is two operations; backward does each twice
        operations = {
            kind: passes * work.of(batch.tokens[kind], batch.pairs[kind], batch.predictions[kind])
            for kind in batch.tokens
        }
        return cls(_plain(asdict(case)), phase, dict(batch.tokens), operations)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Record:
        return cls(**{**found, "rows": [Row(**row) for row in found["rows"]]})

    @property
    def name(self) -> str:
        return self.case["name"]

    @property
    def ideal(self) -> float:
        """How much more work the dense batch is than its distinct tokens."""
        return self.operations["dense"] / self.operations["distinct"]

    @property
    def failed(self) -> bool:
        """Has a contestant no figure that might have one another time?"""
        return any(row.status in ("error", "out of memory") for row in self.rows)

    @property
    def ours(self) -> Row:
        return next((row for row in self.rows if row.name == OURS), Row(OURS, status="unavailable"))

    @property
    def baseline(self) -> Row | None:
        """The fastest dense contestant."""
        dense = [row for row in self.rows if row.is_dense and row.median is not None]
        return min(dense, key=lambda row: row.median or 0.0, default=None)

    @property
    def leanest(self) -> Row | None:
        """The dense contestant that needs the least memory."""
        dense = [row for row in self.rows if row.is_dense and row.median is not None and row.peak_bytes]
        return min(dense, key=lambda row: row.peak_bytes or 0, default=None)

    def speedup(self, row: Row) -> float | None:
        """Over the fastest dense contestant."""
        if row.median is None or self.baseline is None or self.baseline.median is None:
            return None
        return self.baseline.median / row.median

    def efficiency(self, row: Row) -> float | None:
        """Share of the ideal speed-up; nothing for dense contestants, who don't try."""
        speedup = self.speedup(row)
        return None if speedup is None or row.is_dense else speedup / self.ideal

    def memory_ratio(self, row: Row) -> float | None:
        """Of the leanest dense contestant's."""
        return _peak_over(row, self.leanest.peak_bytes if self.leanest else None)

    def memory_overhead(self, row: Row) -> float | None:
        """Over what the leanest dense contestant needs for the distinct tokens; nothing for dense contestants."""
        return None if row.is_dense else _peak_over(row, self.leanest.ideal_bytes if self.leanest else None)

    def utilization(self, row: Row, rate: float | None) -> float | None:
        """Operations of what the contestant computes over what the device could do in that time (MFU)."""
        if rate is None or row.median is None:
            return None
        return self.operations["dense" if row.is_dense else "distinct"] / row.median / rate

    def has(
        self, case: Case, names: Sequence[str], settings: dict[str, Any], machine: dict[str, Any]
    ) -> bool:
        """Whether this is that case, with these contestants, measured under the same conditions."""
        return (
            self.case == _plain(asdict(case)) and self.settings == _plain(settings)
            and self.machine == _plain(machine) and set(names) <= {row.name for row in self.rows}
        )  # fmt: skip


def _peak_over(row: Row, other: int | None) -> float | None:
    return row.peak_bytes / other if row.median is not None and row.peak_bytes and other else None


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def read(path: Path) -> list[Record]:
    """Records of earlier runs; none if there is no such file.

    Raises:
        click.ClickException: if it isn't a file of records.
    """
    if not path.is_file():
        return []
    try:
        return [Record.from_dict(found) for found in json.loads(path.read_text())]
    except ValueError as error:
        raise click.ClickException(f"{path} isn't JSON: {error}") from None
    except (TypeError, KeyError):
        raise click.ClickException(f"{path} has no records of `pgcompile bench --json`") from None


def write(path: Path, records: Sequence[Record]) -> None:
    """All records; a run that is cut off leaves the last complete file."""
    write_atomically(path, json.dumps([asdict(record) for record in records], indent=1) + "\n")
