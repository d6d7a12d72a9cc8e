"""Failures while a packed graph runs: whose they are, and what is left to do in backward, where no original can run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils import checkpoint

F = TypeVar("F", bound=Callable[..., Any])


class EngineError(RuntimeError):
    """An operator of the packed graph failed in backward; its exception is the `__cause__`.

    In forward the original graph would have run instead, but backward begins where forward left off. Gradients of this
    step are incomplete: drop them (`optimizer.zero_grad()`). The next call of each compiled graph runs as written.
    """


_failure_numbers = itertools.count(1)
_failures = 0


def backward_failures() -> int:
    """How many backward passes have raised an EngineError in this process."""
    return _failures


def belongs_to_caller(error: BaseException) -> bool:
    """Out of memory and device errors, which running the original would only hide, and torch's own signals.

    (Activation checkpointing around a compiled call stops recomputing it, once it has what it needs, by an exception.)
    """
    accelerator_error = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
    stop = getattr(checkpoint, "_StopRecomputationError", torch.OutOfMemoryError)
    return isinstance(error, (torch.OutOfMemoryError, accelerator_error, stop))


def raises_engine_error(backward: F) -> F:
    """Decorates an operator's backward: what it raises becomes an EngineError, and is counted."""

    @functools.wraps(backward)
    def run(*args: Any) -> Any:
        global _failures
        try:
            return backward(*args)
        except Exception as error:  # raised again, under one name
            if belongs_to_caller(error):
                raise
            _failures = next(_failure_numbers)  # atomic, unlike +=
            raise EngineError(f"pgcompile: {type(error).__name__} in backward: {error}") from error

    return run  # type: ignore[return-value]
