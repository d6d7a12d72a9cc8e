"""The late graph: what follows the last token mixer and isn't position-wise, as written, on unpacked `[N, S, ...]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from .aliasing import base_of
from .graph import aten, bound_args, memory_order, val
from .layout import Selection, TokenLayout
from .lower_batch import BatchSide, RequestSide, cut_of
from .lower_packed import PackedSide
from .original import Original
from .packed_graphs import ResultRef
from .rules import LATE, STREAM
from .subgraph import views_of_shared_outputs
from .unpack import label_loss, unpack_numbers, unpack_tokens


class LateSide(BatchSide):
    """Builds the late graph, node by node, in the order of the original.

    Args:
        original: what is lowered.
        packed: the packed graph, which gets the results that are unpacked here.
        requests: the graph of requests, which gets those of labels.
    """

    def __init__(self, original: Original, packed: PackedSide, requests: RequestSide) -> None:
        super().__init__(original)
        self.packed, self.requests = packed, requests
        self.cuts: dict[Selection, tuple[Any, Any]] = {}
        self.shared_views = views_of_shared_outputs(original.gm.graph)

    def output_value(self, node: fx.Node) -> Any:
        """The late graph's value that the caller gets: zeros where tokens were dropped."""
        if (
            self.original.analysis.kind(node) != STREAM
            or self.shares_memory(node)
            or node in self.original.placeholders
        ):
            return self.value(node)
        return self._unpacked(node, "class_of")

    def shares_memory(self, node: fx.Node) -> bool:
        """Do other outputs look into the same memory? They all have to be made from one unpacked value."""
        return node in self.shared_views or base_of(node) in {base_of(v) for v in self.shared_views}

    def _unpacked(self, node: fx.Node, source: str) -> fx.Node:
        layout = self.original.analysis.values[node].layout
        packed = self._packed_result(self.packed.value(node))
        token_map = self.map(layout.selection, source)
        # what runs as written, in this graph or after it, may look at memory through another shape
        return self.graph.call_function(
            unpack_tokens, (packed, token_map, layout.dims, memory_order(val(node)))
        )

    def value(self, node: fx.Node) -> Any:
        """The late graph's value for a node of the original graph; tokens are unpacked.

        Dropped tokens get the value of another one. Whatever reads them is switched off there by a factor of zero
        (`padding.py`), and zero times a number is zero; but zeros in their place might become infinite on the way.
        """
        is_stream = self.original.analysis.kind(node) == STREAM and node not in self.original.placeholders
        if is_stream and node not in self.env:
            # outputs that share memory still do: a view of the unpacked base
            is_view = node in self.shared_views
            self.env[node] = (
                self.graph.node_copy(node, self.value) if is_view else self._unpacked(node, "token_of")
            )
        return super().value(node)

    def _packed_result(self, packed: fx.Node) -> fx.Node:
        """The late graph's input for a value of the packed graph."""
        index = self.packed.outputs.setdefault(packed, len(self.packed.outputs))
        return self._input("packed", index)

    def note_cuts(self, selection: Selection) -> None:
        """What the plan needs to apply a selection's cuts by itself."""
        if selection.parent is not None and selection not in self.cuts:
            target, args = cut_of(selection)
            self.cuts[selection] = (target, fx.map_arg(args, self._result_ref))
            self.note_cuts(selection.parent)

    def _result_ref(self, node: fx.Node) -> Any:
        return ResultRef(self.original.result(node))

    def add(self, node: fx.Node) -> None:
        outcome = self.original.analysis.values[node].outcome
        special = LATE_LOWERINGS.get(outcome.action) if outcome is not None else None
        self.env[node] = special(self, node, outcome) if special else self.graph.node_copy(node, self.value)

    def gather_entries(self, node: fx.Node, outcome: Any) -> fx.Node:
        x, _, index, *_ = bound_args(node)[0]
        entries = self._entries(self.packed.value(x), outcome.layout, index, None, val(x).shape[-1])
        return self.graph.call_function(aten.reshape_as.default, (entries, self.value(index)))

    def label_loss(self, node: fx.Node, outcome: Any) -> fx.Node:
        """Log-probabilities are packed, and the labels' entries looked up there; the reduction runs as written."""
        x, target, weight, reduction, ignore_index, *smoothing = bound_args(node)[0]
        call, logs, smooth = self.packed.graph.call_function, self.packed.value(x), None
        if val(x).dtype != val(node).dtype:  # autocast computes the loss in float32
            logs = call(aten.to.dtype, (logs, val(node).dtype))
        if outcome.action == "cross_entropy_loss":
            logs = call(aten.log_softmax.int, (logs, -1))
        if smoothing and smoothing[0]:
            scaled = logs if weight is None else call(aten.mul.Tensor, (logs, self.packed.value(weight)))
            mean = self._packed_result(call(aten.mean.dim, (scaled, [-1])))
            where = self.map(outcome.layout.selection), outcome.layout.dims
            smooth = self.graph.call_function(unpack_numbers, (mean, *where))
        entries = self._entries(logs, outcome.layout, target, ignore_index, val(x).shape[-1])
        weight = None if weight is None else self.value(weight)
        given = entries, self.value(target), weight, reduction, ignore_index, smooth, *smoothing
        return self.graph.call_function(label_loss, given)

    def _entries(
        self, packed: fx.Node, layout: TokenLayout, labels: fx.Node, ignore_index: int | None, width: int
    ) -> fx.Node:
        """Entries [M, K] of a packed value, looked up in the packed graph."""
        request = self.requests.add(layout, labels, ignore_index, width)
        return self._packed_result(self.packed.look_up(packed, request, width))

    def is_unpacked(self, node: fx.Node) -> bool:
        """Is the value used outside of the packed graph, other than as the logits of a label gather or loss?"""
        for user in node.users:
            if user in self.original.live and (
                user.op == "output" or self.original.analysis.kind(user) == LATE
            ):
                outcome = None if user.op == "output" else self.original.analysis.values[user].outcome
                if outcome is None or outcome.action not in LATE_LOWERINGS:
                    return True
        return False

    def tokens_of(self, leaf: Any) -> TokenLayout | None:
        if not isinstance(leaf, fx.Node):
            return None
        value = self.original.analysis.values[leaf]
        layout = value.layout if value.kind == STREAM else self.original.guards.layouts.get(leaf)
        if layout is not None:
            self.note_cuts(layout.selection)
        return layout


LATE_LOWERINGS: dict[str, Callable[[LateSide, fx.Node, Any], fx.Node]] = {
    "gather_entries": LateSide.gather_entries,
    "cross_entropy_loss": LateSide.label_loss,
    "nll_loss_nd": LateSide.label_loss,
    "nll_loss": LateSide.label_loss,
}
