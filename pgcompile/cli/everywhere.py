"""Every language model of a process through pgcompile, without a line in its code: what `pgcompile run` switches on.

`nn.Module.__call__` asks each module for its `_compiled_call_impl`, a class attribute that is None unless
`module.compile` was called. Here it becomes a descriptor: the outermost module that is called with token ids and has an
embedding is compiled in place, at that call. Nothing else of modules changes; the attribute isn't pickled. What the
script compiles itself is left to it.
"""

from __future__ import annotations

import fnmatch
import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.eval_frame import skip_code
from torch.utils._pytree import tree_leaves

from ..backend import pgcompile
from ..generation import CompiledInPlace, is_traced
from ..inner import compile_lock
from ..options import Options
from ..report import BatchReport, GraphReport, log
from ..stats import stats

# They call the module that they wrap, with what they were given.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


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
            if report.has_nothing_to_pack:
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
        self.only = only
        self.models: list[ModelReport] = []
        # one for all models: Dynamo guards on the backend, and compiles anew for another one
        self._backend = functools.partial(pgcompile, options=options, collector=self._collect)
        self._calling = threading.local()
        self._others: dict[int, weakref.ref[nn.Module]] = {}  # modules by id that run as they are
        self._has_warned = False
        self._seen: set[str] = set()  # classes that `only` left out

    def __get__(self, module: nn.Module | None, owner: type) -> Callable[..., Any] | None:
        is_inlined = torch.compiler.is_compiling()  # Dynamo looks here when it inlines a module with hooks
        if module is None or is_inlined:
            return None
        is_other = id(module) in self._others or getattr(self._calling, "report", None) is not None
        if is_other or isinstance(module, _WRAPPERS):
            return module._call_impl  # as without us; None could come between two looks of another thread
        return functools.partial(self._call, module)

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._is_to_compile(module, args, kwargs):
            self._compile(module)
            return module(*args, **kwargs)
        return module._call_impl(*args, **kwargs)

    @torch._dynamo.disable
    def _is_to_compile(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if kwargs.get("past_key_values") is not None:  # first: the rest takes a look at all modules
            return False
        if any(_is_compiled(m) for m in module.modules()):
            self._leave_alone(module)
            return False
        name, has_embedding = type(module).__name__, _has_embedding(module)
        if not (has_embedding and fnmatch.fnmatchcase(name, self.only)):
            self._seen |= {name} if has_embedding else set()
            self._remember(module)  # but its parts may be one
            return False
        if vars(module).get("_is_replica", False) or is_traced():
            return False
        return _has_tokens(args, kwargs)

    def _remember(self, module: nn.Module) -> None:
        number = id(module)
        self._others[number] = weakref.ref(module, lambda _: self._others.pop(number, None))

    @torch._dynamo.disable
    def _compile(self, module: nn.Module) -> None:
        with compile_lock:
            if "_compiled_call_impl" in vars(module):  # by another thread
                return
            report = ModelReport(type(module).__name__)
            self.models.append(report)
            module.compile(backend=self._backend)
            module._compiled_call_impl = _Observed(module, module._compiled_call_impl, self._calling, report)
        log.info("pgcompile: %s goes through pgcompile", report.model)

    def _leave_alone(self, module: nn.Module) -> None:
        for part in module.modules():
            self._remember(part)
        if _has_embedding(module):
            text = "the script compiles it, or a part of it, itself"
            name = type(getattr(module, "_orig_mod", module)).__name__
            self.models.append(ModelReport(name, reasons=[text]))
            log.warning("pgcompile: %s is left alone: %s", name, text)

    def _collect(self, report: GraphReport | BatchReport) -> None:
        model: ModelReport | None = getattr(self._calling, "report", None)
        if model is None:  # a backward pass that runs forward again, in a thread of its own
            return
        model.add(report)
        if isinstance(report, GraphReport) or report.decision != "packed" or self._has_warned:
            return
        if report.valid_tokens < report.dense_tokens:
            self._has_warned = True
            text = "padding isn't computed, and outputs are zero there: a loss outside of the model has to mask it"
            log.warning("pgcompile: %s: %s, as transformers' and TRL's do", model.model, text)

    def warn_if_unused(self) -> None:
        """At exit: a report without a model looks like one of a run in which nothing was to be gained."""
        if not self.models:
            seen = f"; seen: {', '.join(sorted(self._seen))}" if self._seen else ""
            like = "" if self.only == "*" else f", of a class like {self.only!r},"
            text = (
                "pgcompile: no model was compiled: no module with an embedding%s was called with token ids%s"
            )
            log.warning(text, like, seen)

    def report(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: fit for JSON."""
        return {"models": [asdict(m) for m in self.models], "stats": asdict(stats())}


class _Observed(CompiledInPlace):
    """Says in `calling.report`, of its thread, which model is being called: modules that it calls are parts of it."""

    def __init__(
        self, module: nn.Module, compiled: Any, calling: threading.local, report: ModelReport
    ) -> None:
        super().__init__(module, compiled)
        self.calling, self.report = calling, report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = getattr(self.calling, "report", None)
        self.calling.report = self.report
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.calling.report = before


# Called between the graphs of whatever is compiled, they aren't to be compiled themselves.
for function in (Everywhere.__get__, Everywhere._call, _Observed.__call__):
    skip_code(function.__code__)


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or "_compiled_call_impl" in vars(module)


def _has_embedding(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Embedding) for m in module.modules() if m is not module)


def _has_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Is there a batch of token ids `[N, S]` among the arguments?"""
    integers = (torch.int64, torch.int32)
    leaves = tree_leaves((args, kwargs))
    return any(isinstance(x, Tensor) and x.dim() == 2 and x.dtype in integers for x in leaves)


def switch_on(everywhere: Everywhere) -> None:
    # scripts may run backward twice (retain_graph=True), which kernels that overwrite what was saved can't
    torch._functorch.config.donated_buffer = False
    # or Dynamo cuts models where DistributedDataParallel's buckets of gradients end
    torch._dynamo.config.optimize_ddp = False
    nn.Module._compiled_call_impl = everywhere  # type: ignore[assignment]


def switch_off() -> None:
    nn.Module._compiled_call_impl = None
