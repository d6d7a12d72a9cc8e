"""Dynamo's backend: a graph in, a callable out, and which path a call takes.

call ──► prologue ──► plan ──► worth it? ──► packed graph ──► late graph ──► outputs
                        │          └── no ──► the original through the inner compiler
                        └── not causal, empty, … ──► the same, with a reason
a graph that can't be packed ──► the original, eager (or `fallback="inner"`)
"""

from __future__ import annotations

import functools
import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import check, stats
from .breaks import break_behind
from .calibration import read_speed
from .columns import DenseCall, batch_sizes, rows_first
from .cost import Cost, Speed, count_work, saved_work, why_not_worth_it
from .engines import Scores
from .engines.choose import choose_for_heads
from .errors import backward_failures, belongs_to_caller
from .generation import compiled_module, keep_generation_out
from .inner import DenseGraph, compiling
from .modes import GlobalModes
from .options import Options
from .packed_run import PackedRun
from .packed_tree import PackedTrees
from .passes import PASSES, Compilation, FallbackReason, run_passes
from .passes.checkpoint import without_compiler
from .passes.layout import POSITION, ROW, Dim
from .passes.numbers import with_numbers
from .passes.packed_graphs import Input, PackedGraphs
from .passes.reasons import HARMLESS, Unsupported
from .plan import Plan, build_plan, kept_elements
from .report import AttentionReport, BatchReport, FallbackError, GraphReport, describe, log
from .requests import Request

# Reports go to the collector of the `explain` call that compiled the graph, if there is one.
Collector = Callable[[GraphReport | BatchReport], None]


def pgcompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options | Mapping[str, Any] | None = None,
    mode: str | None = None,
    collector: Collector | None = None,
    survey: bool = False,
) -> Callable[..., Any]:
    """The backend of `torch.compile(model, backend="pgcompile")`.

    Args:
        gm: Dynamo's graph; it isn't changed.
        example_inputs: what Dynamo gives with it; not read, as the graph's nodes know as much.
        options: see `Options`.
        mode: torch.compile's mode, for the inner compiler.
        collector: gets the reports of this graph and of its batches.
        survey: for `explain`: look for all reasons at once, and leave it to the collector to tell them.

    Raises, when what it returns is called:
        ValueError: for unknown options, and for an engine asked for by name that can't run here.
        FallbackError: with `strict=True`, if the graph or the batch can't be packed.
    """
    try:
        chosen = Options.of(options, mode)
    except ValueError as error:
        return functools.partial(_raise, error, None)
    module = compiled_module()
    if module is not None and not survey:
        keep_generation_out(module)
    with compiling():
        compilation = _compile(gm, chosen, survey)
    try:
        report = _graph_report(compilation, chosen)
    except ValueError as error:  # an engine asked for by name that can't run here
        return functools.partial(_raise, error, None)
    if collector is not None:
        collector(report)
    if compilation.reasons:
        if chosen.strict and not report.has_nothing_to_pack:
            cause = next(iter(compilation.errors), None)
            return functools.partial(_raise, FallbackError(report.fallbacks + report.notes), cause)
        if not survey:
            text = "pgcompile: this graph isn't packed and runs as written (strict=True raises instead):\n%s"
            level = logging.INFO if report.has_nothing_to_pack else logging.WARNING
            log.log(level, text, describe([*report.fallbacks, *report.notes]))
        run = DenseGraph(compilation, chosen) if chosen.fallback == "inner" else without_compiler(gm)
        return run if report.has_nothing_to_pack else functools.partial(_run_eager, run)
    seconds = sum(compilation.seconds.values())
    log.debug("pgcompile: a graph with %d attentions packs (%.2f s)", len(compilation.matches), seconds)
    return PackedCall(compilation, chosen, collector, report.index, survey, _speed(compilation, report))


def _compile(gm: fx.GraphModule, options: Options, survey: bool) -> Compilation:
    """Run the passes; once more if a number that became a tensor may be what keeps the graph from being packed."""
    compilation = Compilation(gm, options.dropout, survey, options.engine)
    run_passes(PASSES, compilation, options.disable_passes, options.dump_dir)
    if compilation.numbers is not None and any(r.kind not in HARMLESS for r in compilation.reasons):
        again = Compilation(gm, options.dropout, survey, options.engine, constant_numbers=True)
        run_passes(PASSES, again, options.disable_passes, options.dump_dir)
        return compilation if any(r.kind not in HARMLESS for r in again.reasons) else again
    return compilation


def _raise(error: Exception, cause: BaseException | None, *args: Any) -> Any:
    """Raised by the call, not by compiling: Dynamo wraps what a backend raises in an exception of its own."""
    raise error from cause


def _run_eager(run: Callable[..., Any], *args: Any) -> Any:
    stats.count(eager=1)
    return run(*args)


def _graph_report(compilation: Compilation, options: Options) -> GraphReport:
    report = GraphReport("eager" if compilation.reasons else "packed", fallbacks=list(compilation.reasons))
    broken = break_behind(compilation.dynamo)
    report.notes += [broken] if broken is not None else []
    report.seconds = dict(compilation.seconds)
    for match in compilation.matches:
        out = match.node.meta["val"]  # autocast may give it another dtype than q
        size = max(match.q.meta["val"].shape[-1] + match.entries, out.shape[-1])
        scores = Scores(match.scale, match.softcap)
        engine, why = choose_for_heads(options.engine, out.device, out.dtype, size, scores)
        report.attention.append(
            AttentionReport(match.node.name, match.spelling, match.describe(), engine, why)
        )
    if compilation.graphs is not None and compilation.graphs.head is not None:
        report.head = compilation.graphs.head.recomputed
    if compilation.guards.refusal is not None and not compilation.reasons:
        report.notes.append(FallbackReason.of(compilation.guards.refusal))
    return report


def _speed(compilation: Compilation, report: GraphReport) -> Speed | None:
    """What the device was calibrated to, if that was with the engine that will run."""
    engines = {attention.engine for attention in report.attention}
    if len(engines) != 1:
        return None
    out = compilation.matches[0].node.meta["val"]
    return read_speed(out.device, out.dtype, *engines)


class PackedCall:
    """A graph that can be packed: plans each batch and runs it packed, or dense with a reason."""

    def __init__(
        self,
        compilation: Compilation,
        options: Options,
        collector: Collector | None,
        index: int,
        survey: bool,
        speed: Speed | None,
    ) -> None:
        assert (
            compilation.graphs is not None
            and compilation.aten is not None
            and compilation.analysis is not None
        )
        self.graphs: PackedGraphs = compilation.graphs
        self.aten = compilation.aten
        self.options, self.collector, self.index = options, collector, index
        self.cost: Cost = count_work(compilation.analysis, self.graphs)
        self.speed = speed
        self.dense = DenseGraph(compilation, options)
        self.numbers = compilation.numbers
        self.run = PackedRun(self.graphs, self.aten, options)
        self.trees = PackedTrees()
        inputs = self.graphs.inputs
        self.argument_of = [spec.index if spec.kind == "argument" else None for spec in inputs]
        self.made_inputs = [(at, spec) for at, spec in enumerate(inputs) if spec.kind != "argument"]
        self.unchecked = options.check
        self.warned: set[str] = set()
        self.survey = survey
        self.failures = backward_failures()

    def __call__(self, *given: Any) -> Any:
        args = with_numbers(self.numbers, given)
        report = BatchReport(self.index)
        if self.failures != backward_failures():
            self.failures = backward_failures()
            return self._run_dense(given, report, "engine_error", "the backward pass before this call failed")
        switches = GlobalModes()
        try:
            results, plan = self._plan(args, report)
            requests = self._requests(args, results, plan)
            inputs = self._inputs(args, results, requests, plan)
        except DenseCall as reason:
            return self._run_dense(given, report, reason.kind, reason.explanation)
        except Exception as error:  # nothing ran yet: the original does, and says why
            switches.restore()  # a graph may have stopped between two of them
            if belongs_to_caller(error):
                raise
            return self._run_dense(given, report, "internal_error", f"{type(error).__name__}: {error}", error)
        try:
            outputs = self._late(args, results, self.run(inputs, requests, plan, report), plan)
        except Exception as error:  # the same: nothing has been written to
            switches.restore()
            if belongs_to_caller(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what was computed
            return self._run_dense(given, report, "engine_error", f"{type(error).__name__}: {error}", error)
        report.decision = "packed"
        self._collect(report)
        stats.count(packed=1, computed_tokens=report.packed_tokens)
        if self.unchecked > 0:
            self.unchecked -= 1
            self._check(given, outputs, results, plan)
        return outputs

    def _check(self, given: Sequence[Any], outputs: Any, results: Sequence[Any], plan: Plan) -> None:
        reason = check.why_not(self.graphs)
        if reason is not None:
            log.warning("pgcompile: not checked: %s", reason)
            return
        leaves = zip(tree_leaves(outputs), self.graphs.outputs, strict=True)
        kept = [
            None if layout is None else kept_elements(leaf, layout, plan, results, self.graphs)
            for leaf, layout in leaves
        ]
        check.compare(self.dense.eager, self.aten.graph, given, outputs, kept)
        stats.count(checked=1)

    def _plan(self, args: Sequence[Any], report: BatchReport) -> tuple[Sequence[Any], Plan]:
        started = time.perf_counter()
        with torch.no_grad():
            results = self.graphs.prologue(*args)
            report.rows, report.positions = batch_sizes(self.graphs, results)
            report.dense_tokens = report.rows * report.positions
            plan = build_plan(self.graphs, results, self.options.min_saving == 0, self.trees)
        report.valid_tokens, report.packed_tokens = plan.valid_tokens, plan.tokens
        report.kept_padding = plan.kept_padding
        tree = plan.tree.prefix_tree
        report.segments, report.depth = tree.num_segments, tree.max_segment_depth
        report.dense_pairs, report.packed_pairs = plan.dense_pairs, plan.packed_pairs
        report.work = self.cost.dense(plan), self.cost.packed(plan)
        report.saving = saved_work(*report.work)
        stats.count(
            dense_tokens=plan.dense_tokens, valid_tokens=plan.valid_tokens, packed_tokens=plan.tokens,
            plans_reused=plan.is_known, plan_seconds=time.perf_counter() - started,
        )  # fmt: skip
        text = why_not_worth_it(*report.work, self.options.min_saving, self.speed)
        if text is not None:
            if any(results[i].requires_grad for i, _ in self.graphs.keys):
                why = "a float input requires grad, as what comes from behind a graph break does: rows share nothing"
                raise DenseCall("graph_break", f"{text}; {why}")
            raise DenseCall("not_worth_it", text)
        return results, plan

    def _requests(self, args: Sequence[Any], results: Sequence[Any], plan: Plan) -> Sequence[Request]:
        found: Sequence[Request] = self.graphs.requests(
            *self._chosen(self.graphs.request_inputs, args, results, (), plan)
        )
        return found

    def _inputs(
        self, args: Sequence[Any], results: Sequence[Any], requests: Sequence[Request], plan: Plan
    ) -> list[Any]:
        inputs = [None if index is None else args[index] for index in self.argument_of]
        for at, spec in self.made_inputs:
            inputs[at] = self._input(spec, results, requests, plan)
        return inputs

    def _input(self, spec: Input, results: Sequence[Any], requests: Sequence[Request], plan: Plan) -> Any:
        if spec.kind == "value":
            return results[spec.index]
        if spec.kind == "column":
            return pack_column(results[spec.index], spec.dims, plan)
        if spec.kind == "request_index":
            return requests[spec.index][0]
        if spec.kind == "request_column":
            return requests[spec.index][1]
        if spec.kind == "data_mask":
            return plan.data_valid[spec.index][plan.tree.row, plan.tree.position]
        if spec.kind == "hides":
            return plan.hides[spec.index]
        if spec.kind == "scored":
            assert plan.scored is not None
            return plan.scored.index
        tree = plan.tree
        return {
            "subtree_end": tree.subtree_end, "depth": tree.depth, "segments": tree.segments, "positions": tree.position,
        }[spec.kind]  # fmt: skip

    def _late(self, args: Sequence[Any], results: Sequence[Any], packed: Sequence[Any], plan: Plan) -> Any:
        outputs = self.graphs.late(*self._chosen(self.graphs.late_inputs, args, results, packed, plan))
        if plan.valid_tokens == plan.dense_tokens or not self.graphs.to_zero:
            return outputs
        leaves, spec = tree_flatten(outputs)
        for i in self.graphs.to_zero:
            layout = self.graphs.outputs[i]
            assert layout is not None
            kept = kept_elements(leaves[i], layout, plan, results, self.graphs)
            leaves[i] = leaves[i].masked_fill(~kept, 0)
        return tree_unflatten(leaves, spec)

    def _chosen(
        self,
        inputs: Sequence[tuple[str, int]],
        args: Sequence[Any],
        results: Sequence[Any],
        packed: Sequence[Any],
        plan: Plan,
    ) -> list[Any]:
        """Inputs of the late graph, and of that of requests (which has no packed values)."""
        sources = {
            "argument": args,
            "prologue": results,
            "packed": packed,
            "class_of": (plan.tree.class_of,),
            "token_of": (plan.tree.token_of,),
        }
        if plan.scored is not None:
            sources |= {
                "scored_class_of": (plan.scored.class_of,),
                "scored_token_of": (plan.scored.token_of,),
            }
        return [sources[source][index] for source, index in inputs]

    def _run_dense(
        self,
        args: Sequence[Any],
        report: BatchReport,
        kind: str,
        text: str,
        error: BaseException | None = None,
    ) -> Any:
        reason = FallbackReason.of(Unsupported(kind, None, text))
        report.decision, report.why = "dense", describe([reason]).strip()
        report.engines, report.head_chunks = {}, 0  # a failure may have come behind them
        self._collect(report)
        outputs = self.dense(*args)  # first: if the call itself is wrong, it should say so in its own words
        # turned away before it had a plan: not in the other sums, either
        stats.count(dense=1, computed_tokens=report.dense_tokens if report.packed_tokens else 0)
        if kind in HARMLESS:
            return outputs
        if self.options.strict:
            raise FallbackError([reason]) from error
        if kind not in self.warned and not self.survey:
            self.warned.add(kind)
            log.warning("pgcompile: this call runs as written:\n%s", describe([reason]), exc_info=error)
        return outputs

    def _collect(self, report: BatchReport) -> None:
        if self.collector is not None:
            self.collector(report)
        log.debug("pgcompile: %s", report)


def pack_column(value: Tensor, dims: tuple[Dim, ...], plan: Plan) -> Tensor:
    """A dense column at the representatives: its rows get size 1, its positions size T, its other dims stay."""
    factors = {f for dim in dims for f in dim}
    if ROW not in factors and (POSITION,) in dims:
        return value.index_select(dims.index((POSITION,)), plan.tree.position)
    packed = rows_first(value, dims, plan.rows, plan.positions)[plan.tree.row, plan.tree.position]
    holder = POSITION if POSITION in factors else ROW
    rest = iter(range(1, packed.dim()))
    order: list[int] = []
    sizes: list[int] = []
    for dim in dims:
        parts = [0 if f == holder else next(rest) for f in dim or (1,) if f == holder or f != ROW]
        order += parts
        sizes.append(math.prod(packed.shape[part] for part in parts))
    return packed.permute(order).reshape(sizes).contiguous()  # as it was compiled for
