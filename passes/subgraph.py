"""Small operations on FX graphs that lowering is built from: what is live, cutting out a prologue, cleaning up."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import fx

from .aliasing import base_of, mutated_args
from .graph import ancestors, is_mode_switch, is_random, is_tensor, val
from .propagate import Analysis
from .reasons import Unsupported
from .rules import PROLOGUE


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on."""
    return ancestors([graph.output_node()])


def first_alike(graph: fx.Graph, analysis: Analysis) -> dict[fx.Node, fx.Node]:
    """For each node of the prologue the first one that computes the same: layers often do it anew, one after the other.

    Memory that somebody writes to is left out: reading it earlier isn't the same.
    """
    written = {base_of(n) for node in graph.nodes if node.op == "call_function" for n in mutated_args(node)}
    seen: dict[Any, fx.Node] = {}
    first: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        first[node] = node
        if node.op != "call_function" or analysis.kind(node) != PROLOGUE or is_mode_switch(node):
            continue
        memory = {base_of(n) for n in (node, *node.all_input_nodes)}
        if memory & written or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        arguments = repr(fx.map_arg((node.args, node.kwargs), first.__getitem__))
        dtype = val(node).dtype if is_tensor(node) else None  # autocast may choose another one
        first[node] = seen.setdefault((node.target, arguments, dtype), node)
    return first


def views_of_shared_outputs(graph: fx.Graph) -> set[fx.Node]:
    """The views between outputs that share memory and what they look into."""
    outputs = [n for n in graph.output_node().all_input_nodes if is_tensor(n)]
    bases = [base_of(n) for n in outputs]
    found: set[fx.Node] = set()
    for node, base in zip(outputs, bases, strict=True):
        while bases.count(base) > 1 and node is not base and base.op == "call_function":
            found.add(node)
            node = next(n for n in node.all_input_nodes if base_of(n) is base)
    return found


def module_of(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    constants = {str(n.target): getattr(gm, str(n.target)) for n in graph.find_nodes(op="get_attr")}
    graph.lint()
    return fx.GraphModule(constants, graph)


def part_of(
    gm: fx.GraphModule, nodes: Container[fx.Node], results: Iterable[fx.Node], inputs: Iterable[fx.Node] = ()
) -> fx.GraphModule:
    """Some nodes of a graph, and the mode switches between them, as a graph of their own.

    Args:
        nodes: are copied, if a result needs them.
        results: what it returns, a tuple.
        inputs: become its first placeholders.
    """
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in inputs}
    for node in gm.graph.nodes:
        if node in nodes or is_mode_switch(node):
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in results))
    drop_dead(graph)
    return module_of(gm, graph)


def prologue_module(
    gm: fx.GraphModule, results: dict[fx.Node, int], analysis: Analysis
) -> fx.GraphModule | Unsupported:
    """`(*arguments) -> results`: the nodes they depend on, and what writes into those, in the original order.

    Results are read at the end. A result that the original reads and only then writes to is refused.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    writes = [n for n in gm.graph.nodes if n.op == "call_function" and mutated_args(n)]
    for result in results:
        last = max((order[w] for w in writes if base_of(w) is base_of(result)), default=-1)
        early = [
            u for u in result.users if order[u] < last and (u.op == "output" or analysis.kind(u) != PROLOGUE)
        ]
        if early and is_tensor(result):
            return Unsupported(
                "mutation", early[0], f"`{result.name}` is written in place after it was used here"
            )
    wanted = ancestors(results)
    while True:
        memory = {base_of(n) for n in wanted if is_tensor(n)}
        missing = [
            w for w in writes if w not in wanted and base_of(w) in memory and analysis.kind(w) == PROLOGUE
        ]
        if not missing:
            break
        wanted |= ancestors(missing)
    stray = [n for n in wanted if n.op == "call_function" and analysis.kind(n) != PROLOGUE]
    if stray:
        return Unsupported("internal_error", stray[0], "the prologue depends on tokens")
    for node in wanted:
        if is_random(node):
            return Unsupported(
                "randomness", node, f"`{node.target}` draws random numbers before the batch is planned"
            )
    return part_of(gm, wanted.union(gm.graph.find_nodes(op="placeholder")), results)


def drop_dead(graph: fx.Graph) -> None:
    """Remove what nothing uses, and mode switches with nothing between them."""
    for node in reversed(graph.nodes):
        if (
            node.op == "call_function"
            and not node.users
            and not is_mode_switch(node)
            and not mutated_args(node)
        ):
            graph.erase_node(node)
    last: fx.Node | None = None
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        if not is_mode_switch(node):
            last = None
        elif last is not None and node.target is torch._C._set_grad_enabled is last.target:
            graph.erase_node(last)
            last = node
        elif last is not None and last in node.all_input_nodes:  # autocast entered and left
            graph.erase_node(node)
            graph.erase_node(last)
            last = None
        else:
            last = node


def input_of(graph: fx.Graph, inputs: dict[Any, fx.Node], spec: Any, name: str) -> fx.Node:
    """The placeholder for `spec`, made before all other nodes if there is none."""
    found = inputs.get(spec)
    if found is None:
        first = next(iter(graph.nodes), None)
        with graph.inserting_before(first) if first is not None else graph.inserting_after(None):
            found = inputs[spec] = graph.placeholder(name)
    return found


def used_inputs(graph: fx.Graph, inputs: dict[Any, fx.Node]) -> dict[Any, fx.Node]:
    """The inputs that something uses; the others are erased."""
    for node in [n for n in inputs.values() if not n.users]:
        graph.erase_node(node)
    return {spec: node for spec, node in inputs.items() if node.users}


def order_placeholders(graph: fx.Graph, order: list[fx.Node]) -> None:
    """Placeholders first, in the order in which the runtime passes them."""
    for node in reversed(order):
        first = next(iter(graph.nodes))
        if first is not node:
            first.prepend(node)
