"""Every case of refusals.py keeps the original's values and gradients, and is refused or packed as it says."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from harness import BACKEND, assert_same, compiled, differences, kept_positions, run, status_of
from refusals import ANYTHING, CASES, HEADS, HIDDEN, Case, Stream

# (rows, positions): no size equals another, then each coincidence that a size-reading analysis would fall for.
SIZES = {
    "generic": (6, 10),
    "rows_equal_positions": (5, 5),
    "rows_equal_heads_and_positions_equal_hidden": (HEADS, HIDDEN),
}
THIS_FILE = "refusals.py"

needs_pgcompile = pytest.mark.skipif(BACKEND != "pgcompile", reason="asks pgcompile for its reasons")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_same_as_the_original(name, size):
    case = CASES[name]
    report = assert_same(case.build(), case.arguments(*SIZES[size]), dynamic=False)
    if BACKEND == "pgcompile" and size == "generic":
        assert status_of(report.stats) in case.outcome.statuses


# Square first, Dynamo uses one symbol for rows and positions if it is allowed to; then it compiles twice. Its cache of
# fake tensors costs more than it saves with symbolic sizes.
@pytest.mark.parametrize(
    "name, first", [(name, [(5, 5), (6, 10)][number % 2]) for number, name in enumerate(CASES)]
)
@torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
def test_one_dynamic_compile_over_sizes(name, first):
    case = CASES[name]
    reference, original = case.build(), case.build()
    fast = compiled(original, dynamic=True)
    for seed, (rows, positions) in enumerate([first, (7, 11), (8, 8), (HEADS, HIDDEN)]):
        arguments = case.arguments(rows, positions, seed=seed)
        kept = kept_positions(*arguments[:2]) if arguments[1] is not None else None
        expected = run(reference, arguments, kept=kept)
        actual = run(fast, case.arguments(rows, positions, seed=seed), kept=kept, owner=original)
        lines = differences(actual, expected, 1e-10, 1e-9)
        assert not lines, "\n".join([f"at {rows} x {positions}:", *lines])


@needs_pgcompile
@pytest.mark.parametrize("name", CASES)
def test_the_reason_and_its_line(name):
    import pgcompile

    case = CASES[name]
    torch._dynamo.reset()  # every case compiles the same forward: without it, Dynamo's recompile limit is reached
    explanation = pgcompile.explain(
        case.build(), *case.arguments(*SIZES["generic"]), options={"inner": "eager", "min_saving": 0}
    )
    if explanation.status == "packed":
        decisions = [batch.decision for batch in explanation.batches]
        assert "packed" in case.outcome.statuses or any(decision != "packed" for decision in decisions), (
            decisions
        )
        return
    assert explanation.status in case.outcome.statuses, explanation.to_dict()
    fallbacks = [fallback for graph in explanation.graphs for fallback in graph.fallbacks]
    assert fallbacks, "refused without a reason"
    if not case.outcome.kinds:
        return
    expected = [fallback for fallback in fallbacks if fallback.kind in case.outcome.kinds]
    assert expected, (
        f"kinds {sorted({fallback.kind for fallback in fallbacks})}, expected {sorted(case.outcome.kinds)}"
    )
    lines = {line for fallback in expected for line in lines_named(str(fallback.source))}
    assert lines & case.marked_lines, (
        f"sources {[str(f.source) for f in expected]}, lines {sorted(case.marked_lines)}"
    )
    assert all(fallback.explanation and fallback.hint for fallback in expected)


def lines_named(source: str) -> set[int]:
    """The line numbers of refusals.py in 'refusals.py:12', 'File ".../refusals.py", line 12' and the like."""
    return {int(line) for line in re.findall(re.escape(THIS_FILE) + r"\D{0,10}(\d+)", source)}


@needs_pgcompile
def test_weights_that_redefine_operations():
    """Quantized and sharded ones do. torch's own example of such a tensor holds two."""
    import pgcompile

    model = Stream(CASES["flip_features"]).double()
    weight = model.head.weight.detach()
    model.head.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    arguments = CASES["flip_features"].arguments(*SIZES["generic"])
    (graph,) = pgcompile.explain(model, *arguments).graphs
    (reason,) = graph.fallbacks
    assert reason.kind == "trace_failed" and "TwoTensor" in reason.explanation
    torch._dynamo.reset()
    found = torch.compile(model, backend="pgcompile", options={"inner": "eager"})(*arguments)
    assert torch.equal(found.a, model(*arguments).a)


def _adapted_where_marked(m, x, ids, mask):
    """As an adapter for one language of several: how many tokens it gets, only the run knows."""
    marked = (ids[:, :1] % 2 == 0).expand_as(ids)
    adapted = torch.zeros_like(x)
    adapted[marked] = x[marked].tanh()
    return x + adapted


@needs_pgcompile
def test_a_size_that_depends_on_values():
    import pgcompile

    case = Case("_adapted_where_marked", "between", _adapted_where_marked, ANYTHING)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        explanation = pgcompile.explain(
            case.build(), *case.arguments(*SIZES["generic"]), options={"inner": "eager"}
        )
    (graph,) = explanation.graphs
    assert {reason.kind for reason in graph.fallbacks} == {"token_mixing"}


@torch.library.custom_op("flash_attn_of_tests::forward", mutates_args=())
def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@flash_attention.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def by_its_function(m, q, k, v, ids, mask):
    return flash_attention(q, k, v)


def by_flex_attention(m, q, k, v, ids, mask):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)


def by_unpadding(m, q, k, v, ids, mask):
    torch._dynamo.graph_break()
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# Dynamo ends the graph in a file that is called so
by_unpadding.__code__ = by_unpadding.__code__.replace(co_filename="modeling_flash_attention_utils.py")


@needs_pgcompile
@pytest.mark.parametrize("attend", [by_its_function, by_flex_attention, by_unpadding])
def test_other_attention_has_a_hint(attend):
    import pgcompile

    case = Case(attend.__name__, "attention", attend, ANYTHING)
    torch._dynamo.reset()
    model = case.build().requires_grad_(False)  # flex_attention has no backward on CPU
    explanation = pgcompile.explain(model, *case.arguments(*SIZES["generic"]), options={"inner": "eager"})
    reasons = explanation.breaks + [r for graph in explanation.graphs for r in graph.fallbacks]
    assert any('attn_implementation="sdpa"' in reason.hint for reason in reasons), str(explanation)


@needs_pgcompile
def test_a_folder_is_no_kernel():
    from pgcompile.passes.reasons import HINTS, hint_for

    assert hint_for("unknown_op", "", "aten.x.default", "/flash_attn/a.py:1 in f: y") == HINTS["unknown_op"]


class Embedded(nn.Module):
    """Gets tokens as floats [N, S, d]."""

    def forward(self, x):
        x = x[:, None]
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0] * 2


@needs_pgcompile
def test_a_width_that_is_taken_for_dynamic():
    import pgcompile

    def run(is_static):
        torch._dynamo.reset()
        pgcompile.reset_stats()
        call = torch.compile(
            Embedded(), backend="pgcompile", dynamic=True, options={"inner": "eager", "min_saving": 0}
        )
        x = torch.randn(4, 6, HIDDEN).expand(2, 4, 6, HIDDEN).flatten(0, 1).clone()
        if is_static:
            torch._dynamo.mark_static(x, 2)
        return torch.equal(call(x), Embedded()(x)) or torch.allclose(call(x), Embedded()(x), atol=1e-6)

    assert run(is_static=False) and pgcompile.stats().packed == 0
    assert run(is_static=True) and pgcompile.stats().packed > 0  # as the hint says


@needs_pgcompile
def test_the_kinds_exist():
    from pgcompile.passes.reasons import KINDS

    assert {kind for case in CASES.values() for kind in case.outcome.kinds} <= KINDS.keys()


def test_the_suite_is_as_large_as_promised():
    may_not_pack = [case for case in CASES.values() if "packed" not in case.outcome.statuses]
    legitimate_after_attention = [case for case in CASES.values() if case.place in ("hidden", "logits")]
    assert len(may_not_pack) >= 44
    assert len(legitimate_after_attention) >= 8
