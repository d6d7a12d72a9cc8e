"""Graphs over the batch, of what is known before the packed graph runs; and which entries are looked up."""

from __future__ import annotations

from typing import Any

from torch import fx

from .graph import aten, bound_args
from .layout import Selection, TokenLayout
from .original import Original
from .propagate import NUMBER
from .rules import PROLOGUE
from .subgraph import input_of
from .unpack import label_request, loss_request


class BatchSide:
    """Builds a graph of arguments, the prologue's results and maps from the batch to packed tokens.

    Args:
        original: what is lowered.
    """

    def __init__(self, original: Original) -> None:
        self.original = original
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.inputs: dict[tuple[str, int], fx.Node] = {}
        self.maps: dict[tuple[int, str], fx.Node] = {}

    def _input(self, source: str, index: int) -> fx.Node:
        return input_of(self.graph, self.inputs, (source, index), f"{source}_{index}")

    def value(self, node: fx.Node) -> Any:
        """This graph's value for a node of the original graph."""
        if node in self.env:
            return self.env[node]
        kind = self.original.analysis.kind(node)
        if node in self.original.placeholders:
            found = self._input("argument", self.original.placeholders[node])
        elif kind in (PROLOGUE, NUMBER):
            found = self._input("prologue", self.original.result(node))
        else:
            raise AssertionError(f"{node} ({kind}) comes too late")
        self.env[node] = found
        return found

    def map(self, selection: Selection, source: str = "token_of") -> fx.Node:
        """The map from the tokens of a selection to packed tokens: the same cuts, applied to a map [N, S].

        `source` is "token_of", or "class_of", which has -1 where a token was dropped. Where tokens were picked out, the
        map leads to those.
        """
        if selection.parent is None:
            return self._input(source, 0)
        found = self.maps.get((id(selection), source))
        if found is None:
            target, args = cut_of(selection)
            is_scored = selection in self.original.scored
            parent = self._input(f"scored_{source}", 0) if is_scored else self.map(selection.parent, source)
            found = self.graph.call_function(target, (parent, *fx.map_arg(args, self.value)))
            self.maps[(id(selection), source)] = found
        return found


class RequestSide(BatchSide):
    """Builds the graph that says which entries of packed values are looked up: labels, known from inputs alone."""

    def __init__(self, original: Original) -> None:
        super().__init__(original)
        self.requests: dict[Any, fx.Node] = {}
        self.widths: list[int] = []

    def add(self, layout: TokenLayout, labels: fx.Node, ignore_index: int | None, width: int) -> int:
        """The number of a request.

        Args:
            layout: of the value that is looked into, `[..tokens.., V]`.
            labels: entries for each token, `[..tokens.., K]`; or one for each, of a loss with an `ignore_index`.
            width: V.
        """
        key = layout.selection, layout.dims, labels, ignore_index
        if key not in self.requests:
            where = self.map(layout.selection), layout.dims, self.value(labels)
            self.requests[key] = (
                self.graph.call_function(label_request, where)
                if ignore_index is None
                else self.graph.call_function(loss_request, (*where, ignore_index))
            )
            self.widths.append(width)
        return list(self.requests).index(key)


def cut_of(selection: Selection) -> tuple[Any, tuple[Any, ...]]:
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
