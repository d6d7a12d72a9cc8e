"""A mask's columns as nodes of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .affine import Affine, Part
from .graph import aten, call, same_size, val
from .mask_expr import OPS, Const, Element, Expr, Index, dims
from .mask_formula import POSITION, Column
from .mask_rules import is_one


def emit_column(graph: fx.Graph, column: Column, like: fx.Node) -> fx.Node:
    """Insert nodes that compute a column; returns a tensor `[N, S]`, or `[1, S]` if it is the same in every row.

    Args:
        graph: the graph that holds the column's leaves; nodes go to its insertion point.
        like: a node `[N, S, ...]`, for the sizes and the device.
    """
    emit = _Emitter(graph, like)
    node = emit.expression(column.expr)
    if POSITION in dims(column.expr):
        return node
    return emit.call(aten.expand.default, node, [-1, emit.sizes[POSITION]])


class _Emitter:
    """Expression → nodes; every intermediate result has rank 2 and broadcasts to `[N, S]`."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph = graph
        self.like = like
        self.fake = val(like)
        self.sizes = [
            size if isinstance(size, int) else self.call(aten.sym_size.int, like, dim)
            for dim, size in enumerate(self.fake.shape[:2])
        ]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(self.graph, target, *args, like=self.like, **kwargs)

    def expression(self, expr: Expr) -> fx.Node:
        if isinstance(expr, Const):
            return self.call(aten.full.default, [1, 1], expr.value, dtype=expr.dtype, device=self.fake.device)
        if isinstance(expr, Index):
            return self._cast(self._position(expr.index), expr.dtype)
        if isinstance(expr, Element):
            return self._element(expr)
        args = [self.expression(arg) for arg in expr.args]
        return self._cast(args[0], expr.dtype) if expr.name == "to" else self.call(OPS[expr.name], *args)

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else self.call(aten.to.dtype, node, dtype)

    def _position(self, affine: Affine) -> fx.Node:
        """An affine function of `(n, s)` as int64."""
        total = (
            self.expression(Const(affine.offset, torch.int64)) if affine.offset or not affine.terms else None
        )
        for dim, factor in affine.terms:
            term = self._dim(dim)
            term = term if factor == 1 else self.call(aten.mul.Tensor, term, factor)
            total = term if total is None else self.call(aten.add.Tensor, total, term)
        assert total is not None  # without terms, it is the offset
        return total

    def _dim(self, dim: int | Part) -> fx.Node:
        """One of `(n, s)`, or a part of it, as int64."""
        if isinstance(dim, Part):
            divide = aten.remainder.Scalar if dim.remainder else aten.floor_divide.Scalar
            return self.call(divide, self._position(dim.index), dim.divisor)
        count = self.call(aten.arange.default, self.sizes[dim], device=self.fake.device)
        return self.call(aten.unsqueeze.default, count, 1 - dim)

    def _element(self, expr: Element) -> fx.Node:
        shape = expr.node.meta["val"].shape
        if len(shape) == 0:
            return self.call(aten.view.default, expr.node, [1, 1])
        if len(shape) == 2 and all(
            (is_one(size) and not expr.indices[dim].terms)
            or (expr.indices[dim] == Affine.dim(dim) and same_size(size, self.fake.shape[dim]))
            for dim, size in enumerate(shape)
        ):
            return expr.node
        return self.call(aten.index.Tensor, expr.node, [self._position(i) for i in expr.indices])
