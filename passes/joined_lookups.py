"""Lookups laid side by side along positions → lookups in all of them, of which each token takes its own.

    cat([table_a[a], table_b[b]], 1)    a [N, A], b [N, B]: virtual tokens before a prompt (prompt tuning), for instance

    ids = cat([a, b], 1)                                                        [N, A + B]
    part = cat([0 · a, 0 · b + 1], 1)
    where(part == 1, table_b[where(part == 1, ids, 0)], table_a[where(part == 0, ids, 0)])

Ids and parts come from the caller's data, so they are key columns like any others, and virtual tokens are a shared
prefix like any other. Where a token isn't a lookup's own, the lookup's gradient is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .graph import aten, bound_args, call, is_mode_switch, mutated_args, same_size, shape, sizes

_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.alias.default}
_REPEATS = {aten.repeat.default, aten.expand.default}


@dataclass(frozen=True)
class _Part:
    """A lookup, and the casts of what it gave."""

    lookup: fx.Node
    casts: tuple[fx.Node, ...]

    @property
    def index(self) -> fx.Node:
        return bound_args(self.lookup)[0][1]


def join_lookups(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The same as a `cat`, or None if it isn't one of lookups along positions."""
    arguments = bound_args(node)[0]
    if len(shape(node)) != 3 or arguments[1] not in (1, -2):
        return None
    found = [_part(n) for n in arguments[0]]
    parts = [part for part in found if part is not None]
    if len(parts) < len(found) or len(parts) < 2 or _is_anything_between(parts, node):
        return None
    rows = next((p.index for p in parts if same_size(shape(p.index)[0], shape(node)[0])), None)
    if rows is None:
        return None
    number = sizes(graph, rows)[0]
    indices = [call(graph, aten.expand.default, part.index, [number, -1]) for part in parts]
    ids = call(graph, aten.cat.default, indices, 1)
    numbers = [call(graph, aten.full_like.default, index, i) for i, index in enumerate(indices)]
    which = call(graph, aten.cat.default, numbers, 1)
    joined: fx.Node | None = None
    for i, part in enumerate(parts):
        is_own = call(graph, aten.eq.Scalar, which, i)
        index = call(graph, aten.where.ScalarOther, is_own, ids, 0)
        value = _again(graph, part, index)
        if joined is not None:
            value = call(
                graph, aten.where.self, call(graph, aten.unsqueeze.default, is_own, -1), value, joined
            )
        joined = value
    return joined


def _part(node: fx.Node) -> _Part | None:
    casts: list[fx.Node] = []
    while node.target in _CASTS or (node.target in _REPEATS and _repeats_rows(node)):
        if node.target in _CASTS:
            casts.append(node)
        node = node.all_input_nodes[0]
    if node.target is not aten.embedding.default or len(shape(node)) != 3:
        return None
    return _Part(node, tuple(reversed(casts)))


def _repeats_rows(node: fx.Node) -> bool:
    """Is one row repeated, and nothing else?"""
    before, after = shape(node.args[0]), shape(node)
    return len(before) == len(after) == 3 and before[0] == 1 and all(map(same_size, before[1:], after[1:]))


def _again(graph: fx.Graph, part: _Part, index: fx.Node) -> fx.Node:
    """The lookup and its casts, for other indices."""
    (table, _, *rest), _ = bound_args(part.lookup)
    value = call(graph, aten.embedding.default, table, index, *rest)
    for cast in part.casts:
        value = call(graph, cast.target, value, *cast.args[1:], **cast.kwargs)
    return value


def _is_anything_between(parts: list[_Part], last: fx.Node) -> bool:
    """Is there a switch of modes or a write between the first lookup and the `cat`? Lookups may not move past one."""
    first = min(part.lookup for part in parts)
    node = first.next
    while node is not last:
        if is_mode_switch(node) or mutated_args(node):
            return True
        node = node.next
    return False
