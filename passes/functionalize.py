"""In-place operations on the graph's own values, written out of place: `x.add_(y)` becomes `x' = x.add(y)`.

Only where nothing else can see the write: `x` is made by the graph, isn't a view, and no view of it is used later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph import aten, is_tensor, is_view, mutated_args, val


def functionalize(gm: fx.GraphModule) -> None:
    """Rewrite `gm` (an ATen graph) in place."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        functional = _out_of_place(node)
        if functional is None or not _is_private(node.args[0], node, order):
            continue
        target = node.args[0]
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(functional, node.args, node.kwargs)
            new.meta = dict(node.meta)
            result = _result_dtype(functional, node)
            if result != val(target).dtype:
                with_dtype = gm.graph.call_function(aten.to.dtype, (new, val(target).dtype))
                with_dtype.meta = dict(node.meta)
                new.meta["val"] = val(target).to(result)
                new = with_dtype
        order[new] = order[node]
        target.replace_all_uses_with(
            new, delete_user_cb=lambda user, write=order[node]: order.get(user, -1) > write
        )
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.recompile()


def _out_of_place(node: fx.Node) -> Any:
    """The functional twin of `add_`, `mul_`, …, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name.removeprefix("aten::")
    if (
        mutated_args(node) != [node.args[0] if node.args else None]
        or not name.endswith("_")
        or name.endswith("__")
    ):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None


def _is_private(target: Any, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    if not isinstance(target, fx.Node) or target.op != "call_function" or is_view(target):
        return False
    return not _is_seen_after(target, write, order)


def _is_seen_after(node: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Does a view of `node`, or a view of that, exist or get used after the write?"""
    views = [
        user for user in node.users if user is not write and user.op == "call_function" and is_view(user)
    ]
    return any(
        order[view] > order[write]
        or any(order[user] > order[write] for user in view.users)
        or _is_seen_after(view, write, order)
        for view in views
        if order[view] < order[write]
    )


def _result_dtype(functional: Any, node: fx.Node) -> torch.dtype:
    args, kwargs = fx.map_arg((node.args, node.kwargs), val)
    fakes = [a for a in node.all_input_nodes if is_tensor(a)]
    with val(fakes[0]).fake_mode:
        return functional(*args, **kwargs).dtype
