"""Everything about FX spelling: Dynamo graph → ATen graph, and small questions about nodes.

The compiler works on pre-dispatch ATen: every operation has one spelling and a schema, composite operations
(`linear`, `scaled_dot_product_attention`, `layer_norm`, `cross_entropy_loss`) are still whole, and each node keeps
the source line it came from. What tracing to ATen would lose, i.e. the gradient of custom autograd functions,
hooks and other higher-order operations, is looked for in the Dynamo graph first (`find_opaque`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from .reasons import Unsupported

aten = torch.ops.aten


def find_opaque(gm: fx.GraphModule) -> list[Unsupported]:
    """Nodes of a Dynamo graph whose gradient or effect an ATen graph would not show."""
    found = _subclasses(gm)
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target in (
            "register_hook",
            "register_post_accumulate_grad_hook",
        ):
            found.append(_opaque("hook", node, "a tensor hook may change the gradient of a shared token"))
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", str(node.target))
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            kind = next((k for k in ("autograd_function", "hook") if k in name), "trace_failed")
            if "checkpoint" in name:
                text = (
                    "activation checkpointing with a context_fn, which chooses what is kept, can't be packed"
                )
                hint = "checkpoint without it, or turn it off: a packed batch keeps fewer activations"
                found.append(Unsupported(kind, node, text, hint))
                continue
            found.append(_opaque(kind, node, f"higher-order operation `{name}` can't be looked into"))
        elif "autograd_function" in name or "trampoline_autograd" in name:
            found.append(
                _opaque("autograd_function", node, "a custom autograd function may treat gradients freely")
            )
        elif "_get_data_attr" in name or "_set_data" in name:
            text = "`.data` lets writes go past autograd"
            found.append(
                Unsupported("mutation", node, text, "use .detach(), or write out of place under no_grad")
            )
        elif "inference_mode" in name:
            found.append(
                _opaque("trace_failed", node, "an ATen graph doesn't show regions of inference_mode")
            )
        elif "hook" in name and "torch" in (getattr(node.target, "__module__", None) or ""):
            found.append(_opaque("hook", node, f"`{name}` may change the gradient of a shared token"))
    return found


def _subclasses(gm: fx.GraphModule) -> list[Unsupported]:
    """Inputs, weights among them, that bring operations of their own: quantized, sharded. The first of each class."""
    inputs = gm.graph.find_nodes(op="placeholder")
    found = [n for n in inputs if is_traceable_wrapper_subclass(n.meta["example_value"])]
    first = {type(n.meta["example_value"]).__name__: n for n in reversed(found)}
    text = "tensors of class {}, which redefines operations, can't be looked into"
    hint = "use plain tensors, or compile the part without them"
    return [Unsupported("trace_failed", node, text.format(name), hint) for name, node in first.items()]


def _opaque(kind: str, node: fx.Node, explanation: str) -> Unsupported:
    return Unsupported(kind, node, explanation, "run this part outside of the compiled region")


def example_values(gm: fx.GraphModule) -> list[Any]:
    """What Dynamo traced with: FakeTensors (Parameters stay Parameters), SymInts, numbers."""
    return [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]


def to_aten(gm: fx.GraphModule) -> fx.GraphModule:
    """Retrace a Dynamo graph to pre-dispatch ATen under Dynamo's own fake mode.

    Placeholders correspond one to one. Each node has `meta["val"]` (fake value) and `meta["stack_trace"]`.

    Raises:
        Exception: whatever tracing raises; the caller reports it as `trace_failed`.
    """
    values = example_values(gm)
    fakes = [v for v in values if isinstance(v, torch._subclasses.FakeTensor)]

    def interpret(*args: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return _ConstantFloats(gm).run(*args)

    with fakes[0].fake_mode:
        traced = make_fx(interpret, pre_dispatch=True)(*values)
    if any(n.target in _AUTOCAST_SWITCHES for n in traced.graph.nodes):
        with fakes[0].fake_mode, enable_python_dispatcher(), torch.set_grad_enabled(torch.is_grad_enabled()):
            _Revalue(traced).run(*values)
    originals = (n for n in gm.graph.nodes if n.op == "placeholder")
    for node, original in zip(
        (n for n in traced.graph.nodes if n.op == "placeholder"), originals, strict=True
    ):
        example = original.meta["example_value"]
        node.meta["is_parameter"] = isinstance(example, torch.nn.Parameter)
        node.meta["requires_grad"] = isinstance(example, torch.Tensor) and example.requires_grad
        node.meta["label"] = original.name
        node.meta.setdefault("stack_trace", original.meta.get("stack_trace"))
    return traced


class _ConstantFloats(fx.Interpreter):
    """Takes symbolic floats that were read from tensors at their value, which Dynamo guards on (others: numbers.py)."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return float(result) if isinstance(result, torch.SymFloat) else result


class _Revalue(fx.Interpreter):
    """Sets fake values anew: tracing records autocast switches without throwing them, so dtypes are those outside."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and not is_mode_switch(n):
            n.meta["val"] = result
        return result


def val(node: Any) -> Any:
    """The fake value of a node; anything else is its own value."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def requires_grad(node: fx.Node) -> bool:
    """Does a graph input require grad? Fake values of traced nodes don't tell; of inputs, `to_aten` noted it."""
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


def equal_sizes(a: Any, b: Any) -> bool:
    """Are two sizes equal? What can't be proven becomes a guard of Dynamo's: another batch may be traced anew."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return same_size(a, b) or guard_or_false(a == b)


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


def is_anything_between(first: fx.Node, last: fx.Node) -> bool:
    """Is there a switch of modes or a write between two nodes? Nothing may be moved past one."""
    node = first.next
    while node is not last:
        if is_mode_switch(node) or mutated_args(node):
            return True
        node = node.next
    return False


def is_mode_switch(node: fx.Node) -> bool:
    """Grad-mode and autocast switches: they have no value and apply to all that follows."""
    return node.op == "call_function" and node.target in MODE_SWITCHES


MODE_SWITCHES = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
}


_AUTOCAST_SWITCHES = {torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast}


def schema_of(node: fx.Node) -> torch.FunctionSchema | None:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def input_name(node: fx.Node) -> str:
    """What the user calls an input: Dynamo's `l_kwargs_attention_mask_` is `attention_mask`."""
    label = str(node.meta.get("label", node.name))
    found = re.fullmatch(r"[lL]_(?:kwargs_)?(?!self_)(.*?)_?", label)
    return found[1] if found and found[1] else label


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
