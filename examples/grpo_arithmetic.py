"""GRPO on additions, trained twice from one seed: without pgcompile, then with it.

A small Qwen3 over bytes reads a pupil's homework, 17 additions, and answers the next one in eight tokens:

    47+38=15+70=85      sometimes the pupil shows the working (units, tens, total),
    26+51=no idea!      more often there is none

A short supervised warm-up imitates the pupil and is right about one time in four. Then GRPO (rewards normalised within
a group, PPO's clipped objective) samples 16 answers to every prompt, checks them by adding, and updates the model,
which finds out that working pays. The 16 rows of a group repeat the same 261 prompt tokens; pgcompile runs them
once. The two runs differ in one argument:

    update_loss = torch.compile(grpo_loss, backend=backend)

Weights, optimizer state, prompts and the random numbers behind the sampled answers are the same in both. The script
shows its progress, prints a table, and draws both runs:

    python examples/grpo_arithmetic.py [--steps 30] [--seed 0] [--out grpo_arithmetic.png] [--backend inductor]
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

matplotlib.use("Agg")  # draws on a machine without a screen
import matplotlib.pyplot as plt
from matplotlib.container import BarContainer

SHOTS = 17  # additions before the question: 17 × 15 + 6 = 261 prompt tokens
PROMPTS = 16  # prompts in an update
GROUP = 16  # answers sampled for each
QUESTION = len("47+38=")
ANSWER = len("15+70=85")  # 8 tokens
NEWLINE = ord("\n")
WORKED = 0.25  # the share of questions that the pupil answers

WARM_UP_STEPS = 600  # by then nearly all worked answers are right
WARM_UP_ROWS = 4  # few rows and many steps learn to add fastest
WARM_UP_LR = 2e-3
GRPO_LR = 2e-4  # 1e-3 forgets how to add
CLIP = 0.2
COMPILING_STEPS = 2  # not timed: the first update compiles forward and backward, the second still allocates

console = Console()


# --- the task ---------------------------------------------------------------------------------------------------------


def draw_addends(rng: random.Random) -> tuple[int, int]:
    """Two numbers of two digits whose sum has two digits too, so that all lines are equally long."""
    while True:
        a, b = rng.randint(10, 89), rng.randint(10, 89)
        if a + b < 100:
            return a, b


def write_question(a: int, b: int) -> str:
    return f"{a}+{b}="


def write_answer(rng: random.Random, a: int, b: int, worked: float) -> str:
    """With probability `worked` the sums of units and tens, and the total: 47+38= gives 15+70=85."""
    if rng.random() >= worked:
        return "no idea!"
    units = a % 10 + b % 10
    return f"{units:02d}+{a + b - units:02d}={a + b:02d}"


def write_homework(rng: random.Random, count: int, worked: float) -> str:
    pairs = [draw_addends(rng) for _ in range(count)]
    return "".join(f"{write_question(a, b)}{write_answer(rng, a, b, worked)}\n" for a, b in pairs)


def to_tokens(texts: list[str]) -> Tensor:
    return torch.tensor([list(text.encode()) for text in texts])


def draw_prompts(rng: random.Random) -> tuple[Tensor, list[int]]:
    """Prompts ``[PROMPTS, P]`` with the totals that they ask for."""
    addends = [draw_addends(rng) for _ in range(PROMPTS)]
    prompts = [write_homework(rng, SHOTS, WORKED) + write_question(a, b) for a, b in addends]
    return to_tokens(prompts), [a + b for a, b in addends]


def grade(answer: list[int], total: int) -> float:
    """1 when the answer ends in the right total, which we know by adding."""
    return float(bytes(answer).endswith(f"{total:02d}".encode()))


# --- the model and its warm-up ----------------------------------------------------------------------------------------


def build_model() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=256,
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
    return Qwen3ForCausalLM(config)


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def apply_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def warm_up(model: nn.Module, rng: random.Random, progress: Progress) -> dict:
    """Supervised training on homework. Returns the optimizer's state, with which GRPO goes on.

    All answers are worked in the first half, so that the model learns to add; then the pupil gets lazier.
    """
    optimizer = build_optimizer(model, WARM_UP_LR)
    task = progress.add_task("warm-up", total=WARM_UP_STEPS, note="")
    for step in range(WARM_UP_STEPS):
        done = step / WARM_UP_STEPS
        optimizer.param_groups[0]["lr"] = WARM_UP_LR * min(1.0, (step + 1) / 20, (1.0 - done) / 0.3)
        worked = 1.0 - (1.0 - WORKED) * max(0.0, 2.0 * done - 1.0)
        ids = to_tokens([write_homework(rng, SHOTS + 1, worked) for _ in range(WARM_UP_ROWS)])
        labels = ids.clone()
        labels.view(WARM_UP_ROWS, SHOTS + 1, -1)[:, :, :QUESTION] = -100  # questions can't be predicted
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        apply_gradients(model, optimizer)
        show(progress, task, f"loss {loss.item():.3f}", every=25)
    return optimizer.state_dict()


# --- sampling ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_answers(model: nn.Module, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """``GROUP`` answers to every prompt, ``[PROMPTS * GROUP, ANSWER]``: each prompt is read once, its cache repeated.

    A token is where the cumulative distribution passes a uniform random number. Two models that differ in rounding
    only therefore draw the same token, unless a number falls into the crack between their distributions.
    """
    cache = DynamicCache(config=model.config)
    logits = model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(GROUP)
    logits = logits.repeat_interleave(GROUP, dim=0)
    uniform = torch.rand(ANSWER, len(logits), 1, generator=generator)
    answer = []
    for step in range(ANSWER):
        below = logits.softmax(-1).cumsum(-1) < uniform[step]
        answer.append(below.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1))
        if step < ANSWER - 1:
            logits = model(input_ids=answer[-1], past_key_values=cache, use_cache=True).logits[:, -1]
    return torch.cat(answer, dim=1)


@dataclass(frozen=True)
class Batch:
    """What one update reads; N = PROMPTS * GROUP rows, S = P + ANSWER positions."""

    input_ids: Tensor  # [N, S]
    attention_mask: Tensor  # [N, S], 0 after an answer that ended early
    answer_mask: Tensor  # [N, S - 1], 1 where the next token is an answer's
    advantages: Tensor  # [N]
    answers: Tensor  # [N, ANSWER], as sampled
    rewards: Tensor  # [N]


def collect_batch(model: nn.Module, prompts: Tensor, totals: list[int], generator: torch.Generator) -> Batch:
    """Samples, grades, and normalises the rewards within each group."""
    answers = sample_answers(model, prompts, generator)
    ended = (answers == NEWLINE).cumsum(-1)
    is_token = (ended == 0) | (
        (ended == 1) & (answers == NEWLINE)
    )  # the newline that ends an answer is its last token
    rewards = torch.tensor([grade(row, totals[i // GROUP]) for i, row in enumerate(answers.tolist())])
    groups = rewards.view(-1, GROUP)
    advantages = (groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)

    prompt_rows = prompts.repeat_interleave(GROUP, dim=0)
    input_ids = torch.cat([prompt_rows, answers.where(is_token, 0)], dim=1)
    attention_mask = torch.cat([torch.ones_like(prompt_rows), is_token.long()], dim=1)
    answer_mask = attention_mask[:, 1:].float()
    answer_mask[:, : prompts.shape[1] - 1] = 0.0
    return Batch(input_ids, attention_mask, answer_mask, advantages.flatten(), answers, rewards)


# --- the update -------------------------------------------------------------------------------------------------------


def token_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Log-probability of every next token, ``[N, S - 1]``."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)


def grpo_loss(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, answer_mask: Tensor, advantages: Tensor
) -> Tensor:
    """PPO's clipped objective over answer tokens. Answers are fresh: the old log-probs are these, detached."""
    logprobs = token_logprobs(model, input_ids, attention_mask)
    ratio = (logprobs - logprobs.detach()).exp()
    weight = advantages[:, None]
    objective = torch.minimum(ratio * weight, ratio.clamp(1 - CLIP, 1 + CLIP) * weight)
    return -(objective * answer_mask).sum() / answer_mask.sum()


@dataclass(frozen=True)
class Work:
    """Tokens that pass through the linear layers, and query-key pairs that attention needs."""

    tokens: int
    pairs: int

    def flops(self, model: nn.Module) -> int:
        """Multiply-adds of a forward pass, times two; the backward is twice that whatever the tokens."""
        linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
        config = model.config
        attention = 2 * config.head_dim * config.num_attention_heads * config.num_hidden_layers  # q·k and p·v
        return 2 * (self.tokens * linear + self.pairs * attention)


def count_dense(batch: Batch) -> Work:
    """Every position of every row, every position attending itself and those before it."""
    rows, positions = batch.input_ids.shape
    return Work(rows * positions, rows * positions * (positions + 1) // 2)


def count_distinct(batch: Batch) -> Work:
    """Every distinct prefix once: a token's value depends on nothing but the tokens up to it.

    Equal answers count once too, which makes the ideal ratio 15 here; sharing the prompts alone would make it 11.
    """
    prefixes = set()
    for ids, length in zip(batch.input_ids.tolist(), batch.attention_mask.sum(-1).tolist(), strict=True):
        row = bytes(ids[:length])
        prefixes.update(row[: end + 1] for end in range(length))
    return Work(len(prefixes), sum(map(len, prefixes)))


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one GRPO step did; times in seconds."""

    reward: float
    loss: float
    sample_time: float
    update_time: float  # forward and backward
    optimizer_time: float
    dense_tokens: int
    valid_tokens: int
    distinct_tokens: int
    ideal: float  # dense work over distinct work
    answers: Tensor  # [N, ANSWER]


def train(
    model: nn.Module, optimizer_state: dict, backend: str, steps: int, seed: int, progress: Progress
) -> list[Step]:
    """GRPO on a copy of `model`; everything random follows from `seed`."""
    model = copy.deepcopy(model)
    optimizer = build_optimizer(model, GRPO_LR)
    optimizer.load_state_dict(
        copy.deepcopy(optimizer_state)
    )  # loading shares the tensors, a step writes them
    optimizer.param_groups[0]["lr"] = GRPO_LR
    prompt_rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    update_loss = torch.compile(grpo_loss, backend=backend)

    history = []
    task = progress.add_task(backend, total=steps, note="compiling")
    for _ in range(steps):
        prompts, totals = draw_prompts(prompt_rng)
        start = time.perf_counter()
        batch = collect_batch(model, prompts, totals, generator)
        sampled = time.perf_counter()
        loss = update_loss(model, batch.input_ids, batch.attention_mask, batch.answer_mask, batch.advantages)
        loss.backward()
        updated = time.perf_counter()
        apply_gradients(model, optimizer)
        end = time.perf_counter()

        dense, distinct = count_dense(batch), count_distinct(batch)
        step = Step(
            reward=batch.rewards.mean().item(),
            loss=loss.item(),
            sample_time=sampled - start,
            update_time=updated - sampled,
            optimizer_time=end - updated,
            dense_tokens=dense.tokens,
            valid_tokens=int(batch.attention_mask.sum()),
            distinct_tokens=distinct.tokens,
            ideal=dense.flops(model) / distinct.flops(model),
            answers=batch.answers,
        )
        history.append(step)
        note = f"reward {step.reward:.2f}  update {step.update_time:5.2f} s  tokens {distinct.tokens}/{dense.tokens}"
        show(progress, task, note)
    return history


def show(progress: Progress, task: TaskID, note: str, every: int = 1) -> None:
    """Advances a bar; where there is no terminal to animate, prints every `every`-th note as a line instead."""
    progress.update(task, advance=1, note=note)
    state = progress.tasks[task]
    if not console.is_terminal and state.completed % every == 0:
        console.print(f"{state.description} {state.completed:.0f}/{state.total:.0f}  {note}")


# --- the comparison ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side. Times are medians over the steps after compiling, in seconds."""

    dense_time: float
    packed_time: float
    ideal: float  # median over the steps of both runs

    @property
    def ratio(self) -> float:
        return self.dense_time / self.packed_time

    @property
    def share_of_ideal(self) -> float:
        return self.ratio / self.ideal


def update_time(history: list[Step]) -> float:
    return median(step.update_time for step in history[COMPILING_STEPS:] or history)


def compare(dense: list[Step], packed: list[Step]) -> Comparison:
    ideal = median(step.ideal for step in (dense + packed))
    return Comparison(update_time(dense), update_time(packed), ideal)


def tabulate(runs: dict[str, list[Step]]) -> Table:
    """A column per run: rewards, times, tokens."""
    table = Table(title="GRPO on additions, medians over the steps", title_justify="left")
    table.add_column()
    for name in runs:
        table.add_column(name, justify="right")

    def add(label: str, value: Callable[[list[Step]], str]) -> None:
        table.add_row(label, *(value(history) for history in runs.values()))

    add("reward, first 3 steps", lambda h: f"{mean_reward(h[:3]):.2f}")
    add("reward, last 3 steps", lambda h: f"{mean_reward(h[-3:]):.2f}")
    add("update: forward + backward", lambda h: f"{update_time(h):.3f} s")
    add("optimizer", lambda h: f"{median(step.optimizer_time for step in h):.3f} s")
    add("sampling and grading", lambda h: f"{median(step.sample_time for step in h):.3f} s")
    add("compiling (first update)", lambda h: f"{h[0].update_time:.0f} s")
    add("all steps, without compiling", lambda h: f"{total_time(h):.0f} s")
    add("tokens in a batch", lambda h: f"{median(step.dense_tokens for step in h):.0f}")
    add("  of them not padding", lambda h: f"{median(step.valid_tokens for step in h):.0f}")
    add("  of them distinct", lambda h: f"{median(step.distinct_tokens for step in h):.0f}")
    return table


def total_time(history: list[Step]) -> float:
    """Sampling, updates and optimizer, the compiling steps counted as median ones."""
    others = sum(step.sample_time + step.optimizer_time for step in history)
    return others + len(history) * update_time(history)


def mean_reward(history: list[Step]) -> float:
    return sum(step.reward for step in history) / len(history)


def describe_speed(result: Comparison) -> str:
    return (
        f"An update takes {result.dense_time:.2f} s without pgcompile and {result.packed_time:.2f} s with it: "
        f"[bold]{result.ratio:.1f} times faster[/bold], {result.share_of_ideal:.0%} of the ideal {result.ideal:.1f} "
        "(the work of all tokens over the work of the distinct ones)."
    )


def describe_agreement(dense: list[Step], packed: list[Step]) -> str:
    """How closely the two runs agree, in words."""
    pairs = list(zip(dense, packed, strict=True))
    same = [torch.equal(a.answers, b.answers) for a, b in pairs]
    until = same.index(False) if False in same else len(same)
    loss_gap = max((abs(a.loss - b.loss) for a, b in pairs[:until]), default=0.0)
    rounding = "Packing changes the order of some sums, and so their float32 rounding"
    if until == len(pairs):
        return (
            f"All {until} steps sampled the same answers, token for token: the reward curves are equal, and the losses"
            f" at most {loss_gap:.1e} apart. {rounding}; it never changed a sampled token."
        )
    gaps = [abs(a.reward - b.reward) for a, b in pairs]
    equal = (dense[-1].answers == packed[-1].answers).float().mean().item()
    return (
        f"The first {until} of {len(pairs)} steps sampled the same answers, token for token, with losses at most"
        f" {loss_gap:.1e} apart. The rewards differ by at most {max(gaps):.3f} in any step and by"
        f" {sum(gaps) / len(gaps):.3f} on average. {rounding}: in step {until + 1} a random number fell between the two"
        " models' distributions and a first sampled token differs; from there on the runs learn from different answers."
        f" In the last step {equal:.0%} of the sampled tokens were still equal."
    )


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(dense: list[Step], packed: list[Step], result: Comparison, path: str) -> None:
    """Rewards on top of each other; update times side by side, with the time that the ideal ratio would give."""
    gray, blue, red, ink = "#a3a9b3", "#2563eb", "#dc2626", "#1f2937"
    plt.rcParams.update({"font.size": 11, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5), layout="constrained")
    steps = list(range(1, len(dense) + 1))

    left.plot(steps, [step.reward for step in dense], color=gray, linewidth=7, alpha=0.7, label="inductor")
    left.plot(steps, [step.reward for step in packed], color=blue, linewidth=2, label="pgcompile")
    left.set(
        title="The same learning", xlabel="GRPO step", ylabel="reward: share of right answers", ylim=(0, 1)
    )
    left.legend(loc="lower right", frameon=False)

    timed = slice(COMPILING_STEPS if len(steps) > COMPILING_STEPS else 0, None)

    def bars(history: list[Step], shift: float, color: str, label: str) -> BarContainer:
        heights = [step.update_time for step in history[timed]]
        return right.bar([x + shift for x in steps[timed]], heights, 0.4, color=color, label=label)

    ideal_time = result.dense_time / result.ideal
    handles = [
        bars(dense, -0.2, gray, f"inductor {result.dense_time:.2f} s"),
        bars(packed, 0.2, blue, f"pgcompile {result.packed_time:.2f} s"),
        right.axhline(
            ideal_time, color=red, linestyle="--", linewidth=1.3, label=f"ideal {ideal_time:.2f} s"
        ),
    ]
    right.set(
        title=f"Updates {result.ratio:.1f}× faster, {result.share_of_ideal:.0%} of the ideal {result.ideal:.1f}×",
        xlabel="GRPO step, after compiling",
        ylabel="forward + backward [s]",
        ylim=(0, 1.2 * right.dataLim.ymax),  # room for the legend
    )
    right.legend(handles=handles, loc="upper center", ncols=3, frameon=False)

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- main -------------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Tells glibc to keep large blocks instead of handing them back to the kernel.

    Otherwise the dense run, whose tensors are large, may spend a third of its update on page faults, and the ratio
    flatters pgcompile.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GRPO on additions, without and with pgcompile")
    parser.add_argument("--steps", type=int, default=30, help="GRPO steps of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="grpo_arithmetic.png", help="where to draw the two runs")
    parser.add_argument("--backend", help="run only this backend and draw nothing")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    columns = (
        "{task.description:>9}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        "{task.fields[note]}",
    )
    with Progress(*columns, console=console) as progress:
        model = build_model()
        optimizer_state = warm_up(model, random.Random(arguments.seed), progress)
        runs = {}
        for backend in [arguments.backend] if arguments.backend else ["inductor", "pgcompile"]:
            torch.compiler.reset()
            runs[backend] = train(
                model, optimizer_state, backend, arguments.steps, arguments.seed + 1, progress
            )

    console.print(tabulate(runs))
    if len(runs) == 2:
        dense, packed = runs.values()
        result = compare(dense, packed)
        console.print(describe_speed(result))
        console.print(describe_agreement(dense, packed))
        draw(dense, packed, result, arguments.out)
        console.print(f"Drawn: {arguments.out}")


if __name__ == "__main__":
    main()
