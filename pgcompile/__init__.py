"""pgcompile: train on batches with shared prefixes, each distinct token computed once.

    model.compile(backend="pgcompile")

A `torch.compile` backend that reads a model's graph, proves which values depend only on a token and the tokens
before it, and runs the graph once per distinct token. Where that can't be proven, the original runs, with a reason.
"""

from . import batching
from .backend import pgcompile
from .check import CheckError
from .errors import EngineError
from .optimize import explain, optimize
from .options import Options
from .passes.reasons import FallbackReason
from .report import BatchReport, Explanation, FallbackError, GraphReport
from .stats import Stats, reset_stats, stats

__version__ = "0.1.0"
__all__ = [
    "BatchReport", "CheckError", "EngineError", "Explanation", "FallbackError", "FallbackReason", "GraphReport",
    "Options", "Stats", "batching", "explain", "optimize", "pgcompile", "reset_stats", "stats",
]  # fmt: skip
