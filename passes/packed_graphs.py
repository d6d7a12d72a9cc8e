"""What the compiler hands to the runtime: four graphs, and how the inputs of each are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .attention_match import AttentionMatch
from .layout import Dim, Selection, TokenLayout
from .padding import Factor


@dataclass(frozen=True)
class Input:
    """One input of the packed graph and how the runtime makes it.

    Args:
        kind: "argument" (the graph's own argument `index`), "value" (prologue result `index`, the same for all
            tokens), "column" (prologue result `index`, packed by `dims`), "request_index" and "request_column" (of
            request `index`), or a tensor of the plan ("subtree_end", "depth", "segments", "positions", "scored",
            "hides" of the set of mask columns `index`).
        index: which argument, prologue result, request, data mask or set of mask columns.
        dims: for columns, what their dims are.
    """

    kind: str
    index: int = -1
    dims: tuple[Dim, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where a head's input comes from: result `index` of the trunk, or input `index` of the packed graph."""

    kind: str  # "trunk" | "input"
    index: int
    token_dim: int | None  # where its tokens are; None if it has none
    dtype: torch.dtype


@dataclass(frozen=True)
class HeadOutput:
    """Result of the head: the packed graph's output `index`, which has its tokens in a dim, or entries of a request.

    Args:
        request: which of the head's requests the entries [M, K] are for.
    """

    index: int
    token_dim: int = -1
    request: int | None = None


@dataclass
class Head:
    """A packed graph in two parts.

    Args:
        trunk: `(*inputs of the packed graph) -> (*packed outputs that it has, *values for the head)`.
        trunk_outputs: which output of the packed graph each of the trunk's first results is.
        head: `(*inputs as in `sources`, *index [M] and column [M, K] of each request) -> (*results as in `outputs`)`,
            for any number of tokens.
        requests: for each request, which of the packed graph's inputs its index and column are.
        token_bytes: what the results of the widest layers take for each token, in the widest dtype behind them.
        recomputed: operations that backward computes again, by name.
        is_scored: its tokens are the scored ones.
    """

    trunk: fx.GraphModule
    trunk_outputs: list[int]
    head: fx.GraphModule
    sources: list[Source]
    outputs: list[HeadOutput]
    requests: list[tuple[int, int]]
    token_bytes: int
    recomputed: list[str]
    is_scored: bool


@dataclass(frozen=True)
class MaskColumns:
    """What an attention's mask reads besides the order of tokens.

    Args:
        key_valid: prologue results that say which keys are valid (-1 - i for data mask i).
        same_value: prologue results that are equal where a query may see a key.
    """

    key_valid: tuple[int, ...]
    same_value: tuple[int, ...]


@dataclass
class PackedGraphs:
    """What the compiler hands to the runtime.

    Args:
        prologue: `(*arguments) -> tuple` of prologue results, indexed below.
        packed: `(*inputs) -> tuple` of stream values, as `inputs` says.
        late: `(*arguments, *prologue results, *packed results, class_of) -> outputs`; `late_inputs` picks from these.
        requests: `(*arguments, *prologue results, class_of) -> [(index [M], column [M, K]), ...]`, the entries that the
            packed graph looks up, of as many values as `request_widths` says; `request_inputs` picks from these.
        keys: prologue results `(index, dims)` that tell token classes apart; see `docs/design.md`.
        position_is_key: the column index entered the stream (a table by position).
        mask_columns: the distinct sets of columns that attentions have.
        mask_of: for each attention, the index of its set.
        guards: groups of prologue results that switch padding off (`padding.py`).
        results: the prologue's results as nodes of the original graph.
        outputs: for each output, in the order of the original's leaves, the dims that its tokens are in, if it has any.
        to_zero: the outputs that the late graph computed, token by token: what they are at dropped tokens says nothing.
        head: the packed graph's head, if it can run in chunks.
        data_masks: masks to be checked at each call: prologue result, additive?, negated?
        biases: of scores, to be checked at each call: prologue result, its dims, what its numbers must be below.
        scored: the selections whose tokens are picked out of the packed ones (`scored.py`).
    """

    prologue: fx.GraphModule
    packed: fx.GraphModule
    late: fx.GraphModule
    inputs: list[Input]
    late_inputs: list[tuple[str, int]]
    requests: fx.GraphModule
    request_inputs: list[tuple[str, int]]
    request_widths: list[int]
    keys: list[tuple[int, tuple[Dim, ...]]]
    position_is_key: bool
    mask_columns: list[MaskColumns]
    mask_of: list[int]
    data_masks: list[tuple[int, bool, bool]]
    biases: list[tuple[int, tuple[Dim, ...], float]]
    guards: list[list[tuple[int, Factor]]]
    can_drop_padding: bool
    cuts: dict[Selection, tuple[Any, Any]]
    results: list[fx.Node]
    whole: Selection
    matches: list[AttentionMatch]
    outputs: list[TokenLayout | None]
    to_zero: list[int]
    scored: set[Selection]
    head: Head | None = None


@dataclass(frozen=True)
class ResultRef:
    """Stands for a prologue result among the arguments of a cut."""

    index: int
