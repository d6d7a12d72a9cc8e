"""What every engine gets besides q, k and v, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class TreeMask(NamedTuple):
    """Which keys a packed token sees, in depth-first preorder: itself and its ancestors, less what columns hide.

    Query t sees key s iff `s <= t < subtree_end[s]`, every `key_valid` column holds at s, every `same_value` column
    agrees at s and t, and `depth[t] - depth[s] < window` where there is a window. T packed tokens, M segments.

    Args:
        subtree_end_T: int64, one past the last descendant of each token.
        depth_T: int64, the number of tokens before one in its row.
        segments_M5: int64 in host memory: start, end, subtree end, depth of the first token, parent (-1 for roots).
        key_valid: bool [T] each; none if they hide nothing in this batch.
        same_value: [T] each; likewise.
        window: or None.
    """

    subtree_end_T: Tensor
    depth_T: Tensor
    segments_M5: Tensor
    key_valid: Sequence[Tensor]
    same_value: Sequence[Tensor]
    window: int | None


class Scores(NamedTuple):
    """What becomes of the product of a query and a key before the mask and the softmax.

    Args:
        scale: the product is multiplied by it.
        softcap: then `softcap * tanh(score / softcap)`, as in arXiv 2408.00118, or None.
    """

    scale: float
    softcap: float | None = None


class Engine(Protocol):
    """A module with these five functions; formulas and shapes are documented in reference.py."""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why tensors of `dtype` on `device` are nothing for this engine, as half a sentence; None if they are."""

    def why_not_heads(self, size: int, scores: Scores) -> str | None:
        """The same for a model whose heads have `size` numbers at most."""

    def why_not_call(self, mask: TreeMask, q_1HTD: Tensor, v_1KTE: Tensor) -> str | None:
        """The same for a batch; looks at no value that the host would wait for, and at none of the heads."""

    def attention(
        self, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTE: Tensor, mask: TreeMask, scores: Scores
    ) -> tuple[Tensor, Tensor]: ...

    def attention_backward(
        self,
        grad_out_1HTE: Tensor,
        q_1HTD: Tensor,
        k_1KTD: Tensor,
        v_1KTE: Tensor,
        out_1HTE: Tensor,
        lse_1HT: Tensor,
        mask: TreeMask,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
