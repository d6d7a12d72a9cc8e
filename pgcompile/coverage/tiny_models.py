"""Tiny random instances of every causal-LM type that the installed transformers knows.

For pgcompile's own bench: `pgcompile coverage` builds each type and compares packed with eager. Model families are
named in this folder and in the tests only, never in the compiler.

A config starts from its type's defaults. One general rule shrinks it, from the names of its fields: sizes are cut down
to `UPPER_BOUNDS`, and one layer of each kind is kept. `OVERRIDES` has what the rule can't know. A type in no table gets
the general rule alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@dataclass(frozen=True)
class TinyModel:
    """A model with two to four layers that runs in well under a second on a CPU.

    Args:
        model: float32, in eval mode, on the CPU.
        vocab_size: token ids must be below. 0 to 2 are padding, start and end; 120 to 126 mark images and the like.
        parameters: names of the parameters of `model.forward`.
        attention: the implementation asked for, "sdpa", or "eager" where transformers has no other.
        note: how the model differs from what the type's name promises; empty for most.
    """

    model: nn.Module
    model_type: str
    vocab_size: int
    parameters: tuple[str, ...]
    attention: str
    note: str


def build(model_type: str) -> TinyModel:
    """A tiny instance of one of `MODEL_TYPES`, the same one at every call. Leaves the global random state as it was.

    Raises:
        KeyError: transformers has no causal LM of this type.
        Exception: whatever transformers raises for a config that it refuses. That happens to the assistants of
            gemma4 and gemma4_unified, which no override helps: they need another model's key cache to run.
    """
    config_class, model_class = _classes(model_type)
    model, attention = _random_model(config_class, model_class)
    model.float().eval()
    _add_noise(model)
    return TinyModel(
        model=model,
        model_type=model_type,
        vocab_size=model.config.get_text_config().vocab_size,
        parameters=tuple(inspect.signature(model.forward).parameters),
        attention=attention,
        note=_note(model_type, config_class),
    )


def _classes(model_type: str) -> tuple[type[PreTrainedConfig], Any]:
    """The config to build from and the model's class: of a multimodal type, those of its language model."""
    config_class = CONFIG_MAPPING[TEXT_TYPES.get(model_type, model_type)]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    if model_class.config_class in config_class.sub_configs.values():
        config_class = model_class.config_class
    return config_class, model_class


def _random_model(config_class: type[PreTrainedConfig], model_class: Any) -> tuple[Any, str]:
    """A newly initialized model and its attention implementation: "sdpa" where transformers has it, else "eager"."""
    try:
        return _initialized(config_class, model_class, "sdpa"), "sdpa"
    except ValueError as error:
        # So transformers refuses a model that spells its attention out; only the text tells it from other errors.
        if "does not support an attention implementation" not in str(error):
            raise
    return _initialized(config_class, model_class, "eager"), "eager"


def _initialized(config_class: type[PreTrainedConfig], model_class: Any, attention: str) -> Any:
    """A model from transformers' own initialization under a fixed seed."""
    # devices=() and the CPU's own generator: torch.manual_seed would seed every GPU as well.
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        # What AutoModelForCausalLM.from_config calls; that one doesn't take the decoders of musicgen.
        return model_class._from_config(shrunk_config(config_class), attn_implementation=attention)


def _add_noise(model: nn.Module) -> None:
    """Move every parameter off its initial value: zeros, ones and weights of 0.02 hide a token that leaks."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _note(model_type: str, config_class: type[PreTrainedConfig]) -> str:
    is_part = config_class is not CONFIG_MAPPING[model_type]
    notes = [f"{config_class.model_type} alone"] if is_part else []
    if model_type in NOTES:
        notes.append(NOTES[model_type])
    return "; ".join(notes)


def shrunk_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default config made small, its sub configs too.

    Only what is too large changes, or isn't what the bench needs: configs derive fields from others as long as nobody
    sets them, so a field set to its own default can contradict the rest.

    Raises:
        Exception: whatever transformers raises, if the shrunk sizes don't fit together.
    """
    default = config_class()
    default.per_layer_config = None  # while layers differ in a field, reading the field raises
    values = {field.name: getattr(default, field.name) for field in fields(config_class)}
    layers = _layers_to_keep(values)
    bounds = UPPER_BOUNDS | dict.fromkeys(LAYER_COUNTS, len(layers))
    if "kv_lora_rank" in values:
        bounds["num_key_value_heads"] = HEADS  # latent attention has a key head for every query head

    changes: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = shrunk_config(type(value))
        elif name in LAYER_LISTS and value:
            changes[name] = [value[layer] for layer in layers]
        elif name == "rope_parameters" and ORIGINAL_LENGTH in (value or {}):
            changes[name] = value | {ORIGINAL_LENGTH: bounds[ORIGINAL_LENGTH]}
        elif name.endswith(("_token_id", "_token_index")) and value is not None:
            changes[name] = _token_id(name)
        elif name in SETTINGS:
            changes[name] = SETTINGS[name]
        elif isinstance(value, int | float) and value > bounds.get(name, value):
            changes[name] = bounds[name]
    changes |= copy.deepcopy(OVERRIDES.get(config_class.model_type, {}))  # configs change lists in place
    return config_class(**changes)


def _layers_to_keep(values: dict[str, Any]) -> Sequence[int]:
    """Indices of the first layer of each kind, two at least. A layer's kind is what all lists say about it."""
    first: dict[Hashable, int] = {}
    lists = [values[name] for name in LAYER_LISTS if values.get(name)]
    for layer, kind in enumerate(zip(*lists, strict=False)):
        first.setdefault(kind, layer)
    return list(first.values()) if len(first) > 1 else (0, 1)


def _token_id(name: str) -> int:
    """Padding, start and end have the first ids; the others some of the last ones, which the bench's batches leave out.

    The name alone decides which, so that a type's special tokens mostly differ and are the same in every run.
    """
    return TOKEN_IDS.get(name, 120 + sum(map(ord, name)) % 7)


# --- Sizes -----------------------------------------------------------------------------------------------------------

HEADS = 4  # of 16, which makes the hidden size of 64; half as many key heads
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Types made for encoders are causal only as decoders; the bench doesn't generate, so it needs no key cache.
SETTINGS = {"is_decoder": True, "use_cache": False}

LAYER_COUNTS = (
    "num_hidden_layers n_layer n_layers num_layers num_blocks num_layers_per_stack "
    "encoder_layers decoder_layers num_encoder_layers num_decoder_layers"
).split()
LAYER_LISTS = ("layer_types", "mlp_layer_types", "indexer_types", "no_rope_layers")  # an entry for each layer

# A field, or an entry of rope_parameters: how many positions rotary tables were made for before they were scaled.
ORIGINAL_LENGTH = "original_max_position_embeddings"

# The largest value of a number, and the fields it holds for. The bench has 24 positions: what works in windows, chunks
# or top-k of positions gets 8 or less, so that it shows.
_BOUNDS: tuple[tuple[int, str], ...] = (
    # Tokens and positions.
    (128, "vocab_size vocab_size_per_layer_input audio_vocab_size unpadded_vocab_size"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    (64, f"{ORIGINAL_LENGTH} max_source_positions"),
    # Widths of the token stream, and of what is added to it or read from it.
    (64, "hidden_size d_model n_embd embedding_size emb_dim input_embedding_size output_embedding_size"),
    (8, "hidden_size_per_layer_input"),
    (16, "pronunciation_embed_dim shape_embed_dim classifier_proj_size"),
    # Attention: query heads, key heads, sizes of a head, ranks of factored projections.
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    (HEADS, "decoder_attention_heads num_decoder_attention_heads"),
    (HEADS, "encoder_attention_heads num_encoder_attention_heads"),
    (HEADS // 2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    (16, "head_dim dim_head swa_head_dim attention_head_size kv_channels"),
    (16, "qk_nope_head_dim qk_rope_head_dim v_head_dim query_pre_attn_scalar"),
    (8, "rotary_dim"),
    (32, "q_lora_rank kv_lora_rank"),
    (16, "o_lora_rank"),
    (2, "o_groups"),
    # Windows and chunks, in positions.
    (8, "sliding_window sliding_window_size window_size attention_window_size keep_window_size"),
    (8, "local_attention attention_chunk_size block_size"),
    (16, "log_scaling_n_floor floor_scale"),
    # Indexers, which choose the keys of sparse attention.
    (2, "index_n_heads index_topk_blocks"),
    (4, "index_block_size"),
    (8, "index_topk"),
    (16, "index_head_dim"),
    # Tables of relative positions.
    (4, "d_rel"),
    (8, "num_buckets position_bias_num_buckets"),
    (16, "rel_extent"),
    (32, "relative_max_distance position_bias_max_distance"),
    # Linear attention and state-space layers: states, heads, sizes of a head, chunks of positions.
    (8, "state_size ssm_state_size mamba_d_state chunk_size mamba_chunk_size"),
    (2, "n_groups n_mamba_heads linear_num_key_heads"),
    (4, "mamba_n_heads mamba_num_heads linear_num_heads linear_num_value_heads"),
    (16, "linear_head_dim linear_key_head_dim linear_value_head_dim"),
    (32, "mamba_head_dim"),
    (128, "mamba_d_ssm"),
    # Feed-forward layers.
    (64, "intermediate_size intermediate_size_mlp dense_intermediate_size feed_forward_size ffn_hidden_size"),
    (64, "ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff d_inner"),
    # Mixtures of experts: widths, experts, experts per token, shared ones, groups, dense layers at the start.
    (32, "moe_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size"),
    (32, "shared_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    (16, "router_hidden_size"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k zero_expert_num"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group"),
    (1, "first_k_dense_replace num_dense_layers"),
    (0, "moe_layer_start_index"),
    # Side streams, adapters and low-rank residuals.
    (2, "altup_num_inputs hc_mult hc_count"),
    (8, "adapter_rank laurel_rank gated_norm_rank"),
    (16, "hc_lowrank"),
    # Layers: one before those with windows, one to a residual block, none that predict further tokens.
    (1, "max_window_layers n_layers_per_attn_res_block"),
    (0, "num_nextn_predict_layers num_mtp_layers"),
    # Inputs besides tokens: glyphs, prompts, bytes, sound.
    (32, "pronunciation_vocab_size shape_vocab_size"),
    (4, "prompt_types prompt_length segment_types"),
    (64, "encoder_hash_byte_group_vocab"),
    (8, "num_mel_bins"),
)
UPPER_BOUNDS: dict[str, int] = {name: bound for bound, names in _BOUNDS for name in names.split()}

# --- Types -----------------------------------------------------------------------------------------------------------

# Types whose causal LM has towers for images and sound around the language model, and the type of that model alone.
TEXT_TYPES = {"gemma3n": "gemma3n_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}

NOTES = {
    "musicgen": "one codebook",
    "musicgen_melody": "one codebook",
    "xlm": "with causal=True, which isn't its default",
    "xlnet": "attends in both directions: its causal mode fails on batches of more than one row",
}

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_HYBRID = ["linear_attention", "hybrid"]

# Fields by the config's model_type (a sub config has its own), where the general rule doesn't reach: defaults of None,
# lists that aren't one entry per layer, kinds of layers that the defaults leave out, sizes bound to other sizes.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "blt_global_transformer": dict(hidden_size=128, num_attention_heads=4),
    "blt_local_decoder": dict(hidden_size_global=128, vocab_size=128),
    "blt_local_encoder": dict(hidden_size_global=128, vocab_size=128, num_hidden_layers=2),
    "cohere_compass_text": dict(
        layer_types=_SLIDING_AND_FULL, rope_parameters={kind: dict(_ROTARY) for kind in _SLIDING_AND_FULL}
    ),
    "dbrx": dict(attn_config=dict(rope_theta=10000.0, clip_qkv=8)),
    "deepseek_v2": dict(num_experts_per_tok=2, n_group=1, topk_group=1),
    "deepseek_v4": dict(
        num_hidden_layers=4,
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        mlp_layer_types=["hash_moe", "moe", "moe", "hash_moe"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    ),
    "dots1": dict(
        head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1
    ),
    "dots3_note_text": dict(
        layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
        head_dim=32,
        per_layer_config={1: dict(num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=16)},
    ),
    "flint": dict(mlp_only_layers=[0]),
    "gemma3n_text": dict(
        num_hidden_layers=4,
        layer_types=_SLIDING_AND_FULL * 2,
        num_kv_shared_layers=2,
        intermediate_size=64,
        activation_sparsity_pattern=[0.95, 0.0, 0.95, 0.0],
    ),
    "gemma4_text": dict(global_head_dim=32),
    "gemma4_unified_text": dict(global_head_dim=32),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "hunyuan_v1_dense": dict(head_dim=16),
    "hunyuan_v1_moe": dict(head_dim=16),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "laguna": dict(layer_types=_SLIDING_AND_FULL[::-1]),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(head_dim=32),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"]),
    "ministral": dict(head_dim=16, layer_types=_SLIDING_AND_FULL),
    "musicgen_decoder": dict(num_codebooks=1),
    "musicgen_melody_decoder": dict(num_codebooks=1),
    "nemotron": dict(num_key_value_heads=2),
    "qwen4_exp_text": dict(
        num_hidden_layers=3,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        eos_token_id=2,
        ple_layer_ids=[1],
        ple_embed_dim=32,
        heads_per_ngram=2,
        ngram_vocab_size_base=97,
        split_ngram_parts=2,
        make_ngram_vocab_size_divisible_by=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=4,
    ),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(
        attn_layers=["local", "lsh"],
        axial_pos_shape=[8, 8],
        axial_pos_embds_dim=[32, 32],
        lsh_attn_chunk_length=8,
        local_attn_chunk_length=8,
        num_buckets=4,
        hash_seed=0,
    ),
    "xlm": dict(causal=True, use_lang_emb=False, mask_index=122, unk_index=126),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(num_hidden_layers=4, layers_block_type=_HYBRID * 2),
    "zamba2": dict(num_hidden_layers=4, layers_block_type=_HYBRID * 2),
    "zaya": dict(layer_types=["hybrid", "hybrid_sliding"], sliding_window=8),
}
