"""Prefix trees of packed tokens for tests, built from token ids by a dictionary of prefixes, independently of
pgcompile.prefix_tree.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Tree:
    """Packed tokens in depth-first preorder: the parent of each (-1 for roots) and what the op takes."""

    parent: list[int]
    subtree_end: Tensor
    depth: Tensor
    segments: Tensor

    @property
    def tokens(self) -> int:
        return len(self.parent)

    def path(self, token: int) -> list[int]:
        """The token's row up to itself, root first."""
        return [token] if self.parent[token] < 0 else [*self.path(self.parent[token]), token]

    def visible(self) -> Tensor:
        """bool [T, T]: the second token is on the path of the first."""
        seen = torch.zeros(self.tokens, self.tokens, dtype=torch.bool)
        for token in range(self.tokens):
            seen[token, self.path(token)] = True
        return seen


def tree_of_rows(rows: list[list[int]]) -> Tree:
    """One class per distinct prefix of the rows."""
    children: dict[tuple[int, ...], list[tuple[int, ...]]] = {(): []}
    for row in rows:
        for i in range(len(row)):
            prefix = tuple(row[: i + 1])
            if prefix not in children:
                children[prefix] = []
                children[prefix[:-1]].append(prefix)
    order: list[tuple[int, ...]] = []
    pending = children[()][::-1]
    while pending:
        order.append(pending.pop())
        pending += children[order[-1]][::-1]
    number = {prefix: i for i, prefix in enumerate(order)}
    ends = [max(j for j, other in enumerate(order) if other[: len(p)] == p) + 1 for p in order]
    # A class begins a segment unless it is the only child of another class.
    begins = [i for i, p in enumerate(order) if len(p) == 1 or len(children[p[:-1]]) > 1]
    segment_of = [sum(b <= i for b in begins) - 1 for i in range(len(order))]
    stops = [*begins[1:], len(order)]
    parent = [number.get(p[:-1], -1) for p in order]
    segments = [
        [a, b, ends[a], len(order[a]) - 1, segment_of[parent[a]] if parent[a] >= 0 else -1]
        for a, b in zip(begins, stops, strict=True)
    ]
    depth = torch.tensor([len(p) - 1 for p in order])
    return Tree(parent, torch.tensor(ends), depth, torch.tensor(segments).view(-1, 5))


def random_tree(seed: int, rows: int = 9, length: int = 8) -> Tree:
    """Rows that continue a prefix of an earlier row, or start afresh."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    ids = [[0] * length]
    for n in range(1, rows):
        kept = ids[draw(n)][: draw(length)]
        ids.append(kept + [n] * (1 + draw(length)))
    return tree_of_rows(ids)
