"""What the examples have in common: one function through inductor, without and with pgcompile, side by side."""

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

import pgcompile

REPEATS = 5


def small_qwen(vocab_size=256):
    """A Qwen3 of four layers, for bytes."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
        )
    )  # fmt: skip


def token_logprobs(model, input_ids, attention_mask):
    """Log-probability of each token but the first, given those before it: [N, S] → [N, S - 1]."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)


def right_padded(rows):
    """Lists of ids of several lengths → input_ids and attention_mask, [N, S]."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()


def compare(fn, model, *arguments):
    """Time `fn(model, *arguments)`, backward included if its result requires grad, and compare what comes out."""
    contestants = {
        "inductor": torch.compile(fn, backend="inductor"),
        "pgcompile": pgcompile.optimize(fn),
    }

    def once(call):
        model.zero_grad(set_to_none=True)
        result = call(model, *arguments)
        if result.requires_grad:
            result.backward()
        return result.detach()

    results, gradients, seconds = {}, {}, {name: [] for name in contestants}
    for name, call in contestants.items():
        results[name] = once(call)  # compiles
        gradients[name] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    pgcompile.reset_stats()
    for _ in range(REPEATS):
        for name, call in contestants.items():  # in turns, so that both meet the same noise
            started = time.perf_counter()
            once(call)
            seconds[name].append(time.perf_counter() - started)
    report({n: statistics.median(s) for n, s in seconds.items()}, pgcompile.stats(), REPEATS)
    difference = (results["pgcompile"] - results["inductor"]).abs().max() / results["inductor"].abs().max()
    print(f"Largest difference of the results, relative: {difference:.1e}")
    if gradients["inductor"]:
        pairs = zip(gradients["pgcompile"], gradients["inductor"], strict=True)
        difference = max((a - b).norm() / b.norm() for a, b in pairs)
        print(f"Largest difference of a parameter's gradient, relative (L2): {difference:.1e}")


def report(seconds, stats, calls):
    """Tokens and times as a table."""
    table = Table("", "inductor", "pgcompile")
    table.add_row("tokens of a batch", f"{stats.dense_tokens // calls:,}", f"{stats.dense_tokens // calls:,}")
    table.add_row("  of them not padding", "", f"{stats.valid_tokens // calls:,}")
    table.add_row("  of them distinct, computed", "", f"{stats.packed_tokens // calls:,}")
    table.add_row("seconds, median", *(f"{seconds[name]:.2f}" for name in ("inductor", "pgcompile")))
    Console().print(table)
    print(f"{seconds['inductor'] / seconds['pgcompile']:.1f} times faster")
