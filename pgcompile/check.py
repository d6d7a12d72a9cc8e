"""`Options.check`: compare a packed batch with the original graph, values and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .passes.graph import is_random, is_tensor, val
from .passes.packed_graphs import PackedGraphs
from .report import log

# Packed and dense sums run in another order, and float64 models often cast to float32 inside; a real mistake is
# orders of magnitude larger. What a graph computes in half precision stays as coarse in a wider output.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
HALVES = (torch.bfloat16, torch.float16)

PIECE = 1 << 24  # numbers compared at a time, in float64: logits may have billions


class CheckError(RuntimeError):
    """A packed batch differs from the original by more than rounding."""


def why_not(graphs: PackedGraphs) -> str | None:
    """Why a batch can't be compared, or None."""
    nodes = (node for gm in (graphs.prologue, graphs.packed, graphs.late) for node in gm.graph.nodes)
    return "the graph draws random numbers, others in each run" if any(map(is_random, nodes)) else None


def compare(
    gm: fx.GraphModule, aten: fx.Graph, args: Sequence[Any], outputs: Any, kept: Sequence[Tensor | None]
) -> None:
    """Run the original on `args` and compare.

    Gradients are those of a fixed random combination of the outputs. They aren't compared inside of activation
    checkpointing and other saved-tensor hooks, which count what is saved.

    Args:
        gm, aten: the original, and its operations.
        kept: for each leaf of `outputs`, which elements belong to tokens that weren't dropped (None: all of them).
            Values of dropped padding are zero by contract, so they don't count.

    Raises:
        CheckError: naming the first value or gradient that differs, and by how much.
    """
    has_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    with_gradients = torch.is_grad_enabled() and not has_hooks
    with torch.set_grad_enabled(with_gradients):
        original = tree_leaves(gm(*args))
    triples: list[tuple[int, Tensor, Tensor, Tensor]] = [
        (i, found, expected, _weights(expected, mask))
        for i, (found, expected, mask) in enumerate(zip(tree_leaves(outputs), original, kept, strict=True))
        if isinstance(expected, Tensor) and expected.is_floating_point()
    ]
    dtypes = {val(node).dtype for node in aten.nodes if is_tensor(node)}
    coarse = max((TOLERANCE[dtype] for dtype in HALVES if dtype in dtypes), default=0.0)
    for i, found, expected, weights in triples:
        name = f"output {i}, {list(expected.shape)} {str(expected.dtype).removeprefix('torch.')}"
        _compare(name, _kept(found.detach(), weights), _kept(expected.detach(), weights), coarse)
    trained = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    if with_gradients and trained and any(e.requires_grad for _, _, e, _ in triples):
        losses = [
            torch.stack(
                [(_kept(v, w) * w).sum(dtype=torch.float64) for v, w in side if v.requires_grad]
            ).sum()
            for side in ([(t[1], t[3]) for t in triples], [(t[2], t[3]) for t in triples])
        ]
        with torch._functorch.config.patch(donated_buffer=False):  # the caller runs the same backward again
            grads = [
                torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True) for loss in losses
            ]
        for i, (f, e) in enumerate(zip(*grads, strict=True)):
            if f is not None or e is not None:  # none is zero
                f, e = (torch.zeros_like(trained[i]) if g is None else g for g in (f, e))
                _compare(f"gradient of argument {i}, {list(e.shape)}", f, e, coarse)
    what = "" if with_gradients or not has_hooks else ", values alone (saved-tensor hooks are active)"
    log.info("pgcompile: checked a batch against the original%s: equal up to rounding", what)


def _kept(value: Tensor, weights: Tensor) -> Tensor:
    """Zeros at dropped padding, whatever is there."""
    return torch.where(weights != 0, value, 0)


def _weights(value: Tensor, kept: Tensor | None) -> Tensor:
    generator = torch.Generator(value.device).manual_seed(0)
    w = torch.rand(value.shape, generator=generator, dtype=value.dtype, device=value.device).add_(0.5)
    return w if kept is None else w.mul_(kept)


def _compare(what: str, found: Tensor, expected: Tensor, coarse: float) -> None:
    if expected.numel() == 0:
        return
    pieces = [_differences(f, e) for f, e in zip(_pieces(found), _pieces(expected), strict=True)]
    error, scale, largest, at = (torch.stack(values).double() for values in zip(*pieces, strict=True))
    error, scale = error.norm(), scale.norm()
    tolerance = max(TOLERANCE.get(expected.dtype, 1e-4), coarse)
    if not bool(error <= tolerance * scale + 1e-12):
        piece = int(largest.argmax())
        flat = torch.tensor(piece * PIECE + int(at[piece]))
        worst = [int(i) for i in torch.unravel_index(flat, expected.shape)]
        raise CheckError(
            f"{what}: packed differs from the original by {error / scale:.2e} (relative L2), not {tolerance:.0e}; "
            f"worst at {worst}: {found[tuple(worst)].item():.6g} instead of {expected[tuple(worst)].item():.6g}"
        )


def _pieces(value: Tensor) -> tuple[Tensor, ...]:
    return value.reshape(-1).split(PIECE)


def _differences(found: Tensor, expected: Tensor) -> tuple[Tensor, ...]:
    """Norm of the difference, norm of what is expected, the largest difference and its place."""
    same = (found == expected) | (found.isnan() & expected.isnan())  # infinities too
    difference = torch.where(same, 0, found.double() - expected.double())
    scale = torch.where(expected.isfinite(), expected, 0).double().norm()
    return difference.norm(), scale, *difference.abs().max(0)
