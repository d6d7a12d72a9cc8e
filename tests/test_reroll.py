"""Unrolled loops over rows and chunks become one operation, and nothing that only looks like one does."""

import pytest
import torch
import torch.nn.functional as F

from pgcompile.passes.reroll import ALONG, reroll
from pgcompile.passes.trace import to_aten

RANGE = torch.arange(5.0, dtype=torch.float64)
WEIGHT, BIAS = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)


def rows_of_logsumexp(x, ids):
    """TRL's log-probabilities in float32."""
    chosen = x.gather(-1, ids[..., None])
    return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in x])[..., None]


def rows_of_log_softmax(x, ids):
    """TRL's log-probabilities in half precision."""
    rows = zip(x, ids[..., None], strict=True)
    return torch.stack([F.log_softmax(row, dim=-1).gather(dim=-1, index=label) for row, label in rows])


def chunks_of_entropy(x, ids):
    """TRL's entropies, so many tokens at a time."""
    entropies = []
    for chunk in x.reshape(-1, x.shape[-1]).split(16, dim=0):
        logps = F.log_softmax(chunk, dim=-1)
        entropies.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(entropies, dim=0).reshape(x.shape[:-1])


def head(x):
    return F.linear(x, WEIGHT, BIAS)


ROLLED = {
    "rows: gather - logsumexp": rows_of_logsumexp,
    "rows: log_softmax, gather": rows_of_log_softmax,
    "chunks: entropy": chunks_of_entropy,
    "rows by unbind": lambda x, ids: torch.stack([r.exp() for r in x.unbind(1)], 1),
    "rows by unbind, stacked elsewhere": lambda x, ids: torch.stack([r.sum(-1) for r in x.unbind(1)], -1),
    "rows, concatenated": lambda x, ids: torch.cat([torch.logsumexp(r, -1) for r in x]),
    "rows, operands of other ranks": lambda x, ids: torch.stack([r - r[:, 0].sum(0) * RANGE for r in x]),
    "rows: max over the vocabulary": lambda x, ids: torch.stack(
        [r - r.max(-1).values[:, None] * RANGE for r in x]
    ),
    "rows: along the positions": lambda x, ids: torch.stack([r.softmax(0).cumsum(0) for r in x]),
    "rows by number": lambda x, ids: torch.stack([x[i].exp() for i in range(x.shape[0])]),
    "chunks of positions": lambda x, ids: torch.cat([c.logsumexp(-1) for c in x.split(4, dim=1)], 1),
    "chunks of two tensors": lambda x, ids: torch.cat(
        [a.gather(-1, b[..., None]) for a, b in zip(x.split(4, dim=1), ids.split(4, dim=1))], 1
    ),
    "chunks by count": lambda x, ids: torch.cat([c.exp() for c in x.chunk(2, dim=1)], 1),
    "chunks through a head": lambda x, ids: torch.cat([head(c).logsumexp(-1) for c in x.split(4, dim=1)], 1),
}
# With symbolic sizes it isn't known that slices cover everything.
ROLLED_STATIC = {
    "chunks by slices": lambda x, ids: torch.cat([x[:, i : i + 4].exp() for i in range(0, 9, 4)], 1),
}
UNTOUCHED = {
    "not all rows": lambda x, ids: torch.stack([torch.logsumexp(x[i], -1) for i in range(2)]),
    "another order": lambda x, ids: torch.stack([torch.logsumexp(x[i], -1) for i in (1, 0, 2)]),
    "a row twice": lambda x, ids: torch.stack([torch.logsumexp(x[i], -1) for i in (0, 1, 1)]),
    "different operations": lambda x, ids: torch.stack([x[0].exp(), x[1].exp(), x[2].cos()]),
    "different constants": lambda x, ids: torch.stack([r * (i + 2) for i, r in enumerate(x)]),
    "zeros of two signs": lambda x, ids: torch.stack(
        [torch.where(r > 0, z, r).reciprocal() for r, z in zip(x, (0.0, -0.0, 0.0))]
    ),
    "numbers of two types": lambda x, ids: torch.stack([r.argmax(-1) + n for r, n in zip(x, (1, 1.0, 1))]),
    "different dims": lambda x, ids: torch.stack([r.cumsum(0 if i else 1) for i, r in enumerate(x)]),
    "one depends on another": lambda x, ids: torch.stack([x[0].exp(), x[0] + x[1], x[2].exp()]),
    "chunks: along the loop's dim": lambda x, ids: torch.cat([c.softmax(1) for c in x.split(4, dim=1)], 1),
    "chunks: sums of chunks": lambda x, ids: torch.cat(
        [c.sum(1, keepdim=True) for c in x.split(3, dim=1)], 1
    ),
    "chunks: concatenated elsewhere": lambda x, ids: torch.cat([c.exp() for c in x.split(3, dim=1)], 2),
    "chunks: another order": lambda x, ids: torch.cat([c.exp() for c in x.split(3, dim=1)[::-1]], 1),
    "chunks: a tensor as long as a chunk": lambda x, ids: torch.cat(
        [c * torch.ones(3, 1, dtype=torch.float64) * RANGE[:3, None] for c in x.split(3, dim=1)], 1
    ),
    "chunks: a gap": lambda x, ids: torch.cat([x[:, i : i + 3].exp() for i in range(0, 9, 4)], 1),
    "chunks: random": lambda x, ids: torch.cat([c * torch.rand_like(c) for c in x.split(3, dim=1)], 1),
    "rows: written to in between": lambda x, ids: _written_in_between(x),
}


def _written_in_between(x):
    x = x.clone()
    first = x[0].exp()
    x.add_(1)
    return torch.stack([first, x[1].exp(), x[2].exp()])


def rolled_graph(function, dynamic):
    """The operations of the graph after the pass; the compiled function gave what it gives in eager."""
    graphs = []

    def backend(gm, _):
        traced = to_aten(gm)
        before = [str(n.target) for n in traced.graph.nodes]
        reroll(traced)
        graphs.append((before, [str(n.target) for n in traced.graph.nodes]))
        return traced

    x = torch.randn(3, 9, 5, dtype=torch.float64)
    ids = torch.randint(5, (3, 9))
    torch._dynamo.reset()
    torch.manual_seed(0)
    found = torch.compile(function, backend=backend, dynamic=dynamic)(x.clone(), ids)
    torch.manual_seed(0)
    torch.testing.assert_close(found, function(x.clone(), ids), rtol=1e-12, atol=1e-12)
    return graphs[0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [*ROLLED, *ROLLED_STATIC])
def test_rolled(name, dynamic):
    if dynamic and name in ROLLED_STATIC:
        return assert_untouched(ROLLED_STATIC[name], dynamic)
    before, after = rolled_graph({**ROLLED, **ROLLED_STATIC}[name], dynamic)
    loops = [op for op in before if "stack" in op or "cat" in op]
    assert len(loops) == 1
    assert not any(word in op for op in after for word in ("stack", "cat", "split", "unbind"))
    assert len(after) < len(before)


def assert_untouched(function, dynamic):
    before, after = rolled_graph(function, dynamic)
    assert before == after


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", UNTOUCHED)
def test_untouched(name, dynamic):
    assert_untouched(UNTOUCHED[name], dynamic)


@pytest.mark.parametrize("target", ALONG, ids=str)
def test_the_table_names_the_argument_that_is_a_dim(target):
    assert target._schema.arguments[ALONG[target]].name == "dim"
