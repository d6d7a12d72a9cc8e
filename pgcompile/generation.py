"""Generation between training steps: what it must not do to a model that was compiled in place.

Calls that bring a key-value cache go around the compiler. There is nothing to pack in them, and each would cost Dynamo
a graph: prefill, the first step, later steps, for each number of rows. After eight (its `recompile_limit`) it compiles
nothing any more, training included.

Trainers switch activation checkpointing off while they generate. Whenever it is switched on again, transformers hangs
one more hook on the embedding, like those that are there; Dynamo guards on their number, and would compile each step
anew until it gives up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch.fx.experimental.proxy_tensor import get_proxy_mode

# transformers' PreTrainedModel.enable_input_require_grads: sets requires_grad, which needs to be done once.
_REPEATED_HOOK = "enable_input_require_grads.<locals>.make_inputs_require_grads"


class CompiledInPlace:
    """In the place of a module's compiled call: leaves out calls with `past_key_values`, transformers' name."""

    def __init__(self, module: nn.Module, compiled: Any) -> None:
        self.module, self.compiled = module, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            kwargs.get("past_key_values") is not None
            or torch.compiler.is_dynamo_compiling()  # first: Dynamo can't look into `is_traced`
            or is_traced()
        ):
            return self.module._call_impl(*args, **kwargs)
        _drop_repeated_hooks(self.module)
        return self.compiled(*args, **kwargs)


# Called between the graphs of something else, it isn't to be compiled itself.
skip_code(CompiledInPlace.__call__.__code__)


def keep_generation_out(module: nn.Module) -> None:
    """Of a module that was compiled in place, by `module.compile`."""
    compiled = vars(module).get("_compiled_call_impl")
    if compiled is not None and not isinstance(compiled, CompiledInPlace):
        module._compiled_call_impl = CompiledInPlace(module, compiled)


@torch._dynamo.disable
def is_traced() -> bool:
    """Is somebody else tracing what is called: torch.jit, torch.fx, make_fx?"""
    is_symbolic = torch.fx._symbolic_trace.is_fx_symbolic_tracing()
    return torch.jit.is_tracing() or is_symbolic or get_proxy_mode() is not None


def compiled_module() -> nn.Module | None:
    """The module whose forward Dynamo is compiling in this thread, if that is what it compiles."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        module = InstructionTranslator.current_tx().output.root_tx.f_locals.get("self")
    except AttributeError:  # not called by Dynamo
        return None
    return module if isinstance(module, nn.Module) else None


@torch._dynamo.disable
def _drop_repeated_hooks(module: nn.Module) -> None:
    try:
        hooks = module.get_input_embeddings()._forward_hooks  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not transformers', or without embeddings
        return
    if len(hooks) > 1:
        repeated = [
            k for k, hook in hooks.items() if getattr(hook, "__qualname__", "").endswith(_REPEATED_HOOK)
        ]
        for key in repeated[1:]:
            del hooks[key]
