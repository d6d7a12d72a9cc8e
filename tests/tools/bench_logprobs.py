"""Time token log-probabilities, forward and backward, dense and packed: `python tests/tools/bench_logprobs.py`.

A Qwen3 of 4 layers, 512 wide, 8/4 heads of 64 and a vocabulary of 8192, float32, on groups of G rows that share a
prompt of P tokens and have R of their own. The dense side is the better one of eager and inductor. All runs are
interleaved in one process. *Ideal* is the ratio of the counted work (multiply-adds of linear layers and attention) of
the whole batch to that of its distinct tokens; *efficiency* is the measured ratio over it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import pgcompile

CASES = ((1024, 128, 8), (2048, 64, 8), (512, 512, 4), (0, 512, 4))  # in the last, nothing is shared
VOCABULARY = 8192


def token_logprobs(model: Qwen3ForCausalLM, ids: Tensor) -> Tensor:
    """[N, S] → [N, S - 1]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def batch(prompt: int, answer: int, group: int) -> Tensor:
    """ids [G, P + R]."""
    ids = torch.randint(1, VOCABULARY, (group, prompt + answer), generator=torch.Generator().manual_seed(0))
    ids[:, :prompt] = ids[0, :prompt]
    return ids


def seconds(run: Callable[..., Tensor], model: Qwen3ForCausalLM, ids: Tensor) -> float:
    """One forward and backward pass."""
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    run(model, ids).sum().backward()
    return time.perf_counter() - started


def main() -> None:
    """Print a table, and write all times as JSON."""
    parser = argparse.ArgumentParser(description="Time token log-probabilities, dense and packed.")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each, after a warm-up")
    parser.add_argument("--json", type=Path, help="write all times here")
    parser.add_argument("--cases", default="0,1,2,3", help="which of the four cases, comma-separated")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        )
    )  # fmt: skip
    collected: list[pgcompile.BatchReport | pgcompile.GraphReport] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        return pgcompile.pgcompile(gm, inputs, collector=collected.append)

    runs: dict[str, Callable[..., Tensor]] = {
        "eager": token_logprobs,
        "inductor": torch.compile(token_logprobs),
        "pgcompile": torch.compile(token_logprobs, backend=backend),
    }
    table = Table("P, R, G", *runs, "speed-up", "ideal", "efficiency", title="seconds, median")
    rows = []
    for case in [CASES[int(i)] for i in options.cases.split(",")]:
        ids = batch(*case)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(options.repeats + 1):
            for name, run in runs.items():
                times[name].append(seconds(run, model, ids))
            if repeat == 0:
                times = {name: [] for name in runs}
        report = next(r for r in reversed(collected) if isinstance(r, pgcompile.BatchReport))
        medians = {name: statistics.median(values) for name, values in times.items()}
        speedup = min(medians["eager"], medians["inductor"]) / medians["pgcompile"]
        ideal = 1 / (1 - report.saving)
        table.add_row(
            ", ".join(map(str, case)), *(f"{m:.2f}" for m in medians.values()), f"{speedup:.2f}", f"{ideal:.2f}",
            f"{speedup / ideal:.2f}",
        )  # fmt: skip
        rows.append({"case": case, "times": times, "speedup": speedup, "ideal": ideal})
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
