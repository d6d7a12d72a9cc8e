"""What a user calls: `optimize` (decorator) and `explain`."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch._dynamo.utils import get_compilation_metrics
from torch.utils._pytree import tree_leaves

from .backend import pgcompile
from .breaks import all_breaks
from .generation import keep_generation_out
from .options import Options
from .report import BatchReport, Explanation, GraphReport
from .stats import paused

F = TypeVar("F")


@overload
def optimize(target: F) -> F: ...
@overload
def optimize(target: None = None, **options: Any) -> Callable[[F], F]: ...
def optimize(target: Any = None, **options: Any) -> Any:
    """Compile a function, an `nn.Module` class or instance with pgcompile.

    Args:
        target: what to compile. A class gets its `forward` compiled for all instances; an instance is compiled in
            place (`module.compile`); a function is wrapped.
        **options: fields of `Options`.

    Examples:
        >>> @pgcompile.optimize(dropout="shared")
        ... def token_logprobs(model, input_ids, attention_mask): ...
    """
    chosen = Options.of(options)
    if target is None:
        return functools.partial(_optimize, options=chosen)
    return _optimize(target, chosen)


def _optimize(target: Any, options: Options) -> Any:
    # equal for equal options: Dynamo guards on that
    compile_options: Any = {"backend": pgcompile, "options": options}
    if isinstance(target, torch.nn.Module):
        target.compile(**compile_options)
        keep_generation_out(target)
        return target
    if isinstance(target, type):
        if not issubclass(target, torch.nn.Module):
            raise TypeError(
                f"optimize takes a function, an nn.Module class or instance, not the class {target.__name__}"
            )
        target.forward = torch.compile(target.forward, **compile_options)
        return target
    if not callable(target):
        raise TypeError(
            f"optimize takes a function, an nn.Module class or instance, not {type(target).__name__}"
        )
    return torch.compile(target, **compile_options)


def explain(
    fn: Callable[..., Any], *args: Any, options: Options | Mapping[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """Run one batch and tell what was packed, and why something wasn't.

    Random state and buffers are restored, no gradient is left behind, and the model isn't compiled afterwards.
    The inner compiler isn't run (`inner="eager"`).

    Args:
        fn: a function or module.
        *args, **kwargs: its arguments.
        options: see `Options`; `strict`, `inner` and `inner_mode` are ignored.
    """
    from dataclasses import replace

    chosen = replace(Options.of(options), inner="eager", inner_mode=None, strict=False)
    explanation = Explanation()

    def collect(report: GraphReport | BatchReport) -> None:
        if isinstance(report, GraphReport):
            report.index = len(explanation.graphs)
            explanation.graphs.append(report)
        else:
            explanation.batches.append(report)

    target = with_own_code(fn._call_impl if isinstance(fn, torch.nn.Module) else fn)
    backend = functools.partial(pgcompile, options=chosen, collector=collect, survey=True)
    compiled = torch.compile(target, backend=backend)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    named = _named(fn, args, kwargs)
    before = get_compilation_metrics()
    with _restored(fn, args, kwargs), paused(), torch.random.fork_rng(devices=devices):
        if named is not None:
            compiled(**named)
        else:
            compiled(*args, **kwargs)
    ended = [note for graph in explanation.graphs for note in graph.notes if note.kind == "graph_break"]
    frames = [frame for frame in get_compilation_metrics() if not any(frame is old for old in before)]
    explanation.breaks = all_breaks(ended, frames)
    return explanation


def _named(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """All arguments by name, so that reports can use the names; None where some have none."""
    try:
        parameters = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn).parameters
    except (TypeError, ValueError):  # builtins
        return None
    names = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    is_plain = list(parameters)[: len(args)] == names[: len(args)] and len(args) <= len(names)
    given = dict(zip(names, args, strict=False))
    return {**given, **kwargs} if is_plain and not given.keys() & kwargs.keys() else None


@contextmanager
def _restored(*places: Any) -> Iterator[None]:
    """Put buffers and gradients of the modules found in `places` back as they were."""
    modules = [m for place in tree_leaves(places) for m in _modules_in(place)]
    buffers = [(b, b.detach().clone()) for m in modules for b in m.buffers()]
    grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for m in modules for p in m.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
            for parameter, grad, kept in grads:
                if grad is not None and kept is not None:
                    grad.copy_(kept)
                parameter.grad = grad


def _modules_in(place: Any) -> list[torch.nn.Module]:
    """A module, the module of a method, or those that a function closes over or names."""
    if isinstance(place, torch.nn.Module):
        return [place]
    cells = [cell.cell_contents for cell in getattr(place, "__closure__", None) or () if _is_filled(cell)]
    code, scope = getattr(place, "__code__", None), getattr(place, "__globals__", {})
    named = [scope[name] for name in code.co_names if name in scope] if code is not None else []
    found = (getattr(place, "__self__", None), *cells, *named)
    return [m for m in found if isinstance(m, torch.nn.Module)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


def with_own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A caller of `fn` with a code object of its own: Dynamo counts recompilations by code object, and nobody else's
    are to be used up."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    code = call.__code__.replace(co_name=getattr(fn, "__name__", "call"))
    return types.FunctionType(code, call.__globals__, closure=call.__closure__)
