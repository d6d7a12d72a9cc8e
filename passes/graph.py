"""Small questions about FX nodes (values, sizes, arguments, neighbours, modes), and `call`, which adds one.

Which nodes share memory is in aliasing.py, how a graph is traced in trace.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


def val(node: Any) -> Any:
    """The fake value of a node; anything else is its own value."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def requires_grad(node: fx.Node) -> bool:
    """Does a graph input require grad? Fake values of traced nodes don't tell; of inputs, `trace.to_aten` noted it."""
    return bool(node.meta.get("requires_grad", False))


def is_state(node: fx.Node) -> bool:
    """Parameters and buffers: tensors that belong to a module."""
    label = node.meta.get("label", "")
    return node.meta.get("is_parameter", False) or "_parameters_" in label or "_buffers_" in label


def call(graph: fx.Graph, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
    """A new node at the insertion point, with its fake value. `like` is any tensor, where no argument is one.

    Computed under the Python dispatcher, as Dynamo does: without it, some meta functions take no symbolic sizes.
    """
    node = graph.call_function(target, args, kwargs)
    values, options = fx.map_arg((args, kwargs), val)
    inputs = tree_leaves([val(n) for n in (*node.all_input_nodes, like)])
    fakes = [v for v in inputs if isinstance(v, torch._subclasses.FakeTensor)]
    with fakes[0].fake_mode, enable_python_dispatcher():
        node.meta["val"] = target(*values, **options)
    return node


def is_tensor(node: Any) -> bool:
    return isinstance(val(node), torch.Tensor)


def shape(node: Any) -> tuple[Any, ...]:
    """Sizes of a tensor node: ints and SymInts; `()` for numbers."""
    value = val(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def sizes(graph: fx.Graph, node: fx.Node) -> list[Any]:
    """A tensor's sizes as arguments of a new node: numbers, and `sym_size` nodes at the insertion point."""
    return [
        s if isinstance(s, int) else call(graph, aten.sym_size.int, node, d)
        for d, s in enumerate(shape(node))
    ]


def same_size(a: Any, b: Any) -> bool:
    """Are two sizes provably equal? Adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def guard_same_size(a: Any, b: Any) -> bool:
    """Are two sizes equal? What can't be proven becomes a guard of Dynamo's: another batch may be traced anew."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(a == b))


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Have two tensors provably equal sizes? Adds no guard."""
    return len(shape(a)) == len(shape(b)) and all(map(same_size, shape(a), shape(b)))


def size_hint(size: Any) -> int:
    """What a size was when the batch was traced. Adds no guard."""
    return size if isinstance(size, int) else int(size.node.hint)


def memory_order(x: torch.Tensor) -> tuple[int, ...] | None:
    """Dims as they follow each other in memory, the last one in the smallest steps; None if entries share memory."""
    steps = [size_hint(step) for step in x.stride()]
    if any(step == 0 and size_hint(size) > 1 for step, size in zip(steps, x.shape, strict=True)):
        return None
    return tuple(sorted(range(len(steps)), key=lambda dim: -steps[dim]))


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they depend on."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that depends on them, but for the graph's output."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and node.op != "output":
            found.add(node)
            todo += node.users
    return found


def grad_mode(node: fx.Node) -> bool:
    """Is grad mode on where the node runs?"""
    if node.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        while node.op != "root":
            node = node.prev
            if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
                return bool(node.args[0])
    return torch.is_grad_enabled()


AUTOCAST_SWITCHES = {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}
MODE_SWITCHES = {torch._C._set_grad_enabled, *AUTOCAST_SWITCHES}


def is_mode_switch(node: fx.Node) -> bool:
    """Grad-mode and autocast switches: they have no value and apply to all that follows."""
    return node.op == "call_function" and node.target in MODE_SWITCHES


def schema_of(node: fx.Node) -> torch.FunctionSchema | None:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def input_name(node: fx.Node) -> str:
    """What the user calls an input: Dynamo's `l_kwargs_attention_mask_` is `attention_mask`."""
    label = str(node.meta.get("label", node.name))
    found = re.fullmatch(r"[lL]_(?:kwargs_)?(?!self_)(.*?)_?", label)
    return found[1] if found and found[1] else label


def node_arg(node: fx.Node, index: int) -> fx.Node:
    """A positional argument that is a node, by the operation's schema."""
    arg = node.args[index]
    assert isinstance(arg, fx.Node), f"argument {index} of `{node.target}` is {arg}"
    return arg


def bound_args(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments as the schema has them, so that rules see one calling convention."""
    schema = schema_of(node)
    if schema is None:
        return node.args, dict(node.kwargs)
    positional, keywords = list(node.args), dict(node.kwargs)
    for arg in schema.arguments[len(positional) :]:
        if arg.kwarg_only:
            break
        if arg.name in keywords:
            positional.append(keywords.pop(arg.name))
        else:
            positional.append(arg.default_value)
    return tuple(positional), keywords


# Matrix products, and which argument's last dim they sum over.
_LEFT_OPERANDS = {
    "aten::linear": 0, "aten::mm": 0, "aten::mv": 0, "aten::bmm": 0, "aten::matmul": 0, "aten::addmm": 1,
    "aten::baddbmm": 1, "aten::_grouped_mm": 0, "transformers::grouped_mm_fallback": 0,
}  # fmt: skip


def contracted_size(node: fx.Node) -> Any | None:
    """The size that a matrix product sums over; None for anything else. Its multiply-adds are this times its result."""
    schema = schema_of(node)
    if schema is not None and schema.name in _LEFT_OPERANDS:
        return shape(node.args[_LEFT_OPERANDS[schema.name]])[-1]
    if node.target is not aten.einsum.default:
        return None
    equation, operands = node.args[:2]
    terms, _, result = str(equation).replace(" ", "").partition("->")
    sizes = {
        label: size  # from the right, where an ellipsis leads
        for term, operand in zip(terms.split(","), cast(Any, operands), strict=True)
        for label, size in zip(reversed(term), reversed(shape(operand)), strict=False)
    }
    return math.prod(size for label, size in sizes.items() if label not in result)


_CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.clone.default,
    aten.contiguous.default, aten.type_as.default, aten.alias.default,
}  # fmt: skip


def is_cast(node: fx.Node) -> bool:
    """A cast to a floating type, or a copy, maybe to another device."""
    return node.target in _CASTS and val(node).dtype.is_floating_point


def is_inactive_dropout(node: fx.Node) -> bool:
    """Dropout that lets everything through, as in evaluation."""
    return node.target is aten.dropout.default and not (node.args[1] and node.args[2])


def is_random(node: fx.Node) -> bool:
    """Does it draw random numbers?"""
    is_seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return is_seeded and not is_inactive_dropout(node)
