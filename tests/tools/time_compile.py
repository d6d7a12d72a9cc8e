"""Time what the first call costs: `python tests/tools/time_compile.py [--rounds N]`. Not a test.

The budget of each artifact of pgcompile, packed and dense, is 1.3 times what inductor takes for the same model. Every
figure is of a process of its own with an empty cache of inductor's, in turns: the first training step, less the median
of three that follow.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from pgcompile.bench.models import build_model

PROMPTS = {"inductor": 96, "packed": 96, "dense": 0}  # tokens that all rows share
ROWS, POSITIONS = 4, 128


def seconds_to_compile(name: str) -> float:
    """Compile the step of bench's small model, in this process."""
    model = build_model("tiny-cpu", None, POSITIONS, torch.float32, torch.device("cpu")).module

    def loss(ids: Tensor) -> Tensor:
        logits = model(ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    step = torch.compile(loss, backend="inductor" if name == "inductor" else "pgcompile")
    seconds = []
    for seed in range(4):
        ids = torch.randint(1000, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(seed))
        ids[:, : PROMPTS[name]] = ids[0, : PROMPTS[name]].clone()
        begin = time.perf_counter()
        step(ids).backward()
        seconds.append(time.perf_counter() - begin)
    return seconds[0] - statistics.median(seconds[1:])


def main() -> None:
    """Print one line for each artifact: seconds of all rounds, and the ratio of the medians to inductor's."""
    parser = argparse.ArgumentParser(description="Time what the first call costs.")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each artifact")
    parser.add_argument("--one", choices=PROMPTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(seconds_to_compile(given.one))
        return
    found: dict[str, list[float]] = {name: [] for name in PROMPTS}
    for _ in range(given.rounds):
        for name, seconds in found.items():
            with tempfile.TemporaryDirectory() as folder:
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
                command = [sys.executable, __file__, "--one", name]
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            seconds.append(float(done.stdout.split()[-1]))
    inductor = statistics.median(found["inductor"])
    for name, seconds in found.items():
        each = ", ".join(f"{s:.1f}" for s in seconds)
        print(f"{name:9} {each} s: {statistics.median(seconds) / inductor:.2f} of inductor's")


if __name__ == "__main__":
    main()
