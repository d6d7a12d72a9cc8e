"""Time what a packed call costs beside its plan: `python tests/tools/time_calls.py [--calls N]`. Not a test.

The budget is 300 µs for a model of 300 parameters. That is all that Python does in a call of the backend; the time of
the plan and of what runs because the model computes it (the compiled graph, and the small graphs of look-ups before it
and of outputs behind it) is taken off, and printed beside it. No batch is seen twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from pgcompile.backend import PackedCall, pgcompile

ROWS, PROMPT, ANSWER, VOCABULARY = 4, 12, 4, 64
LAYERS = 27  # of eleven parameters each, and three more: 300


class Clock:
    """Seconds by name, of the calls since the last `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args)
            self.seconds[name] += time.perf_counter() - begin
            return result

        return run

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, defaultdict(float)
        return taken


def timed_backend(clock: Clock) -> Callable[..., Any]:
    """pgcompile's backend, with the parts of its calls on the clock."""

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        call: Any = pgcompile(gm, examples, options={"min_saving": 0, "inner": "aot_eager"})
        assert isinstance(call, PackedCall), "this graph isn't packed"
        parts: Any = {
            name: clock.timed("graphs", getattr(call.graphs, name)) for name in ("requests", "late")
        }
        families: Any = call.run.families
        compiled = families.compiled
        families.compiled = lambda *args: clock.timed("graphs", compiled(*args))
        call.graphs = dataclasses.replace(call.graphs, **parts)
        call._plan = clock.timed("plan", call._plan)
        return clock.timed("call", call)

    return backend


def batch(generator: torch.Generator) -> Tensor:
    """Token ids `[ROWS, PROMPT + ANSWER]`, whose rows share a prompt."""
    ids = torch.randint(VOCABULARY, (ROWS, PROMPT + ANSWER), generator=generator)
    ids[:, :PROMPT] = ids[0, :PROMPT]
    return ids


def main() -> None:
    """Print one line: least and median time of the overhead, the plan, and the graphs."""
    parser = argparse.ArgumentParser(description="Time what a packed call costs beside its plan.")
    parser.add_argument("--calls", type=int, default=200, help="timed calls after ten warm-up calls")
    calls = parser.parse_args().calls
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    clock = Clock()

    @torch.compile(backend=timed_backend(clock), dynamic=True)
    def loss(ids: Tensor) -> Tensor:
        logits = model(ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = defaultdict(list)
    for i in range(calls + 10):
        loss(batch(generator))
        seconds = clock.take()
        seconds["overhead"] = 2 * seconds["call"] - sum(seconds.values())
        for name in ("overhead", "plan", "graphs") if i >= 10 else ():
            found[name].append(1e6 * seconds[name])
    parameters = len(list(model.parameters()))
    cells = [f"{name} {min(us):.0f} ({sorted(us)[calls // 2]:.0f})" for name, us in found.items()]
    print(f"{parameters} parameters, least (median) of {calls} calls in us: " + ", ".join(cells))


if __name__ == "__main__":
    main()
