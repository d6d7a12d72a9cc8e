"""Biases of keys: their precision, and when they are masks."""

import pytest
import torch
from torch import nn

from harness import (
    BACKEND,
    compiled,
)
from small_models import BATCH, batch_of

if BACKEND != "pgcompile":
    pytest.skip("tests pgcompile's own behaviour", allow_module_level=True)

import pgcompile

pytestmark = pytest.mark.usefixtures("fresh")


class KeyBias(nn.Module):
    """One attention whose scores get `bias`, broadcast to [N, H, S, S], in float32."""

    def __init__(self, dtype=torch.float64, scale=0.3):
        super().__init__()
        self.scale = scale
        self.embed, self.head = nn.Embedding(31, 32, dtype=dtype), nn.Linear(32, 31, dtype=dtype)

    def forward(self, ids, bias):
        q = self.embed(ids).unflatten(-1, (4, 8)).transpose(1, 2)
        s = torch.arange(ids.shape[1])
        scores = (q @ q.mT * self.scale).to(torch.promote_types(q.dtype, torch.float32)) + bias
        weights = scores.masked_fill(s[:, None] < s, -torch.inf).softmax(-1)
        return self.head((weights.to(q.dtype) @ q).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_of_keys_is_not_rounded(dtype):
    """Numbers of which half precision knows every eighth or so: as errors they would be exponents."""
    model, ids = KeyBias(), batch_of().input_ids
    bias = torch.randn(1, 4, 1, ids.shape[1]) + 3000
    truth = model(ids, bias.double())
    half = KeyBias(dtype)
    half.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()})
    fast = compiled(half, {"inner": "inductor", "strict": True})
    errors = [(out.double() - truth).norm() / truth.norm() for out in (half(ids, bias), fast(ids, bias))]
    assert errors[1] <= 2 * errors[0] < 0.05
    assert pgcompile.stats().packed == 1


def errors_with_bias(dtype, bias, scale=0.3, engine="auto"):
    """Of eager, and of ours."""
    model, ids = KeyBias(scale=scale), batch_of().input_ids
    low = KeyBias(dtype, scale)
    low.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()})
    model.load_state_dict({name: value.double() for name, value in low.state_dict().items()})
    truth = model(ids, bias.double())
    fast = compiled(low, {"engine": engine})
    return [
        float(((out - truth).norm() / truth.norm()).detach()) for out in (low(ids, bias), fast(ids, bias))
    ]


@pytest.mark.parametrize("scale", [1e-6, 1e8])
def test_a_bias_next_to_a_scale_whose_inverse_is_no_half_precision_number(scale):
    eager, ours = errors_with_bias(torch.float16, torch.randn(4, 1, BATCH["positions"]), scale)
    assert ours <= 2 * eager or eager != eager
    model, ids = KeyBias(scale=scale), batch_of().input_ids
    (graph,) = pgcompile.explain(model, ids, torch.zeros(ids.shape[1])).graphs
    assert [reason.kind for reason in graph.fallbacks] == ["token_mixing"]


def test_a_bias_that_overflows_once_it_is_divided_by_the_scale():
    eager, ours = errors_with_bias(torch.float32, torch.randn(4, 1, BATCH["positions"]) * 1e37, 1e-3)
    assert ours <= 2 * eager


def test_a_bias_of_higher_precision_than_queries_and_keys():
    """Eager adds it to float64 scores."""
    bias = torch.randn(4, 1, BATCH["positions"], dtype=torch.float64) + 1e6
    eager, ours = errors_with_bias(torch.float32, bias)
    assert ours <= 10 * eager


def test_a_bias_where_products_are_rounded():
    """`set_float32_matmul_precision` is about products; what eager adds isn't rounded (or it would be off by 8)."""
    torch.set_float32_matmul_precision("medium")
    try:
        bias = torch.randn(4, 1, BATCH["positions"]) + 3000
        eager, ours = errors_with_bias(torch.float32, bias, engine="reference")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert ours <= 10 * eager


@pytest.mark.parametrize("number", [-torch.inf, torch.finfo(torch.float32).min, torch.nan])
def test_a_bias_that_may_be_a_mask_runs_dense(number):
    model, ids = KeyBias(), batch_of().input_ids
    bias = torch.zeros(len(ids), 1, 1, ids.shape[1])
    fast = compiled(model)
    assert torch.allclose(fast(ids, bias), model(ids, bias))
    assert pgcompile.stats().packed == 1
    bias[0, ..., -1] = number
    assert torch.allclose(fast(ids, bias), model(ids, bias), rtol=0, atol=0, equal_nan=True)
    assert pgcompile.stats().dense == 1
    (batch,) = pgcompile.explain(model, ids, bias, options={"min_saving": 0}).batches
    assert batch.decision == "dense" and "a bias of the scores is infinite" in batch.why
