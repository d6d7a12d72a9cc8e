"""Every language model of a process through pgcompile, without a line in its code: what `pgcompile run` switches on.

`nn.Module.__call__` asks each module for its `_compiled_call_impl`, a class attribute that is None unless
`module.compile` was called. Here it becomes a descriptor: the outermost module that is called with token ids and has an
embedding is compiled in place, at that call. Nothing else of modules changes; the attribute isn't pickled.
"""

from __future__ import annotations

import fnmatch
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch.utils._pytree import tree_leaves

from ..backend import pgcompile
from ..generation import keep_generation_out
from ..inner import compile_lock
from ..options import Options
from ..passes.reasons import HARMLESS
from ..report import BatchReport, GraphReport, log
from ..stats import stats

# They call the module that they wrap, with what they were given.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch._dynamo.OptimizedModule)


@dataclass
class ModelReport:
    """What became of one model: its graphs ("packed" or "eager"; not those with nothing to pack), and its calls.

    `reasons` says why graphs are eager; `decisions` counts the calls of packed graphs by outcome, `whys` the reasons of
    those that ran dense.
    """

    model: str
    graphs: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    decisions: dict[str, int] = field(default_factory=dict)
    whys: dict[str, int] = field(default_factory=dict)
    dense_tokens: int = 0
    valid_tokens: int = 0
    packed_tokens: int = 0

    def add(self, report: GraphReport | BatchReport) -> None:
        if isinstance(report, GraphReport):
            if report.fallbacks and all(reason.kind in HARMLESS for reason in report.fallbacks):
                return
            self.graphs.append(report.status)
            self.reasons += [text for text in map(str, report.fallbacks) if text not in self.reasons]
            return
        self.decisions[report.decision] = self.decisions.get(report.decision, 0) + 1
        if report.why:
            why = report.why.splitlines()[0]
            self.whys[why] = self.whys.get(why, 0) + 1
        self.dense_tokens += report.dense_tokens
        self.valid_tokens += report.valid_tokens
        self.packed_tokens += report.packed_tokens


class Everywhere:
    """Stands where `nn.Module._compiled_call_impl` was None.

    Args:
        options: of the backend.
        only: a pattern with wildcards for the names of model classes.
    """

    def __init__(self, options: Options, only: str = "*") -> None:
        self.options, self.only = options, only
        self.models: list[ModelReport] = []
        self._calling = threading.local()
        self._others: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that aren't language models

    def __get__(self, module: nn.Module | None, owner: type) -> Callable[..., Any] | None:
        if torch.compiler.is_compiling():  # Dynamo looks into this when it inlines a module with hooks
            return None
        if module is None or getattr(self._calling, "model", False) or isinstance(module, _WRAPPERS):
            return None
        return None if module in self._others else functools.partial(self._call, module)

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (_has_embedding(module) and fnmatch.fnmatchcase(type(module).__name__, self.only)):
            self._others.add(module)  # but its parts may be one
            return module._call_impl(*args, **kwargs)
        if _has_tokens(args, kwargs) and kwargs.get("past_key_values") is None:
            self._compile(module)
            return module(*args, **kwargs)
        with self._inside():
            return module._call_impl(*args, **kwargs)

    def _compile(self, module: nn.Module) -> None:
        with compile_lock:
            if "_compiled_call_impl" in vars(module):  # by another thread
                return
            report = ModelReport(type(module).__name__)
            self.models.append(report)
            module.compile(backend=functools.partial(pgcompile, options=self.options, collector=report.add))
            keep_generation_out(module)
        log.info("pgcompile: %s goes through pgcompile", report.model)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Modules called by this one, in this thread, are parts of it."""
        self._calling.model = True
        try:
            yield
        finally:
            self._calling.model = False

    def report(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: fit for JSON."""
        return {"models": [asdict(m) for m in self.models], "stats": asdict(stats())}


# Called between the graphs of whatever is compiled, they aren't to be compiled themselves.
skip_code(Everywhere.__get__.__code__)
skip_code(Everywhere._call.__code__)


def _has_embedding(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Embedding) for m in module.modules() if m is not module)


def _has_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Is there a batch of token ids `[N, S]` among the arguments?"""
    integers = (torch.int64, torch.int32)
    return any(
        isinstance(x, Tensor) and x.dim() == 2 and x.dtype in integers for x in tree_leaves((args, kwargs))
    )


def switch_on(everywhere: Everywhere) -> None:
    nn.Module._compiled_call_impl = everywhere  # type: ignore[assignment]


def switch_off() -> None:
    nn.Module._compiled_call_impl = None
