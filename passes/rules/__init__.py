"""The rule table: importing this package fills `RULES`. One file per family, each with its table at the bottom."""

from . import indexing, losses, matmul, pointwise, reductions, views
from .common import LATE, PROLOGUE, RULES, STREAM, WEIGHT, Op, Operand, Outcome
from .pointwise import pointwise_rule

__all__ = [
    "LATE", "PROLOGUE", "RULES", "STREAM", "WEIGHT", "Op", "Operand", "Outcome", "indexing", "losses", "matmul",
    "pointwise", "pointwise_rule", "reductions", "views",
]  # fmt: skip
