"""Counted work: what a batch costs dense and packed, in multiply-adds of its linear layers and its attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from .passes.graph import aten, is_tensor, shape, val
from .passes.packed_graphs import PackedGraphs
from .passes.propagate import Analysis
from .passes.scored import is_scored
from .plan import Plan

# Below this share of saved work, planning, gathers and the slower attention of the packed graph cost more.
MIN_SAVING = 0.1

_LINEAR = {aten.linear.default: 1, aten.addmm.default: 2, aten.mm.default: 1, aten.matmul.default: 1}


@dataclass(frozen=True)
class Cost:
    """Multiply-adds: `per_token` of the linear layers, `per_scored` of those that only scored tokens go through,
    `per_pair` of attention (a query and a key it sees)."""

    per_token: int
    per_scored: int
    per_pair: int

    def saving(self, plan: Plan) -> float:
        """Share of the work that packing saves, 0 to 1 (negative if it costs more)."""
        dense = self.per_token * plan.dense_tokens + self.per_pair * plan.dense_pairs
        packed = self.per_token * plan.tokens + self.per_pair * plan.packed_pairs
        if plan.scored is not None:
            dense += self.per_scored * plan.scored.dense
            packed += self.per_scored * plan.scored.tokens
        return 1 - packed / dense if dense else 0.0


def count_work(analysis: Analysis, graphs: PackedGraphs) -> Cost:
    """Count a model's work per token and per query-key pair from the shapes in its graph."""
    per_token = per_scored = 0
    for node, value in analysis.values.items():
        if value.kind == "stream" and value.layouts and node.target in _LINEAR:
            weight = node.args[_LINEAR[node.target]]
            if isinstance(weight, fx.Node) and is_tensor(weight) and analysis.kind(weight) != "stream":
                work = math.prod(s for s in shape(weight) if isinstance(s, int))
                scored = is_scored(value.layout, graphs.scored)
                per_token, per_scored = per_token + work * (not scored), per_scored + work * scored
    per_pair = 0
    for match in graphs.matches:
        q, v = val(match.q).shape, val(match.v).shape
        heads = math.prod(
            f for dim in analysis.values[match.q].layout.dims[:-2] for f in dim if isinstance(f, int)
        )
        per_pair += heads * (int(q[-1]) + int(v[-1]))
    return Cost(max(per_token, 1), per_scored, per_pair)
