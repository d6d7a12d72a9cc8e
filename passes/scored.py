"""Which tokens the head is computed for: those that a slice behind the last attention leaves, if it leaves fewer.

    hidden [N, S, d] → hidden[:, -K:] → logits [N, K, V]            (transformers' `logits_to_keep`)
    packed: hidden [1, T, d] → index_select by `scored` [T'] → logits [1, T', V]

Slices only change the map from the batch to the packed tokens, as a rule. Here the packed tokens that are left are
picked out, since a linear layer follows. Which ones these are follows from the slice and the plan, on the host.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .graph import bound_args, contracted_size, is_tensor, size_hint
from .layout import Selection, TokenLayout
from .propagate import Analysis
from .rules import STREAM

# Above this share of the batch's positions there is little to leave out.
MOST_SHARE = 0.75


def scored_selections(analysis: Analysis, live: set[fx.Node]) -> set[Selection]:
    """The selections that are cut from the whole batch and pick out packed tokens."""
    found = {
        outermost(layout.selection)
        for node, value in analysis.values.items()
        if node in live and value.kind == STREAM and contracted_size(node) is not None
        for layout in value.layouts
        if not layout.selection.is_whole
    }
    return {s for s in found if _is_known_on_host(s) and _share(s, analysis.whole) <= MOST_SHARE}


def is_scored(layout: TokenLayout, scored: set[Selection]) -> bool:
    """Are a value's packed tokens those that were picked out?"""
    return not layout.selection.is_whole and outermost(layout.selection) in scored


def outermost(selection: Selection) -> Selection:
    """What the first cut left."""
    while selection.parent is not None and not selection.parent.is_whole:
        selection = selection.parent
    return selection


def _is_known_on_host(selection: Selection) -> bool:
    """Is it cut by numbers, and not by a tensor of indices?"""
    assert selection.node is not None
    arguments: list[Any] = []
    fx.map_arg(bound_args(selection.node)[0][1:], arguments.append)
    return not any(is_tensor(n) for n in arguments)


def _share(selection: Selection, whole: Selection) -> float:
    """Of the batch that was traced."""
    share = 1.0
    for size, of in ((selection.rows, whole.rows), (selection.positions, whole.positions)):
        share *= (1 if size is None else size_hint(size)) / size_hint(of)
    return share
