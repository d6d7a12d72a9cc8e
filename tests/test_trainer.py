"""transformers' Trainer with a model that was compiled in place: the same training."""

import pytest
import torch

from harness import BACKEND
from tiny_hf import VOCAB, build

pytest.importorskip("accelerate")
if BACKEND != "pgcompile":
    pytest.skip("compares pgcompile with eager", allow_module_level=True)

from transformers import Trainer, TrainingArguments

import pgcompile

STEPS = 20
ROWS, POSITIONS, PROMPT = 8, 24, 16


class Rows(torch.utils.data.Dataset):
    """Batches of eight answers to one prompt, of several lengths; `reverse` turns each batch around."""

    def __init__(self, reverse=False):
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(1, VOCAB, (12, 1, PROMPT), generator=generator).expand(-1, ROWS, -1)
        answers = torch.randint(1, VOCAB, (12, ROWS, POSITIONS - PROMPT), generator=generator)
        lengths = torch.randint(PROMPT + 2, POSITIONS + 1, (12, ROWS, 1), generator=generator)
        self.mask = (torch.arange(POSITIONS) < lengths).long()
        self.ids = torch.cat([prompts, answers], 2) * self.mask
        if reverse:
            self.ids, self.mask = self.ids.flip(1), self.mask.flip(1)

    def __len__(self):
        return 12 * ROWS

    def __getitem__(self, n):
        ids, mask = self.ids.flatten(0, 1)[n], self.mask.flatten(0, 1)[n]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(tmp_path, compiled, dtype, reverse=False, name="gpt2", **arguments):
    torch._dynamo.reset()
    pgcompile.reset_stats()
    model = build(name).to(dtype)
    if compiled:
        model.compile(backend="pgcompile", options={"inner": "eager", "strict": True})
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=1e-3,
        logging_steps=1, report_to=[], save_strategy="no", seed=0, use_cpu=True, disable_tqdm=True, **arguments,
    )  # fmt: skip
    trainer = InOrder(model=model, args=settings, train_dataset=Rows(reverse))
    trainer.train()
    log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == STEPS
    return torch.tensor(log), {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 3}, {"gradient_checkpointing": True}],
    ids=["plain", "accumulated", "checkpointed"],
)
def test_float64(arguments, tmp_path):
    """transformers' own loss is float32, and so are the logged numbers."""
    expected_log, expected = train(tmp_path, False, torch.float64, **arguments)
    log, weights = train(tmp_path, True, torch.float64, **arguments)
    stats = pgcompile.stats()
    assert stats.packed == STEPS * arguments.get("gradient_accumulation_steps", 1)
    assert stats.packed_tokens < 0.5 * stats.dense_tokens and stats.recompile_limit_hits == 0
    torch.testing.assert_close(log, expected_log, rtol=1e-6, atol=1e-6)
    for n, weight in weights.items():
        torch.testing.assert_close(weight, expected[n], rtol=0, atol=1e-6, msg=n)


def distance(found, expected):
    return sum((found[n] - expected[n]).double().square().sum().item() for n in expected) ** 0.5


def test_float32(tmp_path):
    """No further from eager than twice what turning its batches around makes."""
    _, expected = train(tmp_path, False, torch.float32)
    _, turned = train(tmp_path, False, torch.float32, reverse=True)
    _, weights = train(tmp_path, True, torch.float32)
    assert pgcompile.stats().packed == STEPS
    assert 0 < distance(weights, expected) <= 2 * distance(turned, expected)


def test_autocast(tmp_path):
    """No further from float64 than eager under autocast is, by more than half."""
    _, truth = train(tmp_path, False, torch.float64)
    _, expected = train(tmp_path, False, torch.float32, bf16=True)
    _, weights = train(tmp_path, True, torch.float32, bf16=True)
    assert pgcompile.stats().packed == STEPS
    assert 0 < distance(weights, truth) <= 1.5 * distance(expected, truth)


def test_the_flag_of_training_arguments():
    """accelerate has a closed list of backends; `model.compile` is the line that replaces the flag."""
    arguments = TrainingArguments(output_dir="unused", torch_compile_backend="pgcompile", use_cpu=True)
    with pytest.raises(ValueError, match="PGCOMPILE"):
        Trainer(model=build("gpt2"), args=arguments)
