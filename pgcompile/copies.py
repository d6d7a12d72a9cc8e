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

Sums = Callable[[Tensor], Tensor]


def sums_of_copies(row_M: Tensor, rows: int, dtype: torch.dtype) -> Sums:
    """What adds up gradients `[M, ...]` in `dtype`: `out[r] = sum of grad[m] where row[m] = r`, `[R, ...]`, in `dtype`.

    Row -1 is left out. Bit-equal in every run.
    """
    segment_sums = _segment_sums(row_M, rows, sum_dtype(dtype))

    def add_up(grad: Tensor) -> Tensor:
        grad_MC = grad.reshape(grad.shape[0], math.prod(grad.shape[1:]))
        copies, columns = grad_MC.shape
        if grad.is_cpu and dtype == sum_dtype(dtype):  # nothing is copied
            out_RC = segment_sums(grad_MC)
        else:
            out_RC = grad.new_empty(rows, columns)
            step = max(1, SUM_ELEMENTS // (copies + rows + 1))
            for start in range(0, columns, step):
                out_RC[:, start : start + step] = segment_sums(grad_MC[:, start : start + step])
        return out_RC.view(rows, *grad.shape[1:])

    return add_up


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients of `dtype` are added in: float32 for half precision, else the same (complex ones too)."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _segment_sums(row_M: Tensor, rows: int, dtype: torch.dtype) -> Sums:
    """Of values `[M, C]`, in `dtype`. On CPU index_add_ adds each row's copies in a fixed order; on CUDA by atomics."""
    by_row = row_M.is_cpu or row_M.numel() == 0
    return (_segment_sums_by_row if by_row else _segment_sums_in_order)(row_M, rows, dtype)


def _segment_sums_by_row(row_M: Tensor, rows: int, dtype: torch.dtype) -> Sums:
    row_M = torch.where(row_M < 0, rows, row_M)  # a last row, which is cut off

    def sums(values_MC: Tensor) -> Tensor:
        out_RC = values_MC.new_zeros(rows + 1, values_MC.shape[1], dtype=dtype)
        return out_RC.index_add_(0, row_M, values_MC.to(dtype))[:rows]

    return sums


def _segment_sums_in_order(row_M: Tensor, rows: int, dtype: torch.dtype) -> Sums:
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
