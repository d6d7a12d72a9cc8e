"""Which nodes share memory, and which write to it: by schemas, by the storages of fake values, and by tables of what
neither tells."""

from __future__ import annotations

import itertools

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from .graph import aten, bound_args, is_mode_switch, is_tensor, schema_of, val


def mutated_args(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that an ATen call writes to."""
    schema = schema_of(node)
    if schema is None:
        return []
    if schema.name in _UPDATES_STATISTICS:
        return _running_statistics(node)
    if not schema.is_mutable:
        return []
    written = []
    for i, arg in enumerate(schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(arg.name)
            written += [
                v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node)
            ]
    return written


# Normalisations whose schemas don't say that they update running statistics, and the flag for it.
_UPDATES_STATISTICS = {
    "aten::batch_norm": "training", "aten::native_batch_norm": "training", "aten::cudnn_batch_norm": "training",
    "aten::miopen_batch_norm": "training", "aten::instance_norm": "use_input_stats",
}  # fmt: skip


def _running_statistics(node: fx.Node) -> list[fx.Node]:
    schema = schema_of(node)
    assert schema is not None
    given = dict(zip((a.name for a in schema.arguments), bound_args(node)[0], strict=False)) | node.kwargs
    if not given[_UPDATES_STATISTICS[schema.name]]:
        return []
    return [x for x in (given["running_mean"], given["running_var"]) if isinstance(x, fx.Node)]


# Operations that may return their argument or a view of it without saying so in their schema.
MAY_ALIAS = {
    "aten::to", "aten::contiguous", "aten::reshape", "aten::flatten", "aten::type_as", "aten::dropout",
    "aten::expand_as", "aten::view_as", "aten::reshape_as", "aten::meshgrid", "aten::broadcast_tensors",
    "aten::einsum", "aten::unflatten", "aten::movedim", "aten::swapaxes", "aten::swapdims", "aten::chunk",
    "aten::tensor_split", "aten::narrow", "aten::numpy_T", "aten::matrix_H", "aten::mT", "aten::adjoint",
}  # fmt: skip


def is_view(node: fx.Node) -> bool:
    """May the node's value share memory with an argument that it doesn't write to?"""
    schema = schema_of(node)
    if schema is None:
        return True  # getitem, and whatever else isn't ATen
    if schema.name == "aten::to" and is_tensor(node) and is_tensor(node.args[0]):
        return val(node).dtype == val(node.args[0]).dtype
    if schema.name == "aten::contiguous" and _is_permuted(val(node.args[0])):
        return False  # a copy
    aliased = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    return aliased or schema.name in MAY_ALIAS or any(shares_memory(node, n) for n in node.all_input_nodes)


def shares_memory(a: fx.Node, b: fx.Node) -> bool:
    """Had the two memory in common when the batch was traced?"""
    return not _storages(a).isdisjoint(_storages(b))


def _storages(node: fx.Node) -> set[int]:
    return {x.untyped_storage()._cdata for x in tree_leaves(val(node)) if isinstance(x, torch.Tensor)}


def _is_permuted(value: torch.Tensor) -> bool:
    """Is a later dim provably further apart in memory than an earlier one?"""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    wide = [
        stride
        for size, stride in zip(value.shape, value.stride(), strict=True)
        if statically_known_true(size > 1)
    ]
    return any(statically_known_true(a < b) for a, b in itertools.pairwise(wide))


def is_fresh_item(node: fx.Node) -> bool:
    """One of several results of an operation that returns new tensors, such as topk."""
    source = node.args[0] if node.args else None
    return (
        node.op == "call_function"
        and not hasattr(node.target, "_schema")
        and isinstance(source, fx.Node)
        and source.op == "call_function"
        and not is_view(source)
    )


def is_constant_fill(node: fx.Node) -> bool:
    """One number everywhere, and nobody writes into it."""
    return node.target is aten.full.default and not any(is_view(u) or mutated_args(u) for u in node.users)


def base_of(node: fx.Node) -> fx.Node:
    """The tensor whose memory a chain of views and in-place operations looks into."""
    first = node
    while node.op == "call_function":
        written = mutated_args(node)
        if not written and (not is_view(node) or is_fresh_item(node)):
            break
        sources = written or [
            n for n in node.all_input_nodes if is_tensor(n) or not isinstance(val(n), (int, torch.SymInt))
        ]
        if not sources:
            break
        node = next((n for n in sources if shares_memory(n, first)), sources[0])
    return node


def is_anything_between(first: fx.Node, last: fx.Node) -> bool:
    """Is there a switch of modes or a write between two nodes? Nothing may be moved past one."""
    node = first.next
    while node is not last:
        if is_mode_switch(node) or mutated_args(node):
            return True
        node = node.next
    return False
