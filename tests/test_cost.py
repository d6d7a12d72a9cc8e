"""The work that is counted in a graph: of each spelling of a matrix product the same, however its sizes were traced."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import BACKEND

if BACKEND != "pgcompile":
    pytest.skip("about what pgcompile counts", allow_module_level=True)

import pgcompile

ROWS, POSITIONS, WIDTH, EXPERTS = 3, 8, 8, 3
IDS = torch.arange(ROWS * POSITIONS).view(ROWS, POSITIONS) // POSITIONS
ONCE = WIDTH * WIDTH  # multiply-adds of one token with the square weight


class Model(nn.Module):
    """The product, and attention, whose work is counted by pairs."""

    def __init__(self, product):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.product = nn.Embedding(32, WIDTH), product
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, ids):
        x = self.product(self, self.embed(ids), ids)[:, None]
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]


def by_hand(name):
    """Attention that is spelled as products itself."""

    def product(m, x, ids):
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if name == "matmul":
            return (x @ x.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ x
        return torch.bmm(torch.bmm(x, x.mT).masked_fill(hidden, -torch.inf).softmax(-1), x)

    return product


def experts(x):
    return x.flatten(0, 1).expand(EXPERTS, -1, -1)


def expert_of(m, ids):
    return F.embedding(ids, m.experts.flatten(1)).view(-1, WIDTH, WIDTH)


def heads(x, count=2):
    return x.reshape(-1, count, WIDTH // count)


def column(m, x, ids):
    """A matrix of each token, computed from inputs alone."""
    table = ids.to(x.dtype)[..., None, None].expand(-1, -1, 4, 4)
    return torch.bmm(heads(x), table.flatten(0, 1)).view(x.shape)


PRODUCTS = {
    "linear": (lambda m, x, ids: F.linear(x, m.weight), ONCE),
    "mm": (lambda m, x, ids: torch.mm(x.flatten(0, 1), m.weight).view(x.shape), ONCE),
    "addmm": (lambda m, x, ids: torch.addmm(m.bias, x.flatten(0, 1), m.weight).view(x.shape), ONCE),
    "matmul": (lambda m, x, ids: x @ m.weight, ONCE),
    "a vector": (lambda m, x, ids: (x @ m.bias)[..., None] + x, WIDTH),
    "einsum": (lambda m, x, ids: torch.einsum("nsd,de->nse", x, m.weight), ONCE),
    "einsum of experts": (
        lambda m, x, ids: torch.einsum("nsd,edf->nsef", x, m.experts).sum(2),
        EXPERTS * ONCE,
    ),
    "bmm": (lambda m, x, ids: torch.bmm(experts(x), m.experts).sum(0).view(x.shape), EXPERTS * ONCE),
    "baddbmm": (
        lambda m, x, ids: torch.baddbmm(m.bias, experts(x), m.experts).sum(0).view(x.shape),
        EXPERTS * ONCE,
    ),
    "experts by index": (
        lambda m, x, ids: torch.bmm(x.view(-1, 1, WIDTH), expert_of(m, ids)).view(x.shape),
        ONCE,
    ),
    "weight on the left": (lambda m, x, ids: (m.weight @ x.mT).mT, ONCE),
    "heads": (lambda m, x, ids: F.linear(heads(x), m.weight[:4, :4]).reshape(x.shape), 2 * 4 * 4),
    "column": (column, 2 * 4 * 4),
    "attention by matmul": (by_hand("matmul"), 0),
    "attention by bmm": (by_hand("bmm"), 0),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
def test_work_of_products(product, dynamic):
    function, expected = PRODUCTS[product]
    torch._dynamo.reset()
    reports = []
    backend = functools.partial(
        pgcompile.pgcompile, options={"inner": "eager", "min_saving": 0}, collector=reports.append
    )
    with torch.no_grad():
        torch.compile(Model(function), backend=backend, dynamic=dynamic)(IDS)
    _, batch = reports
    attentions = 1 + product.startswith("attention")
    dense, packed = batch.work
    assert dense.linear == ROWS * POSITIONS * max(expected, 1)
    assert packed.linear == batch.packed_tokens * max(expected, 1)
    assert dense.attention == attentions * 2 * WIDTH * ROWS * POSITIONS * (POSITIONS + 1) // 2
