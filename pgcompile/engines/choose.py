"""Which engine runs a call, and why: the answer goes into the report."""

import torch
from torch import Tensor

from . import ENGINES, Engine, TreeMask

# What "auto" tries, in this order; reference can always run.
AUTO = ("cpu", "varlen", "triton", "reference")


def choose(engine: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Name of the engine for tensors of `dtype` on `device`, and the reason in words.

    `engine` is the user's wish: the name of an engine, or "auto" for the best one that can run here. Raises
    ValueError for any other string, naming the valid choices, and for an engine that can't run here, with its reason.
    """
    if engine == "auto":
        words = ["the fastest that can run here"]
        for name in AUTO:  # no further than needed: each attention asks
            reason = ENGINES[name].why_not(device, dtype)
            if reason is None:
                return name, "; ".join(words)
            words.append(f"not {name}: {reason}")
    if engine not in ENGINES:
        raise ValueError(
            f"unknown attention engine {engine!r}: choose one of {', '.join(['auto', *ENGINES])}"
        )
    reason = ENGINES[engine].why_not(device, dtype)
    if reason is not None:
        raise ValueError(f"attention engine {engine!r} can't run {dtype} on {device}: {reason}")
    return engine, "asked for by name"


def engine_for(engine: str, q_1HTD: Tensor, v_1KTE: Tensor, mask: TreeMask) -> Engine:
    """What computes one call: what `choose` names, or, where this call is nothing for that, the next in `AUTO`.

    It depends on sizes and on which columns there are, so forward and backward get the same.
    """
    device, dtype = q_1HTD.device, q_1HTD.dtype
    name, _ = choose(engine, device, dtype)
    able = (ENGINES[n] for n in AUTO[AUTO.index(name) :] if ENGINES[n].why_not(device, dtype) is None)
    size = max(q_1HTD.shape[-1], v_1KTE.shape[-1])
    return next(found for found in able if found.why_not_call(size, mask) is None)
