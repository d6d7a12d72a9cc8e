"""The entries of packed values that a batch looks up: for M tokens, K of them each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from .artifacts import Size

# Packed index [M], -1 where dropped, and column [M, K].
Request = tuple[Tensor, Tensor]


def request_sizes(requests: Sequence[Request]) -> list[Size]:
    """What varies from batch to batch: M, and K where it is more than one, which is special to compilers."""
    sizes = []
    for index, column in requests:
        sizes.append(Size(len(index), is_hint=False))
        if column.shape[1] > 1:
            sizes.append(Size(column.shape[1], is_hint=False))
    return sizes


def request_key(requests: Sequence[Request]) -> Hashable:
    """What doesn't vary, of one artifact."""
    return tuple(min(column.shape[1], 2) for _, column in requests)


def request_shapes(requests: Sequence[Request], sizes: Sequence[Any]) -> list[tuple[Any, Any]]:
    """M and K of each, made of such sizes."""
    given = iter(sizes)
    return [(next(given), next(given) if c.shape[1] > 1 else c.shape[1]) for _, c in requests]
