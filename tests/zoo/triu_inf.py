"""Additive triu(-inf) built in forward plus additive key padding; qkv by chunk; interleaved rotary. Padding."""

import math

import torch
from torch import nn

from .parts import RMSNorm, SwiGLU, rotary_angles, rotate_interleaved


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x, cos, sin, mask):
        N, S, _ = x.shape
        q, k, v = (t.reshape(N, S, self.heads, self.head_dim) for t in self.wqkv(x).chunk(3, dim=-1))
        q = q * cos + rotate_interleaved(q) * sin
        k = k * cos + rotate_interleaved(k) * sin
        scores = torch.matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1)) / math.sqrt(self.head_dim)
        scores = scores + mask
        weights = torch.softmax(scores.float(), dim=-1).type_as(q)
        return self.wo(torch.matmul(weights, v.transpose(1, 2)).permute(0, 2, 1, 3).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(dim), Attention(dim, heads)
        self.mlp_norm, self.mlp = RMSNorm(dim), SwiGLU(dim)

    def forward(self, x, cos, sin, mask):
        x = x + self.attn(self.attn_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))


class TriuInfLM(nn.Module):
    supports_padding = True
    positions = "dense"

    def __init__(self, vocab=31, dim=32, heads=4, layers=2):
        super().__init__()
        self.head_dim = dim // heads
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.out = nn.Linear(dim, vocab, bias=False)

    def forward(self, input_ids, attention_mask=None):
        S = input_ids.shape[1]
        x = self.embed(input_ids)
        angles = rotary_angles(torch.arange(S, device=x.device), self.head_dim).repeat_interleave(2, dim=-1)
        cos, sin = angles.cos().type_as(x)[None, :, None], angles.sin().type_as(x)[None, :, None]
        mask = torch.triu(torch.full((S, S), float("-inf"), device=x.device, dtype=x.dtype), diagonal=1)
        if attention_mask is not None:
            # finfo.min, not -inf: a left-padded query may see padding only, and must not become NaN.
            mask = mask + (1 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.out(self.norm(x))
