"""Where tokens come from: seeds of the token stream, found by use, and what is computed from inputs alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .graph import aten, is_state, is_tensor, requires_grad, same_size, shape, val
from .layout import POSITION, ROW, Dim, Selection, TokenLayout, plain
from .reasons import Unsupported
from .softmax_forms import softmax_with_sink

_ATTENTION = (aten.scaled_dot_product_attention.default, aten.softmax.int, softmax_with_sink)


@dataclass(frozen=True)
class Seeds:
    """Where tokens come from: `layouts` of the nodes where the stream begins (embeddings, float inputs)."""

    layouts: dict[fx.Node, TokenLayout]
    whole: Selection


def find_seeds(graph: fx.Graph) -> Seeds | Unsupported:
    """Seeds by use. Position tables (an embedding of `[S]` or `[1, S]` indices) are seeds of their own kind."""
    inputs_only = nodes_from_inputs_alone(graph)
    lookups = [n for n in graph.nodes if n.target is aten.embedding.default and n.args[1] in inputs_only]
    data = _nodes_from_data(graph)
    by_ids = [n for n in lookups if len(shape(n.args[1])) == 2 and n.args[1] in data]
    if any(not same_size(shape(n.args[1])[0], 1) for n in by_ids):
        by_ids = [n for n in by_ids if not same_size(shape(n.args[1])[0], 1)]
    floats = [n for n in graph.nodes if n in data and _is_float_tokens(n) and n.op == "placeholder"]
    sizes = [shape(n.args[1]) for n in by_ids] or [shape(n)[:2] for n in floats]
    if not sizes and not any(n.target in _ATTENTION for n in graph.nodes):
        return Unsupported("nothing_to_pack", None, "the graph has no attention over tokens")
    if not sizes:
        return Unsupported(
            "no_token_stream",
            None,
            "no 2-D integer input indexes an embedding, and no float [N, S, d] input enters the model",
        )
    wide = next((n for n in floats if not by_ids and not isinstance(shape(n)[2], int)), None)
    if wide is not None:
        text = "the last size of what may be tokens [N, S, d] is taken for one that changes from call to call"
        hint = "if it doesn't change: torch._dynamo.mark_static(x, 2) before the first call"
        return Unsupported("ambiguous_seed", wide, text, hint)
    if any(not (same_size(s[0], sizes[0][0]) and same_size(s[1], sizes[0][1])) for s in sizes):
        where = (by_ids or floats)[-1]
        return Unsupported(
            "ambiguous_seed",
            where,
            "inputs of different shapes look like batches of tokens",
            "compile the parts with one sequence each",
        )
    whole = Selection(*sizes[0])
    layouts: dict[fx.Node, TokenLayout] = {}
    for node in lookups:
        dims = _index_dims(shape(node.args[1]), whole, node in by_ids)
        if dims is not None:
            layouts[node] = TokenLayout((*dims, plain(shape(node)[-1])), whole)
    if not by_ids:
        for node in floats:
            layouts[node] = TokenLayout(((ROW,), (POSITION,), plain(shape(node)[2])), whole)
    return Seeds(layouts, whole)


def _index_dims(sizes: tuple[Any, ...], whole: Selection, is_ids: bool) -> tuple[Dim, ...] | None:
    """Dims of an embedding's index: ids, or a guess for position tables (a wrong one can't meet the stream)."""
    if is_ids or (
        len(sizes) == 2 and same_size(sizes[0], whole.rows) and same_size(sizes[1], whole.positions)
    ):
        return ((ROW,), (POSITION,))
    if sizes and same_size(sizes[-1], whole.positions) and all(same_size(s, 1) for s in sizes[:-1]):
        return (*((),) * (len(sizes) - 1), (POSITION,))
    return None


def _is_float_tokens(node: fx.Node) -> bool:
    value = val(node)
    return is_tensor(node) and value.dim() == 3 and value.dtype.is_floating_point


def _nodes_from_data(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on a tensor the caller passed (not a parameter or buffer)."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_input = node.op == "placeholder" and is_tensor(node) and not is_state(node)
        if is_input or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def nodes_from_inputs_alone(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on no parameter and on nothing that requires gradient: the prologue."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            if not (requires_grad(node) or node.meta.get("is_parameter", False)):
                found.add(node)
        elif all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
