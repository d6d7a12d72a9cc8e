"""A causal language model of drawn parts: whatever combination of heads, masks, norms, positions and experts."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from zoo.parts import RMSNorm, rotary_angles, rotate_half, rotate_interleaved


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a model is made of; each field's values are in `CHOICES`."""

    layers: int = 1
    kv_heads: int = 2
    group: int = 1  # query heads to a key head
    head_size: int = 4
    value_size: int = 4
    norm: str = "rms"
    norm_place: str = "pre"
    positions: str = "half"
    qkv: str = "separate"
    repeat: str = "expand"
    attention: str = "sdpa"
    mask: str = "bool"
    window: int | None = None
    chunk: int | None = None
    window_every: int = 1  # layers of which one has the window or the chunks
    block: str = "serial"
    ffn: str = "swiglu"
    bias: bool = False
    tied: bool = False
    qk_norm: bool = False
    scale: float | None = None
    layer_scale: bool = False


CHOICES = {
    "layers": [1, 2, 3],
    "kv_heads": [1, 2, 3],
    "group": [1, 2, 3],
    "head_size": [4, 6],
    "value_size": [4, 6],
    "norm": ["layer", "rms", "none"],
    "norm_place": ["pre", "post", "sandwich"],
    "positions": ["half", "interleaved", "partial", "learned", "sinusoidal", "none"],
    "qkv": ["separate", "split", "unbind"],
    "repeat": ["expand", "interleave", "gqa"],
    "attention": ["sdpa", "matmul"],
    "mask": ["bool", "additive", "is_causal", "fill"],
    "window": [None, None, 1, 3],
    "chunk": [None, None, None, 4],
    "window_every": [1, 2],
    "block": ["serial", "parallel"],
    "ffn": ["gelu", "swiglu", "relu-squared", "experts-dense", "experts-one-hot", "experts-sorted"],
    "bias": [False, True],
    "tied": [False, True],
    "qk_norm": [False, True],
    "scale": [None, 0.3],
    "layer_scale": [False, True],
}


class Experts(nn.Module):
    """Top 2 of 3 experts: all computed and weighted, masked one by one, or tokens sorted by expert and back."""

    def __init__(self, dim: int, kind: str, experts: int = 3, k: int = 2):
        super().__init__()
        self.kind, self.k = kind, k
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, dim, 2 * dim) * dim**-0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * dim, dim) * dim**-0.5)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(self.k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return getattr(self, self.kind.replace("-", "_"))(flat, weights, chosen).view(x.shape)

    def experts_dense(self, x, weights, chosen):
        share = torch.zeros(len(x), len(self.up), dtype=x.dtype).scatter(1, chosen, weights)
        hidden = F.silu(torch.einsum("td,edf->tef", x, self.up))
        return torch.einsum("tef,efd,te->td", hidden, self.down, share)

    def experts_one_hot(self, x, weights, chosen):
        out = torch.zeros_like(x)
        for expert in range(len(self.up)):
            share = ((chosen == expert) * weights).sum(-1, keepdim=True)
            out = out + share * (F.silu(x @ self.up[expert]) @ self.down[expert])
        return out

    def experts_sorted(self, x, weights, chosen):
        flat = chosen.reshape(-1)
        by_expert, order = torch.sort(flat)
        rows = x[order // self.k].unsqueeze(1)
        hidden = F.silu(torch.bmm(rows, self.up[by_expert]))
        entries = torch.bmm(hidden, self.down[by_expert]).squeeze(1) * weights.reshape(-1)[order][:, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return entries[back].view(len(x), self.k, -1).sum(1)


class FeedForward(nn.Module):
    def __init__(self, dim: int, kind: str, bias: bool):
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(dim, 4 * dim if kind == "swiglu" else 2 * dim, bias=bias)
        self.down = nn.Linear(2 * dim, dim, bias=bias)

    def forward(self, x):
        up = self.up(x)
        if self.kind == "swiglu":
            gate, up = up.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(up) if self.kind == "gelu" else F.relu(up).square())


class Attention(nn.Module):
    """x [N, S, dim] → [N, S, dim]."""

    def __init__(self, dim: int, parts: Parts):
        super().__init__()
        self.parts = parts
        kv, heads = parts.kv_heads, parts.kv_heads * parts.group
        self.sizes = (heads * parts.head_size, kv * parts.head_size, kv * parts.value_size)
        if parts.qkv == "separate":
            self.q, self.k, self.v = (nn.Linear(dim, size, bias=parts.bias) for size in self.sizes)
        else:
            self.qkv = nn.Linear(dim, sum(self.sizes), bias=parts.bias)
        self.out = nn.Linear(heads * parts.value_size, dim, bias=parts.bias)
        self.norms = (
            nn.ModuleList([norm(parts.head_size, "rms") for _ in range(2)]) if parts.qk_norm else None
        )

    def forward(self, x, angles, mask, is_causal):
        parts = self.parts
        q, k, v = (y.unflatten(-1, (-1, size)).transpose(1, 2) for y, size in self.project(x))
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        if angles is not None:
            q, k = rotated(q, angles, parts.positions), rotated(k, angles, parts.positions)
        y = self.attend(q, k, v, mask, is_causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def project(self, x):
        parts = self.parts
        sizes = (parts.head_size, parts.head_size, parts.value_size)
        if parts.qkv == "separate":
            return zip((self.q(x), self.k(x), self.v(x)), sizes)
        if parts.qkv == "unbind" and parts.group == 1 and parts.head_size == parts.value_size:
            return zip(self.qkv(x).unflatten(-1, (3, -1)).unbind(-2), sizes)
        return zip(self.qkv(x).split(self.sizes, dim=-1), sizes)

    def attend(self, q, k, v, mask, is_causal):
        parts, group = self.parts, self.parts.group
        scale = parts.scale or parts.head_size**-0.5
        if parts.attention == "sdpa" and parts.repeat == "gqa":
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
            )
        if group > 1 and parts.repeat == "interleave":
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        elif group > 1:
            k, v = (y[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for y in (k, v))
        if parts.attention == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
        scores = torch.matmul(q * scale, k.transpose(-1, -2))
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
        return scores.softmax(-1) @ v


class Layer(nn.Module):
    def __init__(self, dim: int, parts: Parts, is_local: bool):
        super().__init__()
        self.parts, self.is_local = parts, is_local
        self.attention = Attention(dim, parts)
        self.ffn = (
            Experts(dim, parts.ffn) if "experts" in parts.ffn else FeedForward(dim, parts.ffn, parts.bias)
        )
        self.norms = nn.ModuleList([norm(dim, parts.norm) for _ in range(4)])
        self.scales = nn.Parameter(torch.full((2, dim), 0.5)) if parts.layer_scale else None

    def forward(self, x, angles, masks, is_causal):
        which = int(self.is_local)  # torch 2.11 traces no index that is a bool
        mask, causal = masks[which], is_causal[which]

        def attention(y):
            return self.scaled(0, self.attention(y, angles, mask, causal))

        def ffn(y):
            return self.scaled(1, self.ffn(y))

        pre, post = self.norms[:2], self.norms[2:]
        if self.parts.block == "parallel":
            return x + attention(pre[0](x)) + ffn(pre[1](x))
        if self.parts.norm_place == "post":
            x = post[0](x + attention(x))
            return post[1](x + ffn(x))
        if self.parts.norm_place == "sandwich":
            x = x + post[0](attention(pre[0](x)))
            return x + post[1](ffn(pre[1](x)))
        x = x + attention(pre[0](x))
        return x + ffn(pre[1](x))

    def scaled(self, which, y):
        return y if self.scales is None else self.scales[which] * y


class RandomLM(nn.Module):
    """ids [N, S], attention_mask [N, S] → logits [N, S, vocab]."""

    def __init__(self, parts: Parts, vocab: int = 7, dim: int = 12, longest: int = 32):
        super().__init__()
        self.parts = parts
        self.embed = nn.Embedding(vocab, dim)
        self.embed_positions = nn.Embedding(longest, dim) if parts.positions == "learned" else None
        local = [parts.window_every == 1 or i % 2 == 1 for i in range(parts.layers)]
        self.layers = nn.ModuleList([Layer(dim, parts, is_local) for is_local in local])
        self.norm = norm(dim, parts.norm)
        self.head = nn.Linear(dim, vocab, bias=parts.bias)
        if parts.tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask):
        parts = self.parts
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids)
        angles = None
        if parts.positions == "learned":
            x = x + self.embed_positions(positions)
        elif parts.positions == "sinusoidal":
            angle = rotary_angles(positions, x.shape[-1])
            x = x + torch.cat([angle.sin(), angle.cos()], dim=-1).to(x.dtype)
        elif parts.positions != "none":
            angles = rotary_angles(positions, parts.head_size // (2 if parts.positions == "partial" else 1))
        masks, is_causal = self.masks(positions, attention_mask, x.dtype)
        for layer in self.layers:
            x = layer(x, angles, masks, is_causal)
        return self.head(self.norm(x))

    def masks(self, positions, attention_mask, dtype):
        """Of global and of local layers, and whether SDPA's own causal mask is enough."""
        parts = self.parts
        behind = positions[:, None] - positions[None, :]
        allowed = behind >= 0
        local = allowed
        if parts.window is not None:
            local = local & (behind < parts.window)
        if parts.chunk is not None:
            local = local & (positions[:, None] // parts.chunk == positions[None, :] // parts.chunk)
        is_causal = [False, False]
        masks = []
        for which, mask in enumerate((allowed, local)):
            if parts.mask == "is_causal" and parts.attention == "sdpa" and mask is allowed:
                is_causal[which] = True
                masks.append(None)
                continue
            mask = mask & attention_mask.bool()[:, None, None, :]
            if parts.mask == "additive":
                mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            masks.append(mask)
        return masks, is_causal


def norm(dim: int, kind: str) -> nn.Module:
    return {"layer": nn.LayerNorm, "rms": RMSNorm, "none": lambda _: nn.Identity()}[kind](dim)


def rotated(x, angles, kind):
    """x [N, H, S, D] turned by angles [S, D/2], or the first half of D by [S, D/4]."""
    if kind == "partial":
        turned, rest = x[..., : 2 * angles.shape[-1]], x[..., 2 * angles.shape[-1] :]
        return torch.cat([rotated(turned, angles, "half"), rest], dim=-1)
    if kind == "interleaved":
        cos, sin = (f.repeat_interleave(2, dim=-1).to(x.dtype) for f in (angles.cos(), angles.sin()))
        return x * cos + rotate_interleaved(x) * sin
    cos, sin = (torch.cat([f, f], dim=-1).to(x.dtype) for f in (angles.cos(), angles.sin()))
    return x * cos + rotate_half(x) * sin
