"""In-place writes and grad-mode regions around the token stream: each once gave other values than eager."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pgcompile

VOCAB, WIDTH = 11, 8


class Model(nn.Module):
    """Embedding, one causal attention, residual; `head` gives logits."""

    def __init__(self):
        super().__init__()
        self.emb, self.qkv = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.register_buffer("buffer", torch.zeros(WIDTH))

    def body(self, ids):
        x = self.emb(ids)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )

    def logprobs(self, ids):
        return self.head(self.body(ids)).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def labels_masked_in_place(m, ids, mask):
    labels = ids.clone()
    labels[:, 0] = -100
    return F.cross_entropy(m.head(m.body(ids)).flatten(0, 1), labels.flatten())


def labels_shifted_in_place(m, ids, mask):
    labels = ids.new_zeros(ids.shape)
    labels[:, :-1] = ids[:, 1:].clone()
    labels[:, -1] = -100
    return F.cross_entropy(m.head(m.body(ids)).flatten(0, 1), labels.flatten())


def late_value_written(m, ids, mask):
    late = m.body(ids).sum(-1).cumsum(1)
    late[:, 0] = 0
    return late


def prompt_logprobs_zeroed(m, ids, mask):
    logprobs = m.logprobs(ids)
    logprobs[:, :3] = 0
    return logprobs


def buffer_written(m, ids, mask):
    h = m.body(ids)
    m.buffer.copy_(h.mean((0, 1)).detach())
    return h


def metric_under_no_grad_first(m, ids, mask):
    h = m.body(ids)
    with torch.no_grad():
        metric = h.mean(1)
    return h.mean(1), metric


def target_cut_under_no_grad(m, ids, mask):
    h = m.body(ids)
    with torch.no_grad():
        target = h[:, 1:]
    return (h[:, :-1] * target).sum()


def target_cut_under_inference_mode(m, ids, mask):
    h = m.body(ids)
    with torch.inference_mode():
        target = h[:, 1:].clone()
    return (h[:, :-1].detach() * target).sum() + h.sum()


def column_read_then_written(m, ids, mask):
    column = mask.clone()
    summed = m.body(ids).sum(-1).cumsum(1)
    before = summed + column
    column[:, 0] = 0
    return before, summed + column


def input_written_through_unbind(m, ids, mask):
    first = mask.unbind(0)[0]
    first.add_(1)
    return m.body(ids) * mask[..., None]


def view_of_a_view_sees_a_write(m, ids, mask):
    h = m.body(ids) * 1.0
    view = h.view(-1, WIDTH).view(*ids.shape, 2, WIDTH // 2)
    h.mul_(2)
    return view.sin()


def returns_as_weights(m, ids, mask):
    logprobs = m.logprobs(ids)
    ratio = (logprobs - logprobs.detach()).exp()
    returns = (logprobs.detach() * mask).flip(1).cumsum(1).flip(1)
    return (ratio * returns * mask).sum()


CASES = [
    labels_masked_in_place, labels_shifted_in_place, late_value_written, prompt_logprobs_zeroed, buffer_written,
    metric_under_no_grad_first, target_cut_under_no_grad, target_cut_under_inference_mode, column_read_then_written,
    input_written_through_unbind, view_of_a_view_sees_a_write, returns_as_weights,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_same_as_eager(case):
    torch._dynamo.reset()
    torch.manual_seed(0)
    ids = torch.randint(VOCAB, (3, 9))
    ids[1:, :6] = ids[0, :6]
    reference = Model().double()
    model = Model().double()
    model.load_state_dict(reference.state_dict())
    options = {"inner": "eager", "min_saving": 0}

    def step(m, compiled):
        mask = torch.ones(3, 9, dtype=torch.float64)
        f = torch.compile(case, backend="pgcompile", options=options) if compiled else case
        outputs = f(m, ids.clone(), mask)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((o * torch.linspace(1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)
        total.backward()
        return [*outputs, mask, m.buffer], {n: p.grad for n, p in m.named_parameters()}

    (expected, expected_grads), (found, found_grads) = step(reference, False), step(model, True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for name, grad in expected_grads.items():
        assert (grad is None) == (found_grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(found_grads[name], grad, rtol=1e-9, atol=1e-9, msg=name)


def test_random_weights_are_drawn_once():
    """Noise on a parameter would be drawn for the packed and for the late graph."""

    def f(m, ids):
        weight = torch.randn_like(m.head.weight)
        h = m.body(ids)
        return F.linear(h, weight) - F.linear(h.cumsum(1).diff(dim=1, prepend=0 * h[:, :1]), weight)

    fast = torch.compile(f, backend="pgcompile", options={"inner": "eager", "min_saving": 0})
    assert fast(Model().double(), torch.randint(VOCAB, (3, 9))).abs().max() < 1e-12


def test_returns_do_not_pull_the_model_into_the_prologue():
    found = pgcompile.explain(
        returns_as_weights, Model().double(), torch.randint(VOCAB, (3, 9)), torch.ones(3, 9).double()
    )
    assert found.status == "packed"
