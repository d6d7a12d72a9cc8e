"""`Options.check`: compare a packed batch with the original graph, values and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .plan import Plan
from .report import log

# Packed and dense sums run in another order, and float64 models often cast to float32 inside; a real mistake is
# orders of magnitude larger.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class CheckError(RuntimeError):
    """A packed batch differs from the original by more than rounding."""


def compare(gm: fx.GraphModule, args: Sequence[Any], outputs: Any, plan: Plan) -> None:
    """Run the original on `args` and compare.

    Values of dropped padding are zero in `outputs` by contract, so they don't count. Gradients are those of a fixed
    random combination of the outputs, without padding.

    Raises:
        CheckError: naming the first value or gradient that differs, and by how much.
    """
    expected = tree_leaves(gm(*args))
    found = tree_leaves(outputs)
    pairs = [
        (f, e)
        for f, e in zip(found, expected, strict=True)
        if isinstance(e, Tensor) and e.is_floating_point()
    ]
    weights = [_weights(e, plan) for _, e in pairs]
    for i, ((f, e), w) in enumerate(zip(pairs, weights, strict=True)):
        _compare(f"output {i}", f * (w != 0), e * (w != 0))
    trained = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    if torch.is_grad_enabled() and trained and any(e.requires_grad for _, e in pairs):
        losses = [
            sum((v * w).sum() for v, w in zip(side, weights, strict=True) if v.requires_grad)
            for side in zip(*pairs, strict=True)
        ]
        with torch._functorch.config.patch(donated_buffer=False):  # the caller runs the same backward again
            grads = [
                torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True) for loss in losses
            ]
        for i, (f, e) in enumerate(zip(*grads, strict=True)):
            if f is not None and e is not None:
                _compare(f"gradient of argument {i} {list(e.shape)}", f, e)
    log.info("checked a batch of %d tokens against the original: equal up to rounding", plan.dense_tokens)


def _weights(value: Tensor, plan: Plan) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(value.shape, generator=generator, dtype=torch.float64).add(0.5).to(value)
    if value.shape[:2] == plan.class_of.shape:
        kept = (plan.class_of >= 0).reshape(*plan.class_of.shape, *[1] * (value.dim() - 2))
        w = w * kept
    return w


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    error = (found.double() - expected.double()).norm()
    scale = expected.double().norm()
    tolerance = TOLERANCE.get(expected.dtype, 1e-4)
    if not bool(error <= tolerance * scale + 1e-12):
        raise CheckError(
            f"{what}: packed differs from the original by {error / scale:.2e} (relative L2), more than {tolerance:.0e}"
        )
