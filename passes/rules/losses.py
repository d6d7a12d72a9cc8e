"""Losses against labels: log-probabilities once per distinct token, the label's entry once per (token, label)."""

from __future__ import annotations

from typing import Any

import torch

from ..reasons import Unsupported
from .common import PROLOGUE, STREAM, Op, Operand, Outcome, refuse, register
from .indexing import has_one_wide_dim
from .pointwise import pointwise_rule

aten = torch.ops.aten


def cross_entropy_rule(
    op: Op, logits: Operand, target: Operand, weight: Operand | None = None, reduction: int = 1,
    ignore_index: int = -100, label_smoothing: float = 0.0,
) -> Outcome | Unsupported:  # fmt: skip
    """cross_entropy_loss with class indices: `LateSide` spells it as log_softmax, one gather, a reduction."""
    return _label_loss(op, logits, target)


def nll_loss_rule(op: Op, log_probs: Operand, target: Operand, *_: Any, **__: Any) -> Outcome | Unsupported:
    return _label_loss(op, log_probs, target)


def _label_loss(op: Op, x: Operand, target: Operand) -> Outcome | Unsupported:
    if op.before_mixer:
        return refuse("token_mixing", f"`{op.name}` feeds back into attention")
    if x.kind != STREAM or target.kind != PROLOGUE or x.tokens.rank != 2 or not has_one_wide_dim(x):
        return refuse("token_mixing", f"`{op.name}` over values that aren't [tokens, classes]")
    if target.node.meta["val"].dtype.is_floating_point:
        return refuse("token_mixing", f"`{op.name}` against class probabilities")
    return Outcome(x.tokens, action=op.name, detail=target.node)


def elementwise_loss_rule(op: Op, *args: Any, **kwargs: Any) -> Outcome | Unsupported:
    """Losses between two values of one shape, without a reduction (`canonicalize.py` has taken it off)."""
    if len(op.shape) == 0:
        return refuse("token_mixing", f"`{op.name}` is reduced over everything")
    return pointwise_rule(op, *args, **kwargs)


# kl_div and its kin: `reduction` is 0 (none), 1 (mean) or 2 (sum).
ELEMENTWISE_LOSSES = (
    "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "soft_margin_loss", "poisson_nll_loss",
)  # fmt: skip

for name in ELEMENTWISE_LOSSES:
    register(elementwise_loss_rule, getattr(aten, name).default)
register(cross_entropy_rule, aten.cross_entropy_loss.default)
register(nll_loss_rule, aten.nll_loss_nd.default, aten.nll_loss.default)
