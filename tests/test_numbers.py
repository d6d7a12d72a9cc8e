"""Floats that Dynamo made symbolic: those that change compile nothing new, those that must be numbers are numbers."""

import copy
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness import ALWAYS_PACK, BACKEND, compiled, rewire
from zoo import ZOO

if BACKEND != "pgcompile":
    pytest.skip("tests pgcompile's own behaviour", allow_module_level=True)

import pgcompile
from pgcompile import backend, inner

# No float32 or bfloat16 number among them, so that each rounding shows
VALUES = (0.1, 0.7, -1.3, 1e-3, 17.3, 0.3)


# Graphs without attention, too, run as the compiler has them
INNER = {"inner": "aot_eager", "fallback": "inner"}


@pytest.fixture(autouse=True)
def compiled_only(fresh, monkeypatch):
    """Nothing runs without the inner compiler unnoticed."""
    monkeypatch.setattr(inner.DenseGraph, "eager", property(_runs_eagerly))


def _runs_eagerly(graph):
    raise AssertionError("the inner compiler failed on the original graph")


def outputs_and_gradient(function, x, *numbers):
    x = x.clone().requires_grad_()
    y = function(x, *numbers)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), gradient


ARITHMETIC = {
    "x * b": lambda x, b: x * b,
    "b * x": lambda x, b: b * x,
    "x + b": lambda x, b: x + b,
    "b - x": lambda x, b: b - x,
    "x - b": lambda x, b: x - b,
    "x / b": lambda x, b: x / b,
    "b / x": lambda x, b: b / x,
    "method": lambda x, b: x.mul(b).sub(b),
    "function": lambda x, b: torch.add(torch.div(x, b), b),
    "of numbers": lambda x, b: x * (1 - b) + x / (b * b / 3 + 1),
    "two steps": lambda x, b: (x * b).relu() * b,
    "loss": lambda x, b: x.mean() * b,
    "number by loss": lambda x, b: b / x.mean(),
    "loss of a loss": lambda x, b: (x * b).mean() + 3 * (b * x.mean()),
    "less a loss": lambda x, b: b - x.mean() + (x.mean() - b),
    "negative": lambda x, b: x * -b,
}

# A function of x, a float and a step; with all of them in arithmetic, comparisons and bounds.
SCHEDULES = {
    "linear": lambda x, b, step: x * (b * (1 - step / 1000)),
    "exponential": lambda x, b, step: x * 0.9**step + x / abs(b) ** step,
    "bounded": lambda x, b, step: x * max(b, 0.01) - x * min(1.0, step / 5),
    "cosine": lambda x, b, step: x * math.cos(b),
    "rounded": lambda x, b, step: x * round(b, 4),
    "inverse": lambda x, b, step: x * (5 / b),
    "inverse size": lambda x, b, step: (x * b).sum() / (x.shape[0] * 3.0) + x.sum() * (1 / x.shape[0]),
    "clip range": lambda x, b, step: x.clamp(1 - abs(b), 1 + abs(b)) + torch.clamp(x, max=b),
    "one bound": lambda x, b, step: x.clamp(b - 2, 3) + x.clamp(min=b),
    "steps": lambda x, b, step: x * (b * (4 - step) / 7) + ((5 - step) * 0.1) * x,
    "clamped loss": lambda x, b, step: x.sum().clamp(min=b),
    "comparison": lambda x, b, step: x * (x > b) + x * (b >= x) + x * (b == x),
    "compared loss": lambda x, b, step: x * (x.mean() * 0 + 0.1 < b),
    "choice": lambda x, b, step: torch.where(x > b, x, b) + torch.where(x > step / 7, 1 - b, x * b),
    "chosen loss": lambda x, b, step: torch.where(x > b, x.mean(), b) * x,
}

BESIDE_INTEGERS = {"bounded by a step": lambda x, b, step: x.clamp(b, step - 3) + x.clamp(b, True)}

NUMBERS = {
    "layer norm": lambda x, b: F.layer_norm(x, (5,), eps=abs(b)),
    "in place": lambda x, b: x.clone().mul_(b),
    "function of a number": lambda x, b: torch.div(b, x),
    "named": lambda x, b: torch.clamp(input=x, min=b),
    "keyword": lambda x, b: torch.add(x, x.exp(), alpha=b),
    "power": lambda x, b: x.exp() ** b,
    "both": lambda x, b: F.leaky_relu(x, b) * b,
    "rounded": lambda x, b: torch.div(x * x, b, rounding_mode="floor") + x,
    "integers": lambda x, b: x * (torch.arange(5) * b),
    "filled": lambda x, b: x * torch.full((5,), b),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", [*ARITHMETIC, *NUMBERS])
def test_any_number_gives_what_eager_gives(name, dtype):
    """Bit for bit, dtypes and gradients included."""
    function = (ARITHMETIC | NUMBERS)[name]
    fast = torch.compile(function, backend="pgcompile", options=INNER, fullgraph=True)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for number in VALUES:
        expected, actual = outputs_and_gradient(function, x, number), outputs_and_gradient(fast, x, number)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_a_number_that_is_compiled_for_each_value_is_warned_of():
    fast = torch.compile(lambda x, b: x.exp() ** b * 2, backend="pgcompile", options=INNER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(torch.ones(3), 0.1)  # nobody knows that it will change
    with pytest.warns(UserWarning, match=r"make it a tensor, at .*test_numbers.py.* x.exp\(\) \*\* b"):
        fast(torch.ones(3), 0.2)


def test_assignments():
    """`b += 1` is no write to the tensor that `b` is."""

    def function(x, b):
        x = x.clone()
        c = b
        c += 1
        x *= b
        x += c
        x -= b
        x /= c
        return x

    fast = torch.compile(function, backend="pgcompile", options=INNER, fullgraph=True)
    x = torch.randn(4, 5)
    for number in VALUES:
        expected, actual = outputs_and_gradient(function, x, number), outputs_and_gradient(fast, x, number)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_graph_of_numbers_alone_has_nothing_to_pack():
    fast = torch.compile(lambda n: torch.ones(3) * (n / 7), backend="pgcompile", options={"strict": True})
    for n in (3, 4, 5):
        torch.testing.assert_close(fast(n), torch.full((3,), n / 7), rtol=0, atol=0)


def test_division_of_a_number_by_zero_raises():
    fast = torch.compile(lambda x, b: x * (1 / b), backend="pgcompile", options=INNER)
    for number in VALUES[:3]:
        fast(torch.ones(3), number)
    with pytest.raises(Exception, match="division by zero"):
        fast(torch.ones(3), 0.0)


@pytest.mark.parametrize("name", [*SCHEDULES, *BESIDE_INTEGERS])
def test_what_python_computes_from_numbers(name):
    """Bit for bit, whatever the number is computed from: a step, a size, another float."""
    function = (SCHEDULES | BESIDE_INTEGERS)[name]
    fast = torch.compile(function, backend="pgcompile", options=INNER, fullgraph=True)
    for step, number in enumerate(VALUES):
        x = torch.randn(4 + step, 5, generator=torch.Generator().manual_seed(step))
        expected = outputs_and_gradient(function, x, number, step + 3)
        actual = outputs_and_gradient(fast, x, number, step + 3)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*ARITHMETIC, *SCHEDULES])
def test_a_number_that_changes_compiles_twice(name):
    """As with Inductor: once as a constant, and once for all others (and for sizes that didn't change at first)."""
    counter = CompileCounterWithBackend("pgcompile")
    if name in ARITHMETIC:
        fast = torch.compile(lambda x, b, step: ARITHMETIC[name](x, b), backend=counter, fullgraph=True)
    else:
        fast = torch.compile(SCHEDULES[name], backend=counter, fullgraph=True)
    for step, number in enumerate([*VALUES, 0.6, 0.9, 1.1, 2.3]):
        fast(torch.ones(4, 5), abs(number), step + 3)
    assert counter.frame_count <= 3


class Tempered(nn.Module):
    """A number that changes in the trunk, one in the head, and module attributes that don't change."""

    def __init__(self, name="nano_gpt", **config):
        super().__init__()
        torch.manual_seed(0)
        self.lm = rewire(ZOO[name](dim=16, layers=1, **config))
        self.bias = 0.25

    def forward(self, input_ids, number):
        logits = self.lm(input_ids)
        return (logits + self.bias) / (1 + number * number) - logits * number


def grouped_ids(rows=4, prefix=12, answer=5):
    ids = torch.randint(1, 31, (1, prefix), generator=torch.Generator().manual_seed(1)).repeat(rows, 1)
    return torch.cat(
        [ids, torch.randint(1, 31, (rows, answer), generator=torch.Generator().manual_seed(2))], 1
    )


def test_a_number_that_changes_in_a_packed_graph():
    model, ids = Tempered(), grouped_ids()
    counter = CompileCounterWithBackend(lambda gm, inputs: backend.pgcompile(gm, inputs, options=ALWAYS_PACK))
    fast = torch.compile(model, backend=counter, fullgraph=True)
    for number in VALUES:
        reference = copy.deepcopy(model)
        expected, actual = reference(ids, number), fast(ids, number)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        model.zero_grad()
        for logits in (expected, actual):
            logits.square().sum().backward()
        for want, got in zip(reference.parameters(), model.parameters()):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-10)
    assert pgcompile.stats().packed == len(VALUES)
    assert counter.frame_count == 2


@pytest.mark.parametrize("shared", [True, False])
def test_dynamic_numbers_of_a_model(shared):
    """With dynamic=True each number of each module is symbolic: scales, epsilons, the norm type of an embedding."""
    model = Tempered("half_rotary")
    ids = grouped_ids() if shared else torch.arange(4 * 7).view(4, 7)
    fast = compiled(model, {"inner": "aot_eager"} | ({} if shared else {"min_saving": 0.5}), dynamic=True)
    for number in VALUES[:3]:
        torch.testing.assert_close(fast(ids, number), model(ids, number), rtol=0, atol=1e-12)
    stats = pgcompile.stats()
    assert (stats.packed, stats.dense) == ((3, 0) if shared else (0, 3))


def test_numbers_are_on_the_host_whatever_the_default_device_is():
    model, ids = Tempered("half_rotary"), grouped_ids()
    expected = [model(ids, number) for number in VALUES]
    fast = compiled(model, {"inner": "aot_eager"})
    torch.set_default_device("meta")
    try:
        actual = [fast(ids, number) for number in VALUES]
    finally:
        torch.set_default_device(None)
    for got, want in zip(actual, expected):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert pgcompile.stats().packed == len(VALUES)


@dataclass
class State:
    ids: torch.Tensor
    step: int


def test_sizes_and_steps_of_attributes_are_no_constants():
    """With dynamic=True floats that are attributes are; these aren't."""
    model = Tempered()
    frames = []

    def function(state, coefficient):
        logits = model.lm(state.ids) * coefficient
        return logits * (1 - state.step / 100) + logits.sum() * (1 / state.ids.shape[0])

    def compile_(gm, inputs):
        frames.append(gm)
        return backend.pgcompile(gm, inputs, options=ALWAYS_PACK)

    fast = torch.compile(function, backend=compile_, dynamic=True, fullgraph=True)
    for step, number in enumerate(VALUES):
        state = State(grouped_ids(rows=4 + step), step + 3)
        torch.testing.assert_close(fast(state, number), function(state, number), rtol=0, atol=1e-10)
    assert (len(frames), pgcompile.stats().packed) == (1, len(VALUES))


def test_numbers_in_checkpointed_bodies():
    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.scale = inner, 0.7

        def forward(self, x):
            return checkpoint(lambda x: self.inner(x) * self.scale, x, use_reentrant=False)

    model = Tempered()
    model.lm.blocks = nn.ModuleList(map(Block, model.lm.blocks))
    for ids, saving in ((grouped_ids(), 0.0), (torch.arange(4 * 7).view(4, 7), 0.5)):
        fast = compiled(model, {"inner": "aot_eager", "min_saving": saving}, dynamic=True)
        torch.testing.assert_close(fast(ids, 0.3), model(ids, 0.3), rtol=0, atol=1e-12)
    assert (pgcompile.stats().packed, pgcompile.stats().dense) == (1, 1)


SCALES = {
    "scores * b": lambda scores, b: scores * b,
    "scores / b": lambda scores, b: scores / b,
    "capped": lambda scores, b: torch.tanh(scores / b) * b,
}


@pytest.mark.parametrize("name", SCALES)
def test_a_number_that_attention_needs_is_a_constant(name):
    """As if no number could be a tensor: each value packs, in a graph of its own."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(31, 8), nn.Linear(8, 31)

        def forward(self, ids, number):
            x = self.embed(ids)
            causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            scores = SCALES[name](x @ x.mT, number).masked_fill(~causal, float("-inf"))
            return self.head(scores.softmax(-1) @ x) * number

    torch.manual_seed(0)
    model, ids = Scaled().double(), grouped_ids()
    fast = torch.compile(model, backend="pgcompile", options=ALWAYS_PACK)
    for number in VALUES[:4]:
        torch.testing.assert_close(fast(ids, number), model(ids, number), rtol=0, atol=1e-10)
    assert pgcompile.stats().packed == 4


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_a_graph_that_is_refused_has_no_guards_on_numbers():
    counter = CompileCounterWithBackend("pgcompile")
    fast = torch.compile(lambda x, b: F.leaky_relu(Twice.apply(x), b), backend=counter)
    x = torch.randn(5, requires_grad=True)
    for number in VALUES:
        torch.testing.assert_close(fast(x, number), F.leaky_relu(2 * x, number), rtol=0, atol=0)
    assert counter.frame_count == 2


OWN_TENSORS = {
    "detached": lambda x, t: x * t.item(),
    "as it was": lambda x, t: x * (t.item(), t.detach().mul_(2))[0],
    "converted": lambda x, t: x * float(t) + x / float(t),
    "whole": lambda x, t: (x * t).sum() + t,
}


@pytest.mark.parametrize("name", OWN_TENSORS)
def test_a_float64_tensor_without_dimensions_is_no_number(name):
    """Reading one makes a number of it: no gradient, and no later write, reaches that."""
    function = OWN_TENSORS[name]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        fast = compiled(function, INNER)
        for number in VALUES:
            results = []
            for call in (function, fast):
                x = torch.ones(3, requires_grad=True)
                t = torch.tensor(number, dtype=torch.float64, requires_grad=name != "as it was")
                y = call(x, t)
                y.sum().backward()
                results.append((y.detach(), x.grad, t.grad, t.detach()))
            torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
