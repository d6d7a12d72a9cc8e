"""One spelling for what has several: same values, and the operations that the rules know."""

import pytest
import torch
import torch.nn.functional as F

from pgcompile.passes.canonicalize import canonicalize
from pgcompile.passes.softmax_forms import SOFTMAXES
from pgcompile.passes.trace import to_aten

# name: function of x [3, 4, 5] and labels [3, 4]; operations that are gone; operations that are there
SPELLINGS = {
    "broadcast_tensors, both": (
        lambda x, t: torch.broadcast_tensors(x[:, :1], t[..., None]), ["broadcast_tensors"], ["expand"],
    ),
    "broadcast_tensors, one already": (
        lambda x, t: torch.broadcast_tensors(t[..., None], x)[1] * 2, ["broadcast_tensors"], ["alias"],
    ),
    "broadcast_tensors, new dims": (
        lambda x, t: torch.broadcast_tensors(x[0], t[..., None])[0] * 2, ["broadcast_tensors"], ["expand"],
    ),
    "broadcast_tensors, a dim of size 1": (
        lambda x, t: torch.broadcast_tensors(torch.arange(5), x[:1]), ["broadcast_tensors"], ["expand"],
    ),
    "slices of everything": (lambda x, t: x[:, :, :].cos() * x[0:], ["slice"], ["cos", "mul"]),
    "slices of less": (lambda x, t: x[:, :-1].cos() * x[:, 1::1] + x[:, ::2][:, :1], [], ["slice"] * 4),
    "a slice of everything that is written": (lambda x, t: (y := x * 2, y[:].add_(1))[0] * 3, ["slice"], ["add_"]),
    "cross entropy of classes in dim 1": (
        lambda x, t: F.cross_entropy(x.transpose(1, 2), t, reduction="none"), [], ["flatten", "cross_entropy_loss"],
    ),
    "cross entropy, mean, smoothed": (
        lambda x, t: F.cross_entropy(x.transpose(1, 2), t, label_smoothing=0.1), [], ["flatten"],
    ),
    "nll loss, sum, ignored": (
        lambda x, t: F.nll_loss(x.transpose(1, 2), t, reduction="sum", ignore_index=2), [], ["flatten"],
    ),
    "cross entropy against probabilities": (
        lambda x, t: F.cross_entropy(x.transpose(1, 2), x.transpose(1, 2).softmax(1)), ["flatten"], [],
    ),
    "kl_div, sum": (
        lambda x, t: F.kl_div(x, x.cos(), reduction="sum", log_target=True), [], ["kl_div", "sum", "sum"],
    ),
    "kl_div, batchmean": (lambda x, t: F.kl_div(x, x.exp(), reduction="batchmean"), [], ["kl_div", "sum", "sum"]),
    "kl_div, none": (lambda x, t: F.kl_div(x, x.exp(), reduction="none"), ["sum", "mean"], ["kl_div"]),
    "mse_loss, mean": (lambda x, t: F.mse_loss(x, x.sin()), [], ["mse_loss", "mean", "mean"]),
    "mean of everything": (lambda x, t: x.mean(), [], ["mean", "mean"]),
    "sum of everything, another dtype": (lambda x, t: x.sum(dtype=torch.float32), [], ["sum"]),
    "softmax less the maximum": (
        lambda x, t: (x - x.max(-1, keepdim=True).values).softmax(2), ["sub"], ["softmax"],
    ),
    "softmax less the maximum of another dim": (
        lambda x, t: (x - x.amax(1, keepdim=True)).softmax(-1), [], ["amax", "sub", "softmax"],
    ),
    "softmax less something's maximum": (
        lambda x, t: (x - x.cos().amax(-1, keepdim=True)).softmax(-1), [], ["amax", "sub", "softmax"],
    ),
    "softmax less twice the maximum": (
        lambda x, t: torch.sub(x, x.amax(-1, keepdim=True), alpha=2).softmax(-1), [], ["amax", "softmax"],
    ),
    "softmax with a sink": (
        lambda x, t: torch.cat([x, x[:1, :1, :1].expand(3, 4, 1)], -1).softmax(-1, torch.float32)[..., :-1],
        ["cat", "expand"], ["softmax_with_sink"],
    ),
    "softmax with a sink, by size": (
        lambda x, t: torch.cat([x, x.mean(1, keepdim=True)], 1).softmax(1)[:, : x.shape[1]],
        ["cat"], ["softmax_with_sink"],
    ),
    "softmax with two sinks": (
        lambda x, t: torch.cat([x, x[..., :2]], -1).softmax(-1)[..., :-1], ["softmax_with_sink"], ["cat"],
    ),
    "softmax with a sink in front": (
        lambda x, t: torch.cat([x[..., :1], x], -1).softmax(-1)[..., :-1], ["softmax_with_sink"], ["cat"],
    ),
    "softmax with a sink that is kept": (
        lambda x, t: torch.cat([x, x[..., :1]], -1).softmax(-1)[..., 1:], ["softmax_with_sink"], ["cat"],
    ),
    "softmax with a sink, along another dim": (
        lambda x, t: torch.cat([x, x[..., :1]], -1).softmax(1)[..., :-1], ["softmax_with_sink"], ["cat"],
    ),
    "softmax with a sink, every other weight": (
        lambda x, t: torch.cat([x, x[..., :1]], -1).softmax(-1)[..., :-1:2], ["softmax_with_sink"], ["cat"],
    ),
    "softmax behind the share that a sink leaves": (
        lambda x, t: (x.logsumexp(-1) - x[:1, :, 0]).sigmoid()[..., None] * (x.softmax(-1).to(x.dtype) @ x.mT),
        ["logsumexp", "sigmoid"], ["softmax_with_sink"],
    ),
    "softmax behind the shares that several sinks leave": (
        lambda x, t: (lambda y: (y.logsumexp(-1, True) - x[..., :1]).sigmoid() * (y.softmax(-1) @ x.mT))(x[:, :1]),
        ["softmax_with_sink"], ["logsumexp", "sigmoid"],
    ),
    "softmax behind a share that makes a matrix of a vector": (
        lambda x, t: (x[0].softmax(-1) @ x[1, 0]) * (x[0].logsumexp(-1, True) - x[:1, :1, 0]).sigmoid(),
        ["softmax_with_sink"], ["logsumexp"],
    ),
    "softmax over another dim than the share's": (
        lambda x, t: (x.softmax(1) @ x.mT) * (x.logsumexp(-1, True) - x[:1, :1, :1]).sigmoid(),
        ["softmax_with_sink"], ["logsumexp"],
    ),
    "softmax behind a share without a sink": (
        lambda x, t: (x.softmax(-1) @ x.mT) * torch.sub(1.0, x.logsumexp(-1, True)).sigmoid(),
        ["softmax_with_sink"], ["logsumexp"],
    ),
    "dropout between softmax and a sink's share": (
        lambda x, t: (F.dropout(x.softmax(-1), 1.0) @ x.mT) * (x.logsumexp(-1, True) - x[:1, :1, :1]).sigmoid(),
        ["softmax_with_sink"], ["logsumexp", "dropout"],
    ),
    "sum of a matrix": (lambda x, t: x[0].sum(), [], ["sum"]),
}  # fmt: skip


def canonical(function, dynamic, dtype=torch.float64):
    """What the canonical graph gives, what the function gives, and the graph's operations."""
    names = []

    def backend(gm, _):
        traced = to_aten(gm)
        canonicalize(traced)
        canonicalize(traced, SOFTMAXES)
        traced.graph.lint()
        names.extend(
            n.target._schema.name.split("::")[1] for n in traced.graph.nodes if hasattr(n.target, "_schema")
        )
        return traced

    x, labels = torch.randn(3, 4, 5, dtype=dtype), torch.randint(5, (3, 4))
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=dynamic)(x, labels), function(x, labels), names


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name, dynamic):
    function, gone, there = SPELLINGS[name]
    found, expected, names = canonical(function, dynamic)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not set(gone) & set(names)
    for operation in there:
        assert names.count(operation) == there.count(operation) or operation in (
            "flatten",
            "expand",
            "alias",
        ), names


@pytest.mark.parametrize("function", [torch.sum, torch.mean])
def test_half_precision_is_rounded_once(function):
    """Sums over the vocabulary stay in float32 until all is summed."""
    found, expected, names = canonical(lambda x, t: function(x * 100), False, torch.bfloat16)
    assert names.count(function.__name__) == 2
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_a_sink_of_higher_precision():
    """Weights stay what they were, the product is what the gate made of it."""
    sink = torch.randn(1, 4, 1)
    found, expected, names = canonical(
        lambda x, t: (x.logsumexp(-1, True) - sink).sigmoid() * (x.softmax(-1) @ x.mT), False, torch.bfloat16
    )
    assert "softmax_with_sink" in names and found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


# Lookups side by side: function of tables a [7, 5] and b [9, 5] and labels [3, 4], all below 5; is it one lookup each?


def written_between(a, b, t):
    first = F.embedding(t, a)
    t = t.clone()
    t[0] = 1
    return torch.cat([first, F.embedding(t, b)], 1)


def without_gradient(a, b, t):
    with torch.no_grad():
        first = F.embedding(t, a)
    return torch.cat([first, F.embedding(t, b)], 1)


JOINED = {
    "two tables, with ids that only one of them has": (
        lambda a, b, t: torch.cat([F.embedding(t, a), F.embedding(t[:, :2] + 4, b)], 1), True,
    ),
    "one row for all": (
        lambda a, b, t: torch.cat([F.embedding(t[:1], a).expand(3, -1, -1), F.embedding(t, b)], 1), True,
    ),
    "one row repeated, cast": (
        lambda a, b, t: torch.cat([F.embedding(t, b), F.embedding(t[1:2], a).repeat(3, 1, 1).half().double()], 1),
        True,
    ),
    "three, of other lengths, and padding": (
        lambda a, b, t: torch.cat([F.embedding(t, a, 2), F.embedding(t[:, 3:], b), F.embedding(t + 2, a)], -2), True,
    ),
    "half of the positions from one table": (
        lambda a, b, t: torch.cat([F.embedding(t, a), F.embedding(t, b)], 2), False,
    ),
    "more rows": (lambda a, b, t: torch.cat([F.embedding(t, a), F.embedding(t, b)], 0), False),
    "a whole table in each row": (lambda a, b, t: torch.cat([a.expand(3, 7, 5), F.embedding(t, b)], 1), True),
    "a whole table, repeated and cast": (
        lambda a, b, t: torch.cat([a.repeat(3, 1, 1).double().half(), F.embedding(t, b).half()], 1), True,
    ),
    "a row for all from a list": (
        lambda a, b, t: torch.cat([F.embedding(t[0], a)[None].expand(3, -1, -1), F.embedding(t, b)], 1), True,
    ),
    "a part used twice": (lambda a, b, t: torch.cat([F.embedding(t, a)] * 2, 1), True),
    "a part and its cast": (lambda a, b, t: (lambda e: torch.cat([e.float(), e], 1))(F.embedding(t, a)), True),
    "no part": (lambda a, b, t: torch.cat([F.embedding(t[:, :0], a), F.embedding(t, b)], 1), True),
    "a table that is empty": (lambda a, b, t: torch.cat([F.embedding(t[:, :0], a[:0]), F.embedding(t, b)], 1), False),
    "gradients by frequency": (
        lambda a, b, t: torch.cat([F.embedding(t[:, :2], a, scale_grad_by_freq=True), F.embedding(t, b)], 1), False,
    ),
    "sparse gradients": (
        lambda a, b, t: torch.cat([F.embedding(t, a * 1, sparse=True), F.embedding(t, b)], 1).detach() + a[0], False,
    ),
    "many parts": (lambda a, b, t: torch.cat([F.embedding(t, a)] * 5, 1), False),
    "tables computed": (lambda a, b, t: torch.cat([F.embedding(t, a * 2), F.embedding(t, b)], 1), True),
    "not a table": (lambda a, b, t: torch.cat([F.embedding(t, a), a.sin().expand(3, 7, 5)], 1), False),
    "something computed": (lambda a, b, t: torch.cat([F.embedding(t, a) * 2, F.embedding(t, b)], 1), False),
    "positions repeated": (lambda a, b, t: torch.cat([F.embedding(t, a).repeat(1, 2, 1), F.embedding(t, b)], 1), False),
    "a write between": (written_between, False),
    "no gradient for one": (without_gradient, False),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", JOINED)
def test_lookups_side_by_side(name, dynamic):
    function, is_joined = JOINED[name]
    graphs = []

    def backend(gm, _):
        graphs.append(to_aten(gm))
        canonicalize(graphs[-1])
        graphs[-1].graph.lint()
        return graphs[-1]

    tables = [torch.nn.Parameter(torch.randn(rows, 5, dtype=torch.float64)) for rows in (7, 9)]
    labels = torch.randint(5, (3, 4))
    torch._dynamo.reset()
    found = torch.compile(function, backend=backend, dynamic=dynamic)(*tables, labels)
    expected = function(*tables, labels)
    assert torch.equal(found, expected)
    weight = torch.randn_like(found)
    gradients = [
        torch.autograd.grad((value * weight).sum(), tables, allow_unused=True) for value in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    operations = [node.target for node in graphs[0].graph.nodes]
    assert (torch.ops.aten.where.ScalarOther in operations) == is_joined
