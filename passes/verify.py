"""After rewriting: run the packed graph on fake tensors and compare every shape with what the analysis predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .graph import requires_grad, val
from .layout import POSITION, ROW, Dim, Selection, Sorted, TokenLayout, is_token_factor
from .packed_graphs import PackedGraphs
from .reasons import Unsupported
from .scored import is_scored

TOKENS, SCORED, LOOKED_UP = 7919, 7907, 7901  # primes that no model has as a size


def verify(graphs: PackedGraphs, aten_gm: fx.GraphModule) -> Unsupported | None:
    """Fake-propagate the packed graph with `TOKENS` tokens, `SCORED` of them scored.

    Returns:
        `verification_failed` at the first node whose shape or dtype isn't the predicted one, else None.
    """
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        checker = _Checker(graphs.packed, graphs.scored)
        inputs = fake_inputs(graphs, aten_gm, TOKENS)
        if isinstance(inputs, Unsupported):
            return inputs
        checker.run(*inputs)
    return checker.failure


def fake_inputs(
    graphs: PackedGraphs,
    aten_gm: fx.GraphModule,
    tokens: Any,
    segments: Any = 5,
    scored: Any = SCORED,
    requests: Sequence[tuple[Any, Any]] | None = None,
) -> list[Any] | Unsupported:
    """The packed graph's inputs for numbers of tokens, segments and scored tokens (ints or SymInts), under the active
    fake mode.

    Args:
        requests: M and K of each.
    """
    requests = [(LOOKED_UP, 3)] * len(graphs.request_widths) if requests is None else requests
    placeholders = aten_gm.graph.find_nodes(op="placeholder")
    made: list[Any] = []
    for spec in graphs.inputs:
        if spec.kind in ("argument", "value"):
            source = placeholders[spec.index] if spec.kind == "argument" else graphs.results[spec.index]
            like = val(source)
            if not isinstance(like, torch.Tensor):
                made.append(like)
                continue
            if any(not isinstance(s, int) for s in like.shape):
                return _size_as_number(source)
            empty = torch.empty_strided(
                tuple(like.shape), like.stride(), dtype=like.dtype, device=like.device
            )
            made.append(empty.requires_grad_(requires_grad(source)))
        elif spec.kind == "column":
            source = graphs.results[spec.index]
            like = val(source)
            if any(not isinstance(f, (int, str)) for dim in spec.dims for f in dim):
                return _size_as_number(source)
            made.append(
                _empty(column_shape(spec.dims, tokens), like.dtype, like.device, requires_grad(source))
            )
        elif spec.kind == "segments":
            made.append(torch.empty((segments, 5), dtype=torch.int64, device="cpu"))
        elif spec.kind == "scored":
            made.append(torch.empty((scored,), dtype=torch.int64, device=_device(graphs)))
        elif spec.kind in ("request_index", "request_column"):
            shape = requests[spec.index] if spec.kind == "request_column" else requests[spec.index][:1]
            made.append(torch.empty(shape, dtype=torch.int64, device=_device(graphs)))
        elif spec.kind == "hides":
            made.append(torch.empty((2,), dtype=torch.bool, device="cpu"))
        elif spec.kind == "data_mask":
            made.append(torch.empty((tokens,), dtype=torch.bool, device=_device(graphs)))
        else:
            made.append(torch.empty((tokens,), dtype=torch.int64, device=_device(graphs)))
    return made


def _size_as_number(source: fx.Node) -> Unsupported:
    return Unsupported(
        "size_as_number", source, "a value whose size depends on the batch is used for every token"
    )


def _empty(size: Any, dtype: torch.dtype, device: torch.device, requires_grad: bool) -> torch.Tensor:
    return torch.empty(tuple(size), dtype=dtype, device=device, requires_grad=requires_grad)


def _device(graphs: PackedGraphs) -> torch.device:
    """Where the tokens live."""
    return next(val(graphs.results[i]).device for i, _ in graphs.keys)


def column_shape(dims: tuple[Dim, ...], tokens: Any) -> list[Any]:
    """Packed sizes of a column with the layout `dims`."""
    holder = POSITION if any(POSITION in dim for dim in dims) else ROW
    sizes = []
    for dim in dims:
        size: Any = tokens if holder in dim else 1
        for f in dim:
            size = size if is_token_factor(f) else size * f
        sizes.append(size)
    return sizes


class _Checker(fx.Interpreter):
    """Compares, and leaves each node's size and dtype for `TOKENS` tokens in `meta["packed"]`."""

    failure: Unsupported | None = None

    def __init__(self, gm: fx.GraphModule, scored: set[Selection]) -> None:
        super().__init__(gm)
        self.scored = scored

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            n.meta["packed"] = (tuple(result.shape), result.dtype)
        layouts = n.meta.get("layouts")
        if layouts and self.failure is None:
            results = result if isinstance(result, (tuple, list)) else (result,)
            originals = val(n.meta["original"])
            originals = originals if isinstance(originals, (tuple, list)) else (originals,)
            for found, layout, original in zip(results, layouts, originals, strict=True):
                self._compare(n, found, layout, original)
        return result

    def _compare(self, n: fx.Node, found: Any, layout: TokenLayout, original: Any) -> None:
        shape, tokens = [], SCORED if is_scored(layout, self.scored) else TOKENS
        for dim, size in zip(layout.dims, layout.packed_shape(), strict=True):
            factors = [g for f in dim for g in (f.factors if isinstance(f, Sorted) else (f,))]
            plain = [f for f in factors if isinstance(f, int)]
            shape.append(tokens * torch.Size(plain).numel() if size == -1 else size)
        if list(found.shape) != shape or found.dtype != original.dtype:
            text = f"{n.target} gives {list(found.shape)} {found.dtype}, predicted {shape} {original.dtype}"
            self.failure = Unsupported("verification_failed", n.meta["original"], text)
