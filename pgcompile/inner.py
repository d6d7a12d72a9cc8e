"""The inner compiler, and the original graph through it.

Compiling happens under Dynamo's own lock: tracing patches `nn.Module` for all threads, and another one may be
building guards.
"""

from __future__ import annotations

import functools
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

from . import ops
from .modes import modes
from .options import Options
from .passes.checkpoint import without_compiler
from .passes.numbers import with_numbers
from .passes.pipeline import Compilation
from .report import log


@contextmanager
def compiling() -> Iterator[None]:
    """Under Dynamo's lock and, as Dynamo does it, without the caller's saved-tensor hooks (nothing runs yet), and with
    `torch.compiler.is_compiling`, or another thread's call of something compiled would be taken for a nested trace."""
    session = getattr(torch.compiler, "_compile_session_context", nullcontext)  # torch 2.11 hasn't got it
    with compile_lock, session(), _disable_saved_tensors_hooks_during_tracing():
        yield


def compile_inner(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, cuda_graphs: bool = True
) -> Callable[..., Any]:
    """Give a copy of a graph to the inner compiler that `options` names (which isn't "eager").

    Args:
        cuda_graphs: False for none, whatever the mode: each number of tokens would be recorded anew, and each replay
            copy all parameters, which are inputs here.
    """
    gm = _copy(gm)
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
    tag = torch.compiler.config.cache_key_tag
    if _has_own_operators(gm):
        _register_decompositions()
        tag = f"{tag} pgcompile {ops.DIGEST}"  # what our operators are traced to is in no other part of a key
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled = compile_fx(gm, list(inputs), config_patches=patches or None)
    assert callable(compiled)  # anything else is for AOTInductor
    return compiled


@functools.cache
def _register_decompositions() -> None:
    """In inductor's own table: `compile_fx` takes others, but caches nothing then."""
    from torch._inductor import decomposition

    decomposition.decompositions.update(ops.DECOMPOSITIONS)
    decomposition.fast_random_decomps.cache_clear()  # a copy of that table


def _has_own_operators(gm: fx.GraphModule) -> bool:
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return any(getattr(n.target, "namespace", None) == "pgcompile" for graph in graphs for n in graph.nodes)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that the inner compiler may change, without our own node metadata."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return fx.GraphModule(gm, graph)


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
        call = compile_inner(self.settled, fakes, self.options)
        return _DenseArtifact(env, env.produce_guards_expression(fakes), modes(), call)
