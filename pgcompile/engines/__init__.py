"""Attention engines: implementations of one contract, one module each, listed in one table.

An engine is a module with the functions of `contract.Engine`. It computes the formula that
`reference.visible_mask` spells out, and is tested against `reference`. Whichever engine runs:

- out, dq, dk and dv have the dtype of q (k, v) and are laid out token-major: `[1, T, heads, size]` in memory,
  seen as `[1, heads, T, size]`. Models transpose back right after attention, which then costs nothing.
- lse is contiguous `[1, H, T]`, natural logarithm, float32 (float64 for float64 input).
- A query that sees no key has out = 0, lse = -inf and gives zero gradients; nothing is ever NaN.
- `segments_M5` is in host memory, so that an engine can read it without waiting for the device.
"""

from . import cpu, flex, reference, triton, varlen
from .contract import Engine, Scores, TreeMask

ENGINES: dict[str, Engine] = {
    "reference": reference,
    "cpu": cpu,
    "varlen": varlen,
    "triton": triton,
    "flex": flex,
}

__all__ = ["ENGINES", "Engine", "Scores", "TreeMask"]
