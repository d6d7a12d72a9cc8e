"""Symbolic floats of Dynamo's graph → tensors without dimensions that are computed before each call, or constants.

A float that changed between two calls is an input of Dynamo's graph, a float64 tensor without dimensions, and `.item()`
of it a symbolic float; what Python computes from it, and from integers and sizes that changed, is one as well. Rules,
the matching of attention and inner compilers want tensors or numbers:

    coefficient = 0.1 * (1 - step / total)      computed before each call, as Python does, and an input of the graph
    loss * coefficient                          with a tensor: no new value compiles anything
    layer_norm(x, eps)                          with a constant: Dynamo guards on the value

The idea is that of PyTorch's `tensorify_python_scalars`. With `dynamic=True` every float is symbolic; attributes, as
nearly all of a model's floats are, become constants then. Where a tensor keeps a graph from being packed, as a scale of
attention does, it is tried again with constants alone. A constant that does change makes Dynamo compile again, up to
its `recompile_limit`.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._dynamo.source import AttrSource, CallMethodItemSource
from torch.fx.experimental.symbolic_shapes import symbol_is_type
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.symbol import SymT

from .graph import ancestors
from .reasons import source_line


def _reciprocal_times(x: Any, number: Any) -> Any:
    return x.reciprocal() * number


# Two operands, by the number's place. With the number on the left, it is what `Tensor`'s operators compute.
_FLIPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
_NUMBER_RIGHT = {
    operator.add, operator.sub, operator.mul, operator.truediv,
    operator.iadd, operator.isub, operator.imul, operator.itruediv,
    torch.add, torch.sub, torch.mul, torch.div,
    *(getattr(operator, name) for name in _FLIPPED), *(getattr(torch, name) for name in _FLIPPED),
    "add", "sub", "mul", "div", *_FLIPPED,
}  # fmt: skip
_NUMBER_LEFT: dict[Any, Any] = {
    operator.add: operator.add,
    operator.sub: torch.rsub,
    operator.mul: operator.mul,
    operator.truediv: _reciprocal_times,
    **{getattr(operator, name): getattr(operator, flipped) for name, flipped in _FLIPPED.items()},
}
_CHANGES = "a number that changes from call to call is a constant here, and compiled for each value: make it a tensor"
_CLAMPS = {torch.clamp, torch.clip, "clamp", "clip"}


def settle_numbers(
    gm: fx.GraphModule, constants: bool = False
) -> tuple[fx.GraphModule, fx.GraphModule | None]:
    """A copy of Dynamo's graph without symbolic floats, or `gm` itself if it has none.

    Args:
        gm: the graph. It isn't changed.
        constants: take every number for a constant. (In checkpointed bodies that is so anyway.)

    Returns:
        The graph. And what computes its last inputs, a tuple of float64 tensors without dimensions, from the others,
        which are those of `gm`; None if it has no others.
    """
    bodies = {name: m for name, m in gm.named_children() if isinstance(m, fx.GraphModule)}
    settled = {name: settle_numbers(body, constants=True)[0] for name, body in bodies.items()}
    if not any(map(_is_number, gm.graph.nodes)) and all(settled[name] is bodies[name] for name in bodies):
        return gm, None
    takers = (
        set() if constants else {n for n in gm.graph.nodes if _reads_varying_numbers(n) and _takes_tensor(n)}
    )
    numbers = list(dict.fromkeys(n for taker in gm.graph.nodes if taker in takers for n in _numbers(taker)))
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    tensors: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "placeholder" and numbers and not tensors:
            tensors = {number: _new_input(graph, gm, i) for i, number in enumerate(numbers)}
        if _is_number(node):
            continue
        if node in takers:
            env[node] = _with_tensor(graph, node, tensors, env)
            continue
        for number in _numbers(node):
            env[number] = _value(number, node)
        env[node] = graph.node_copy(node, env.__getitem__)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name, body in settled.items():
        setattr(copy, name, body)
    return copy, _computing(gm, numbers) if numbers else None


def with_numbers(numbers: fx.GraphModule | None, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the settled graph takes, and all that is made of it, for arguments of Dynamo's graph."""
    return args if numbers is None else (*args, *numbers(*args))


def _value(number: fx.Node, user: fx.Node) -> float:
    """A number as a constant."""
    value = number.meta["example_value"]
    if torch._dynamo.config.assume_static_by_default and value.node.expr.free_symbols:
        warnings.warn(f"pgcompile: {_CHANGES}, at {source_line(user)}", stacklevel=2)
    return float(value)


def _numbers(node: fx.Node) -> Iterator[fx.Node]:
    return filter(_is_number, node.all_input_nodes)


def _is_number(node: fx.Node) -> bool:
    """A symbolic float from floats, integers and sizes: nothing that was read from a tensor of the caller's."""
    value = node.meta.get("example_value")
    if node.op == "placeholder" or not isinstance(value, torch.SymFloat):
        return False
    return all(
        symbol_is_type(symbol, (SymT.FLOAT, SymT.SIZE))
        and not any(isinstance(source, CallMethodItemSource) for source in _sources(value, symbol))
        for symbol in value.node.expr.free_symbols
    )


def _sources(value: torch.SymFloat, symbol: Any) -> Iterator[Any]:
    """Where a symbol comes from, and where that comes from."""
    for source in value.node.shape_env.var_to_sources.get(symbol, ()):
        while source is not None:
            yield source
            source = getattr(source, "base", None)


# -- where a tensor will do ------------------------------------------------------------------------------------------


def _reads_varying_numbers(node: fx.Node) -> bool:
    """Are there numbers among its arguments, all of which may change and can be computed before the call?"""
    numbers = list(_numbers(node))
    return (
        bool(numbers) and not _is_number(node) and all(_may_change(n) and _is_computable(n) for n in numbers)
    )


def _may_change(number: fx.Node) -> bool:
    value = number.meta["example_value"]
    symbols = value.node.expr.free_symbols
    if torch._dynamo.config.assume_static_by_default:  # so it has changed
        return bool(symbols)
    floats = [symbol for symbol in symbols if symbol_is_type(symbol, SymT.FLOAT)]  # with dynamic=True
    sources = [source for symbol in floats for source in _sources(value, symbol)]
    return bool(symbols) and not any(isinstance(source, AttrSource) for source in sources)


def _is_computable(number: fx.Node) -> bool:
    """Does it depend on integers, sizes and floats alone, that are inputs of the graph?"""
    return all(node.op == "placeholder" or _is_scalar(node) for node in ancestors([number]))


def _is_scalar(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _takes_tensor(node: fx.Node) -> bool:
    """Does it compute the same with a tensor in place of each number?"""
    args, kwargs = node.args, node.kwargs
    if node.target is torch.scalar_tensor:
        return len(args) == 1 and kwargs.keys() <= {"dtype", "device"}
    if any(_is_scalar(n) and not _is_number(n) for n in node.all_input_nodes):
        return False
    if node.target in _CLAMPS:
        bounds = [*args[1:], *kwargs.values()]
        has_names = bool(args) and kwargs.keys() <= {"min", "max"}
        return has_names and _is_plain(args[0]) and not any(isinstance(b, bool) for b in bounds)
    if node.target is torch.where:
        return len(args) == 3 and not kwargs and any(map(_is_plain, args[1:]))
    if len(args) != 2 or kwargs:
        return False
    left, right = args
    return (_is_plain(left) and node.target in _NUMBER_RIGHT) or (
        _is_plain(right) and node.target in _NUMBER_LEFT
    )


def _is_plain(node: Any) -> bool:
    """A tensor of floats, beside which a tensor without dimensions is rounded as a number is."""
    x = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return False
    if is_traceable_wrapper_subclass(x) or is_functorch_wrapped_tensor(x):
        return False
    return x.dim() > 0 or x.dtype in (torch.float32, torch.float64)


# -- with a tensor ---------------------------------------------------------------------------------------------------


def _new_input(graph: fx.Graph, gm: fx.GraphModule, number: int) -> fx.Node:
    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    fake = next(value for value in values if isinstance(value, torch._subclasses.FakeTensor))
    node = graph.placeholder(f"number_{number}")
    with fake.fake_mode:
        node.meta["example_value"] = torch.empty((), dtype=torch.float64, device="cpu")
    return node


def _with_tensor(
    graph: fx.Graph, node: fx.Node, tensors: dict[fx.Node, fx.Node], env: dict[fx.Node, Any]
) -> fx.Node:
    """The node, with tensors for its numbers. Beside a tensor that has dimensions they take no part in promotion."""
    x = next((n for n in node.all_input_nodes if _is_plain(n)), None)
    value = x.meta["example_value"] if x is not None else None

    def tensor(arg: Any) -> Any:
        if not isinstance(arg, (fx.Node, float, int)) or isinstance(arg, bool):
            return arg
        if isinstance(arg, fx.Node) and arg not in tensors:
            return env[arg]
        found = tensors[arg] if isinstance(arg, fx.Node) else _constant(graph, arg)
        return found if value is None or value.dim() > 0 else graph.call_method("to", (found, value.dtype))

    args, kwargs = tuple(map(tensor, node.args)), {name: tensor(arg) for name, arg in node.kwargs.items()}
    if node.target is torch.scalar_tensor:
        made = node.meta["example_value"]
        result = graph.call_method("to", (*args, made.device, made.dtype), {"copy": True})
    elif node.target in _NUMBER_LEFT and node.args[0] in tensors:
        result = graph.call_function(_NUMBER_LEFT[node.target], args[::-1])
    else:
        result = graph.create_node(node.op, node.target, args, kwargs)
    result.meta = dict(node.meta)
    return result


def _constant(graph: fx.Graph, value: Any) -> fx.Node:
    return graph.call_function(torch.scalar_tensor, (value,), {"dtype": torch.float64, "device": "cpu"})


def _computing(gm: fx.GraphModule, numbers: list[fx.Node]) -> fx.GraphModule:
    """The numbers from `gm`'s inputs, by the operators that Dynamo traced, as tensors."""
    needed = ancestors(numbers)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(_constant(graph, env[number]) for number in numbers))
    return fx.GraphModule({}, graph)
