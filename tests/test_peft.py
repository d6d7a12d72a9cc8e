"""PEFT's adapters on a packed model: the same loss and gradients, or a reason."""

import os
import subprocess
import sys

import pytest
import torch

from harness import BACKEND
from tiny_hf import build

os.environ["HF_HUB_OFFLINE"] = "1"
peft = pytest.importorskip("peft")
if BACKEND != "pgcompile":
    pytest.skip("compares pgcompile with eager", allow_module_level=True)

import pgcompile  # noqa: E402
from pgcompile.integrations.peft import trace_dora  # noqa: E402

PROJECTIONS = ["q_proj", "v_proj", "up_proj"]


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **options})


def batch():
    """Six rows with one prompt, right-padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30, (6, 20), generator=generator)
    ids[:, :14] = ids[0, :14].clone()
    mask = torch.ones_like(ids)
    mask[::2, -2:] = 0
    return dict(input_ids=ids, attention_mask=mask)


def adapted(config, base="gpt2"):
    """With noise on what is trained: adapters begin at zero."""
    torch.manual_seed(0)
    model = peft.get_peft_model(build(base), config).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def step(call, model, **inputs):
    """A loss in float64 (transformers' own casts to float32), and gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    ids, mask = batch().values()
    logits = call(**batch(), **inputs).logits[:, -ids.shape[1] :]
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    loss = -(logprobs * mask[:, 1:]).sum() / mask[:, 1:].sum()
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def distinct_tokens():
    ids, mask = batch().values()
    return len({tuple(row[: s + 1]) for row, n in zip(ids.tolist(), mask.sum(1).tolist()) for s in range(n)})


def assert_as_eager(model, tolerance=1e-9, options=None, dynamic=None, **inputs):
    torch._dynamo.reset()
    pgcompile.reset_stats()
    expected, gradients = step(model, model, **inputs)
    fast = torch.compile(
        model,
        backend="pgcompile",
        dynamic=dynamic,
        options={"inner": "eager", "min_saving": 0, **(options or {})},
    )
    actual, found = step(fast, model, **inputs)
    assert abs(actual - expected) <= tolerance * abs(expected)
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name
    return pgcompile.stats()


def two_adapters(model):
    model.add_adapter("other", lora(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in model.named_parameters():
        if ".other." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.base_model.set_adapter(["default", "other"])
    return model


GPT2 = dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
PACKS = {
    "lora": lambda: adapted(lora(**GPT2)),
    "rank_stabilised_with_biases": lambda: adapted(lora(**GPT2, use_rslora=True, bias="all")),
    "embedding_and_head": lambda: adapted(lora(target_modules=["c_attn", "wte"], fan_in_fan_out=True)),
    "saved_modules": lambda: adapted(lora(**GPT2, modules_to_save=["ln_f"])),
    "scaled_activations": lambda: adapted(
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        )
    ),
    "two_adapters": lambda: two_adapters(adapted(lora(**GPT2))),
    "disabled": lambda: adapted(lora(**GPT2)).eval(),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKS)
def test_packs(name):
    stats = assert_as_eager(PACKS[name](), options={"strict": True})
    assert stats.packed == 1 and stats.packed_tokens == distinct_tokens()


@pytest.mark.parametrize("base", ["qwen3", "llama"])
def test_packs_others(base):
    """They cast to float32 in their norms."""
    assert assert_as_eager(adapted(lora(), base), 1e-5, options={"strict": True}).packed == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_virtual_tokens_are_a_shared_prefix(is_loaded, dynamic):
    """In an adapter that was loaded, too, PEFT's `inference_mode`: it repeats a parameter instead of looking it up."""
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", inference_mode=is_loaded)
    stats = assert_as_eager(adapted(config), options={"strict": True}, dynamic=dynamic)
    assert stats.packed == 1 and stats.packed_tokens == 5 + distinct_tokens()


def test_merged_and_unmerged():
    model = adapted(lora(**GPT2))
    whole = step(model, model)[0]
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        assert assert_as_eager(model).packed == 1
        assert abs(step(model, model)[0] - whole) <= 1e-9 * whole


def test_switching_adapters_takes_the_other_one():
    model = two_adapters(adapted(lora(**GPT2)))
    fast = torch.compile(model, backend="pgcompile", options={"inner": "eager", "min_saving": 0})
    losses = []
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        losses.append(step(fast, model)[0])
        assert abs(losses[-1] - step(model, model)[0]) <= 1e-9
    assert losses[0] == losses[2] != losses[1]


def test_dropout_follows_the_option():
    model = adapted(lora(**GPT2, lora_dropout=0.5))
    assert assert_as_eager(model).packed == 0
    kinds = {r.kind for g in pgcompile.explain(model, **batch()).graphs for r in g.fallbacks}
    assert kinds == {"randomness"}
    options = {"inner": "eager", "min_saving": 0, "dropout": "shared", "strict": True}
    logits = torch.compile(model, backend="pgcompile", options=options)(**batch()).logits.detach()
    assert torch.equal(logits[:, :14], logits[:1, :14].expand(6, -1, -1))  # one draw for each distinct token
    model.eval()
    assert assert_as_eager(model).packed == 1


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.PromptEncoderConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), "token_mixing"),
        (peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), "ambiguous_seed"),
    ],
    ids=["p_tuning", "prefix_tuning"],
)
def test_computed_virtual_tokens_run_as_written(config, kind):
    model = adapted(config, "qwen3")
    assert assert_as_eager(model).packed == 0
    assert kind in {r.kind for g in pgcompile.explain(model, **batch()).graphs for r in g.fallbacks}


def test_an_adapter_per_row_runs_as_written():
    model = two_adapters(adapted(lora(**GPT2))).eval()
    names = ["default", "other"] * 3
    assert assert_as_eager(model, adapter_names=names).packed == 0
    found = pgcompile.explain(model, **batch(), adapter_names=names)
    assert found.status == "eager" and "_mixed_batch_forward" in str(found)


def test_dora_by_itself_breaks_the_graph_and_stays_exact(monkeypatch):
    """Dynamo stops at PEFT's code for it; the parts between run packed without padding, or as written."""
    dora = peft.tuners.lora.dora
    monkeypatch.setattr(dora, "dequantize_module_weight", peft.utils.integrations.dequantize_module_weight)
    model = adapted(lora(use_dora=True), "qwen3")
    assert_as_eager(model, 1e-5)
    graphs = pgcompile.explain(model, **batch()).graphs
    assert len(graphs) > 1
    assert not {"internal_error", "trace_failed"} & {r.kind for g in graphs for r in g.fallbacks}


def test_dora_packs(monkeypatch):
    dora = peft.tuners.lora.dora
    monkeypatch.setattr(dora, "dequantize_module_weight", peft.utils.integrations.dequantize_module_weight)
    trace_dora()
    traceable = dora.dequantize_module_weight
    trace_dora()
    assert dora.dequantize_module_weight is traceable  # once is enough
    stats = assert_as_eager(adapted(lora(use_dora=True), "qwen3"), 1e-5, options={"strict": True})
    assert stats.packed == 1 and stats.eager == 0 and stats.packed_tokens == distinct_tokens()


def test_a_peft_that_has_no_such_function(monkeypatch):
    dora = peft.tuners.lora.dora
    monkeypatch.delattr(dora, "dequantize_module_weight")
    trace_dora()
    assert not hasattr(dora, "dequantize_module_weight")


def test_pgcompile_run_makes_dora_traceable(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "from peft.tuners.lora import dora\nprint(dora.dequantize_module_weight.is_traceable)\n"
    )
    command = [sys.executable, "-m", "pgcompile", "run", str(script)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"
