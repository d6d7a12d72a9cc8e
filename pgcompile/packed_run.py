"""The packed graph, compiled on first use for any batch; its head in chunks where that would take too much memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from .artifacts import Families, Size
from .chunks import ChunkedHead, number_of_chunks
from .engines.choose import engines_used
from .ops import check_columns
from .options import Options
from .passes.checkpoint import without_compiler
from .passes.packed_graphs import PackedGraphs
from .passes.verify import fake_inputs
from .plan import Plan
from .report import BatchReport
from .requests import Request, request_key, request_shapes, request_sizes


class PackedRun:
    """Runs the packed graph.

    Args:
        aten: the original graph.
        options: name the inner compiler.
    """

    def __init__(self, graphs: PackedGraphs, aten: fx.GraphModule, options: Options) -> None:
        self.graphs, self.aten = graphs, aten
        self.families = Families(options)
        self.head = None if graphs.head is None else ChunkedHead(graphs.head, options)

    def __call__(
        self, inputs: Sequence[Any], requests: Sequence[Request], plan: Plan, report: BatchReport
    ) -> Sequence[Any]:
        """The packed graph's results.

        Args:
            inputs: of the packed graph, the requests among them.
            report: is told what ran.

        Raises:
            RuntimeError: if a request asks for what isn't there (on CUDA a device-side assertion). Compiled code, which
                on a CPU would end the process, never sees it.
        """
        for (index, column), width in zip(requests, self.graphs.request_widths, strict=True):
            check_columns(index, column, width)
        with engines_used() as report.engines:
            return self._run(inputs, requests, plan, report)

    def _run(
        self, inputs: Sequence[Any], requests: Sequence[Request], plan: Plan, report: BatchReport
    ) -> Sequence[Any]:
        scored = plan.tokens if plan.scored is None else plan.scored.tokens
        results: Sequence[Any]
        if plan.tokens == 1 or scored == 1:
            # sizes of 1 are special to compilers, and there is nothing to gain
            results = self.eager(*inputs)
            return results
        if self.head is not None:
            tokens = scored if self.head.head.is_scored else plan.tokens
            report.head_chunks = number_of_chunks(self.head.head, tokens, plan.tree.device)
            if report.head_chunks:
                trunk = self._compiled("trunk", self.head.head.trunk, requests, plan)
                lookups = self.head.lookups(inputs, tokens, report.head_chunks)
                return self.head.run(trunk(*inputs), inputs, lookups, tokens, report.head_chunks)
        results = self._compiled("packed", self.graphs.packed, requests, plan)(*inputs)
        return results

    @functools.cached_property
    def eager(self) -> fx.GraphModule:
        return without_compiler(self.graphs.packed)

    def _compiled(
        self, name: str, gm: fx.GraphModule, requests: Sequence[Request], plan: Plan
    ) -> Callable[..., Any]:
        def examples(sizes: Sequence[Any]) -> list[Any]:
            tokens, segments, scored, *looked_up = sizes
            shapes = request_shapes(requests, looked_up)
            made = fake_inputs(self.graphs, self.aten, tokens, segments, scored, shapes)
            assert isinstance(made, list)  # or `verify` would have refused the graph
            return made

        segments = Size(plan.tree.prefix_tree.num_segments, is_hint=False)
        scored = Size(0, is_hint=False) if plan.scored is None else Size(plan.scored.tokens)
        sizes = [Size(plan.tokens), segments, scored, *request_sizes(requests)]
        return self.families.compiled(gm, examples, sizes, (name, request_key(requests)))
