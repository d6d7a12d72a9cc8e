"""nn.MultiheadAttention with need_weights=True (baddbmm, softmax, bmm) and the square subsequent mask; post-norm.
No padding."""

import torch
from torch import nn

from .parts import GeluMLP


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn, self.norm1 = nn.MultiheadAttention(dim, heads, batch_first=True), nn.LayerNorm(dim)
        self.mlp, self.norm2 = GeluMLP(dim), nn.LayerNorm(dim)

    def forward(self, x, mask):
        y, _ = self.attn(x, x, x, attn_mask=mask, need_weights=True)
        x = self.norm1(x + y)
        return self.norm2(x + self.mlp(x))


class TorchMHAWeightsLM(nn.Module):
    supports_padding = False
    positions = "dense"

    def __init__(self, vocab=31, dim=32, heads=4, layers=2, context=64):
        super().__init__()
        self.tok = nn.Embedding(vocab, dim)
        self.register_buffer("pos", self.sinusoids(context, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, vocab)

    @staticmethod
    def sinusoids(context, dim):
        angles = torch.arange(context)[:, None] / 100.0 ** (torch.arange(0, dim, 2) / dim)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)

    def forward(self, input_ids, attention_mask=None):
        S = input_ids.size(1)
        x = self.tok(input_ids) + self.pos[None, :S]
        mask = nn.Transformer.generate_square_subsequent_mask(S, device=x.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)
