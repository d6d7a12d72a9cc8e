"""What happened, for people and programs: reports of graphs and batches, `Explanation`, `FallbackError`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .cost import Work
from .passes.reasons import HARMLESS, FallbackReason

log = logging.getLogger("pgcompile")

_WORST = ("packed", "islands", "eager")


class FallbackError(RuntimeError):
    """Raised instead of falling back, with `strict=True`. `reasons` has them all."""

    def __init__(self, reasons: list[FallbackReason]) -> None:
        self.reasons = reasons
        super().__init__("pgcompile can't pack this:\n" + describe(reasons))


def describe(reasons: Sequence[FallbackReason]) -> str:
    """Reasons in lines, each once: the same line of a model is often traced once for each layer."""
    groups: dict[tuple[str, ...], list[FallbackReason]] = {}
    for r in reasons:
        groups.setdefault((r.kind, r.explanation, r.source), []).append(r)
    lines = []
    for (kind, explanation, source), alike in groups.items():
        lines.append(f"  {kind}: {explanation}" + (f" ({len(alike)} times)" if len(alike) > 1 else ""))
        lines += [f"    at {source}"] if source else []
        lines += [f"    hint: {alike[0].hint}"] if alike[0].hint else []
    return "\n".join(lines)


@dataclass
class AttentionReport:
    """One attention: how it was spelled, what a token may see, who computes it and why not somebody faster."""

    node: str
    spelling: str
    mask: str
    engine: str
    why: str


@dataclass
class BatchReport:
    """One call: what the plan found and what was decided.

    `graph` numbers the graph; `kept_padding` counts padding that something reads and that therefore isn't dropped;
    `work` is what was counted for the batch as it is and packed; `saving` is the share of multiply-adds that packing
    saves; `head_chunks` is in how many parts the head ran, to save memory, and is computed again in backward (0:
    whole); `engines` computed its attention, each with why they had to if the graph's couldn't; `decision` is "packed"
    or "dense", `why` says why.
    """

    graph: int = 0
    rows: int = 0
    positions: int = 0
    dense_tokens: int = 0
    valid_tokens: int = 0
    packed_tokens: int = 0
    kept_padding: int = 0
    segments: int = 0
    depth: int = 0
    dense_pairs: int = 0
    packed_pairs: int = 0
    work: tuple[Work, Work] = (Work(0, 0), Work(0, 0))
    saving: float = 0.0
    head_chunks: int = 0
    engines: dict[str, str] = field(default_factory=dict)
    decision: str = "dense"
    why: str = ""


@dataclass
class GraphReport:
    """One Dynamo graph: "packed", "islands" or "eager", its attention, and the reasons if it isn't packed."""

    status: str = "packed"
    index: int = 0
    attention: list[AttentionReport] = field(default_factory=list)
    fallbacks: list[FallbackReason] = field(default_factory=list)
    notes: list[FallbackReason] = field(default_factory=list)
    islands: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def has_nothing_to_pack(self) -> bool:
        """Is it eager for harmless reasons only?"""
        return bool(self.fallbacks) and all(reason.kind in HARMLESS for reason in self.fallbacks)


@dataclass
class Explanation:
    """What `explain` found; prints as tables.

    Args:
        status: the worst of the graphs' ("packed" < "islands" < "eager"), not counting those with nothing to pack or a
            key-value cache.
        graphs: a report for each Dynamo graph.
        batches: a report for each call of a graph that can be packed, in order.
        breaks: where Dynamo stopped tracing: the `graph_break` notes of the graphs, and functions that it gave up.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    batches: list[BatchReport] = field(default_factory=list)
    breaks: list[FallbackReason] = field(default_factory=list)

    @property
    def status(self) -> str:
        counted = [g.status for g in self.graphs if not g.has_nothing_to_pack]
        return max(counted, key=_WORST.index, default="eager")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: fit for JSON."""
        return {
            "status": self.status,
            "graphs": [asdict(g) for g in self.graphs],
            "batches": [asdict(b) for b in self.batches],
            "breaks": [asdict(b) for b in self.breaks],
        }

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=shutil.get_terminal_size((110, 24)).columns, highlight=False)
        with console.capture() as capture:
            self._print(console)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())

    def _print(self, console: Any) -> None:
        from rich.table import Table

        ran_dense = self.status == "packed" and any(b.decision != "packed" for b in self.batches)
        suffix = ", but this batch runs as written" if ran_dense else ""
        console.print(f"[bold]pgcompile: {self.status}[/bold]{suffix}")
        if self.breaks:
            parts = f"{len(self.graphs)} graphs, each of which packs for itself"
            console.print(
                f"Dynamo broke the call into {parts}\n{describe(self.breaks)}", markup=False, soft_wrap=True
            )
        if not self.graphs:
            console.print("  Dynamo compiled no graph; TORCH_LOGS=graph_breaks tells why", markup=False)
        for i, graph in enumerate(self.graphs):
            if graph.attention:
                table = Table(
                    "attention",
                    "spelling",
                    "mask",
                    "engine",
                    title=f"graph {i}: {graph.status}",
                    title_justify="left",
                )
                for group, names in _alike(graph.attention):
                    table.add_row(names, group.spelling, group.mask, group.engine)
                console.print(table)
            else:
                console.print(f"graph {i}: {graph.status}")
            reasons = [*graph.fallbacks, *(note for note in graph.notes if note not in self.breaks)]
            if reasons:
                console.print(describe(reasons), markup=False, soft_wrap=True)
        if self.batches:
            columns = (
                *(["graph"] if len(self.graphs) > 1 else []),
                "rows",
                "positions",
                "dense_tokens",
                "valid_tokens",
                "packed_tokens",
                "segments",
                "depth",
                "saving",
                "decision",
            )
            table = Table(*(n.replace("_", " ") for n in columns), title="batches", title_justify="left")
            for batch in self.batches:
                planned = ("valid_tokens", "packed_tokens", "segments", "depth", "saving")
                table.add_row(*(_cell(batch, n, batch.packed_tokens == 0 and n in planned) for n in columns))
            console.print(table)
            for batch in self.batches:
                if batch.kept_padding:
                    text = f"  {batch.kept_padding} tokens of padding are kept: a loss or another reduction reads them"
                    console.print(text, markup=False, soft_wrap=True)
                if batch.head_chunks:
                    text = f"  the head runs in {batch.head_chunks} chunks, and once more in backward, to save memory"
                    console.print(text, markup=False, soft_wrap=True)
                for engine, why in batch.engines.items():
                    if why:
                        console.print(f"  attention by {engine}, {why}", markup=False, soft_wrap=True)
                if batch.why:
                    console.print(f"  {batch.why}", markup=False, soft_wrap=True)


def _cell(batch: BatchReport, name: str, unknown: bool) -> str:
    value = getattr(batch, name)
    return "–" if unknown else f"{value:.1%}" if isinstance(value, float) else str(value)


def _alike(attention: list[AttentionReport]) -> list[tuple[AttentionReport, str]]:
    """Attention nodes that differ in their names only, as one line."""
    groups: dict[tuple[str, ...], list[AttentionReport]] = {}
    for a in attention:
        groups.setdefault((a.spelling, a.mask, a.engine), []).append(a)
    return [(g[0], g[0].node if len(g) == 1 else f"{g[0].node} × {len(g)}") for g in groups.values()]
