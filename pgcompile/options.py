"""`Options`: everything a user can set, checked at once, with messages that name the valid choices."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .engines import ENGINES

CHOICES: dict[str, tuple[str, ...]] = {
    "inner": ("inductor", "aot_eager", "eager"),
    "fallback": ("eager", "inner"),
    "dropout": ("fallback", "shared"),
    "engine": ("auto", *ENGINES),
}


@dataclass(frozen=True)
class Options:
    """Options of the backend, as in `torch.compile(model, backend="pgcompile", options={...})`.

    Args:
        inner: compiler of the packed graph, and of the original when a batch runs dense: "inductor", "aot_eager" or
            "eager".
        inner_mode: a mode of torch.compile ("reduce-overhead", "max-autotune", ...) for inductor.
        fallback: how a graph runs that can't be packed: "eager", or "inner" for the inner compiler.
        strict: raise `FallbackError` instead of falling back.
        dropout: "fallback" refuses active dropout, "shared" lets the copies of a token share its draw
            (not inside of attention).
        engine: attention engine; "auto" takes the fastest that can run. One that can't is a ValueError when called.
        min_saving: pack a batch if it saves at least this share of the work, 0 to 1. 0 always packs and keeps every
            branch; None (default) asks for 0.1, or, on a calibrated device, for less time.
        check: compare the first `check` batches of each graph with the original, values and gradients.
        disable_passes: names of compiler passes to skip.
        dump_dir: folder for each pass's graph, before and after.

    Raises:
        ValueError: for an unknown key or value; it lists the valid ones and the nearest.
    """

    inner: str = "inductor"
    inner_mode: str | None = None
    fallback: str = "eager"
    strict: bool = False
    dropout: str = "fallback"
    engine: str = "auto"
    min_saving: float | None = None
    check: int = 0
    disable_passes: tuple[str, ...] = ()
    dump_dir: str | None = None

    def __new__(cls, *_: Any, **given: Any) -> Options:
        """An unknown key is a ValueError that names the nearest, as an unknown value is, not the usual TypeError."""
        valid = tuple(f.name for f in fields(cls))
        for key in given:
            _choose("option", key, valid)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            _choose(f"value for {name}", getattr(self, name), valid)
        if self.inner_mode is not None:
            from torch._inductor import list_mode_options

            _choose("value for inner_mode", self.inner_mode, tuple(list_mode_options()))
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict must be True or False, not {self.strict!r}")
        saving = self.min_saving
        if saving is not None and (
            isinstance(saving, bool) or not isinstance(saving, (int, float)) or not 0 <= saving <= 1
        ):
            raise ValueError(f"min_saving must be None or a number from 0 to 1, not {saving!r}")
        if isinstance(self.check, bool) or not isinstance(self.check, int) or self.check < 0:
            raise ValueError(f"check must be a number of batches, 0 or more, not {self.check!r}")
        if isinstance(self.disable_passes, str) or not isinstance(self.disable_passes, Iterable):
            raise ValueError(f"disable_passes must be a list of names, not {self.disable_passes!r}")
        if self.dump_dir is not None and not isinstance(self.dump_dir, (str, os.PathLike)):
            raise ValueError(f"dump_dir must be a path or None, not {self.dump_dir!r}")
        object.__setattr__(self, "disable_passes", tuple(self.disable_passes))
        from .passes import PASSES

        for name in self.disable_passes:
            _choose("pass", name, tuple(p.__name__ for p in PASSES))

    @classmethod
    def of(cls, options: Options | Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """From what torch.compile passes: a mapping or None, and its `mode`."""
        if isinstance(options, Options):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"options must be a mapping of names to values or an Options, not {options!r}")
        given = {str(key): value for key, value in (options or {}).items()}
        if mode is not None and mode != "default":
            given.setdefault("inner_mode", mode)
        return cls(**given)


def _choose(what: str, given: Any, valid: tuple[str, ...]) -> None:
    if given in valid:
        return
    near = difflib.get_close_matches(str(given), valid, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what}: {given!r}. Valid: {', '.join(map(repr, valid))}{hint}")
