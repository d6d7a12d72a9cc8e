"""Fourteen transformers models, unchanged: packed, exact to float64, one token per distinct prefix."""

import copy
import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import pgcompile
from harness import (
    BACKEND,
    assert_no_worse_than_eager,
    assert_same,
    brute_force_packed_tokens,
    compiled,
    float64_everywhere,
    random_tree_batch,
)

pytest.importorskip("transformers")
from tiny_hf import CONFIGS, POSITIONS_FROM_MASK, VOCAB, build, install_capturing_hooks

NAMES = list(CONFIGS)
SOME = ["llama", "gpt2", "opt"]  # rotary, learned positions, positions counted from the mask
BATCHES = {
    "none": dict(rows=4, positions=10, padding="none"),  # as many rows as heads
    "right": dict(rows=7, positions=11, padding="right", prefixes=2),
    "left": dict(rows=7, positions=11, padding="left", prefixes=2),
}


def batch_of(padding):
    return random_tree_batch(**BATCHES[padding], vocab=VOCAB, seed=5)


def shifted_labels(batch):
    """The ids, -100 where padded, and for a row's first token: left-padded, it would be predicted by padding,
    which transformers then counts and which therefore has to be kept."""
    if batch.attention_mask is None:
        return batch.input_ids
    predicted = batch.kept.clone()
    predicted[:, 1:] &= batch.kept[:, :-1]
    return batch.input_ids.masked_fill(~predicted, -100)


def counted_positions(batch):
    return (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)


def key_columns(name, batch, positions=None):
    columns = [batch.input_ids]
    if batch.attention_mask is not None:
        columns.append(batch.attention_mask)
    if positions is not None:
        columns.append(positions)
    elif name not in POSITIONS_FROM_MASK:
        columns.append(batch.dense_positions)
    return columns


def assert_packs(name, batch, kwargs, *, model=None, columns=None, **details):
    with float64_everywhere():
        report = assert_same(
            model or build(name),
            (),
            kwargs,
            kept=batch.kept,
            fullgraph=True,
            expect_status="packed",
            **details,
        )
    if BACKEND == "pgcompile":
        columns = columns or key_columns(name, batch)
        assert report.stats.packed_tokens == brute_force_packed_tokens(columns, batch.kept)
        assert report.stats.packed_tokens < report.stats.dense_tokens == batch.input_ids.numel()
    return report


@pytest.mark.parametrize("padding", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_with_labels(name, padding):
    batch = batch_of(padding)
    report = assert_packs(name, batch, batch.inputs | {"labels": shifted_labels(batch), "use_cache": False})
    assert "out.loss" in report.eager.outputs


@pytest.mark.parametrize("padding", BATCHES)
@pytest.mark.parametrize("name", SOME)
def test_forward_and_backward_without_labels(name, padding):
    batch = batch_of(padding)
    assert_packs(name, batch, batch.inputs | {"use_cache": False})


@pytest.mark.parametrize("name", NAMES)
def test_cache_left_at_its_default(name):
    batch = batch_of("right")
    assert_packs(name, batch, batch.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_all_ones_mask(name):
    """What tokenizers give for equal lengths: nothing is padded, but the graph has a bool mask."""
    batch = batch_of("none")
    mask = torch.ones_like(batch.input_ids)
    assert_packs(name, batch, batch.inputs | {"attention_mask": mask, "use_cache": False})


@pytest.mark.parametrize("name", NAMES)
def test_position_ids_given(name):
    """Counted from the first token, left padding doesn't keep rows from sharing."""
    batch = batch_of("left")
    kwargs = batch.inputs | {"position_ids": counted_positions(batch), "use_cache": False}
    assert_packs(name, batch, kwargs, columns=key_columns(name, batch, counted_positions(batch)))


@pytest.mark.parametrize("name", SOME)
def test_hidden_states(name):
    batch = batch_of("right")
    kwargs = batch.inputs | {"output_hidden_states": True, "use_cache": False}
    report = assert_packs(name, batch, kwargs, model=install_capturing_hooks(build(name)))
    assert "out.hidden_states[0]" in report.eager.outputs


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("keep", [1, 4])
def test_logits_to_keep(name, keep):
    batch = batch_of("left")  # the last columns are tokens
    with float64_everywhere():
        assert_same(
            build(name),
            (),
            batch.inputs | {"logits_to_keep": keep, "use_cache": False},
            kept=batch.kept[:, -keep:],
            fullgraph=True,
            expect_status="packed",
        )


@pytest.mark.parametrize("name", SOME)
def test_inputs_embeds(name):
    """Embeddings of the model's own table. As an input without gradient they are data, and compared."""
    batch = batch_of("none")
    model = build(name)
    embeds = model.get_input_embeddings()(batch.input_ids).detach()
    with float64_everywhere():
        assert_same(model, (), {"inputs_embeds": embeds, "use_cache": False}, fullgraph=True)


@pytest.mark.parametrize("name", SOME)
def test_inputs_embeds_with_gradient(name):
    """Equal values, but each position's gradient is its own."""
    batch = batch_of("none")
    model = build(name)
    embeds = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    with float64_everywhere():
        report = assert_same(model, (), {"inputs_embeds": embeds, "use_cache": False}, fullgraph=True)
    assert report.compiled.gradients["input1"].count_nonzero() > 0


@pytest.mark.parametrize("masked", ["causal", "causal_and_padding", "window", "everything", "one_future_key"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_square_mask_from_the_caller(name, masked):
    """It is data: packed where it says causal (and padding or a window), the original for that call otherwise."""
    batch = batch_of("right" if masked == "causal_and_padding" else "none")
    rows, positions = batch.input_ids.shape
    index = torch.arange(positions)
    allowed = (index[:, None] >= index).expand(rows, 1, positions, positions).clone()
    if masked == "causal_and_padding":
        allowed &= batch.attention_mask[:, None, None].bool()
    elif masked == "window":
        allowed &= index[:, None] - index < 4
    elif masked == "everything":
        allowed[:] = True
    elif masked == "one_future_key":
        allowed[1, 0, 2, 5] = True
    additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(
        ~allowed, torch.finfo(torch.float64).min
    )
    packs = masked in ("causal", "causal_and_padding")
    refused = masked in ("everything", "one_future_key")
    with float64_everywhere():
        report = assert_same(
            build(name),
            (),
            {"input_ids": batch.input_ids, "attention_mask": additive, "use_cache": False},
            kept=batch.kept,
            fullgraph=True,
            expect_status="packed" if packs else None,
        )
    if BACKEND == "pgcompile" and refused:
        assert report.stats.packed == 0


@pytest.mark.parametrize("name", SOME)
def test_labels_that_count_padding(name):
    """labels=input_ids counts pads in the loss: they may not be dropped."""
    batch = batch_of("right")
    kwargs = batch.inputs | {"labels": batch.input_ids, "use_cache": False}
    with float64_everywhere():
        assert_same(build(name), (), kwargs, kept=batch.kept, fullgraph=True)


@pytest.mark.parametrize("name", SOME)
def test_holes_in_the_mask(name):
    batch = random_tree_batch(rows=7, positions=12, vocab=VOCAB, padding="right", holes=5, seed=2)
    assert_packs(name, batch, batch.inputs | {"use_cache": False})


@pytest.mark.parametrize("name", SOME)
def test_partly_frozen(name):
    model = build(name)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    batch = batch_of("right")
    assert_packs(
        name, batch, batch.inputs | {"labels": shifted_labels(batch), "use_cache": False}, model=model
    )


@pytest.mark.parametrize("name", SOME)
def test_dynamic_shapes(name):
    batch = batch_of("right")
    assert_packs(name, batch, batch.inputs | {"use_cache": False}, dynamic=True)


def test_active_dropout_is_not_packed():
    batch = batch_of("none")
    report_model = build("llama", attention_dropout=0.2)
    report = assert_same(report_model, (), batch.inputs | {"use_cache": False}, tol=1e-6, gradient_tol=1e-5)
    if BACKEND == "pgcompile":
        assert report.stats.packed == 0
    with torch.no_grad():
        assert_packs(
            "llama", batch, batch.inputs | {"use_cache": False}, model=report_model.eval(), backward=False
        )


def dtypes_in_graphs(call, kwargs):
    """The dtypes of every tensor in the graphs that a backend receives."""
    seen = set()

    def record(graph, example_inputs):
        values = (node.meta.get("example_value") for node in graph.graph.nodes)
        seen.update(value.dtype for value in values if isinstance(value, torch.Tensor))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(call, backend=record, fullgraph=True)(**kwargs)
    return seen


# Gemma 2 unpromoted: its mask has the lowest float64, of which its softmax in float32 makes -inf, and NaN.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "gemma2"])
def test_float64_everywhere_really_promotes(name):
    """Casts to float32 cost seven digits; under the promotion neither eager nor the traced graph has any."""
    model = build(name)
    batch = batch_of("right")
    kwargs = batch.inputs | {"labels": shifted_labels(batch), "use_cache": False}
    with float64_everywhere():
        promoted = model(**kwargs)
        assert torch.float32 not in dtypes_in_graphs(model, kwargs)
    plain = model(**kwargs)
    assert promoted.loss.dtype == torch.float64
    assert plain.loss.dtype == torch.float32
    assert torch.float32 in dtypes_in_graphs(model, kwargs)
    assert 1e-10 < (promoted.loss - plain.loss).abs().item() < 1e-5


@pytest.mark.parametrize("where", ["around the compiled model", "inside of the compiled function"])
def test_autocast(where):
    """bfloat16 autocast, the cache left at its default."""
    model = build("llama").float()
    truth_model = copy.deepcopy(model).double()

    def forward(m, inputs):
        if where.startswith("around"):
            return m(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            return m(**inputs).logits

    fast = compiled(functools.partial(forward, model))

    def tensors(side, seed):
        batch = random_tree_batch(**BATCHES["right"], vocab=VOCAB, seed=seed)
        owner = truth_model if side == "truth" else model
        owner.zero_grad(set_to_none=True)
        if side == "truth":
            with float64_everywhere():
                logits = truth_model(**batch.inputs).logits
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=where.startswith("around")):
                logits = fast(batch.inputs) if side == "compiled" else forward(model, batch.inputs)
        logits = logits * batch.kept[..., None]
        logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[..., 3].sum().backward()
        return {"logits": logits.detach()} | {n: p.grad for n, p in owner.named_parameters()}

    if BACKEND == "pgcompile":
        pgcompile.reset_stats()
    assert_no_worse_than_eager(tensors, torch.finfo(torch.bfloat16).eps)
    if BACKEND == "pgcompile":
        assert (pgcompile.stats().packed, pgcompile.stats().dense, pgcompile.stats().eager) == (5, 0, 0)


CHECKED_IN_A_FRESH_PROCESS = """
    import sys

    sys.path.insert(0, {tests!r})
    import copy
    import pgcompile
    from tiny_hf import build
    from test_models_hf import random_tree_batch, VOCAB

    def logprobs(model, ids):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)

    model = build("qwen3", num_hidden_layers=1).float()
    eager, ids = copy.deepcopy(model), random_tree_batch(rows=16, positions=70, vocab=VOCAB).input_ids
    fast = pgcompile.optimize(min_saving=0, check=int(sys.argv[1]))(logprobs)
    for call, owner in ((fast, model), (logprobs, eager)):
        call(owner, ids).sum().backward()
    pairs = zip(model.parameters(), eager.parameters())
    print(max(((a.grad - b.grad).norm() / b.grad.norm().clamp(min=1e-3)).item() for a, b in pairs))
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "pgcompile", reason="checks pgcompile against eager")
def test_check_after_a_run_without_it(tmp_path):
    """Kernels in inductor's cache may overwrite what backward reads; `check` needs it twice."""
    code = textwrap.dedent(CHECKED_IN_A_FRESH_PROCESS.format(tests=os.path.dirname(__file__)))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for check in ("0", "1"):
        command = [sys.executable, "-c", code, check]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 1e-4, f"check={check}: {done.stdout}"


def test_packed_llama_is_eager_to_twelve_digits():
    batch = batch_of("left")
    report = assert_packs("llama", batch, batch.inputs | {"use_cache": False}, tol=1e-12)
    assert report.compiled.outputs["out.logits"].dtype == torch.float64


def test_the_promotion_ends_with_its_context():
    with float64_everywhere():
        pass
    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float32
    fast = compiled(lambda x: x.float() + 1, fullgraph=True)
    assert fast(torch.ones(2, dtype=torch.float64)).dtype == torch.float32
