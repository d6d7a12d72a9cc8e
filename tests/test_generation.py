"""Generation between training steps: the original forward, no graph of its own, and no hooks that pile up."""

import pytest
import torch
from torch._dynamo.utils import counters

from harness import BACKEND
from tiny_hf import VOCAB, build

if BACKEND != "pgcompile":
    pytest.skip("about what pgcompile compiles", allow_module_level=True)

import pgcompile

IDS = torch.cat(
    [
        torch.randint(1, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0)).expand(6, -1),
        torch.randint(1, VOCAB, (6, 4), generator=torch.Generator().manual_seed(1)),
    ],
    dim=1,
)

COMPILE = {
    "model.compile": lambda model: model.compile(
        backend="pgcompile", options={"inner": "eager", "min_saving": 0}
    ),
    "optimize": lambda model: pgcompile.optimize(inner="eager", min_saving=0)(model),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    pgcompile.reset_stats()


def train(model):
    model.train()
    model.zero_grad()
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()


def generate(model, rows, tokens=6):
    model.eval()
    return model.generate(IDS[:rows], max_new_tokens=tokens, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("way", COMPILE)
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_generation_compiles_nothing(name, way):
    model = build(name).float()
    expected = [generate(model, rows) for rows in (1, 2, 6)]
    COMPILE[way](model)
    train(model)
    frames = sum(counters["frames"].values())
    assert frames > 0
    for rows, tokens in zip((1, 2, 6), expected):
        assert torch.equal(generate(model, rows), tokens)
    assert sum(counters["frames"].values()) == frames
    train(model)
    assert pgcompile.stats().packed == 2 and sum(counters["frames"].values()) == frames


def test_a_whole_graph_of_somebody_else_around_a_module_with_a_hook():
    """Dynamo traces through the module's own compiled call."""
    model = torch.nn.Sequential(build("qwen3").float(), torch.nn.Identity())
    model[0].register_forward_hook(lambda module, args, out: None)
    COMPILE["model.compile"](model[0])
    train(model[0])
    assert pgcompile.stats().packed == 1

    @torch.compile(backend="eager", fullgraph=True)
    def around(ids):
        return model[0](input_ids=ids, use_cache=False).logits * 2

    with torch.no_grad():
        torch.testing.assert_close(around(IDS), model[0](input_ids=IDS, use_cache=False).logits * 2)


def test_hooks_of_checkpointing_do_not_pile_up():
    """A trainer switches it off to generate; transformers leaves a hook behind each time, on which Dynamo guards."""
    model = build("gpt2")
    model.compile(backend="pgcompile", options={"inner": "eager", "min_saving": 0})
    hooks = model.get_input_embeddings()._forward_hooks
    train(model)
    for _ in range(12):
        model.gradient_checkpointing_disable()
        generate(model, 2, tokens=1)
        model.gradient_checkpointing_enable()
        train(model)
    assert pgcompile.stats().packed == 13 and pgcompile.stats().recompile_limit_hits == 0
    assert len(hooks) == 1


def test_other_hooks_stay():
    model = build("gpt2")
    seen = []
    hooks = model.get_input_embeddings()._forward_hooks
    for number in range(2):
        model.get_input_embeddings().register_forward_hook(lambda *_, number=number: seen.append(number))
    model.compile(backend="pgcompile", options={"inner": "eager"})
    train(model)
    train(model)
    assert len(hooks) == 2 and seen == [0, 1] * 2
