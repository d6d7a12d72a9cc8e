"""Multi-query attention: one KV head by expand, is_causal without padding and a float mask with it, sandwich norms,
no positions at all (the mask alone orders the tokens): rows shifted by padding still share. Padding."""

import torch
import torch.nn.functional as F
from torch import nn

from .parts import RMSNorm, SwiGLU


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, dim + 2 * self.head_dim)
        self.out = nn.Linear(dim, dim)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)

    def forward(self, x, mask):
        N, S, D = x.shape
        q, k, v = self.qkv(x).split([D, self.head_dim, self.head_dim], dim=-1)
        q = self.q_norm(q.unflatten(-1, (self.heads, self.head_dim))).transpose(1, 2)
        k = self.k_norm(k).unsqueeze(1).expand(-1, self.heads, -1, -1)
        v = v.unsqueeze(1).expand(N, self.heads, S, self.head_dim)
        y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, mask is None)
        return self.out(y.transpose(1, 2).flatten(2, 3))


class SandwichBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn, self.mlp = Attention(dim, heads), SwiGLU(dim)
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(4))

    def forward(self, x, mask):
        x = x + self.norms[1](self.attn(self.norms[0](x), mask))
        return x + self.norms[3](self.mlp(self.norms[2](x)))


class MultiQueryLM(nn.Module):
    supports_padding = True
    positions = None

    def __init__(self, vocab=31, dim=32, heads=4, layers=2):
        super().__init__()
        self.scale = dim**0.5
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(SandwichBlock(dim, heads) for _ in range(layers))
        self.norm = RMSNorm(dim)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids) * self.scale
        mask = None
        if attention_mask is not None:
            N, S = attention_mask.shape
            lowest = torch.finfo(x.dtype).min
            mask = torch.full((S, S), lowest, dtype=x.dtype, device=x.device).triu(1)
            mask = mask[None, None].expand(N, 1, S, S).clone()
            mask = mask.masked_fill(attention_mask[:, None, None, :] == 0, lowest)
        for block in self.blocks:
            x = block(x, mask)
        logits = F.linear(self.norm(x), self.embed.weight) / self.scale
        return 10.0 * torch.tanh(logits / 10.0)
