"""`pgcompile bench --calibrate`: random batches, dense and packed, and the seconds per unit of work that explain them.

A linear model of what is counted (`cost.Speed`), fitted by least squares to relative errors, without negative terms.
Other random batches then show how often it names the faster side.
"""

from __future__ import annotations

import functools
import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..backend import pgcompile
from ..cost import Speed, Work, why_not_worth_it
from ..optimize import with_own_code
from ..report import BatchReport, GraphReport
from ..stats import stats
from .cases import Case, build
from .contestants import Setup
from .measure import Runner, timed
from .models import Model, token_logprobs
from .results import Row

FITTED = 40
LAYERS = 2
MOST_TOKENS = 1536
BASELINE = "inductor"
# Packed whatever the cost model says, but with the branches that it would keep.
OPTIONS: dict[str, Any] = {"min_saving": 1e-12}
# Closer than this, either side is as good: repeated measurements differ by as much.
TIE = 0.02


@dataclass(frozen=True)
class Sample:
    """One batch: what was counted, and the medians of what was measured, in seconds."""

    dense_work: Work
    packed_work: Work
    dense: float
    packed: float

    @property
    def is_tie(self) -> bool:
        return abs(self.packed / self.dense - 1) <= TIE

    def is_right(self, speed: Speed | None) -> bool:
        """Does the cost model name the faster side, or is it a tie?"""
        packs = why_not_worth_it(self.dense_work, self.packed_work, None, speed) is None
        return self.is_tie or packs == (self.packed < self.dense)


def random_cases(scale: int, seed: int) -> Iterator[Case]:
    """Groups, trees, and rows that share next to nothing, of up to MOST_TOKENS times `scale`, without end."""
    chance = random.Random(seed)
    for number in itertools.count():
        name = f"random {number}"
        answer, prompt = chance.randint(8, 160) * scale, int(2 ** chance.uniform(1, 9)) * scale
        shortest = chance.randint(max(2, answer // 4), answer) if chance.random() < 0.5 else None
        if chance.random() < 0.2:
            turn = chance.randint(8, 64) * scale
            tree = chance.choice([(2, 2), (3, 2), (4, 2), (2, 4), (3, 3)])
            case = Case(name, batch=chance.randint(1, 2), tree=tree, turn=(turn // 2, turn), masked=True)
        else:
            group, batch = chance.choice([2, 2, 3, 4, 8]), chance.choice([1, 1, 2, 4, 8])
            case = Case(name, prompt, answer, group, batch, shortest, masked=shortest is not None)
        if 128 * scale <= case.most_rows * case.most_tokens <= MOST_TOKENS * scale:
            yield case


def sample(
    cases: Iterable[Case], count: int, model: Model, repeats: int, tell: Callable[[int], None]
) -> list[Sample]:
    """Measure `count` batches, dense and packed in turns; those that share nothing are skipped.

    Args:
        tell: gets the number of batches that are done.

    Raises:
        ValueError: if the model, or most of these batches, aren't packed.
    """
    device = next(model.module.parameters()).device
    reports: list[BatchReport | GraphReport] = []
    backend = functools.partial(pgcompile, options=OPTIONS, collector=reports.append)
    # dynamic: one artifact for all batches
    dense = torch.compile(with_own_code(token_logprobs), dynamic=True, backend=BASELINE)
    packed = torch.compile(with_own_code(token_logprobs), dynamic=True, backend=backend)
    samples: list[Sample] = []
    why = ""
    for number, case in enumerate(itertools.islice(cases, 4 * count)):
        if len(samples) == count:
            break
        batch = build(case, model.vocab_size, seed=number).to(device)
        mask = {"attention_mask": batch.mask.long()} if model.has_mask else {}
        seconds: dict[str, list[float]] = {"dense": [], "packed": []}
        for repeat in range(repeats + 1):
            # each time a tree that nobody knows
            inputs = model, batch.other_ids(repeat, model.vocab_size), batch.answer_positions
            for name, run in (
                ("dense", functools.partial(dense, *inputs)),
                ("packed", functools.partial(packed, *inputs, **mask)),
            ):
                planning = stats().plan_seconds
                runner = Runner(Row(name), Setup(model, batch, True, "step", {}), run)
                elapsed = timed(runner, model, "step")
                if repeat:  # the first call compiles, or meets cold caches
                    # a plan is made before anything is decided, and either way
                    seconds[name].append(elapsed - (stats().plan_seconds - planning))
        report = reports[-1]
        if isinstance(report, GraphReport):
            raise ValueError(f"the model isn't packed: {'; '.join(map(str, report.fallbacks))}")
        why = report.why
        if report.decision == "packed":
            samples.append(Sample(*report.work, *map(statistics.median, seconds.values())))
        tell(len(samples))
    if len(samples) < count:
        raise ValueError(f"only {len(samples)} of {4 * count} batches were packed {why}")
    return samples


def fit(samples: Sequence[Sample]) -> Speed:
    """The speed that explains the samples best.

    Raises:
        ValueError: for fewer samples than there are terms.
    """
    # what both sides do whatever the batch is a term of its own, which doesn't matter for who is faster
    rows = [[s.dense_work.linear, s.dense_work.attention, 0, 0, 0, 0, 1] for s in samples]
    rows += [
        [w.linear, 0, w.attention, w.segments, w.unpacked, 1, 1] for w in (s.packed_work for s in samples)
    ]
    terms = np.array(rows, dtype=np.float64)
    seconds = np.array([s.dense for s in samples] + [s.packed for s in samples])
    if len(samples) < terms.shape[1]:
        raise ValueError(f"{len(samples)} batches can't fit {terms.shape[1]} terms")
    found = non_negative_least_squares(terms / seconds[:, None], np.ones_like(seconds))
    return Speed(*map(float, found[:-1]))


def non_negative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x >= 0 with a @ x near b: the most negative entry becomes 0 until none is left."""
    scale = np.maximum(np.abs(a).max(0), np.finfo(np.float64).tiny)
    kept = list(range(a.shape[1]))
    while True:
        x = np.zeros(a.shape[1])
        x[kept] = np.linalg.lstsq(a[:, kept] / scale[kept], b, rcond=None)[0]
        if x.min() >= 0:
            return x / scale
        kept.remove(int(x.argmin()))


def share_right(samples: Sequence[Sample], speed: Speed | None) -> float:
    """How often the cost model names the faster side, 0 to 1; with `speed`, or without."""
    return sum(s.is_right(speed) for s in samples) / len(samples)


def scale_of(device: torch.device) -> int:
    """A GPU needs longer batches than a CPU to show its speed."""
    return 8 if device.type == "cuda" else 1
