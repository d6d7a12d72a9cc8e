"""What is switched on around a call: grad mode, autocast, determinism, precision."""

from __future__ import annotations

from typing import Any

import torch

_DEVICES = ("cpu", "cuda", "xpu")
_FLOAT32_PRODUCTS = ("cuda", "mkldnn")  # the backends whose precision can be set


def modes() -> tuple[Any, ...]:
    """What the inner compiler bakes in."""
    autocast = tuple((d, torch.get_autocast_dtype(d)) for d in _DEVICES if torch.is_autocast_enabled(d))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, *numerics()


def numerics() -> tuple[Any, ...]:
    """What of it kernels bake in that run under neither grad mode nor autocast.

    `torch.get_float32_matmul_precision` raises where `torch.backends.…fp32_precision` was set.
    """
    precisions = (torch._C._get_fp32_precision_getter(backend, "matmul") for backend in _FLOAT32_PRODUCTS)
    return torch.are_deterministic_algorithms_enabled(), *precisions


class GlobalModes:
    """Grad mode and autocast as they are now, to be restored after a graph stopped between two of its switches."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
        self.cache = torch.is_autocast_cache_enabled()
        self.nesting = _autocast_nesting()

    def restore(self) -> None:
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.cache)
        for _ in range(_autocast_nesting() - self.nesting):
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()


def _autocast_nesting() -> int:
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return nesting
