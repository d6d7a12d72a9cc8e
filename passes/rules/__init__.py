"""The rule table: importing this package fills `RULES`. One file per family, each with its table at the bottom."""

from typing import Any

import torch

from . import indexing, losses, matmul, pointwise, reductions, routing, views, writes
from .common import LATE, PROLOGUE, RULES, RULES_BY_NAME, STREAM, WEIGHT, Op, Operand, Outcome, Rule
from .pointwise import pointwise_rule
from .routing import NUMBER_RULES


def rule_of(target: Any) -> Rule | None:
    """The rule for an operator; any that PyTorch tags as pointwise has one."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    rule = RULES.get(target) or RULES_BY_NAME.get(target._schema.name)
    return pointwise_rule if rule is None and torch.Tag.pointwise in target.tags else rule


__all__ = [
    "LATE", "NUMBER_RULES", "PROLOGUE", "RULES", "STREAM", "WEIGHT", "Op", "Operand", "Outcome", "Rule", "indexing",
    "losses", "matmul", "pointwise", "pointwise_rule", "reductions", "routing", "rule_of", "views", "writes",
]  # fmt: skip
