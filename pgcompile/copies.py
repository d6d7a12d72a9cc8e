"""Gradients of copies, added up: of the gathers that repeat a token, and of keys that an engine copied.

Each sum is made in one order in every run, in float32 for half precision, and rounded once: hundreds of copies of a
shared token add up, and `x[index]` in bfloat16 gave 256 for 512 copies of gradient 1.

Shapes by suffix: M copies, R rows that they are of, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Elements of the float32 temporaries when a half-precision gradient is summed: 128 MiB, a slice of columns
# large enough that launching kernels costs nothing, and small beside the activations of a training step.
SUM_ELEMENTS = 1 << 25

SegmentSums = Callable[[Tensor], Tensor]


def add_copies(grad: Tensor, segment_sums: SegmentSums, rows: int) -> Tensor:
    """`[M, ...]` → `[R, ...]` in the gradient's dtype, by `segment_sums` of its `sum_dtype`."""
    grad_MC = grad.reshape(grad.shape[0], math.prod(grad.shape[1:]))
    copies, columns = grad_MC.shape
    if grad.is_cpu and grad.dtype == sum_dtype(grad):  # nothing is copied
        out_RC = segment_sums(grad_MC)
    else:
        out_RC = grad.new_empty(rows, columns)
        step = max(1, SUM_ELEMENTS // (copies + rows + 1))
        for start in range(0, columns, step):
            out_RC[:, start : start + step] = segment_sums(grad_MC[:, start : start + step])
    return out_RC.view(rows, *grad.shape[1:])


def sum_dtype(grad: Tensor) -> torch.dtype:
    """What copies are added in: float32 for half precision, else the gradient's own dtype (complex ones too)."""
    return torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype


def segment_sums_of(row_M: Tensor, rows: int, dtype: torch.dtype) -> SegmentSums:
    """Of values `[M, C]`: `out[r] = sum of values[m] where row[m] = r`, in `dtype`, bit-equal in every run.

    Row -1 is left out. On CPU index_add_ adds each row's copies in a fixed order; on CUDA it uses atomics.
    """
    by_row = row_M.is_cpu or row_M.numel() == 0
    return (_segment_sums_by_row if by_row else _segment_sums_in_order)(row_M, rows, dtype)


def _segment_sums_by_row(row_M: Tensor, rows: int, dtype: torch.dtype) -> SegmentSums:
    row_M = torch.where(row_M < 0, rows, row_M)  # a last row, which is cut off

    def sums(values_MC: Tensor) -> Tensor:
        out_RC = values_MC.new_zeros(rows + 1, values_MC.shape[1], dtype=dtype)
        return out_RC.index_add_(0, row_M, values_MC.to(dtype))[:rows]

    return sums


def _segment_sums_in_order(row_M: Tensor, rows: int, dtype: torch.dtype) -> SegmentSums:
    """Sorted by row once, added up by a thread for each column of each row: no atomics, and no host sync.

    (index_put_ would sort for each call, and add a row's copies one after the other for all columns; row -1's, too.)
    """
    row_M, order_M = row_M.sort(stable=True)
    edges = torch.searchsorted(row_M, torch.arange(rows + 1, device=row_M.device))

    def sums(values_MC: Tensor) -> Tensor:
        ordered_MC = values_MC[order_M].to(dtype)
        if dtype.is_complex:
            ordered_MC = torch.view_as_real(ordered_MC.resolve_conj())
        out_RC = torch.segment_reduce(ordered_MC, "sum", offsets=edges, unsafe=True)
        return torch.view_as_complex(out_RC) if dtype.is_complex else out_RC

    return sums
