"""Does a contestant compute what it should: log-probabilities and gradients against the same in higher precision.

The truth is the dense model in eager, row by row, in the next precision (float32 for bfloat16 and float16, float64 for
float32). How far eager itself is from it, in the measured precision and again row by row, is the yardstick: a
contestant agrees if it is no further away than twice that. Both are relative L2 errors, of all answers'
log-probabilities and of the gradient as a whole; a single parameter's gradient, whose error is a smaller sample, may be
four times as far. The gradient of a vector, as a norm's weight, is one sum over all tokens, where products of matrices
add up blocks; eager's rows are short, and added up in the next precision, so as much as such a sum rounds is no error.

With random weights attention is almost uniform, so that in bfloat16 a single key too many among thousands drowns in
rounding. Such errors are for float32 (`--dtype fp32`), and for the project's tests.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cases import Batch
from .machine import free_memory, is_out_of_memory
from .models import Model, token_logprobs

EPS = torch.finfo(torch.float32).eps  # in which log-probabilities are computed, and sums end
# A gradient that is zero in exact arithmetic (a key bias's) is rounding noise: so much of eager's whole error is let
# pass in each parameter.
NOISE = 0.01
WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True)
class Outcome:
    """Log-probabilities [N, K], zero where no answer is, and gradients by parameter, if there was a backward pass."""

    logprobs: Tensor
    gradients: Sequence[Tensor | None] = ()

    def on_host(self) -> Outcome:
        """Where it doesn't take from what contestants need."""
        return Outcome(self.logprobs.cpu(), [None if g is None else g.cpu() for g in self.gradients])


@dataclass(frozen=True)
class Errors:
    """Distances from the truth. `parts` is that of each parameter's gradient."""

    logprobs: float
    gradient: float
    parts: tuple[float, ...]


@dataclass(frozen=True)
class Yardstick:
    """The truth, its norms and eager's distance from it; parameters' names, and how many tokens each one meets."""

    truth: Outcome
    norms: Errors
    own: Errors
    names: tuple[str, ...]
    tokens: int

    @classmethod
    def of(cls, model: Model, batch: Batch, phase: str) -> Yardstick:
        dtype = next(model.module.parameters()).dtype
        truth = by_rows(model.wider(WIDER[dtype]), batch, phase, WIDER[dtype]).on_host()
        nothing = Outcome(
            torch.zeros_like(truth.logprobs),
            [None if g is None else torch.zeros(()) for g in truth.gradients],
        )
        own = distance(by_rows(model, batch, phase, WIDER[dtype]), truth)
        names = tuple(name for name, _ in model.module.named_parameters())
        return cls(truth, distance(nothing, truth), own, names, batch.tokens["valid"])

    def why_wrong(self, outcome: Outcome) -> tuple[str | None, dict[str, float]]:
        """What is too far from the truth, if something is, and the errors as multiples of eager's."""
        found = distance(outcome, self.truth)
        what = {"logprobs": "logprobs"}
        ratios = {"logprobs": _ratio(found.logprobs, self.own.logprobs, self.norms.logprobs)}
        if self.truth.gradients:
            noise = NOISE * self.own.gradient
            terms = (1 if g is None or g.dim() > 1 else self.tokens for g in self.truth.gradients)
            parts = zip(found.parts, self.own.parts, self.norms.parts, terms, strict=True)
            each = [_ratio(f - noise, o, n, t) for f, o, n, t in parts]
            worst = max(range(len(each)), key=each.__getitem__)
            ratios["gradient"] = _ratio(found.gradient, self.own.gradient, self.norms.gradient)
            ratios["parameter"] = each[worst]
            what |= {"gradient": "the gradient", "parameter": f"the gradient of {self.names[worst]}"}
        for name, ratio in ratios.items():
            most = 4 if name == "parameter" else 2
            if not ratio <= most:
                text = f"{ratio:.3g} times as far from the truth as dense eager, {most} allowed"
                return f"{what[name]}: {text}", ratios
        return None, ratios


def _ratio(error: float, own: float, norm: float, terms: int = 1) -> float:
    """`error / own`, where less than the rounding of a sum of so many terms counts as that."""
    return max(error, 0.0) / max(own, EPS / 2 * terms**0.5 * norm, torch.finfo(torch.float64).tiny)


def by_rows(model: Model, batch: Batch, phase: str, wide: torch.dtype) -> Outcome:
    """Dense in eager, a row at a time and without its padding; gradients are summed in the wider precision.

    A row of a large model, in float32, may be more than a GPU holds: then layers are checkpointed.
    """
    try:
        return _by_rows(model, batch, phase, wide)
    except Exception as error:  # memory that isn't there has no type of its own; all else is raised again
        if phase != "step" or not is_out_of_memory(error):
            raise
    free_memory()  # of the frames that raised
    with _checkpointed(model.module):
        return _by_rows(model, batch, phase, wide)


def _by_rows(model: Model, batch: Batch, phase: str, wide: torch.dtype) -> Outcome:
    parameters = list(model.module.parameters())
    start = batch.ids.shape[1] - batch.answer_positions
    logprobs = torch.zeros(batch.weights.shape, dtype=wide, device=batch.weights.device)
    sums: list[Tensor | None] = [None] * len(parameters)
    model.module.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(phase == "step"):
        for n, length in enumerate(batch.lengths.tolist()):
            count = length - start
            weights = batch.weights[n : n + 1, :count]
            values = token_logprobs(model, batch.ids[n : n + 1, :length], count)
            logprobs[n, :count] = values.detach().masked_fill(weights == 0, 0)
            if phase == "step":
                (values * weights).sum().backward()
            for i, parameter in enumerate(parameters):
                if parameter.grad is not None:
                    before, grad = sums[i], parameter.grad.to(wide)
                    sums[i] = grad if before is None else before.add_(grad)
                    parameter.grad = None
    return Outcome(logprobs, sums if phase == "step" else ())


@contextmanager
def _checkpointed(module: nn.Module) -> Iterator[None]:
    """Layers, whatever stands in a ModuleList, keep what they are given alone, and run again in backward."""
    lists = (child for child in module.modules() if isinstance(child, nn.ModuleList))
    before = {layer: vars(layer).get("forward") for layers in lists for layer in layers if layer is not None}
    try:
        for layer in before:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in before.items():
            if forward is not None:
                layer.forward = forward
            else:
                vars(layer).pop("forward", None)


def distance(outcome: Outcome, truth: Outcome) -> Errors:
    """L2 norms of the differences, computed where the outcome is; infinite where a gradient is missing or something
    isn't finite."""
    parts = []
    for found, wanted in zip(outcome.gradients, truth.gradients, strict=True):
        if found is None or wanted is None:  # no gradient is a gradient of zero
            other = found if wanted is None else wanted
            parts.append(0.0 if other is None or not other.any() else float("inf"))
        else:
            parts.append(_difference(found, wanted))
    return Errors(
        _difference(outcome.logprobs, truth.logprobs),
        sum(p * p for p in parts) ** 0.5,
        tuple(parts),
    )


def _difference(found: Tensor, wanted: Tensor) -> float:
    difference = found.to(wanted.dtype) - wanted.to(found.device)
    norm = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    return norm if norm == norm else float("inf")
