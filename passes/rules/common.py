"""The contract of a rule, the table of all rules, and broadcasting, which most rules share.

A rule is a pure function with the operation's own signature, in which tensors are `Operand`s. It returns an
`Outcome`, or `Unsupported` when it can't prove that the operation treats every token by itself. The contract, which
tests check by enumeration: `op(pack(x)) == pack(op(x))`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph import guard_same_size, same_size
from ..layout import (
    KEY,
    POSITION,
    ROW,
    Dim,
    Selection,
    Sorted,
    TokenLayout,
    is_plain_one,
    is_token_factor,
    is_well_formed,
    plain,
)
from ..reasons import Unsupported

PROLOGUE, WEIGHT, STREAM, LATE, DENSE = "prologue", "weight", "stream", "late", "dense"


@dataclass(frozen=True)
class Operand:
    """A tensor argument as a rule sees it.

    Args:
        node: where it comes from.
        kind: PROLOGUE (computed from inputs alone), WEIGHT (from parameters), STREAM (has `layout`), LATE (unpacked);
            DENSE where nothing is packed and only layouts are followed (`padding.py`).
        shape: sizes on the dense batch.
    """

    node: fx.Node
    kind: str
    shape: tuple[Any, ...]
    layout: TokenLayout | None = None

    @property
    def tokens(self) -> TokenLayout:
        assert self.layout is not None
        return self.layout


@dataclass(frozen=True)
class Outcome:
    """What an operation does to its tokens.

    Args:
        layout: of the result; a tuple for an operation with several results.
        columns: prologue operands that enter the stream here, with the dims they are packed to.
        action: how it is lowered; a method of `PackedSide` by name: "emit" is the same operation on packed tokens,
            "reshape" and "expand" get the packed sizes.
        detail: what that lowering needs to know.
    """

    layout: TokenLayout | tuple[TokenLayout, ...]
    columns: dict[fx.Node, tuple[Dim, ...]] = field(default_factory=dict)
    action: str = "emit"
    detail: Any = None


@dataclass(frozen=True)
class Op:
    """The first argument of every rule: what isn't among the operation's own arguments.

    Args:
        node: the ATen call; rules only look at it to name it.
        result: its fake value on the dense batch (a tensor, or a list of them).
        dropout: `Options.dropout`.
        before_mixer: does a token mixer depend on it? If not, it may as well run on unpacked values.
    """

    node: fx.Node
    result: Any
    dropout: str = "fallback"
    before_mixer: bool = True
    selections: dict[Any, Selection] = field(default_factory=dict)

    def select(self, parent: Selection, key: Any, rows: Any, positions: Any, dim: int = 0) -> Selection:
        """The selection that this operation cuts from `parent`; equal cuts (same `key`) give the same object."""
        where = (id(parent), repr(key))  # symbolic sizes don't hash, but print as their expressions
        found = self.selections.get(where)
        if found is None:
            found = Selection(rows, positions, parent, self.node, dim)
            self.selections[where] = found
        return found

    @property
    def name(self) -> str:
        return str(getattr(self.node.target, "overloadpacket", self.node.target)).removeprefix("aten.")

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(self.result.shape)


Rule = Callable[..., "Outcome | Unsupported"]
RULES: dict[Any, Rule] = {}
RULES_BY_NAME: dict[str, Rule] = {}  # of operators that another package defines when it is imported


def register(rule: Rule, *packets: Any) -> None:
    """Use `rule` for every overload of the given ATen packets (or for single overloads)."""
    for packet in packets:
        overloads = [packet] if isinstance(packet, torch._ops.OpOverload) else overloads_of(packet)
        for overload in overloads:
            RULES[overload] = rule


def register_named(rule: Rule, *names: str) -> None:
    """Use `rule` for operators by their qualified names, such as "library::operator"."""
    for name in names:
        RULES_BY_NAME[name] = rule


def overloads_of(packet: Any) -> Iterable[Any]:
    """All overloads but those that write into an argument (`out=`): the walk refuses them before any rule."""
    found = (getattr(packet, name) for name in packet.overloads())
    return (overload for overload in found if not overload._schema.is_mutable)


def operands_in(args: Any) -> list[Operand]:
    found: list[Operand] = []
    for arg in args.values() if isinstance(args, dict) else args:
        if isinstance(arg, Operand):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += operands_in(arg)
    return found


def refuse(kind: str, explanation: str, hint: str = "", operand: fx.Node | None = None) -> Unsupported:
    return Unsupported(kind, None, explanation, hint, operand)


def mixing(layout: TokenLayout, dims: Sequence[int], what: str) -> Unsupported:
    """The refusal for an operation that runs over token dims."""
    over = {f for d in dims for f in layout.dims[d] if is_token_factor(f)}
    if over == {ROW}:
        return refuse("row_mixing", f"{what} runs over the rows of the batch")
    words = {ROW: "rows", POSITION: "positions", KEY: "keys"}
    names = " and ".join(sorted(words.get(f, "sorted tokens") for f in over))
    return refuse("token_mixing", f"{what} runs over the {names} of the batch")


def same_selection(operands: Sequence[Operand]) -> Selection | Unsupported:
    selections = {id(o.tokens.selection): o.tokens.selection for o in operands}
    if len(selections) > 1:
        return refuse("token_mixing", "values of different tokens meet (a shift, or two different slices)")
    return next(iter(selections.values()))


def broadcast(operands: Sequence[Operand], rank: int | None = None) -> tuple[TokenLayout, dict] | Unsupported:
    """The layout of operands broadcast against each other, and the prologue operands that must be packed for it.

    Sizes of plain dims are those of the operands. A prologue operand gets its layout by aligning with the stream.
    """
    streams = [o for o in operands if o.kind == STREAM]
    selection = same_selection(streams)
    if isinstance(selection, Unsupported):
        return selection
    rank = max([len(o.shape) for o in operands] + [rank or 0])
    dims: list[Dim] = []
    for d in range(rank):
        dim = _broadcast_dim(streams, operands, d - rank)
        if isinstance(dim, Unsupported):
            return dim
        dims.append(dim)
    if not is_well_formed(dims):
        return refuse(
            "token_mixing", "tokens meet other tokens by broadcasting (an outer product over positions)"
        )
    layout = TokenLayout(tuple(dims), selection)
    columns: dict[fx.Node, tuple[Dim, ...]] = {}
    if layout.has(KEY):
        return layout, columns
    for o in operands:
        if o.kind in (STREAM, DENSE) or not (aligned := aligned_dims(o.shape, layout)):
            continue
        if o.kind == WEIGHT:
            return refuse("row_layout", "a parameter is aligned with positions", operand=o.node)
        if any(isinstance(f, Sorted) for dim in aligned for f in dim):
            return refuse("token_mixing", "a column of the batch meets sorted tokens", operand=o.node)
        if not selection.is_whole:
            return refuse("token_mixing", "a column of the batch meets a slice of its tokens", operand=o.node)
        if is_per_row(aligned) and layout.has(POSITION):
            return refuse(
                "row_layout", "a value per row has no dim that is aligned with positions", operand=o.node
            )
        if any(is_token_factor(dim[0]) != is_token_factor(f) for dim in aligned for f in dim[1:]):
            return refuse(
                "row_layout", "a column is aligned with a dim that merges tokens and others", operand=o.node
            )
        columns[o.node] = aligned
    return layout, columns


def is_per_row(dims: Sequence[Dim]) -> bool:
    """Packed, such a value has size T in the dim of its rows, where a value per token has size 1."""
    factors = [f for dim in dims for f in dim]
    return ROW in factors and POSITION not in factors


def _broadcast_dim(streams: Sequence[Operand], operands: Sequence[Operand], d: int) -> Dim | Unsupported:
    """The factors of dim `d` (negative, from the right)."""
    present = {
        o.tokens.dims[d]
        for o in streams
        if -d <= o.tokens.rank and any(map(is_token_factor, o.tokens.dims[d]))
    }
    if len(present) > 1:
        return refuse("token_mixing", "rows or positions of one value meet other dims of another")
    if present:
        dim = next(iter(present))
        plain_streams = (o for o in streams if -d <= o.tokens.rank and o.tokens.dims[d] != dim)
        if any(not is_plain_one(o.tokens.dims[d]) for o in plain_streams):
            return refuse("row_layout", "a plain dim of one value meets rows or positions of another")
        holder = next(o for o in streams if -d <= o.tokens.rank and o.tokens.dims[d] == dim)
        if same_size(holder.shape[d], 1) and any(
            -d <= len(o.shape) and not _is_one(o.shape[d]) for o in operands
        ):
            return refuse("row_layout", "a row or position dim of size 1 is broadcast to another size")
        return dim
    sizes = [o.shape[d] for o in operands if -d <= len(o.shape)]
    return next((plain(s) for s in sizes if plain(s)), ())


def aligned_dims(sizes: Sequence[Any], layout: TokenLayout) -> tuple[Dim, ...]:
    """Dims of a dense value that is aligned (from the right) with `layout`; () if it touches no token dim.

    A value per row, `[N, 1, d]`, gets a position dim too: packed, it has one entry per token.
    """
    offset = layout.rank - len(sizes)
    dims = [
        layout.dims[offset + i] if layout.is_token_dim(offset + i) and not _is_one(size) else plain(size)
        for i, size in enumerate(sizes)
    ]
    if not any(is_token_factor(f) for dim in dims for f in dim):
        return ()
    position = layout.dim_of(POSITION) - offset
    if (
        not any(POSITION in dim for dim in dims)
        and position >= 0
        and layout.dims[position + offset] == (POSITION,)
    ):
        dims[position] = (POSITION,)
    return tuple(dims)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def normalize_dims(dims: Any, rank: int) -> list[int]:
    """A dim argument (int, list, or None or empty for all) as a sorted list of non-negative ints."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims)}) if rank else []


__all__ = [
    "DENSE",
    "LATE",
    "PROLOGUE",
    "RULES",
    "RULES_BY_NAME",
    "STREAM",
    "WEIGHT",
    "Op",
    "Operand",
    "Outcome",
    "Rule",
    "aligned_dims",
    "broadcast",
    "guard_same_size",
    "is_per_row",
    "mixing",
    "normalize_dims",
    "operands_in",
    "overloads_of",
    "plain",
    "refuse",
    "register",
    "register_named",
    "same_selection",
    "same_size",
]
