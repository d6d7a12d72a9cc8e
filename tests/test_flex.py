"""The engine on FlexAttention, without a GPU: its graphs are traced for any number of tokens and run as they are.

What FlexAttention does with a graph is its plain formula then, on all pairs of tokens; it reads no block mask. That one
is held against PyTorch's own, which evaluates the mask.
"""

import sys

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention.flex_attention import create_block_mask

from harness import BACKEND, differences, random_tree_batch, run
from pgcompile.engines import flex
from pgcompile.engines.contract import Scores
from test_ops import SAME_VALUE, assert_equals_brute_force, attend, columns, gradients, inputs, tree_mask
from trees import random_tree, tree_of_rows
from zoo.nano_gpt import NanoGPT

CPU = torch.device("cpu")


@pytest.fixture
def on_cpu(monkeypatch):
    """It runs on the CPU, in any dtype."""
    monkeypatch.setattr(flex, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(flex, "_compiled", {})


@pytest.fixture
def small_blocks(on_cpu, monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", 4)


SHAPES = {
    "plain": {},
    "gqa": {"heads": 6, "key_heads": 2, "size": 20},
    "short values": {"heads": 4, "key_heads": 1, "size": 16, "value_size": 3},
    "long values": {"heads": 2, "key_heads": 1, "size": 8, "value_size": 24},
}


@pytest.mark.parametrize("masked", ["nothing", "columns"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_brute_force(shape, window, masked, small_blocks):
    tree = random_tree(1)
    mask = {"window": window, **(columns(tree, 1) if masked == "columns" else {})}
    assert_equals_brute_force(tree, inputs(tree, **SHAPES[shape]), "flex", **mask)


@pytest.mark.parametrize("scale, softcap", [(-0.7, None), (0.0, None), (0.5, 0.3), (2.0, 5.0)])
def test_scales_and_caps(scale, softcap, small_blocks):
    tree = random_tree(2)
    assert_equals_brute_force(tree, inputs(tree), "flex", scale=scale, softcap=softcap)


@pytest.mark.parametrize("name", SAME_VALUE)
def test_values_that_must_agree(name, small_blocks):
    tree = random_tree(0)
    values = [SAME_VALUE[name](tree.depth), tree.depth // 5]
    assert_equals_brute_force(tree, inputs(tree), "flex", same_value=values)


def test_one_graph_each_way_for_all_numbers_of_tokens(on_cpu, monkeypatch):
    """Some fit into one block, some need three; and sizes that are equal by accident stay apart."""
    graphs, trace = [], flex.traced
    monkeypatch.setattr(flex, "traced", lambda *args: graphs.append(args) or trace(*args))
    for rows in (
        [[1, 2], [1, 3]],
        [[*range(200), 7], [*range(200), 9, 9]],
        [[5]],
        [[0] * 128, [0] * 127 + [1]],
    ):
        tree = tree_of_rows(rows)
        assert_equals_brute_force(tree, inputs(tree, heads=3, key_heads=3), "flex")
    assert len(graphs) == 2


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("seed", range(5))
def test_the_block_mask_is_the_one_that_pytorch_finds_by_looking_at_all_pairs(
    seed, window, hides, small_blocks
):
    tree = random_tree(seed, rows=9, length=11)
    mask = tree_mask(tree, window, *([torch.ones(tree.tokens, dtype=torch.bool)],) * hides)
    formula, tensors = flex.formula_of(mask, Scores(1.0), CPU)
    ours = flex.block_mask(formula, tree.tokens, [x for _, x in tensors])
    columns = [x for dims, x in tensors if dims == "T"]

    def sees(b, h, q, k):
        return ours[-1](b, h, q, k, *columns)

    theirs = create_block_mask(sees, None, None, tree.tokens, tree.tokens, "cpu", BLOCK_SIZE=flex.BLOCK)
    for partial, full in ((2, 4), (6, 8)):  # by queries, by keys
        expected = theirs.as_tuple()
        wanted, wanted_full = listed(*expected[partial : partial + 2]), listed(*expected[full : full + 2])
        found, found_full = listed(*ours[partial : partial + 2]), listed(*ours[full : full + 2])
        if window is None and not hides:
            assert (found, found_full) == (wanted, wanted_full)
        assert wanted | wanted_full <= found | found_full and found_full <= wanted_full
        assert not found & found_full and not (hides and found_full)
    assert len(ours) == len(expected) and ours[:2] == expected[:2]
    assert wanted_full or window is not None


def listed(count: torch.Tensor, index: torch.Tensor) -> set[tuple[int, int]]:
    """Pairs of blocks; the first dims are batch and head."""
    assert count.dtype == index.dtype == torch.int32 and count.shape == index.shape[:-1]
    return {(row, tile) for row, n in enumerate(count[0, 0]) for tile in index[0, 0, row, :n].tolist()}


def test_block_lists_take_no_look_at_all_pairs(monkeypatch):
    """2¹⁷ tokens in one row: 2³³ pairs of tokens, 2²⁰ of blocks."""
    segments = torch.tensor([[0, 1 << 17, 1 << 17, 0, -1]])
    monkeypatch.setattr("torch.nn.attention.flex_attention.create_block_mask", None)
    lists = flex.block_lists(segments.numpy(), None, False, CPU)
    assert lists[0].unique().tolist() == lists[4].unique().tolist() == [1]
    assert int(lists[2].sum()) == int(lists[6].sum()) == 1024 * 1023 // 2


def test_lists_are_built_once_for_a_plan(small_blocks, monkeypatch):
    built, build = [], flex.block_lists
    monkeypatch.setattr(flex, "block_lists", lambda *args: built.append(args) or build(*args))
    tree = random_tree(0)
    for _ in range(2):
        gradients(lambda *x: attend(tree, *x, engine="flex"), inputs(tree))
    assert len(built) == 1
    attend(tree, *inputs(tree), window=2, engine="flex")
    attend(tree, *inputs(tree), **columns(tree), engine="flex")
    assert len(built) == 3


@pytest.fixture
def model_and_batch(small_blocks):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return NanoGPT().double(), random_tree_batch(rows=6, positions=12, seed=1)


def test_a_model_packs_and_runs_on_it(model_and_batch):
    model, batch = model_and_batch
    compiled = torch.compile(
        model, backend=BACKEND, options={"inner": "eager", "engine": "flex", "min_saving": 0}
    )
    expected = run(model, (), batch.inputs)
    actual = run(compiled, (), batch.inputs, owner=model)
    assert not differences(actual, expected, 1e-10, 1e-9)
    assert len(flex._compiled) == 2, "one graph forward and one backward"


def test_it_is_traced_where_tracing_works(model_and_batch, monkeypatch):
    """A compiled graph calls operators with functionalization and vmap off. (So FlexAttention's plain formula, which
    needs vmap, can't run there; zeros stand in.)"""
    model, batch = model_and_batch
    compiled = []

    def aot(*graph):
        gm, inputs = flex.traced(*graph)
        compiled.append(aot_eager(gm, inputs))
        (results,) = (n.args[0] for n in gm.graph.find_nodes(op="output"))
        shapes = [[d if isinstance(d, int) else None for d in n.meta["val"].shape] for n in results]

        def zeros(q, *_):
            sizes = [[q.shape[2] if d is None else d for d in shape] for shape in shapes]
            return [q.new_zeros(size) for size in sizes]

        return zeros

    monkeypatch.setattr(flex, "_compile", aot)
    options = {"inner": "aot_eager", "engine": "flex", "min_saving": 0}
    run(torch.compile(model, backend=BACKEND, options=options), (), batch.inputs, owner=model)
    assert len(compiled) == 2


def test_the_graphs_are_what_an_inner_compiler_takes(small_blocks, monkeypatch):
    """Functionalized and traced once more, as by inductor; for two numbers of tokens."""

    def aot(*graph):
        gm, inputs = flex.traced(*graph)
        return aot_eager(gm, inputs)

    monkeypatch.setattr(flex, "_compile", aot)
    for seed in (0, 1):
        tree = random_tree(seed)
        mask = {"window": 5, **columns(tree, seed)}
        assert_equals_brute_force(tree, inputs(tree, heads=4), "flex", softcap=0.7, **mask)
    assert len(flex._compiled) == 2


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", flex.DTYPES)
def test_what_is_compiled(dtype, softcap):
    """One operator each way, for any number of tokens, of the contract's dtypes and strides."""
    tree = random_tree(0)
    mask = tree_mask(tree, 7, [torch.ones(tree.tokens, dtype=torch.bool)])
    formula, mask_arguments = flex.formula_of(mask, Scores(0.5, softcap), CPU)
    qkv = [x.to(dtype) for x in inputs(tree, heads=4, key_heads=2, size=32, value_size=32)]
    q, k, v = map(flex.as_kernels_want, qkv)
    lse = ("1HT", torch.empty(1, 4, tree.tokens))
    for function, given, heads in (
        (flex.forward, [q, k, v], [4]),
        (flex.backward, [q, q, k, v, q, lse], [4, 2, 2]),
    ):
        gm, fakes = flex.traced(function, formula, [*given, *mask_arguments])
        (node,) = (
            n for n in gm.graph.nodes if n.target is getattr(torch.ops.higher_order, OPERATOR[function])
        )
        tokens = fakes[0].shape[2]
        assert isinstance(tokens, torch.SymInt)
        for x, count in zip(node.meta["val"], heads):
            assert x.shape == (1, count, tokens, 32) and x.dtype == dtype
            assert x.transpose(1, 2).is_contiguous()


OPERATOR = {flex.forward: "flex_attention", flex.backward: "flex_attention_backward"}


@pytest.mark.parametrize("size, value_size", [(64, 64), (16, 64), (64, 16), (1, 16)])
def test_what_32_bits_cannot_count_is_left_to_others(size, value_size):
    mask, heads = tree_mask(random_tree(0)), (1 << 25) // max(size, value_size)
    q, v = (torch.empty(1, heads, 64, n, device="meta") for n in (size, value_size))
    assert "2,147,483,648" in flex.why_not_call(mask, q, v)
    assert flex.why_not_call(mask, q[:, 1:], v[:, 1:]) is None


def test_why_not(monkeypatch):
    gpu, intel = torch.device("cuda", 0), torch.device("xpu", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "no backward pass on cpu" in flex.why_not(CPU, torch.float32)
    assert "float64" in flex.why_not(gpu, torch.float64)
    assert flex.why_not(gpu, torch.float32) is None and flex.why_not(intel, torch.bfloat16) is None
    assert "257" in flex.why_not_heads(257, Scores(1.0)) and flex.why_not_heads(256, Scores(1.0, 5.0)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability" in flex.why_not(gpu, torch.float16)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "can't be imported" in flex.why_not(intel, torch.float16)
