"""Floats that Dynamo made symbolic → tensors without dimensions, or constants.

A float that changed between two calls (with `dynamic=True`, every float) is an input of Dynamo's graph, a float64
tensor without dimensions, and `.item()` of it a symbolic float. Rules, the matching of attention and inner compilers
want tensors or numbers:

    x * beta.item()                x * beta                 arithmetic with a tensor: a new value compiles nothing
    layer_norm(x, eps.item())      layer_norm(x, 1e-6)      anything else: Dynamo guards on the value

The idea is that of PyTorch's `tensorify_python_scalars`. With `dynamic=True` all are constants: nearly every float is
one, and a scale of attention has to be a number.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import symbol_is_type
from torch.utils._sympy.symbol import SymT


def _reciprocal_times(x: Any, number: Any) -> Any:
    return x.reciprocal() * number


# x op number, and number op x, each as `Tensor` computes it
_OPERATORS = {
    "add": (operator.add, operator.add),
    "sub": (operator.sub, torch.rsub),
    "mul": (operator.mul, operator.mul),
    "div": (operator.truediv, _reciprocal_times),
}
_SPELLINGS: dict[Any, tuple[Any, Any]] = {
    target: functions
    for name, functions in _OPERATORS.items()
    for target in (name, getattr(torch, name), functions[0])
}


def settle_numbers(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph without symbolic floats, except those that depend on sizes; `gm` itself if it has none.

    Those that become constants are guarded on, by Dynamo.
    """
    bodies = {n: getattr(gm, str(n.target)) for n in gm.graph.find_nodes(op="get_attr")}
    settled = {n: settle_numbers(body) for n, body in bodies.items() if isinstance(body, fx.GraphModule)}
    if not any(map(_is_number, gm.graph.nodes)) and all(bodies[n] is body for n, body in settled.items()):
        return gm
    tensors = _found_to_vary(gm.graph) if torch._dynamo.config.assume_static_by_default else set()
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if _is_number(node) and node not in tensors:
            env[node] = float(node.meta["example_value"])
        elif _is_item(node):
            env[node] = env[node.args[0]]
        elif tensors.isdisjoint(node.all_input_nodes) or _is_number(node):
            env[node] = graph.node_copy(node, env.__getitem__)
        else:
            env[node] = _arithmetic(graph, node, tensors, env)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for node, body in settled.items():
        setattr(copy, str(node.target), body)
    return copy


def _is_number(node: fx.Node) -> bool:
    """A symbolic float that the batch's sizes and values don't enter."""
    value = node.meta.get("example_value")
    if node.op == "placeholder" or not isinstance(value, torch.SymFloat):
        return False
    return all(symbol_is_type(s, SymT.FLOAT) for s in value.node.expr.free_symbols)


def _is_item(node: fx.Node) -> bool:
    return node.target == "item" and _is_number(node)


def _found_to_vary(graph: fx.Graph) -> set[fx.Node]:
    """The numbers that only enter arithmetic with tensors, and with numbers of which that holds."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _is_number(node) and (_is_item(node) or node.target in _SPELLINGS):
            if all(user in found or _takes_tensor(user) for user in node.users):
                found.add(node)
    return found


def _takes_tensor(node: fx.Node) -> bool:
    """Is it arithmetic of a number and a tensor of floats, element by element?"""
    if node.target not in _SPELLINGS or len(node.args) != 2 or node.kwargs:
        return False
    values = [a.meta.get("example_value") for a in node.args if isinstance(a, fx.Node)]
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values)


def _arithmetic(graph: fx.Graph, node: fx.Node, numbers: set[fx.Node], env: dict[fx.Node, Any]) -> fx.Node:
    """The same with a tensor for the number, which takes no part in type promotion if the other one has dimensions."""
    is_left = node.args[0] in numbers
    number, x = node.args if is_left else reversed(node.args)
    assert isinstance(x, fx.Node) and isinstance(number, fx.Node)
    dtype = computed = x.meta["example_value"].dtype
    a, b = env[x], env[number]
    if x.meta["example_value"].dim() == 0:
        computed = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype  # as for a number
        b = graph.call_method("to", (b, computed))
    result = graph.call_function(_SPELLINGS[node.target][is_left], (a, b))
    result = result if computed == dtype else graph.call_method("to", (result, dtype))
    result.meta = dict(node.meta)
    return result
