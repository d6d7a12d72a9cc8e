"""Run the passes: one `Compilation` goes through the ordered list; each pass is named, timed, dumped, switchable."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from .attention_match import AttentionMatch
from .packed_graphs import PackedGraphs
from .padding import Guards
from .propagate import Analysis
from .reasons import FallbackReason, Unsupported

# Until `padding_pass` has shown what guards it, padding is kept.
_UNGUARDED = Unsupported("padding_read", None, "padding_pass is disabled, so padding is kept")


@dataclass
class Compilation:
    """What the passes hand on. A pass fills in a field, or adds to `reasons`, after which the rest is skipped.

    Args:
        dynamo: the graph that Dynamo gave; never changed.
        dropout: `Options.dropout`.
        engine: `Options.engine`, passed on to the attention operator.
        survey: walk on past an operation without a rule, to find all reasons at once.
        constant_numbers: take symbolic floats for constants, all of them.
        inlined: the same with checkpointed bodies in it; `checkpoints`: for each, the arguments of checkpoint.
        settled: the graph without symbolic floats; `numbers`: what computes its last inputs from the others, if it has
            more than `dynamo`.
        aten, analysis, matches, guards, graphs: results of the passes, in their order.
        seconds: time of each pass.
    """

    dynamo: fx.GraphModule
    dropout: str = "fallback"
    survey: bool = False
    engine: str = "auto"
    constant_numbers: bool = False
    inlined: fx.GraphModule | None = None
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    settled: fx.GraphModule | None = None
    numbers: fx.GraphModule | None = None
    aten: fx.GraphModule | None = None
    analysis: Analysis | None = None
    matches: list[AttentionMatch] = field(default_factory=list)
    guards: Guards = field(default_factory=lambda: Guards(refusal=_UNGUARDED))
    graphs: PackedGraphs | None = None
    reasons: list[FallbackReason] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)

    def refuse(self, *reasons: Unsupported) -> None:
        self.reasons += [FallbackReason.of(r) for r in reasons]


Pass = Callable[[Compilation], None]


def run_passes(
    passes: Sequence[Pass],
    compilation: Compilation,
    disabled: Sequence[str] = (),
    dump_dir: str | None = None,
) -> Compilation:
    """Run `passes` until one gives a reason to fall back. An exception is a reason too, and is kept in `errors`."""
    graph = _graph_name(dump_dir)
    for number, run in enumerate(passes):
        name = run.__name__
        started = time.perf_counter()
        try:
            if name in disabled:
                if name not in OPTIONAL:
                    compilation.refuse(Unsupported("pass_disabled", None, f"{name} is in disable_passes"))
            else:
                _dump(dump_dir, f"{graph}_{number:02d}_{name}", "before", compilation)
                run(compilation)
                _dump(dump_dir, f"{graph}_{number:02d}_{name}", "after", compilation)
        except Exception as error:  # whatever goes wrong in a pass, the original graph still runs
            compilation.errors.append(error)
            kind = "trace_failed" if compilation.aten is None else "internal_error"
            text = f"{name} raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            compilation.refuse(
                Unsupported(
                    kind, None, text, "please report it, with the model" if kind != "trace_failed" else ""
                )
            )
        compilation.seconds[name] = time.perf_counter() - started
        if compilation.reasons:
            break
    return compilation


OPTIONAL = (
    "numbers_pass", "canonicalize_pass", "functionalize_pass", "softmax_pass", "reroll_pass", "padding_pass",
    "verify_pass", "head_pass", "checkpoint_pass",
)  # fmt: skip


def _graph_name(folder: str | None) -> str:
    """Graphs are numbered in the order in which a folder got them."""
    seen = Path(folder).glob("graph*_00_*.before.py") if folder is not None else ()
    return f"graph{len(list(seen))}"


def _dump(folder: str | None, name: str, when: str, compilation: Compilation) -> None:
    """Write the graphs that exist by now to `folder`, atomically."""
    if folder is None:
        return
    text = []
    graphs: dict[str, Any] = {"dynamo": compilation.dynamo, "aten": compilation.aten}
    if compilation.graphs is not None:
        graphs = {k: getattr(compilation.graphs, k) for k in ("prologue", "requests", "packed", "late")}
    for label, gm in graphs.items():
        if gm is not None:
            text.append(f"# {label}\n{gm.print_readable(print_output=False)}")
    path = Path(folder) / f"{name}.{when}.py"
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("\n\n".join(text))
        temporary.replace(path)
    except OSError as error:  # packing doesn't depend on it
        warnings.warn(f"pgcompile: dump_dir can't be written: {error}", stacklevel=2)
