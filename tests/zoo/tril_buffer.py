"""The teaching GPT: a tril buffer, masked_fill, softmax, matmul; qkv by unbind; a Parameter slice; post-norm.
No padding."""

import torch
import torch.nn.functional as F
from torch import nn

from .parts import GeluMLP


class Attention(nn.Module):
    def __init__(self, dim, heads, context):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("tril", torch.tril(torch.ones(context, context)))

    def forward(self, x):
        N, S, D = x.shape
        q, k, v = self.qkv(x).view(N, S, 3, self.heads, D // self.heads).unbind(dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:S, :S] == 0, float("-inf"))
        wei = F.softmax(wei, dim=-1)
        return self.proj((wei @ v).transpose(1, 2).reshape(N, S, D))


class Block(nn.Module):
    def __init__(self, dim, heads, context):
        super().__init__()
        self.attn, self.norm1 = Attention(dim, heads, context), nn.LayerNorm(dim)
        self.mlp, self.norm2 = GeluMLP(dim), nn.LayerNorm(dim)

    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class TrilBufferGPT(nn.Module):
    supports_padding = False
    positions = "dense"

    def __init__(self, vocab=31, dim=32, heads=4, layers=2, context=64):
        super().__init__()
        self.tok = nn.Embedding(vocab, dim)
        self.pos = nn.Parameter(0.1 * torch.randn(context, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, context) for _ in range(layers)])
        self.head = nn.Linear(dim, vocab)

    def forward(self, input_ids, attention_mask=None):
        S = input_ids.shape[1]
        return self.head(self.blocks(self.tok(input_ids) + self.pos[:S]))
