"""The late graph: what follows the last token mixer and isn't position-wise, as written, on unpacked `[N, S, ...]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from .graph import aten, base_of, bound_args, memory_order, val
from .layout import Selection, TokenLayout
from .lower_packed import PackedSide
from .packed_graphs import ResultRef
from .propagate import NUMBER
from .rules import LATE, PROLOGUE, STREAM
from .subgraph import views_of_shared_outputs
from .unpack import gather_entries, label_loss, unpack_tokens

if TYPE_CHECKING:
    from .lower import Lowering


class LateSide:
    """Builds the late graph, node by node, in the order of the original.

    Args:
        whole: what is being lowered.
        packed: the packed graph, which gets the results that are unpacked here.
    """

    def __init__(self, whole: Lowering, packed: PackedSide) -> None:
        self.whole, self.packed = whole, packed
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.inputs: dict[tuple[str, int], fx.Node] = {}
        self.maps: dict[tuple[int, str], fx.Node] = {}
        self.cuts: dict[Selection, tuple[Any, Any]] = {}
        self.shared_views = views_of_shared_outputs(whole.gm.graph)

    def _input(self, source: str, index: int) -> fx.Node:
        found = self.inputs.get((source, index))
        if found is None:
            first = next(iter(self.graph.nodes), None)
            with (
                self.graph.inserting_before(first) if first is not None else self.graph.inserting_after(None)
            ):
                found = self.graph.placeholder(f"{source}_{index}")
            self.inputs[(source, index)] = found
        return found

    def output_value(self, node: fx.Node) -> Any:
        """The late graph's value that the caller gets: zeros where tokens were dropped."""
        if (
            self.whole.analysis.kind(node) != STREAM
            or self.shares_memory(node)
            or node in self.whole.placeholders
        ):
            return self.value(node)
        return self._unpacked(node, "class_of")

    def shares_memory(self, node: fx.Node) -> bool:
        """Do other outputs look into the same memory? They all have to be made from one unpacked value."""
        return node in self.shared_views or base_of(node) in {base_of(v) for v in self.shared_views}

    def _unpacked(self, node: fx.Node, source: str) -> fx.Node:
        layout = self.whole.analysis.values[node].layout
        packed = self._packed_result(self.packed.value(node))
        token_map = self._map(layout.selection, source)
        # what runs as written, in this graph or after it, may look at memory through another shape
        return self.graph.call_function(
            unpack_tokens, (packed, token_map, layout.dims, memory_order(val(node)))
        )

    def value(self, node: fx.Node) -> Any:
        """The late graph's value for a node of the original graph; tokens are unpacked.

        Dropped tokens get the value of another one. Whatever reads them is switched off there by a factor of zero
        (`padding.py`), and zero times a number is zero; but zeros in their place might become infinite on the way.
        """
        if node in self.env:
            return self.env[node]
        kind = self.whole.analysis.kind(node)
        if node in self.whole.placeholders:
            found: Any = self._input("argument", self.whole.placeholders[node])
        elif kind in (PROLOGUE, NUMBER):
            found = self._input("prologue", self.whole.result(node))
        elif kind == STREAM and node in self.shared_views:
            found = self.graph.node_copy(
                node, self.value
            )  # of the unpacked base: outputs that share memory still do
        elif kind == STREAM:
            found = self._unpacked(node, "token_of")
        else:
            raise AssertionError(f"{node} ({kind}) comes too late")
        self.env[node] = found
        return found

    def _packed_result(self, packed: fx.Node) -> fx.Node:
        """The late graph's input for a value of the packed graph."""
        index = self.packed.outputs.setdefault(packed, len(self.packed.outputs))
        return self._input("packed", index)

    def _map(self, selection: Selection, source: str = "token_of") -> fx.Node:
        """The map from the tokens of a selection to packed tokens: the same cuts, applied to a map [N, S].

        `source` is "token_of", or "class_of", which has -1 where a token was dropped. Where tokens were picked out, the
        map leads to those.
        """
        if selection.parent is None:
            return self._input(source, 0)
        found = self.maps.get((id(selection), source))
        if found is None:
            target, args = _cut(selection)
            is_scored = selection in self.whole.scored
            parent = self._input(f"scored_{source}", 0) if is_scored else self._map(selection.parent, source)
            found = self.graph.call_function(target, (parent, *fx.map_arg(args, self.value)))
            self.maps[(id(selection), source)] = found
        return found

    def note_cuts(self, selection: Selection) -> None:
        """What the plan needs to apply a selection's cuts by itself."""
        if selection.parent is not None and selection not in self.cuts:
            target, args = _cut(selection)
            self.cuts[selection] = (target, fx.map_arg(args, self._result_ref))
            self.note_cuts(selection.parent)

    def _result_ref(self, node: fx.Node) -> Any:
        return ResultRef(self.whole.result(node))

    def add(self, node: fx.Node) -> None:
        outcome = self.whole.analysis.values[node].outcome
        special = LATE_LOWERINGS.get(outcome.action) if outcome is not None else None
        self.env[node] = special(self, node, outcome) if special else self.graph.node_copy(node, self.value)

    def gather_entries(self, node: fx.Node, outcome: Any) -> fx.Node:
        args = bound_args(node)[0]
        layout = outcome.layout
        return self.graph.call_function(
            gather_entries,
            (
                self._packed_result(self.packed.value(args[0])),
                self._map(layout.selection),
                layout.dims,
                self.value(args[2]),
            ),
        )

    def label_loss(self, node: fx.Node, outcome: Any) -> fx.Node:
        """Log-probabilities are packed; the label's entries are gathered; the reduction runs as written."""
        x, target, weight, reduction, ignore_index, *smoothing = bound_args(node)[0]
        layout, logs, smooth = outcome.layout, self.packed.value(x), None
        if val(x).dtype != val(node).dtype:  # autocast computes the loss in float32
            logs = self.packed.graph.call_function(aten.to.dtype, (logs, val(node).dtype))
        if outcome.action == "cross_entropy_loss":
            logs = self.packed.graph.call_function(aten.log_softmax.int, (logs, -1))
        if smoothing and smoothing[0]:
            scaled = (
                logs
                if weight is None
                else self.packed.graph.call_function(aten.mul.Tensor, (logs, self.packed.value(weight)))
            )
            smooth = self._packed_result(
                self.packed.graph.call_function(aten.sum.dim_IntList, (scaled, [-1]))
            )
        return self.graph.call_function(
            label_loss,
            (
                self._packed_result(logs), smooth, self._map(layout.selection), layout.dims, self.value(target),
                None if weight is None else self.value(weight), reduction, ignore_index, *smoothing,
            ),
        )  # fmt: skip

    def is_unpacked(self, node: fx.Node) -> bool:
        """Is the value used outside of the packed graph, other than as the logits of a label gather or loss?"""
        for user in node.users:
            if user in self.whole.live and (user.op == "output" or self.whole.analysis.kind(user) == LATE):
                outcome = None if user.op == "output" else self.whole.analysis.values[user].outcome
                if outcome is None or outcome.action not in LATE_LOWERINGS:
                    return True
        return False

    def tokens_of(self, leaf: Any) -> TokenLayout | None:
        if not isinstance(leaf, fx.Node):
            return None
        value = self.whole.analysis.values[leaf]
        layout = value.layout if value.kind == STREAM else self.whole.guards.layouts.get(leaf)
        if layout is not None:
            self.note_cuts(layout.selection)
        return layout


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


LATE_LOWERINGS: dict[str, Callable[[LateSide, fx.Node, Any], fx.Node]] = {
    "gather_entries": LateSide.gather_entries,
    "cross_entropy_loss": LateSide.label_loss,
    "nll_loss_nd": LateSide.label_loss,
    "nll_loss": LateSide.label_loss,
}
