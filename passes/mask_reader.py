"""Nodes of an ATen graph → expressions of their elements (`mask_expr`), by the table of `mask_rules`.

What rules can't see is here: constants of the module, tensors that are written while a mask is built from them, and
the segment numbers that transformers computes from positions.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from .affine import Affine
from .aliasing import mutated_args, shares_memory
from .graph import bound_args, same_size, schema_of
from .mask_expr import Element, Expr, Index, apply, constant, size, substitute
from .mask_rules import RULES, Value

aten = torch.ops.aten

# Expressions repeat shared subexpressions; a mask has 5 to 50 nodes, and what exceeds this isn't one.
MAX_SIZE = 1000


class MaskReader:
    """Reads nodes of one graph.

    Attributes:
        stale: a node whose storage is written between its definition and a use that was read, so that what was
            read isn't what the program computes; None if there is none.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.stale: fx.Node | None = None
        self._values: dict[fx.Node, Value] = {}
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._storage, self._writes = _storages(graph)

    def read(self, node: fx.Node) -> Value:
        """The element of `node`, through as many operations as there are rules for."""
        if node not in self._values:
            expr = self._apply_rule(node)
            if expr is None or size(expr) > MAX_SIZE:
                expr = self._opaque(node)
            self._values[node] = Value(expr, node.meta["val"])
        return self._values[node]

    def read_final(self, node: fx.Node) -> Value:
        """The same, for the node that the attention uses: nothing may write to it later."""
        self._note_write(node, None)
        return self.read(node)

    def is_written(self, node: fx.Node) -> bool:
        """Does anything write to it later? Then it isn't what its arguments say."""
        return self._writes_between(node, None)

    def _opaque(self, node: fx.Node) -> Element:
        self._note_write(node, None)
        fake = node.meta["val"]
        return Element(node, tuple(map(Affine.dim, range(fake.dim()))), fake.dtype)

    def _apply_rule(self, node: fx.Node) -> Expr | None:
        out, schema = node.meta["val"], schema_of(node)
        if schema is None or not isinstance(out, torch.Tensor):
            return None
        name = schema.name.removeprefix("aten::")
        if name == "cumsum":
            return self._unit_steps(node)
        if name in ("lift_fresh_copy", "lift_fresh"):
            return _lifted_constant(node)
        rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
        if rule is None:
            return None
        positional, keywords = bound_args(node)
        args = [self._argument(node, arg) for arg in positional]
        return rule(out, *args, **{key: self._argument(node, arg) for key, arg in keywords.items()})

    def _argument(self, user: fx.Node, arg: Any) -> Any:
        """What a rule gets for an argument: a `Value`, a number, a symbolic number, or a list of those."""
        if isinstance(arg, (list, tuple)):
            return [self._argument(user, a) for a in arg]
        if not isinstance(arg, fx.Node):
            return arg
        fake = arg.meta.get("val")
        if isinstance(fake, torch.Tensor):
            self._note_write(arg, user)
            return self.read(arg)
        if isinstance(fake, torch.SymInt) and fake.node.expr.is_Integer:
            return int(fake.node.expr)
        return fake

    def _note_write(self, node: fx.Node, user: fx.Node | None) -> None:
        if self._writes_between(node, user):
            self.stale = node

    def _writes_between(self, node: fx.Node, user: fx.Node | None) -> bool:
        end = len(self._order) if user is None else self._order[user]
        return any(self._order[node] < write < end for write in self._writes[self._storage[node]])

    def _unit_steps(self, node: fx.Node) -> Expr | None:
        """The segment index of positions that always rise by one is zero."""
        base = self.unit_step_base(node)
        if not isinstance(base, Index):
            return None
        following = base.index.substitute({0: Affine.dim(0), 1: Affine.dim(1) + Affine((), 1)})
        return constant(0, torch.int64) if following - base.index == Affine((), 1) else None

    def unit_step_base(self, node: fx.Node) -> Expr | None:
        """`p(n, s)`, where `node` is `(diff(p, prepend=p[:, :1] - 1) != 1).cumsum(-1)` of an integer `p`.

        That is how transformers numbers the sequences packed into a row. Between two tokens with the same number
        every difference is one, hence `p(n, q) - p(n, k) = q - k`.
        """
        step = _match(node, aten.cumsum.default, dim=-1)
        difference = step and _match(step, aten.ne.Scalar, other=1)
        base = difference and _match(difference, aten.diff.default, n=1, dim=-1, append=None)
        if step is None or difference is None or base is None:
            return None
        if base.meta["val"].dim() != 2 or base.meta["val"].dtype not in (torch.int64, torch.int32):
            return None
        prepend = bound_args(difference)[0][3]
        if not isinstance(prepend, fx.Node) or not same_size(prepend.meta["val"].shape[1], 1):
            return None
        for used, user in ((step, node), (difference, step), (base, difference), (prepend, difference)):
            self._note_write(used, user)
        first = {0: Affine.dim(0), 1: Affine()}
        p, before = self.read(base).expr, substitute(self.read(prepend).expr, first)
        expected = apply("sub", (substitute(p, first), constant(1, p.dtype)), p.dtype)
        return p if before == expected and p.dtype == before.dtype else None


def _match(node: fx.Node, target: Any, **options: Any) -> fx.Node | None:
    """The first argument of a call to `target` whose arguments `options` have these values."""
    schema = schema_of(node)
    if node.target is not target or schema is None:
        return None
    positional, keywords = bound_args(node)
    given = dict(zip((a.name for a in schema.arguments), positional, strict=False), **keywords)
    rank = node.meta["val"].dim()
    if "dim" in options and isinstance(given["dim"], int):
        given["dim"] = given["dim"] % rank - rank
    return (
        positional[0] if all(given[k] == v for k, v in options.items()) and not given.get("dtype") else None
    )


def _lifted_constant(node: fx.Node) -> Expr | None:
    """`torch.tensor(-inf)` in the model's code: a constant of the graph module, copied at each call."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr" or node.graph.owning_module is None:
        return None
    value = getattr(node.graph.owning_module, str(source.target), None)
    if isinstance(value, torch._subclasses.FakeTensor):
        value = value.constant
    return (
        constant(value.item(), value.dtype) if isinstance(value, torch.Tensor) and value.dim() == 0 else None
    )


def _storages(graph: fx.Graph) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, list[int]]]:
    """Which nodes share a storage (each maps to one of them), and the positions of the writes to each storage."""
    storage: dict[fx.Node, fx.Node] = {}
    members: dict[fx.Node, list[fx.Node]] = {}
    writes: dict[fx.Node, list[int]] = defaultdict(list)
    for position, node in enumerate(graph.nodes):
        storage[node], members[node] = node, [node]
        for source in _aliased(node):
            kept, merged = storage[source], storage[node]
            if kept is not merged:
                for member in members.pop(merged):
                    storage[member] = kept
                    members[kept].append(member)
                writes[kept] += writes.pop(merged, [])
        if node.target is not aten.detach_.default:  # writes no element
            for written in mutated_args(node):
                writes[storage[written]].append(position)
    return storage, writes


def _aliased(node: fx.Node) -> list[fx.Node]:
    """The arguments whose storage the result may share."""
    schema = schema_of(node)
    if schema is None:
        return [a for a in node.args[:1] if isinstance(a, fx.Node)] if node.target is operator.getitem else []
    found = [n for n in node.all_input_nodes if shares_memory(node, n)]
    if not any(r.alias_info is not None for r in schema.returns):
        return found
    positional, keywords = bound_args(node)
    given = dict(zip((a.name for a in schema.arguments), positional, strict=False), **keywords)
    said = (given.get(a.name) for a in schema.arguments if a.alias_info)
    return found + [n for n in said if isinstance(n, fx.Node) and n not in found]
