"""GRPO on additions, trained twice from one seed: without pgcompile, then with it.

A small Qwen3 reads 17 worked additions and must solve the next one, working included:

    47+38=15+70=85
    ...
    26+51=          the model answers 07+70=77, eight byte tokens

A short supervised warm-up leaves it right about one time in five. Then GRPO (group-normalised rewards, the clipped PPO
objective) samples 16 answers to each prompt, checks them by adding, and updates. In an update the 16 rows of a group
repeat the same 261 prompt tokens; pgcompile runs them once. The two runs differ in one argument of one line:

    update_loss = torch.compile(grpo_loss, backend=backend)

Weights, prompts and the random numbers that sample the answers are the same in both. Prints a table, writes a picture:

    python examples/grpo_arithmetic.py [--steps 30] [--seed 0] [--out grpo_arithmetic.png] [--backend inductor]
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from dataclasses import dataclass

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

matplotlib.use("Agg")  # before pyplot: a machine without a screen draws too
import matplotlib.pyplot as plt

SHOTS = 17  # worked additions before the question: 17 x 15 + 6 = 261 prompt tokens
PROMPTS = 16  # prompts per update
GROUP = 16  # sampled answers per prompt
ANSWER = len("15+70=85")
NEWLINE = ord("\n")
console = Console()


# --- the task ---------------------------------------------------------------------------------------------------------


def draw_addends(rng: random.Random) -> tuple[int, int]:
    """Two two-digit numbers whose sum has two digits: every line has the same length."""
    while True:
        a, b = rng.randint(10, 89), rng.randint(10, 89)
        if a + b < 100:
            return a, b


def write_question(a: int, b: int) -> str:
    return f"{a}+{b}="


def write_answer(a: int, b: int) -> str:
    """The units' sum, the tens' sum, the total: 47+38 gives 15+70=85."""
    units = a % 10 + b % 10
    return f"{units:02d}+{a + b - units:02d}={a + b:02d}"


def write_shots(rng: random.Random, count: int) -> str:
    pairs = [draw_addends(rng) for _ in range(count)]
    return "".join(f"{write_question(a, b)}{write_answer(a, b)}\n" for a, b in pairs)


def grade(answer: list[int], total: int) -> float:
    """1 for the right total in the right place, checked by adding; the working is not looked at."""
    return float(bytes(answer[-3:]) == f"={total:02d}".encode())


def draw_prompts(rng: random.Random) -> tuple[Tensor, list[int]]:
    """Prompt ids ``[PROMPTS, P]`` and the totals asked for."""
    texts, totals = [], []
    for _ in range(PROMPTS):
        a, b = draw_addends(rng)
        texts.append(write_shots(rng, SHOTS) + write_question(a, b))
        totals.append(a + b)
    return torch.tensor([list(text.encode()) for text in texts]), totals


# --- the model and its warm-up ----------------------------------------------------------------------------------------


def build_model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=256,  # bytes
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )


def build_optimizer(model: PreTrainedModel, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def warm_up(model: PreTrainedModel, rng: random.Random, steps: int, progress: Progress) -> torch.optim.Optimizer:
    """Supervised training on lines of correct additions; returns the optimizer, whose state GRPO goes on with."""
    optimizer = build_optimizer(model, lr=3e-3)
    bar = progress.add_task("warm-up", total=steps, note="")
    for step in range(steps):
        ids = torch.tensor([list(write_shots(rng, SHOTS + 1).encode()) for _ in range(WARM_ROWS)])
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update(bar, advance=1, note=f"loss {loss.item():.3f}")
    return optimizer
