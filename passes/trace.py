"""Dynamo graph → ATen graph, and what that would lose.

The compiler works on pre-dispatch ATen: every operation has one spelling and a schema, composite operations
(`linear`, `scaled_dot_product_attention`, `layer_norm`, `cross_entropy_loss`) are still whole, and each node keeps
the source line it came from. What tracing to ATen would lose, i.e. the gradient of custom autograd functions,
hooks and other higher-order operations, is looked for in the Dynamo graph first (`find_opaque`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .graph import AUTOCAST_SWITCHES, is_mode_switch
from .reasons import Unsupported


def find_opaque(gm: fx.GraphModule) -> list[Unsupported]:
    """Nodes of a Dynamo graph whose gradient or effect an ATen graph would not show."""
    found = _subclasses(gm)
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target in (
            "register_hook",
            "register_post_accumulate_grad_hook",
        ):
            found.append(_opaque("hook", node, "a tensor hook may change the gradient of a shared token"))
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", str(node.target))
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            kind = next((k for k in ("autograd_function", "hook") if k in name), "trace_failed")
            if "checkpoint" in name:
                text = (
                    "activation checkpointing with a context_fn, which chooses what is kept, can't be packed"
                )
                hint = "checkpoint without it, or turn it off: a packed batch keeps fewer activations"
                found.append(Unsupported(kind, node, text, hint))
                continue
            found.append(_opaque(kind, node, f"higher-order operation `{name}` can't be looked into"))
        elif "autograd_function" in name or "trampoline_autograd" in name:
            found.append(
                _opaque("autograd_function", node, "a custom autograd function may treat gradients freely")
            )
        elif "_get_data_attr" in name or "_set_data" in name:
            text = "`.data` lets writes go past autograd"
            found.append(
                Unsupported("mutation", node, text, "use .detach(), or write out of place under no_grad")
            )
        elif "inference_mode" in name:
            found.append(
                _opaque("trace_failed", node, "an ATen graph doesn't show regions of inference_mode")
            )
        elif "hook" in name and "torch" in (getattr(node.target, "__module__", None) or ""):
            found.append(_opaque("hook", node, f"`{name}` may change the gradient of a shared token"))
    return found


def _subclasses(gm: fx.GraphModule) -> list[Unsupported]:
    """Inputs, weights among them, that bring operations of their own: quantized, sharded. The first of each class."""
    inputs = gm.graph.find_nodes(op="placeholder")
    found = [n for n in inputs if is_traceable_wrapper_subclass(n.meta["example_value"])]
    first = {type(n.meta["example_value"]).__name__: n for n in reversed(found)}
    text = "tensors of class {}, which redefines operations, can't be looked into"
    hint = "use plain tensors, or compile the part without them"
    return [Unsupported("trace_failed", node, text.format(name), hint) for name, node in first.items()]


def _opaque(kind: str, node: fx.Node, explanation: str) -> Unsupported:
    return Unsupported(kind, node, explanation, "run this part outside of the compiled region")


def example_values(gm: fx.GraphModule) -> list[Any]:
    """What Dynamo traced with: FakeTensors (Parameters stay Parameters), SymInts, numbers."""
    return [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]


def to_aten(gm: fx.GraphModule) -> fx.GraphModule:
    """Retrace a Dynamo graph to pre-dispatch ATen under Dynamo's own fake mode.

    Placeholders correspond one to one. Each node has `meta["val"]` (fake value) and `meta["stack_trace"]`.

    Raises:
        Exception: whatever tracing raises; the caller reports it as `trace_failed`.
    """
    values = example_values(gm)
    fakes = [v for v in values if isinstance(v, torch._subclasses.FakeTensor)]

    def interpret(*args: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return _ConstantFloats(gm).run(*args)

    with fakes[0].fake_mode:
        traced = make_fx(interpret, pre_dispatch=True)(*values)
    if any(n.target in AUTOCAST_SWITCHES for n in traced.graph.nodes):
        with fakes[0].fake_mode, enable_python_dispatcher(), torch.set_grad_enabled(torch.is_grad_enabled()):
            _Revalue(traced).run(*values)
    originals = (n for n in gm.graph.nodes if n.op == "placeholder")
    for node, original in zip(
        (n for n in traced.graph.nodes if n.op == "placeholder"), originals, strict=True
    ):
        example = original.meta["example_value"]
        node.meta["is_parameter"] = isinstance(example, torch.nn.Parameter)
        node.meta["requires_grad"] = isinstance(example, torch.Tensor) and example.requires_grad
        node.meta["label"] = original.name
        node.meta.setdefault("stack_trace", original.meta.get("stack_trace"))
    return traced


class _ConstantFloats(fx.Interpreter):
    """Takes symbolic floats that were read from tensors at their value, which Dynamo guards on (others: numbers.py)."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return float(result) if isinstance(result, torch.SymFloat) else result


class _Revalue(fx.Interpreter):
    """Sets fake values anew: tracing records autocast switches without throwing them, so dtypes are those outside."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and not is_mode_switch(n):
            n.meta["val"] = result
        return result
