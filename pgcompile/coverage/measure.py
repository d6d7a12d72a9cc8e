"""One row of the coverage table: a model type, forward and backward, packed against eager."""

from __future__ import annotations

import copy
import functools
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backend import pgcompile
from ..passes.reasons import HARMLESS, FallbackReason
from ..report import BatchReport, GraphReport
from .batch import BenchBatch, bench_batch
from .precision import float64_everywhere
from .tiny_models import TinyModel, build

# Bounds for promoted float64, and for the few models that don't run in it (float32 inside of a float64 model).
BOUNDS = {"float64": (1e-10, 1e-9), "float64, float32 inside": (1e-5, 1e-4)}
# Gradients that are zero in exact arithmetic (a key bias's) are rounding noise: judged against the model's largest.
NEGLIGIBLE = 1e-6
EPS = torch.finfo(torch.float32).eps

CLASSES: dict[str, str] = json.loads((Path(__file__).parent / "classes.json").read_text())


@dataclass
class Row:
    """What one model type came to.

    Args:
        status: "packed", "islands", "eager", "wrong" (packed, with other values or gradients), "not causal" (a token
            depends on later tokens or on other rows: nothing to share) or "error" (can't be built or run in eager).
        attention: spelling and mask of each distinct attention.
        value_error: largest difference of an output entry, relative to the output's largest entry.
        gradient_error: largest difference of a gradient entry, relative to the gradient's largest.
        float32_ratio: of mixtures of experts, see `float32_ratio`.
        reasons: why it isn't packed, with source lines; or the exception.
    """

    model_type: str
    status: str = "error"
    model_class: str = ""
    attention: list[str] = field(default_factory=list)
    engine: str = ""
    packed_tokens: int = 0
    distinct_tokens: int = 0
    precision: str = ""
    value_error: float | None = None
    gradient_error: float | None = None
    float32_ratio: float | None = None
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class _Outcome:
    """Values and gradients of one call, by name."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.values | {name: g for name, g in self.gradients.items() if g is not None}


def measure(model_type: str) -> Row:
    """Build a type, run it in eager and packed, compare."""
    started = time.perf_counter()
    torch._dynamo.reset()
    row = Row(model_type, model_class=CLASSES.get(model_type, ""))
    try:
        tiny = build(model_type)
        batch = bench_batch(tiny.vocab_size)
        _measure(row, tiny, batch)
    except Exception as error:  # of a model's own code: its row says so
        row.status, row.reasons = "error", [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    row.seconds = round(time.perf_counter() - started, 2)
    return row


def _measure(row: Row, tiny: TinyModel, batch: BenchBatch) -> None:
    row.distinct_tokens = batch.distinct_tokens
    inputs = inputs_of(tiny, batch)
    single = copy.deepcopy(tiny.model) if uses_grouped_mm(tiny.model) else None
    model = tiny.model.double()
    if single is not None:
        cast(Any, model).set_experts_implementation("batched_mm")  # grouped_mm has no float64
    compare = functools.partial(_compare, row, model, inputs, batch)
    try:
        row.precision = "float64"
        with float64_everywhere():
            compare(fullgraph=True)
    except Exception:  # whatever a model's code may raise at a dtype or a break that it didn't expect
        torch._dynamo.reset()
        row.precision = "float64, float32 inside"
        compare(fullgraph=False)
    if single is not None and row.status not in ("not causal", "wrong"):
        reports: list[Any] = []
        row.float32_ratio = float32_ratio(single, model, tiny, _compiled(single, reports, fullgraph=False))
        _report(row, reports)
        if not row.float32_ratio <= 2:
            row.status = "wrong"


def _compare(
    row: Row, model: nn.Module, inputs: Mapping[str, Any], batch: BenchBatch, fullgraph: bool
) -> None:
    """Status, reasons and errors of the model as it is."""
    if not is_causal(model, inputs, batch):
        row.status, row.reasons = "not causal", ["a token's logits depend on later tokens or on other rows"]
        return
    reports: list[Any] = []
    expected = _outcome(model, model, inputs, batch.kept)
    actual = _outcome(_compiled(model, reports, fullgraph), model, inputs, batch.kept)
    _report(row, reports)
    row.value_error, row.gradient_error = errors(actual, expected)
    most_value, most_gradient = BOUNDS[row.precision]
    if not (row.value_error <= most_value and row.gradient_error <= most_gradient):
        row.status = "wrong"


def _compiled(model: nn.Module, reports: list[Any], fullgraph: bool) -> Callable[..., Any]:
    options = {"inner": "eager", "min_saving": 0}
    backend = functools.partial(pgcompile, options=options, collector=reports.append)
    return torch.compile(model, backend=backend, fullgraph=fullgraph)


def uses_grouped_mm(model: nn.Module) -> bool:
    """Whether experts run through `grouped_mm`, a transformers setting that every MoE type has."""
    return getattr(getattr(model, "config", None), "_experts_implementation", None) == "grouped_mm"


def float32_ratio(single: nn.Module, double: nn.Module, tiny: TinyModel, fast: Callable[..., Any]) -> float:
    """Relative L2 errors in float32, packed over eager's own, against float64: at most 2 if packing costs nothing.

    The largest over outputs and gradients of the median over five batches. Errors below half an eps count as that.
    """
    ratios: dict[str, list[float]] = {}
    for seed in range(5):
        batch = bench_batch(tiny.vocab_size, seed)
        inputs = inputs_of(tiny, batch)
        with float64_everywhere():
            truth = _outcome(double, double, inputs, batch.kept)
        eager = _outcome(single, single, inputs, batch.kept)
        packed = _outcome(fast, single, inputs, batch.kept)
        wanted, own, ours = (outcome.tensors for outcome in (truth, eager, packed))
        for name, want in wanted.items():
            if want.norm() > 0:
                best = (own[name].double() - want).norm() / want.norm()
                error = (ours[name].double() - want).norm() / want.norm()
                ratios.setdefault(name, []).append(float(error / best.clamp(min=EPS / 2)))
    return max(statistics.median(r) for r in ratios.values())


def inputs_of(tiny: TinyModel, batch: BenchBatch) -> dict[str, Any]:
    """Keyword arguments for a model's forward: those of ours that it takes."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if "attention_mask" in tiny.parameters:
        inputs["attention_mask"] = batch.attention_mask
    if "use_cache" in tiny.parameters or "kwargs" in tiny.parameters:
        inputs["use_cache"] = False
    return inputs


def _outcome(call: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any], kept: Tensor) -> _Outcome:
    """One forward and backward pass through fixed random weights of all kept outputs."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    values = {
        name: value if value.shape[:2] != kept.shape else value[kept]
        for name, value in named_tensors(call(**inputs)).items()
        if value.is_floating_point()
    }
    generator = torch.Generator().manual_seed(1)
    losses = [
        (v * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v)).sum()
        for v in values.values()
        if v.requires_grad
    ]
    torch.stack(losses).sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return _Outcome({name: v.detach() for name, v in values.items()}, gradients)


def named_tensors(value: Any, name: str = "out") -> dict[str, Tensor]:
    """The tensors in nested tuples, lists, mappings and ModelOutputs; other objects (caches) are skipped."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        children = [(f"{name}.{key}", child) for key, child in value.items()]
    elif isinstance(value, (tuple, list)):
        children = [(f"{name}[{index}]", child) for index, child in enumerate(value)]
    else:
        children = []
    return {
        key: tensor
        for child_name, child in children
        for key, tensor in named_tensors(child, child_name).items()
    }


def is_causal(model: nn.Module, inputs: Mapping[str, Any], batch: BenchBatch) -> bool:
    """Whether logits before a changed token, and in rows without one, stay what they are (to 1e-9)."""
    changed = batch.input_ids.clone()
    at = batch.kept.shape[1] - 2  # a token near the end of the first row
    changed[0, at] = 3 + (changed[0, at] - 2) % 100
    with torch.no_grad():
        before, after = (
            next(iter(named_tensors(model(**{**inputs, "input_ids": ids})).values()))
            for ids in (batch.input_ids, changed)
        )
    untouched = batch.kept.clone()
    untouched[0, at:] = False
    return before.shape[:2] == untouched.shape and bool(
        ((before - after)[untouched].abs() <= 1e-9 * before.abs().max().clamp(min=1)).all()
    )


def errors(actual: _Outcome, expected: _Outcome) -> tuple[float, float]:
    """The largest relative errors of values and of gradients; infinite where one of both is missing or not finite."""
    values = [
        _largest(actual.values[name] - want) / max(1.0, _largest(want))
        for name, want in expected.values.items()
    ]
    top = max((_largest(g) for g in expected.gradients.values() if g is not None), default=0.0)
    gradients = []
    for name, want in expected.gradients.items():
        got = actual.gradients[name]
        if want is None or got is None:
            gradients.append(0.0 if all(g is None or _largest(g) == 0 for g in (want, got)) else float("inf"))
        else:
            scale = max(_largest(want), NEGLIGIBLE * top)
            gradients.append(_largest(got - want) / scale if scale else _largest(got))
    return max(values), max(gradients, default=0.0)


def _largest(x: Tensor) -> float:
    return float(x.abs().nan_to_num(nan=float("inf")).max()) if x.numel() else 0.0


def _report(row: Row, reports: list[Any]) -> None:
    graphs = [r for r in reports if isinstance(r, GraphReport)]
    batches = [r for r in reports if isinstance(r, BatchReport)]
    attention = [a for g in graphs for a in g.attention]
    row.attention = list(dict.fromkeys(f"{a.spelling}: {a.mask}" for a in attention))
    row.engine = ", ".join(dict.fromkeys(a.engine for a in attention))
    row.packed_tokens = max((b.packed_tokens for b in batches), default=0)
    fallbacks = [r for g in graphs for r in g.fallbacks]
    found = [_reason_line(r) for r in sorted(fallbacks, key=lambda r: r.kind in HARMLESS)]
    found += [b.why.partition("\n")[0] for b in batches if b.decision != "packed"] or (
        [] if graphs else ["nothing was compiled"]
    )
    row.reasons = list(dict.fromkeys(found))
    row.status = "eager" if found else "packed"


def _reason_line(reason: FallbackReason) -> str:
    """Kind, explanation, and the place in the model's code, from the package's name on."""
    place = re.sub(r"^.*/site-packages/", "", reason.source).partition(": ")[0]
    return f"{reason.kind}: {reason.explanation}" + (f", at {place}" if place else "")
