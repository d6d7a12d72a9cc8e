"""Affine functions of a tensor's indices, what views that merge dims make of them, and which dtypes hold them exactly.

Where a view merges dims, the index of each becomes a `Part` of the merged one, until another view splits that again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# dtype → the largest offset and coefficient with which indices stay exact, for 2**14 positions and more. float32 is
# exact up to 2**24; bfloat16 would merge 256 and 257.
INDEX_DTYPES = {torch.int64: 2**40, torch.int32: 2**16, torch.float64: 2**38, torch.float32: 2**10}

NO_SIZES: Mapping[int, int] = {}


@dataclass(frozen=True)
class Part:
    """`index // divisor`, or `index % divisor` if `remainder`, used like the index of a dim; never negative."""

    index: Affine
    divisor: int
    remainder: bool


@dataclass(frozen=True)
class Affine:
    """`offset + Σ coefficient · i_dim`; `terms` holds `(dim, coefficient)`, sorted, without zeros."""

    terms: tuple[tuple[int | Part, int], ...] = ()
    offset: int = 0

    @classmethod
    def dim(cls, dim: int) -> Affine:
        return cls(((dim, 1),))

    @property
    def dims(self) -> set[int]:
        return set().union(*(dim.index.dims if isinstance(dim, Part) else {dim} for dim, _ in self.terms))

    def __add__(self, other: Affine) -> Affine:
        total = dict(self.terms)
        for dim, c in other.terms:
            total[dim] = total.get(dim, 0) + c
        return Affine(
            tuple(sorted(((d, c) for d, c in total.items() if c), key=str)), self.offset + other.offset
        )

    def __mul__(self, factor: int) -> Affine:
        return Affine(tuple((d, c * factor) for d, c in self.terms if factor), self.offset * factor)

    def __sub__(self, other: Affine) -> Affine:
        return self + other * -1

    def substitute(self, mapping: Mapping[int, Affine], sizes: Mapping[int, int] = NO_SIZES) -> Affine:
        """Every index `d` replaced by `mapping[d]`; `sizes`: what is known of the dims in there."""
        total = Affine((), self.offset)
        for dim, c in self.terms:
            if isinstance(dim, Part):
                value = dim.index.substitute(mapping, sizes).part(dim.divisor, dim.remainder, sizes)
            else:
                value = mapping[dim]
            total = total + value * c
        return total._rejoined()

    def _rejoined(self) -> Affine:
        """`x` for every `B · (x // B) + x % B`."""
        for dim, c in self.terms:
            if isinstance(dim, Part) and dim.remainder:
                quotient = Part(dim.index, dim.divisor, False)
                if (quotient, c * dim.divisor) in self.terms:
                    halves = Affine(((dim, 1), (quotient, dim.divisor)))
                    return (self + (dim.index - halves) * c)._rejoined()
        return self

    def part(self, divisor: int, remainder: bool, sizes: Mapping[int, int]) -> Affine:
        """`self // divisor` or `self % divisor`: as `(B·a + b) // B = a` if `b` is known to be less than `B`."""
        terms = tuple((dim, c // divisor) for dim, c in self.terms if c // divisor)
        whole = Affine(terms, self.offset // divisor)
        rest = self - whole * divisor  # neither the offset nor a coefficient is negative
        if rest._last(sizes) < divisor:
            return rest if remainder else whole
        part = Affine(((Part(rest, divisor, remainder), 1),))
        return part if remainder else whole + part

    def _last(self, sizes: Mapping[int, int]) -> float:
        """An upper bound, for coefficients that aren't negative."""
        total: float = self.offset
        for dim, c in self.terms:
            if isinstance(dim, Part):
                total += c * (dim.divisor - 1 if dim.remainder else dim.index._last(sizes) / dim.divisor)
            else:
                total += c * (sizes.get(dim, math.inf) - 1)
        return total


def is_exact(affine: Affine, dtype: torch.dtype) -> bool:
    """Does `dtype` hold the affine function at every index?"""
    return max(abs(affine.offset), *(abs(c) for _, c in affine.terms), 0) <= INDEX_DTYPES.get(dtype, -1)
