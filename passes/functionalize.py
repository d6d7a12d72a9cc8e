"""In-place operations on the graph's own values, written out of place, through views too.

    x.add_(y)              →  x' = x.add(y)
    x[:, 1:].add_(y)       →  v = x[:, 1:].add(y);  x' = slice_scatter(x, v, 1, 1)
    k = empty(…)           →  k' = cat([a, b], -1)
    k[..., :4].copy_(a)
    k[..., 4:].copy_(b)

What is used after the write and looked into the old memory, `x` and its views, looks into `x'` from then on. Left as
they are, for the analysis to judge: writes into the caller's tensors and buffers, writes that only concern values
computed from inputs (the prologue runs as written), and writes through a view that can't be undone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .aliasing import is_fresh_item, is_view, mutated_args
from .graph import aten, bound_args, call, grad_mode, is_mode_switch, same_shape, shape, sizes, val
from .seeds import nodes_from_inputs_alone


def functionalize(gm: fx.GraphModule) -> None:
    """Rewrite `gm` (an ATen graph) in place."""
    writes = [n for n in gm.graph.nodes if n.op == "call_function" and mutated_args(n)]
    from_inputs = nodes_from_inputs_alone(gm.graph) if writes else set()
    for write in writes:
        _Write(gm.graph, write, write in from_inputs).rewrite()
    for node in list(gm.graph.nodes):
        if node.target is aten.slice_scatter.default:
            _join_slices(gm.graph, node)
    for node in reversed(gm.graph.nodes):
        if not node.users and (node.target in _SCATTERS | _EMPTY or node.target in _KINDS):
            gm.graph.erase_node(node)
    gm.recompile()


class _Write:
    """One in-place operation."""

    def __init__(self, graph: fx.Graph, node: fx.Node, from_inputs: bool) -> None:
        self.graph, self.node, self.from_inputs = graph, node, from_inputs
        self.order = {n: i for i, n in enumerate(graph.nodes)}

    def rewrite(self) -> None:
        target = self.node.args[0] if self.node.args else None
        functional = out_of_place(self.node)
        if functional is None or not isinstance(target, fx.Node):
            return
        chain = _views_to_base(target)
        if chain is None or not self._is_private(chain[-1], through_views=len(chain) > 1):
            return
        with self.graph.inserting_before(self.node):
            new = self._result(functional, target)
            for view, parent in itertools.pairwise(chain):
                new = _UNDO[_kind(view)](self, view, parent, new)
            self._refresh(chain[-1], new, kept=target)
        self.node.replace_all_uses_with(self.fresh.get(target, new))
        self.graph.erase_node(self.node)

    def _is_private(self, base: fx.Node, through_views: bool) -> bool:
        """May nobody else see the write: is the base made here, and are all later looks into it understood?"""
        if base.op != "call_function" or mutated_args(base) or (is_view(base) and not is_fresh_item(base)):
            return False
        aliases = self._aliases(base)
        if aliases is None:
            return False
        seen_later = [a for a in aliases if any(self._is_later(u) for u in a.users)]
        if not through_views and not seen_later:
            # under no_grad a write leaves the gradient as it was; its twin would cut it
            same_mode = grad_mode(base) == grad_mode(self.node)
            return same_mode or not val(base).is_floating_point()
        if self.from_inputs:
            return False
        switches = [n for n in self.graph.nodes if is_mode_switch(n)]
        last = max((self.order[u] for a in (base, *aliases) for u in a.users), default=0)
        return not any(self.order[base] < self.order[s] < last for s in switches)

    def _aliases(self, base: fx.Node) -> list[fx.Node] | None:
        """The views of `base` that exist before the write, parents first; None if one can't be made anew."""
        found: list[fx.Node] = []
        todo = [base]
        while todo:
            for user in todo.pop(0).users:
                if user.op != "call_function" or user in found or user is self.node or self._is_later(user):
                    continue
                if mutated_args(user) and user in self.order:
                    return None  # an earlier write that wasn't rewritten
                if not is_view(user):
                    continue
                if _kind(user):
                    found.append(user)
                    todo.append(user)
                elif any(self._is_later(u) or is_view(u) for u in user.users):
                    return None
        return found

    def _is_later(self, node: fx.Node) -> bool:
        return self.order.get(node, -1) > self.order[self.node]

    def _result(self, functional: Any, target: fx.Node) -> fx.Node:
        """What the write leaves in `target`, with its dtype and shape."""
        if functional is aten.copy.default:
            new = self.node.args[1]
            if not isinstance(new, fx.Node):
                return self.call(functional, *self.node.args)
            if val(new).device != val(target).device:
                return self.call(functional, *self.node.args)
            new = self.call(aten.clone.default, self.cast(new, val(target).dtype))  # memory of its own
            return (
                new
                if same_shape(new, target)
                else self.call(aten.expand.default, new, sizes(self.graph, target))
            )
        return self.cast(self.call(functional, *self.node.args, **self.node.kwargs), val(target).dtype)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if val(node).dtype == dtype else self.call(aten.to.dtype, node, dtype)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = call(self.graph, target, *args, **kwargs)
        new.meta = {**self.node.meta, "val": new.meta["val"]}
        return new

    def _refresh(self, base: fx.Node, new: fx.Node, kept: fx.Node) -> None:
        """Later uses of `base` and of its views become uses of `new` and of the same views of `new`."""
        self.fresh: dict[fx.Node, fx.Node] = {base: new}
        for view in self._aliases(base) or ():
            again = self.graph.node_copy(view, lambda n: self.fresh.get(n, n))
            again.meta = dict(view.meta)
            self.fresh[view] = again
        for old, fresh in self.fresh.items():
            old.replace_all_uses_with(
                fresh, delete_user_cb=lambda user: user is not self.node and self._is_later(user)
            )
        for fresh in reversed(self.fresh.values()):
            if fresh is not new and not fresh.users and fresh is not self.fresh.get(kept):
                self.graph.erase_node(fresh)


def out_of_place(node: fx.Node) -> Any:
    """The functional twin of `add_`, `mul_`, …, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name.removeprefix("aten::")
    if (
        mutated_args(node) != [node.args[0] if node.args else None]
        or torch.Tag.inplace_view in node.target.tags  # changes no elements, but the tensor's shape
        or not name.endswith("_")
        or name.endswith("__")
    ):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None


# -- views and how to undo them ---------------------------------------------------------------------------------------


def _views_to_base(node: fx.Node) -> list[fx.Node] | None:
    """`[node, its parent, …, base]`, or None if one of the views on the way can't be undone."""
    chain = [node]
    while is_view(chain[-1]) and chain[-1].op == "call_function" and not is_fresh_item(chain[-1]):
        if not _kind(chain[-1]):
            return None
        parent = chain[-1].args[0]
        if _kind(chain[-1]) == "item":
            assert isinstance(parent, fx.Node)
            parent = parent.args[0]
        assert isinstance(parent, fx.Node)
        chain.append(parent)
    return chain


def _kind(node: fx.Node) -> str:
    """The row of `_UNDO` for a view, "pieces" for several views at once, "" for what may or may not be a view."""
    if node.target in _KINDS:
        return _KINDS[node.target]
    if node.target is aten.to.dtype and is_view(node) and bound_args(node)[0][3] is False:
        return "alias"  # a cast to its own dtype returns the tensor itself
    source = node.args[0] if node.args else None
    if (
        isinstance(source, fx.Node)
        and not hasattr(node.target, "_schema")
        and _KINDS.get(source.target) == "pieces"
    ):
        return "item"
    return ""


def _undo_slice(write: _Write, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
    return write.call(aten.slice_scatter.default, parent, new, *bound_args(view)[0][1:])


def _undo_select(write: _Write, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
    return write.call(aten.select_scatter.default, parent, new, *bound_args(view)[0][1:])


def _undo_item(write: _Write, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
    """One piece of split, chunk or unbind."""
    pieces, index = view.args
    assert isinstance(pieces, fx.Node) and isinstance(index, int)
    args = bound_args(pieces)[0]
    dim = args[-1] % len(shape(parent))
    if pieces.target is aten.unbind.int:
        return write.call(aten.select_scatter.default, parent, new, dim, index)
    sizes = [p.shape[dim] for p in val(pieces)]
    start = sum(sizes[:index])
    return write.call(aten.slice_scatter.default, parent, new, dim, start, start + sizes[index])


def _undo_transpose(write: _Write, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
    return write.call(view.target, new, *view.args[1:])


def _undo_permute(write: _Write, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
    order: Any = view.args[1]
    rank = len(order)
    inverse = sorted(range(rank), key=lambda d: order[d] % rank)
    return write.call(aten.permute.default, new, inverse)


def _undo_unsqueeze(write: _Write, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
    return write.call(aten.squeeze.dim, new, view.args[1])


def _undo_reshape(write: _Write, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
    return write.call(aten.reshape.default, new, sizes(write.graph, parent))


def _undo_alias(write: _Write, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
    return new


_UNDO: dict[str, Callable[[_Write, fx.Node, fx.Node, fx.Node], fx.Node]] = {
    "slice": _undo_slice,
    "select": _undo_select,
    "item": _undo_item,
    "transpose": _undo_transpose,
    "permute": _undo_permute,
    "unsqueeze": _undo_unsqueeze,
    "reshape": _undo_reshape,
    "alias": _undo_alias,
}
_KINDS: dict[Any, str] = {
    aten.slice.Tensor: "slice",
    aten.select.int: "select",
    aten.transpose.int: "transpose",
    aten.t.default: "transpose",
    aten.permute.default: "permute",
    aten.unsqueeze.default: "unsqueeze",
    aten.view.default: "reshape",
    aten.squeeze.dim: "reshape",
    aten.alias.default: "alias",
    aten.split.Tensor: "pieces",
    aten.split.sizes: "pieces",
    aten.split_with_sizes.default: "pieces",
    aten.chunk.default: "pieces",
    aten.unbind.int: "pieces",
}


# -- empty memory -----------------------------------------------------------------------------------------------------


def _join_slices(graph: fx.Graph, last: fx.Node) -> None:
    """`slice_scatter`s that fill all of an `empty` along one dim → `cat`: nothing of what `empty` held is left."""
    dim = bound_args(last)[0][2] % len(shape(last))
    pieces: dict[Any, tuple[Any, fx.Node]] = {}
    node: Any = last
    while isinstance(node, fx.Node) and node.target is aten.slice_scatter.default:
        base, source, d, start, end, step = bound_args(node)[0]
        size = shape(node)[dim]
        if d % len(shape(node)) != dim or step != 1 or not isinstance(size, int):
            return
        start, end = (0 if start is None else start), (size if end is None else min(end, size))
        if not isinstance(start, int) or not isinstance(end, int) or start in pieces:
            return
        pieces[start] = (end, source)
        node = base
    if not isinstance(node, fx.Node) or node.target not in _EMPTY:
        return
    at, sources = 0, []
    while at in pieces:
        at, source = pieces.pop(at)
        sources.append(source)
    if pieces or at != shape(last)[dim]:
        return
    with graph.inserting_before(last):
        joined = graph.call_function(aten.cat.default, (sources, dim))
        joined.meta = dict(last.meta)
    last.replace_all_uses_with(joined)


_SCATTERS = {aten.slice_scatter.default, aten.select_scatter.default}
_EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}
