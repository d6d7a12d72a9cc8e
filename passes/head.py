"""The head of the packed graph, cut off so that it can run a few tokens at a time.

    packed   ... → hidden [1, T, D] → linear → logits [1, T, V] → log_softmax → entries [M, K], entropies [1, T], ...
    trunk    ... → hidden [1, T, D]
    head     hidden [1, C, D] → ... → entries [m, K], entropies [1, C]      for C tokens at a time, and m of the labels

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

from .graph import aten, descendants
from .packed_graphs import Head, HeadOutput, Source
from .subgraph import part_of
from .verify import SCORED, TOKENS

# A vocabulary: wider than what feeds it, and wide enough for its values to matter.
MIN_WIDTH, MIN_RATIO = 1024, 4
# A narrow result has at most this share of a wide value's numbers.
NARROW = 8


def split_head(packed: fx.GraphModule) -> Head | None:
    """Cut off the head of a verified packed graph (nodes have `meta["packed"]`); None if it has none that can be."""
    widest = _widest_linears(packed.graph)
    if not widest:
        return None
    behind = descendants(widest)
    region = [n for n in packed.graph.nodes if n in behind]
    lookups = [n for n in region if _is_lookup(n)]
    by_token = [n for n in region if not _is_lookup(n)]
    if any(_is_opaque(n) for n in by_token) or len({_tokens(n) for n in by_token}) > 1:
        return None
    requests = list(dict.fromkeys(tuple(n.args[1:]) for n in lookups))
    results = list(packed.graph.output_node().args[0])  # type: ignore[arg-type]
    width = _width(widest[0])
    outputs = _outputs(results, behind, requests, width)
    if outputs is None:
        return None
    asked = {n for request in requests for n in request}
    feeding = dict.fromkeys(
        n for node in region for n in node.all_input_nodes if n not in behind and n not in asked
    )
    trunk_outputs = [i for i, node in enumerate(results) if node not in behind]
    sources = _sources(packed.graph, list(feeding))
    if sources is None:
        return None
    passed = [n for n in feeding if n.op not in ("placeholder", "get_attr")]
    whole = {n for n in packed.graph.nodes if n.op != "output"}
    trunk = part_of(packed, whole, [results[i] for i in trunk_outputs] + passed)
    sources = [replace(s, index=len(trunk_outputs) + s.index) if s.kind == "trunk" else s for s in sources]
    arguments = [*feeding, *(n for request in requests for n in request)]
    head = part_of(packed, behind, [results[o.index] for o in outputs], arguments)
    position = {node: i for i, node in enumerate(packed.graph.find_nodes(op="placeholder"))}
    return Head(
        trunk, trunk_outputs, head, sources, outputs, [(position[i], position[c]) for i, c in requests],
        len(widest) * width * max(n.meta["packed"][1].itemsize for n in by_token if _width(n) == width),
        [n.name for n in by_token], SCORED in widest[0].meta["packed"][0],
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


def _is_lookup(node: fx.Node) -> bool:
    return node.target is torch.ops.pgcompile.gather_entries.default


def _is_opaque(node: fx.Node) -> bool:
    """Attention mixes tokens; what draws random numbers or sorts tokens isn't the same in chunks."""
    if node.meta.get("packed") is None or _token_dim(node) is None:
        return True
    tags = getattr(node.target, "tags", ())
    return "pgcompile" in str(node.target) or any("nondeterministic" in str(tag) for tag in tags)


def _outputs(
    results: list[Any], region: set[fx.Node], requests: list[Any], width: int
) -> list[HeadOutput] | None:
    """None if one is wide."""
    found = []
    for index, node in enumerate(results):
        if node not in region:
            continue
        if _is_lookup(node):
            found.append(HeadOutput(index, request=requests.index(tuple(node.args[1:]))))
            continue
        token_dim = _token_dim(node)
        if token_dim is None or _width(node) * NARROW > width:
            return None
        found.append(HeadOutput(index, token_dim))
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
