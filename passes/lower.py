"""Lowering: three graphs out of one, from the analysis and the attention matches.

    prologue   what is computed from inputs alone, as written, on the dense batch (without gradient)
    packed     the token stream: the same operations on `[1, T, ...]`, attention through `prefix_attention`
    late       what follows the last token mixer and isn't position-wise, as written, on unpacked `[N, S, ...]` values

No size of the batch is baked into the packed graph: one serves all shapes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from .attention_match import AttentionMatch
from .graph import aten, base_of, bound_args, is_mode_switch, node_arg, val
from .layout import KEY, POSITION, ROW, Dim, Selection, TokenLayout, is_token_factor
from .mask_formula import Column, emit_column
from .packed_graphs import Input, PackedGraphs, ResultRef
from .padding import Guards
from .propagate import NUMBER, Analysis, Value
from .reasons import Unsupported
from .rules import LATE, PROLOGUE, STREAM, WEIGHT
from .subgraph import (
    drop_dead,
    live_nodes,
    module_of,
    order_placeholders,
    prologue_module,
    used_inputs,
    views_of_shared_outputs,
)
from .unpack import gather_entries, label_loss, unpack_tokens


def _cut(selection: Selection) -> tuple[Any, tuple[Any, ...]]:
    """The operation that cuts a selection from its parent, and its arguments after the map."""
    node = selection.node
    assert node is not None
    rest = list(bound_args(node)[0][1:])
    if node.target is aten.index.Tensor:
        given = [i for i in rest[0] if i is not None]
        rest[0] = [None] * selection.dim + given if len(given) == 1 else given
    else:
        rest[0] = selection.dim
    return node.target, tuple(rest)


class Lowering:
    """Builds the three graphs. Nothing of the original graph is changed."""

    def __init__(
        self,
        gm: fx.GraphModule,
        analysis: Analysis,
        matches: list[AttentionMatch],
        guards: Guards,
        engine: str,
    ) -> None:
        self.gm, self.analysis, self.guards, self.engine = gm, analysis, guards, engine
        self.matches = {m.node: m for m in matches}
        self.prologue_results: dict[fx.Node, int] = {}
        self.inputs: dict[Input, fx.Node] = {}
        self.packed, self.late = fx.Graph(), fx.Graph()
        self.packed_env: dict[fx.Node, fx.Node] = {}
        self.late_env: dict[fx.Node, Any] = {}
        self.packed_outputs: dict[fx.Node, int] = {}  # nodes of the packed graph
        self.data_masks: dict[fx.Node, int] = {}
        self.live = live_nodes(gm.graph)
        self.cuts: dict[Selection, tuple[Any, Any]] = {}
        self.late_inputs: dict[tuple[str, int], fx.Node] = {}
        self.placeholders = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self.maps: dict[tuple[int, str], fx.Node] = {}
        self.keys: dict[tuple[int, tuple[Dim, ...]], None] = {}
        self.columns: dict[Column, fx.Node] = {}
        self.position_is_key = False
        self.shared_views = views_of_shared_outputs(gm.graph)

    def run(self) -> PackedGraphs | Unsupported:
        values = self.analysis.values
        needed = self.live
        for (node, dims), _ in self.analysis.columns.items():
            if node in needed or node.op == "placeholder":
                self._key(node, dims)
        like = next(iter(self.analysis.columns))[0]
        for match in self.matches.values():
            for column in (*match.formula.key_valid, *match.formula.same_value):
                self._column_node(column, like)
            if match.formula.data is not None:
                self.data_masks.setdefault(match.formula.data, len(self.data_masks))
        refusal = self._check_scores() or self._check_tables()
        if refusal is not None:
            return refusal
        for node in self.gm.graph.nodes:
            if is_mode_switch(node):
                self._copy_switch(node)
            elif node.op == "output":
                self.late.output(fx.map_arg(node.args[0], self._in_output))
            elif node in needed and values[node].kind == STREAM and not self._inside_attention(node):
                self._emit(node)
                if self._is_unpacked(node):
                    self._in_late(node)  # here, between the mode switches that hold for it
            elif node in needed and values[node].kind == LATE:
                self._emit_late(node)
            elif node in needed and values[node].kind == WEIGHT and node.op != "placeholder":
                self._emit_weight(node)
        return self._finish()

    # -- prologue ---------------------------------------------------------------------------------------------

    def _result(self, node: fx.Node) -> int:
        """Index of `node` among the prologue's results."""
        return self.prologue_results.setdefault(node, len(self.prologue_results))

    def _key(self, node: fx.Node, dims: tuple[Dim, ...]) -> None:
        factors = {f for dim in dims for f in dim}
        if ROW in factors:
            self.keys[(self._result(node), dims)] = None
        else:
            self.position_is_key = True

    def _column_node(self, column: Column, like: fx.Node) -> fx.Node:
        """The node of the original graph (grown by elementwise ones) that computes a mask's column as [N, S]."""
        found = self.columns.get(column)
        if found is None:
            output = self.gm.graph.output_node()
            with self.gm.graph.inserting_before(output):
                found = emit_column(self.gm.graph, column, like)
            for node in found.graph.nodes:
                self.analysis.values.setdefault(node, Value(PROLOGUE))
            self.columns[column] = found
            self._key(found, ((ROW,), (POSITION,)))
        return found

    # -- packed graph -----------------------------------------------------------------------------------------

    def _input(self, spec: Input, like: str) -> fx.Node:
        found = self.inputs.get(spec)
        if found is None:
            first = next(iter(self.packed.nodes), None)
            with (
                self.packed.inserting_before(first)
                if first is not None
                else self.packed.inserting_after(None)
            ):
                found = self.packed.placeholder(f"{like}_{len(self.inputs)}")
            self.inputs[spec] = found
        return found

    def _in_packed(self, node: fx.Node) -> Any:
        """The packed graph's value for a node of the original graph."""
        if node in self.packed_env:
            return self.packed_env[node]
        kind = self.analysis.kind(node)
        if node in self.placeholders:
            found: Any = self._input(Input("argument", self.placeholders[node]), "argument")
        elif kind == PROLOGUE:
            found = self._input(Input("value", self._result(node)), "value")
        else:
            raise AssertionError(f"{node} ({kind}) isn't packed")
        self.packed_env[node] = found
        return found

    def _packed_column(self, node: fx.Node, dims: tuple[Dim, ...]) -> fx.Node:
        return self._input(Input("column", self._result(node), dims), "column")

    def _emit(self, node: fx.Node) -> None:
        value = self.analysis.values[node]
        outcome = value.outcome
        assert outcome is not None
        packed = LOWERINGS[outcome.action](self, node, outcome)
        self.packed_env[node] = packed
        if isinstance(packed, fx.Node) and "layouts" not in packed.meta:
            packed.meta["layouts"] = value.layouts
            packed.meta["original"] = node

    def emit(self, node: fx.Node, outcome: Any, given: dict[fx.Node, fx.Node] | None = None) -> fx.Node:
        """The same operation on packed tokens, with prologue columns packed, and `given` values where there are any."""

        def packed(n: fx.Node) -> Any:
            if given is not None and n in given:
                return given[n]
            dims = outcome.columns.get(n)
            return self._in_packed(n) if dims is None else self._packed_column(n, dims)

        return self.packed.node_copy(node, packed)

    def reshape(self, node: fx.Node, outcome: Any) -> fx.Node:
        x = self._in_packed(node_arg(node, 0))
        return self.packed.call_function(aten.reshape.default, (x, outcome.layout.packed_shape()))

    def expand(self, node: fx.Node, outcome: Any) -> fx.Node:
        x = self._in_packed(node_arg(node, 0))
        return self.packed.call_function(aten.expand.default, (x, outcome.layout.packed_shape()))

    def alias(self, node: fx.Node, outcome: Any) -> fx.Node:
        """The same tokens; a node of its own, since under `no_grad` it is detached from its source."""
        source = self._in_packed(outcome.detail or node_arg(node, 0))
        return self.packed.call_function(aten.alias.default, (source,))

    def drop_dim(self, node: fx.Node, outcome: Any) -> fx.Node:
        """One position of every row, or one row: the dim of size 1 goes, T stays."""
        x = self._in_packed(node_arg(node, 0))
        row_dim, dropped = outcome.detail
        if dropped != row_dim:
            x = self.packed.call_function(aten.transpose.int, (x, row_dim, dropped))
        return self.packed.call_function(aten.select.int, (x, dropped, 0))

    def filled(self, node: fx.Node, outcome: Any) -> fx.Node:
        """A write into a constant, which gets the packed size."""
        constant, *rest = bound_args(node)[0]
        like = next(a for a in rest if isinstance(a, fx.Node) and self.analysis.kind(a) == STREAM)
        sizes = [
            self.packed.call_function(aten.sym_size.int, (self._in_packed(like), d)) if size == -1 else size
            for d, size in enumerate(outcome.layout.packed_shape())
        ]
        _, fill, *_ = bound_args(constant)[0]
        options = {"dtype": val(constant).dtype, "device": val(constant).device}
        packed = self.packed.call_function(aten.full.default, (sizes, fill), options)
        return self.emit(node, outcome, {constant: packed})

    def inverse(self, node: fx.Node, outcome: Any) -> fx.Node:
        """Where each entry went in a sort: the permutation of the packed entries, inverted."""
        permutation = self._in_packed(outcome.detail)
        size = self.packed.call_function(aten.sym_size.int, (permutation, 0))
        options = {"dtype": val(node).dtype, "device": val(node).device}
        count = self.packed.call_function(aten.arange.default, (size,), options)
        empty = self.packed.call_function(aten.empty_like.default, (permutation,), {"dtype": val(node).dtype})
        return self.packed.call_function(aten.index_put.default, (empty, [permutation], count))

    def column(self, node: fx.Node, outcome: Any) -> fx.Node:
        return self._packed_column(node, outcome.layout.dims)

    def lookup(self, node: fx.Node, outcome: Any) -> fx.Node:
        """An embedding of ids, or of positions (a table, whose rows repeat: our own gather, see docs/design.md)."""
        args = bound_args(node)[0]
        weight, index = self._in_packed(args[0]), self._packed_column(args[1], outcome.layout.dims[:-1])
        padding_idx = args[2]
        if outcome.layout.has(ROW) or padding_idx != -1:
            return self.packed.call_function(aten.embedding.default, (weight, index, *args[2:]))
        flat = self.packed.call_function(aten.reshape.default, (index, [-1]))
        rows = self.packed.call_function(torch.ops.pgcompile.gather_tokens.default, (weight, flat))
        return self.packed.call_function(aten.reshape.default, (rows, outcome.layout.packed_shape()))

    def table(self, node: fx.Node, outcome: Any) -> fx.Node:
        """`parameter[:S]` along the position dim: one entry per packed token."""
        self.position_is_key = True
        x, dim = self._in_packed(node_arg(node, 0)), outcome.detail
        positions = self._input(Input("positions"), "positions")
        moved = self.packed.call_function(aten.transpose.int, (x, 0, dim))
        rows = self.packed.call_function(torch.ops.pgcompile.gather_tokens.default, (moved, positions))
        return self.packed.call_function(aten.transpose.int, (rows, 0, dim))

    def attention(self, node: fx.Node, outcome: Any) -> fx.Node:
        """`prefix_attention` over the packed tokens; heads in one dim, whatever the model's layout."""
        match = self.matches[node]
        k = self._in_packed(match.k)
        if match.k_transposed:
            k = self.packed.call_function(aten.transpose.int, (k, -2, -1))
        columns = [
            [self._flat(self._packed_column(self.columns[c], ((ROW,), (POSITION,)))) for c in group]
            for group in (match.formula.key_valid, match.formula.same_value)
        ]
        if match.formula.data is not None:
            columns[0].append(
                self._input(Input("data_mask", self.data_masks[match.formula.data]), "key_valid")
            )
        dtype = val(node).dtype  # autocast converts the arguments of attention, but not of our operator
        call = self.packed.call_function(
            torch.ops.pgcompile.prefix_attention.default,
            (
                self._heads(match.q, self._in_packed(match.q), dtype), self._heads(match.k, k, dtype),
                self._heads(match.v, self._in_packed(match.v), dtype),
                self._input(Input("subtree_end"), "subtree_end"), self._input(Input("depth"), "depth"),
                self._input(Input("segments"), "segments"), *columns, match.scale, match.formula.window, self.engine,
            ),
        )  # fmt: skip
        call.meta["layouts"] = None
        out = self.packed.call_function(operator.getitem, (call, 0))
        out.meta["layouts"] = None
        return self.packed.call_function(aten.reshape.default, (out, outcome.layout.packed_shape()))

    def _flat(self, column: fx.Node) -> fx.Node:
        """[1, T] → [T]."""
        return self.packed.call_function(aten.reshape.default, (column, [-1]))

    def _heads(self, original: fx.Node, packed: fx.Node, dtype: torch.dtype) -> fx.Node:
        """[1, ..heads.., T, D] → [1, H, T, D] of `dtype`."""
        if val(original).dtype != dtype:
            packed = self.packed.call_function(aten.to.dtype, (packed, dtype))
        dims = self.analysis.values[original].layout.dims
        heads = math.prod(f for dim in dims[:-2] for f in dim if not is_token_factor(f))
        is_key = original in {m.k for m in self.matches.values() if m.k_transposed}
        width = dims[-2] if is_key and POSITION in dims[-1] else dims[-1]
        return self.packed.call_function(aten.reshape.default, (packed, [1, heads, -1, math.prod(width)]))

    # -- late graph -------------------------------------------------------------------------------------------

    def _late_input(self, source: str, index: int) -> fx.Node:
        found = self.late_inputs.get((source, index))
        if found is None:
            first = next(iter(self.late.nodes), None)
            with self.late.inserting_before(first) if first is not None else self.late.inserting_after(None):
                found = self.late.placeholder(f"{source}_{index}")
            self.late_inputs[(source, index)] = found
        return found

    def _in_output(self, node: fx.Node) -> Any:
        """The late graph's value that the caller gets: zeros where tokens were dropped."""
        if self.analysis.kind(node) != STREAM or self._shares_memory(node) or node in self.placeholders:
            return self._in_late(node)
        return self._unpacked(node, "class_of")

    def _shares_memory(self, node: fx.Node) -> bool:
        """Do other outputs look into the same memory? They all have to be made from one unpacked value."""
        return node in self.shared_views or base_of(node) in {base_of(v) for v in self.shared_views}

    def _unpacked(self, node: fx.Node, source: str) -> fx.Node:
        layout = self.analysis.values[node].layout
        packed = self._packed_result(self._in_packed(node))
        return self.late.call_function(
            unpack_tokens, (packed, self._map(layout.selection, source), layout.dims)
        )

    def _in_late(self, node: fx.Node) -> Any:
        """The late graph's value for a node of the original graph; tokens are unpacked.

        Dropped tokens get the value of another one. Whatever reads them is switched off there by a factor of zero
        (`padding.py`), and zero times a number is zero; but zeros in their place might become infinite on the way.
        """
        if node in self.late_env:
            return self.late_env[node]
        kind = self.analysis.kind(node)
        if node in self.placeholders:
            found: Any = self._late_input("argument", self.placeholders[node])
        elif kind in (PROLOGUE, NUMBER):
            found = self._late_input("prologue", self._result(node))
        elif kind == STREAM and node in self.shared_views:
            found = self.late.node_copy(
                node, self._in_late
            )  # of the unpacked base: outputs that share memory still do
        elif kind == STREAM:
            found = self._unpacked(node, "token_of")
        else:
            raise AssertionError(f"{node} ({kind}) comes too late")
        self.late_env[node] = found
        return found

    def _packed_result(self, packed: fx.Node) -> fx.Node:
        """The late graph's input for a value of the packed graph."""
        index = self.packed_outputs.setdefault(packed, len(self.packed_outputs))
        return self._late_input("packed", index)

    def _map(self, selection: Selection, source: str = "token_of") -> fx.Node:
        """The map from the tokens of a selection to packed tokens: the same cuts, applied to a map [N, S].

        `source` is "token_of", or "class_of", which has -1 where a token was dropped.
        """
        if selection.parent is None:
            return self._late_input(source, 0)
        found = self.maps.get((id(selection), source))
        if found is None:
            target, args = _cut(selection)
            parent = self._map(selection.parent, source)
            found = self.late.call_function(target, (parent, *fx.map_arg(args, self._in_late)))
            self.maps[(id(selection), source)] = found
        return found

    def _note_cuts(self, selection: Selection) -> None:
        """What the plan needs to apply a selection's cuts by itself."""
        if selection.parent is not None and selection not in self.cuts:
            target, args = _cut(selection)
            self.cuts[selection] = (target, fx.map_arg(args, self._result_ref))
            self._note_cuts(selection.parent)

    def _result_ref(self, node: fx.Node) -> Any:
        return ResultRef(self._result(node))

    def _emit_late(self, node: fx.Node) -> None:
        outcome = self.analysis.values[node].outcome
        special = LATE_LOWERINGS.get(outcome.action) if outcome is not None else None
        self.late_env[node] = (
            special(self, node, outcome) if special else self.late.node_copy(node, self._in_late)
        )

    def gather_entries(self, node: fx.Node, outcome: Any) -> fx.Node:
        args = bound_args(node)[0]
        layout = outcome.layout
        return self.late.call_function(
            gather_entries,
            (
                self._packed_result(self._in_packed(args[0])),
                self._map(layout.selection),
                layout.dims,
                self._in_late(args[2]),
            ),
        )

    def label_loss(self, node: fx.Node, outcome: Any) -> fx.Node:
        """Log-probabilities are packed; the label's entries are gathered; the reduction runs as written."""
        x, target, weight, reduction, ignore_index, *smoothing = bound_args(node)[0]
        layout, logs, smooth = outcome.layout, self._in_packed(x), None
        if val(x).dtype != val(node).dtype:  # autocast computes the loss in float32
            logs = self.packed.call_function(aten.to.dtype, (logs, val(node).dtype))
        if outcome.action == "cross_entropy_loss":
            logs = self.packed.call_function(aten.log_softmax.int, (logs, -1))
        if smoothing and smoothing[0]:
            scaled = (
                logs
                if weight is None
                else self.packed.call_function(aten.mul.Tensor, (logs, self._in_packed(weight)))
            )
            smooth = self._packed_result(self.packed.call_function(aten.sum.dim_IntList, (scaled, [-1])))
        return self.late.call_function(
            label_loss,
            (
                self._packed_result(logs), smooth, self._map(layout.selection), layout.dims, self._in_late(target),
                None if weight is None else self._in_late(weight), reduction, ignore_index, *smoothing,
            ),
        )  # fmt: skip

    # -- all three --------------------------------------------------------------------------------------------

    def _is_unpacked(self, node: fx.Node) -> bool:
        """Is the value used outside of the packed graph, other than as the logits of a label gather or loss?"""
        for user in node.users:
            if user in self.live and (user.op == "output" or self.analysis.kind(user) == LATE):
                outcome = None if user.op == "output" else self.analysis.values[user].outcome
                if outcome is None or outcome.action not in LATE_LOWERINGS:
                    return True
        return False

    def _emit_weight(self, node: fx.Node) -> None:
        """What is computed from parameters goes where it stood, between the same mode switches, to both graphs."""
        self.packed_env[node] = self.packed.node_copy(node, self._in_packed)
        self.late_env[node] = self.late.node_copy(node, self._in_late)

    def _copy_switch(self, node: fx.Node) -> None:
        self.packed_env[node] = self.packed.node_copy(node, lambda n: self.packed_env[n])
        self.late_env[node] = self.late.node_copy(node, lambda n: self.late_env[n])

    def _inside_attention(self, node: fx.Node) -> bool:
        """Scores and probabilities: computed by `prefix_attention`."""
        return any(layout.has(KEY) for layout in self.analysis.values[node].layouts)

    def _check_scores(self) -> Unsupported | None:
        """Scores and probabilities may only be used by their own attention."""
        for node, value in self.analysis.values.items():
            if value.kind != STREAM or not any(layout.has(KEY) for layout in value.layouts):
                continue
            for user in node.users:
                kind = LATE if user.op == "output" else self.analysis.kind(user)
                inside = kind == STREAM and (user in self.matches or self._inside_attention(user))
                if not inside and user in self.live:
                    hint = "pass output_attentions=False"
                    return Unsupported(
                        "token_mixing", node, "attention weights are used outside of attention", hint
                    )
        return None

    def _check_tables(self) -> Unsupported | None:
        """A table by position has no rows to unpack it to."""
        for node, value in self.analysis.values.items():
            if value.kind != STREAM or all(
                layout.has(ROW) or not layout.selection.is_whole for layout in value.layouts
            ):
                continue
            for user in node.users:
                if user in self.live and (user.op == "output" or self.analysis.kind(user) == LATE):
                    return Unsupported(
                        "row_layout", user, "a table by position is used outside of the token stream"
                    )
        return None

    def _finish(self) -> PackedGraphs | Unsupported:
        self.packed.output(tuple(self.packed_outputs))
        for graph in (self.packed, self.late):
            drop_dead(graph)
            for node in graph.nodes:
                node.meta.pop("val", None)  # of the original: other sizes
        self.inputs = used_inputs(self.packed, self.inputs)
        self.late_inputs = used_inputs(self.late, self.late_inputs)
        order_placeholders(self.packed, list(self.inputs.values()))
        order_placeholders(self.late, list(self.late_inputs.values()))
        formulas = {m.formula.data: m.formula for m in self.matches.values()}
        for factor in (f for group in self.guards.groups for f in group):
            self._note_cuts(factor.selection)
        guards = [[(self._result(f.node), f) for f in group] for group in self.guards.groups]
        key_valid = [self._valid_keys(m) for m in self.matches.values()]
        leaves = tree_leaves(self.gm.graph.output_node().args[0])
        outputs = [self._tokens_of(leaf) for leaf in leaves]
        to_zero = [
            i
            for i, (leaf, layout) in enumerate(zip(leaves, outputs, strict=True))
            if layout is not None and self.analysis.kind(leaf) == LATE and not self._shares_memory(leaf)
        ]
        data_masks = [
            (self._result(node), formulas[node].data_additive, formulas[node].data_negated)
            for node in self.data_masks
        ]
        prologue = prologue_module(
            self.gm, self.prologue_results, self.analysis
        )  # when all results are known
        if isinstance(prologue, Unsupported):
            return prologue
        return PackedGraphs(
            guards=guards,
            cuts=self.cuts,
            can_drop_padding=self.guards.refusal is None,
            key_valid=key_valid,
            data_masks=data_masks,
            prologue=prologue,
            packed=module_of(self.gm, self.packed),
            late=module_of(self.gm, self.late),
            results=list(self.prologue_results),
            inputs=list(self.inputs),
            late_inputs=list(self.late_inputs),
            keys=list(self.keys),
            position_is_key=self.position_is_key,
            whole=self.analysis.whole,
            matches=list(self.matches.values()),
            outputs=outputs,
            to_zero=to_zero,
        )

    def _tokens_of(self, leaf: Any) -> TokenLayout | None:
        if not isinstance(leaf, fx.Node):
            return None
        value = self.analysis.values[leaf]
        layout = value.layout if value.kind == STREAM else self.guards.layouts.get(leaf)
        if layout is not None:
            self._note_cuts(layout.selection)
        return layout

    def _valid_keys(self, match: AttentionMatch) -> tuple[int, ...]:
        data = () if match.formula.data is None else (-1 - self.data_masks[match.formula.data],)
        return (*(self._result(self.columns[c]) for c in match.formula.key_valid), *data)


LOWERINGS: dict[str, Callable[[Lowering, fx.Node, Any], fx.Node]] = {
    "emit": Lowering.emit,
    "reshape": Lowering.reshape,
    "expand": Lowering.expand,
    "alias": Lowering.alias,
    "drop_dim": Lowering.drop_dim,
    "filled": Lowering.filled,
    "inverse": Lowering.inverse,
    "column": Lowering.column,
    "lookup": Lowering.lookup,
    "table": Lowering.table,
    "attention": Lowering.attention,
}
LATE_LOWERINGS: dict[str, Callable[[Lowering, fx.Node, Any], fx.Node]] = {
    "gather_entries": Lowering.gather_entries,
    "cross_entropy_loss": Lowering.label_loss,
    "nll_loss_nd": Lowering.label_loss,
    "nll_loss": Lowering.label_loss,
}
