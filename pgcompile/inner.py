"""The inner compiler: packed and dense graphs → callables, with artifacts shared by equal graphs.

The packed graph is handed to the inner compiler directly, with T dynamic in a fresh ShapeEnv; no guard on T may be
left. Two graphs with the same operations, constants and input types (a static and a dynamic trace of one model, say)
share artifacts: parameters are inputs.

Compiling happens under Dynamo's own lock: tracing patches `nn.Module` for all threads, and another one may be
building guards.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from . import stats
from .modes import modes
from .options import Options
from .passes.checkpoint import without_compiler
from .passes.numbers import with_numbers
from .passes.packed_graphs import PackedGraphs
from .passes.pipeline import Compilation
from .passes.verify import fake_inputs as packed_inputs
from .report import log
from .symbolic import dynamic_size

Bounds = tuple[float, float]


@contextmanager
def compiling() -> Iterator[None]:
    """Under Dynamo's lock and, as Dynamo does it, without the caller's saved-tensor hooks (nothing runs yet), and with
    `torch.compiler.is_compiling`, or another thread's call of something compiled would be taken for a nested trace."""
    session = getattr(torch.compiler, "_compile_session_context", nullcontext)  # torch 2.11 hasn't got it
    with compile_lock, session(), _disable_saved_tensors_hooks_during_tracing():
        yield


class Artifact:
    """A compiled packed graph, and the numbers of tokens, and of scored ones, that it serves.

    These are all, unless the inner compiler chose code by size. (Inductor's C++ code sums more than 4096 numbers in
    another way than fewer, and guards on that.)
    """

    def __init__(
        self, call: Callable[..., Any], tokens: Bounds = (0, math.inf), scored: Bounds = (0, math.inf)
    ) -> None:
        self.call, self.tokens, self.scored = call, tokens, scored

    def serves(self, tokens: int, scored: int) -> bool:
        return self.tokens[0] <= tokens <= self.tokens[1] and self.scored[0] <= scored <= self.scored[1]


class Family:
    """The artifacts of one packed graph, and failed attempts to make one; a class so that it can be held weakly."""

    MOST = 8  # attempts to compile it, as Dynamo's recompile_limit

    def __init__(self) -> None:
        self.artifacts: list[Artifact] = []
        self.failures: list[str] = []


_families: weakref.WeakValueDictionary[Any, Family] = weakref.WeakValueDictionary()


def compile_inner(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, cuda_graphs: bool = True
) -> Callable[..., Any]:
    """Give a graph to the inner compiler that `options` names (which isn't "eager").

    Args:
        cuda_graphs: False for none, whatever the mode: each number of tokens would be recorded anew, and each replay
            copy all parameters, which are inputs here.
    """
    if options.check == 0:
        return _compile_inner(gm, inputs, options, cuda_graphs)
    # `check` runs backward twice; cached kernels may overwrite what it saved (whether they do is in no cache key)
    with torch._functorch.config.patch(donated_buffer=False, enable_autograd_cache=False):
        return _compile_inner(gm, inputs, options, cuda_graphs)


def _compile_inner(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, cuda_graphs: bool
) -> Callable[..., Any]:
    if options.inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(options.inner_mode)) if options.inner_mode else {}
    if not cuda_graphs:
        patches |= {"triton.cudagraphs": False}
    if options.check:
        patches |= {"fx_graph_cache": False, "fx_graph_remote_cache": False}
    compiled = compile_fx(gm, list(inputs), config_patches=patches or None)
    assert callable(compiled)  # anything else is for AOTInductor
    return compiled


def family_of(graphs: PackedGraphs, aten_gm: fx.GraphModule, options: Options) -> Family:
    """The artifacts for a packed graph, shared with equal graphs."""
    key = (
        structure(graphs.packed),
        _types(graphs, aten_gm),
        options.inner,
        options.inner_mode,
        options.check == 0,
        modes(),
    )
    with compile_lock:
        return _families.setdefault(key, Family())


def compiled_packed(
    family: Family, graphs: PackedGraphs, aten_gm: fx.GraphModule, tokens: int, scored: int, options: Options
) -> Callable[..., Any]:
    """The compiled packed graph for numbers of tokens and scored tokens; compiles it on first use.

    Raises:
        RuntimeError: if the inner compiler failed, or specialised on the number of tokens, too many times before.
        Exception: whatever it raises.
    """
    for artifact in family.artifacts:
        if artifact.serves(tokens, scored):
            return artifact.call
    with compiling():
        if not any(a.serves(tokens, scored) for a in family.artifacts):
            if len(family.artifacts) + len(family.failures) >= family.MOST:
                last = f", the last one with {family.failures[-1]}" if family.failures else ""
                text = (
                    f"the inner compiler was called {family.MOST} times for numbers of tokens, and failed in "
                )
                raise RuntimeError(f"{text}{len(family.failures)} of them{last}")
            try:
                family.artifacts.append(_compile_packed(graphs, aten_gm, tokens, scored, options))
            except Exception as error:  # raised again, and counted
                family.failures.append(f"{type(error).__name__}: {error}")
                raise
            stats.count(compiles=1)
    return next(a.call for a in family.artifacts if a.serves(tokens, scored))


def _compile_packed(
    graphs: PackedGraphs, aten_gm: fx.GraphModule, tokens: int, scored: int, options: Options
) -> Artifact:
    if options.inner == "eager":
        return Artifact(without_compiler(graphs.packed))
    env = ShapeEnv()
    # hints of what isn't known are odd and large: a size equal to another one could be taken for it
    sizes = [dynamic_size(env, "tokens", tokens), dynamic_size(env, "scored", scored or 100019)]
    segments = dynamic_size(env, "segments", 100003)
    symbols = [size.node.expr for size in sizes]  # once specialised, a size no longer shows its symbol
    segment = segments.node.expr
    with FakeTensorMode(shape_env=env):
        inputs = packed_inputs(graphs, aten_gm, sizes[0], segments, sizes[1])
    assert isinstance(inputs, list)  # or `verify` would have refused the graph
    call = compile_inner(_copy(graphs.packed), inputs, options, cuda_graphs=False)
    served: list[Bounds] = [(0, math.inf)] * len(sizes)
    for guard in env.guards:
        for i, (symbol, size) in enumerate(zip(symbols, sizes, strict=True)):
            if symbol in guard.expr.free_symbols:
                low, high = _bounds(guard.expr, symbol, size.node.hint)
                served[i] = max(served[i][0], low), min(served[i][1], high)
    artifact = Artifact(call, *served)
    if any(segment in guard.expr.free_symbols for guard in env.guards) or not artifact.serves(tokens, scored):
        guards = ", ".join(str(guard.expr) for guard in env.guards)
        raise RuntimeError(f"the inner compiler specialised a size of the packed tokens: {guards}")
    return artifact


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


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that the inner compiler may change, without our own node metadata."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return fx.GraphModule(gm, graph)


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


def _types(graphs: PackedGraphs, aten_gm: fx.GraphModule) -> tuple[Any, ...]:
    with compiling(), FakeTensorMode(allow_non_fake_inputs=True):
        inputs = packed_inputs(graphs, aten_gm, 7919)
    assert isinstance(inputs, list)  # or `verify` would have refused the graph
    return tuple(
        (tuple(x.shape), x.stride(), x.dtype, str(x.device), x.requires_grad)
        if isinstance(x, torch.Tensor)
        else repr(x)
        for x in inputs
    )


@dataclass(frozen=True)
class _DenseArtifact:
    """A compiled original graph, and the calls that it serves; without `call`, they run eagerly."""

    env: ShapeEnv
    guards: str | None
    modes: tuple[Any, ...]
    call: Callable[..., Any] | None

    def serves(self, args: Sequence[Any], current: tuple[Any, ...]) -> bool:
        return current == self.modes and (
            not self.guards or self.env.evaluate_guards_expression(self.guards, list(args))
        )


class DenseGraph:
    """The original graph through the inner compiler, compiled on first use and for each new set of guards.

    What the inner compiler gets has its symbolic floats settled; without it, Dynamo's graph runs as it is.
    """

    MOST = 8  # as Dynamo's recompile_limit

    def __init__(self, compilation: Compilation, options: Options) -> None:
        self.gm = compilation.dynamo
        self.settled = compilation.settled or compilation.dynamo
        self.numbers = compilation.numbers
        self.options = options
        self.compiled: list[_DenseArtifact] = []

    @functools.cached_property
    def eager(self) -> fx.GraphModule:
        return without_compiler(self.gm)

    def __call__(self, *given: Any) -> Any:
        if self.options.inner == "eager":
            return self.eager(*given)
        args = with_numbers(self.numbers, given)
        artifact = self._find(args) or self._compiled(args)
        return self.eager(*given) if artifact is None or artifact.call is None else artifact.call(*args)

    def _find(self, args: Sequence[Any]) -> _DenseArtifact | None:
        current = modes()
        return next((artifact for artifact in self.compiled if artifact.serves(args, current)), None)

    def _compiled(self, args: Sequence[Any]) -> _DenseArtifact | None:
        if len(self.compiled) >= self.MOST:
            return None
        with compiling():
            found = self._find(args)  # another thread's, meanwhile
            if found is not None or len(self.compiled) >= self.MOST:
                return found
            try:
                artifact = self._compile(args)
            except Exception as error:  # of somebody else's compiler; the graph runs without it
                text = "the inner compiler failed on the original graph, which runs eagerly: %s: %s"
                log.warning(text, type(error).__name__, error)
                artifact = _DenseArtifact(ShapeEnv(), None, modes(), None)
            self.compiled.append(artifact)
            if len(self.compiled) == self.MOST:
                text = "the original graph was compiled %d times; batches of other kinds run it eagerly"
                log.warning(text, self.MOST)
        return artifact

    def _compile(self, args: Sequence[Any]) -> _DenseArtifact:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import StatelessSymbolicContext

        env = ShapeEnv()
        fakes: list[Any] = []
        mode = FakeTensorMode(shape_env=env)
        examples = [n.meta["example_value"] for n in self.settled.graph.find_nodes(op="placeholder")]
        for i, (arg, example) in enumerate(zip(args, examples, strict=True)):
            source = ConstantSource(f"arg_{i}")
            if isinstance(arg, torch.Tensor) and arg.dim() == 0 and arg.dtype == torch.float64:
                fakes.append(mode.from_tensor(arg))  # with a source, it would be a symbolic float as well
            elif isinstance(arg, torch.Tensor):
                dynamic = [
                    DimDynamic.STATIC if isinstance(s, int) else DimDynamic.DUCK for s in example.shape
                ]
                context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=dynamic)
                fakes.append(mode.from_tensor(arg, symbolic_context=context, source=source))
            elif isinstance(example, torch.SymInt):
                positive = None if arg < 0 else True  # None: not known
                symbol = env.create_symbol(arg, source, dynamic_dim=DimDynamic.DUCK, positive=positive)
                fakes.append(env.create_symintnode(symbol, hint=arg, source=source))
            else:
                fakes.append(arg)
        call = compile_inner(_copy(self.settled), fakes, self.options)
        return _DenseArtifact(env, env.produce_guards_expression(fakes), modes(), call)
