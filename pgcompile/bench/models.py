"""Models to measure: real sizes with random weights, a config file, or anything that a factory makes."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_QWEN3: dict[str, Any] = dict(model_type="qwen3", vocab_size=151936, head_dim=128, num_key_value_heads=8)
# As in the config.json files that come with the weights, as far as it matters for speed.
SIZES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN3 | dict(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, tie_word_embeddings=True
    ),
    "qwen3-4b": _QWEN3 | dict(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=True
    ),
    "qwen3-8b": _QWEN3 | dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "llama-3.2-1b": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "gpt2": dict(model_type="gpt2"),
    # a step of the smallest shapes takes a second on two CPU cores
    "tiny-cpu": dict(
        model_type="qwen3", vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    ),
}  # fmt: skip
ATTENTION, UNGROUPED = "causal_sdpa", "causal_sdpa_ungrouped"


@dataclass(frozen=True)
class ModelWork:
    """Multiply-adds of a forward pass: per token, per query-key pair, and per token whose logits are computed."""

    per_token: int
    per_pair: int
    per_prediction: int

    def of(self, tokens: int, pairs: int, predictions: int) -> int:
        return self.per_token * tokens + self.per_pair * pairs + self.per_prediction * predictions


@dataclass
class Model:
    """A module, and how it is called.

    Args:
        fixed: arguments of every call.
        has_mask: takes an attention mask.
        has_logits_to_keep: computes logits for the positions it is told.
        compiled: what contestants compiled, by name: one job meets many shapes, and compiles for the first few.
        alone: the same, for batches of distinct tokens alone.
    """

    module: nn.Module
    vocab_size: int
    fixed: dict[str, Any]
    has_mask: bool
    has_logits_to_keep: bool
    compiled: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, Any] = field(default_factory=dict)

    @property
    def is_transformers(self) -> bool:
        return hasattr(self.module, "config") and hasattr(self.module, "get_output_embeddings")

    def twin(self, attention: str | None = None) -> Model:
        """The same parameters in modules of their own, with another attention implementation of transformers."""
        shared = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        module: Any = copy.deepcopy(self.module, shared)
        if attention is not None:
            module.set_attn_implementation(attention)
        return replace(self, module=module)

    def wider(self, dtype: torch.dtype) -> Model:
        """A copy in another precision; its SDPA has no grouped heads, which float32 has no kernel for on GPUs."""
        module: Any = copy.deepcopy(self.module).to(dtype)
        if self.is_transformers:
            module.set_attn_implementation(UNGROUPED)
        return replace(self, module=module)


def token_logprobs(model: Model, ids: Tensor, count: int, **arguments: Any) -> Tensor:
    """Log-probabilities of the last `count` tokens of each row, float32 or wider: ids [N, S] → [N, K].

    Logits are computed where they are needed, as TRL does; its log-softmax is in the logits' dtype or a float32 kernel,
    here it is in float32 for everybody.
    """
    if model.has_logits_to_keep:
        arguments["logits_to_keep"] = count + 1
    out = model.module(ids, **model.fixed, **arguments)
    logits = (out.logits if hasattr(out, "logits") else out)[:, -count - 1 : -1]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1).gather(-1, ids[:, -count:, None]).squeeze(-1)


def build_model(
    name: str, layers: int | None, positions: int, dtype: torch.dtype, device: torch.device
) -> Model:
    """A model with random weights.

    Args:
        name: of SIZES, a path to a config.json, or "module:factory".
        layers: keep so many; None keeps all.
        positions: of the longest row to come.

    Raises:
        click.ClickException: if there is no such model.
    """
    with torch.device(device):
        torch.manual_seed(0)
        module = _from_factory(name, layers) if ":" in name else _from_config(name, layers, positions)
    module = module.to(device, dtype).eval()  # no dropout
    parameters = inspect.signature(module.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    fixed = (
        {"use_cache": False} if "use_cache" in parameters or (takes_all and hasattr(module, "config")) else {}
    )
    embedding = next((m for m in module.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise click.ClickException(f"{name}: the model has no nn.Embedding, so it takes no tokens")
    has_mask, has_logits_to_keep = (name in parameters for name in ("attention_mask", "logits_to_keep"))
    return Model(module, embedding.num_embeddings, fixed, has_mask, has_logits_to_keep)


def _from_config(name: str, layers: int | None, positions: int) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise click.ClickException('transformers is not installed; pip install "pgcompile[hf]"') from None
    _register_attention()
    values = dict(_values(name))
    try:
        whole = AutoConfig.for_model(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise click.ClickException(f"{name} is no config of transformers: {_first_line(error)}") from None
    text = whole.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    if count is None:
        raise click.ClickException(f"{name}: the config has no num_hidden_layers")
    if layers is not None:
        if layers > count:
            raise click.BadParameter(f"{name} has {count} layers, not {layers}", param_hint="--layers")
        # lists with an entry for each layer
        cut = {key: v[:layers] for key, v in values.items() if isinstance(v, list) and len(v) == count}
        values |= cut | {"num_hidden_layers": layers}
        values = {k: v for k, v in values.items() if k not in ("n_layer", "n_layers", "num_layers")}
        whole = AutoConfig.for_model(**values)
        text = whole.get_text_config()
    if getattr(text, "max_position_embeddings", positions) < positions:
        text.max_position_embeddings = positions  # weights are random, so a longer table is as good
    try:
        module = AutoModelForCausalLM.from_config(whole, attn_implementation=ATTENTION)
    except ValueError as error:
        raise click.ClickException(f"{name}: {_first_line(error)}") from None
    module.loss_type = "ForCausalLM"  # else some models warn in forward, which breaks Dynamo's graph
    return module


def _values(name: str) -> Mapping[str, Any]:
    if name in SIZES:
        return SIZES[name]
    if name.endswith(".json"):
        try:
            values = json.loads(Path(name).read_text())
        except OSError as error:
            raise click.BadParameter(f"can't open {name}: {error.strerror}", param_hint="--model") from None
        except ValueError as error:
            raise click.BadParameter(f"{name} isn't JSON: {error}", param_hint="--model") from None
        if not isinstance(values, dict) or "model_type" not in values:
            raise click.BadParameter(f"{name} has no model_type", param_hint="--model")
        return values
    near = difflib.get_close_matches(name.lower(), SIZES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    text = f"{name!r} is none of {', '.join(SIZES)}, no path to a config.json and no module:factory{hint}"
    raise click.BadParameter(text, param_hint="--model")


def _from_factory(name: str, layers: int | None) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if layers is not None:
        raise click.BadParameter("a factory decides on its layers itself", param_hint="--layers")
    if os.getcwd() not in sys.path:  # the console script leaves it out
        sys.path.append(os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise click.BadParameter(f"can't import {name}: {error}", param_hint="--model") from None
    module = factory()
    if not isinstance(module, nn.Module):
        raise click.BadParameter(
            f"{name}() gives {type(module).__name__}, no nn.Module", param_hint="--model"
        )
    return module


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _register_attention() -> None:
    """transformers' SDPA attention with no mask tensor where nothing but causality is asked for.

    Compiled, transformers builds an [N, 1, S, S] mask even then (it skips it from torch 2.14 on), which keeps SDPA off
    its fast causal path: the dense contestants would be slower than they need be.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(**arguments: Any) -> Tensor | None:
        is_causal = arguments.get("attention_mask") is None and arguments.get("local_size") is None
        return None if is_causal else sdpa_mask(**arguments)

    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    AttentionInterface.register(UNGROUPED, ungrouped_attention)
    for name in (ATTENTION, UNGROUPED):
        AttentionMaskInterface.register(name, mask)


def ungrouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """SDPA on keys and values repeated for each query head, for transformers' AttentionInterface."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling
    )
    return out.transpose(1, 2), None


def count_work(model: Model) -> ModelWork:
    """Count by running rows of 8 and 16 tokens: what grows with them is linear layers, with their square attention.

    Every pair is counted here, of which a causal model sees half. The loss then counts the pairs that it sees.
    """
    flops = {(s, k): _flops(model, s, k) for s, k in ((8, 1), (16, 1), (8, 2))}
    per_prediction = flops[8, 2] - flops[8, 1] if model.has_logits_to_keep else 0
    short, long = (
        flops[s, 1] - 2 * per_prediction for s in (8, 16)
    )  # `count` tokens ask for one position more
    per_pair = (long - 2 * short) // (16 * 16 - 2 * 8 * 8)
    per_token = (short - 8 * 8 * per_pair) // 8
    return ModelWork(per_token // 2, per_pair // 2, per_prediction // 2)  # a multiply-add is two


def _flops(model: Model, positions: int, count: int) -> int:
    ids = torch.ones(1, positions, dtype=torch.int64, device=next(model.module.parameters()).device)
    # flash kernels of CPUs aren't counted, and those of GPUs vary in what they count
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        token_logprobs(model, ids, count)
    return counter.get_total_flops()
