"""nn.MultiheadAttention with need_weights=False, a bool triu mask and key_padding_mask; pre-norm. Padding."""

import torch
from torch import nn

from .parts import GeluMLP


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(dim), GeluMLP(dim)

    def forward(self, x, causal, padding):
        h = self.norm1(x)
        y, _ = self.attn(h, h, h, attn_mask=causal, key_padding_mask=padding, need_weights=False)
        x = x + y
        return x + self.mlp(self.norm2(x))


class TorchMHALM(nn.Module):
    supports_padding = True
    positions = "dense"

    def __init__(self, vocab=31, dim=32, heads=4, layers=2, context=64):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab)

    def forward(self, input_ids, attention_mask=None):
        S = input_ids.shape[1]
        x = self.tok(input_ids) + self.pos(torch.arange(S, device=input_ids.device).unsqueeze(0))
        causal = torch.triu(torch.ones(S, S, dtype=torch.bool, device=x.device), diagonal=1)
        padding = None if attention_mask is None else attention_mask == 0
        for block in self.blocks:
            x = block(x, causal, padding)
        return self.head(self.norm(x))
