"""Every rule against its oracle, by enumeration: `op(pack(x)) == pack(op(x))`, `unpack(op(pack(x))) == op(x)`.

`tests/rule_samples.py` has the calls. For each of them, on batches of several sizes with random trees of tokens, the
walk applies the rule, the lowering writes the packed graph, and both graphs run; `pack`, `place` and the dependence of
results on tokens are found here by brute force, independently of the compiler.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.testing import assert_close

from pgcompile.backend import pack_column
from pgcompile.passes.attention_match import match_attention
from pgcompile.passes.layout import POSITION, ROW, Selection, TokenLayout, view_dims
from pgcompile.passes.lower import Lowering
from pgcompile.passes.original import Original
from pgcompile.passes.padding import Guards
from pgcompile.passes.propagate import Analysis, _Walk
from pgcompile.passes.reasons import Unsupported
from pgcompile.passes.rules import RULES, STREAM, pointwise_rule
from pgcompile.passes.seeds import Seeds
from pgcompile.prefix_tree import PrefixTree, build_prefix_tree
from rule_samples import SAMPLES, Call, Sample, Tensor

aten = torch.ops.aten

# (N, S): generic; N = S = a head's width; N = heads; S = hidden size; one row; one position; one token
SIZES = [(4, 5), (4, 4), (3, 5), (4, 6), (1, 5), (4, 1), (1, 1)]
GENERIC = SIZES[0]
TOLERANCE = dict(
    rtol=1e-12, atol=1e-12, equal_nan=True
)  # sums of other shapes round differently; a bug is O(1)


# ---------------------------------------------------------------------------------------------------------------------
# batches: random trees of tokens, and values that are functions of the class
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """N rows of S positions; `class_of` is -1 where a token is dropped."""

    n: int
    s: int
    prefix_tree: PrefixTree
    random: torch.Generator

    @functools.cached_property
    def class_of(self) -> torch.Tensor:
        return torch.from_numpy(self.prefix_tree.class_of)

    @functools.cached_property
    def row(self) -> torch.Tensor:
        return torch.from_numpy(self.prefix_tree.row)

    @functools.cached_property
    def position(self) -> torch.Tensor:
        return torch.from_numpy(self.prefix_tree.position)

    @property
    def tokens(self) -> int:
        return self.prefix_tree.tokens

    # pack_column takes a plan; it reads these of it, and `row` and `position` of its tree

    @property
    def tree(self) -> Batch:
        return self

    @property
    def rows(self) -> int:
        return self.n

    @property
    def positions(self) -> int:
        return self.s


def make_batch(n: int, s: int, seed: int, drops: bool, position_is_key: bool) -> Batch:
    """Rows over two letters, so that many share their first tokens."""
    random = np.random.default_rng([n, s, seed])
    codes = random.integers(0, 2, (n, s)) * (random.random((n, 1)) < 0.8)
    if position_is_key:
        codes = codes * s + np.arange(s)
    first, end = np.zeros(n, np.int64), np.full(n, s)
    if drops:
        first = random.integers(0, (s + 1) // 2, n)
        end = random.integers(first, s + 1)
        first[0], end[0] = 0, s
    generator = torch.Generator().manual_seed(seed)
    return Batch(n, s, build_prefix_tree(codes.astype(np.int64), first, end), generator)


def factors_of(dims: tuple[Any, ...]) -> list[list[Any]]:
    """`("N*3", "S", 4)` → [["N", 3], ["S"], [4]]; size 1 has no factor."""
    split = [
        [int(f) if f.isdigit() else f for f in d.split("*")] if isinstance(d, str) else [d] for d in dims
    ]
    return [[f for f in dim if f != 1] for dim in split]


def place(value: torch.Tensor, dims: Any) -> torch.Tensor:
    """`[N, S, *plain sizes]` (or without N or S, if `dims` has none) in the order of `dims`, products flattened."""
    factors = [f for dim in dims for f in dim]
    tokens = [f for f in (ROW, POSITION) if f in factors]
    rest = iter(range(len(tokens), value.dim()))
    value = value.permute([tokens.index(f) if isinstance(f, str) else next(rest) for f in factors])
    sizes = iter(value.shape)
    return value.reshape([math.prod(next(sizes) for _ in dim) for dim in dims]).contiguous()


def pack(value: torch.Tensor, dims: Any, batch: Batch) -> torch.Tensor:
    """The representatives of a dense value: rows get size 1, positions size T."""
    sizes = {ROW: batch.n, POSITION: batch.s}
    factors = [f for dim in dims for f in dim]
    for i, dim in enumerate(dims):  # a value per row that is aligned with positions has size 1 there
        if len(dim) == 1 and value.shape[i] == 1:
            value = value.expand([*value.shape[:i], sizes.get(dim[0], dim[0]), *value.shape[i + 1 :]])
    value = value.reshape([sizes.get(f, f) for f in factors])
    for factor in (POSITION, ROW):
        if factor not in factors:
            value, factors = value.unsqueeze(0).expand(sizes[factor], *value.shape), [factor, *factors]
    value = value.movedim((factors.index(ROW), factors.index(POSITION)), (0, 1))[batch.row, batch.position]
    plain_sizes = list(value.shape[1:])
    present = [f for dim in dims for f in dim]
    holder = POSITION if POSITION in present else ROW
    before = sum(not isinstance(f, str) for f in present[: present.index(holder)])
    value = value.movedim(0, before)  # one dim of T among the plain ones; the other token dim has size 1
    sizes = {holder: batch.tokens, ROW if holder == POSITION else POSITION: 1}
    assert list(value.shape) == [*plain_sizes[:before], batch.tokens, *plain_sizes[before:]]
    return value.reshape([math.prod(sizes.get(f, f) for f in dim) for dim in dims]).contiguous()


def random_values(spec: Tensor, shape: Any, batch: Batch) -> torch.Tensor:
    if spec.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=batch.random).bool()
    if spec.dtype == torch.int64:
        high = spec.high(batch.n, batch.s) if callable(spec.high) else spec.high
        return torch.randint(0, high, shape, generator=batch.random)
    return torch.randn(shape, generator=batch.random, dtype=spec.dtype)


def sizes_of(spec: Tensor, n: Any, s: Any) -> list[Any]:
    """The sizes of a tensor argument, for ints or SymInts."""
    if not any(isinstance(d, str) for d in spec.dims):
        return [d(n, s) if callable(d) else d for d in spec.dims]
    sizes = [d(n, s) if callable(d) else d for d in spec.dims]
    if any(isinstance(d, str) for d in sizes):
        sizes = [
            math.prod([{ROW: n, POSITION: s}.get(f, f) for f in dim]) for dim in factors_of(tuple(sizes))
        ]
    return sizes


def materialize(spec: Tensor, batch: Batch, zero_dropped: bool) -> torch.Tensor:
    """A dense value; tokens of one class get one value, dropped tokens any (or zero, as unpacked values have)."""
    n, s = batch.n, batch.s
    if spec.kind in ("data", "weight", "late"):
        return random_values(spec, sizes_of(spec, n, s), batch)
    dims = factors_of(tuple(d(n, s) if callable(d) else d for d in spec.dims))
    rest = [f for dim in dims for f in dim if not isinstance(f, str)]
    has = [f for f in (ROW, POSITION) if any(f in dim for dim in dims)]
    if not has:
        return random_values(spec, sizes_of(spec, n, s), batch)
    if has == [POSITION]:
        return place(random_values(spec, [s, *rest], batch), dims)
    value = random_values(spec, [n, s, *rest], batch)
    kept = batch.class_of >= 0
    table = random_values(spec, [batch.tokens, *rest], batch)
    if has == [ROW]:  # rows that share a token share their root
        root = batch.class_of[torch.arange(n), kept.long().argmax(1)]
        value = torch.where(root.view(-1, *[1] * len(rest)) >= 0, table[root], value[:, 0])
        return place(value, dims)
    value[kept] = table[batch.class_of[kept]]
    if zero_dropped:
        value[~kept] = 0
    return place(value, dims)


# ---------------------------------------------------------------------------------------------------------------------
# the machinery: a graph of one call, the walk, the lowering
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def symbolic_sizes(n: int, s: int) -> tuple[FakeTensorMode, Any, Any]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    sizes = mode.from_tensor(torch.empty(n, s), symbolic_context=context).shape
    return mode, *sizes


STATIC = FakeTensorMode()


class Graph:
    """The graph of a sample, fake values included, as the compiler has it.

    Args:
        symbolic: are N and S SymInts, as under dynamic shapes?
    """

    def __init__(self, sample: Sample, n: int, s: int, symbolic: bool = False) -> None:
        self.call = sample.call
        self.mode, self.n, self.s = symbolic_sizes(n, s) if symbolic else (STATIC, n, s)
        self.sizes = (n, s)
        self.graph = fx.Graph()
        self.specs: dict[Tensor, fx.Node] = {}
        self.numbers: list[int] = []
        self.whole = Selection(self.n, self.s)
        self.layouts: dict[fx.Node, TokenLayout] = {}
        self.calls: dict[Call, fx.Node] = {}
        self.collect(sample.call)
        self.node = self.add(sample.call)
        value = self.node.meta["val"]
        self.results = [self.node]
        if isinstance(value, (tuple, list)):
            self.results = [self.item(i, v) for i, v in enumerate(value)]
        self.graph.output(tuple(self.results))

    @functools.cached_property
    def gm(self) -> fx.GraphModule:
        return fx.GraphModule({}, self.graph)

    def run(self, inputs: list[Any]) -> list[torch.Tensor]:
        """The operation itself on dense values."""
        values = dict(zip(self.specs, inputs))
        found = self.evaluate(self.call, values)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def evaluate(self, arg: Any, values: dict[Tensor, torch.Tensor]) -> Any:
        if isinstance(arg, Tensor):
            return values[arg]
        if isinstance(arg, list):
            return [self.evaluate(a, values) for a in arg]
        if isinstance(arg, Call):
            args = [self.evaluate(a, values) for a in arg.args]
            return arg.op(*args, **{k: self.evaluate(v, values) for k, v in arg.kwargs.items()})
        return arg(*self.sizes) if callable(arg) and not isinstance(arg, torch.dtype) else arg

    def collect(self, arg: Any) -> None:
        """Placeholders come first."""
        if isinstance(arg, Tensor) and arg not in self.specs:
            self.specs[arg] = self.placeholder(arg)
        for part in (
            (*arg.args, *arg.kwargs.values())
            if isinstance(arg, Call)
            else arg
            if isinstance(arg, list)
            else ()
        ):
            self.collect(part)

    def placeholder(self, spec: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"{spec.kind}_{len(self.specs)}")
        with self.mode:
            node.meta["val"] = torch.empty(sizes_of(spec, self.n, self.s), dtype=spec.dtype)
        node.meta["is_parameter"] = spec.kind == "weight"
        node.meta["requires_grad"] = spec.kind in ("weight", "stream")  # the prologue is what needs neither
        if spec.kind == "stream":
            self.layouts[node] = TokenLayout(tuple(map(tuple, factors_of(spec.dims))), self.whole)
        return node

    def add(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self.specs[arg]
        if isinstance(arg, list):
            return [self.add(a) for a in arg]
        if callable(arg) and not isinstance(arg, (Call, torch.dtype)):
            return self.number(arg(self.n, self.s), arg(*self.sizes))
        if not isinstance(arg, Call):
            return arg
        if arg in self.calls:
            return self.calls[arg]
        args, kwargs = tuple(map(self.add, arg.args)), {k: self.add(v) for k, v in arg.kwargs.items()}
        node = self.graph.call_function(arg.op, args, kwargs)
        with self.mode, enable_python_dispatcher():
            fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = arg.op(*fake_args, **fake_kwargs)
        self.calls[arg] = node
        return node

    def number(self, symbolic: Any, value: Any) -> Any:
        """Sizes of the batch among the arguments are inputs of the graph, if they are symbolic."""
        if isinstance(value, (list, tuple)):
            return [self.number(a, b) for a, b in zip(symbolic, value, strict=True)]
        if isinstance(symbolic, int):
            return value
        with self.graph.inserting_after(list(self.graph.find_nodes(op="placeholder"))[-1]):
            node = self.graph.placeholder(f"size_{len(self.numbers)}")
        node.meta["val"] = symbolic
        self.numbers.append(value)
        return node

    def item(self, i: int, value: Any) -> fx.Node:
        node = self.graph.call_function(operator.getitem, (self.node, i))
        node.meta["val"] = value
        return node

    def analyse(self, sample: Sample) -> Analysis:
        early = set() if sample.late else None
        return _Walk(self.graph, Seeds(self.layouts, self.whole), sample.dropout, False, early, {}).run()

    def values(self, batch: Batch, zero_dropped: bool) -> list[Any]:
        return [*(materialize(spec, batch, zero_dropped) for spec in self.specs), *self.numbers]


class Recorder(fx.Interpreter):
    """Keeps the value of every node, by name."""

    def run_node(self, n: fx.Node) -> Any:
        self.values = getattr(self, "values", {})
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def verdict(analysis: Analysis, node: fx.Node) -> str:
    """ "packs", or the kind of the refusal."""
    value = analysis.values[node]
    if value.reason is not None:
        return value.reason.kind
    assert value.kind == STREAM or value.outcome is not None, f"{node} is {value.kind}"
    return "packs"


class _Lowering(Lowering):
    def _check_tables(self) -> None:
        """Tables may leave the stream: their packed values are what is compared."""


def run_packed(
    graph: Graph, analysis: Analysis, batch: Batch, inputs: list[Any]
) -> tuple[Any, list[Any], list[Any]]:
    """Lower and run, as backend.py does.

    Returns:
        The layouts of the results, the packed results (None where they are late), the unpacked results.
    """
    matches = [match_attention(node, analysis) for node in analysis.mixers]
    assert not any(isinstance(m, Unsupported) for m in matches), matches
    lowering = _Lowering(Original(graph.gm, analysis, matches, Guards(), "reference"))
    graphs = lowering.run()
    assert not isinstance(graphs, Unsupported), graphs
    results = graphs.prologue(*inputs)
    tree = batch.prefix_tree
    tensors = dict(
        subtree_end=torch.from_numpy(tree.subtree_end), depth=torch.from_numpy(tree.depth),
        segments=torch.from_numpy(tree.segments), positions=batch.position,
    )  # fmt: skip
    token_of = batch.class_of  # with -1: zeros at dropped tokens, as the inputs have
    sources = dict(argument=inputs, prologue=results, class_of=[batch.class_of], token_of=[token_of])
    requests = graphs.requests(*[sources[source][index] for source, index in graphs.request_inputs])
    packed_inputs = []
    for spec in graphs.inputs:
        if spec.kind == "column":
            packed_inputs.append(pack(results[spec.index], spec.dims, batch))
        elif spec.kind in ("request_index", "request_column"):
            packed_inputs.append(requests[spec.index][spec.kind == "request_column"])
        elif spec.kind == "hides":
            packed_inputs.append(torch.tensor([True, True]))
        else:
            packed_inputs.append({"argument": inputs, "value": results}.get(spec.kind, tensors)[
                spec.kind if spec.kind in tensors else spec.index
            ])  # fmt: skip
    recorder = Recorder(graphs.packed)
    packed = recorder.run(*packed_inputs, enable_io_processing=False)
    sources["packed"] = packed
    late = [sources[source][index] for source, index in graphs.late_inputs]
    found = [lowering.packed.env.get(node) for node in graph.results]
    layouts = [(analysis.values[node].layouts or (None,))[0] for node in graph.results]
    unpacked = None
    if all(layout is None or layout.has(ROW) or not layout.selection.is_whole for layout in layouts):
        unpacked = graphs.late(*late)
    return layouts, [recorder.values.get(node.name) if node else None for node in found], unpacked


# ---------------------------------------------------------------------------------------------------------------------
# brute force: which tokens does a result depend on?
# ---------------------------------------------------------------------------------------------------------------------


def perturbed(graph: Graph, inputs: list[Any], batch: Batch, n: int, s: int) -> list[Any]:
    """The inputs with other values of token (n, s) on the stream."""
    at = torch.zeros(batch.n, batch.s, dtype=torch.bool)
    at[n, s] = True
    out = list(inputs)
    tables_only = not any(varies_by_row(spec) for spec in graph.specs)
    for i, spec in enumerate(graph.specs):
        if spec.kind == "stream" and (tables_only or varies_by_row(spec)):
            out[i] = torch.where(
                owned(factors_of(spec.dims), at, inputs[i].shape), _other(inputs[i], spec), inputs[i]
            )
    return out


def varies_by_row(spec: Tensor) -> bool:
    return spec.kind == "stream" and any(ROW in dim for dim in factors_of(spec.dims))


def _other(x: torch.Tensor, spec: Tensor) -> torch.Tensor:
    if x.dtype == torch.bool:
        return ~x
    return (x + 1) % spec.high if x.dtype == torch.int64 else x * 1.7 + 0.3


def owned(dims: Any, at: torch.Tensor, shape: Any) -> torch.Tensor:
    """A value per token, bool or int `[N, S]`, for every element of a tensor with the layout `dims`.

    For a table by position, that of the first row.
    """
    factors = [f for dim in dims for f in dim]
    value = at if ROW in factors else at[at.any(1).long().argmax()]
    value = value if POSITION in factors else value[..., 0]
    rest = [f for f in factors if not isinstance(f, str)]
    value = value.reshape([*value.shape, *[1] * len(rest)]).expand(*value.shape, *rest)
    return place(value, dims).expand(shape)


def changes(graph: Graph, batch: Batch, inputs: list[Any]) -> dict[tuple[int, int], list[torch.Tensor]]:
    """For each token, which elements of the results differ when it does."""
    base = graph.run(inputs)
    found = {}
    rows = range(batch.n) if any(map(varies_by_row, graph.specs)) else range(1)
    for token in itertools.product(rows, range(batch.s)):
        other = graph.run(perturbed(graph, inputs, batch, *token))
        found[token] = [~((a == b) | ((a != a) & (b != b))) for a, b in zip(base, other)]
    return found


def evidence(sample: Sample) -> str:
    """Why a refusal is right, found by running the operation itself; "" if nothing was found."""
    sizes = (*sample.sizes, GENERIC)[0]
    graph = graph_of(sample, *sizes)
    batch = make_batch(*sizes, seed=0, drops=False, position_is_key=True)
    inputs = graph.values(batch, False)
    if any(not torch.equal(a, b) for a, b in zip(graph.run(inputs), graph.run(inputs))):
        return "draws random numbers"
    effect = changes(graph, batch, inputs)
    outs = range(len(graph.results))
    if any((sum(c[i].long() for c in effect.values()) > 1).any() for i in outs):
        return "several tokens enter one number"
    for i in outs:
        seen = [bool(c[i].any()) for c in effect.values()]
        if any(seen) and not all(seen):
            return "leaves tokens out"
    own = next(p for p in graph.specs if p.kind == "stream")
    for i, node in enumerate(graph.results):
        origin = torch.full(tuple(node.meta["val"].shape), -1)
        for t, c in enumerate(effect.values()):
            origin[c[i]] = t
        if (origin >= 0).any() and not (origin >= 0).all():
            return "has entries of no token"
        if (origin < 0).all():
            continue
        if origin.shape == torch.Size(sizes_of(own, *sizes)):
            ids = torch.arange(batch.n * batch.s).view(batch.n, batch.s)
            if not torch.equal(origin, owned(factors_of(own.dims), ids, origin.shape)):
                return "moves tokens"
        if not (_is_factor(origin // batch.s, batch.n) and _is_factor(origin % batch.s, batch.s)):
            return "tears tokens apart"
    return _differs(graph, batch, inputs, own)


def _is_factor(index: torch.Tensor, size: int) -> bool:
    """Is a row or position number `(i // inner) % size` of the index i in one dim, as a layout can say?"""
    varies = [d for d in range(index.dim()) if (index != index.narrow(d, 0, 1)).any()]
    if len(varies) != 1:
        return not varies
    line = index.movedim(varies[0], 0).flatten(1)[:, 0] if index.dim() > 1 else index
    i = torch.arange(len(line))
    return any(torch.equal(line, i // inner % size) for inner in range(1, len(line) + 1))


def _differs(graph: Graph, batch: Batch, inputs: list[Any], own: Tensor) -> str:
    """For results shaped like x: is `op(pack(x))` something else than `pack(op(x))`?"""
    dims = factors_of(own.dims)
    packed = [
        pack(v, factors_of(s.dims), batch) if s.kind == "stream" else v for v, s in zip(inputs, graph.specs)
    ]
    dense = graph.run(inputs)[0]
    if dense.shape != inputs[list(graph.specs).index(own)].shape:
        return ""
    try:
        found = graph.run(packed)[0]
    except (RuntimeError, IndexError):
        return ""
    expected = pack(dense, dims, batch)
    return (
        ""
        if found.shape == expected.shape and torch.allclose(found, expected)
        else "reads where a token stands"
    )


# ---------------------------------------------------------------------------------------------------------------------
# the tests
# ---------------------------------------------------------------------------------------------------------------------


graph_of = functools.lru_cache(maxsize=8)(Graph)


def rule_of(sample: Sample) -> Any:
    return RULES.get(sample.call.op, pointwise_rule)


def fits(sample: Sample, n: int, s: int) -> bool:
    """Is the call valid for these sizes? (A slice from 1 to 3 of one position may be empty, or an error.)"""
    try:
        graph_of(sample, n, s)
    except Exception:
        return False
    return True


by_rule: dict[str, list[Sample]] = {}
for sample in SAMPLES:
    by_rule.setdefault(f"{rule_of(sample).__name__}", []).append(sample)


def is_table(sample: Sample) -> bool:
    graph = graph_of(sample, *GENERIC)
    kinds = [factors_of(p.dims) for p in graph.specs if p.kind in ("stream", "column")]
    return any(not any(ROW in dim for dim in dims) for dims in kinds) or any(s is None for s in kinds)


def check_accepted(sample: Sample, n: int, s: int, seed: int, symbolic: bool) -> None:
    graph = graph_of(sample, n, s, symbolic)
    analysis = graph.analyse(sample)
    value = analysis.values[graph.node]
    assert verdict(analysis, graph.node) == "packs", value.reason
    layouts = value.layouts
    as_is = value.kind == STREAM and all(layout.selection.is_whole for layout in layouts)
    is_attention = any(
        v.outcome is not None and v.outcome.action == "attention" for v in analysis.values.values()
    )
    batch = make_batch(n, s, seed, drops=seed % 2 == 1 and not is_attention, position_is_key=is_table(sample))
    inputs = graph.values(batch, zero_dropped=not as_is)
    labels = None if as_is else _ignore_dropped(sample, graph, inputs, batch)
    expected = graph.run(inputs if labels is None else labels)
    layouts, packed, unpacked = run_packed(graph, analysis, batch, inputs if labels is None else labels)
    kept = batch.class_of >= 0
    for i, (layout, want) in enumerate(zip(layouts, expected)):
        if sample.shape_only:
            assert unpacked is None or unpacked[i].shape == want.shape
            continue
        if as_is:
            assert_close(packed[i], pack(want, layout.dims, batch), **TOLERANCE)
        if unpacked is not None:
            assert unpacked[i].shape == want.shape and unpacked[i].dtype == want.dtype
            mask = owned(layout.dims, kept, want.shape) if as_is else torch.ones_like(want, dtype=torch.bool)
            assert_close(unpacked[i][mask], want[mask], **TOLERANCE)
    if as_is and seed == 0 and not symbolic and not sample.shape_only:
        check_dependence(graph, layouts, batch, inputs)


def _ignore_dropped(sample: Sample, graph: Graph, inputs: list[Any], batch: Batch) -> list[Any]:
    """Labels of a loss where tokens are dropped: `ignore_index`, or the padding would not have been dropped."""
    if "loss" not in sample.call.op._schema.name or (batch.class_of >= 0).all():
        return inputs
    ignored = sample.call.args[4] if len(sample.call.args) > 4 else -100
    out = list(inputs)
    for i, spec in enumerate(graph.specs):
        if spec.kind == "late":
            dims = factors_of(spec.dims)
            kept = batch.class_of >= 0
            kept = kept[:, -1] if not any(POSITION in dim for dim in dims) else place(kept, dims)
            out[i] = torch.where(kept, inputs[i], ignored)
    return out


def check_dependence(graph: Graph, layouts: Any, batch: Batch, inputs: list[Any]) -> None:
    """A token's result depends on that token alone; through attention, on those before it in its row."""
    is_attention = "attention" in str(graph.node.target)
    ids = torch.arange(batch.n * batch.s).view(batch.n, batch.s)
    for (n, s), changed in changes(graph, batch, inputs).items():
        for layout, elements in zip(layouts, changed):
            owner = owned(layout.dims, ids, elements.shape)[elements]

            wrong = owner != n * batch.s + s
            if not any(map(varies_by_row, graph.specs)):  # a table, for all rows
                wrong = owner % batch.s != s
            if is_attention:
                wrong = (owner // batch.s != n) | (owner % batch.s < s)
            assert not wrong.any(), f"token {(n, s)} enters the results of {owner[wrong].unique().tolist()}"


@pytest.mark.parametrize("rule", by_rule)
def test_rule(rule: str) -> None:
    """Accepted calls are exact on every batch, refused ones really can't be packed; no coincidence changes that."""
    failures = []
    for index, sample in enumerate(by_rule[rule]):
        try:
            check_sample(sample, index)
        except Exception as error:
            failures.append(f"{sample}: {type(error).__name__}: {error}")
    assert not failures, f"{len(failures)} of {len(by_rule[rule])}:\n" + "\n".join(failures)


def check_sample(sample: Sample, index: int = 0) -> None:
    generic = (*sample.sizes, GENERIC)[0]
    assert fits(sample, *generic), "not a valid call"
    if sample.packs:
        check_accepted(sample, *generic, 0, symbolic=False)
        if min(generic) > 1:
            check_accepted(sample, *generic, 1, symbolic=True)
    else:
        graph = graph_of(sample, *generic)
        assert verdict(graph.analyse(sample), graph.node) != "packs", "accepted"
        assert sample.conservative or evidence(sample), "refused without need"
    rotating = (SIZES[1 + index % 3], SIZES[4 + index % 3])
    for seed, (n, s) in enumerate(sample.sizes or rotating):
        if fits(sample, n, s):
            check_either(sample, n, s, seed)


def check_either(sample: Sample, n: int, s: int, seed: int) -> None:
    """Where sizes coincide or are 1, a refused call may pack and the reverse: a view to `[S, N]` with N = S."""
    graph = graph_of(sample, n, s)
    accepted = verdict(graph.analyse(sample), graph.node) == "packs"
    if accepted:
        check_accepted(sample, n, s, seed, symbolic=False)
    assert accepted or not sample.packs or min(n, s) == 1, f"refused for N={n}, S={s}"


def test_every_rule_has_samples() -> None:
    """By identity of the function; one that only ever refuses needs no sample that packs."""
    sampled = {rule_of(sample) for sample in SAMPLES}
    missing = sorted({rule.__name__ for rule in RULES.values() if rule not in sampled})
    assert not missing, f"rules without a sample in tests/rule_samples.py: {missing}"
    never = ("full_reduction_rule", "batch_norm_rule", "recurrent_rule")
    never += ("histogram_rule",)  # its result is no value; tests/test_routing.py has it within whole layers
    packing = {rule_of(sample) for sample in SAMPLES if sample.packs}
    assert not [r.__name__ for r in set(RULES.values()) - packing if r.__name__ not in never]


def test_every_family_has_a_proven_refusal() -> None:
    """A refusal that brute force shows to be right; else a rule could refuse everything unnoticed."""
    total = {rule_of(sample) for sample in SAMPLES if not sample.packs}
    proven = {rule_of(sample) for sample in SAMPLES if not sample.packs and not sample.conservative}
    assert {r.__name__ for r in total - proven} <= {
        "squeeze_rule", "like_rule", "prelu_rule", "expand_rule", "expand_as_rule", "repeat_rule",
        "repeat_interleave_rule",
    }  # fmt: skip


def test_every_overload_can_be_called() -> None:
    """`bound_args` gives a rule all positional arguments of the schema, and the keyword-only ones by name."""
    wrong = []
    for overload, rule in RULES.items():
        arguments = overload._schema.arguments
        positional = [a.name for a in arguments if not a.kwarg_only]
        keywords = {a.name: a.name for a in arguments if a.kwarg_only}
        try:
            bound = inspect.signature(rule).bind(None, *positional, **keywords)
        except TypeError as error:
            wrong.append(f"{overload}: {rule.__name__}: {error}")
            continue
        names = {a.name for a in arguments}
        wrong += [f"{overload}: {k} is {v}" for k, v in bound.arguments.items() if k in names and k != v]
        assert not overload._schema.is_mutable, f"{overload} writes into an argument"
    assert not wrong, wrong


def test_cuts_are_told_apart() -> None:
    """Equal cuts of one value are one selection, cuts of other lengths are not."""
    x = Tensor("stream", ("N", "S", 6))
    cuts = [Call(aten.narrow.default, (x, 1, 0, length)) for length in (2, 3, 2)]
    graph = Graph(sample := Sample(Call(aten.cat.default, (cuts, 1)), packs=False, late=True), *GENERIC)
    found = [
        v.layout.selection for n, v in graph.analyse(sample).values.items() if n.target is aten.narrow.default
    ]
    assert found[0] is found[2] and found[0] is not found[1]
    assert [selection.positions for selection in found] == [2, 3, 2]


def test_no_rule_for_indices_of_tokens() -> None:
    assert aten.where.default not in RULES


@pytest.mark.parametrize("dims", [
    ("N", "S", 6), ("S", "N", 6), ("N", 1, "S", 4), ("N*S", 6), ("S*N", 6), ("N", "S"), ("S", 6), (1, "S", 6),
    ("N", 6, "S"), ("N*6", 1, "S"), ("N*6", "S"), ("S*3", "N*2", 4), ("N*2", 4), (3, 1, "S"), ("S*6", 4),
])  # fmt: skip
def test_columns_are_packed_like_the_stream(dims: tuple[Any, ...]) -> None:
    """The runtime's `pack_column` against `pack` above."""
    for seed, (n, s) in enumerate(SIZES):
        batch = make_batch(n, s, seed, drops=True, position_is_key=True)
        value = materialize(Tensor("column", dims), batch, zero_dropped=False)
        layout = tuple(map(tuple, factors_of(dims)))
        assert torch.equal(pack_column(value, layout, batch), pack(value, layout, batch))  # type: ignore[arg-type]


# -- view_dims --------------------------------------------------------------------------------------------------------


def element_ids(dims: Any, n: int, s: int) -> torch.Tensor:
    """A number for each element of a dense value, from its token and its plain index: a view keeps them."""
    factors = [f for dim in dims for f in dim]
    rest = [f for f in factors if not isinstance(f, str)]
    tokens = [size for f, size in ((ROW, n), (POSITION, s)) if f in factors]
    return place(torch.arange(math.prod([*tokens, *rest])).view([*tokens, *rest]), dims)


def size(dim: Any, n: Any, s: Any) -> Any:
    return math.prod([{ROW: n, POSITION: s}.get(f, f) for f in dim])


def layout_of(dims: Any, n: Any, s: Any) -> TokenLayout:
    return TokenLayout(tuple(map(tuple, dims)), Selection(n, s))


@st.composite
def views(draw: Any) -> tuple[Any, Any, list[Any]]:
    """A layout, another grouping of the same factors in which some plain ones are split, and the factors."""
    tokens = draw(st.sampled_from([[ROW, POSITION], [POSITION, ROW], [POSITION]]))
    sizes = draw(st.lists(st.sampled_from([2, 3, 4, 6, 12]), max_size=3))
    factors = draw(st.permutations([*tokens, *sizes]))
    splits = {4: [2, 2], 6: [2, 3], 12: [3, 4]}
    split = [part for f in factors for part in (splits[f] if f in splits and draw(st.booleans()) else [f])]
    return _grouped(draw, factors), _grouped(draw, split), factors


def _grouped(draw: Any, factors: list[Any]) -> list[list[Any]]:
    """Factors as dims, with dims of size 1 in between."""
    dims: list[list[Any]] = []
    for factor in factors:
        dims += [[]] * draw(st.sampled_from([0, 0, 1, 2]))
        if dims and dims[-1] and draw(st.booleans()):
            dims[-1].append(factor)
        else:
            dims.append([factor])
    return dims + [[]] * draw(st.integers(0, 1))


@settings(max_examples=400, deadline=None)
@given(views(), st.sampled_from([(5, 7), (4, 4), (6, 12), (3, 2), (1, 5), (5, 1), (1, 1)]))
def test_view_dims_follows_factors(view: Any, batch: tuple[int, int]) -> None:
    """What it says of each element is true; a view that only regroups factors is understood, there and back."""
    before, after, _ = view
    n, s = batch
    dims = [size(dim, n, s) for dim in before]
    found = view_dims(layout_of(before, n, s), [size(dim, n, s) for dim in after])
    if found is not None:
        assert torch.equal(
            element_ids(before, n, s).reshape([size(d, n, s) for d in after]), element_ids(found, n, s)
        )
    if (n, s) == (5, 7):  # sizes that no plain factor has
        assert found is not None
        back = view_dims(layout_of(found, n, s), dims)
        assert back is not None and torch.equal(element_ids(back, n, s), element_ids(before, n, s))


@settings(max_examples=100, deadline=None)
@given(views())
def test_view_dims_is_the_same_for_symbolic_sizes(view: Any) -> None:
    before, after, _ = view
    _, n, s = symbolic_sizes(5, 7)
    found = view_dims(layout_of(before, n, s), [size(dim, n, s) for dim in after])
    assert found == view_dims(layout_of(before, 5, 7), [size(dim, 5, 7) for dim in after])


@settings(max_examples=200, deadline=None)
@given(views(), st.data())
def test_view_dims_refuses_to_tear_tokens(view: Any, data: Any) -> None:
    """With N = 5 * 7 or S = 11 * 13 cut in two there is no reading; nor with a symbolic size moved over a plain one."""
    before, _, factors = view
    token = data.draw(st.sampled_from([f for f in factors if isinstance(f, str)]))
    parts = {ROW: [35], POSITION: [143], token: {ROW: [7, 5], POSITION: [11, 13]}[token]}
    assert view_dims(layout_of(before, 35, 143), [p for f in factors for p in parts.get(f, [f])]) is None
    _, n, s = symbolic_sizes(5, 7)
    at = factors.index(token)
    if at + 1 < len(factors) and not isinstance(factors[at + 1], str):
        moved = [*factors[:at], factors[at + 1], token, *factors[at + 2 :]]
        assert view_dims(layout_of([[f] for f in factors], n, s), [size([f], n, s) for f in moved]) is None
