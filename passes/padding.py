"""May padding be dropped? Only if nothing after the unpack notices that its tokens are zero now.

A dropped token unpacks to zeros where the original had numbers. That is fine in what the caller gets back (padding
is documented to be zero there) and in what is masked before it is reduced, `(x * mask).sum()`, or labelled with
`ignore_index`. So the late part is walked once more: where do values of padding go, and which prologue values switch
them off on the way? Each `Guard` is checked on the batch itself, position by position, when a plan is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .graph import aten, bound_args, is_tensor, shape, val
from .layout import KEY, Dim, Selection, TokenLayout, plain
from .propagate import Analysis
from .reasons import Unsupported
from .rules import LATE, PROLOGUE, STREAM, Op, Operand, Outcome, rule_of
from .rules.common import DENSE, aligned_dims
from .subgraph import live_nodes


@dataclass(frozen=True, eq=False)
class Factor:
    """A prologue value that makes a token's value the same as the original's, whatever the token was computed from.

    Args:
        node, dims: the value and how it is aligned with the tokens.
        selection: whose tokens those are.
        off: the token is switched off where the value equals this (0, False, True, or `ignore_index`).
    """

    node: fx.Node
    dims: tuple[Dim, ...]
    selection: Selection
    off: Any


@dataclass
class Guards:
    """A token may be dropped iff in each of `groups` some factor is off there. `refusal`: never.

    `layouts` has the late values that still have tokens in known dims.
    """

    groups: list[tuple[Factor, ...]] = field(default_factory=list)
    refusal: Unsupported | None = None
    layouts: dict[fx.Node, TokenLayout] = field(default_factory=dict)


@dataclass(frozen=True)
class _Taint:
    """A late value whose padding differs from the original's, unless each group has a factor that is off there."""

    layout: TokenLayout
    groups: tuple[tuple[Factor, ...], ...]


def padding_guards(analysis: Analysis) -> Guards:
    """Follow padding through the late part (see the module's docstring)."""
    guards = Guards()
    taints: dict[fx.Node, _Taint] = {}
    selections: dict[Any, Selection] = {}
    live = live_nodes(analysis.graph)  # nothing else will be computed
    for node, value in analysis.values.items():
        if value.kind != LATE or node not in live or guards.refusal is not None:
            continue
        sources = {n: _taint_of(n, analysis, taints) for n in node.all_input_nodes}
        if not any(sources.values()):
            continue
        found = _follow(node, sources, value.outcome, selections, analysis)
        if isinstance(found, _Taint):
            taints[node] = found
            guards.layouts[node] = found.layout
            continue
        groups = (
            found if found is not None else [g for t in sources.values() if t is not None for g in t.groups]
        )
        if any(not g for g in groups):
            guards.refusal = Unsupported(
                "padding_read", node, f"`{node.target}` reads padding that nothing masks, so padding is kept"
            )
        guards.groups += [g for g in groups if g not in guards.groups]
    return guards


def _taint_of(node: fx.Node, analysis: Analysis, taints: dict[fx.Node, _Taint]) -> _Taint | None:
    value = analysis.values[node]
    if value.kind == STREAM and value.layouts:
        return _Taint(value.layout, ((),))
    return taints.get(node)


def _follow(
    node: fx.Node,
    sources: dict[fx.Node, _Taint | None],
    outcome: Outcome | None,
    selections: dict[Any, Selection],
    analysis: Analysis,
) -> _Taint | list[tuple[Factor, ...]] | None:
    """The taint of the result; or, of an operation that mixes tokens, its groups (None: those of its sources)."""
    if outcome is not None and outcome.action not in _KEEPS_TOKENS:
        return _after_labels(node, outcome)
    layout = _layout_after(node, sources, selections)
    if layout is None:
        return None
    groups = tuple(dict.fromkeys(g for t in sources.values() if t is not None for g in t.groups))
    factor = _factor(node, sources, layout)
    if factor is not None and analysis.kind(factor.node) != PROLOGUE:
        factor = None  # computed from tokens: only known once they are unpacked
    return _Taint(layout, tuple((*g, factor) for g in groups) if factor is not None else groups)


def _after_labels(node: fx.Node, outcome: Outcome) -> _Taint | list[tuple[Factor, ...]]:
    """A gather of labels keeps the tokens; a label loss is off at `ignore_index`."""
    layout = outcome.layout
    assert isinstance(layout, TokenLayout)
    if outcome.action == "gather_entries":
        return _Taint(layout.with_dims((*layout.dims[:-1], plain(shape(node)[-1]))), ((),))
    _, target, _, reduction, ignore_index, *_ = bound_args(node)[0]
    tokens = layout.with_dims(layout.dims[:1])
    group = (Factor(target, aligned_dims(shape(target), tokens), layout.selection, ignore_index),)
    return _Taint(tokens, (group,)) if reduction == 0 else [group]


def _layout_after(
    node: fx.Node, sources: dict[fx.Node, _Taint | None], selections: dict[Any, Selection]
) -> TokenLayout | None:
    rule = rule_of(node.target)
    if rule is None:
        return None

    def operand(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [operand(a) for a in arg]
        if not isinstance(arg, fx.Node):
            return arg
        if not is_tensor(arg):
            return val(arg)
        taint = sources.get(arg)
        kind = DENSE if taint is None else STREAM
        return Operand(arg, kind, shape(arg), None if taint is None else taint.layout)

    args, kwargs = bound_args(node)
    result = val(node)
    found = rule(
        Op(node, result, "shared", False, selections),
        *operand(args),
        **{k: operand(v) for k, v in kwargs.items()},
    )
    if isinstance(found, Unsupported) or isinstance(found.layout, tuple) or found.action not in _KEEPS_TOKENS:
        return None
    return None if found.layout.is_sorted or found.layout.has(KEY) else found.layout  # a product mixes tokens


_KEEPS_TOKENS = ("emit", "reshape", "expand", "alias", "drop_dim", "filled")


def _factor(node: fx.Node, sources: dict[fx.Node, _Taint | None], layout: TokenLayout) -> Factor | None:
    """The prologue value that switches tokens off in this operation, if there is one."""
    args = bound_args(node)[0]
    switch, off = None, 0
    if node.target in (aten.mul.Tensor, aten.mul_.Tensor):
        switch = next((a for a in args[:2] if isinstance(a, fx.Node) and sources.get(a) is None), None)
    elif node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        switch, off = args[1], True
    elif node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        switch = args[0]
        keeps_first = isinstance(args[1], fx.Node) and sources.get(args[1]) is not None
        keeps_second = isinstance(args[2], fx.Node) and sources.get(args[2]) is not None
        if keeps_first and keeps_second:
            return None
        off = not keeps_first
    if not isinstance(switch, fx.Node) or sources.get(switch) is not None or not is_tensor(switch):
        return None
    dims = aligned_dims(shape(switch), layout)
    return Factor(switch, dims, layout.selection, off) if dims else None
