"""Lowering: four graphs out of one, from the analysis and the attention matches.

    prologue   what is computed from inputs alone, as written, on the dense batch (without gradient)
    requests   which entries of packed values the batch's labels ask for
    packed     the token stream: the same operations on `[1, T, ...]`, attention through `prefix_attention`
    late       what follows the last token mixer and isn't position-wise, as written, on unpacked `[N, S, ...]` values

The packed and the late graph are built side by side (lower_packed.py, lower_late.py), node by node in the original's
order, so that mode switches stay where they were; beside them that of requests (lower_batch.py). From here on nothing
is refused but what the graphs can't express.
"""

from __future__ import annotations

from torch import fx
from torch.utils._pytree import tree_leaves

from .attention_match import AttentionMatch
from .graph import is_mode_switch
from .layout import KEY, POSITION, ROW, Dim
from .lower_batch import RequestSide
from .lower_late import LateSide
from .lower_packed import PackedSide
from .mask_columns import emit_column
from .mask_formula import Column
from .packed_graphs import MaskColumns, PackedGraphs
from .padding import Guards
from .propagate import Analysis, Value
from .reasons import Unsupported
from .rules import LATE, PROLOGUE, STREAM, WEIGHT
from .scored import scored_selections
from .subgraph import (
    drop_dead,
    first_alike,
    live_nodes,
    module_of,
    order_placeholders,
    prologue_module,
    used_inputs,
)


class Lowering:
    """Builds the graphs. Nothing of the original graph is changed."""

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
        self.alike = first_alike(gm.graph, analysis)
        self.placeholders = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self.live = live_nodes(gm.graph)
        self.keys: dict[tuple[int, tuple[Dim, ...]], None] = {}
        self.columns: dict[Column, fx.Node] = {}
        self.data_masks: dict[fx.Node, int] = {}
        self.mask_columns: dict[MaskColumns, int] = {}
        self.position_is_key = False
        self.scored = scored_selections(analysis, self.live)
        self.packed = PackedSide(self)
        self.requests = RequestSide(self)
        self.late = LateSide(self, self.packed, self.requests)

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
            for bias in match.biases:
                self._key(bias.node, bias.dims)
            if match.formula.data is not None:
                self.data_masks.setdefault(match.formula.data, len(self.data_masks))
        refusal = self._check_scores() or self._check_tables()
        if refusal is not None:
            return refusal
        for node in self.gm.graph.nodes:
            if is_mode_switch(node):
                self._copy_switch(node)
            elif node.op == "output":
                self.late.graph.output(fx.map_arg(node.args[0], self.late.output_value))
            elif node in needed and values[node].kind == STREAM and not self._inside_attention(node):
                self.packed.add(node)
                if self.late.is_unpacked(node):
                    self.late.value(node)  # here, between the mode switches that hold for it
            elif node in needed and values[node].kind == LATE:
                self.late.add(node)
            elif node in needed and values[node].kind == WEIGHT and node.op != "placeholder":
                self._emit_weight(node)
        return self._finish()

    # -- prologue ---------------------------------------------------------------------------------------------

    def result(self, node: fx.Node) -> int:
        """Index of `node` among the prologue's results."""
        return self.prologue_results.setdefault(node, len(self.prologue_results))

    def column_result(self, node: fx.Node) -> int:
        """The same for a column, of which one may stand for others: nobody gets it to write to."""
        return self.result(self.alike.get(node, node))

    def _key(self, node: fx.Node, dims: tuple[Dim, ...]) -> None:
        factors = {f for dim in dims for f in dim}
        if ROW in factors:
            self.keys[(self.column_result(node), dims)] = None
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

    # -- all three --------------------------------------------------------------------------------------------

    def _emit_weight(self, node: fx.Node) -> None:
        """What is computed from parameters goes where it stood, between the same mode switches, to both graphs."""
        self.packed.env[node] = self.packed.graph.node_copy(node, self.packed.value)
        self.late.env[node] = self.late.graph.node_copy(node, self.late.value)

    def _copy_switch(self, node: fx.Node) -> None:
        self.packed.env[node] = self.packed.graph.node_copy(node, lambda n: self.packed.env[n])
        self.late.env[node] = self.late.graph.node_copy(node, lambda n: self.late.env[n])

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
        self.packed.graph.output(tuple(self.packed.outputs))
        self.requests.graph.output(tuple(self.requests.requests.values()))
        for graph in (self.packed.graph, self.late.graph):
            drop_dead(graph)
            for node in graph.nodes:
                node.meta.pop("val", None)  # of the original: other sizes
        inputs = used_inputs(self.packed.graph, self.packed.inputs)
        late_inputs = used_inputs(self.late.graph, self.late.inputs)
        order_placeholders(self.packed.graph, list(inputs.values()))
        order_placeholders(self.late.graph, list(late_inputs.values()))
        order_placeholders(self.requests.graph, list(self.requests.inputs.values()))
        formulas = {m.formula.data: m.formula for m in self.matches.values()}
        for factor in (f for group in self.guards.groups for f in group):
            self.late.note_cuts(factor.selection)
        for selection in self.scored:
            self.late.note_cuts(selection)
        guards = [[(self.result(f.node), f) for f in group] for group in self.guards.groups]
        leaves = tree_leaves(self.gm.graph.output_node().args[0])
        outputs = [self.late.tokens_of(leaf) for leaf in leaves]
        to_zero = [
            i
            for i, (leaf, layout) in enumerate(zip(leaves, outputs, strict=True))
            if layout is not None and self.analysis.kind(leaf) == LATE and not self.late.shares_memory(leaf)
        ]
        data_masks = [
            (self.result(node), formulas[node].data_additive, formulas[node].data_negated)
            for node in self.data_masks
        ]
        biases = [
            (self.column_result(bias.node), bias.dims, bias.limit)
            for m in self.matches.values()
            for bias in m.biases
        ]
        prologue = prologue_module(
            self.gm, self.prologue_results, self.analysis
        )  # when all results are known
        if isinstance(prologue, Unsupported):
            return prologue
        return PackedGraphs(
            guards=guards,
            cuts=self.late.cuts,
            can_drop_padding=self.guards.refusal is None,
            mask_columns=list(self.mask_columns),
            mask_of=[self.mask_columns_of(m) for m in self.matches.values()],
            data_masks=data_masks,
            biases=list(dict.fromkeys(biases)),
            prologue=prologue,
            packed=module_of(self.gm, self.packed.graph),
            late=module_of(self.gm, self.late.graph),
            results=list(self.prologue_results),
            inputs=list(inputs),
            late_inputs=list(late_inputs),
            requests=module_of(self.gm, self.requests.graph),
            request_inputs=list(self.requests.inputs),
            request_widths=self.requests.widths,
            keys=list(self.keys),
            position_is_key=self.position_is_key,
            whole=self.analysis.whole,
            matches=list(self.matches.values()),
            outputs=outputs,
            to_zero=to_zero,
            scored=self.scored,
        )

    def mask_columns_of(self, match: AttentionMatch) -> int:
        """Index of an attention's columns among the distinct ones."""
        data = () if match.formula.data is None else (-1 - self.data_masks[match.formula.data],)
        valid = (*(self.column_result(self.columns[c]) for c in match.formula.key_valid), *data)
        same = tuple(self.column_result(self.columns[c]) for c in match.formula.same_value)
        return self.mask_columns.setdefault(MaskColumns(valid, same), len(self.mask_columns))
