"""Planning reads columns where the batch is, and waits for the device once: to bring them to the host.

A CPU stands in for the device: whatever makes a CUDA call wait (a number or a truth value of a tensor, an operation
whose result has a size that depends on values) is an operation that a dispatch mode sees here too.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pgcompile import columns
from pgcompile.engines import reference
from pgcompile.packed_tree import PackedTrees
from pgcompile.passes import PASSES
from pgcompile.passes.pipeline import Compilation, run_passes
from pgcompile.plan import build_plan

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}


class SeesWaits(TorchDispatchMode):
    """Collects the operations that would make a device wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for i in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in WAITS or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Attends(nn.Module):
    """Embeddings, one attention with a mask of `allowed(mask, positions)`, and a loss-like sum over valid tokens."""

    def __init__(self, allowed):
        super().__init__()
        self.embed, self.allowed = nn.Embedding(32, 8), allowed

    def forward(self, ids, mask):
        x = self.embed(ids)[:, None]
        out = F.scaled_dot_product_attention(
            x, x, x, attn_mask=self.allowed(mask, torch.arange(ids.shape[1]))
        )
        return out[:, 0] * (mask if mask.dim() == 2 else torch.ones_like(ids))[..., None]


def causal(p):
    return p[None, :] <= p[:, None]


MASKS = {
    "padding": (lambda mask, p: causal(p) & mask.bool()[:, None, None, :], 2),
    "padding and window": (
        lambda mask, p: causal(p) & (p[:, None] - p[None, :] < 4) & mask.bool()[:, None, None, :],
        2,
    ),
    "data": (lambda mask, p: mask, 4),
}


def graphs_of(model, *args):
    found = []

    def backend(gm, _):
        compilation = run_passes(PASSES, Compilation(gm, "fallback", False, "auto"), (), None)
        assert not compilation.reasons, compilation.reasons
        found.append((compilation.graphs, compilation.graphs.prologue))
        return lambda *inputs: (found.append(inputs), gm(*inputs))[1]

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(*args)
    (graphs, prologue), inputs = found
    return graphs, prologue(*inputs)


@pytest.mark.parametrize("kind", MASKS)
def test_one_copy_to_the_host_and_no_other_wait(kind, monkeypatch):
    allowed, dims = MASKS[kind]
    ids = torch.randint(32, (4, 12))
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[1:3, 9:] = 0
    if dims == 4:
        mask = (causal(torch.arange(12)) & mask.bool()[:, None, :])[:, None]
    graphs, results = graphs_of(Attends(allowed), ids, mask)
    copies, original = [], columns._to_host
    monkeypatch.setattr(columns, "_to_host", lambda tensors: (copies.append(1), original(tensors))[1])
    with SeesWaits() as mode:
        plan = build_plan(graphs, results, True, PackedTrees())
    assert plan.tokens > 0 and len(copies) == 1
    assert mode.seen == []


def test_the_mode_sees_waits():
    x = torch.arange(4)
    with SeesWaits() as mode:
        assert bool((x > 2).any())
        x[x > 2] = 0
        x.nonzero()
    assert mode.seen == ["_local_scalar_dense", "index_put_", "nonzero"]


def documents(mask, p):
    return causal(p) & (mask[:, None, :, None] == mask[:, None, None, :])


def padding(mask, p):
    return causal(p) & mask.bool()[:, None, None, :]


def both(mask, p):
    return documents(mask // 2, p) & padding(mask % 2, p)


HIDES = {  # what allows, the column's rows, and what hides: invalid keys, other parts
    "no padding": (padding, ["1111", "1111"], [False, False]),
    "padding that is dropped": (padding, ["0011", "1110"], [False, False]),
    "a hole": (padding, ["0111", "1011"], [True, False]),
    "one document in each row": (documents, ["1111", "5555"], [False, False]),
    "two in one": (documents, ["1111", "5566"], [False, True]),
    "one, right padding in another": (both, ["3330", "3333"], [False, False]),
    "one, left padding in another": (both, ["0033", "3333"], [False, False]),
    "two, padding": (both, ["3355", "3330"], [False, True]),
}


@pytest.mark.parametrize("case", HIDES)
def test_what_columns_hide(case):
    allowed, rows, expected = HIDES[case]
    column = torch.tensor([[int(c) for c in row] for row in rows])
    model = Attends(allowed)
    if allowed is both:  # the factor that switches padding off
        model.forward = lambda ids, mask: Attends.forward(model, ids, mask) * (mask % 2)[..., None]
    graphs, results = graphs_of(model, torch.randint(32, column.shape), column)
    plan = build_plan(graphs, results, True, PackedTrees())
    assert [hidden.tolist() for hidden in plan.hides] == [expected]


def test_columns_that_hide_nothing_are_not_looked_at(monkeypatch):
    torch._dynamo.reset()
    seen, original = [], reference.attention
    monkeypatch.setattr(reference, "attention", lambda *args: (seen.append(args[3]), original(*args))[1])
    call = torch.compile(
        Attends(both), backend="pgcompile", options={"inner": "eager", "engine": "reference", "min_saving": 0}
    )
    for value in (3, 5):
        mask = torch.full((4, 12), 3)
        mask[0, :4] = value
        call(torch.randint(32, mask.shape), mask)
    assert [(len(mask.key_valid), len(mask.same_value)) for mask in seen] == [(0, 0), (0, 1)]


class Layers(nn.Module):
    """Two attentions; before each, tokens are multiplied by `factors(ids, positions)[i]`."""

    def __init__(self, factors):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.factors = nn.Embedding(32, 8), factors

    def forward(self, ids):
        x = self.embed(ids)[:, None]
        found = self.factors(ids, torch.arange(ids.shape[1], dtype=torch.float32))
        for factor in found:
            x = x * factor[..., None, :, None]
            x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x[:, 0], *found


def by_layer(ids, p):
    return [(p * 0.1).cos(), (p * 0.1).cos()]


def by_layer_from_tokens(ids, p):
    return [(ids.float() * 0.1).cos()[:, None].squeeze(1), (ids.float() * 0.1).cos()[:, None].squeeze(1)]


def written_between(ids, p):
    p = p + 0
    view = p[None, :]
    first = view * 0.1
    p.add_(1)
    return [first[0], (view * 0.1)[0]]


def random_numbers(ids, p):
    return [torch.dropout(p, 0.0, True), torch.dropout(p, 0.0, True)]


@pytest.mark.parametrize(
    ("factors", "columns"),
    [(by_layer, 1), (by_layer_from_tokens, 1), (written_between, 2), (random_numbers, 2)],
)
def test_layers_that_compute_the_same_column_have_one(factors, columns):
    ids = torch.randint(32, (4, 12))
    ids[:, :8] = ids[0, :8].clone()
    model = Layers(factors)
    graphs, _ = graphs_of(model, ids)
    tables = [spec for spec in graphs.inputs if spec.kind == "column" and len(spec.dims) > 2]
    assert len(tables) == columns
    for disabled in ([], ["functionalize_pass"]):  # without it, writes are left for lowering to see
        torch._dynamo.reset()
        options = {"inner": "eager", "min_saving": 0, "strict": True, "disable_passes": disabled}
        found, expected = torch.compile(model, backend="pgcompile", options=options)(ids), model(ids)
        torch.testing.assert_close(found, expected)
        for outputs in (found, expected):
            outputs[1].fill_(7)  # one of them only, even if they are equal
        torch.testing.assert_close(found, expected)
