"""Meta's llama: complex rotary from a table, KV by repeat_interleave, full(-inf) + triu if S > 1. No padding."""

import torch
import torch.nn.functional as F
from torch import nn

from .parts import RMSNorm, SwiGLU, rotary_angles


def apply_rotary_emb(x, freqs_cis):
    turned = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2)) * freqs_cis[None, :, None]
    return torch.view_as_real(turned).flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wkv = nn.Linear(dim, 2 * kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x, freqs_cis, mask):
        bsz, seqlen, _ = x.shape
        xq = self.wq(x).view(bsz, seqlen, self.heads, self.head_dim)
        xk, xv = self.wkv(x).view(bsz, seqlen, 2, self.kv_heads, self.head_dim).unbind(2)
        xq, xk = apply_rotary_emb(xq, freqs_cis), apply_rotary_emb(xk, freqs_cis)
        keys = torch.repeat_interleave(xk, self.heads // self.kv_heads, dim=2).transpose(1, 2)
        values = torch.repeat_interleave(xv, self.heads // self.kv_heads, dim=2).transpose(1, 2)
        scores = torch.matmul(xq.transpose(1, 2), keys.transpose(2, 3)) / self.head_dim**0.5
        if mask is not None:
            scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        return self.wo(torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1))


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(dim), Attention(dim, heads, kv_heads)
        self.ffn_norm, self.feed_forward = RMSNorm(dim), SwiGLU(dim)

    def forward(self, x, freqs_cis, mask):
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class ComplexRotaryLM(nn.Module):
    supports_padding = False
    positions = "dense"

    def __init__(self, vocab=31, dim=32, heads=4, kv_heads=2, layers=2, context=64):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(Block(dim, heads, kv_heads) for _ in range(layers))
        self.norm, self.output = RMSNorm(dim), nn.Linear(dim, vocab, bias=False)
        angles = rotary_angles(torch.arange(context), dim // heads).double()
        self.freqs_cis = torch.polar(torch.ones_like(angles), angles)  # a plain attribute, as in the original

    def forward(self, input_ids, attention_mask=None):
        _, seqlen = input_ids.shape
        h = self.tok_embeddings(input_ids)
        mask = None
        if seqlen > 1:
            mask = torch.full((1, 1, seqlen, seqlen), float("-inf"), device=h.device)
            mask = torch.triu(mask, diagonal=1).type_as(h)
        for layer in self.layers:
            h = layer(h, self.freqs_cis[:seqlen], mask)
        return self.output(self.norm(h))
