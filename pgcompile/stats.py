"""Counters of the process: how often packing happened, and what it saved."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Stats:
    """A snapshot.

    Args:
        packed, dense, eager: calls by outcome: packed; of a graph that can be packed, but run dense; of one that
            can't be packed (not counted where there is nothing to pack: no attention, or a key-value cache).
        dense_tokens: rows × positions, over the calls that built a plan.
        valid_tokens: of those, tokens that are not dropped padding.
        packed_tokens: of those, what a packed call computes: distinct ones, and copies in short branches.
        computed_tokens: what was computed: packed_tokens of packed calls, dense_tokens of dense ones.
        checked: batches that were compared with the original (`Options.check`).
        compiles: artifacts of packed graphs.
        recompile_limit_hits: frames on which Dynamo gave up (its `recompile_limit`).
        plans_reused: calls whose tree was known: another graph, or an earlier call, had the same batch.
        plan_seconds: time spent planning.
    """

    packed: int = 0
    dense: int = 0
    eager: int = 0
    dense_tokens: int = 0
    valid_tokens: int = 0
    packed_tokens: int = 0
    computed_tokens: int = 0
    checked: int = 0
    compiles: int = 0
    recompile_limit_hits: int = 0
    plans_reused: int = 0
    plan_seconds: float = 0.0

    def __str__(self) -> str:
        saved = 1 - self.computed_tokens / self.dense_tokens if self.dense_tokens else 0.0
        checked = f", {self.checked} checked" if self.checked else ""
        return (
            f"calls: {self.packed} packed, {self.dense} dense, {self.eager} eager{checked}; "
            f"{self.dense_tokens:,} tokens, {self.valid_tokens:,} without padding, {self.packed_tokens:,} packed; "
            f"{self.computed_tokens:,} computed ({saved:.0%} saved); "
            f"{self.compiles} compiles, {self.recompile_limit_hits} recompile limit hits, "
            f"{self.plan_seconds:.3f} s planning"
        )


_lock = threading.Lock()
_paused: ContextVar[bool] = ContextVar("paused", default=False)
_counters: dict[str, Any] = asdict(Stats())
_limit_hits_at_reset = 0


def count(**increments: float) -> None:
    """Add to counters by name."""
    if _paused.get():
        return
    with _lock:
        for name, increment in increments.items():
            _counters[name] += increment


@contextmanager
def paused() -> Iterator[None]:
    """Count nothing of what this thread does in it."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


def stats() -> Stats:
    """Counters since the process started or `reset_stats()`."""
    with _lock:
        return Stats(**_counters | {"recompile_limit_hits": _limit_hits() - _limit_hits_at_reset})


def reset_stats() -> None:
    """Set all counters to zero."""
    global _limit_hits_at_reset
    with _lock:
        _counters.update(asdict(Stats()))
        _limit_hits_at_reset = _limit_hits()


def _limit_hits() -> int:
    """Dynamo counts the frames it leaves to eager because of `recompile_limit` among its unimplemented reasons."""
    from torch._dynamo.utils import counters

    return sum(n for reason, n in counters["unimplemented"].items() if "recompile_limit" in reason)
