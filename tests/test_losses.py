"""Log-probabilities and losses in the spellings of trainers: exact, and packed to the end.

Each is compiled together with the model. Values and gradients are eager's, and no value of a vocabulary's width exists
for more than the distinct tokens.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from harness import BACKEND, assert_same, float64_everywhere, random_tree_batch, rewire

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForSequenceClassification

from pgcompile import backend
from pgcompile.coverage.batch import bench_batch
from pgcompile.coverage.tiny_models import build as build_tiny
from tiny_hf import CONFIGS, TOKENS, VOCAB, build, install_capturing_hooks

TEMPERATURE = 0.7


# -- log-probabilities of the next tokens: logits [N, S-1, V], labels [N, S-1] → [N, S-1] ----------------------------


def log_softmax_and_gather(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def gather_minus_logsumexp(logits, labels):
    return logits.gather(-1, labels[..., None]).squeeze(-1) - logits.logsumexp(-1)


def with_temperature(logits, labels):
    return log_softmax_and_gather(logits / TEMPERATURE, labels)


def softcapped(logits, labels):
    return log_softmax_and_gather(30 * torch.tanh(logits / 30), labels)


def from_softmax(logits, labels):
    return F.softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).log().squeeze(-1)


def in_float32(logits, labels):
    return log_softmax_and_gather(logits.float(), labels)


def by_cross_entropy(logits, labels):
    return -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def by_flat_cross_entropy(logits, labels):
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    return -flat.view(labels.shape)


def by_nll_loss(logits, labels):
    return -F.nll_loss(F.log_softmax(logits, -1).flatten(0, 1), labels.flatten(), reduction="none").view(
        labels.shape
    )


def rows_of_logsumexp(logits, labels):
    """TRL's selective_log_softmax in float32."""
    chosen = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


def rows_of_log_softmax(logits, labels):
    """TRL's selective_log_softmax in half precision."""
    rows = []
    for row, label in zip(logits, labels, strict=True):
        rows.append(F.log_softmax(row, dim=-1).gather(dim=-1, index=label.unsqueeze(-1)).squeeze(-1))
    return torch.stack(rows)


def by_distribution(logits, labels):
    return torch.distributions.Categorical(logits=logits, validate_args=False).log_prob(labels)


LOGPROBS = [
    log_softmax_and_gather, gather_minus_logsumexp, with_temperature, softcapped, from_softmax, in_float32,
    by_cross_entropy, by_flat_cross_entropy, by_nll_loss, rows_of_logsumexp, rows_of_log_softmax, by_distribution,
]  # fmt: skip


# -- other narrow values: logits [N, S-1, V] → [N, S-1] --------------------------------------------------------------


def entropy(logits):
    logps = F.log_softmax(logits, dim=-1)
    return -(logps.exp() * logps).sum(-1)


def entropy_from_logsumexp(logits):
    return torch.logsumexp(logits, dim=-1) - (F.softmax(logits, dim=-1) * logits).sum(-1)


def entropy_in_chunks(logits, chunk_size=16):
    """TRL's entropy_from_logits."""
    entropies = []
    for chunk in logits.reshape(-1, logits.shape[-1]).split(chunk_size, dim=0):
        logps = F.log_softmax(chunk, dim=-1)
        entropies.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(entropies, dim=0).reshape(logits.shape[:-1])


def confidence(logits):
    return logits.softmax(-1).amax(-1)


def top_two_margin(logits):
    top = logits.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


NARROW = [entropy, entropy_from_logsumexp, entropy_in_chunks, confidence, top_two_margin]


# -- losses: (model, batch, columns) → scalar or a dict --------------------------------------------------------------


def token_logprobs(model, ids, mask):
    return log_softmax_and_gather(
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1], ids[:, 1:]
    )


def masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def reinforce(model, ids, mask, columns):
    return -masked_mean(token_logprobs(model, ids, mask) * columns["advantages"][:, None], mask[:, 1:])


def ppo_clip(model, ids, mask, columns):
    logps = token_logprobs(model, ids, mask)
    ratio = torch.exp(logps - columns["old"])
    advantages = columns["token_advantages"]
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    clipped = masked_mean(((ratio - 1).abs() > 0.2).to(loss.dtype), mask[:, 1:])
    return {"loss": masked_mean(loss, mask[:, 1:]), "clipped": clipped}


def grpo(model, ids, mask, columns):
    """Per-sequence mean, then over sequences; the k3 estimator of the KL divergence; entropy on the side."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1] / TEMPERATURE
    logps = rows_of_logsumexp(logits, ids[:, 1:])
    with torch.no_grad():
        entropies = entropy_in_chunks(logits)
    ratio = torch.exp(logps - logps.detach())
    advantages = columns["advantages"][:, None]
    loss = -torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    behind = columns["reference"] - logps
    loss = loss + 0.04 * (torch.exp(behind) - behind - 1)
    answers = columns["answer_mask"] * mask[:, 1:]
    per_row = (loss * answers).sum(-1) / answers.sum(-1).clamp(min=1.0)
    return {"loss": per_row.mean(), "entropy": masked_mean(entropies, answers)}


def dpo(model, ids, mask, columns):
    """The first half of the rows is chosen, the second half rejected."""
    answers = columns["answer_mask"] * mask[:, 1:]
    per_row = (token_logprobs(model, ids, mask) * answers).sum(-1)
    chosen, rejected = per_row.chunk(2)
    reference = (columns["reference"] * answers).sum(-1)
    margin = (chosen - rejected) - (reference[: len(chosen)] - reference[len(chosen) :])
    return {"loss": -F.logsigmoid(0.1 * margin).mean(), "rewards": (0.1 * chosen).detach()}


def accuracy(model, ids, mask, columns):
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    correct = (logits.argmax(-1) == ids[:, 1:]) & mask[:, 1:].bool()
    return {"loss": masked_mean(entropy(logits), mask[:, 1:]), "accuracy": correct.sum() / mask[:, 1:].sum()}


def smoothed(model, ids, mask, columns):
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), label_smoothing=0.1)


def weighted(model, ids, mask, columns, reduction="mean"):
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    weight = torch.linspace(0.5, 2, VOCAB, dtype=torch.float64)
    return F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), weight=weight, reduction=reduction)


def hf_labels(model, ids, mask, columns):
    labels = ids.masked_fill(mask == 0, -100)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    return out.loss


def hf_labels_num_items(model, ids, mask, columns):
    labels = ids.masked_fill(mask == 0, -100)
    count = (labels[:, 1:] != -100).sum()
    return model(
        input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count, use_cache=False
    ).loss


def kept_logits(model, ids, mask, columns):
    """TRL: only the answers' logits are computed."""
    keep = 6
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep + 1, use_cache=False).logits[
        :, :-1
    ]
    logps = log_softmax_and_gather(logits, ids[:, -keep:])
    return -masked_mean(logps * columns["advantages"][:, None], mask[:, -keep:])


LOSSES = {
    "reinforce": reinforce, "ppo_clip": ppo_clip, "grpo": grpo, "dpo": dpo, "accuracy": accuracy,
    "smoothed": smoothed, "weighted": weighted, "weighted sum": functools.partial(weighted, reduction="sum"),
    "hf_labels": hf_labels, "hf_labels_num_items": hf_labels_num_items, "kept_logits": kept_logits,
}  # fmt: skip


# -- the test --------------------------------------------------------------------------------------------------------


class Widths(fx.Interpreter):
    """Runs a late graph and notes every value of tokens that has a vocabulary's width, inputs too."""

    found: list[str]

    def run_node(self, n):
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.dim() > 1 and VOCAB in result.shape:
            self.found.append(n.name)
        return result


@pytest.fixture
def late_widths(monkeypatch):
    """All values of a vocabulary's width behind the packed graph."""
    found = []
    original = backend.PackedCall._late

    def late(self, args, results, packed, plan):
        interpreter = Widths(self.graphs.late)
        interpreter.found = found
        graphs, self.graphs = self.graphs, _With(self.graphs, late=interpreter.run)
        try:
            return original(self, args, results, packed, plan)
        finally:
            self.graphs = graphs

    monkeypatch.setattr(backend.PackedCall, "_late", late)
    return found


class _With:
    def __init__(self, base, **changed):
        self.__dict__.update(vars(base), **changed)


def batch_of(seed=5):
    return random_tree_batch(rows=6, positions=12, padding="right", prefixes=1, vocab=VOCAB, seed=seed)


def columns_of(batch):
    n, s = batch.input_ids.shape
    generator = torch.Generator().manual_seed(3)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return {
        "advantages": draw(n),
        "token_advantages": draw(n, s - 1),
        "old": draw(n, s - 1) * 0.1 - math.log(VOCAB),
        "reference": draw(n, s - 1) * 0.1 - math.log(VOCAB),
        "answer_mask": (torch.arange(s - 1) >= 4).double().expand(n, s - 1).contiguous(),
    }


def assert_packs_to_the_end(function, *args, widths, model=None, dynamic=None):
    batch = batch_of()
    mask = batch.attention_mask
    with float64_everywhere():
        report = assert_same(
            function, (model or build("llama"), batch.input_ids, mask, *args), kept=batch.kept[:, 1:], fullgraph=True,
            dynamic=dynamic, expect_status="packed",
        )  # fmt: skip
    if BACKEND == "pgcompile":
        assert report.stats.packed_tokens < report.stats.valid_tokens
        assert widths == []


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", LOGPROBS, ids=lambda f: f.__name__)
def test_logprobs(spelling, dynamic, late_widths):
    def function(model, ids, mask):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return spelling(logits, ids[:, 1:])

    assert_packs_to_the_end(function, widths=late_widths, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", NARROW, ids=lambda f: f.__name__)
def test_narrow_values(spelling, dynamic, late_widths):
    def function(model, ids, mask):
        return spelling(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1])

    assert_packs_to_the_end(function, widths=late_widths, dynamic=dynamic)


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, late_widths):
    assert_packs_to_the_end(LOSSES[name], columns_of(batch_of()), widths=late_widths)


# -- two models, and heads that aren't a vocabulary ------------------------------------------------------------------


def distillation(models, ids, mask):
    """Kullback-Leibler divergence to a frozen model, both ways, over the whole vocabulary."""
    student, teacher = (log_probs_of(m, ids, mask) for m in models)
    forward = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    backward = (student.exp() * (student - teacher)).sum(-1)
    return masked_mean(forward, mask[:, 1:]) + masked_mean(backward, mask[:, 1:])


def log_probs_of(model, ids, mask):
    with torch.set_grad_enabled(next(model.parameters()).requires_grad):
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)


def of_given_labels(model, ids, mask, labels):
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return log_softmax_and_gather(logits, labels)


def test_labels_with_a_size_of_their_own(late_widths):
    """Cut by the caller, they have a size that Dynamo doesn't know to be one less than that of the ids."""
    labels = batch_of().input_ids[:, 1:].clone()
    assert_packs_to_the_end(of_given_labels, labels, widths=late_widths, dynamic=True)


def test_fewer_labels_than_tokens():
    """The first tokens' are looked up, as written."""
    batch = batch_of()
    with float64_everywhere():
        assert_same(
            of_given_labels, (build("llama"), batch.input_ids, batch.attention_mask, batch.input_ids[:, 1:6].clone()),
            kept=batch.kept[:, 1:6], fullgraph=True, dynamic=True, expect_status="packed",
        )  # fmt: skip


def test_labels_that_depend_on_tokens():
    """The greedy token where none is given: looked up as written."""

    def function(model, ids, mask):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        labels = torch.where(ids[:, 1:] % 2 == 0, ids[:, 1:], logits.argmax(-1))
        return log_softmax_and_gather(logits, labels)

    batch = batch_of()
    with float64_everywhere():
        assert_same(
            function, (build("llama"), batch.input_ids, batch.attention_mask), kept=batch.kept[:, 1:],
            fullgraph=True, expect_status="packed",
        )  # fmt: skip


def test_two_models(late_widths):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.models = nn.ModuleList([build("llama"), build("qwen2").requires_grad_(False)])

        def forward(self, ids, mask):
            return distillation(self.models, ids, mask)

    assert_packs_to_the_end(lambda model, ids, mask: model(ids, mask), model=Both(), widths=late_widths)


def with_value_head(model, ids, mask, head):
    """An actor-critic's loss: values of every token, and log-probabilities, from the same hidden states."""
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    values = head(hidden).squeeze(-1)[:, :-1]
    logps = log_softmax_and_gather(model.lm_head(hidden)[:, :-1], ids[:, 1:])
    advantages = (1.0 - values).detach()
    return masked_mean((values - 1.0) ** 2 - logps * advantages, mask[:, 1:])


def reward_at_the_last_token(model, ids, mask, head):
    """A reward model's pairwise loss: chosen and rejected rows."""
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    last = mask.sum(-1) - 1
    rewards = head(hidden)[torch.arange(ids.shape[0], device=ids.device), last].squeeze(-1)
    chosen, rejected = rewards.chunk(2)
    return {"loss": -F.logsigmoid(chosen - rejected).mean(), "rewards": rewards}


@pytest.mark.parametrize("function", [with_value_head, reward_at_the_last_token], ids=lambda f: f.__name__)
def test_heads(function, late_widths):
    torch.manual_seed(1)
    head = rewire(nn.Linear(32, 1))
    assert_packs_to_the_end(function, head, widths=late_widths)


def test_sequence_classification(late_widths):
    """transformers finds each row's last token that isn't padding by itself."""
    batch = batch_of()
    ids = batch.input_ids.clamp(min=1).masked_fill(~batch.kept, 0)
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, **TOKENS, **CONFIGS["llama"], num_labels=3)
    torch.manual_seed(0)
    model = rewire(AutoModelForSequenceClassification.from_config(config).train())
    inputs = {"input_ids": ids, "attention_mask": batch.attention_mask, "labels": torch.arange(6) % 3}
    with float64_everywhere():
        assert_same(model, (), inputs | {"use_cache": False}, fullgraph=True, expect_status="packed")


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "olmoe"])
def test_router_losses(model_type):
    """The auxiliary loss counts every token of the batch as often as before; with and without padding in it."""
    tiny = build_tiny(model_type)
    model = install_capturing_hooks(tiny.model.double().train())
    model.set_experts_implementation("batched_mm")
    batch = bench_batch(tiny.vocab_size)
    labels = batch.input_ids.masked_fill(~batch.kept, -100)
    for mask in (batch.attention_mask, torch.ones_like(batch.attention_mask)):
        inputs = {"input_ids": batch.input_ids, "attention_mask": mask, "labels": labels, "use_cache": False}
        with float64_everywhere():
            report = assert_same(
                model, (), inputs | {"output_router_logits": True}, kept=mask.bool(), fullgraph=True,
                expect_status="packed",
            )  # fmt: skip
        assert report.eager.outputs["out.aux_loss"] > 0
