"""Batches to measure: what is in them, and the grids that name many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Rows that share prefixes: `batch` prompts with `group` answers each, or `batch` trees of dialogues.

    Args:
        prompt, answer: tokens. Without a prompt, rows share nothing.
        shortest: answers have from here to `answer` tokens, padded on the right; None: all have `answer`.
        masked: pgcompile is given the attention mask, and so knows what is padding.
        tree: turns of a dialogue and continuations of each turn; rows are all dialogues, root to leaf.
        turn: fewest and most tokens of a turn.
        phase: "forward" where this case is about that; None for what the user asked for.
        published: what somebody else reported for this shape.
        assumed: what of the shape they didn't report.
    """

    name: str
    prompt: int = 0
    answer: int = 0
    group: int = 1
    batch: int = 1
    shortest: int | None = None
    masked: bool = False
    tree: tuple[int, int] | None = None
    turn: tuple[int, int] = (0, 0)
    phase: str | None = None
    published: str = ""
    assumed: str = ""

    @property
    def most_tokens(self) -> int:
        """Of a row."""
        return self.tree[0] * self.turn[1] if self.tree else self.prompt + self.answer

    @property
    def fewest_tokens(self) -> int:
        """Of a row, at the least."""
        return self.tree[0] * self.turn[0] if self.tree else self.prompt + (self.shortest or self.answer)

    @property
    def most_rows(self) -> int:
        return self.batch * (self.tree[1] ** (self.tree[0] - 1) if self.tree else self.group)


@dataclass(frozen=True)
class Batch:
    """A case's tensors. N rows, S positions; K positions from the first answer token of any row to the end.

    Args:
        ids: int64 [N, S], 0 at padding.
        mask: bool [N, S], which tokens aren't padding; it is on the right.
        class_of: int64 [N, S], which of the T distinct prefixes a token ends, in depth-first preorder; -1 at padding.
        weights: float32 [N, K], what each answer token's log-probability counts in the loss: the row's advantage over
            the number of answer tokens; 0 elsewhere.
        prompt: tokens of each group's prompt, if the case is made of groups.
    """

    ids: Tensor
    mask: Tensor
    class_of: Tensor
    weights: Tensor
    prompt: int | None = None

    @property
    def answer_positions(self) -> int:
        """K."""
        return self.weights.shape[1]

    @property
    def labels(self) -> Tensor:
        """int64 [N, K]."""
        return self.ids[:, -self.answer_positions :]

    @property
    def lengths(self) -> Tensor:
        """int64 [N], tokens of each row."""
        return self.mask.sum(1)

    @cached_property
    def predictors(self) -> Tensor:
        """int64 [N, K], the class whose logits predict each answer token; 0 where the weight is."""
        k = self.answer_positions
        return self.class_of[:, -k - 1 : -1].masked_fill(self.weights == 0, 0)

    @cached_property
    def depths(self) -> Tensor:
        """int64 [T], tokens before each class in its rows."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        depths = self.ids.new_zeros(int(self.class_of.max()) + 1)
        return depths.index_put((self.class_of[self.mask],), positions[self.mask])

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Positions of the batch, those that aren't padding, and distinct ones."""
        return {"dense": self.ids.numel(), "valid": int(self.mask.sum()), "distinct": len(self.depths)}

    @cached_property
    def pairs(self) -> dict[str, int]:
        """Query-key pairs of causal attention over each of these."""
        (n, s), lengths = self.ids.shape, self.lengths
        valid = int((lengths * (lengths + 1) // 2).sum())
        return {"dense": n * s * (s + 1) // 2, "valid": valid, "distinct": int((self.depths + 1).sum())}

    @cached_property
    def predictions(self) -> dict[str, int]:
        """Tokens of each kind whose logits the loss needs."""
        used = self.weights != 0
        distinct = len(self.predictors[used].unique())
        return {"dense": self.weights.numel(), "valid": int(used.sum()), "distinct": distinct}

    def other_ids(self, number: int, vocab_size: int) -> Tensor:
        """int64 [N, S], for each `number` other tokens with the same common prefixes."""
        return ((self.ids + number) % (vocab_size - 1) + 1) * self.mask

    def distinct(self) -> Batch:
        """About as many tokens and predictions as are distinct, in rows no longer than these, sharing nothing."""
        tokens, predictions = self.tokens["distinct"], self.predictions["distinct"]
        rows = -(-tokens // self.ids.shape[1])
        length = tokens // rows
        ids = self.ids.new_zeros(tokens).index_put((self.class_of[self.mask],), self.ids[self.mask])
        ids = ids[: rows * length].view(rows, length)
        answers = max(1, min(predictions // rows, length - 1))
        weights = self.weights.new_full((rows, answers), 1 / (rows * answers))
        classes = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        return Batch(ids, torch.ones_like(self.mask[:1, :1]).expand_as(ids), classes, weights)

    def to(self, device: torch.device) -> Batch:
        ids, mask, class_of, weights = (
            t.to(device) for t in (self.ids, self.mask, self.class_of, self.weights)
        )
        return Batch(ids, mask, class_of, weights, self.prompt)


def build(case: Case, vocab_size: int, seed: int = 0) -> Batch:
    """Random tokens; continuations of one prefix differ in their first token, so that the tree is the case's own."""
    generator = torch.Generator().manual_seed(seed)
    rows = list(_rows(case, generator))
    segments: dict[tuple[int, ...], Tensor] = {}
    classes: dict[tuple[int, ...], Tensor] = {}
    seen = 0
    for path, length in (segment for row in rows for segment in row):
        if path not in segments:
            tokens = torch.randint(1, vocab_size, (length,), generator=generator)
            tokens[0] = 1 + path[-1] % (vocab_size - 1)
            segments[path], classes[path] = tokens, torch.arange(seen, seen + length)
            seen += length
    lengths = [sum(length for _, length in row) for row in rows]
    # a row's first token is predicted by nothing
    starts = [row[0][1] if len(row) > 1 else 1 for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    class_of = torch.full_like(ids, -1)
    for n, row in enumerate(rows):
        ids[n, : lengths[n]] = torch.cat([segments[path] for path, _ in row])
        class_of[n, : lengths[n]] = torch.cat([classes[path] for path, _ in row])
    mask = class_of >= 0
    answers = mask & (torch.arange(max(lengths)) >= torch.tensor(starts)[:, None])
    advantages = torch.randn(len(rows), generator=generator)
    weights = (answers * advantages[:, None] / answers.sum())[:, min(starts) :]
    return Batch(ids, mask, class_of, weights.contiguous(), None if case.tree else case.prompt)


Segment = tuple[tuple[int, ...], int]  # which child of which of the root's children, and so on; tokens


def _rows(case: Case, generator: torch.Generator) -> Iterator[list[Segment]]:
    """Rows as segments, depth first."""

    def draw(fewest: int, most: int) -> int:
        return int(torch.randint(fewest, most + 1, (), generator=generator))

    def dialogues(
        before: list[Segment], path: tuple[int, ...], turns: int, branch: int
    ) -> Iterator[list[Segment]]:
        row = [*before, (path, draw(*case.turn))]
        if turns == 1:
            yield row
        else:
            for child in range(branch):
                yield from dialogues(row, (*path, child), turns - 1, branch)

    for b in range(case.batch):
        if case.tree:
            yield from dialogues([], (b,), *case.tree)
            continue
        for g in range(case.group):
            length = case.answer if case.shortest is None else draw(case.shortest, case.answer)
            prompt = [((b,), case.prompt)] if case.prompt else []
            yield [*prompt, ((b, g) if case.prompt else (b * case.group + g,), length)]


# -- grids -----------------------------------------------------------------------------------------------------------


def group_case(prompt: int, answer: int, group: int, batch: int = 1) -> Case:
    more = f" B={batch}" if batch > 1 else ""
    return Case(f"P={prompt} R={answer} G={group}{more}", prompt, answer, group, batch)


def tree_case(depth: int, branch: int, fewest: int, most: int, batch: int = 1) -> Case:
    turn = str(fewest) if fewest == most else f"{fewest}-{most}"
    more = f" B={batch}" if batch > 1 else ""
    name = f"tree {depth},{branch},{turn}{more}"
    return Case(name, batch=batch, tree=(depth, branch), turn=(fewest, most), masked=fewest != most)


def ratios(divisor: int) -> list[Case]:
    """The shapes of the figures in arXiv 2506.05433: prompts of three lengths, P/R from 1 to 32, groups of 2 to 16."""
    return [
        group_case(prompt // divisor, prompt // divisor // ratio, group)
        for prompt in (4096, 8192, 16384)
        for ratio in (1, 2, 4, 8, 16, 32)
        for group in (2, 4, 8, 16)
    ]


def named(divisor: int) -> list[Case]:
    """What training batches look like apart from equal answers to one prompt."""

    def of(tokens: int) -> int:
        return tokens // divisor

    ragged = Case("ragged answers", of(4096), of(1024), group=8, shortest=of(64), masked=True)
    return [
        ragged,
        replace(ragged, name="ragged answers, no mask", masked=False),
        Case("agents", tree=(4, 3), turn=(of(200), of(800)), masked=True),
        Case("DPO pairs", of(1024), of(512), group=2, batch=8, shortest=of(128), masked=True),
        Case("scoring", of(16384), of(64), group=8, phase="forward"),
        Case("nothing shared", answer=of(2048), group=8),
        Case("nothing shared, padded", answer=of(2048), group=8, shortest=of(512), masked=True),
    ]


def published() -> list[Case]:
    """Shapes that others reported, with their speed-up of the update; their models and machines differ from yours."""

    def of(prompt: int, answer: int, group: int, text: str, assumed: str = "") -> Case:
        who = text.split()[0]
        return Case(
            f"{who} P={prompt} R={answer} G={group}", prompt, answer, group, published=text, assumed=assumed
        )

    return [
        of(4096, 1024, 4, "verl 1.26×", "R"),  # Qwen3-4B, 4 × H800
        of(8192, 1024, 4, "verl 1.70×", "R"),
        of(2048, 256, 8, "Unsloth 2.55×", "P"),  # Qwen3-4B with LoRA
        of(16384, 64, 2, "flash-preference 1.88×"),  # Qwen2.5-7B, A800
        of(8192, 1024, 2, "flash-preference 1.67×"),
        of(1024, 1024, 2, "flash-preference 1.26×"),
        of(7168, 1024, 32, "DualKV 1.63–2.09×", "P, R"),  # 8K together; Qwen3-8B, 8 × H100
        of(16384, 64, 8, "castform 7.5×", "G"),  # a hybrid of 4B
        of(16384, 128, 8, "castform 7.3×", "G"),
        of(16384, 1024, 8, "castform 5.4×", "G"),
        of(8192, 4096, 8, "castform 1.7×", "G"),
    ]


# On a CPU an eighth of the length takes seconds instead of minutes.
GRIDS: dict[str, list[Case]] = {
    "paper": ratios(1),
    "cpu": ratios(8),
    "cases": named(1),
    "cases-cpu": named(8),
    "published": published(),
}
