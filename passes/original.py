"""What is lowered: the original graph, what is known of it, and the numbers of the prologue's results."""

from __future__ import annotations

from torch import fx

from .attention_match import AttentionMatch
from .layout import POSITION, ROW, Dim
from .mask_columns import emit_column
from .mask_formula import Column
from .packed_graphs import MaskColumns
from .padding import Guards
from .propagate import Analysis, Value
from .rules import PROLOGUE
from .scored import scored_selections
from .subgraph import first_alike, live_nodes


class Original:
    """Asked by those that build the graphs. The graph is grown by what masks are computed from, and else as it was.

    Args:
        guards: what has to hold on a batch for its padding to be dropped.
        engine: of attention, by name.
    """

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
        self.placeholders = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
        self.live = live_nodes(gm.graph)
        self.scored = scored_selections(analysis, self.live)
        self.results: dict[fx.Node, int] = {}
        self.keys: dict[tuple[int, tuple[Dim, ...]], None] = {}
        self.position_is_key = False
        self.data_masks: dict[fx.Node, int] = {}
        self.columns: dict[Column, fx.Node] = {}
        self.mask_columns: dict[MaskColumns, int] = {}
        self._alike = first_alike(gm.graph, analysis)
        self._find_keys()

    def result(self, node: fx.Node) -> int:
        """Index of `node` among the prologue's results."""
        return self.results.setdefault(node, len(self.results))

    def column_result(self, node: fx.Node) -> int:
        """The same for a column, of which one may stand for others: nobody gets it to write to."""
        return self.result(self._alike.get(node, node))

    def mask_columns_of(self, match: AttentionMatch) -> int:
        """Index of an attention's columns among the distinct ones."""
        data = () if match.formula.data is None else (-1 - self.data_masks[match.formula.data],)
        valid = (*(self.column_result(self.columns[c]) for c in match.formula.key_valid), *data)
        same = tuple(self.column_result(self.columns[c]) for c in match.formula.same_value)
        return self.mask_columns.setdefault(MaskColumns(valid, same), len(self.mask_columns))

    def _find_keys(self) -> None:
        """What tokens must have in common to be one: all that enters the packed graph, by token."""
        for node, dims in self.analysis.columns:
            if node in self.live or node.op == "placeholder":
                self._key(node, dims)
        like = next(iter(self.analysis.columns))[0]
        for match in self.matches.values():
            for column in (*match.formula.key_valid, *match.formula.same_value):
                self._column_node(column, like)
            for bias in match.biases:
                self._key(bias.node, bias.dims)
            if match.formula.data is not None:
                self.data_masks.setdefault(match.formula.data, len(self.data_masks))

    def _key(self, node: fx.Node, dims: tuple[Dim, ...]) -> None:
        if any(ROW in dim for dim in dims):
            self.keys[(self.column_result(node), dims)] = None
        else:
            self.position_is_key = True

    def _column_node(self, column: Column, like: fx.Node) -> None:
        """The node of the graph (grown by elementwise ones) that computes a mask's column as [N, S]."""
        if column in self.columns:
            return
        output = self.gm.graph.output_node()
        with self.gm.graph.inserting_before(output):
            found = emit_column(self.gm.graph, column, like)
        for node in self.gm.graph.nodes:
            self.analysis.values.setdefault(node, Value(PROLOGUE))
        self.columns[column] = found
        self._key(found, ((ROW,), (POSITION,)))
