"""Lookups laid side by side along positions → lookups for all positions, of which each takes its own.

    cat([table_a[a], table_b[b]], 1)    a [N, A], b [N, B]: virtual tokens before a prompt (prompt tuning), for instance

    ids = cat([a, b], 1)                                                        [N, A + B]
    part = cat([0 · a, 0 · b + 1], 1)
    where(part == 1, table_b[where(part == 1, ids, 0)], table_a[where(part == 0, ids, 0)])

Ids and parts come from the caller's data, so they are key columns like any others, and virtual tokens are a shared
prefix like any other. Every position looks something up in every table, entry 0 if it isn't its own: that must exist,
its gradient there is zero, and nobody may count how often it is looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .aliasing import is_anything_between
from .graph import aten, bound_args, call, is_state, requires_grad, same_size, shape, sizes, val

# Each table costs a lookup for all positions.
MOST_PARTS = 4

_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.alias.default}


@dataclass(frozen=True)
class _Part:
    """`[N, L, d]`: a table [V, d] at an index [N, L], [1, L] or [L] (None: at 0, 1, ..., V - 1), and casts of that.

    Args:
        first: the lookup's node, or what repeats the table.
        options: of the lookup: its padding index.
    """

    first: fx.Node
    table: fx.Node
    index: fx.Node | None
    options: tuple[Any, ...]
    casts: tuple[fx.Node, ...]


def join_lookups(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The same as a `cat`, or None if it isn't one of lookups along positions."""
    values, dim = bound_args(node)[0]
    if len(shape(node)) != 3 or dim not in (1, -2) or not 2 <= len(values) <= MOST_PARTS:
        return None
    parts = [part for part in map(_part, values) if part is not None]
    if len(parts) < len(values) or is_anything_between(min(part.first for part in parts), node):
        return None
    found = _indices(graph, parts, node)
    return None if found is None else _join(graph, parts, found)


def _indices(graph: fx.Graph, parts: Sequence[_Part], node: fx.Node) -> list[fx.Node] | None:
    """The index of each part as [N, L]; None if none of them has all rows."""
    indices = [_arange(graph, part.table) if part.index is None else part.index for part in parts]
    rows = next((i for i in indices if len(shape(i)) == 2 and same_size(shape(i)[0], shape(node)[0])), None)
    if rows is None:
        return None
    number = sizes(graph, rows)[0]
    return [call(graph, aten.expand.default, index, [number, -1]) for index in indices]


def _join(graph: fx.Graph, parts: Sequence[_Part], indices: Sequence[fx.Node]) -> fx.Node:
    ids = call(graph, aten.cat.default, list(indices), 1)
    numbers = [call(graph, aten.full_like.default, index, i) for i, index in enumerate(indices)]
    which = call(graph, aten.cat.default, numbers, 1)

    def own(i: int) -> tuple[fx.Node, fx.Node]:
        """Which positions are part i's, and its values there."""
        is_own = call(graph, aten.eq.Scalar, which, i)
        return is_own, _again(graph, parts[i], call(graph, aten.where.ScalarOther, is_own, ids, 0))

    _, joined = own(0)
    for i in range(1, len(parts)):
        is_own, value = own(i)
        joined = call(graph, aten.where.self, call(graph, aten.unsqueeze.default, is_own, -1), value, joined)
    return joined


def _again(graph: fx.Graph, part: _Part, index: fx.Node) -> fx.Node:
    """The lookup and its casts, for other indices."""
    value = call(graph, aten.embedding.default, part.table, index, *part.options)
    for cast in part.casts:
        options: dict[str, Any] = cast.kwargs
        value = call(graph, cast.target, value, *cast.args[1:], **options)
    return value


def _part(node: fx.Node) -> _Part | None:
    casts: list[fx.Node] = []
    last = node
    while node.target in _CASTS or _repeats_rows(node):
        if node.target in _CASTS:
            casts.insert(0, node)
        last, node = node, node.all_input_nodes[0]
    if node.op == "placeholder" and (is_state(node) or requires_grad(node)) and len(shape(node)) == 2:
        found = _Part(last, node, None, (), tuple(casts))
    elif node.target is aten.embedding.default:
        (table, index, *options), _ = bound_args(node)
        if any(options[1:]):  # counts lookups (scale_grad_by_freq), or lists them (sparse)
            return None
        found = _Part(node, table, index, tuple(options), tuple(casts))
        if len(shape(index)) not in (1, 2):
            return None
    else:
        return None
    entries = shape(found.table)[0]
    return found if isinstance(entries, int) and entries > 0 else None


def _repeats_rows(node: fx.Node) -> bool:
    """Does it put the same [L, d] in each of its rows, from [L, d] or [1, L, d]?"""
    if node.target not in (aten.repeat.default, aten.expand.default, aten.unsqueeze.default):
        return False
    before, after = shape(node.args[0]), shape(node)
    is_one = len(before) == 2 or (len(before) == 3 and same_size(before[0], 1))
    return is_one and len(after) == 3 and all(map(same_size, before[-2:], after[-2:]))


def _arange(graph: fx.Graph, table: fx.Node) -> fx.Node:
    """0, 1, ... for each entry of a table."""
    entries, device = shape(table)[0], val(table).device
    return call(graph, aten.arange.default, entries, device=device, like=table)
