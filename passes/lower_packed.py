"""The packed graph: the token stream's operations on `[1, T, ...]`, attention through `prefix_attention`.

No size of the batch is baked into it: one graph serves all shapes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .attention_match import AttentionMatch
from .attention_scores import summands
from .graph import aten, bound_args, node_arg, val
from .layout import POSITION, ROW, Dim, TokenLayout, plain_size
from .original import Original
from .packed_graphs import Input
from .rules import PROLOGUE, STREAM
from .subgraph import input_of


class PackedSide:
    """Builds the packed graph, node by node, in the order of the original.

    Args:
        original: what is lowered.
    """

    def __init__(self, original: Original) -> None:
        self.original = original
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[Input, fx.Node] = {}
        self.outputs: dict[fx.Node, int] = {}  # nodes of this graph

    def _input(self, spec: Input, like: str) -> fx.Node:
        return input_of(self.graph, self.inputs, spec, f"{like}_{len(self.inputs)}")

    def value(self, node: fx.Node) -> Any:
        """The packed graph's value for a node of the original graph."""
        if node in self.env:
            return self.env[node]
        kind = self.original.analysis.kind(node)
        if node in self.original.placeholders:
            found: Any = self._input(Input("argument", self.original.placeholders[node]), "argument")
        elif kind == PROLOGUE:
            found = self._input(Input("value", self.original.result(node)), "value")
        else:
            raise AssertionError(f"{node} ({kind}) isn't packed")
        self.env[node] = found
        return found

    def packed_column(self, node: fx.Node, dims: tuple[Dim, ...]) -> fx.Node:
        return self._input(Input("column", self.original.column_result(node), dims), "column")

    def add(self, node: fx.Node) -> None:
        value = self.original.analysis.values[node]
        outcome = value.outcome
        assert outcome is not None
        packed = LOWERINGS[outcome.action](self, node, outcome)
        self.env[node] = packed
        if isinstance(packed, fx.Node) and "layouts" not in packed.meta:
            packed.meta["layouts"] = value.layouts
            packed.meta["original"] = node

    def emit(self, node: fx.Node, outcome: Any, given: dict[fx.Node, fx.Node] | None = None) -> fx.Node:
        """The same operation on packed tokens, with prologue columns packed, and `given` values where there are any."""

        def packed(n: fx.Node) -> Any:
            if given is not None and n in given:
                return given[n]
            dims = outcome.columns.get(n)
            return self.value(n) if dims is None else self.packed_column(n, dims)

        return self.graph.node_copy(node, packed)

    def reshape(self, node: fx.Node, outcome: Any) -> fx.Node:
        x = self.value(node_arg(node, 0))
        return self.graph.call_function(aten.reshape.default, (x, outcome.layout.packed_shape()))

    def expand(self, node: fx.Node, outcome: Any) -> fx.Node:
        x = self.value(node_arg(node, 0))
        return self.graph.call_function(aten.expand.default, (x, outcome.layout.packed_shape()))

    def alias(self, node: fx.Node, outcome: Any) -> fx.Node:
        """The same tokens; a node of its own, since under `no_grad` it is detached from its source."""
        source = outcome.detail or node_arg(node, 0)
        if self._picks(source, outcome.layout):
            return self._scored(source)
        return self.graph.call_function(aten.alias.default, (self.value(source),))

    def _picks(self, source: fx.Node, layout: TokenLayout) -> bool:
        """Does this cut leave tokens that are to be picked out?"""
        is_whole = self.original.analysis.values[source].layout.selection.is_whole
        return is_whole and layout.selection in self.original.scored

    def _scored(self, node: fx.Node) -> fx.Node:
        """The scored ones of a value's tokens."""
        layout = self.original.analysis.values[node].layout
        dim = layout.dim_of(POSITION if layout.has(POSITION) else ROW)
        index = self._input(Input("scored"), "scored")
        return self.graph.call_function(aten.index_select.default, (self.value(node), dim, index))

    def drop_dim(self, node: fx.Node, outcome: Any) -> fx.Node:
        """One position of every row, or one row: the dim of size 1 goes, T stays."""
        source = node_arg(node, 0)
        x = self._scored(source) if self._picks(source, outcome.layout) else self.value(source)
        row_dim, dropped = outcome.detail
        if dropped != row_dim:
            x = self.graph.call_function(aten.transpose.int, (x, row_dim, dropped))
        return self.graph.call_function(aten.select.int, (x, dropped, 0))

    def filled(self, node: fx.Node, outcome: Any) -> fx.Node:
        """A write into a constant, which gets the packed size."""
        constant, *rest = bound_args(node)[0]
        like = next(a for a in rest if isinstance(a, fx.Node) and self.original.analysis.kind(a) == STREAM)
        sizes = [
            self.graph.call_function(aten.sym_size.int, (self.value(like), d)) if size == -1 else size
            for d, size in enumerate(outcome.layout.packed_shape())
        ]
        _, fill, *_ = bound_args(constant)[0]
        options = {"dtype": val(constant).dtype, "device": val(constant).device}
        packed = self.graph.call_function(aten.full.default, (sizes, fill), options)
        return self.emit(node, outcome, {constant: packed})

    def inverse(self, node: fx.Node, outcome: Any) -> fx.Node:
        """Where each entry went in a sort: the permutation of the packed entries, inverted."""
        permutation = self.value(outcome.detail)
        size = self.graph.call_function(aten.sym_size.int, (permutation, 0))
        options = {"dtype": val(node).dtype, "device": val(node).device}
        count = self.graph.call_function(aten.arange.default, (size,), options)
        empty = self.graph.call_function(aten.empty_like.default, (permutation,), {"dtype": val(node).dtype})
        return self.graph.call_function(aten.index_put.default, (empty, [permutation], count))

    def column(self, node: fx.Node, outcome: Any) -> fx.Node:
        return self.packed_column(node, outcome.layout.dims)

    def lookup(self, node: fx.Node, outcome: Any) -> fx.Node:
        """An embedding of ids, or of positions (a table, whose rows repeat: our own gather, see docs/design.md)."""
        args = bound_args(node)[0]
        weight, index = self.value(args[0]), self.packed_column(args[1], outcome.layout.dims[:-1])
        padding_idx = args[2]
        if outcome.layout.has(ROW) or padding_idx != -1:
            return self.graph.call_function(aten.embedding.default, (weight, index, *args[2:]))
        flat = self.graph.call_function(aten.reshape.default, (index, [-1]))
        rows = self.graph.call_function(torch.ops.pgcompile.gather_tokens.default, (weight, flat))
        return self.graph.call_function(aten.reshape.default, (rows, outcome.layout.packed_shape()))

    def look_up(self, x: fx.Node, request: int, width: int) -> fx.Node:
        """Entries [M, K] of a value of this graph, `[..T.., V]`: here, so that a compiler can fuse it with what makes
        that value, which then is never written."""
        index = self._input(Input("request_index", request), "index")
        column = self._input(Input("request_column", request), "column")
        rows = self.graph.call_function(aten.reshape.default, (x, [-1, width]))
        return self.graph.call_function(torch.ops.pgcompile.gather_entries.default, (rows, index, column))

    def table(self, node: fx.Node, outcome: Any) -> fx.Node:
        """`parameter[:S]` along the position dim: one entry per packed token."""
        self.original.position_is_key = True
        x, dim = self.value(node_arg(node, 0)), outcome.detail
        positions = self._input(Input("positions"), "positions")
        moved = self.graph.call_function(aten.transpose.int, (x, 0, dim))
        rows = self.graph.call_function(torch.ops.pgcompile.gather_tokens.default, (moved, positions))
        return self.graph.call_function(aten.transpose.int, (rows, 0, dim))

    def attention(self, node: fx.Node, outcome: Any) -> fx.Node:
        """`prefix_attention` over the packed tokens; heads in one dim, whatever the model's layout."""
        match = self.original.matches[node]
        k = self.value(match.k)
        if match.k_transposed:
            k = self.graph.call_function(aten.transpose.int, (k, -2, -1))
        columns = [
            [self._flat(self.packed_column(self.original.columns[c], ((ROW,), (POSITION,)))) for c in group]
            for group in (match.formula.key_valid, match.formula.same_value)
        ]
        if match.formula.data is not None:
            columns[0].append(
                self._input(Input("data_mask", self.original.data_masks[match.formula.data]), "key_valid")
            )
        dtype = val(node).dtype  # autocast converts the arguments of attention, but not of our operator
        q, k, v = (
            self._heads(original, x, dtype)
            for original, x in ((match.q, self.value(match.q)), (match.k, k), (match.v, self.value(match.v)))
        )
        if match.biases:
            q, k, v = self._with_biases(match, q, k, v)
        call = self.graph.call_function(
            torch.ops.pgcompile.prefix_attention.default,
            (
                q, k, v,
                None if match.sink is None else self._flat(self.value(match.sink)),
                self._input(Input("subtree_end"), "subtree_end"), self._input(Input("depth"), "depth"),
                self._input(Input("segments"), "segments"),
                self._input(Input("hides", self.original.mask_columns_of(match)), "hides"),
                *columns, match.scale, match.softcap, match.formula.window, self.original.engine,
            ),
        )  # fmt: skip
        call.meta["layouts"] = None
        out = self.graph.call_function(operator.getitem, (call, 0))
        out.meta["layouts"] = None
        return self.graph.call_function(aten.reshape.default, (out, outcome.layout.packed_shape()))

    def _with_biases(self, match: AttentionMatch, q: fx.Node, k: fx.Node, v: fx.Node) -> list[fx.Node]:
        """q, k, v with further entries of queries and keys, so that any engine adds the biases.

        `scale * q·k + bias = scale * [q, one]·[k, bias / (scale * one)]`; where heads differ, each has its own keys.
        """
        call = self.graph.call_function
        dtype = val(match.node).dtype
        rounded = dtype if dtype == torch.float64 else torch.bfloat16
        one = float(torch.tensor(1 / match.scale, dtype=rounded, device="cpu"))
        if match.heads_per_key > 1 and any(bias.differs_by_head for bias in match.biases):
            k, v = (call(aten.repeat_interleave.self_int, (x, match.heads_per_key, 1)) for x in (k, v))
        heads = call(aten.sym_size.int, (k, 1))
        entries: list[fx.Node] = []
        for bias in match.biases:
            column = call(
                aten.expand.default, (self.packed_column(bias.node, bias.dims), [*bias.heads, 1, -1])
            )
            column = call(aten.reshape.default, (column, [1, math.prod(bias.heads), -1, 1]))
            column = call(aten.expand.default, (column, [1, heads, -1, 1]))
            entries += self._summands(column, bias.factor / (match.scale * one), dtype)
        rest = match.entries - len(entries)
        q = call(aten.constant_pad_nd.default, (q, [0, match.entries], one))
        k = call(aten.constant_pad_nd.default, (call(aten.cat.default, ([k, *entries], -1)), [0, rest], 0.0))
        return [q, k, v]

    def _summands(self, x: fx.Node, factor: float, dtype: torch.dtype) -> list[fx.Node]:
        """`x * factor` as a sum of numbers of `dtype`: of three bfloat16 ones, unless that is float64.

        So neither half precision rounds it, nor products of float32 that are computed in TF32 or bfloat16. Bits are cut
        off, since a compiler may leave out casts to and fro.
        """
        call = self.graph.call_function
        is_exact = dtype == torch.float64
        rest = call(aten.to.dtype, (x, dtype if is_exact else torch.float32))
        rest = call(aten.mul.Tensor, (rest, factor))
        parts = []
        for _ in range(summands(dtype) - 1):
            bits = call(aten.bitwise_and.Scalar, (call(aten.view.dtype, (rest, torch.int32)), -(1 << 16)))
            parts.append(call(aten.view.dtype, (bits, torch.float32)))
            rest = call(aten.sub.Tensor, (rest, parts[-1]))
        return [call(aten.to.dtype, (part, dtype)) for part in (*parts, rest)]

    def _flat(self, column: fx.Node) -> fx.Node:
        """[1, T] → [T], [1, H, 1, 1] → [H]."""
        return self.graph.call_function(aten.reshape.default, (column, [-1]))

    def _heads(self, original: fx.Node, packed: fx.Node, dtype: torch.dtype) -> fx.Node:
        """[1, ..heads.., T, D] → [1, H, T, D] of `dtype`."""
        if val(original).dtype != dtype:
            packed = self.graph.call_function(aten.to.dtype, (packed, dtype))
        dims = self.original.analysis.values[original].layout.dims
        heads = math.prod(map(plain_size, dims[:-2]))
        is_key = original in {m.k for m in self.original.matches.values() if m.k_transposed}
        width = dims[-2] if is_key and POSITION in dims[-1] else dims[-1]
        return self.graph.call_function(aten.reshape.default, (packed, [1, heads, -1, math.prod(width)]))


LOWERINGS: dict[str, Callable[[PackedSide, fx.Node, Any], fx.Node]] = {
    "emit": PackedSide.emit,
    "reshape": PackedSide.reshape,
    "expand": PackedSide.expand,
    "alias": PackedSide.alias,
    "drop_dim": PackedSide.drop_dim,
    "filled": PackedSide.filled,
    "inverse": PackedSide.inverse,
    "column": PackedSide.column,
    "lookup": PackedSide.lookup,
    "table": PackedSide.table,
    "attention": PackedSide.attention,
}
