"""GPT-2's Conv1D (addmm on flattened tokens), a bool causal buffer sliced by lengths, KV by repeat_interleave on heads,
a bool SDPA mask with holes, mask-aware learned positions, embedding and final norms. Padding."""

import torch
import torch.nn.functional as F
from torch import nn


class Conv1D(nn.Module):
    def __init__(self, n_out, n_in):
        super().__init__()
        self.n_out = n_out
        self.weight = nn.Parameter(0.2 * torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        size_out = x.size()[:-1] + (self.n_out,)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class Block(nn.Module):
    def __init__(self, dim, heads, kv_heads, context):
        super().__init__()
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, dim // heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn = Conv1D(dim + 2 * kv_heads * self.head_dim, dim)
        self.c_proj = Conv1D(dim, dim)
        self.c_fc, self.c_out = Conv1D(4 * dim, dim), Conv1D(dim, 4 * dim)
        causal = torch.tril(torch.ones((context, context), dtype=torch.bool)).view(1, 1, context, context)
        self.register_buffer("causal", causal, persistent=False)

    def heads_first(self, x, heads):
        return x.view(*x.size()[:-1], heads, self.head_dim).permute(0, 2, 1, 3)

    def attend(self, x, padding):
        kv = self.kv_heads * self.head_dim
        query, key, value = self.c_attn(x).split((self.dim, kv, kv), dim=2)
        query = self.heads_first(query, self.heads)
        key = self.heads_first(key, self.kv_heads).repeat_interleave(self.heads // self.kv_heads, dim=1)
        value = self.heads_first(value, self.kv_heads).repeat_interleave(self.heads // self.kv_heads, dim=1)
        mask = self.causal[:, :, key.size(-2) - query.size(-2) : key.size(-2), : key.size(-2)]
        if padding is not None:
            mask = mask & padding
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        y = y.permute(0, 2, 1, 3).contiguous()
        return self.c_proj(y.view(*y.size()[:-2], self.dim))

    def forward(self, x, padding):
        x = x + self.attend(self.ln_1(x), padding)
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2Conv1D(nn.Module):
    supports_padding = True
    positions = "from_mask"

    def __init__(self, vocab=31, dim=32, heads=4, kv_heads=2, layers=2, context=64):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.ln_e, self.ln_f = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.h = nn.ModuleList(Block(dim, heads, kv_heads, context) for _ in range(layers))

    def forward(self, input_ids, attention_mask=None):
        padding = None
        if attention_mask is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device).unsqueeze(0)
        else:
            position_ids = attention_mask.long().cumsum(-1) - 1
            position_ids = position_ids.masked_fill(attention_mask == 0, 1)
            padding = attention_mask[:, None, None, :].bool()
        x = self.ln_e(self.wte(input_ids) + self.wpe(position_ids))
        for block in self.h:
            x = block(x, padding)
        return self.ln_f(x) @ self.wte.weight.t()
