"""PEFT: DoRA in one graph.

DoRA asks in its forward for the module that a weight's class comes from, which Dynamo (torch 2.13) can't trace. It
breaks the graph at every adapted layer, and little is left to pack between the breaks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def trace_dora() -> None:
    """Let Dynamo trace PEFT's DoRA layers: call it once, before the first step. Calling it again does nothing.

    Weights that are plain parameters are taken as they are; quantized ones go PEFT's way, and break the graph.

    Raises:
        ImportError: PEFT isn't installed.
    """
    from peft.tuners.lora import dora

    original = getattr(dora, "dequantize_module_weight", None)
    if original is None or getattr(
        original, "is_traceable", False
    ):  # None: a version that may be traceable by itself
        return

    def dequantize_module_weight(module: nn.Module) -> Any:
        weight = getattr(module, "weight", None)
        if torch.compiler.is_compiling() and type(weight) is nn.Parameter:
            return weight
        return original(module)

    dequantize_module_weight.is_traceable = True  # type: ignore[attr-defined]
    dora.dequantize_module_weight = dequantize_module_weight
