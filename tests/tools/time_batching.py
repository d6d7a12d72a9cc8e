"""Time the planning of micro-batches: `python tests/tools/time_batching.py`.

10,000 rows of 4,096 tokens, in shuffled groups of 8 that share 3,000, under a budget of 65,536 distinct tokens.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from pgcompile.batching import plan_microbatches, shuffle_groups

ROWS, TOKENS, SHARED, GROUP = 10_000, 4_096, 3_000, 8


def main() -> None:
    """Print the seconds of each way to give the rows."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 50_000, (ROWS // GROUP, TOKENS)).repeat(GROUP, 0)
    rows[:, SHARED:] = rng.integers(0, 50_000, (ROWS, TOKENS - SHARED))
    rows = rows[rng.permutation(ROWS)]
    tensor, mask = torch.from_numpy(rows), torch.ones(ROWS, TOKENS, dtype=torch.int64)
    calls = {
        "plan, array": lambda: plan_microbatches(rows, 65_536),
        "plan, list of arrays, shuffled": lambda: plan_microbatches(list(rows), 65_536, seed=1),
        "plan, tensor with a mask": lambda: plan_microbatches(tensor, 65_536, attention_mask=mask),
        "shuffle_groups": lambda: shuffle_groups(rows),
    }
    for name, call in calls.items():
        started = time.perf_counter()
        found = call()
        print(f"{name:32} {time.perf_counter() - started:.2f} s ({len(found):,})")


if __name__ == "__main__":
    main()
