"""Token layouts: which dims of a value are rows and positions, and what becomes of them in the packed graph.

A dim is a product of *factors*, outermost first. A factor is `ROW`, `POSITION`, `KEY` (the positions of the keys in
attention scores) or a plain size. `[N, S, H*D]` has the dims `((ROW,), (POSITION,), (H*D,))`; after a view to
`[N*S, H, D]`, `((ROW, POSITION), (H,), (D,))`. Dims are followed by index through views, as DTensor's `view_groups`
does; no meaning is read from a size, since N may equal the number of heads and S the hidden size.

In the packed graph ROW has size 1 and POSITION has size T, so that the rank stays and no dim index moves.
Where a value has only one of the two (a table by position, one token per row), that one has size T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from .graph import same_size

ROW, POSITION, KEY = "N", "S", "K"
Factor = Any  # ROW | POSITION | KEY | Sorted | int | SymInt
Dim = tuple[Factor, ...]


@dataclass(frozen=True)
class Sorted:
    """All entries of a dim with these `factors`, in the order that the sort `by` gave them."""

    factors: Dim
    by: fx.Node

    def __str__(self) -> str:
        return f"sorted {'·'.join(map(str, self.factors))}"


@dataclass(frozen=True)
class Numbers:
    """Integers that number or count the entries of the sort `by`: they mean something only next to its results.

    Args:
        what: "index" (each is an index into a dim `into`), "counts" (entries of each key) or "offsets" (their
            cumulative sum).
        into: for an index, the dim.
    """

    what: str
    by: fx.Node
    into: Dim = ()


def is_token_factor(factor: Factor) -> bool:
    return isinstance(factor, (str, Sorted))


@dataclass(frozen=True, eq=False)
class Selection:
    """Which tokens of the batch a value has: all of them, or what slices and selects left.

    Args:
        rows, positions: sizes in the caller's batch; None where the dim was selected away.
        parent, node: the selection it was cut from and the ATen node that cut it; None for the whole batch.
        dim: the token dim (0 or 1 of the parent's) that `node` works on.
    """

    rows: Any
    positions: Any
    parent: Selection | None = None
    node: fx.Node | None = None
    dim: int = 0

    @property
    def is_whole(self) -> bool:
        return self.parent is None

    def size(self, factor: Factor) -> Any:
        if isinstance(factor, Sorted):
            return math.prod(self.size(f) for f in factor.factors)
        if factor == ROW:
            return self.rows
        return self.positions if factor in (POSITION, KEY) else factor


@dataclass(frozen=True)
class TokenLayout:
    """Dims of a value as factors, and the tokens that it has. `holds`: integers that aren't plain values."""

    dims: tuple[Dim, ...]
    selection: Selection = field(repr=False)
    holds: Numbers | None = None

    @property
    def rank(self) -> int:
        return len(self.dims)

    def has(self, factor: Factor) -> bool:
        return any(factor in dim for dim in self.dims)

    def dim_of(self, factor: Factor) -> int:
        """The dim that holds `factor`, or -1."""
        return next((i for i, dim in enumerate(self.dims) if factor in dim), -1)

    def is_token_dim(self, dim: int) -> bool:
        return any(is_token_factor(f) for f in self.dims[dim])

    def with_dims(self, dims: Sequence[Dim], holds: Numbers | None = None) -> TokenLayout:
        return TokenLayout(tuple(dims), self.selection, holds)

    @property
    def is_sorted(self) -> bool:
        """Has it entries out of their order, or numbers of entries? Then it can't be unpacked."""
        return self.holds is not None or any(isinstance(f, Sorted) for dim in self.dims for f in dim)

    @property
    def entries_of_token(self) -> int:
        """How many entries each token has; symbolic sizes are left out."""
        factors = [f for dim in self.dims for factor in dim for f in getattr(factor, "factors", (factor,))]
        return math.prod(f for f in factors if isinstance(f, int))

    @property
    def packed_factor(self) -> str:
        """The factor that has size T when packed."""
        return POSITION if self.has(POSITION) else ROW

    def packed_shape(self) -> list[int]:
        """Sizes for view, reshape and expand in the packed graph; -1 where T is."""
        shape = []
        for dim in self.dims:
            if self.packed_factor in dim or any(isinstance(f, Sorted) for f in dim):
                shape.append(-1)
                continue
            shape.append(plain_size(dim))
        return shape

    def __str__(self) -> str:
        return "[" + ", ".join("·".join(str(f) for f in dim) or "1" for dim in self.dims) + "]"


def plain_size(dim: Dim) -> Any:
    """What a dim's factors that hold no tokens multiply to."""
    return math.prod(f for f in dim if not is_token_factor(f))


def plain(size: Any) -> Dim:
    """The dim of a plain size: no factor for 1, which broadcasts."""
    return () if isinstance(size, int) and size == 1 else (size,)


def is_plain_one(dim: Dim) -> bool:
    return len(dim) == 0


def is_well_formed(dims: Sequence[Dim]) -> bool:
    """Does each token factor occur at most once?"""
    factors = [f for dim in dims for f in dim if is_token_factor(f)]
    factors = [
        g for f in factors for g in (f.factors if isinstance(f, Sorted) else (f,)) if is_token_factor(g)
    ]
    return len(factors) == len(set(factors))


def view_dims(layout: TokenLayout, out_shape: Sequence[Any]) -> tuple[Dim, ...] | None:
    """Dims after a view or reshape to `out_shape`, or None where a token dim would be torn.

    Row-major order is kept by views, so the factors keep their order and are dealt out from the left until each
    output size is reached; only plain sizes may be split. Any deal that reaches the sizes is a correct reading.
    """
    queue = [f for dim in layout.dims for f in dim]
    size_of = layout.selection.size
    out: list[Dim] = []
    for size in out_shape:
        is_one = isinstance(size, int) and size == 1
        if is_one:
            head = queue[0] if queue else None
            takes = head is not None and is_token_factor(head) and same_size(size_of(head), 1)
            out.append((queue.pop(0),) if takes else ())
            continue
        while out and queue and is_token_factor(queue[0]) and same_size(size_of(queue[0]), 1):
            if queue[0] == ROW and len(out_shape) >= layout.rank:
                break  # a single row leads the heads, as it would if there were more: [S, N, H*D] → [S, N*H, D]
            out[-1] = (*out[-1], queue.pop(0))
        dim, reached = _deal(queue, size, size_of)
        if not reached:
            return None
        out.append(dim)
    while queue and same_size(size_of(queue[0]), 1) and out:
        out[-1] = (*out[-1], queue.pop(0))
    return None if queue else tuple(out)


def _deal(queue: list[Factor], size: Any, size_of: Any) -> tuple[Dim, bool]:
    """Take factors from the front of `queue` until their product is `size`; may split the last, plain one."""
    dim: list[Factor] = []
    product: Any = 1
    while queue:
        factor = queue[0]
        if same_size(product * size_of(factor), size):
            dim.append(queue.pop(0))
            return tuple(dim), True
        if is_token_factor(factor):
            dim.append(queue.pop(0))
            product = product * size_of(factor)
            continue
        part = _plain_quotient(size, product)
        if part is not None and isinstance(factor, int) and factor % part == 0 and part < factor:
            queue[0] = factor // part
            if part > 1:
                dim.append(part)
            return tuple(dim), True
        dim.append(queue.pop(0))
        product = product * factor
    return tuple(dim), False


def _plain_quotient(size: Any, product: Any) -> int | None:
    """`size / product` where that is a plain integer, also for symbolic sizes such as `4*s0 / s0`."""
    if isinstance(size, int) and isinstance(product, int):
        return size // product if product and size % product == 0 else None
    ratio = _expr(size) / _expr(product)
    return int(ratio) if ratio.is_Integer else None


def _expr(size: Any) -> Any:
    return size.node.expr if hasattr(size, "node") else sympy.Integer(size)
