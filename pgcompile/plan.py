"""The plan of a batch: which tokens are distinct, and everything the packed graph needs to know about them.

Key columns are whatever entered the token stream: ids, positions, mask bits, tables. Two tokens are one class when
their rows agree on every key column, bitwise, from the first kept token up to them; so sharing needs no metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .passes.layout import POSITION, ROW, Dim, TokenLayout, is_token_factor
from .passes.packed_graphs import PackedGraphs, ResultRef
from .prefix_tree import PrefixTree, build_prefix_tree, encode_columns

# A branch makes every engine handle a segment more; measured on CPU that costs about as much as 16 tokens.
MIN_SHARED = 16


class DenseCall(Exception):
    """This batch runs dense: `kind` and text as in a fallback reason."""

    def __init__(self, kind: str, explanation: str) -> None:
        super().__init__(explanation)
        self.kind, self.explanation = kind, explanation


@dataclass(frozen=True)
class Plan:
    """One batch, N rows of S positions, T distinct tokens in depth-first preorder.

    Args:
        rows, positions: N and S.
        tree: the prefix tree (numpy, on the host).
        class_of: int64 [N, S], packed index of each token, -1 where dropped, on the batch's device.
        row, position: int64 [T], where each packed token's representative stands.
        subtree_end, depth: int64 [T]; token k is an ancestor of q (or q) iff `k <= q < subtree_end[k]`.
        segments: int64 [M, 5] on the host: start, end, subtree end, depth, parent.
        data_valid: for each mask that is data, bool [N, S]: which keys it allows.
        valid_tokens: tokens that weren't dropped.
        kept_padding: of those, leading and trailing ones that every attention masks: something else reads them.
        dense_pairs, packed_pairs: query-key pairs of causal attention over the batch and over the packed tokens.
    """

    rows: int
    positions: int
    tree: PrefixTree
    class_of: Tensor
    row: Tensor
    position: Tensor
    subtree_end: Tensor
    depth: Tensor
    segments: Tensor
    data_valid: list[Tensor]
    valid_tokens: int
    dense_pairs: int
    packed_pairs: int
    kept_padding: int

    @property
    def tokens(self) -> int:
        return self.tree.tokens

    @property
    def dense_tokens(self) -> int:
        return self.rows * self.positions


def build_plan(graphs: PackedGraphs, results: Sequence[Tensor], keep_all: bool) -> Plan:
    """Plan a batch from the prologue's results.

    Args:
        keep_all: share every branch, however short.

    Raises:
        DenseCall: if this batch can't be packed (a mask that isn't causal, an empty batch, a fully masked query).
    """
    n, s = batch_sizes(graphs, results)
    if n == 0 or s == 0:
        raise DenseCall("empty_batch", f"a batch of {n} rows and {s} positions has no token")
    device = results[graphs.keys[0][0]].device
    checked = [
        _check_data_mask(results[i], additive, negated, n, s) for i, additive, negated in graphs.data_masks
    ]
    data_valid = [valid for valid, _ in checked]
    valid = [
        torch.stack([data_valid[-1 - i] if i < 0 else results[i].bool().expand(n, s) for i in group]).all(0)
        for group in graphs.key_valid
        if group
    ]
    droppable = _droppable(graphs, results, valid, n, s)
    columns, wide = _key_columns(graphs, results, data_valid, n, s)
    masked = _masked(graphs, valid)
    flags = [flag for flag in (masked, droppable) if flag is not None]
    host = _to_host([*columns, *(fingerprint(w) for w in wide), *flags])
    dropped = host.pop().astype(bool) if droppable is not None else None
    padding = _kept_range(host.pop().astype(bool), n, s) if masked is not None else None
    first, end = _kept_range(dropped, n, s)
    tree = build_prefix_tree(encode_columns(host, (n, s)), first, end, 0 if keep_all else MIN_SHARED)
    if tree.tokens == 0:
        raise DenseCall("empty_batch", "every token is padding")
    kept_padding = int((end - first).sum() - (padding[1] - padding[0]).sum()) if padding is not None else 0
    plan = _on_device(tree, n, s, first, end, device, data_valid, kept_padding)
    for column in wide:
        _verify_wide(column, plan)
    _refuse_fully_masked(graphs, valid, plan)
    if any(bool((wrong & (plan.class_of >= 0)).any()) for _, wrong in checked):
        raise DenseCall("mask_not_understood", "the mask that was given is not causal with padding")
    return plan


def _on_device(
    tree: PrefixTree,
    n: int,
    s: int,
    first: np.ndarray,
    end: np.ndarray,
    device: torch.device,
    data_valid: list[Tensor],
    kept_padding: int,
) -> Plan:
    def move(a: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a)).to(device)

    return Plan(
        n, s, tree, move(tree.class_of), move(tree.row), move(tree.position), move(tree.subtree_end),
        move(tree.depth), torch.from_numpy(tree.segments), data_valid,
        valid_tokens=int((end - first).sum()),
        dense_pairs=n * s * (s + 1) // 2,
        packed_pairs=int((tree.depth + 1).sum()),
        kept_padding=kept_padding,
    )  # fmt: skip


# -- columns ---------------------------------------------------------------------------------------------------------


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
    graphs: PackedGraphs, results: Sequence[Tensor], data_valid: list[Tensor], n: int, s: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Narrow columns [N, S] as integers or booleans, and wide ones [N, S, d]."""
    columns: list[Tensor] = list(data_valid)
    wide: list[Tensor] = []
    device = results[graphs.keys[0][0]].device
    for index, dims in graphs.keys:
        value = rows_first(results[index].detach(), dims, n, s)
        if results[index].requires_grad:
            columns.append(torch.arange(n, device=device)[:, None].expand(n, s))
        elif value[0, 0].numel() == 1 and not value.is_complex():
            columns.append(_bits(value.reshape(n, s)))
        else:
            wide.append(value.reshape(n, s, -1))
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


def fingerprint(column: Tensor) -> Tensor:
    """int64 [N, S] that differs (almost surely) where rows of `column` [N, S, d] differ; equal rows agree."""
    bits = _bits(column).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (bits.shape[-1],), generator=generator).to(column.device) * 2 + 1
    return (bits * odd).sum(-1)


def _verify_wide(column: Tensor, plan: Plan) -> None:
    """Fingerprints agree; do the values? Each token is compared with its class's representative."""
    index = plan.class_of.clamp(min=0)
    bits = _bits(column)
    same = (bits == bits[plan.row[index], plan.position[index]]).all(-1) | (plan.class_of < 0)
    if not bool(same.all()):
        raise DenseCall("internal_error", "two different columns have the same fingerprint")


def _to_host(columns: list[Tensor]) -> list[np.ndarray]:
    """Columns as numpy arrays: views on the CPU, one copy from a device."""
    if columns[0].device.type == "cpu":
        return [c.numpy() for c in columns]
    return list(torch.stack([c.to(torch.int64) for c in columns]).cpu().numpy())


# -- padding ---------------------------------------------------------------------------------------------------------


def _droppable(
    graphs: PackedGraphs, results: Sequence[Tensor], valid: list[Tensor], n: int, s: int
) -> Tensor | None:
    """bool [N, S]: tokens that every attention masks and that nothing reads; None if there are none to begin with."""
    droppable = _masked(graphs, valid)
    if droppable is None or not graphs.can_drop_padding:
        return None
    for group in graphs.guards:
        droppable = droppable & torch.stack([_is_off(graphs, results, i, f, n, s) for i, f in group]).any(0)
    return droppable


def _masked(graphs: PackedGraphs, valid: list[Tensor]) -> Tensor | None:
    """bool [N, S]: tokens that every attention masks; None if one masks none."""
    if not graphs.key_valid or len(valid) < len(graphs.key_valid):
        return None
    return ~torch.stack(valid).any(0)


def _is_off(
    graphs: PackedGraphs, results: Sequence[Tensor], index: int, factor: Any, n: int, s: int
) -> Tensor:
    """bool [N, S]: where the factor switches tokens off; tokens that its selection doesn't have are off."""
    rows, positions = torch.arange(n), torch.arange(s)
    flat = (rows[:, None] * s + positions).to(results[index].device)
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
    out = torch.ones(n * s, dtype=torch.bool, device=off.device)
    out[selected.reshape(-1)[~off.reshape(-1)]] = (
        False  # a token may be selected twice: off only if it always is
    )
    return out.view(n, s)


def select_map(token_map: Tensor, selection: Any, results: Sequence[Tensor], graphs: PackedGraphs) -> Tensor:
    """Apply a selection's cuts to a map `[N, S]`."""
    if selection.parent is None:
        return token_map
    target, args = graphs.cuts[selection]
    parent = select_map(token_map, selection.parent, results, graphs)
    return target(parent, *tree_map(lambda a: results[a.index] if isinstance(a, ResultRef) else a, args))


def kept_elements(
    value: Tensor, layout: TokenLayout, plan: Plan, results: Sequence[Tensor], graphs: PackedGraphs
) -> Tensor:
    """bool, of the shape of an output with the given layout: which of its elements belong to tokens that were kept."""
    kept = select_map(plan.class_of >= 0, layout.selection, results, graphs)
    factors = [f for dim in layout.dims for f in (dim or (1,))]
    present = [f for f in (ROW, POSITION) if f in factors]
    kept = kept.permute([present.index(f) for f in factors if is_token_factor(f)])
    sizes = iter(kept.shape)
    spread = [next(sizes) if is_token_factor(f) else 1 for f in factors]
    whole = [size if is_token_factor(f) else f for size, f in zip(spread, factors, strict=True)]
    return kept.reshape(spread).expand(whole).reshape(value.shape)


def _kept_range(dropped: np.ndarray | None, n: int, s: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last kept position of each row: only leading and trailing runs are dropped."""
    if dropped is None or not dropped.any():
        return np.zeros(n, np.int64), np.full(n, s, np.int64)
    kept = ~dropped
    any_kept = kept.any(1)
    first = np.where(any_kept, kept.argmax(1), 0)
    end = np.where(any_kept, s - kept[:, ::-1].argmax(1), 0)
    return first.astype(np.int64), end.astype(np.int64)


def _refuse_fully_masked(graphs: PackedGraphs, valid: list[Tensor], plan: Plan) -> None:
    """A kept token that is masked from everything: softmax would attend to all keys, later ones included."""
    kept = plan.class_of >= 0
    for keys, match in zip(
        valid, (m for m, g in zip(graphs.matches, graphs.key_valid, strict=True) if g), strict=True
    ):
        if match.masked_is_zero and match.formula.minus_inf:
            continue  # zero in the original and here
        hole = kept & ~keys
        if not bool(hole.any()):
            continue
        if match.formula.same_value:
            raise DenseCall(
                "fully_masked_query",
                "a masked token that isn't dropped may have nothing to attend to in its part of the row",
            )
        seen = (keys & kept).cumsum(1)
        window = match.formula.window
        if window is not None:
            earlier = torch.nn.functional.pad(seen, (window, 0))[:, : seen.shape[1]]
            seen = seen - earlier
        if bool((hole & (seen == 0)).any()):
            raise DenseCall("fully_masked_query", "a token that isn't dropped may attend to nothing")


def _check_data_mask(mask: Tensor, additive: bool, negated: bool, n: int, s: int) -> tuple[Tensor, Tensor]:
    """Read a mask `[N, H, S, S]` that is data as causal ∧ padding.

    Returns:
        Which keys it allows, bool [N, S]; and which queries see something else than causal ∧ padding, bool [N, S]:
        none of those may be kept.

    Raises:
        DenseCall: `mask_not_understood`, if heads differ or it adds other numbers than 0 and minus infinity.
    """
    if additive:
        if not bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min)).all()):
            raise DenseCall("mask_not_understood", "the mask adds numbers other than 0 and minus infinity")
        allowed = mask == 0
    else:
        allowed = ~mask.bool() if negated else mask.bool()
    allowed = allowed[(None,) * (4 - allowed.dim())]
    if allowed.shape[-2:] != (s, s) or allowed.shape[0] not in (1, n):
        raise DenseCall(
            "mask_not_understood", f"the mask has the shape {list(mask.shape)} for {n} rows of {s} positions"
        )
    if not bool((allowed == allowed[:, :1]).all()):
        raise DenseCall("mask_not_understood", "the mask that was given differs between heads")
    allowed = allowed[:, 0]
    valid = allowed.diagonal(dim1=-2, dim2=-1)
    expected = torch.ones(s, s, dtype=torch.bool, device=mask.device).tril() & valid[:, None, :]
    return valid.expand(n, s), (allowed != expected).any(-1).expand(n, s)
