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

from .graph import is_mode_switch
from .layout import KEY, ROW
from .lower_batch import RequestSide
from .lower_late import LateSide
from .lower_packed import PackedSide
from .original import Original
from .packed_graphs import PackedGraphs
from .reasons import Unsupported
from .rules import LATE, STREAM, WEIGHT
from .subgraph import drop_dead, module_of, order_placeholders, prologue_module, used_inputs


class Lowering:
    """Builds the graphs. Nothing of the original graph is changed."""

    def __init__(self, original: Original) -> None:
        self.original = original
        self.packed = PackedSide(original)
        self.requests = RequestSide(original)
        self.late = LateSide(original, self.packed, self.requests)

    def run(self) -> PackedGraphs | Unsupported:
        refusal = self._check_scores() or self._check_tables()
        if refusal is not None:
            return refusal
        values, live = self.original.analysis.values, self.original.live
        for node in self.original.gm.graph.nodes:
            if is_mode_switch(node):
                self._copy_switch(node)
            elif node.op == "output":
                self.late.graph.output(fx.map_arg(node.args[0], self.late.output_value))
            elif node in live and values[node].kind == STREAM and not self._inside_attention(node):
                self.packed.add(node)
                if self.late.is_unpacked(node):
                    self.late.value(node)  # here, between the mode switches that hold for it
            elif node in live and values[node].kind == LATE:
                self.late.add(node)
            elif node in live and values[node].kind == WEIGHT and node.op != "placeholder":
                self._emit_weight(node)
        return self._finish()

    def _emit_weight(self, node: fx.Node) -> None:
        """What is computed from parameters goes where it stood, between the same mode switches, to both graphs."""
        self.packed.env[node] = self.packed.graph.node_copy(node, self.packed.value)
        self.late.env[node] = self.late.graph.node_copy(node, self.late.value)

    def _copy_switch(self, node: fx.Node) -> None:
        self.packed.env[node] = self.packed.graph.node_copy(node, lambda n: self.packed.env[n])
        self.late.env[node] = self.late.graph.node_copy(node, lambda n: self.late.env[n])

    def _inside_attention(self, node: fx.Node) -> bool:
        """Scores and probabilities: computed by `prefix_attention`."""
        return any(layout.has(KEY) for layout in self.original.analysis.values[node].layouts)

    def _check_scores(self) -> Unsupported | None:
        """Scores and probabilities may only be used by their own attention."""
        original, analysis = self.original, self.original.analysis
        for node, value in analysis.values.items():
            if value.kind != STREAM or not any(layout.has(KEY) for layout in value.layouts):
                continue
            for user in node.users:
                kind = LATE if user.op == "output" else analysis.kind(user)
                inside = kind == STREAM and (user in original.matches or self._inside_attention(user))
                if not inside and user in original.live:
                    hint = "pass output_attentions=False"
                    return Unsupported(
                        "token_mixing", node, "attention weights are used outside of attention", hint
                    )
        return None

    def _check_tables(self) -> Unsupported | None:
        """A table by position has no rows to unpack it to."""
        analysis = self.original.analysis
        for node, value in analysis.values.items():
            if value.kind != STREAM or all(
                layout.has(ROW) or not layout.selection.is_whole for layout in value.layouts
            ):
                continue
            for user in node.users:
                if user in self.original.live and (user.op == "output" or analysis.kind(user) == LATE):
                    return Unsupported(
                        "row_layout", user, "a table by position is used outside of the token stream"
                    )
        return None

    def _finish(self) -> PackedGraphs | Unsupported:
        original, analysis = self.original, self.original.analysis
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
        formulas = {m.formula.data: m.formula for m in original.matches.values()}
        for factor in (f for group in original.guards.groups for f in group):
            self.late.note_cuts(factor.selection)
        for selection in original.scored:
            self.late.note_cuts(selection)
        guards = [[(original.result(f.node), f) for f in group] for group in original.guards.groups]
        leaves = tree_leaves(original.gm.graph.output_node().args[0])
        outputs = [self.late.tokens_of(leaf) for leaf in leaves]
        to_zero = [
            i
            for i, (leaf, layout) in enumerate(zip(leaves, outputs, strict=True))
            if layout is not None and analysis.kind(leaf) == LATE and not self.late.shares_memory(leaf)
        ]
        data_masks = [
            (original.result(node), formulas[node].data_additive, formulas[node].data_negated)
            for node in original.data_masks
        ]
        biases = [
            (original.column_result(bias.node), bias.dims, bias.limit)
            for m in original.matches.values()
            for bias in m.biases
        ]
        prologue = prologue_module(original.gm, original.results, analysis)  # when all results are known
        if isinstance(prologue, Unsupported):
            return prologue
        return PackedGraphs(
            guards=guards,
            cuts=self.late.cuts,
            can_drop_padding=original.guards.refusal is None,
            mask_columns=list(original.mask_columns),
            mask_of=[original.mask_columns_of(m) for m in original.matches.values()],
            data_masks=data_masks,
            biases=list(dict.fromkeys(biases)),
            prologue=prologue,
            packed=module_of(original.gm, self.packed.graph),
            late=module_of(original.gm, self.late.graph),
            results=list(original.results),
            inputs=list(inputs),
            late_inputs=list(late_inputs),
            requests=module_of(original.gm, self.requests.graph),
            request_inputs=list(self.requests.inputs),
            request_widths=self.requests.widths,
            keys=list(original.keys),
            position_is_key=original.position_is_key,
            whole=analysis.whole,
            matches=list(original.matches.values()),
            outputs=outputs,
            to_zero=to_zero,
            scored=original.scored,
        )
