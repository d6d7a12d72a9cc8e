"""The head of the packed graph, cut off so that it can run a few tokens at a time.

    packed   ... → hidden [1, T, D] → linear → logits [1, T, V] → log_softmax → entries, entropies, ...
    trunk    ... → hidden [1, T, D]
    head     hidden [1, C, D] → log_softmax [1, C, V], entropies [1, C]      for C tokens at a time

Where `[T, V]` would take most of the memory, the runtime runs the trunk whole and the head in chunks, computes each
chunk again in backward, and keeps what is narrow. (The idea is that of chunked and fused linear cross-entropy, in
TRL, Liger and Inductor's auto-chunker, for whatever stands behind the head.)

That needs: one widest linear layer (or several as wide, of several models), no attention behind it, and wide values
that nobody reads whole, but for single entries (labels).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .graph import ancestors, aten, descendants, is_mode_switch
from .packed_graphs import Head, HeadOutput, Source
from .subgraph import drop_dead, module_of
from .unpack import gather_entries, label_loss, label_request, loss_request
from .verify import SCORED, TOKENS

# A vocabulary: wider than what feeds it, and wide enough for its values to matter.
MIN_WIDTH, MIN_RATIO = 1024, 4
# A narrow result has at most this share of a wide value's numbers.
NARROW = 8


def split_head(
    packed: fx.GraphModule, late: fx.GraphModule, late_inputs: list[tuple[str, int]]
) -> Head | None:
    """Cut off the head of a verified packed graph (nodes have `meta["packed"]`); None if it has none that can be."""
    widest = _widest_linears(packed.graph)
    if not widest:
        return None
    region = descendants(widest)
    order = list(packed.graph.nodes)
    if any(_is_opaque(n) for n in region) or len({_tokens(n) for n in region if n.op == "call_function"}) > 1:
        return None
    width = _width(widest[0])
    results = list(packed.graph.output_node().args[0])  # type: ignore[arg-type]
    outputs = _outputs(results, region, width)
    if outputs is None:
        return None
    lookups = _lookups(late, late_inputs)
    wide = {o.index for o in outputs if o.is_wide}
    if lookups is None or {index for _, index in lookups} != wide:
        return None
    feeding = dict.fromkeys(
        n for node in order if node in region for n in node.all_input_nodes if n not in region
    )
    trunk_outputs = [i for i, node in enumerate(results) if node not in region]
    sources = _sources(packed.graph, list(feeding))
    if sources is None:
        return None
    passed = [n for n in feeding if n.op not in ("placeholder", "get_attr")]
    trunk = _subgraph(packed, [results[i] for i in trunk_outputs] + passed)
    sources = [replace(s, index=len(trunk_outputs) + s.index) if s.kind == "trunk" else s for s in sources]
    narrow = [results[o.index] for o in outputs if not o.is_wide]
    looked_into = [results[index] for _, index in lookups]
    return Head(
        trunk, trunk_outputs, _head_module(packed, order, region, list(feeding), narrow, looked_into, width), sources,
        outputs, _requests(late, [node for node, _ in lookups]), [index for _, index in lookups], width,
        sum(width * n.meta["packed"][1].itemsize for n in widest),
        [n.name for n in order if n in region], SCORED in widest[0].meta["packed"][0],
    )  # fmt: skip


def _widest_linears(graph: fx.Graph) -> list[fx.Node]:
    linears = graph.find_nodes(op="call_function", target=aten.linear.default)
    if any("packed" not in n.meta for n in linears):
        return []  # verify_pass is disabled
    width = max((_width(n) for n in linears), default=0)
    found = [n for n in linears if _width(n) == width]
    feeds = max((n.args[0].meta["packed"][0][-1] for n in found), default=0)
    return found if width >= MIN_WIDTH and width >= MIN_RATIO * feeds else []


def _width(node: fx.Node) -> int:
    """Numbers of each token; 0 if the tokens aren't in a dim of their own."""
    shape, _ = node.meta["packed"]
    dim = _token_dim(node)
    return 0 if dim is None else math.prod(shape) // shape[dim]


def _token_dim(node: fx.Node) -> int | None:
    shape, _ = node.meta["packed"]
    return next((dim for dim, size in enumerate(shape) if size in (TOKENS, SCORED)), None)


def _tokens(node: fx.Node) -> int:
    """All of them, or the scored ones."""
    dim = _token_dim(node)
    return 0 if dim is None else int(node.meta["packed"][0][dim])


def _is_opaque(node: fx.Node) -> bool:
    """Attention mixes tokens; what draws random numbers or sorts tokens isn't the same in chunks."""
    if node.op != "call_function" or node.meta.get("packed") is None:
        return True
    if _token_dim(node) is None:
        return True
    tags = getattr(node.target, "tags", ())
    return "pgcompile" in str(node.target) or any("nondeterministic" in str(tag) for tag in tags)


def _outputs(results: list[Any], region: set[fx.Node], width: int) -> list[HeadOutput] | None:
    found = []
    for index, node in enumerate(results):
        if node not in region:
            continue
        token_dim = _token_dim(node)
        is_wide = _width(node) == width
        if token_dim is None or (not is_wide and _width(node) * NARROW > width):
            return None
        found.append(HeadOutput(index, token_dim, is_wide))
    return found


def _sources(graph: fx.Graph, feeding: list[fx.Node]) -> list[Source] | None:
    placeholders = graph.find_nodes(op="placeholder")
    found, passed = [], 0
    for node in feeding:
        if node.meta.get("packed") is None:
            return None
        shape, dtype = node.meta["packed"]
        token_dim = _token_dim(node)
        if any(size % n == 0 and size != n and size for size in shape for n in (TOKENS, SCORED)):
            return None  # tokens and something else in one dim
        if node.op == "placeholder":
            found.append(Source("input", placeholders.index(node), token_dim, dtype))
        elif node.op == "get_attr":
            return None
        else:
            found.append(Source("trunk", passed, token_dim, dtype))
            passed += 1
    return found


def _subgraph(gm: fx.GraphModule, outputs: list[fx.Node]) -> fx.GraphModule:
    """The same inputs, other outputs."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "output":
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in outputs))
    drop_dead(graph)
    return module_of(gm, graph)


def _head_module(
    gm: fx.GraphModule,
    order: list[fx.Node],
    region: set[fx.Node],
    feeding: list[fx.Node],
    narrow: list[fx.Node],
    looked_into: list[fx.Node],
    width: int,
) -> fx.GraphModule:
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in feeding}
    requests = [(_placeholder(graph, "index"), _placeholder(graph, "column")) for _ in looked_into]
    for node in order:
        if node in region or is_mode_switch(node):
            env[node] = graph.node_copy(node, env.__getitem__)
    entries = []
    for node, request in zip(looked_into, requests, strict=True):
        rows = graph.call_function(aten.reshape.default, (env[node], [-1, width]))
        entries.append(graph.call_function(torch.ops.pgcompile.gather_entries.default, (rows, *request)))
    graph.output((*(env[n] for n in narrow), *entries))
    drop_dead(graph)
    return module_of(gm, graph)


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """One more, with a name of its own: the generated function's argument is called like its target."""
    node = graph.placeholder(name)
    node.target = node.name
    return node


def _lookups(late: fx.GraphModule, late_inputs: list[tuple[str, int]]) -> list[tuple[fx.Node, int]] | None:
    """The late graph's label lookups and the packed output that each looks into; None if one is read otherwise."""
    placeholders = late.graph.find_nodes(op="placeholder")
    found = []
    index_of = {p: i for p, (kind, i) in zip(placeholders, late_inputs, strict=True) if kind == "packed"}
    for node in late.graph.nodes:
        if node.target in (gather_entries, label_loss):
            found.append((node, index_of[node.args[0]]))
    looked_into = {index for _, index in found}
    for placeholder, index in index_of.items():
        is_whole = any(
            u.target not in (gather_entries, label_loss) or u.args[0] is not placeholder
            for u in placeholder.users
        )
        if index in looked_into and is_whole:
            return None
    return found


def _requests(late: fx.GraphModule, lookups: list[fx.Node]) -> fx.GraphModule:
    """What is looked up, computed before the late graph runs: it depends on labels and maps alone."""
    arguments = [_request(node) for node in lookups]
    needed = ancestors(n for _, args in arguments for n in args if isinstance(n, fx.Node))
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in late.graph.nodes:
        if node.op == "placeholder" or node in needed:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(
        [graph.call_function(target, fx.map_arg(args, env.__getitem__)) for target, args in arguments]
    )
    return module_of(late, graph)


def _request(lookup: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    if lookup.target is gather_entries:
        _, token_map, dims, index = lookup.args
        return label_request, (token_map, dims, index)
    _, _, token_map, dims, labels, _, _, ignore_index, *_ = lookup.args
    return loss_request, (token_map, dims, labels, ignore_index)
