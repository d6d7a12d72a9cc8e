"""The fourteen transformers models of the suite, tiny: hidden 32, 2 layers, 4 heads, vocabulary 31, no dropout."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from harness import rewire

VOCAB = 31
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA_LIKE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
CONFIGS = {
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | dict(head_dim=8),
    "mistral": LLAMA_LIKE | dict(head_dim=8),
    "phi3": LLAMA_LIKE | dict(original_max_position_embeddings=64),
    "gpt2": dict(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gpt_neox": dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "opt": dict(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
    ),
    "gemma": LLAMA_LIKE | dict(num_key_value_heads=1, head_dim=8),
    "gemma2": LLAMA_LIKE | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=5),
    "gpt_oss": LLAMA_LIKE
    | dict(
        head_dim=8,
        sliding_window=5,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="batched_mm",
    ),
    # The second layer of four has no rotary positions by default; here the first of two.
    "smollm3": LLAMA_LIKE | dict(no_rope_layers=[0, 1]),
    "olmo2": LLAMA_LIKE,
    "starcoder2": LLAMA_LIKE | dict(residual_dropout=0.0, embedding_dropout=0.0),
}
# Number positions from the mask when none are given; the others use the column index.
POSITIONS_FROM_MASK = {"opt"}


def build(name: str, **overrides) -> nn.Module:
    """A float64 model in training mode, with noise on every parameter (norm weights and biases too)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **dict(vocab_size=VOCAB) | TOKENS | CONFIGS[name] | overrides)
    model = rewire(AutoModelForCausalLM.from_config(config).train())
    # transformers doesn't find it from the class name of GPT-2, and says so in every forward, which breaks the graph.
    model.loss_type = "ForCausalLM"
    return model


def install_capturing_hooks(model: nn.Module) -> nn.Module:
    """What the first forward with `output_hidden_states` does, under a lock, which breaks the graph."""
    maybe_install_capturing_hooks(model)
    maybe_install_capturing_hooks(model.base_model)
    return model
