"""Which engine runs a call, and why: the answer goes into the report."""

import torch

from . import ENGINES


def choose(engine: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Name of the engine for tensors of `dtype` on `device`, and the reason in words.

    `engine` is the user's wish: the name of an engine, or "auto" for the best one that can run here. Raises
    ValueError, naming the valid choices, for any other string.
    """
    if engine in ENGINES:
        return engine, "asked for by name"
    if engine == "auto":
        if device.type == "cpu" and dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return "cpu", "ATen's flash kernel"
        return "reference", f"the only engine for {dtype} on {device.type}"
    raise ValueError(f"unknown attention engine {engine!r}: choose one of {', '.join(['auto', *ENGINES])}")
