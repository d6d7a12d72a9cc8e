"""A llama: half rotary from mask-aware positions, KV by expand, SDPA with bool causal & key padding. Padding."""

import torch
import torch.nn.functional as F
from torch import nn

from .parts import RMSNorm, SwiGLU, rotary_angles, rotate_half


def repeat_kv(x, repeats):
    N, heads, S, D = x.shape
    return x[:, :, None, :, :].expand(N, heads, repeats, S, D).reshape(N, heads * repeats, S, D)


class Attention(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x, cos, sin, mask):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q = self.q_proj(x).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        k, v = repeat_kv(k, self.heads // self.kv_heads), repeat_kv(v, self.heads // self.kv_heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.head_dim**-0.5)
        return self.o_proj(y.transpose(1, 2).reshape(*x.shape[:-1], -1))


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.norm1, self.attn = RMSNorm(dim), Attention(dim, heads, kv_heads)
        self.norm2, self.mlp = RMSNorm(dim), SwiGLU(dim)

    def forward(self, x, cos, sin, mask):
        x = x + self.attn(self.norm1(x), cos, sin, mask)
        return x + self.mlp(self.norm2(x))


class HalfRotaryLM(nn.Module):
    supports_padding = True
    positions = "from_mask"

    def __init__(self, vocab=31, dim=32, heads=4, kv_heads=2, layers=2):
        super().__init__()
        self.head_dim = dim // heads
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, kv_heads) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)

    def forward(self, input_ids, attention_mask=None):
        S = input_ids.shape[1]
        index = torch.arange(S, device=input_ids.device)
        mask = index[:, None] >= index[None, :]
        if attention_mask is None:
            position_ids = index[None]
        else:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            mask = mask & attention_mask[:, None, None, :].bool()
        x = self.embed(input_ids)
        angles = rotary_angles(position_ids, self.head_dim)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.lm_head(self.norm(x))
