"""Which engine runs a call, and why: the answer goes into the report."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from . import ENGINES, Engine, Scores, TreeMask

# What "auto" tries, in this order; reference can always run.
AUTO = ("cpu", "varlen", "triton", "flex", "reference")

# Where `engines_used` collects, while it does.
_used: ContextVar[dict[str, str] | None] = ContextVar("pgcompile_engines_used", default=None)


def choose(engine: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Name of the engine for tensors of `dtype` on `device`, and the reason in words.

    `engine` is the user's wish: the name of an engine, or "auto" for the best one that can run here. Raises
    ValueError for any other string, naming the valid choices, and for an engine that can't run here, with its reason.
    """
    if engine == "auto":
        name, refused = _first_able(AUTO, lambda engine: engine.why_not(device, dtype))
        return name, "; ".join(["the fastest that can run here", *refused])
    if engine not in ENGINES:
        raise ValueError(
            f"unknown attention engine {engine!r}: choose one of {', '.join(['auto', *ENGINES])}"
        )
    reason = ENGINES[engine].why_not(device, dtype)
    if reason is not None:
        raise ValueError(f"attention engine {engine!r} can't run {dtype} on {device}: {reason}")
    return engine, "asked for by name"


def choose_for_heads(
    engine: str, device: torch.device, dtype: torch.dtype, size: int, scores: Scores
) -> tuple[str, str]:
    """The same for one attention of a model: what `choose` names, or, if that is nothing for it, the next in `AUTO`.

    Args:
        size: of the largest head.
    """
    chosen, why = choose(engine, device, dtype)
    for name in AUTO[AUTO.index(chosen) :]:
        if ENGINES[name].why_not(device, dtype) is None:
            reason = ENGINES[name].why_not_heads(size, scores)
            if reason is None:
                return name, why
            why += f"; not {name}: {reason}"
    raise AssertionError("reference computes everything")


def engine_for(engine: str, q_1HTD: Tensor, v_1KTE: Tensor, mask: TreeMask, scores: Scores) -> Engine:
    """What computes one call: what `choose_for_heads` names, or, if that can't take this batch, the next in `AUTO`.

    It depends on no value of q, k or v, so forward and backward get the same.
    """
    device, dtype, size = q_1HTD.device, q_1HTD.dtype, max(q_1HTD.shape[-1], v_1KTE.shape[-1])
    first, _ = choose_for_heads(engine, device, dtype, size, scores)
    name, refused = _first_able(
        AUTO[AUTO.index(first) :],
        lambda engine: (
            engine.why_not(device, dtype)
            or engine.why_not_heads(size, scores)
            or engine.why_not_call(mask, q_1HTD, v_1KTE)
        ),
    )
    used = _used.get()
    if used is not None:
        used[name] = used.get(name) or "; ".join(refused)
    return ENGINES[name]


def _first_able(names: Sequence[str], why_not: Callable[[Engine], str | None]) -> tuple[str, list[str]]:
    """The first that nothing keeps from it, and why each before it was passed over; no further is asked."""
    refused: list[str] = []
    for name in names:
        reason = why_not(ENGINES[name])
        if reason is None:
            return name, refused
        refused.append(f"not {name}: {reason}")
    raise AssertionError("reference computes everything")


@contextmanager
def engines_used() -> Iterator[dict[str, str]]:
    """The engines that compute calls of this thread meanwhile, each with why it wasn't the one that the attention's
    report names, "" for that one itself. Attentions may differ in that; it says the first one's."""
    used: dict[str, str] = {}
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)
