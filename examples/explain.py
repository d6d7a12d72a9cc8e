"""What pgcompile says about a model that it packs, and about one that it can't."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import pgcompile


class Centered(nn.Module):
    """Subtracts the mean over positions from the embeddings: a token then depends on those after it."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeddings = self.model.get_input_embeddings()(input_ids)
        centered = embeddings - embeddings.mean(dim=1, keepdim=True)
        return self.model(inputs_embeds=centered, attention_mask=attention_mask, use_cache=False).logits


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
config.use_cache = False
model = LlamaForCausalLM(config)

# Two prompts of 100 tokens with four answers each; the last answer ends early.
prompts = torch.randint(256, (2, 100)).repeat_interleave(4, dim=0)
ids = torch.cat([prompts, torch.randint(256, (8, 10))], dim=1)
mask = torch.ones_like(ids)
mask[-1, -6:] = 0

print("A Llama:\n")
print(pgcompile.explain(model, input_ids=ids, attention_mask=mask))
print("\nThe same Llama over centered embeddings:\n")
print(pgcompile.explain(Centered(model), input_ids=ids, attention_mask=mask))
