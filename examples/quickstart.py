"""One prompt with four answers through a small Llama: pgcompile gives the loss and the gradient that eager gives."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pgcompile

sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, use_cache=False))
prompt, answers = torch.randint(256, (1, 100)), torch.randint(256, (4, 10))
ids = torch.cat([prompt.expand(4, -1), answers], dim=1)

results = {}
for name, run in {"eager": model, "pgcompile": torch.compile(model, backend="pgcompile")}.items():
    loss = run(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    results[name] = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
    print(f"{name:>9}: loss {loss.item():.6f}")

print(f"gradients differ by at most {(results['eager'] - results['pgcompile']).abs().max():.1e}")
print(pgcompile.stats())  # 440 tokens in the batch, 140 distinct ones computed
