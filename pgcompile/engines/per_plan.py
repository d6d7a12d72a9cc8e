"""What engines work out from a plan, once for all layers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Built = TypeVar("Built")

# By the plan's segments: the same tensor reaches every layer, forward and backward, in eager mode as through aot_eager
# and inductor. Held weakly, so it goes when the plan goes. (A storage's address would be given to the next plan.)
_built: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def once_per_plan(segments_M5: Tensor, key: tuple, build: Callable[[], Built]) -> Built:
    """`build()`, or what it returned before for this plan and key."""
    built = _built.setdefault(segments_M5, {})
    if key not in built:
        with torch.inference_mode(False):  # a training step may come back to the plan
            built[key] = build()
    return built[key]
