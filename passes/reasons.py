"""Why something is not packed: a closed list of kinds, and the value that carries one.

A failure is a value, not an exception: rules return `Unsupported`, the walk collects them all, and the report
turns each into a `FallbackReason` that a user can act on (docs/fallbacks.md has a section per kind).
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from torch import fx

KINDS: dict[str, str] = {
    "not_causal": "attention lets a token see later tokens",
    "mask_not_understood": "the attention mask isn't a formula of causal, window, padding and same-value terms",
    "finite_mask": "the mask adds a finite number where it means minus infinity",
    "token_mixing": "an operation mixes the tokens of a row and isn't causal attention",
    "row_mixing": "an operation mixes different rows of the batch",
    "unknown_op": "no rule is known for this operation on tokens",
    "randomness": "an operation draws random numbers for each token (dropout, jitter)",
    "autograd_function": "a custom autograd function whose backward may not be linear",
    "hook": "a hook reads or changes a gradient",
    "mutation": "a tensor that outlives the operation is written in place",
    "embedding_gradient": "the embedding's gradient depends on how often a token occurs",
    "ambiguous_seed": "it isn't clear which dims are rows and positions",
    "no_token_stream": "nothing in the graph is computed from tokens",
    "nothing_to_pack": "the graph has no attention",
    "size_as_number": "a size of the batch is used as a number",
    "row_layout": "rows or positions end up in dims that can't be packed",
    "kv_cache": "the call continues a non-empty key-value cache",
    "graph_break": "Dynamo ended the graph before the end of the function",
    "trace_failed": "the graph could not be traced to ATen",
    "verification_failed": "the packed graph's shapes differ from the predicted ones",
    "internal_error": "a pass raised an exception",
    "engine_error": "the packed graph failed while it ran or compiled",
    "fully_masked_query": "a real token is masked from everything, itself included",
    "padding_read": "padding is read outside of attention",
    "not_worth_it": "packing would save too little",
    "empty_batch": "the batch has no token",
    "pass_disabled": "a pass that packing needs is disabled",
}


# What a user can do, where the one who found it has nothing better to say.
HINTS: dict[str, str] = {
    "not_causal": "pass is_causal=True or a causal mask",
    "mask_not_understood": "build it from comparisons of positions and from [N, S] columns; see docs/fallbacks.md",
    "finite_mask": "mask with torch.finfo(dtype).min or -inf",
    "token_mixing": "move it behind the last attention, where tokens are unpacked, or out of the compiled region",
    "row_mixing": "move it behind the last attention, where tokens are unpacked, or out of the compiled region",
    "unknown_op": "docs/rules.md tells how to add a rule",
    "randomness": 'call model.eval(), set its probability to 0, or pass dropout="shared"',
    "autograd_function": "use autograd's own derivative, or move it out of the compiled region",
    "hook": "register the hook outside of the compiled region",
    "mutation": "write it out of place",
    "embedding_gradient": "unset scale_grad_by_freq, sparse and max_norm",
    "ambiguous_seed": "compile the parts that take one batch of tokens each",
    "no_token_stream": "compile a larger part of the model, from the embedding on",
    "nothing_to_pack": "if it is a part of a model, compile a larger part, from the embedding on",
    "size_as_number": "use a constant, or compute it outside of the compiled region",
    "row_layout": "keep rows and positions in dims of their own",
    "kv_cache": "in training pass use_cache=False; in generation this is as it should be",
    "graph_break": "move what breaks it out of the compiled region; TORCH_LOGS=graph_breaks tells more",
    "trace_failed": "run this part outside of the compiled region",
    "verification_failed": "please report it, with the model",
    "internal_error": "please report it, with the model",
    "engine_error": "please report it, with the model",
    "fully_masked_query": "let every token attend to itself",
    "padding_read": "multiply by the mask before reducing, or use ignore_index labels on padding",
    "not_worth_it": "batch rows that share prefixes together; pad on the right, or pass position_ids",
    "empty_batch": "",
    "pass_disabled": "remove it from disable_passes",
}


# Running these as written loses nothing: no warning, and no error with strict=True.
HARMLESS = frozenset({"nothing_to_pack", "kv_cache", "not_worth_it", "empty_batch"})


# Attention by kernels that only their packages' own code can call, in the name of an operation or of a file.
_OTHER_ATTENTION = re.compile("flash_att|flex_att")


def hint_for(kind: str, hint: str, *places: str) -> str:
    """What to do about a reason: `hint`, or what its kind says; at `places` of other attention, to leave that."""
    names = [place.partition(":")[0].rpartition("/")[2] for place in places]  # of files without folders
    if kind not in HARMLESS and any(map(_OTHER_ATTENTION.search, names)):
        return 'use scaled_dot_product_attention; in transformers, load the model with attn_implementation="sdpa"'
    return hint or HINTS[kind]


@dataclass(frozen=True)
class Unsupported:
    """What a rule or a match returns when it can't prove its case.

    Args:
        kind: one of `KINDS`.
        node: the FX node in question, or None.
        explanation: what was found, in one sentence.
        hint: what the user can do about it, or "".
        operand: the argument of `node` that it is about, if one is.
    """

    kind: str
    node: fx.Node | None
    explanation: str
    hint: str = ""
    operand: fx.Node | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown fallback kind {self.kind!r}; known: {', '.join(sorted(KINDS))}")

    def at(self, node: fx.Node) -> Unsupported:
        """The same reason, at `node` if it has no node yet."""
        return self if self.node is not None else replace(self, node=node)


@dataclass(frozen=True)
class FallbackReason:
    """A reason as the user sees it: plain strings, safe to keep after the graph is gone.

    Args:
        kind: one of `KINDS`; docs/fallbacks.md has a section for each.
        node: name of the FX node.
        target: the operation, e.g. `aten.roll.default`.
        explanation: what was found.
        hint: what to do about it.
        source: `file:line in function` with the line of the user's code, or "".
    """

    kind: str
    node: str
    target: str
    explanation: str
    hint: str
    source: str

    @classmethod
    def of(cls, reason: Unsupported) -> FallbackReason:
        node = reason.node
        name, target, source = (
            ("", "", "") if node is None else (node.name, str(node.target), source_line(node))
        )
        hint = hint_for(reason.kind, reason.hint, target, source)
        return cls(reason.kind, name, target, reason.explanation, hint, source)

    def __str__(self) -> str:
        where = f" at {self.source}" if self.source else ""
        op = f" ({self.target})" if self.target else ""
        hint = f" Hint: {self.hint}" if self.hint else ""
        return f"{self.kind}{op}{where}: {self.explanation}{hint}"


# Frames that aren't the user's: torch's, and pgcompile's own.
_NOT_USERS = tuple(
    str(Path(str(sys.modules[name].__file__)).parent) for name in ("torch", __name__.partition(".")[0])
)


def source_line(node: fx.Node) -> str:
    """`file:line in function: code` of the innermost frame outside of torch and pgcompile that made `node`, or ""."""
    trace = (node.meta.get("stack_trace") or "").strip()
    frames = [part for part in trace.split('File "') if part.strip()]
    if not frames:
        return ""
    users = [frame for frame in frames if is_users(frame)]
    head, *code = (users or frames)[-1].splitlines()
    path, _, rest = head.partition('", line ')
    line, _, function = rest.partition(", in ")
    text = code[0].strip() if code else ""
    return f"{path}:{line} in {function}" + (f": {text}" if text else "")


def is_users(path: str) -> bool:
    """Is a file neither torch's nor pgcompile's own?"""
    return not path.startswith(_NOT_USERS)
