"""Who computes a case: dense in eager and by inductor, pgcompile, and the peers of peers.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backend import pgcompile
from ..optimize import with_own_code
from ..report import BatchReport, GraphReport
from . import peers
from .cases import Batch
from .models import Model, token_logprobs
from .results import OURS

Run = Callable[[], Tensor]


@dataclass
class Setup:
    """What a contestant is made from; `reports` gets what pgcompile says."""

    model: Model
    batch: Batch
    masked: bool
    phase: str
    options: Mapping[str, Any]
    reports: list[GraphReport | BatchReport] = field(default_factory=list)


@dataclass(frozen=True)
class Contestant:
    """One way to compute the log-probabilities of a batch's answers.

    Args:
        prepare: makes the call that is timed, () → [N, K]. What a data loader can do ahead is done here.
        why_not: why it can't run here, or None.
        is_dense: shares nothing: a baseline.
    """

    prepare: Callable[[Setup], Run]
    why_not: Callable[[Setup], str | None] = lambda setup: None
    is_dense: bool = False


def dense(setup: Setup) -> Run:
    """Eager. Padding is on the right, where causal attention doesn't look, so no mask is given and SDPA is fastest."""
    model, batch = setup.model, setup.batch
    return lambda: token_logprobs(model, batch.ids, batch.answer_positions)


def dense_compiled(setup: Setup) -> Run:
    """Inductor."""
    run = setup.model.compiled.setdefault("dense-compiled", torch.compile(with_own_code(token_logprobs)))
    model, batch = setup.model, setup.batch
    return lambda: run(model, batch.ids, batch.answer_positions)


def packed(setup: Setup) -> Run:
    """pgcompile on the dense batch, with the attention mask if the case gives one."""
    compiled = setup.model.compiled
    if OURS not in compiled:
        backend = functools.partial(pgcompile, options=setup.options, collector=setup.reports.append)
        compiled[OURS] = torch.compile(with_own_code(token_logprobs), backend=backend), setup.reports
    run, setup.reports = compiled[OURS]
    setup.reports[:] = [report for report in setup.reports if isinstance(report, GraphReport)]
    model, batch = setup.model, setup.batch
    mask = {"attention_mask": batch.mask.long()} if setup.masked and model.has_mask else {}
    return lambda: run(model, batch.ids, batch.answer_positions, **mask)


def _peer(prepare: Callable[..., Run], why_not: Callable[..., str | None]) -> Contestant:
    return Contestant(
        lambda setup: prepare(setup.model, setup.batch),
        lambda setup: why_not(setup.model, setup.batch, setup.phase),
    )


CONTESTANTS: dict[str, Contestant] = {
    "dense": Contestant(dense, is_dense=True),
    "dense-compiled": Contestant(dense_compiled, is_dense=True),
    "flex-tree": _peer(peers.flex_tree, peers.why_no_flex_tree),
    "prefix-grouper": _peer(peers.prefix_grouper, peers.why_no_prefix_grouper),
    "trl-tree": _peer(peers.trl_tree, peers.why_no_trl_tree),
    OURS: Contestant(packed),
}
