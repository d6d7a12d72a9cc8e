"""`Options.check`: compare a packed batch with the original graph, values and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .report import log

# Packed and dense sums run in another order, and float64 models often cast to float32 inside; a real mistake is
# orders of magnitude larger.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class CheckError(RuntimeError):
    """A packed batch differs from the original by more than rounding."""


def compare(gm: fx.GraphModule, args: Sequence[Any], outputs: Any, kept: Sequence[Tensor | None]) -> None:
    """Run the original on `args` and compare.

    Gradients are those of a fixed random combination of the outputs.

    Args:
        kept: for each leaf of `outputs`, which elements belong to tokens that weren't dropped (None: all of them).
            Values of dropped padding are zero by contract, so they don't count.

    Raises:
        CheckError: naming the first value or gradient that differs, and by how much.
    """
    triples: list[tuple[int, Tensor, Tensor, Tensor]] = [
        (i, found, expected, _weights(expected, mask))
        for i, (found, expected, mask) in enumerate(
            zip(tree_leaves(outputs), tree_leaves(gm(*args)), kept, strict=True)
        )
        if isinstance(expected, Tensor) and expected.is_floating_point()
    ]
    for i, found, expected, weights in triples:
        name = f"output {i}, {list(expected.shape)} {str(expected.dtype).removeprefix('torch.')}"
        _compare(name, _kept(found, weights), _kept(expected, weights))
    trained = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    if torch.is_grad_enabled() and trained and any(e.requires_grad for _, _, e, _ in triples):
        losses = [
            torch.stack(
                [(_kept(v, weights) * weights).double().sum() for v, weights in side if v.requires_grad]
            ).sum()
            for side in ([(t[1], t[3]) for t in triples], [(t[2], t[3]) for t in triples])
        ]
        with torch._functorch.config.patch(donated_buffer=False):  # the caller runs the same backward again
            grads = [
                torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True) for loss in losses
            ]
        for i, (f, e) in enumerate(zip(*grads, strict=True)):
            if f is not None and e is not None:
                _compare(f"gradient of argument {i}, {list(e.shape)}", f, e)
    log.info("pgcompile: checked a batch against the original: equal up to rounding")


def _kept(value: Tensor, weights: Tensor) -> Tensor:
    """Zeros at dropped padding, whatever is there."""
    return torch.where(weights != 0, value, 0)


def _weights(value: Tensor, kept: Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(value.shape, generator=generator, dtype=torch.float64, device="cpu").add(0.5).to(value)
    return w if kept is None else w * kept.to(w)


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    same = (found == expected) | (found.isnan() & expected.isnan())  # infinities too
    difference = torch.where(same, 0, found.double() - expected.double())
    error, scale = difference.norm(), torch.where(expected.isfinite(), expected, 0).double().norm()
    tolerance = TOLERANCE.get(expected.dtype, 1e-4)
    if not bool(error <= tolerance * scale + 1e-12):
        worst = [int(i) for i in torch.unravel_index(difference.abs().argmax(), expected.shape)]
        raise CheckError(
            f"{what}: packed differs from the original by {error / scale:.2e} (relative L2), not {tolerance:.0e}; "
            f"worst at {worst}: {found[tuple(worst)].item():.6g} instead of {expected[tuple(worst)].item():.6g}"
        )
