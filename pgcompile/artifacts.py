"""Compiled graphs over tokens, with artifacts shared by equal graphs.

A graph is handed to the inner compiler directly, with its numbers of tokens dynamic in a fresh ShapeEnv. Two graphs
with the same operations, constants and input types (a static and a dynamic trace of one model, say) share artifacts:
parameters are inputs.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from . import inner, stats
from .modes import modes
from .options import Options
from .passes.checkpoint import without_compiler
from .symbolic import dynamic_size

Bounds = tuple[float, float]
ANY: Bounds = (0, math.inf)

# Sizes (ints or SymInts) → a graph's inputs, under the active fake mode.
Examples = Callable[[Sequence[Any]], list[Any]]


class Size(NamedTuple):
    """A number of what varies from call to call.

    Args:
        is_hint: the compiler may go by it; if not, it gets an odd and large number for it. (A size that equals
            another one by chance could be taken for it, and 0 and 1 are special.)
    """

    number: int
    is_hint: bool = True


@dataclass(frozen=True)
class Artifact:
    """A compiled graph, `(*sizes, *inputs) -> results`, and the sizes that it serves.

    These are all, unless the inner compiler chose code by size. (Inductor's C++ code sums more than 4096 numbers in
    another way than fewer, and guards on that.)
    """

    call: Callable[..., Any]
    served: Sequence[Bounds]

    def serves(self, sizes: Sequence[Size]) -> bool:
        return all(low <= s.number <= high for s, (low, high) in zip(sizes, self.served, strict=True))

    def for_sizes(self, sizes: Sequence[Size]) -> Callable[..., Any]:
        """`(*inputs) -> results`."""
        return functools.partial(self.call, *(size.number for size in sizes))


class Family:
    """The artifacts of one graph, and failed attempts to make one; a class so that it can be held weakly."""

    MOST = 8  # attempts to compile it, as Dynamo's recompile_limit

    def __init__(self) -> None:
        self.artifacts: list[Artifact] = []
        self.failures: list[str] = []

    def compiled(
        self, gm: fx.GraphModule, examples: Examples, sizes: Sequence[Size], options: Options
    ) -> Callable[..., Any]:
        """The graph, compiled for these sizes, on first use.

        Raises:
            RuntimeError: if the inner compiler failed, or specialised on a size, too many times before.
            Exception: whatever it raises.
        """
        found = self._find(sizes)
        if found is not None:
            return found.for_sizes(sizes)
        with inner.compiling():
            found = self._find(sizes)  # another thread's, meanwhile
            if found is None:
                self._check_attempts()
                try:
                    found = _compile(gm, examples, sizes, options)
                except Exception as error:  # raised again, and counted
                    self.failures.append(f"{type(error).__name__}: {error}")
                    raise
                self.artifacts.append(found)
                stats.count(compiles=1)
        return found.for_sizes(sizes)

    def _find(self, sizes: Sequence[Size]) -> Artifact | None:
        return next((artifact for artifact in self.artifacts if artifact.serves(sizes)), None)

    def _check_attempts(self) -> None:
        if len(self.artifacts) + len(self.failures) >= self.MOST:
            last = f", the last one with {self.failures[-1]}" if self.failures else ""
            text = f"the inner compiler was called {self.MOST} times for one graph, and failed in "
            raise RuntimeError(f"{text}{len(self.failures)} of them{last}")


_families: weakref.WeakValueDictionary[Any, Family] = weakref.WeakValueDictionary()


def family_of(gm: fx.GraphModule, examples: Examples, sizes: int, options: Options) -> Family:
    """The artifacts for a graph with so many sizes, shared with equal graphs."""
    with inner.compiling(), FakeTensorMode(allow_non_fake_inputs=True):
        types = _types(examples([7919 + 2 * i for i in range(sizes)]))
    key = (structure(gm), types, options.inner, options.inner_mode, options.check == 0, modes())
    with compile_lock:
        return _families.setdefault(key, Family())


class Families:
    """The families that one owner's graphs have met, by the modes and what else tells their inputs apart."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.found: dict[Any, Family] = {}

    def compiled(
        self, gm: fx.GraphModule, examples: Examples, sizes: Sequence[Size], key: Hashable
    ) -> Callable[..., Any]:
        """As `Family.compiled`."""
        known = modes(), key
        family = self.found.get(known)
        if family is None:
            family = self.found[known] = family_of(gm, examples, len(sizes), self.options)
        return family.compiled(gm, examples, sizes, self.options)


def _compile(gm: fx.GraphModule, examples: Examples, sizes: Sequence[Size], options: Options) -> Artifact:
    if options.inner == "eager":
        return Artifact(without_compiler(_taking_sizes(gm, len(sizes))), [ANY] * len(sizes))
    large = [100003 + 16 * i for i in range(len(sizes))]
    hints = [size.number if size.is_hint else hint for size, hint in zip(sizes, large, strict=True)]
    artifact, guards = _compile_for(gm, examples, hints, options)
    if not artifact.serves(sizes):  # it did go by a hint
        hints = [size.number if size.number > 1 else hint for size, hint in zip(sizes, hints, strict=True)]
        artifact, guards = _compile_for(gm, examples, hints, options)
    if not artifact.serves(sizes):
        raise RuntimeError(f"the inner compiler specialised a number of tokens or labels: {guards}")
    return artifact


def _compile_for(
    gm: fx.GraphModule, examples: Examples, hints: Sequence[int], options: Options
) -> tuple[Artifact, str]:
    """An artifact for these sizes and more, and the guards that it came with."""
    env = ShapeEnv()
    symbolic = [dynamic_size(env, f"size_{i}", hint) for i, hint in enumerate(hints)]
    symbols = [size.node.expr for size in symbolic]  # once specialised, a size no longer shows its symbol
    with FakeTensorMode(shape_env=env):
        inputs = examples(symbolic)
    call = inner.compile_inner(
        _taking_sizes(gm, len(hints)), [*symbolic, *inputs], options, cuda_graphs=False
    )
    served = [ANY] * len(hints)
    for guard in env.guards:
        for i, (symbol, hint) in enumerate(zip(symbols, hints, strict=True)):
            if symbol in guard.expr.free_symbols:
                low, high = _bounds(guard.expr, symbol, hint)
                served[i] = max(served[i][0], low), min(served[i][1], high)
    return Artifact(call, served), ", ".join(str(guard.expr) for guard in env.guards)


def _taking_sizes(gm: fx.GraphModule, count: int) -> fx.GraphModule:
    """The graph with its sizes as inputs, too, before all others.

    Without them, ahead-of-time autograd reads the sizes that backward needs from tensors of the forward, and keeps
    those whose size it read rather than compute them again from smaller ones.
    """
    graph = fx.Graph()
    for i in range(count):
        graph.placeholder(f"size_{i}")
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def _bounds(guard: Any, symbol: Any, hint: int) -> Bounds:
    """The numbers around a size's hint for which a guard holds: all that a bound, `a * T + b <= c`, allows.

    Of `a * T + b != c`, the side that the hint is on; of anything else, the hint alone.
    """
    import sympy

    if isinstance(guard, sympy.Ne) and guard.free_symbols == {symbol}:
        side = sympy.Gt if (guard.lhs - guard.rhs).subs(symbol, hint) > 0 else sympy.Lt
        guard = side(guard.lhs, guard.rhs)
    if not isinstance(guard, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return hint, hint
    less = guard.gts - guard.lts  # what must be >= 0 (> 0)
    slope, offset = less.coeff(symbol), less.subs(symbol, 0)
    if (
        sympy.expand(slope * symbol + offset - less) != 0
        or not slope.is_Integer
        or not offset.is_Integer
        or slope == 0
    ):
        return hint, hint
    limit = sympy.Rational(-offset, slope)
    if isinstance(guard, (sympy.Lt, sympy.Gt)):
        return (
            (float(sympy.floor(limit)) + 1, math.inf) if slope > 0 else (0.0, float(sympy.ceiling(limit)) - 1)
        )
    return (float(sympy.ceiling(limit)), math.inf) if slope > 0 else (0.0, float(sympy.floor(limit)))


def structure(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What two graphs have in common iff they compute the same: operations, wiring and constants by value."""
    numbered: dict[fx.Node, Any] = {node: _Ref(i) for i, node in enumerate(gm.graph.nodes)}
    rows = []
    for node in gm.graph.nodes:
        args = fx.map_arg((node.args, node.kwargs), numbered.__getitem__)
        target: Any = "" if node.op == "placeholder" else str(node.target)
        if node.op == "get_attr":
            value = getattr(gm, str(node.target))
            target = structure(value) if isinstance(value, fx.GraphModule) else _constant_key(value)
        rows.append((node.op, target, repr(args)))
    return tuple(rows)


class _Ref:
    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"%{self.number}"


def _constant_key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), str(value.device), repr(value.tolist()))
    return repr(value)


def _types(inputs: list[Any]) -> tuple[Any, ...]:
    return tuple(
        (tuple(x.shape), x.stride(), x.dtype, str(x.device), x.requires_grad)
        if isinstance(x, torch.Tensor)
        else repr(x)
        for x in inputs
    )
