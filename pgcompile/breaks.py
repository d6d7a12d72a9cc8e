"""Where Dynamo stopped tracing: a graph that ended early says so, and Dynamo's record of frames has those it gave up.

(A break within a loop over layers makes Dynamo run the function with the loop uncompiled, and compile each layer by
itself: no graph ends there.)
"""

from __future__ import annotations

import linecache
from typing import Any

from torch import fx

from .passes.reasons import FallbackReason, hint_for, is_users


def break_behind(gm: fx.GraphModule) -> FallbackReason | None:
    """What made Dynamo end this graph before the end of the function, if something did."""
    ended = getattr(gm, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return None
    frames = [f for f in ended.user_stack if is_users(f.filename)] or list(ended.user_stack)
    path, line = (frames[-1].filename, frames[-1].lineno) if frames else (None, None)
    return _reason(ended.reason, path, line)


def all_breaks(ended: list[FallbackReason], frames: list[Any]) -> list[FallbackReason]:
    """Breaks of one run: `ended`, from its graphs, and what Dynamo's metrics of its frames add.

    Metrics give the line where Dynamo gave up a frame. Where it compiled a frame in parts, they give the reason alone,
    of the innermost frame last; its place is the function then.
    """
    found = ended + [
        _reason(frame.fail_reason, frame.fail_user_frame_filename, frame.fail_user_frame_lineno)
        for frame in frames
        if frame.fail_type is not None
    ]
    if not found:  # frames are traced again for other reasons, too
        return []
    for frame in reversed(frames):
        for message in frame.restart_reasons or ():
            reason = _reason(message, frame.co_filename, frame.co_firstlineno)
            is_new = all(reason.explanation != other.explanation for other in found)
            found += [reason] if is_new and "Unknown" not in reason.explanation else []
    return found


def _reason(message: Any, path: str | None, line: int | None) -> FallbackReason:
    """Of Dynamo's message the first line: the others are for those who know Dynamo."""
    text = next(iter(str(message).strip().splitlines()), "")
    text = "it can't trace what this calls" if text == "step_unsupported" else text
    code = linecache.getline(path, line).strip() if path and line else ""
    source = f"{path}:{line}" + (f": {code}" if code else "") if path and line else ""
    hint = ""
    if "optimize_ddp" in text:
        text = "it cuts graphs where DistributedDataParallel's buckets of gradients end"
        hint = "set torch._dynamo.config.optimize_ddp = False before the first step"
    hint = hint_for("graph_break", hint, source)
    return FallbackReason("graph_break", "", "", f"Dynamo stops tracing: {text}", hint, source)
