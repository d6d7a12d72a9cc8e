"""Time the planning of one large batch: `python tests/tools/time_planning.py [--repeats R]`. Not a test.

The budget is 30 ms on one core for 128 rows of 8192 tokens with four int64 key columns: token ids, positions,
segment ids and a 0/1 mask. Three batches bound the cost from both sides: nothing shared (the most tokens to
write), GRPO groups of sixteen in shuffled order (long prefixes to compare), and one row repeated (every
comparison runs through). Numpy does this work on one thread, whatever the number of cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pgcompile.prefix_tree import PrefixTree, build_prefix_tree, encode_columns

ROWS, POSITIONS, VOCABULARY, SEGMENT_IDS, GROUP = 128, 8192, 151_936, 10, 16


def batches(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Token ids `[ROWS, POSITIONS]` by the kind of sharing."""
    distinct = rng.integers(VOCABULARY, size=(ROWS, POSITIONS))
    grouped = distinct.copy()
    prompt = slice(0, 3 * POSITIONS // 4)
    grouped[:, prompt] = np.repeat(distinct[::GROUP, prompt], GROUP, axis=0)
    return {
        "nothing shared": distinct,
        f"groups of {GROUP}, 3/4 shared": grouped[rng.permutation(ROWS)],
        "one row repeated": np.repeat(distinct[:1], ROWS, axis=0),
    }


def best_ms(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Least and median wall time of `call` in milliseconds, after one warm-up call."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times[1:]), float(np.median(times[1:]))


def plan(columns: list[np.ndarray], first: np.ndarray, end: np.ndarray) -> PrefixTree:
    """Everything that is timed: key columns to prefix tree."""
    return build_prefix_tree(encode_columns(columns), first, end)


def main() -> None:
    """Print one line per batch: encode, tree and both."""
    parser = argparse.ArgumentParser(description="Time encode_columns and build_prefix_tree.")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls after one warm-up call")
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    positions = np.tile(np.arange(POSITIONS), (ROWS, 1))
    segment_ids = positions * SEGMENT_IDS // POSITIONS
    mask = np.ones((ROWS, POSITIONS), dtype=np.int64)
    mask[:, POSITIONS // 2] = 0  # a hole, so that the column isn't constant
    first, end = np.zeros(ROWS, dtype=np.int64), np.full(ROWS, POSITIONS)
    print(f"{ROWS} x {POSITIONS}, 4 int64 columns, least (median) of {repeats} in ms")
    for name, ids in batches(rng).items():
        columns = [ids, positions, segment_ids, mask]
        codes = encode_columns(columns)
        stages: dict[str, Callable[[], Any]] = {
            "encode": partial(encode_columns, columns),
            "tree": partial(build_prefix_tree, codes, first, end),
            "both": partial(plan, columns, first, end),
        }
        tokens = build_prefix_tree(codes, first, end).tokens
        times = {stage: best_ms(call, repeats) for stage, call in stages.items()}
        cells = [f"{stage} {least:5.1f} ({median:5.1f})" for stage, (least, median) in times.items()]
        print(f"{name:28s} T={tokens:8d}  " + "  ".join(cells))


if __name__ == "__main__":
    main()
