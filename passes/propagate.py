"""The walk: every node of the ATen graph gets a kind and, on the token stream, a layout or a reason why not.

Kinds: PROLOGUE (computed from inputs alone, runs as written on the dense batch), WEIGHT (from parameters alone),
STREAM (computed from tokens, packed, has a `TokenLayout`), LATE (computed from unpacked tokens, runs as written on
the dense batch). Nothing is mutated. Seeds are found by use: an integer tensor that indexes an embedding, or a float
input `[N, S, d]`.

The walk runs twice. The first finds the token mixers (attention); the second knows which nodes they depend on: what
no mixer depends on may run unpacked, so there a value that can't stay packed becomes LATE instead of a refusal.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .aliasing import base_of, mutated_args
from .graph import (
    ancestors,
    aten,
    bound_args,
    contracted_size,
    descendants,
    is_mode_switch,
    is_random,
    is_state,
    is_tensor,
    same_shape,
    same_size,
    shape,
    size_hint,
    val,
)
from .layout import POSITION, Dim, Selection, TokenLayout, plain
from .reasons import Unsupported
from .rules import LATE, NUMBER_RULES, PROLOGUE, RULES, STREAM, WEIGHT, Op, Operand, Outcome, rule_of
from .rules.common import RULES_BY_NAME
from .seeds import Seeds, find_seeds, nodes_from_inputs_alone

NUMBER = "number"


@dataclass(frozen=True)
class Value:
    """What the analysis knows about a node."""

    kind: str
    layouts: tuple[TokenLayout, ...] = ()
    outcome: Outcome | None = None
    reason: Unsupported | None = None

    @property
    def layout(self) -> TokenLayout:
        return self.layouts[0]


@dataclass
class Analysis:
    """The side table and what was learned on the way.

    Args:
        whole: the selection of all tokens; its sizes are N and S.
        values: kind and layout of every node.
        mixers: nodes that let a token see others: attention, in graph order.
        columns: prologue nodes that enter the stream, with the dims they are packed to: `(node, dims)`, in order.
        reasons: why nodes that a mixer depends on could not be packed (the roots, not what follows from them).
        roots: the same, had every node to be packed: why something late isn't.
    """

    graph: fx.Graph
    whole: Selection
    values: dict[fx.Node, Value] = field(default_factory=dict)
    mixers: list[fx.Node] = field(default_factory=list)
    columns: dict[tuple[fx.Node, tuple[Dim, ...]], None] = field(default_factory=dict)
    reasons: list[Unsupported] = field(default_factory=list)
    roots: list[Unsupported] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        """Is there anything on the stream that is worth sharing?"""
        return bool(self.mixers) or self._work(STREAM) > 0

    def late_share(self) -> float:
        """Share of the matrix products that run on unpacked tokens, by multiply-adds on the dense batch."""
        late = self._work(LATE)
        return late / (late + self._work(STREAM)) if late else 0.0

    def late_reasons(self) -> list[Unsupported]:
        """Why late values aren't packed: the roots."""
        roots = {v.reason.node: v.reason for v in self.values.values() if v.kind == LATE and v.reason}
        generic = Unsupported(
            "token_mixing", None, "most of the work follows an operation on unpacked tokens"
        )
        return list(roots.values()) or self.roots or [generic]

    def _work(self, kind: str) -> int:
        return sum(_multiply_adds(n) for n, v in self.values.items() if v.kind == kind)

    def is_late_use(self, user: fx.Node) -> bool:
        """Does a user of a value need it unpacked?"""
        return user.op == "output" or self.kind(user) == LATE

    def kind(self, node: Any) -> str:
        return self.values[node].kind if isinstance(node, fx.Node) else NUMBER


def analyse(graph: fx.Graph, dropout: str = "fallback", survey: bool = False) -> Analysis | Unsupported:
    """Run the walk (see the module's docstring).

    Args:
        survey: go on behind an operation that has no rule but keeps its shape, so that all reasons are found at once.
    """
    seeds = find_seeds(graph)
    if isinstance(seeds, Unsupported):
        return seeds
    tables: dict[fx.Node, int] = {}
    while True:
        first = _Walk(graph, seeds, dropout, survey, None, tables).run()
        wanted = _wanted_tables(first, tables)
        if not wanted:
            break
        tables |= wanted
    feeding = ancestors(first.mixers)
    unpacked: set[fx.Node] = set()
    while True:
        second = _Walk(graph, seeds, dropout, survey, feeding, tables, unpacked).run()
        stuck = _sorts_used_late(second)
        if not stuck - unpacked:
            break
        unpacked |= stuck
    second.roots = first.reasons
    return second


def _sorts_used_late(analysis: Analysis) -> set[fx.Node]:
    """Sorts of tokens whose results are used on unpacked tokens: entries in another order can't be unpacked."""
    found = set()
    for node, value in analysis.values.items():
        for layout in value.layouts:
            if layout.is_sorted and any(analysis.is_late_use(user) for user in node.users):
                numbers = [layout.holds] if layout.holds else []
                found |= {
                    s.by
                    for s in (*numbers, *(f for dim in layout.dims for f in dim))
                    if not isinstance(s, (int, str))
                }
    return found


class _Walk:
    """One forward walk over the graph."""

    def __init__(
        self, graph: fx.Graph, seeds: Seeds, dropout: str, survey: bool, before_mixer: set[fx.Node] | None,
        tables: dict[fx.Node, int], unpacked: set[fx.Node] | None = None,
    ) -> None:  # fmt: skip
        self.out = Analysis(graph, seeds.whole)
        self.seeds, self.dropout, self.survey = seeds, dropout, survey
        self.before_mixer, self.tables, self.unpacked = before_mixer, tables, unpacked or set()
        self.selections: dict[Any, Selection] = {}
        self.inputs_only = nodes_from_inputs_alone(graph) - descendants(seeds.layouts)

    def run(self) -> Analysis:
        for node in self.out.graph.nodes:
            if node.op == "output":
                continue
            value = self._visit(node)
            self.out.values[node] = value
            outcome = value.outcome
            if outcome is not None:
                for column, dims in outcome.columns.items():
                    self.out.columns[(column, dims)] = None
                if outcome.action == "attention":
                    self.out.mixers.append(node)
            if value.reason is not None and self._is_early(node):
                self._note(value.reason.at(node))
        return self.out

    def _note(self, reason: Unsupported) -> None:
        if all(reason.node is not r.node for r in self.out.reasons):
            self.out.reasons.append(reason)

    def _is_early(self, node: fx.Node) -> bool:
        return self.before_mixer is None or node in self.before_mixer

    def _visit(self, node: fx.Node) -> Value:
        if node in self.seeds.layouts:
            return self._seed(node)
        if node in self.tables:
            return self._table(node)
        if node in self.inputs_only or is_mode_switch(node):
            return self._written(node) or Value(PROLOGUE)
        if node.op in ("placeholder", "get_attr"):
            return Value(
                WEIGHT if is_state(node) else PROLOGUE
            )  # an input that requires grad may still be a column
        kinds = {self.out.kind(n) for n in node.all_input_nodes}
        if not kinds.isdisjoint((LATE, STREAM)) and node.target in _OF_MEMORY:
            reason = Unsupported(
                "row_layout",
                node,
                f"`{node.target}` counts elements in memory",
                "slice, view or unfold instead",
            )
            self._note(reason)
            return Value(LATE, reason=reason)
        if LATE in kinds:
            return self._written(node) or self._late(node, kinds)
        if STREAM not in kinds:
            return self._written(node) or self._weight(node)
        if node.target is operator.getitem:
            source, index = bound_args(node)[0]
            layouts = self.out.values[source].layouts
            return Value(STREAM, (layouts[index],), Outcome(layouts[index]))
        found = self._written(node)
        return found or self._apply(node)

    def _written(self, node: fx.Node) -> Value | None:
        """In-place operations: fine on what the graph itself made in the prologue, refused elsewhere."""
        for target in mutated_args(node):
            base = base_of(target)
            if base.op == "placeholder" or self.out.kind(base) != PROLOGUE or node not in self.inputs_only:
                renorm = node.target is aten.embedding_renorm_.default
                kind, hint = (
                    ("embedding_gradient", "unset max_norm")
                    if renorm
                    else ("mutation", "write it out of place")
                )
                reason = Unsupported(kind, node, f"`{node.target}` writes into {_owner(base)}", hint)
                self._note(reason)
                return Value(LATE, reason=reason)
        return None

    def _weight(self, node: fx.Node) -> Value:
        """What is computed from parameters; noise on them would be drawn for the packed and the late graph anew."""
        if is_random(node):
            reason = Unsupported("randomness", node, f"`{node.target}` draws random numbers for a parameter")
            self._note(reason)
            return Value(LATE, reason=reason)
        return Value(WEIGHT)

    def _late(self, node: fx.Node, kinds: set[str]) -> Value:
        sources = [n for n in node.all_input_nodes if self.out.kind(n) == LATE]
        reason = next((self.out.values[n].reason for n in sources if self.out.values[n].reason), None)
        if reason is not None and node.target is aten.scaled_dot_product_attention.default:
            self._note(reason)
        return Value(LATE, reason=reason)

    def _seed(self, node: fx.Node) -> Value:
        layout = self.seeds.layouts[node]
        if node.op == "placeholder":
            outcome = Outcome(layout, {node: layout.dims}, action="column")
            return Value(STREAM, (layout,), outcome)
        weight, index, _, scale_by_freq, sparse = bound_args(node)[0]
        if self.out.kind(weight) not in (WEIGHT, PROLOGUE):
            reason = Unsupported(
                "token_mixing", node, "ids are looked up in a table that is computed from tokens"
            )
            return Value(LATE, reason=reason)
        if scale_by_freq or sparse:
            hint = "turn scale_grad_by_freq and sparse off"
            return Value(
                LATE,
                reason=Unsupported(
                    "embedding_gradient", node, "the gradient counts how often a token occurs", hint
                ),
            )
        outcome = Outcome(layout, {index: layout.dims[:-1]}, action="lookup")
        return Value(STREAM, (layout,), outcome)

    def _table(self, node: fx.Node) -> Value:
        dim = self.tables[node]
        dims = [plain(s) for s in shape(node)]
        dims[dim] = (POSITION,)
        layout = TokenLayout(tuple(dims), self.seeds.whole)
        return Value(STREAM, (layout,), Outcome(layout, action="table", detail=dim))

    def _apply(self, node: fx.Node) -> Value:
        found = self._outcome(node)
        if node in self.unpacked:
            found = Unsupported("token_mixing", node, "sorted tokens are used where tokens are unpacked")
        if isinstance(found, Unsupported):
            like = self._keeps_shape(node)
            if self.survey and like is not None and self._is_early(node):
                return Value(STREAM, (like,), reason=found.at(node))
            return Value(LATE, reason=found.at(node))
        if (
            found.action == "gather_entries"
            or found.action.endswith("loss")
            or found.action.startswith("nll_loss")
        ):
            return Value(LATE, outcome=found)
        if found.columns and not self._is_early(node):
            return Value(LATE)  # a late column: it must not split the tree, so tokens are unpacked here
        layouts = found.layout if isinstance(found.layout, tuple) else (found.layout,)
        return Value(STREAM, layouts, found)

    def _keeps_shape(self, node: fx.Node) -> TokenLayout | None:
        """The layout of a stream argument that has the result's shape."""
        same = (
            n for n in node.all_input_nodes if self.out.kind(n) == STREAM and shape(n) and same_shape(n, node)
        )
        return next((self.out.values[n].layout for n in same), None)

    def _outcome(self, node: fx.Node) -> Outcome | Unsupported:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return Unsupported("unknown_op", node, f"`{node.target}` has no rule")
        if any(layout.holds for n in node.all_input_nodes for layout in self.out.values[n].layouts):
            rule = NUMBER_RULES.get(node.target) or RULES_BY_NAME.get(node.target._schema.name)
            if rule is None:
                return Unsupported("token_mixing", node, f"`{node.target}` gets numbers of sorted tokens")
        elif node.target not in RULES and torch.Tag.nondeterministic_seeded in node.target.tags:
            return Unsupported("randomness", node, f"`{node.target}` draws random numbers")
        else:
            rule = rule_of(node.target)
        if rule is None:
            return Unsupported(
                "unknown_op", node, f"`{node.target}` has no rule", "docs/rules.md tells how to add one"
            )
        args, kwargs = bound_args(node)
        op = Op(node, val(node), self.dropout, self._is_early(node), self.selections)
        found = rule(op, *self._operands(args), **self._operands(kwargs))
        if isinstance(found, Unsupported):
            return found
        if isinstance(val(node), (tuple, list)) and not isinstance(found.layout, tuple):
            return Unsupported("unknown_op", node, f"`{node.target}` has no rule for its several results")
        symbolic = _symbolic_argument(args, kwargs)
        if symbolic is not None and found.action == "emit":
            return Unsupported(
                "size_as_number", node, f"`{node.target}` takes the batch's size {symbolic} as a number"
            )
        return found

    def _operands(self, arg: Any) -> Any:
        if isinstance(arg, dict):
            return {k: self._operands(v) for k, v in arg.items()}
        if isinstance(arg, (list, tuple)):
            return [self._operands(a) for a in arg]
        if not isinstance(arg, fx.Node):
            return arg
        if not is_tensor(arg):
            return val(arg)
        value = self.out.values[arg]
        return Operand(arg, value.kind, shape(arg), value.layouts[0] if value.layouts else None)


# These step through memory; a value that was unpacked has its elements in the same order, but memory of its own.
_OF_MEMORY = {
    aten.as_strided.default, aten.as_strided_.default, aten.as_strided_copy.default, aten.as_strided_scatter.default,
}  # fmt: skip


def _multiply_adds(node: fx.Node) -> int:
    """Of a matrix product on the dense batch; 0 for anything else. An estimate: symbolic sizes count by their hint."""
    if node.target is aten.scaled_dot_product_attention.default:
        inner = shape(node.args[0])[-1]
    else:
        inner = contracted_size(node)
    return 0 if inner is None else math.prod(size_hint(s) for s in (*shape(node), inner))


def _symbolic_argument(args: Any, kwargs: Any) -> Any:
    flat = [*args, *kwargs.values()]
    flat += [b for a in flat if isinstance(a, (list, tuple)) for b in a]
    return next((a for a in flat if isinstance(a, fx.Node) and isinstance(val(a), torch.SymInt)), None)


def _owner(base: fx.Node) -> str:
    return "an input or buffer" if base.op == "placeholder" else "a value computed from tokens"


def _wanted_tables(analysis: Analysis, known: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Parameters sliced by position, `weight[:S]`, that met the stream at its position dim: read them as tables."""
    wanted: dict[fx.Node, int] = {}
    for value in analysis.values.values():
        reason = value.reason
        if reason is None or reason.kind != "row_layout" or reason.operand is None:
            continue
        node: Any = reason.operand
        while isinstance(node, fx.Node) and node.target in (
            aten.unsqueeze.default,
            aten.to.dtype,
            aten.expand.default,
        ):
            node = node.args[0]
        if isinstance(node, fx.Node) and node.target is aten.slice.Tensor and analysis.kind(node) == WEIGHT:
            args = bound_args(node)[0]
            dim = args[1] % len(shape(node))
            starts_at_zero = args[2] in (0, None) and args[4] == 1
            if starts_at_zero and node not in known and same_size(shape(node)[dim], analysis.whole.positions):
                wanted[node] = dim
    return wanted
