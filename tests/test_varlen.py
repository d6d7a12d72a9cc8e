"""The engine on variable-length flash attention, without a GPU: ATen's operators get an emulation for the CPU."""

import sys

import pytest
import torch
import torch.nn.functional as F

from flash_emulator import Log, flash_attn_package, flash_on_cpu
from harness import BACKEND, differences, random_tree_batch, run
from pgcompile.engines import flash_kernels, reference, varlen
from pgcompile.engines.contract import Scores
from test_ops import (
    Tree,
    assert_equals_brute_force,
    attend,
    close_to,
    columns,
    gradients,
    inputs,
    random_tree,
    tree_mask,
    tree_of_rows,
)
from zoo.nano_gpt import NanoGPT

CPU = torch.device("cpu")
WAYS = ("split", "gather")


@pytest.fixture
def log(monkeypatch):
    """Flash attention runs on the CPU, in any dtype."""
    monkeypatch.setattr(varlen, "why_not", lambda device, dtype: None)
    with_package(monkeypatch, {"flash_attn": None})
    with flash_on_cpu() as log:
        yield log
    flash_kernels.why_no_package.cache_clear()


def with_package(monkeypatch, modules) -> None:
    """With what `import flash_attn` finds; None, and the import fails."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    flash_kernels.why_no_package.cache_clear()


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Either way, whatever it costs; windows that hide something have but one."""

    def calls(mask, heads, key_heads, device):
        if request.param == "split" and mask.window is None:
            return varlen.ancestor_split(mask.segments_M5, device)
        return [varlen.path_gather(mask.segments_M5, mask.window, device)]

    monkeypatch.setattr(varlen, "calls", calls)
    return request.param


def levels(tree: Tree) -> int:
    """Of segments below the roots: by parents, not by the code under test."""
    parent = tree.segments[:, 4].tolist()

    def level(m: int) -> int:
        return 0 if parent[m] < 0 else 1 + level(parent[m])

    return max(level(m) for m in range(len(parent)))


def comb(depth: int) -> Tree:
    """Every token of one row has a second child: segments of one token, as deep as can be."""
    return tree_of_rows([[0] * i + [1] for i in range(depth)])


TREES = {
    "random 0": lambda: random_tree(0),
    "random 1": lambda: random_tree(1, rows=12, length=5),
    "many roots": lambda: tree_of_rows([[n, n, *[i] * (n % 3)] for n in range(9) for i in range(2)]),
    "comb": lambda: comb(9),
    "rows alone": lambda: tree_of_rows([[1, 2, 3], [4], [5, 6]]),
    "single tokens": lambda: tree_of_rows([[1], [2], [3]]),
    "one token": lambda: tree_of_rows([[1]]),
    "answers of one token": lambda: tree_of_rows([[1, 2, 3, n] for n in range(5)]),
}
SHAPES = {
    "plain": {},
    "gqa": {"heads": 6, "key_heads": 2},
    "short values": {"heads": 4, "key_heads": 1, "size": 16, "value_size": 3},
    "long values": {"heads": 2, "key_heads": 1, "size": 8, "value_size": 24},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TREES)
def test_values_and_gradients_equal_brute_force(name, shape, way, log):
    tree = TREES[name]()
    assert_equals_brute_force(tree, inputs(tree, **SHAPES[shape]), "varlen")
    assert log.forward and log.backward, "the kernels never ran"


@pytest.mark.parametrize("window", [1, 2, 3, 6, 100])
@pytest.mark.parametrize("name", TREES)
def test_windows(name, window, log):
    tree = TREES[name]()
    assert_equals_brute_force(tree, inputs(tree, heads=4), "varlen", window=window)
    if window < int(tree.depth.max()) + 1:
        assert {call[2] for call in log.forward + log.backward} == {(window - 1, 0)}


def test_windows_of_one_plan(log, monkeypatch):
    """Each copies other keys; their order is worked out once."""
    tree, made, original = random_tree(1), [], varlen.sums_of_copies
    qkv = inputs(tree, heads=4)
    monkeypatch.setattr(varlen, "sums_of_copies", lambda *given: made.append(1) or original(*given))

    def both(engine):
        def attention(*x):
            return sum(attend(tree, *x, window=window, engine=engine)[0] for window in (2, 4))

        return gradients(attention, qkv)

    expected = both("reference")
    for _ in range(2):
        for actual, wanted in zip(both("varlen"), expected, strict=True):
            close_to(actual, wanted, "varlen")
    assert len(made) == 2


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(scale, way, log):
    tree = random_tree(1)
    assert_equals_brute_force(tree, inputs(tree), "varlen", scale=scale)


@pytest.mark.parametrize("seed", range(4))
def test_calls_and_pairs(seed, way, log):
    """A call for each level and one more, or one; and no pair twice."""
    tree = random_tree(seed, rows=14)
    assert levels(tree) > 2
    gradients(lambda *x: attend(tree, *x, engine="varlen")[0], inputs(tree))
    expected = levels(tree) + 1 if way == "split" else 1
    assert len(log.forward) == len(log.backward) == expected
    for calls in (log.forward, log.backward):
        assert sum(pairs for _, pairs, _ in calls) == int((tree.depth + 1).sum())


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", ["random 1", "comb", "many roots"])
def test_capped_scores_run_on_the_package(name, window, way, log, monkeypatch):
    """And without a cap, it isn't asked."""
    package, tree = Log(), TREES[name]()
    with_package(monkeypatch, flash_attn_package(package, "2.8.3"))
    qkv = inputs(tree, heads=4, key_heads=2)
    for softcap in (None, 0.3, 50.0):
        assert_equals_brute_force(tree, qkv, "varlen", softcap=softcap, window=window)
        used, other = (log, package) if softcap is None else (package, log)
        assert used.forward and used.backward and not other.forward and not other.backward
        for calls in (log.forward, log.backward):
            calls.clear()


def test_a_package_that_is_too_old_is_not_called(log, monkeypatch):
    assert "can't be imported" in varlen.why_not_heads(64, Scores(1.0, 5.0))
    with_package(monkeypatch, flash_attn_package(Log(), "2.6.3"))
    assert "flash-attn 2.6.3 is too old" in varlen.why_not_heads(64, Scores(1.0, 5.0))
    assert varlen.why_not_heads(64, Scores(1.0)) is None
    with_package(monkeypatch, flash_attn_package(Log(), "2.10.0.post1"))
    assert varlen.why_not_heads(64, Scores(1.0, 5.0)) is None


def test_windows_copy_what_they_need():
    """A segment of L tokens sees L + window - 1 at most, however long its path."""
    tree = tree_of_rows([[0] * 40 + [n] * 5 for n in range(1, 4)])
    (call,) = varlen.calls(tree_mask(tree, window=3), 2, 2, CPU)
    assert call.cu_keys.diff().tolist() == [40, 7, 7, 7] and call.max_keys == 40


def test_tokens_that_lie_together_are_not_copied():
    """One prompt with its answers: the only level is a slice."""
    tree = tree_of_rows([[0] * 9 + [n] * 2 for n in range(1, 4)])
    itself, below = varlen.ancestor_split(tree.segments, CPU)
    assert (itself.queries, itself.keys) == (slice(0, 15), slice(0, 15))
    assert (below.queries, below.keys) == (slice(9, 15), slice(0, 9))


@pytest.mark.parametrize(
    ("rows", "heads", "split"),
    [
        ([[0] * 100 + [n] * 20 for n in range(1, 9)], (8, 8), True),  # answers to a long prompt
        ([[0] * 100 + [n] * 20 for n in range(1, 9)], (8, 2), True),
        ([[0] * 2 + [n] * 60 for n in range(1, 9)], (8, 1), False),  # merging 8 heads for a short prompt
        ([[n] * 30 for n in range(8)], (8, 8), True),  # nothing is shared: one call, no copies
    ],
)
def test_the_way_that_moves_fewer_bytes(rows, heads, split):
    tree = tree_of_rows(rows)
    longest = int(tree.depth.max()) + 1
    for window in (None, longest):
        calls = varlen.calls(tree_mask(tree, window), *heads, CPU)
        assert isinstance(calls[0].keys, slice) == split
        assert {call.window_size for call in calls} <= {varlen.CAUSAL, varlen.EVERYTHING}
    (call,) = varlen.calls(tree_mask(tree, longest - 1), *heads, CPU)
    assert call.window_size == (longest - 2, 0)


def test_tensors_of_any_strides(way, log):
    """The kernels want numbers of a head side by side, and 16 bytes from a multiple of 16 bytes."""
    tree = random_tree(5)
    qkv = inputs(tree, heads=3, key_heads=3, size=8, value_size=8)
    expected = gradients(lambda *x: attend(tree, *x, engine="reference")[0], qkv)
    for stride in (head_major, every_second_number, one_of_a_fused_projection, off_the_grid):
        actual = gradients(lambda *x: attend(tree, *x, engine="varlen")[0], [stride(x) for x in qkv])
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


def head_major(x):
    return x.contiguous()


def every_second_number(x):
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def one_of_a_fused_projection(x):
    """[T, heads, 4 + size], the first 4 belong to somebody else."""
    return torch.cat([x[..., :4], x], -1)[..., 4:]


def off_the_grid(x):
    """Contiguous, but 4 numbers into its memory."""
    token_major = x.transpose(1, 2)
    return torch.cat([x.new_empty(4), token_major.flatten()])[4:].view(token_major.shape).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_no_worse_than_sdpa(dtype, way, log):
    """Truth is float64 on the rounded inputs, the yardstick SDPA in the dtype."""
    tree = random_tree(4, rows=24, length=20)
    qkv = [x.to(dtype) for x in inputs(tree, heads=4, key_heads=2, size=32, value_size=32)]
    mask = tree.visible()

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.2, enable_gqa=True)

    truth, theirs = gradients(sdpa, [x.double() for x in qkv]), gradients(sdpa, qkv)
    ours = gradients(lambda *x: attend(tree, *x, scale=0.2, engine="varlen")[0], qkv)
    for name, t, a, b in zip(["out", "dq", "dk", "dv"], truth, ours, theirs, strict=True):
        our_error, their_error = (a.double() - t).abs().max(), (b.double() - t).abs().max()
        assert a.dtype == dtype and our_error <= 2 * their_error, (name, our_error, their_error)


def test_gradients_of_510_answers_add_up_in_float32(way, log):
    """Each answer gives the prompt's only token a gradient of 1/2: sums in bfloat16 stop at 128."""
    tree = tree_of_rows([[0, n] for n in range(1, 511)])
    zeros = torch.zeros(1, 1, tree.tokens, 8, dtype=torch.bfloat16)
    v = zeros.clone().requires_grad_()
    attend(tree, zeros, zeros, v, engine="varlen")[0].sum().backward()
    assert (v.grad[0, 0, 0] == 1 + 510 / 2).all() and (v.grad[0, 0, 1:] == 0.5).all()


@pytest.mark.parametrize(
    "case", ["holes", "documents", "long heads", "many segments", "short segments", "softcap"]
)
def test_what_the_kernels_cannot_do_runs_on_reference(case, log, monkeypatch):
    tree = random_tree(2)
    qkv = inputs(tree, size=264 if case == "long heads" else 8)
    mask = {}
    if case in ("holes", "documents"):
        name = "key_valid" if case == "holes" else "same_value"
        mask = {name: columns(tree)[name]}
    if case == "many segments":
        monkeypatch.setattr(varlen, "MAX_SEQUENCES", len(tree.segments) - 1)
    if case == "short segments":  # 128 rows, 2 heads of 8 and 4 bytes for each
        monkeypatch.setattr(varlen, "MAX_SCRATCH", 8192 * len(tree.segments) - 1)
    softcap = 5.0 if case == "softcap" else None
    why = varlen.why_not_heads(qkv[0].shape[-1], Scores(1.0, softcap)) or varlen.why_not_call(
        tree_mask(tree, **mask), qkv[0], qkv[2]
    )
    words = {
        "holes": "mask",
        "documents": "mask",
        "long heads": "264",
        "many segments": "sequences",
        "short segments": "MiB",
        "softcap": "cap",
    }
    assert why is not None and words[case] in why
    results = [
        gradients(lambda *x, e=engine: attend(tree, *x, **mask, softcap=softcap, engine=e)[0], qkv)
        for engine in ("varlen", "reference")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not log.forward and not log.backward


@pytest.mark.parametrize("inner_compiler", ["eager", "inductor"])
def test_a_model_packs_and_runs_on_it(inner_compiler, log):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = NanoGPT().double(), random_tree_batch(rows=6, positions=12, seed=1)
    options = {"inner": inner_compiler, "engine": "varlen", "min_saving": 0}
    compiled = torch.compile(model, backend=BACKEND, options=options)
    expected = run(model, (), batch.inputs)
    actual = run(compiled, (), batch.inputs, owner=model)
    assert not differences(actual, expected, 1e-10, 1e-9)
    assert log.forward and len(log.forward) == len(log.backward)


def test_why_not(monkeypatch):
    """Without a GPU, the reasons one by one."""
    gpu = torch.device("cuda", 0)
    assert "NVIDIA" in varlen.why_not(CPU, torch.bfloat16)
    assert "float32" in varlen.why_not(gpu, torch.float32) and "float64" in varlen.why_not(gpu, torch.float64)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "built without" in varlen.why_not(gpu, torch.float16)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for capability, runs in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert (varlen.why_not(gpu, torch.bfloat16) is None) == runs
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in varlen.why_not(gpu, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 3])
def test_the_operators_take_the_calls(window):
    """By their meta kernels: shapes and dtypes of what comes back from the real operators."""
    tree = random_tree(0)
    plain = varlen.ancestor_split(tree.segments, CPU)
    windowed = [varlen.path_gather(tree.segments, window, CPU)]
    for call in plain if window is None else windowed:
        queries, keys = int(call.cu_queries[-1]), int(call.cu_keys[-1])
        call = type(call)(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in call))
        with torch.device("meta"):
            q, grad_out, out = torch.empty(3, tree.tokens, 4, 16, dtype=torch.bfloat16)
            k, v = torch.empty(2, tree.tokens, 2, 16, dtype=torch.bfloat16)
            lse = torch.empty(tree.tokens, 4)
        part, part_lse = flash_kernels.forward(call, q, k, v, Scores(0.5))
        assert part.shape == (queries, 4, 16) and part.dtype == torch.bfloat16
        assert part_lse.shape == (4, queries) and part_lse.dtype == torch.float32
        dq, dk, dv = flash_kernels.backward(call, [grad_out, q, k, v, out], lse, Scores(0.5))
        assert dq.shape == (queries, 4, 16) and dk.shape == dv.shape == (keys, 2, 16)


def test_the_emulation_is_sdpa():
    """For one sequence, and with more keys than queries from the bottom right."""
    q, k, v = torch.randn(3, 2, 8), torch.randn(5, 1, 8), torch.randn(5, 1, 8)
    cu = [torch.tensor([0, n], dtype=torch.int32) for n in (3, 5)]
    with flash_on_cpu():
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *cu, 3, 5, 0.0, True, False, scale=0.5, window_size_left=-1, window_size_right=0
        )
    mask = torch.ones(3, 5).tril(2).bool()
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), mask, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(out.transpose(0, 1)[None], expected)
    assert lse.shape == (2, 3) and reference.compute_dtype(q) == lse.dtype
