"""What of a batch a plan has to look at: columns [N, S] computed where the batch is, and brought to the host at once.

Key columns tell token classes apart; masks say which keys count, and flags which tokens can be dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .passes.layout import POSITION, ROW, Dim
from .passes.mask_formula import lowest
from .passes.packed_graphs import PackedGraphs, ResultRef

# What may be wrong with a query's row of a mask that is data.
MASK_PROBLEMS = (
    "",
    "the mask that was given is not causal with padding",
    "the mask that was given differs between heads",
    "the mask that was given adds numbers other than 0, minus infinity and the lowest of its dtype",
)


class DenseCall(Exception):
    """This batch runs dense: `kind` and text as in a fallback reason."""

    def __init__(self, kind: str, explanation: str) -> None:
        super().__init__(explanation)
        self.kind, self.explanation = kind, explanation


@dataclass(frozen=True)
class Columns:
    """Columns of a batch, [N, S] each; in `on_host` as numpy arrays.

    Args:
        keys: integers or booleans, equal where the original column is (fingerprints of wide columns almost surely).
        valid: for each of `key_groups`, which keys are valid.
        changes: for each of `part_columns`, where a token's value isn't that of the token before it.
        droppable: tokens that nothing reads, apart from attention; None if they all may be read.
        problems: for each mask that is data, what is wrong with each query's row, an index into `MASK_PROBLEMS`.
        excessive: for each bias of scores, where a token's numbers are infinite or too large.
    """

    keys: list[Any]
    valid: list[Any]
    changes: list[Any]
    droppable: Any | None
    problems: list[Any]
    excessive: list[Any]

    def on_host(self) -> Columns:
        """Views on the CPU, one copy from a device."""
        flags = [] if self.droppable is None else [self.droppable]
        host = iter(
            _to_host([*self.keys, *self.problems, *self.valid, *self.changes, *self.excessive, *flags])
        )
        keys, problems = list(islice(host, len(self.keys))), list(islice(host, len(self.problems)))
        booleans = (column.astype(bool) for column in host)
        valid, changes = list(islice(booleans, len(self.valid))), list(islice(booleans, len(self.changes)))
        excessive = list(islice(booleans, len(self.excessive)))
        return Columns(keys, valid, changes, next(booleans, None), problems, excessive)


@dataclass(frozen=True)
class WideColumn:
    """A column [N, S, d], of which the plan sees a fingerprint."""

    bits: Tensor

    def is_equal_within(self, class_of: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """bool: whether each token has the values of its class's representative, not only their fingerprint."""
        index = class_of.clamp(min=0)
        return ((self.bits == self.bits[row[index], position[index]]).all(-1) | (class_of < 0)).all()


def read_columns(
    graphs: PackedGraphs, results: Sequence[Tensor], n: int, s: int
) -> tuple[Columns, list[WideColumn], list[Tensor]]:
    """Columns, wide ones, and for each mask that is data which keys it allows, bool [N, S]."""
    read = [
        _read_data_mask(results[i], additive, negated, n, s) for i, additive, negated in graphs.data_masks
    ]
    data_valid = [valid for valid, _ in read]
    keys, wide = _key_columns(graphs, results, n, s)
    groups = key_groups(graphs)
    valid = [
        torch.stack([data_valid[-1 - i] if i < 0 else results[i].bool().expand(n, s) for i in group]).all(0)
        for group in groups
    ]
    droppable = _unread(graphs, results, n, s, keys[0].device) if graphs.can_drop_padding and groups else None
    changes = [_changes(results[i].expand(n, s)) for i in part_columns(graphs)]
    problems = [problem for _, problem in read]
    excessive = [_excessive(results[i].detach(), dims, limit, n, s) for i, dims, limit in graphs.biases]
    columns = Columns([*data_valid, *keys], valid, changes, droppable, problems, excessive)
    return columns, wide, data_valid


def key_groups(graphs: PackedGraphs) -> list[tuple[int, ...]]:
    """The distinct groups of key masks that attentions have."""
    return list(dict.fromkeys(c.key_valid for c in graphs.mask_columns if c.key_valid))


def part_columns(graphs: PackedGraphs) -> list[int]:
    """The prologue results that split rows into parts."""
    return list(dict.fromkeys(i for c in graphs.mask_columns for i in c.same_value))


def _changes(column: Tensor) -> Tensor:
    """bool [N, S], of integers: masks that compare floats aren't understood."""
    return column != torch.cat([column[:, :1], column[:, :-1]], 1)


def batch_sizes(graphs: PackedGraphs, results: Sequence[Tensor]) -> tuple[int, int]:
    """N and S."""
    index, dims = graphs.keys[0]
    value = results[index]
    factors = {f: i for i, dim in enumerate(dims) for f in dim if len(dim) == 1}
    return value.shape[factors[ROW]], value.shape[factors[POSITION]]


def rows_first(value: Tensor, dims: tuple[Dim, ...], n: int, s: int) -> Tensor:
    """A dense value with the layout `dims` as `[N, S, ...]`, a view where possible; size 1 is expanded."""
    for i, dim in enumerate(dims):
        if len(dim) > 1:
            sizes = [{ROW: n, POSITION: s}.get(f, f) for f in dim]
            value = value.unflatten(i, sizes)
            dims = (*dims[:i], *((f,) for f in dim), *dims[i + 1 :])
            return rows_first(value, dims, n, s)
    if dims[:2] == ((ROW,), (POSITION,)) and value.shape[:2] == (n, s):
        return value
    for factor, size, target in ((ROW, n, 0), (POSITION, s, 1)):
        where = next((i for i, dim in enumerate(dims) if factor in dim), None)
        if where is None:
            value, dims = value.unsqueeze(0), ((factor,), *dims)
            where = 0
        value = value.movedim(where, target)
        rest = [d for i, d in enumerate(dims) if i != where]
        dims = (*rest[:target], (factor,), *rest[target:])
        value = value.expand(*value.shape[:target], size, *value.shape[target + 1 :])
    return value


def _key_columns(
    graphs: PackedGraphs, results: Sequence[Tensor], n: int, s: int
) -> tuple[list[Tensor], list[WideColumn]]:
    """Key columns [N, S] as integers or booleans, and the wide ones whose fingerprints are among them."""
    columns: list[Tensor] = []
    wide: list[WideColumn] = []
    device = results[graphs.keys[0][0]].device
    for index, dims in graphs.keys:
        value = rows_first(results[index].detach(), dims, n, s)
        if results[index].requires_grad:
            columns.append(torch.arange(n, device=device)[:, None].expand(n, s))
        elif value[0, 0].numel() == 1 and not value.is_complex():
            columns.append(_bits(value.reshape(n, s)))
        else:
            wide.append(WideColumn(_bits(value.reshape(n, s, -1))))
            columns.append(fingerprint(wide[-1].bits))
    if graphs.position_is_key:
        columns.append(torch.arange(s, device=device).expand(n, s))
    return columns, wide


_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(value: Tensor) -> Tensor:
    """Floats as the integers that have their bits, so that -0.0 and 0.0 differ and NaN equals itself."""
    if value.is_complex():
        value = torch.view_as_real(value).flatten(-2)
    return (
        value.contiguous().view(_INTEGER_OF_SIZE[value.element_size()])
        if value.is_floating_point()
        else value
    )


def fingerprint(bits: Tensor) -> Tensor:
    """int64 [N, S] that differs (almost surely) where `bits` [N, S, d] differ; and agrees elsewhere."""
    bits = bits.to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[-1],), generator=generator, device="cpu")
    odd = factors.to(bits.device) * 2 + 1
    mixed = bits * odd
    return (mixed ^ (mixed >> 32)).sum(-1)  # mixed, else two signs that differ would add up to 2**64


def _to_host(columns: list[Tensor]) -> list[np.ndarray]:
    """Columns as numpy arrays: views on the CPU, one copy from a device."""
    if columns[0].device.type == "cpu":
        return [c.numpy() for c in columns]
    return list(torch.stack([c.to(torch.int64) for c in columns]).cpu().numpy())


# -- padding ---------------------------------------------------------------------------------------------------------


def _unread(graphs: PackedGraphs, results: Sequence[Tensor], n: int, s: int, device: torch.device) -> Tensor:
    """bool [N, S]: tokens that nothing but attention reads, because factors switch them off wherever something does."""
    unread = torch.ones(n, s, dtype=torch.bool, device=device)
    for group in graphs.guards:
        unread = unread & torch.stack([_is_off(graphs, results, i, f, n, s) for i, f in group]).any(0)
    return unread


def _is_off(
    graphs: PackedGraphs, results: Sequence[Tensor], index: int, factor: Any, n: int, s: int
) -> Tensor:
    """bool [N, S]: where the factor switches tokens off; tokens that its selection doesn't have are off."""
    device = results[index].device
    flat = torch.arange(n, device=device)[:, None] * s + torch.arange(s, device=device)
    selected = select_map(flat, factor.selection, results, graphs)
    if selected.dim() == 1:
        holder = ROW if factor.selection.rows is not None else POSITION
        dims = tuple(tuple(ROW if f == holder else f for f in dim) for dim in factor.dims)
        off = rows_first(results[index], dims, selected.shape[0], 1)[:, 0]
    else:
        off = rows_first(results[index], factor.dims, *selected.shape)
    off = (
        (off == factor.off).flatten(selected.dim()).all(-1)
        if off.dim() > selected.dim()
        else off == factor.off
    )
    # a token may be selected twice: off only if it always is
    out = torch.ones(n * s, dtype=torch.uint8, device=off.device)
    return out.scatter_reduce_(0, selected.flatten(), off.flatten().to(out), "amin").view(n, s).bool()


def select_map(token_map: Tensor, selection: Any, results: Sequence[Tensor], graphs: PackedGraphs) -> Tensor:
    """Apply a selection's cuts to a map `[N, S]`."""
    if selection.parent is None:
        return token_map
    target, args = graphs.cuts[selection]
    parent = select_map(token_map, selection.parent, results, graphs)
    return target(parent, *tree_map(lambda a: results[a.index] if isinstance(a, ResultRef) else a, args))


def _excessive(bias: Tensor, dims: tuple[Dim, ...], limit: float, n: int, s: int) -> Tensor:
    """bool [N, S]: where one of the numbers that are added to a key's scores is larger than the limit, or NaN."""
    return rows_first(~(bias.abs() <= limit), dims, n, s).reshape(n, s, -1).any(-1)


def _read_data_mask(mask: Tensor, additive: bool, negated: bool, n: int, s: int) -> tuple[Tensor, Tensor]:
    """Read a mask `[N, H, S, S]` that is data as causal ∧ padding.

    Returns:
        Which keys it allows, bool [N, S]; and what is wrong with each query's row, int8 [N, S]: only dropped tokens
        may have something wrong.

    Raises:
        DenseCall: `mask_not_understood`, if its shape is no mask of N rows of S positions.
    """
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[-2:] != (s, s) or mask.shape[0] not in (1, n):
        text = f"the mask has the shape {list(mask.shape)} for {n} rows of {s} positions"
        raise DenseCall("mask_not_understood", text)
    if additive:
        allowed = mask == 0
        numbers = ~(allowed | (mask <= lowest(mask.dtype)))
    else:
        allowed = ~mask.bool() if negated else mask.bool()
        numbers = torch.zeros_like(allowed[:, :, :, :1])
    heads = (allowed != allowed[:, :1]).any(-1).any(1)
    valid = allowed[:, 0].diagonal(dim1=-2, dim2=-1)
    causal = torch.ones(s, s, dtype=torch.bool, device=mask.device).tril() & valid[:, None, :]
    problem = (allowed[:, 0] != causal).any(-1).to(torch.int8)
    problem = torch.where(heads, 2, problem)
    problem = torch.where(numbers.any(-1).any(1), 3, problem)
    return valid.expand(n, s), problem.to(torch.int8).expand(n, s)
