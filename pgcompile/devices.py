"""What moves to a device, and in which order it arrives."""

from __future__ import annotations

import torch
from torch import Tensor

# Those whose work may run in several streams; on others everything is done in the order in which it was asked for.
WITH_STREAMS = ("cuda", "xpu")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Without waiting: a copy from memory that isn't pinned may wait for everything that was launched before."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def stream_of(device: torch.device) -> torch.Stream | None:
    """The stream in which `to_device` copies now; None where there is only one."""
    if device.type not in WITH_STREAMS:
        return None
    return torch.get_device_module(device).current_stream(device)
