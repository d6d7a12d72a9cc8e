"""The operators of a packed graph against brute force, and inside torch.compile.

Attention is checked against a loop over tokens that follows parent pointers, independently of `subtree_end`, in
float64 where an engine has it. Every engine that can run in this process is tested, on a GPU those for CUDA, too;
test_triton.py runs this file once more in a process where Triton interprets its kernels.
"""

import functools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

from pgcompile import copies, ops
from pgcompile.cli.doctor import describe_engines
from pgcompile.engines import ENGINES, TreeMask, cpu, reference, triton
from pgcompile.engines.choose import choose
from trees import Tree, random_tree, tree_of_rows

INF = float("inf")


def inputs(
    tree: Tree, heads: int = 2, key_heads: int = 2, size: int = 4, value_size: int = 4, seed: int = 0
) -> list:
    """Token-major q, k, v as models make them, float64."""
    torch.manual_seed(seed)
    shapes = [(heads, size), (key_heads, size), (key_heads, value_size)]
    return [torch.randn(1, tree.tokens, *shape, dtype=torch.float64).transpose(1, 2) for shape in shapes]


def columns(tree: Tree, seed: int = 0) -> dict:
    """Two columns of each kind: about one key in four is invalid, same_value splits rows into chunks."""
    generator = torch.Generator().manual_seed(seed)
    keep, other = torch.rand(2, tree.tokens, generator=generator) > 0.15
    return {
        "key_valid": [keep, other],
        "same_value": [tree.depth // 3, torch.randint(2, keep.shape, generator=generator)],
    }


def dtypes(engine: str, device: torch.device | None) -> list[torch.dtype]:
    """What an engine computes in there, the finest first."""
    wanted = [] if device is None else [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    return [d for d in wanted if ENGINES[engine].why_not(device, d) is None]


def home(engine: str) -> torch.device | None:
    """Where an engine can be tested."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return next((d for d in devices if dtypes(engine, d)), None)


def finest(engine: str) -> torch.dtype:
    return dtypes(engine, home(engine))[0]


def dtype_for(engine: str, wanted: torch.dtype) -> torch.dtype:
    """The one that is wanted, or the engine's finest."""
    return wanted if wanted in dtypes(engine, home(engine)) else finest(engine)


def at_home(engine: str, values, *on_host: Tensor):
    """Nested tensors on the engine's device, but for those that the host reads, and of a dtype that it has."""

    def move(x: Tensor) -> Tensor:
        if any(x is other for other in on_host):
            return x
        dtype = dtype_for(engine, x.dtype) if x.is_floating_point() else x.dtype
        return x.detach().to(home(engine), dtype).requires_grad_(x.requires_grad)

    return tree_map_only(Tensor, move, values)


def in_dtypes(*wanted: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """Engines with each of the dtypes that they have."""
    return [(e, d) for e in ENGINES for d in wanted if d in dtypes(e, home(e))]


def representable(tensors: list[Tensor], engine: str) -> list[Tensor]:
    """In float64, numbers that the engine's finest dtype has, so that its own rounding counts alone."""
    return [x.to(finest(engine)).double() for x in tensors]


def close_to(actual: Tensor, expected: Tensor, engine: str) -> None:
    """Tensors of numbers below 10, sums of a few dozen products: float32 keeps five digits behind the point, barely."""
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 5e-2}[finest(engine)]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


def attend(
    tree: Tree, q, k, v, sinks=None, key_valid=(), same_value=(), scale=0.5, softcap=None, window=None,
    engine="reference",
):  # fmt: skip
    """On the engine's device, and in the dtype given or the engine's finest; results where the arguments were."""
    known = engine in ENGINES
    where = home(engine) if known else q.device
    if known:
        q, k, v = (x.to(dtype_for(engine, x.dtype)) for x in (q, k, v))
    columns = [[c.to(where) for c in group] for group in (key_valid, same_value)]
    hides = torch.tensor([len(key_valid) > 0, len(same_value) > 0])
    mask = tree.subtree_end.to(where), tree.depth.to(where), tree.segments, hides, *columns
    tensors = [None if x is None else x.to(where) for x in (q, k, v, sinks)]
    out, lse = torch.ops.pgcompile.prefix_attention(*tensors, *mask, scale, softcap, window, engine)
    return out.to(q.device), lse.to(q.device)


def tree_mask(tree: Tree, window: int | None = None, key_valid=(), same_value=()) -> TreeMask:
    return TreeMask(tree.subtree_end, tree.depth, tree.segments, key_valid, same_value, window)


# Columns by depth.
SAME_VALUE = {
    "large": lambda depth: (1 << 40) + depth // 3,  # equal in their last 32 bits, or nearly
    "apart by 2³²": lambda depth: (depth // 3) << 32,
    "bool": lambda depth: depth % 2 == 0,
    "signed zeros": lambda depth: torch.where(depth % 2 == 0, -0.0, 0.0),
    "nan": lambda depth: torch.where(depth % 3 == 0, torch.nan, 1.0),
    "half": lambda depth: (depth // 3).half(),
}


def visible_keys(tree: Tree, token: int, key_valid=(), same_value=(), window=None) -> list[int]:
    path = tree.path(token)
    return [
        s
        for i, s in enumerate(path)
        if all(c[s] for c in key_valid)
        and all(c[s] == c[token] for c in same_value)
        and (window is None or len(path) - 1 - i < window)
    ]


def brute_force(tree: Tree, q, k, v, sinks=None, scale=0.5, softcap=None, **mask) -> tuple[Tensor, Tensor]:
    """Softmax attention of each token over the keys of its own row, one token and one head at a time.

    A sink is a key of which only the score is known, and whose value is 0.
    """
    group = q.shape[1] // k.shape[1]
    out, lse = [], []
    for head in range(q.shape[1]):
        for token in range(tree.tokens):
            keys = visible_keys(tree, token, **mask)
            if not keys and sinks is None:
                out.append(v.new_zeros(v.shape[-1]))
                lse.append(v.new_tensor(-INF))
                continue
            scores = k[0, head // group, keys] @ q[0, head, token] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head, None]])
            out.append(scores.softmax(-1)[: len(keys)] @ v[0, head // group, keys])
            lse.append(scores.logsumexp(-1))
    shape = 1, q.shape[1], tree.tokens
    return torch.stack(out).view(*shape, -1), torch.stack(lse).view(shape)


def gradients(function, tensors: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Values, and gradients of the first one under a random output gradient."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    values = function(*tensors)
    out, *others = values if isinstance(values, tuple) else (values,)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *others, *torch.autograd.grad(out, tensors, grad)]


def assert_equals_brute_force(tree: Tree, qkv: list[Tensor], engine: str, **mask) -> None:
    """Values, log-sum-exps and gradients, laid out as the contract says."""
    qkv = representable(qkv, engine)
    expected = gradients(lambda *x: brute_force(tree, *x, **mask), qkv)
    actual = gradients(lambda *x: attend(tree, *x, **mask, engine=engine), qkv)
    for a, e in zip(actual, expected, strict=True):
        close_to(a, e, engine)
    out, lse = actual[:2]
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()


# --- prefix_attention
# ---------------------------------------------------------------------------------------------------


def test_helper_tree_is_what_the_op_documents():
    tree = tree_of_rows([[1, 2, 3], [1, 2, 4, 5], [6]])
    assert tree.parent == [-1, 0, 1, 1, 3, -1]
    assert tree.subtree_end.tolist() == [5, 5, 3, 5, 5, 6]
    assert tree.segments.tolist() == [[0, 2, 5, 0, -1], [2, 3, 3, 2, 0], [3, 5, 5, 2, 0], [5, 6, 6, 0, -1]]


@pytest.fixture(params=[name for name in ENGINES if home(name)])
def engine(request):
    """The contract is the same for all."""
    return request.param


def use_small_tiles(monkeypatch, block: int) -> None:
    """Tiles small enough that trees of a few dozen tokens have many, none of the engines' defaults."""
    for module in (reference, cpu):
        monkeypatch.setattr(module, "QUERY_BLOCK", block)
    monkeypatch.setattr(cpu, "MASK_ELEMENTS", block * 4)
    monkeypatch.setattr(cpu, "CAUSAL_TOKENS", block)
    # tl.dot wants 16 at least; once more queries than keys in a tile, once fewer
    tiling = triton.Tiling(16, 32, 1, 1) if block < 16 else triton.Tiling(32, 16, 1, 1)
    monkeypatch.setattr(
        triton, "TILINGS", dict.fromkeys(triton.TILINGS, triton.Tilings(tiling, tiling, tiling))
    )


SHAPES = {
    "plain": {},
    "gqa": {"heads": 6, "key_heads": 2},
    "value size": {"heads": 4, "key_heads": 1, "value_size": 3},
}


@pytest.mark.parametrize("masked", ["nothing", "columns"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_attention_equals_brute_force(seed, shape, block, window, masked, monkeypatch, engine):
    use_small_tiles(monkeypatch, block)
    tree = random_tree(seed)
    qkv = inputs(tree, **SHAPES[shape])
    mask = {"window": window, **(columns(tree, seed) if masked == "columns" else {})}
    expected = gradients(lambda *x: brute_force(tree, *x, **mask), qkv)
    actual = gradients(lambda *x: attend(tree, *x, **mask, engine=engine), qkv)
    for a, e in zip(actual, expected, strict=True):
        close_to(a, e, engine)
    lse = actual[1]
    assert lse.dtype == max(finest(engine), torch.float32, key=lambda dtype: dtype.itemsize)
    assert (lse == -INF).any() == (masked == "columns"), "the columns must leave some query without a key"


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_autocast_around_it_changes_nothing(engine, deterministic):
    tree = random_tree(1)
    qkv = [x.float() for x in inputs(tree)]

    def attention(*tensors):
        with torch.autocast(home(engine).type, torch.bfloat16, enabled=around):
            return attend(tree, *tensors, engine=engine)

    found = []
    for around in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            found.append(gradients(attention, qkv))
    for a, e in zip(*found, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("masked", ["nothing", "columns"])
def test_attention_with_scales_that_are_not_positive(scale, masked, engine):
    tree = random_tree(1)
    mask = columns(tree) if masked == "columns" else {}
    qkv = inputs(tree, heads=4)
    expected = gradients(lambda *x: brute_force(tree, *x, scale=scale, **mask)[0], qkv)
    actual = gradients(lambda *x: attend(tree, *x, scale=scale, **mask, engine=engine)[0], qkv)
    for a, e in zip(actual, expected, strict=True):
        close_to(a, e, engine)


@pytest.mark.parametrize("masked", ["nothing", "columns"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 0.3, 20.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_capped_scores_and_sinks(with_sinks, softcap, window, masked, monkeypatch, engine):
    """Of either sign of the scale, and with a query that sees its sink alone."""
    use_small_tiles(monkeypatch, 3)
    tree = random_tree(1)
    options = {"scale": -1.5 if masked == "nothing" else 1.5, "softcap": softcap, "window": window}
    options |= columns(tree, 1) if masked == "columns" else {}
    tensors = inputs(tree, heads=6, key_heads=2)
    if with_sinks:
        tensors.append(torch.tensor([-2.0, 0.0, 3.0, 0.5, -9.0, 30.0], dtype=torch.float64))
    tensors = representable(tensors, engine)
    expected = gradients(lambda *x: brute_force(tree, *x, **options), tensors)
    actual = gradients(lambda *x: attend(tree, *x, **options, engine=engine), tensors)
    for a, e in zip(actual, expected, strict=True):
        close_to(a, e, engine)


def test_a_sink_that_is_everything(engine):
    """-inf is no sink at all; and where a query sees nothing besides, there is no NaN."""
    tree = random_tree(2)
    q, k, v = inputs(tree)
    for mask in ({}, columns(tree)):
        without = gradients(lambda *x, m=mask: attend(tree, *x, **m, engine=engine), [q, k, v])
        none = torch.full((2,), -INF, dtype=torch.float64)
        with_none = gradients(lambda *x, m=mask: attend(tree, *x, **m, engine=engine), [q, k, v, none])
        assert all(
            torch.equal(a, b) for a, b in zip(with_none, [*without, torch.zeros_like(none)], strict=True)
        )


@pytest.mark.parametrize(
    "rows", [[[1]], [[1], [2], [3]], [[1, 2, 3]]], ids=["one token", "single tokens", "one row"]
)
def test_attention_of_tiny_trees(rows, engine):
    tree = tree_of_rows(rows)
    qkv = inputs(tree)
    expected = gradients(lambda *x: brute_force(tree, *x)[0], qkv)
    for a, e in zip(gradients(lambda *x: attend(tree, *x, engine=engine)[0], qkv), expected, strict=True):
        close_to(a, e, engine)


@pytest.mark.parametrize("engine, dtype", in_dtypes(*cpu.DTYPES))
def test_queries_without_keys_get_zeros_and_no_nan(dtype, engine):
    tree = random_tree(2)
    qkv = [(50 * x).to(dtype) for x in inputs(tree)]
    nothing = torch.zeros(tree.tokens, dtype=torch.bool)
    out, lse = attend(tree, *qkv, key_valid=[nothing], engine=engine)
    assert (out == 0).all() and (lse == -INF).all()
    assert all(
        (g == 0).all()
        for g in gradients(lambda *x: attend(tree, *x, key_valid=[nothing], engine=engine)[0], qkv)
    )
    some = gradients(lambda *x: attend(tree, *x, **columns(tree), engine=engine)[0], qkv)
    assert all(g.isfinite().all() for g in some)
    blind = attend(tree, *qkv, **columns(tree), engine=engine)[1][0, 0] == -INF
    assert (
        blind.any()
        and not blind.all()
        and (some[1][0, :, blind] == 0).all()
        and (some[0][0, :, blind] == 0).all()
    )


@pytest.mark.parametrize("engine", [engine for engine, _ in in_dtypes(torch.float64)])
def test_attention_gradcheck(engine):
    tree = random_tree(3, rows=4, length=4)
    q, k, v = (x.requires_grad_() for x in inputs(tree, heads=4, value_size=3))
    torch.autograd.gradcheck(
        lambda *x: attend(tree, *x, **columns(tree), window=3, engine=engine)[0], (q, k, v)
    )
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *x: attend(tree, *x, softcap=0.8, engine=engine)[0], (q, k, v, sinks))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_attention_with_some_inputs_that_need_no_gradient(wanted, engine, deterministic):
    tree = random_tree(0)
    every = gradients(lambda *x: attend(tree, *x, engine=engine)[0], inputs(tree))[1:]
    qkv = [x.requires_grad_(i in wanted) for i, x in enumerate(inputs(tree))]
    generator = torch.Generator().manual_seed(1)
    out, lse = attend(tree, *qkv, engine=engine)
    assert out.requires_grad and not lse.requires_grad
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64))
    for i, x in enumerate(qkv):
        assert (x.grad is not None) == (i in wanted)
        assert x.grad is None or torch.equal(x.grad, every[i])


@pytest.mark.parametrize("engine, dtype", in_dtypes(torch.float32, torch.bfloat16, torch.float16))
def test_attention_rounds_no_worse_than_sdpa(dtype, engine):
    """Trees of more than one block; truth is float64 on the rounded inputs, the yardstick is SDPA in the
    dtype.
    """
    tree = random_tree(4, rows=24, length=40)
    assert tree.tokens > 3 * reference.QUERY_BLOCK
    qkv = [x.to(dtype) for x in inputs(tree, heads=4, key_heads=2, size=32, value_size=32)]
    mask = tree.visible()

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.2, enable_gqa=True)

    truth = gradients(sdpa, [x.double() for x in qkv])
    theirs, ours = (
        gradients(sdpa, qkv),
        gradients(lambda *x: attend(tree, *x, scale=0.2, engine=engine)[0], qkv),
    )
    for name, t, a, b in zip(["out", "dq", "dk", "dv"], truth, ours, theirs, strict=True):
        our_error, their_error = (a.double() - t).abs().max(), (b.double() - t).abs().max()
        assert a.dtype == dtype and our_error <= 2 * their_error, (name, our_error, their_error)


def test_attention_is_token_major_and_bit_equal_between_runs_and_strides(engine, deterministic):
    tree = random_tree(5)
    qkv = [x.float() for x in inputs(tree, heads=4)]
    first = gradients(lambda *x: attend(tree, *x, engine=engine)[0], qkv)
    assert attend(tree, *qkv, engine=engine)[0].transpose(1, 2).is_contiguous()
    for other in (qkv, [x.contiguous() for x in qkv]):
        again = gradients(lambda *x: attend(tree, *x, engine=engine)[0], other)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("value_size", [2, 4])
@pytest.mark.parametrize("order", ["1HDT", "1TDH", "DT1H"])
def test_attention_of_columns_that_lie_apart(order, value_size, engine):
    tree = random_tree(5)
    qkv = [x.float() for x in inputs(tree, heads=4, value_size=value_size)]
    dims = ["1HTD".index(dim) for dim in order]
    back = [order.index(dim) for dim in "1HTD"]
    apart = [x.permute(dims).contiguous().permute(back) for x in qkv]
    results = [gradients(lambda *x: attend(tree, *x, engine=engine)[0], given) for given in (qkv, apart)]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=5e-6 if finest(engine).itemsize > 2 else 5e-2
        )


def test_cuda_graphs_leave_out_what_reads_host_memory():
    unsafe = {
        name for name in ops.__dict__ if torch.Tag.cudagraph_unsafe in getattr(getattr(ops, name), "tags", ())
    }
    assert unsafe == {"prefix_attention", "prefix_attention_backward"}


def test_attention_refuses_what_does_not_fit():
    tree = random_tree(0)
    q, k, v = inputs(tree, heads=4)
    with pytest.raises(ValueError, match=r"unknown attention engine 'fast'.*auto, reference"):
        attend(tree, q, k, v, engine="fast")
    with pytest.raises(ValueError, match="don't fit"):
        attend(tree, q[:, :3], k, v)
    with pytest.raises(ValueError, match="float32"):
        attend(tree, q, k.float(), v)
    with pytest.raises(ValueError, match=r"4 query heads, but sinks are \(3,\)"):
        attend(tree, q, k, v, q.new_zeros(3))
    with pytest.raises(ValueError, match=r"key_valid\[0\] has 3"):
        attend(tree, q, k, v, key_valid=[torch.ones(3, dtype=torch.bool)])
    with pytest.raises(NotImplementedError, match="second derivative"):
        out = attend(tree, q.requires_grad_(), k, v)[0]
        torch.autograd.grad(out.sum(), q, create_graph=True)[0].sum().backward()


def test_choose_names_engine_and_reason():
    for wish in ("auto", "reference"):
        name, why = choose(wish, torch.device("cpu"), torch.float32)
        assert name in ENGINES and why


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("has_flash", [False, True])
@pytest.mark.parametrize(
    "device, capability", [("cpu", None), ("cuda", (9, 0)), ("cuda", (7, 5)), ("xpu", None)]
)
def test_auto_takes_the_first_engine_that_can(device, capability, has_flash, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: has_flash)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    expected = "cpu" if device == "cpu" else "reference"
    if device == "cuda" and capability >= triton.OLDEST_CAPABILITY and dtype == torch.bfloat16:
        expected = "varlen" if has_flash else "triton"
    if device == "xpu" and dtype == torch.bfloat16:
        expected = "flex"
    name, why = choose("auto", torch.device(device), dtype)
    assert name == expected
    assert ("not triton" in why) == (name in ("flex", "reference"))
    assert ("not flex" in why) == (name == "reference")


def test_doctor_names_every_engine_and_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    line = describe_engines(torch.device("cpu"), torch.float32)
    assert line.startswith("engine cpu; ") and all(name in line for name in ENGINES)
    assert "not triton (it needs a CUDA device" in line and "also reference" in line


@pytest.mark.parametrize(
    "device, dtype, why",
    [
        ("cuda", torch.float64, "float64"),
        ("cuda", torch.float32, "can't be imported"),
        ("cpu", torch.bfloat16, "CUDA"),
        ("xpu", torch.bfloat16, "CUDA"),
    ],
)
def test_an_engine_asked_for_by_name_says_why_it_cannot_run(device, dtype, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)  # an import fails
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"'triton' can't run {dtype} on {device}: .*{why}"):
        choose("triton", torch.device(device), dtype)
    with pytest.raises(ValueError, match=r"'cpu' can't run .*complex64"):
        choose("cpu", torch.device("cpu"), torch.complex64)


# --- gather_tokens
# ------------------------------------------------------------------------------------------------------

gather_tokens = torch.ops.pgcompile.gather_tokens
gather_entries = torch.ops.pgcompile.gather_entries


@pytest.fixture(params=["_segment_sums_by_row", "_segment_sums_in_order"])
def segment_sums(request, monkeypatch):
    """What a CPU uses, and what CUDA does."""
    monkeypatch.setattr(copies, "_segment_sums", getattr(copies, request.param))


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 3), (7, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_gather_tokens_equals_indexing(shape, dtype):
    x = (torch.randn(shape) * 10).to(dtype)
    for source in (x, x.mT.contiguous().mT if x.dim() > 1 else x):
        index = torch.tensor([3, -1, 0, 6, 3, -1, 6])
        out = gather_tokens(source, index)
        assert out.dtype == dtype and torch.equal(out[index >= 0], x[index[index >= 0]])
        assert not out[index < 0].any()
    assert gather_tokens(x[:0], torch.tensor([-1, -1])).shape == (2, *shape[1:])
    assert gather_tokens(x, index[:0]).shape == (0, *shape[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_512_copies_add_up(dtype, segment_sums):
    x = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    gather_tokens(x, torch.tensor([1] * 512 + [-1] * 5 + [2])).sum().backward()
    assert x.grad.tolist() == [[0, 0], [512, 512], [1, 1]]
    logits = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    gather_entries(logits, torch.tensor([1] * 512), torch.full((512, 1), 2)).sum().backward()
    assert logits.grad[1, 2] == 512 and logits.grad.sum() == 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_gradients_are_rounded_once(dtype, segment_sums, monkeypatch):
    """Against a float64 sum: half the last digit, and for float32 what adding 40 numbers costs."""
    monkeypatch.setattr(copies, "SUM_ELEMENTS", 4000)  # several slices of columns
    torch.manual_seed(0)
    index, grad = torch.randint(-1, 50, (2000,)), torch.randn(2000, 5).to(dtype)
    exact = torch.zeros(51, 5, dtype=torch.float64).index_add_(0, index % 51, grad.double())[:50]
    actual = torch.ops.pgcompile.gather_tokens_backward(grad, index, 50)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + 1e-5
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=1e-5)
    assert actual.dtype == dtype


def test_gather_backwards_are_bit_equal_for_any_number_of_threads(segment_sums):
    torch.manual_seed(0)
    index, grad = torch.randint(-1, 300, (20000,)), torch.randn(20000, 16)
    column = torch.randint(0, 5, (20000, 16))
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            tokens = torch.ops.pgcompile.gather_tokens_backward(grad, index, 300)
            narrow = torch.ops.pgcompile.gather_tokens_backward(grad[:, 0], index, 300)
            entries = torch.ops.pgcompile.gather_entries_backward(grad, index, column, 300, 5)
            runs.append(torch.cat([tokens.flatten(), narrow, entries.flatten()]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_complex_gradients_add_up(segment_sums):
    x = torch.randn(4, 3, dtype=torch.complex128, requires_grad=True)
    index = torch.tensor([2, -1, 0, 2, 2])
    grad = torch.randn(5, 3, dtype=torch.complex128)
    gather_tokens(x, index).backward(grad)
    expected = torch.zeros_like(grad[:4]).index_add_(0, index.clamp(min=0), grad * (index >= 0)[:, None])
    torch.testing.assert_close(x.grad, expected)
    column = torch.tensor([1, 7, 0, 1, 2])[:, None]
    x.grad = None
    gather_entries(x, index, column).backward(grad[:, :1])
    expected = torch.zeros_like(expected)
    expected[2, 1], expected[0, 0], expected[2, 2] = grad[0, 0] + grad[3, 0], grad[2, 0], grad[4, 0]
    torch.testing.assert_close(x.grad, expected)


def test_gather_gradcheck(segment_sums):
    index = torch.tensor([3, -1, 0, 3, 3, 1])
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    column = torch.randint(0, 4, (6, 3))
    column[1] = -100
    for function in (lambda x: gather_tokens(x, index), lambda x: gather_entries(x, index, column)):
        assert torch.autograd.gradcheck(function, (x,)) and torch.autograd.gradgradcheck(function, (x,))


# --- gather_entries
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gather_entries_equals_gather(dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 9, dtype=dtype, requires_grad=True)
    index, column = torch.randint(0, 6, (40,)), torch.randint(0, 9, (40, 3))
    hole = torch.arange(40) % 7 == 0
    expected = x[index].gather(1, column) * ~hole[:, None]
    ignored = torch.where(
        hole[:, None], torch.tensor([-100, 9, 2**40]), column
    )  # anything goes where index is -1
    requests = torch.where(hole, -1, index), ignored
    actual = gather_entries(x, *requests)
    assert torch.equal(actual, expected) and torch.equal(
        ops.DECOMPOSITIONS[gather_entries.default](x, *requests), expected
    )
    grad = torch.randint(-3, 4, (40, 3)).to(dtype)  # small integers: every order of adding is exact
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (actual, expected)))


@pytest.mark.parametrize("column", [-1, 9])
def test_gather_entries_raises_like_gather(column):
    x, index, columns_MN = torch.randn(6, 9), torch.tensor([0, 2]), torch.tensor([[1], [column]])
    with pytest.raises(RuntimeError, match="out of"):
        x[index].gather(1, columns_MN)
    with pytest.raises(RuntimeError, match="column out of range"):
        gather_entries(x, index, columns_MN)


def test_gather_entries_of_nothing():
    hole, column = torch.tensor([-1, -1]), torch.tensor([[5], [-3]])
    x = torch.zeros(0, 4, requires_grad=True)
    out = gather_entries(x, hole, column)
    out.sum().backward()
    assert out.tolist() == [[0], [0]] and x.grad.shape == (0, 4)
    assert gather_entries(torch.zeros(3, 4), hole[:0], column[:0]).shape == (0, 1)


# --- tracing
# ------------------------------------------------------------------------------------------------------------


def opcheck_samples() -> dict:
    tree = random_tree(0, rows=5, length=4)
    qkv = [x.float() for x in inputs(tree, heads=4, value_size=3)]
    mask = columns(tree)
    hides = torch.tensor([True, True])
    args = tree.subtree_end, tree.depth, tree.segments, hides, mask["key_valid"], mask["same_value"]
    index, column = torch.tensor([3, -1, 0, 3]), torch.tensor([[1, 2], [-5, 77], [0, 0], [1, 1]])
    x = torch.randn(4, 6)
    return {
        "attention": (
            "prefix_attention",
            (*[x.requires_grad_() for x in (*qkv, torch.zeros(4))], *args, 0.5, 9.0, 3, "auto"),
        ),
        "attention, no columns": (
            "prefix_attention",
            (*qkv, None, *args[:4], [], [], 0.5, None, None, "reference"),
        ),
        "attention, half": (
            "prefix_attention",
            (*[x.bfloat16() for x in qkv], None, *args, 0.5, None, 2, "reference"),
        ),
        "tokens": ("gather_tokens", (x.clone().requires_grad_(), index)),
        "tokens, strided": (
            "gather_tokens",
            (torch.randn(3, 6, 4).mT.transpose(0, 1).requires_grad_(), index),
        ),
        "tokens, integers": ("gather_tokens", (torch.arange(4), index)),
        "tokens backward": ("gather_tokens_backward", (x.clone().requires_grad_(), index, 9)),
        "entries": ("gather_entries", (x.clone().requires_grad_(), index, column)),
        "entries backward": (
            "gather_entries_backward",
            (x[:, :2].clone().requires_grad_(), index, column, 9, 7),
        ),
    }


@pytest.mark.parametrize("sample", opcheck_samples())
def test_opcheck(sample):
    name, args = opcheck_samples()[sample]
    torch.library.opcheck(getattr(torch.ops.pgcompile, name).default, args)


def test_opcheck_of_every_engine(engine):
    name, args = opcheck_samples()["attention"]
    segments, hides = args[6:8]
    *args, _ = at_home(engine, args, segments, hides)
    torch.library.opcheck(getattr(torch.ops.pgcompile, name).default, (*args, engine))


@functools.cache
def packed_batch(seed: int) -> tuple:
    tree = random_tree(seed, rows=4 + 3 * seed)
    torch.manual_seed(seed)
    index = torch.randint(-1, tree.tokens, (3 * tree.tokens,))
    mask = columns(tree, seed)
    return tree, torch.randn(1, tree.tokens, 8), index, torch.randint(0, 16, (len(index), 1)), mask


def small_model(engine, weights, stream, tree_tensors, key_valid, same_value, index, column):
    """What a packed graph looks like: projections, attention, logits, and both gathers before a loss."""
    q, k, v = ((stream @ w).view(1, -1, 2, 4).transpose(1, 2) for w in weights[:3])
    mask = *tree_tensors, key_valid, same_value
    out, _ = torch.ops.pgcompile.prefix_attention(q, k, v, None, *mask, 0.5, None, 3, engine)
    logits = (stream + out.transpose(1, 2).reshape(1, -1, 8)).tanh()[0] @ weights[3]
    rows = torch.ops.pgcompile.gather_tokens(logits.logsumexp(-1), index)
    return (torch.ops.pgcompile.gather_entries(logits, index, column)[:, 0] - rows).square()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compile_serves_every_length(backend, engine):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(small_model, backend=counter, dynamic=True, fullgraph=True)
    torch.manual_seed(0)
    dtype = dtype_for(engine, torch.float32)
    weights = [torch.randn(8, size).to(home(engine), dtype).requires_grad_() for size in (8, 8, 8, 16)]
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    seen = set()
    for seed in range(4):
        tree, stream, index, column, mask = packed_batch(seed)
        seen.add((tree.tokens, len(tree.segments)))
        hides = torch.tensor([True, True])
        args = (
            (tree.subtree_end, tree.depth, tree.segments, hides),
            mask["key_valid"],
            mask["same_value"],
            index,
            column,
        )
        args = at_home(engine, args, tree.segments, hides)
        results = []
        for function in (small_model, compiled):
            x = stream.clone().to(home(engine), dtype).requires_grad_()
            loss = function(engine, weights, x, *args)
            results.append([loss, *torch.autograd.grad(loss.sum(), [x, *weights])])
        for eager, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, eager, rtol=tolerance, atol=tolerance)
    assert len(seen) == 4, "the batches must differ in tokens and segments"
    assert counter.frame_count == 1
