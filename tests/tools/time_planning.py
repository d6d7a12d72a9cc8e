"""Time the planning of one large batch: `python tests/tools/time_planning.py [--repeats R]`. Not a test.

The budget is 30 ms on one core for 128 rows of 8192 tokens with four int64 key columns: token ids, positions,
segment ids and a 0/1 mask. Three batches bound the cost from both sides: nothing shared (the most tokens to
write), GRPO groups of sixteen in shuffled order (long prefixes to compare), and one row repeated (every
comparison runs through). Numpy does this work on one thread, whatever the number of cores.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pgcompile.packed_tree import PackedTrees
from pgcompile.passes import PASSES
from pgcompile.passes.packed_graphs import PackedGraphs
from pgcompile.passes.pipeline import Compilation, run_passes
from pgcompile.plan import build_plan
from pgcompile.prefix_tree import build_prefix_tree, encode_columns

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


class Model(nn.Module):
    """One attention that reads four integer columns: ids, positions, document numbers and a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.embed_position = nn.Embedding(VOCABULARY, 2), nn.Embedding(POSITIONS, 2)

    def forward(self, ids: Tensor, positions: Tensor, documents: Tensor, mask: Tensor) -> Tensor:
        x = (self.embed(ids) + self.embed_position(positions))[:, None]
        at = torch.arange(ids.shape[1])
        allowed = (at[None, :] <= at[:, None]) & (documents[:, None, :, None] == documents[:, None, None, :])
        return F.scaled_dot_product_attention(x, x, x, attn_mask=allowed & mask.bool()[:, None, None, :])


class Captured(Exception):
    """The inputs are known; the model needn't run."""


def planned(inputs: tuple[Tensor, ...]) -> tuple[PackedGraphs, Any]:
    """The model's packed graphs, and the prologue's results for a batch."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        compilation = run_passes(PASSES, Compilation(gm, "fallback", False, "auto"), (), None)
        assert compilation.graphs is not None, compilation.reasons

        def run(*args: Any) -> Any:
            found.extend((compilation.graphs, args))
            raise Captured

        return run

    torch._dynamo.reset()
    with contextlib.suppress(Captured):
        torch.compile(Model(), backend=backend, dynamic=True)(*inputs)
    graphs, args = found
    return graphs, graphs.prologue(*args)


def main() -> None:
    """Print one line per batch: encode, tree, and the whole plan, masks and padding included."""
    parser = argparse.ArgumentParser(description="Time the planning of a batch.")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls after one warm-up call")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    positions = np.tile(np.arange(POSITIONS), (ROWS, 1))
    segment_ids = positions * SEGMENT_IDS // POSITIONS
    mask = np.ones((ROWS, POSITIONS), dtype=np.int64)
    mask[::2, -POSITIONS // 16 :] = 0
    first, end = np.zeros(ROWS, dtype=np.int64), np.full(ROWS, POSITIONS)
    print(f"{ROWS} x {POSITIONS}, 4 int64 columns, least (median) of {repeats} in ms")
    for name, ids in batches(rng).items():
        columns = [ids, positions, segment_ids, mask]
        codes = encode_columns(columns)
        graphs, results = planned(tuple(torch.from_numpy(c) for c in columns))
        tokens = build_plan(graphs, results, False, PackedTrees()).tokens
        trees = PackedTrees()
        stages: dict[str, Callable[[], Any]] = {
            "encode": partial(encode_columns, columns),
            "tree": partial(build_prefix_tree, codes, first, end),
            "plan": lambda graphs=graphs, results=results: build_plan(graphs, results, False, PackedTrees()),
            "known": partial(build_plan, graphs, results, False, trees),
        }
        times = {stage: best_ms(call, repeats) for stage, call in stages.items()}
        cells = [f"{stage} {least:5.1f} ({median:5.1f})" for stage, (least, median) in times.items()]
        print(f"{name:28s} T={tokens:8d}  " + "  ".join(cells))


if __name__ == "__main__":
    main()
