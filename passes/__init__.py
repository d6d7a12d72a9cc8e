"""The compiler: a Dynamo graph in, a prologue, a packed and a late graph out, or the reasons why not.

`PASSES` is the one ordered list. Analysis comes first and changes nothing; a rewrite happens as a whole or not at all.
"""

from __future__ import annotations

import torch

from . import lower, padding, propagate, trace, verify
from .attention_match import match_attention
from .canonicalize import canonicalize
from .checkpoint import has_regions, inline_checkpoints, wrap_checkpoints
from .functionalize import functionalize
from .head import split_head
from .numbers import settle_numbers
from .original import Original
from .pipeline import Compilation, Pass, run_passes
from .reasons import KINDS, FallbackReason, Unsupported
from .reroll import reroll
from .softmax_forms import SOFTMAXES
from .verify import fake_inputs

# A graph whose work is mostly behind something that couldn't be packed is better off as it was.
LATE_SHARE = 0.25


def inline_pass(c: Compilation) -> None:
    """Checkpointed bodies → a part of the graph."""
    c.inlined, c.checkpoints = inline_checkpoints(c.dynamo)


def opaque_pass(c: Compilation) -> None:
    """Refuse what an ATen graph would not show: custom autograd functions, hooks, higher-order operations."""
    assert c.inlined is not None
    c.refuse(*trace.find_opaque(c.inlined))


def numbers_pass(c: Compilation) -> None:
    """Symbolic floats → tensors without dimensions that are computed before each call, or constants."""
    c.settled, c.numbers = settle_numbers(c.dynamo, c.constant_numbers)
    if c.settled is not c.dynamo:
        c.inlined, c.checkpoints = inline_checkpoints(c.settled)


def aten_pass(c: Compilation) -> None:
    """Dynamo graph → pre-dispatch ATen, one spelling per operation."""
    assert c.inlined is not None
    if not any(isinstance(value, torch.Tensor) for value in trace.example_values(c.inlined)):
        return c.refuse(Unsupported("nothing_to_pack", None, "the graph has no tensor among its inputs"))
    c.aten = trace.to_aten(c.inlined)
    if has_regions(c.inlined) and not has_regions(c.aten):
        raise RuntimeError("tracing lost which nodes are checkpointed")


def canonicalize_pass(c: Compilation) -> None:
    """Operations that only look at another tensor's dtype or sizes → without that tensor."""
    assert c.aten is not None
    canonicalize(c.aten)


def functionalize_pass(c: Compilation) -> None:
    """In-place operations on the graph's own values → out of place."""
    assert c.aten is not None
    functionalize(c.aten)


def softmax_pass(c: Compilation) -> None:
    """Softmaxes in other spellings, and with a sink → operators."""
    assert c.aten is not None
    canonicalize(c.aten, SOFTMAXES)


def reroll_pass(c: Compilation) -> None:
    """Unrolled loops over rows or chunks → one operation."""
    assert c.aten is not None
    reroll(c.aten)


def analyse_pass(c: Compilation) -> None:
    """Kind and layout of every node; all reasons at once."""
    assert c.aten is not None
    found = propagate.analyse(c.aten.graph, c.dropout, c.survey)
    if isinstance(found, Unsupported):
        return c.refuse(found)
    c.analysis = found
    c.refuse(*found.reasons)
    if not c.reasons and found.late_share() > LATE_SHARE:
        c.refuse(*found.late_reasons())
    if not found.has_work and not found.reasons:
        c.refuse(
            Unsupported(
                "nothing_to_pack", None, "the graph has neither attention nor linear layers over tokens"
            )
        )


def attention_pass(c: Compilation) -> None:
    """Match every attention and understand its mask."""
    assert c.analysis is not None
    for node in c.analysis.mixers:
        match = match_attention(node, c.analysis)
        if isinstance(match, Unsupported):
            c.refuse(match)
        else:
            c.matches.append(match)


def padding_pass(c: Compilation) -> None:
    """What has to hold on a batch for its padding to be dropped."""
    assert c.analysis is not None
    c.guards = padding.padding_guards(c.analysis)


def lower_pass(c: Compilation) -> None:
    """Build the four graphs."""
    assert c.aten is not None and c.analysis is not None
    original = Original(c.aten, c.analysis, c.matches, c.guards, c.engine)
    found = lower.Lowering(original).run()
    if isinstance(found, Unsupported):
        return c.refuse(found)
    c.graphs = found


def verify_pass(c: Compilation) -> None:
    """Fake-propagate the packed graph and compare every shape with the prediction."""
    assert c.graphs is not None and c.aten is not None
    failure = verify.verify(c.graphs, c.aten)
    if failure is not None:
        c.refuse(failure)


def head_pass(c: Compilation) -> None:
    """Cut off the packed graph's head, so that it can run in chunks."""
    assert c.graphs is not None
    c.graphs.head = split_head(c.graphs.packed)


def checkpoint_pass(c: Compilation) -> None:
    """The packed nodes of a checkpointed body → under the checkpoint operator again."""
    assert c.graphs is not None
    c.graphs.packed = wrap_checkpoints(c.graphs.packed, c.checkpoints)
    if c.graphs.head is not None:
        c.graphs.head.trunk = wrap_checkpoints(c.graphs.head.trunk, c.checkpoints)


PASSES: tuple[Pass, ...] = (
    inline_pass,  # before all that looks at nodes
    opaque_pass,  # on Dynamo's graph: tracing to ATen inlines what it looks for
    numbers_pass,  # behind that: for a graph that runs as written, nothing is guarded on
    aten_pass,  # before all that reads operations
    canonicalize_pass,  # before what asks what depends on what
    functionalize_pass,  # before the analysis, which refuses writes
    softmax_pass,  # after writes are gone: it moves what is read
    reroll_pass,  # after writes are gone, which lanes must not make
    analyse_pass,
    attention_pass,  # after layouts, which tell queries from keys
    padding_pass,  # after the analysis, which says what is late
    lower_pass,  # after every check: from here on nothing is refused but shapes
    verify_pass,  # on what was built
    head_pass,  # after that, which notes what size everything is
    checkpoint_pass,  # last: what is wrapped can't be looked into
)

__all__ = ["KINDS", "PASSES", "Compilation", "FallbackReason", "Unsupported", "fake_inputs", "run_passes"]
