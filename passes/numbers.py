"""Floats that Dynamo made symbolic → tensors without dimensions, or constants.

A float that changed between two calls (with `dynamic=True`, every float) is an input of Dynamo's graph, a float64
tensor without dimensions, and `.item()` of it a symbolic float. Rules, the matching of attention and inner compilers
want tensors or numbers:

    x * beta.item()                x * beta                 arithmetic with a tensor: a new value compiles nothing
    layer_norm(x, eps.item())      layer_norm(x, 1e-6)      anything else: Dynamo guards on the value

The idea is that of PyTorch's `tensorify_python_scalars`. With `dynamic=True` all are constants: nearly every float of a
model is one. Where a tensor keeps a graph from being packed, as a scale of attention does, it is tried again with
constants. A constant that does change makes Dynamo compile again, up to its `recompile_limit`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._dynamo.source import CallMethodItemSource
from torch.fx.experimental.symbolic_shapes import symbol_is_type
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.symbol import SymT


def _reciprocal_times(x: Any, number: Any) -> Any:
    return x.reciprocal() * number


# Arithmetic of numbers, on float64 tensors. (By zero, numbers raise: see `_is_arithmetic_of_numbers`.)
_OF_NUMBERS: dict[Any, Any] = {
    operator.add: operator.add, operator.iadd: operator.add,
    operator.sub: operator.sub, operator.isub: operator.sub,
    operator.mul: operator.mul, operator.imul: operator.mul,
    operator.truediv: operator.truediv, operator.itruediv: operator.truediv,
    operator.neg: operator.neg,
}  # fmt: skip

# Arithmetic of a tensor and a number, by the number's place. On the left, it is what `Tensor`'s operators compute.
_NUMBER_RIGHT = {
    operator.add, operator.sub, operator.mul, operator.truediv,
    operator.iadd, operator.isub, operator.imul, operator.itruediv,
    torch.add, torch.sub, torch.mul, torch.div,
}  # fmt: skip
_NUMBER_RIGHT_METHODS = {"add", "sub", "mul", "div"}
_NUMBER_LEFT: dict[Any, Any] = {
    operator.add: operator.add,
    operator.sub: torch.rsub,
    operator.mul: operator.mul,
    operator.truediv: _reciprocal_times,
}


def settle_numbers(gm: fx.GraphModule, constants: bool = False) -> tuple[fx.GraphModule, bool]:
    """A copy of Dynamo's graph without symbolic floats, except those that depend on sizes; `gm` itself if it has none.

    Args:
        gm: the graph; bodies of checkpoints are settled with it. It isn't changed.
        constants: make no tensors of numbers.

    Returns:
        The graph, and whether any number is a tensor in it.
    """
    bodies = {str(n.target): gm.get_submodule(str(n.target)) for n in _bodies(gm)}
    settled = {name: settle_numbers(body, constants) for name, body in bodies.items()}
    if not any(map(_is_number, gm.graph.nodes)) and all(settled[name][0] is bodies[name] for name in bodies):
        return gm, False
    # With dynamic=True sizes aren't static by default, and floats neither.
    is_dynamic = not torch._dynamo.config.assume_static_by_default
    tensors = set[fx.Node]() if constants or is_dynamic else _found_to_vary(gm.graph)
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node in tensors:
            env[node] = _as_tensor(graph, node, env)
        elif _is_number(node):
            env[node] = float(node.meta["example_value"])
        elif tensors.isdisjoint(node.all_input_nodes):
            env[node] = graph.node_copy(node, env.__getitem__)
        else:
            env[node] = _with_tensor(graph, node, tensors, env)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name, (body, _) in settled.items():
        copy.set_submodule(name, body)
    return copy, bool(tensors) or any(has_tensors for _, has_tensors in settled.values())


def _bodies(gm: fx.GraphModule) -> list[fx.Node]:
    nodes = gm.graph.find_nodes(op="get_attr")
    modules = dict(gm.named_modules())
    return [n for n in nodes if isinstance(modules.get(str(n.target)), fx.GraphModule)]


def _is_number(node: fx.Node) -> bool:
    """A symbolic float that comes from floats alone: neither from sizes nor from a tensor of the caller's."""
    value = node.meta.get("example_value")
    if node.op == "placeholder" or not isinstance(value, torch.SymFloat):
        return False
    env = value.node.shape_env
    return all(
        symbol_is_type(s, SymT.FLOAT)
        and not any(isinstance(source, CallMethodItemSource) for source in env.var_to_sources.get(s, ()))
        for s in value.node.expr.free_symbols
    )


def _found_to_vary(graph: fx.Graph) -> set[fx.Node]:
    """The numbers that only enter arithmetic with tensors, and with numbers of which that holds."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _is_number(node) and (node.target == "item" or _is_arithmetic_of_numbers(node)):
            if all(user in found or _takes_tensor(user, node) for user in node.users):
                found.add(node)
    return found


def _is_arithmetic_of_numbers(node: fx.Node) -> bool:
    if node.target in (operator.truediv, operator.itruediv):
        return isinstance(node.args[1], (int, float)) and node.args[1] != 0
    return node.target in _OF_NUMBERS


def _takes_tensor(node: fx.Node, number: fx.Node) -> bool:
    """Is it arithmetic of a tensor and this number, which may as well be a tensor?"""
    if len(node.args) != 2 or node.kwargs:
        return False
    x, other = node.args
    if other is number:
        known = node.target in (_NUMBER_RIGHT_METHODS if node.op == "call_method" else _NUMBER_RIGHT)
    else:
        known, x = node.target in _NUMBER_LEFT, other
    value = x.meta.get("example_value") if isinstance(x, fx.Node) else None
    if not known or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    is_wrapped = is_traceable_wrapper_subclass(value) or is_functorch_wrapped_tensor(value)
    # the sum of a number and a half precision tensor without dimensions is rounded in a way of its own
    return not is_wrapped and (value.dim() > 0 or value.dtype in (torch.float32, torch.float64))


def _as_tensor(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
    if node.target == "item":
        return env[node.args[0]]
    args = fx.map_arg(node.args, env.__getitem__)
    return graph.call_function(_OF_NUMBERS[node.target], args)


def _with_tensor(graph: fx.Graph, node: fx.Node, numbers: set[fx.Node], env: dict[fx.Node, Any]) -> fx.Node:
    """Arithmetic with a tensor for the number, which takes no part in type promotion if the other one has dimensions."""
    is_left = node.args[0] in numbers
    number, x = node.args if is_left else reversed(node.args)
    assert isinstance(x, fx.Node) and isinstance(number, fx.Node)
    value = x.meta["example_value"]
    a, b = env[x], env[number]
    if value.dim() == 0:
        b = graph.call_method("to", (b, value.dtype))
    if is_left:
        result = graph.call_function(_NUMBER_LEFT[node.target], (a, b))
    else:
        result = graph.create_node(node.op, node.target, (a, b))
    result.meta = dict(node.meta)
    return result
