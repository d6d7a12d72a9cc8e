"""GPT-J: attention and MLP in parallel, partial interleaved rotary, qkv by view + permute, where-masking. Padding."""

import torch
from torch import nn

from .parts import GeluMLP, rotary_angles, rotate_interleaved


class ParallelBlock(nn.Module):
    def __init__(self, dim, heads, rotary_dim):
        super().__init__()
        self.heads, self.rotary_dim = heads, rotary_dim
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = GeluMLP(dim)

    def rotate(self, x, cos, sin):
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        return torch.cat((turned * cos + rotate_interleaved(turned) * sin, rest), dim=-1)

    def forward(self, x, cos, sin, allowed):
        N, S, D = x.shape
        h = self.norm(x)
        q, k, v = self.qkv(h).view(N, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        scores = (q * (D // self.heads) ** -0.5) @ k.mT
        scores = torch.where(allowed, scores, torch.finfo(scores.dtype).min)
        y = (scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2).reshape(N, S, D)
        return x + self.out(y) + self.mlp(h)


class ParallelGPTJ(nn.Module):
    supports_padding = True
    positions = "dense"

    def __init__(self, vocab=31, dim=32, heads=4, layers=2, rotary_dim=4):
        super().__init__()
        self.rotary_dim = rotary_dim
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(ParallelBlock(dim, heads, rotary_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab)

    def forward(self, input_ids, attention_mask=None):
        S = input_ids.size(-1)
        allowed = torch.ones(S, S, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            allowed = torch.logical_and(allowed, attention_mask[:, None, None].to(torch.bool))
        x = self.embed(input_ids)
        angles = rotary_angles(torch.arange(S, device=x.device), self.rotary_dim).repeat_interleave(2, dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, allowed)
        return self.lm_head(self.norm(x))
