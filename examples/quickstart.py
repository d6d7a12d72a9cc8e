"""Four rows that share a prompt, through a small Llama: the same loss and gradient with pgcompile as without."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pgcompile

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config)
prompt = torch.randint(256, (1, 100)).expand(4, -1)  # one prompt ...
ids = torch.cat([prompt, torch.randint(256, (4, 10))], dim=1)  # ... with four answers
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}

eager_loss = model(**batch).loss
(eager_grad,) = torch.autograd.grad(eager_loss, model.model.embed_tokens.weight)
fast = torch.compile(model, backend="pgcompile")
loss = fast(**batch).loss
(grad,) = torch.autograd.grad(loss, model.model.embed_tokens.weight)

print(f"loss {loss:.6f}, without pgcompile {eager_loss:.6f}")
print(
    f"largest difference of a gradient entry: {(grad - eager_grad).abs().max():.1e} of {eager_grad.abs().max():.1e}"
)
print(pgcompile.stats())
