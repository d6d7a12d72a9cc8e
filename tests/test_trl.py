"""TRL's trainers with and without pgcompile: the same losses, gradient norms and weights after 20 steps, in float64."""

import json
import os
import subprocess
import sys

import pytest
import torch

from harness import BACKEND

os.environ["HF_HUB_OFFLINE"] = "1"
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

if BACKEND != "pgcompile":
    pytest.skip("compares pgcompile with eager", allow_module_level=True)

import pgcompile  # noqa: E402
from pgcompile.integrations.trl import group_preserving, regroup  # noqa: E402

STEPS = 20
GROUP = 4
INSTRUCTIONS = "Add the two numbers, and say what they make. "


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet
    )
    raw.train_from_iterator(["some text"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    pgcompile.reset_stats()


def build(tokenizer, kind=GPT2LMHeadModel):
    """A GPT-2: in float64 it casts nothing to float32."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1,
    )  # fmt: skip
    model = kind(config).double()
    model.loss_type = "ForCausalLM"
    return model


def questions(count):
    return [f"{a} + {a * 7 % 13}: {INSTRUCTIONS}" for a in range(count)]


def pairs(count):
    return [
        {"prompt": q, "chosen": str(i * 5 % 21), "rejected": str(i * 3 % 17) + "?"}
        for i, q in enumerate(questions(count))
    ]


def reward(completions, **_):
    """Any function of the text."""
    return [sum(map(ord, text)) % 17 / 17 for text in completions]


def train(trainer_class, config_class, model, tmp_path, options=None, steps=STEPS, arguments=None, **config):
    if options is not None:
        model.compile(backend="pgcompile", options={"inner": "eager", **options})
    settings = dict(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=1,
        learning_rate=1e-3, logging_steps=1, report_to=[], save_strategy="no", seed=0, use_cpu=True, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(model=model, args=config_class(**{**settings, **config}), **arguments)
    trainer.train()
    log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    return log, [p.detach().clone() for p in model.parameters()], trainer


def run_of(name, tokenizer):
    """TRL's trainer of a name, its config class, settings and arguments, and the kind of its model."""
    trainer_class, config_class = (getattr(trl, name + part) for part in ("Trainer", "Config"))
    kind, config = GPT2LMHeadModel, {}
    arguments = dict(processing_class=tokenizer)
    if name in ("GRPO", "RLOO"):
        # TRL's defaults: activation checkpointing, switched off to generate; a fused head behind a graph break.
        trainer_class = group_preserving(trainer_class)
        rows = [{"prompt": q} for q in questions(24)]
        arguments["reward_funcs"] = reward
        config = dict(
            per_device_train_batch_size=4, gradient_accumulation_steps=4, num_generations=GROUP,
            max_completion_length=8, beta=0.0,
        )  # fmt: skip
    elif name == "KTO":
        rows = [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for pair in pairs(12)
            for side in ("chosen", "rejected")
        ]
    elif name == "SFT":
        rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs(24)]
    else:
        rows = pairs(24)
    if name in ("DPO", "KTO"):
        arguments["ref_model"] = build(tokenizer)
    if name == "Reward":
        kind = GPT2ForSequenceClassification
    arguments["train_dataset"] = Dataset.from_list(rows)
    return trainer_class, config_class, kind, arguments, config


def with_rows_permuted(trainer_class, pairs, seed):
    """The trainer, each batch in another order of rows: what rounding alone makes of a training.

    The first half of the rows of `pairs` are the chosen answers, the second the rejected ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def compute_loss(self, model, inputs, *args, **kwargs):
        count = len(inputs["completion_ids" if "completion_ids" in inputs else "input_ids"])
        order = torch.randperm(count // (1 + pairs), generator=generator)
        if pairs:
            order = torch.cat([order, order + len(order)])
        given = {}
        for key, value in inputs.items():
            if isinstance(value, list):
                value = [value[row] for row in order]
            elif isinstance(value, torch.Tensor) and value.ndim:
                value = value[order]
            given[key] = value
        return trainer_class.compute_loss(self, model, given, *args, **kwargs)

    return type(trainer_class.__name__, (trainer_class,), {"compute_loss": compute_loss})


def train_named(name, tokenizer, tmp_path, options=None, dtype=torch.float64, permuted=None):
    """Train as `run_of` says, from one seed; with `options`, the model and its reference through pgcompile."""
    trainer_class, config_class, kind, arguments, config = run_of(name, tokenizer)
    torch.manual_seed(1)
    pgcompile.reset_stats()
    if "ref_model" in arguments:
        arguments["ref_model"].to(dtype)
        if options is not None:
            arguments["ref_model"].compile(backend="pgcompile", options={"inner": "eager"})
    if dtype == torch.float32:
        # Adam makes whole steps of gradients that are rounding alone (those of key biases): nothing else would be seen.
        config["adam_epsilon"] = 1e-5
    model = build(tokenizer, kind).to(dtype)
    if permuted is not None:
        trainer_class = with_rows_permuted(trainer_class, name in ("DPO", "Reward"), permuted)
    log, weights, _ = train(
        trainer_class, config_class, model, tmp_path, options, arguments=arguments, **config
    )
    assert len(log) == STEPS
    stats = pgcompile.stats()
    if options is not None:
        assert stats.packed >= STEPS and stats.eager == 0 and stats.recompile_limit_hits == 0, str(stats)
    return log, weights, stats


# The trainer, its options, and the share of the dense tokens that are computed at most.
TRAINERS = [
    ("GRPO", {}, 0.5),
    ("RLOO", {}, 0.5),
    ("DPO", {}, 0.7),
    ("KTO", {}, 1),
    ("SFT", {"min_saving": 0}, 1),
    ("Reward", {}, 1),
]


@pytest.mark.parametrize("name, options, share", TRAINERS)
def test_trains_alike(name, options, share, tokenizer, tmp_path):
    """From one seed every loss, gradient norm and weight agrees, and what ran was packed."""
    expected_log, expected, _ = train_named(name, tokenizer, tmp_path)
    actual_log, actual, stats = train_named(name, tokenizer, tmp_path, options)
    torch.testing.assert_close(torch.tensor(actual_log), torch.tensor(expected_log), rtol=1e-8, atol=1e-8)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
    assert stats.packed_tokens < share * stats.dense_tokens


@pytest.mark.parametrize(
    "name, options, share",
    [row if row[0] == "GRPO" else pytest.param(*row, marks=pytest.mark.slow) for row in TRAINERS],
)
def test_float32_drift(name, options, share, tokenizer, tmp_path):
    """After 20 steps weights are no further from eager's than twice what another order of rows makes."""

    def weights(options=None, permuted=None):
        _, found, _ = train_named(name, tokenizer, tmp_path, options, torch.float32, permuted)
        return torch.cat([weight.flatten() for weight in found])

    expected = weights()
    drifts = [(weights(permuted=seed) - expected).norm() for seed in (1, 2, 3)]
    found = (weights(options) - expected).norm()
    assert 0 < found <= 2 * max(drifts)


def test_sft_with_documents_in_one_row(tokenizer, tmp_path):
    """They share nothing with each other; the run is the same, and says why it isn't packed."""
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs(24)]
    arguments = dict(train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    settings = dict(steps=3, arguments=arguments, packing=True, max_length=64)
    weights = [
        train(trl.SFTTrainer, trl.SFTConfig, build(tokenizer), tmp_path, options, **settings)[1]
        for options in (None, {})
    ]
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    ids = torch.randint(2, 200, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    explanation = pgcompile.explain(build(tokenizer), input_ids=ids, position_ids=positions, use_cache=False)
    kinds = {r.kind for graph in explanation.graphs for r in graph.fallbacks}
    assert kinds == {"mask_not_understood"} or [b.decision for b in explanation.batches] == ["dense"]


def packed_tokens(trainer_class, tokenizer, tmp_path):
    data = Dataset.from_list([{"prompt": q} for q in questions(64)])
    arguments = dict(reward_funcs=reward, train_dataset=data, processing_class=tokenizer)
    pgcompile.reset_stats()
    torch.manual_seed(1)
    train(
        trainer_class, trl.GRPOConfig, build(tokenizer), tmp_path, {"min_saving": 0}, steps=1, arguments=arguments,
        per_device_train_batch_size=16, gradient_accumulation_steps=4, num_generations=GROUP,
        max_completion_length=4,
    )  # fmt: skip
    return pgcompile.stats()


def test_groups_stay_together(tokenizer, tmp_path):
    """The same rows in other micro-batches: each prompt is computed once, and not in every micro-batch."""
    shuffled = packed_tokens(trl.GRPOTrainer, tokenizer, tmp_path)
    kept = packed_tokens(group_preserving(trl.GRPOTrainer), tokenizer, tmp_path)
    assert kept.dense_tokens == shuffled.dense_tokens
    assert kept.packed_tokens < 0.6 * shuffled.packed_tokens


RUN = """
import sys, trl
from test_trl import *

tokenizer = tokenizer.__wrapped__()
train(
    trl.GRPOTrainer, trl.GRPOConfig, build(tokenizer), sys.argv[1], steps=2,
    arguments=dict(
        reward_funcs=reward, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": q} for q in questions(64)]),
    ),
    per_device_train_batch_size=16, gradient_accumulation_steps=4, num_generations=GROUP, max_completion_length=4,
)
"""


def test_without_a_line(tmp_path):
    """`pgcompile run`: the trainer's model is packed, and the micro-batches keep their groups."""
    script, report = tmp_path / "train.py", tmp_path / "report.json"
    script.write_text(RUN)
    command = [
        "pgcompile",
        "run",
        "--options",
        "inner=eager",
        "--options",
        "min_saving=0",
        "--report",
        report,
    ]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-m", *command, script, tmp_path], env=environment, check=True)
    (model,) = json.loads(report.read_text())["models"]
    assert model["model"] == "GPT2LMHeadModel" and model["decisions"] == {"packed": 8}
    assert model["graphs"] == ["packed"] and model["reasons"] == []
    assert model["packed_tokens"] < 0.3 * model["dense_tokens"]


def test_regrouping_keeps_rows_whole():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(9, (8, 6), generator=generator).repeat_interleave(4, 0)
    rows = torch.randperm(32, generator=generator)
    whole = {
        "prompt_ids": prompts[rows], "prompt_mask": torch.ones(32, 6), "num_items_in_batch": torch.tensor(7),
        "completion_ids": torch.arange(32)[:, None][rows], "completion_mask": torch.ones(32, 1),
        "advantages": rows * 0.5, "images": [f"image {n}" for n in rows.tolist()], "tool_mask": None,
    }  # fmt: skip
    chunks = trl.trainer.utils.split_tensor_dict(whole, 4)
    state = torch.get_rng_state()
    found = regroup(chunks, (0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert [len(chunk["advantages"]) for chunk in found] == [8] * 4
    assert torch.cat([chunk["completion_ids"] for chunk in found]).flatten().sort().values.tolist() == list(
        range(32)
    )
    for chunk in found:
        n = chunk["completion_ids"].flatten()
        assert torch.equal(chunk["prompt_ids"], prompts[n])
        assert torch.equal(chunk["advantages"], n * 0.5)
        assert chunk["images"] == [f"image {i}" for i in n.tolist()]
        assert chunk["num_items_in_batch"] == 7 and chunk["tool_mask"] is None
        assert len({i // 4 for i in n.tolist()}) == 2  # two groups, whole
    again, other = regroup(chunks, (0, 1)), regroup(chunks, (0, 2))
    assert torch.equal(again[0]["advantages"], found[0]["advantages"])
    assert not torch.equal(
        torch.cat([c["advantages"] for c in other]), torch.cat([c["advantages"] for c in found])
    )
    tiles = [{**chunk, "pixel_values": torch.zeros(3, 2)} for chunk in chunks]
    assert regroup(tiles, 0) == tiles


def test_other_trainers_are_refused():
    with pytest.raises(TypeError, match="GRPOTrainer or RLOOTrainer, not SFTTrainer"):
        group_preserving(trl.SFTTrainer)
