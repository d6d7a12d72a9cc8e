"""TRL's GRPOTrainer, as it is, compiled with pgcompile, and with groups kept together.

The same training three times, from one seed. TRL shuffles a generation batch before it cuts micro-batches, so that the
answers to a prompt are computed in several of them; `group_preserving` cuts where groups end.
"""

import statistics
import tempfile
import warnings

from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.table import Table
from side_by_side import small_qwen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

import pgcompile
from pgcompile.integrations.trl import group_preserving

STEPS, PROMPTS, GROUP, MICROBATCHES = 6, 8, 8, 4
EXAMPLES = " ".join(f"{a} + {b} = {a + b}." for a in range(10, 30, 3) for b in range(11, 20, 3))


def byte_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def reward(completions, **_):
    """How much of the answer is digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def train(trainer_class, tokenizer, is_compiled):
    """Rewards and losses of all steps, seconds of a step, and what was computed."""
    model = small_qwen(len(tokenizer))
    model.compile(backend="pgcompile" if is_compiled else "inductor")
    data = Dataset.from_list([{"prompt": f"{EXAMPLES} {a} + {2 * a} = "} for a in range(10, 74)])
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=STEPS, per_device_train_batch_size=PROMPTS * GROUP // MICROBATCHES,
        gradient_accumulation_steps=MICROBATCHES, num_generations=GROUP, max_completion_length=6, learning_rate=3e-4,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, bf16=False, seed=0,
    )  # fmt: skip
    pgcompile.reset_stats()
    trainer = trainer_class(
        model=model, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    trainer.remove_callback(
        next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__)
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    steps = statistics.median(entry["step_time"] for entry in log[STEPS // 2 :])  # compiled by then
    return [entry["reward"] for entry in log], steps, pgcompile.stats()


warnings.simplefilter("ignore")
logging.set_verbosity_error()
disable_progress_bars()
tokenizer = byte_tokenizer()
table = Table("", "tokens", "computed", "seconds a step", "reward, first → last step")
runs = {
    "TRL, through inductor": (GRPOTrainer, False),
    "through pgcompile": (GRPOTrainer, True),
    "groups kept together": (group_preserving(GRPOTrainer), True),
}
for name, (trainer_class, is_compiled) in runs.items():
    rewards, seconds, stats = train(trainer_class, tokenizer, is_compiled)
    tokens = [f"{n:,}" for n in (stats.dense_tokens, stats.packed_tokens)] if is_compiled else ["", "all"]
    table.add_row(name, *tokens, f"{seconds:.2f}", f"{rewards[0]:.3f} → {rewards[-1]:.3f}")
Console().print(table)
