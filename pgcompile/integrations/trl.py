"""TRL: micro-batches that keep the answers to a prompt together.

`GRPOTrainer` and `RLOOTrainer` shuffle each generation batch before they cut it into micro-batches, which leaves little
to share. Nothing of the loss depends on which row goes into which micro-batch (but for `loss_type="bnpo"`, where it
does under TRL's own shuffle too), so the rows may as well be cut where groups end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..batching import shuffle_groups
from ..report import log

T = TypeVar("T")
Chunk = dict[str, Any]


def group_preserving(trainer_class: type[T]) -> type[T]:
    """The same trainer, with generation batches cut into micro-batches so that groups stay together.

    Groups, and the rows of a group, still come in random order, by the trainer's `args.seed`; torch's random state is
    what it is without this.

    Args:
        trainer_class: `trl.GRPOTrainer`, `trl.RLOOTrainer` or a subclass.

    Raises:
        TypeError: a trainer that doesn't cut generation batches.

    Examples:
        >>> trainer = group_preserving(GRPOTrainer)(model, reward_funcs=..., train_dataset=...)
    """
    prepare = getattr(trainer_class, "_prepare_inputs", None)
    if prepare is None or not hasattr(trainer_class, "_generate_and_score_completions"):
        name = getattr(trainer_class, "__name__", trainer_class)
        raise TypeError(
            f"group_preserving is for trainers that generate, GRPOTrainer or RLOOTrainer, not {name}"
        )
    body = {"_prepare_inputs": regrouping(prepare), "__module__": trainer_class.__module__}
    return type(trainer_class.__name__, (trainer_class,), body)


def regrouping(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a trainer's `_prepare_inputs`: whenever it has cut a generation batch, that is cut anew."""

    @functools.wraps(prepare)
    def wrapped(self: Any, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = prepare(self, generation_batch)
        chunks = self._buffered_inputs
        if chunks is before or chunks is None:
            return inputs  # evaluation, or a micro-batch of what was cut before
        at = next(i for i, chunk in enumerate(chunks) if chunk is inputs)
        self._buffered_inputs = regroup(chunks, (self.args.seed, self._step))
        return self._buffered_inputs[at]

    return wrapped


def regroup(chunks: Sequence[Chunk], seed: Any) -> list[Chunk]:
    """Cut the rows of all micro-batches anew, in a random order that keeps groups together.

    Args:
        chunks: micro-batches of equally many rows: tensors and lists by row, numbers and None for all rows.
        seed: of the order; see `shuffle_groups`.

    Returns:
        As many micro-batches of as many rows; `chunks` themselves if they hold something that isn't by row (tiles of
        images, say).
    """
    rows = len(chunks[0]["completion_ids"])
    merged = {key: _merge([chunk[key] for chunk in chunks]) for key in chunks[0]}
    strange = [k for chunk in chunks for k, v in chunk.items() if _is_by_row(v) and len(v) != rows]
    if strange or any(n != 1 for n in merged.get("num_images") or ()):
        log.info("pgcompile: micro-batches aren't regrouped: %s isn't by row", ", ".join(strange) or "images")
        return list(chunks)
    ids, mask = (
        torch.cat([merged[f"prompt_{name}"], merged[f"completion_{name}"]], 1) for name in ("ids", "mask")
    )
    order = shuffle_groups(ids, attention_mask=mask, seed=seed)
    parts = [order[start : start + rows] for start in range(0, len(order), rows)]
    return [{key: _take(value, part) for key, value in merged.items()} for part in parts]


def _is_by_row(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)


def _merge(values: list[Any]) -> Any:
    if not _is_by_row(values[0]):
        return values[0]
    return (
        torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]
    )


def _take(value: Any, rows: list[int]) -> Any:
    if not _is_by_row(value):
        return value
    return value[rows] if isinstance(value, Tensor) else [value[n] for n in rows]
