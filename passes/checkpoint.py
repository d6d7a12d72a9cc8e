"""Activation checkpointing: bodies are inlined for the analysis, and put together again in the packed graph.

    Dynamo's graph    h = tag_activation_checkpoint(body, x, weight, use_reentrant=False)[0]
    inlined           the body's nodes, each with the region's number in its meta
    packed graph      h = tag_activation_checkpoint(packed body, x, weight, mask, use_reentrant=False)[0]

The operator computes its body, and computes it again in backward; what it computes is the body. So packing the inlined
body is right, and a region of the packed graph can be wrapped if nothing outside of it lies between two of its nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from .graph import ancestors, descendants

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint

# In `meta["custom"]`, which torch copies to whatever a node is traced to.
_REGION = "pgcompile_checkpoint"


def is_plain(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Is this node of `gm` a checkpoint that recomputes everything? (A `context_fn` chooses what is kept.)"""
    return node.target is CHECKPOINT and "_checkpoint_context_fn" not in _body(gm, node).meta


def inline_checkpoints(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[dict[str, Any]]]:
    """A copy of Dynamo's graph with checkpointed bodies in it, and the arguments of checkpoint for each region.

    A checkpoint within another is a part of that one's region.
    """
    if not gm.graph.find_nodes(op="call_function", target=CHECKPOINT):
        return gm, []
    graph, constants, regions = fx.Graph(), dict[str, Any](), list[dict[str, Any]]()
    outputs = _inline(gm, None, graph, constants, regions, None)
    graph.output(outputs)
    return fx.GraphModule(constants, graph), regions


def _inline(
    gm: fx.GraphModule,
    arguments: Sequence[Any] | None,
    graph: fx.Graph,
    constants: dict[str, Any],
    regions: list[dict[str, Any]],
    region: int | None,
) -> Any:
    """Copy `gm`'s nodes to `graph`; what they return, in terms of the copies."""
    env: dict[fx.Node, Any] = {}
    given = iter(arguments or ())
    for node in gm.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], env.__getitem__)
        if node.op == "placeholder" and arguments is not None:
            env[node] = next(given)
        elif is_plain(gm, node):
            inputs = fx.map_arg(node.args[1:], env.__getitem__)
            inner = region
            if inner is None:
                inner = len(regions)
                regions.append(dict(node.kwargs))
            env[node] = _inline(_body(gm, node), inputs, graph, constants, regions, inner)
        elif node.target is operator.getitem and isinstance(env[node.args[0]], (tuple, list)):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.op == "get_attr" and _is_body(gm, node):
            continue
        else:
            copied = env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "get_attr":
                copied.target = f"constant_{len(constants)}"
                constants[copied.target] = getattr(gm, str(node.target))
            elif node.op != "placeholder":
                custom = {**node.meta.get("custom", {}), _REGION: region}
                copied.meta = {**node.meta, "custom": custom} if region is not None else node.meta
    raise AssertionError("a graph without an output")


def _is_body(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Of checkpoints that are inlined."""
    return all(is_plain(gm, user) and user.args[0] is node for user in node.users)


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    body = node.args[0]
    found = gm.get_submodule(str(body.target)) if isinstance(body, fx.Node) else None
    assert isinstance(found, fx.GraphModule)
    return found


def wrap_checkpoints(gm: fx.GraphModule, regions: Sequence[dict[str, Any]]) -> fx.GraphModule:
    """The same graph with the nodes of each region under the checkpoint operator again."""
    bodies = {number: _members(gm.graph, number) for number in range(len(regions))}
    region_of = {node: number for number, members in bodies.items() for node in members}
    if not region_of:
        return gm
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    constants = {str(n.target): getattr(gm, str(n.target)) for n in gm.graph.find_nodes(op="get_attr")}

    def emit(node: fx.Node) -> None:
        if node in env:
            return
        number = region_of.get(node)
        inputs = node.all_input_nodes if number is None else _inputs(bodies[number])
        for n in inputs:
            emit(n)
        if number is None:
            env[node] = graph.node_copy(node, env.__getitem__)
            return
        members = bodies[number]
        outputs = [n for n in members if any(region_of.get(user) != number for user in n.users)]
        name = f"checkpoint_{number}"
        constants[name] = _body_of(members, inputs, outputs)
        call = graph.call_function(
            CHECKPOINT, (graph.get_attr(name), *(env[n] for n in inputs)), regions[number]
        )
        for i, n in enumerate(outputs):
            env[n] = graph.call_function(operator.getitem, (call, i))
        env.update({n: call for n in members if n not in env})  # emitted, and used by nobody outside

    last = {members[-1] for members in bodies.values() if members}
    for node in gm.graph.nodes:
        if node not in region_of or node in last:
            emit(node)
    graph.lint()
    return fx.GraphModule(constants, graph)


def _members(graph: fx.Graph, region: int) -> list[fx.Node]:
    """The region's nodes, in order, and all that lies between two of them."""
    tagged = {n for n in graph.nodes if n.op == "call_function" and _region(n) == region}
    members = tagged | (descendants(tagged) & ancestors(tagged))
    return [n for n in graph.nodes if n in members and n.op == "call_function"]


def has_regions(gm: fx.GraphModule) -> bool:
    """Is any node that makes a tensor marked as checkpointed? (Sizes leave nothing to find when they are traced.)"""
    return any(_region(n) is not None and _makes_tensor(n) for n in gm.graph.nodes)


def _makes_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val", node.meta.get("example_value")), torch.Tensor)


def _region(node: fx.Node) -> int | None:
    source = node.meta.get("original", node)  # of what lowering put in place of a node
    return source.meta.get("custom", {}).get(_REGION)


def _inputs(members: list[fx.Node]) -> list[fx.Node]:
    inside = set(members)
    return list(dict.fromkeys(n for member in members for n in member.all_input_nodes if n not in inside))


def _body_of(members: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    env = {n: graph.placeholder(n.name) for n in inputs}
    for node in members:
        copied = env[node] = graph.node_copy(node, env.__getitem__)
        copied.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    graph.output(tuple(env[n] for n in outputs))
    return fx.GraphModule({}, graph)


def without_compiler(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph, fit to run as it is.

    The checkpoint operator leaves it to compilers that a recomputed body draws the random numbers that it drew before:
    run by itself, it would compute gradients with other dropout masks. Here `torch.utils.checkpoint` keeps them.
    """
    if not gm.graph.find_nodes(op="call_function", target=CHECKPOINT):
        return gm
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, env))
    for node in gm.graph.find_nodes(op="call_function", target=CHECKPOINT):
        env[node].target = _recompute
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    for node in gm.graph.find_nodes(op="call_function", target=CHECKPOINT):
        assert isinstance(node.args[0], fx.Node)
        setattr(copied, str(node.args[0].target), without_compiler(_body(gm, node)))
    return copied


def _recompute(body: fx.GraphModule, *args: Any, **options: Any) -> Any:
    if "_checkpoint_context_fn" in body.meta:
        options["context_fn"] = body.meta["_checkpoint_context_fn"]
    return checkpoint(body, *args, **{**options, "use_reentrant": False})
