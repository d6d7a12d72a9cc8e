"""What a batch costs dense and packed: counted work, and, where a device was calibrated, seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .passes.graph import contracted_size, size_hint, val
from .passes.layout import KEY
from .passes.packed_graphs import PackedGraphs
from .passes.propagate import Analysis, Value
from .passes.rules import STREAM
from .passes.scored import is_scored
from .plan import Plan

# Below this share of saved work, planning, gathers and the slower attention of the packed graph cost more.
MIN_SAVING = 0.1


class Work(NamedTuple):
    """What one call does.

    Args:
        linear, attention: multiply-adds.
        segments: of the tree, once for each attention.
        unpacked: tokens of the dense batch, which results are copied to.
    """

    linear: int
    attention: int
    segments: int = 0
    unpacked: int = 0


@dataclass(frozen=True)
class Cost:
    """Multiply-adds: `per_token` of the matrix products over tokens (linear layers, experts), `per_scored` of those
    that only scored tokens go through, `per_pair` of attention (a query and a key it sees); the number of attentions.
    """

    per_token: int
    per_scored: int
    per_pair: int
    attentions: int

    def dense(self, plan: Plan) -> Work:
        scored = 0 if plan.scored is None else plan.scored.dense
        linear = self.per_token * plan.dense_tokens + self.per_scored * scored
        return Work(linear, self.per_pair * plan.dense_pairs)

    def packed(self, plan: Plan) -> Work:
        scored = 0 if plan.scored is None else plan.scored.tokens
        linear = self.per_token * plan.tokens + self.per_scored * scored
        segments = plan.tree.prefix_tree.num_segments * self.attentions
        return Work(linear, self.per_pair * plan.packed_pairs, segments, plan.dense_tokens)


def saved_work(dense: Work, packed: Work) -> float:
    """Share of the multiply-adds that packing saves, 0 to 1 (negative if there are more)."""
    before, after = (work.linear + work.attention for work in (dense, packed))
    return 1 - after / before if before else 0.0


@dataclass(frozen=True)
class Speed:
    """Seconds of a training step on one device, per unit of what is counted; `pgcompile bench --calibrate` fits them.

    Args:
        linear: of a multiply-add of matrix products over tokens.
        dense_attention, packed_attention: of a multiply-add of attention.
        segment: of a segment of the tree in one attention.
        unpacked: of a token of the dense batch. (Planning isn't counted: it is done before anything is decided.)
        call: of a packed call, whatever its batch.
    """

    linear: float
    dense_attention: float
    packed_attention: float
    segment: float
    unpacked: float
    call: float

    def dense(self, work: Work) -> float:
        return self.linear * work.linear + self.dense_attention * work.attention

    def packed(self, work: Work) -> float:
        return (
            self.linear * work.linear
            + self.packed_attention * work.attention
            + self.segment * work.segments
            + self.unpacked * work.unpacked
            + self.call
        )


def why_not_worth_it(dense: Work, packed: Work, min_saving: float | None, speed: Speed | None) -> str | None:
    """Why a batch had better run as it was, as a sentence; None if packing pays.

    Args:
        min_saving: `Options.min_saving`; None leaves the decision to `speed`, or, without one, to MIN_SAVING.
    """
    if min_saving is None and speed is not None:
        before, after = speed.dense(dense), speed.packed(packed)
        if after < before:
            return None
        return f"packed, it would take {1e3 * after:.3g} ms, as it is {1e3 * before:.3g} ms (calibrated)"
    wanted, saving = MIN_SAVING if min_saving is None else min_saving, saved_work(dense, packed)
    if min_saving == 0 or saving >= wanted:
        return None
    return f"packing would save {saving:.0%} of the work, less than {wanted:.0%}"


def count_work(analysis: Analysis, graphs: PackedGraphs) -> Cost:
    """Count a model's work per token and per query-key pair from the shapes in its graph."""
    per_token = per_scored = 0
    for node, value in analysis.values.items():
        inner = contracted_size(node) if value.kind == STREAM and value.layouts else None
        if inner is not None and not _is_attention(value):
            work = value.layout.entries_of_token * size_hint(inner)
            scored = is_scored(value.layout, graphs.scored)
            per_token, per_scored = per_token + work * (not scored), per_scored + work * scored
    per_pair = 0
    for match in graphs.matches:
        q, v = val(match.q).shape, val(match.v).shape
        layout = analysis.values[match.q].layout
        heads = layout.with_dims(layout.dims[:-2]).entries_of_token
        per_pair += heads * (int(q[-1]) + int(v[-1]))
    return Cost(max(per_token, 1), per_scored, per_pair, len(graphs.matches))


def _is_attention(value: Value) -> bool:
    """Scores, or probabilities times values: counted by pairs."""
    return value.layout.has(KEY) or (value.outcome is not None and value.outcome.action == "attention")
