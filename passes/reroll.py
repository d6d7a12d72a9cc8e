"""Loops over rows or over chunks, which arrive unrolled, become one operation again.

    stack([logsumexp(x[0], [-1]), …, logsumexp(x[N-1], [-1])])        →  logsumexp(x, [-1])
    a, b, … = split(x, 128)
    cat([f(a), f(b), …])                                              →  f(x)

Such loops keep a batch's peak memory low (TRL computes log-probabilities row by row, and entropies 128 tokens at a
time). Unrolled, every row would be computed on its own, from all logits; packed, there is less memory to save.

It is `torch.vmap` by pattern: the iterations ("lanes") must be the same operations on corresponding arguments, none of
which touches the dim that is looped over; `ALONG` says which argument of an operation names a dim. Whatever isn't
understood stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .aliasing import base_of, mutated_args
from .graph import aten, bound_args, call, is_mode_switch, is_tensor, same_size, shape, val
from .rules.pointwise import POINTWISE

# Operations along dims: the position of the argument that names them, and whether they may drop these dims.
ALONG: dict[Any, int] = {
    aten.log_softmax.int: 1, aten.softmax.int: 1, aten._log_softmax.default: 1, aten._softmax.default: 1,
    aten.logsumexp.default: 1, aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.amax.default: 1, aten.amin.default: 1,
    aten.argmax.default: 1, aten.argmin.default: 1, aten.max.dim: 1, aten.min.dim: 1, aten.topk.default: 2,
    aten.cumsum.default: 1, aten.squeeze.dim: 1, aten.select.int: 1, aten.slice.Tensor: 1,
}  # fmt: skip
_POINTWISE_PACKETS = {getattr(p, "overloadpacket", p) for p in POINTWISE}


def reroll(gm: fx.GraphModule) -> None:
    """Rewrite `gm` (an ATen graph) in place."""
    for node in list(gm.graph.nodes):
        if node.target not in (aten.stack.default, aten.cat.default):
            continue
        loop = _Loop(gm.graph, node)
        with gm.graph.inserting_before(node):
            new = loop.rolled()
        if new is not None:
            node.replace_all_uses_with(new)
            _erase_unused(
                gm.graph, {node} | loop.lane_nodes | {s for n in loop.lane_nodes for s in n.all_input_nodes}
            )
    gm.recompile()


def _erase_unused(graph: fx.Graph, candidates: set[fx.Node]) -> None:
    for node in reversed(graph.nodes):
        if node in candidates and not node.users:
            graph.erase_node(node)


class _Loop:
    """The iterations whose results one `stack` or `cat` collects.

    `dim` is where the loop's dim is in a rolled value. Rows lose it in each lane (`x[i]`), so that there it is a new
    one, always at 0; chunks keep it (`x[a:b]`).
    """

    def __init__(self, graph: fx.Graph, root: fx.Node) -> None:
        self.graph, self.root = graph, root
        self.dim: int | None = None
        self.by_rows = False
        self.done: dict[tuple[Any, ...], fx.Node | None] = {}

    def rolled(self) -> fx.Node | None:
        lanes, dim = (*bound_args(self.root)[0], 0)[:2]
        if (
            not all(isinstance(lane, fx.Node) for lane in lanes)
            or len({len(shape(lane)) for lane in lanes}) != 1
        ):
            return None
        before = set(self.graph.nodes)
        whole = self.roll(tuple(lanes))
        is_new = whole is not None and whole not in lanes and self._is_undisturbed(lanes)
        found = self._collected(whole, lanes, dim) if whole is not None and is_new else None
        if found is not None and base_of(found) in before:  # stack and cat copy
            found = self.call(aten.clone.default, self.root, found)
        if found is None:
            for node in reversed([n for n in self.graph.nodes if n not in before]):
                self.graph.erase_node(node)
        return found

    def _collected(self, whole: fx.Node, lanes: Sequence[fx.Node], dim: int) -> fx.Node | None:
        """What stack or cat makes of the lanes, from their rolled value."""
        rank = len(shape(lanes[0]))
        if self.root.target is aten.stack.default:
            dim %= rank + 1
            if self.by_rows:
                return whole if dim == 0 else self.call(aten.movedim.int, self.root, whole, 0, dim)
            return None
        dim %= rank
        if self.by_rows:
            return self.call(aten.flatten.using_ints, self.root, whole, 0, 1) if dim == 0 else None
        return whole if dim == self.dim else None

    def _is_undisturbed(self, lanes: Sequence[fx.Node]) -> bool:
        """No mode switch and no write between the first lane and the root: everything is computed at the root now."""
        inside = set(lanes)
        todo = list(lanes)
        while todo:
            for source in todo.pop().all_input_nodes:
                if source in self.lane_nodes and source not in inside:
                    inside.add(source)
                    todo.append(source)
        order = list(self.graph.nodes)
        first = min(order.index(n) for n in inside)
        between = order[first : order.index(self.root)]
        return not any(is_mode_switch(n) or mutated_args(n) for n in between)

    @property
    def lane_nodes(self) -> set[fx.Node]:
        return {
            n for group, new in self.done.items() if new is not None for n in group if isinstance(n, fx.Node)
        }

    # -- one group of corresponding values ---------------------------------------------------------------------------

    def roll(self, group: tuple[Any, ...]) -> fx.Node | None:
        """The value of all lanes at once; None if it isn't understood."""
        if group not in self.done:
            self.done[group] = self._roll(group)
        return self.done[group]

    def _roll(self, group: tuple[Any, ...]) -> fx.Node | None:
        if not all(isinstance(n, fx.Node) and n.op == "call_function" for n in group):
            return None
        whole = self._whole(group)
        if whole is not None:
            return whole
        first = group[0]
        if any(n.target != first.target or len(n.args) != len(first.args) for n in group):
            return None
        if first.target is operator.getitem:
            if len({n.args[1] for n in group}) != 1:
                return None
            source = self.roll(tuple(n.args[0] for n in group))
            return None if source is None else self.call(operator.getitem, first, source, first.args[1])
        args, kwargs = self._common(group)
        if args is None:
            return None
        if first.target in ALONG:
            return self._along(first, args, kwargs)
        if first.target is aten.unsqueeze.default:
            return self._unsqueeze(first, args)
        if first.target is aten.gather.default:
            return self._gather(group, args, kwargs)
        if first.target is aten.linear.default:
            return self._linear(first, args)
        if is_pointwise(first.target):
            return self._pointwise(group, args, kwargs)
        return None

    def _common(self, group: tuple[fx.Node, ...]) -> tuple[list[Any] | None, dict[str, Any]]:
        """Arguments that all lanes have in common, with a `_Lanes` where each has its own tensor."""
        bound = [bound_args(n) for n in group]
        if any(not _same(keywords, bound[0][1]) for _, keywords in bound):
            return None, {}
        args: list[Any] = []
        for values in zip(*(positional for positional, _ in bound), strict=True):
            if all(_same(v, values[0]) for v in values):
                args.append(values[0])
            elif all(is_tensor(v) and isinstance(v, fx.Node) for v in values):
                whole = self.roll(values)
                if whole is None:
                    return None, {}
                args.append(_Lanes(values, whole))
            else:
                return None, {}
        return (args if any(isinstance(a, _Lanes) for a in args) else None), bound[0][1]

    def _whole(self, group: tuple[fx.Node, ...]) -> fx.Node | None:
        """The tensor whose rows or chunks, one after the other and all of them, the lanes are."""
        found = _rows(group) or _chunks(group)
        if found is None:
            return None
        base, dim, by_rows = found
        at = 0 if by_rows else dim
        if self.dim is None:
            self.dim, self.by_rows = at, by_rows
        if (self.dim, self.by_rows) != (at, by_rows):
            return None
        return base if at == dim else self.call(aten.movedim.int, group[0], base, dim, 0)

    # -- operations --------------------------------------------------------------------------------------------------

    def _place(self, dim: int, rank: int) -> int | None:
        """Where a lane's dim is in the rolled value; None if that is before the loop's dim, or is it."""
        assert self.dim is not None
        dim = dim % rank + self.by_rows
        return dim if dim > self.dim else None

    def _along(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node | None:
        at = ALONG[node.target]
        x = args[0]
        if not isinstance(x, _Lanes) or any(isinstance(a, _Lanes) for a in args[1:]) or len(args) <= at:
            return None
        named = args[at] if isinstance(args[at], (list, tuple)) else [args[at]]
        if not named or not all(isinstance(d, int) for d in named) or x.rank == 0:
            return None
        dims = [self._place(d, x.rank) for d in named]
        if any(d is None for d in dims):
            return None
        placed = dims if isinstance(args[at], (list, tuple)) else dims[0]
        return self.call(node.target, node, x.whole, *args[1:at], placed, *args[at + 1 :], **kwargs)

    def _unsqueeze(self, node: fx.Node, args: list[Any]) -> fx.Node | None:
        dim = self._place(args[1], args[0].rank + 1)
        return None if dim is None else self.call(node.target, node, args[0].whole, dim)

    def _gather(self, group: tuple[fx.Node, ...], args: list[Any], kwargs: dict[str, Any]) -> fx.Node | None:
        x, dim, index, *_ = args
        if (
            not isinstance(x, _Lanes)
            or not isinstance(index, _Lanes)
            or not self._is_aligned(group, (x, index))
        ):
            return None
        placed = self._place(dim, x.rank)
        return (
            None
            if placed is None
            else self.call(aten.gather.default, group[0], x.whole, placed, index.whole, **kwargs)
        )

    def _linear(self, node: fx.Node, args: list[Any]) -> fx.Node | None:
        x, *weights = args
        if not isinstance(x, _Lanes) or any(isinstance(w, _Lanes) for w in weights) or x.rank == 0:
            return None
        return (
            None
            if self._place(-1, x.rank) is None
            else self.call(aten.linear.default, node, x.whole, *weights)
        )

    def _pointwise(
        self, group: tuple[fx.Node, ...], args: list[Any], kwargs: dict[str, Any]
    ) -> fx.Node | None:
        assert self.dim is not None
        lanes = [a for a in args if isinstance(a, _Lanes)]
        rank = len(shape(group[0]))
        shared = [len(shape(a)) for a in args if isinstance(a, fx.Node) and is_tensor(a)]
        if any(r > (rank if self.by_rows else rank - self.dim - 1) for r in shared):
            return None  # it would meet the loop's dim
        if not self.by_rows and not self._is_aligned(group, lanes):
            return None
        new = self.call(
            group[0].target,
            group[0],
            *(self._raised(a, rank) if isinstance(a, _Lanes) else a for a in args),
            **kwargs,
        )
        # a number of each lane is a tensor with dims now, which counts more when types are promoted
        return new if val(new).dtype == val(group[0]).dtype else None

    def _raised(self, lanes: _Lanes, rank: int) -> fx.Node:
        """Rows broadcast from the right, behind their own dim: as many dims as the result."""
        whole = lanes.whole
        for _ in range(rank - lanes.rank if self.by_rows else 0):
            whole = self.call(aten.unsqueeze.default, lanes.nodes[0], whole, 1)
        return whole

    def _is_aligned(self, group: tuple[fx.Node, ...], operands: Sequence[_Lanes]) -> bool:
        """Same rank as the result, and of chunks the same length, in each lane."""
        assert self.dim is not None
        for operand in operands:
            for lane, result in zip(operand.nodes, group, strict=True):
                if len(shape(lane)) != len(shape(result)):
                    return False
                if not self.by_rows and not same_size(shape(lane)[self.dim], shape(result)[self.dim]):
                    return False
        return True

    def call(self, target: Any, like: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before the root, in the name of the first lane's."""
        new = call(self.graph, target, *args, **kwargs)
        new.meta = {**like.meta, "val": new.meta["val"]}
        return new


class _Lanes:
    """An operand that each lane has its own of, and all of them as one."""

    def __init__(self, nodes: tuple[fx.Node, ...], whole: fx.Node) -> None:
        self.nodes, self.whole = nodes, whole

    @property
    def rank(self) -> int:
        return len(shape(self.nodes[0]))


def is_pointwise(target: Any) -> bool:
    """By PyTorch's tag, or by our own list."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in _POINTWISE_PACKETS


def _rows(group: tuple[fx.Node, ...]) -> tuple[fx.Node, int, bool] | None:
    """`x.select(dim, i)` or `x.unbind(dim)[i]` for all i in order: (x, dim, True)."""
    found = []
    for i, node in enumerate(group):
        if node.target is aten.select.int and node.args[2] == i:
            found.append((node.args[0], node.args[1]))
        elif (
            node.target is operator.getitem and node.args[1] == i and _is_call(node.args[0], aten.unbind.int)
        ):
            found.append((*bound_args(node.args[0])[0],))  # type: ignore[arg-type]
        else:
            return None
    base, dim = found[0]
    if any(f != (base, dim) for f in found) or not isinstance(base, fx.Node) or not isinstance(dim, int):
        return None
    dim %= len(shape(base))
    return (base, dim, True) if same_size(shape(base)[dim], len(group)) else None


def _chunks(group: tuple[fx.Node, ...]) -> tuple[fx.Node, int, bool] | None:
    """All items of a split in order, or slices that follow each other from end to end: (x, dim, False)."""
    return _split_items(group) or _slices(group)


def _split_items(group: tuple[fx.Node, ...]) -> tuple[fx.Node, int, bool] | None:
    sources = {n.args[0] for n in group if n.target is operator.getitem}
    if len(sources) != 1 or any(
        n.target is not operator.getitem or n.args[1] != i for i, n in enumerate(group)
    ):
        return None
    (source,) = sources
    splits = (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default)
    if not _is_call(source, *splits) or len(source.meta["val"]) != len(group):  # type: ignore[union-attr]
        return None
    base, _, dim = (*bound_args(source)[0], 0)[:3]  # type: ignore[arg-type]
    return base, dim % len(shape(base)), False


def _slices(group: tuple[fx.Node, ...]) -> tuple[fx.Node, int, bool] | None:
    if any(n.target is not aten.slice.Tensor for n in group):
        return None
    bound = [bound_args(n)[0] for n in group]
    base, dim = bound[0][0], bound[0][1]
    starts = [b[2] or 0 for b in bound]
    size = shape(base)[dim]
    if any(b[0] is not base or b[1] != dim or b[4] != 1 for b in bound) or not isinstance(size, int):
        return None
    ends = [size if b[3] is None else b[3] for b in bound]
    if not all(isinstance(at, int) and at >= 0 for at in (*starts, *ends)):
        return None
    covers = (
        starts[0] == 0 and ends[-1] >= size and all(ends[i] == start for i, start in enumerate(starts[1:]))
    )
    return (base, dim % len(shape(base)), False) if covers and all(s < size for s in starts) else None


def _same(a: Any, b: Any) -> bool:
    """The same node, or constants of one type that are equal, down to the sign of a zero."""
    return a is b or repr(a) == repr(b)


def _is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
