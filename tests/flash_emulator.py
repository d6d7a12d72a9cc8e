"""Variable-length flash attention, ATen's and flash-attn's, for CPU tensors: spelled out, with the kernels' demands.

ATen's is registered for the operators themselves, so that calls go through their schemas: an argument in the wrong
place fails; flash-attn's is a package with functions of the same parameters. Demands and results as in PyTorch's
flash_api.cpp. Unlike the kernels they take float32 and float64, for exact tests.
"""

import contextlib
import dataclasses
import types
from collections.abc import Iterator

import torch
from torch import Tensor

INF = float("inf")
Sequence = tuple[slice, slice, Tensor]


@dataclasses.dataclass
class Log:
    """What was called: for each forward (backward) its numbers of sequences, of query-key pairs, and the window."""

    forward: list[tuple[int, int, tuple[int, int]]] = dataclasses.field(default_factory=list)
    backward: list[tuple[int, int, tuple[int, int]]] = dataclasses.field(default_factory=list)


def flash_attn_package(log: Log, version: str) -> dict[str, types.ModuleType]:
    """What `import flash_attn` and its interface find, by name."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        assert alibi_slopes is None
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse, *_ = _forward(
            log, q, k, v, *lengths, dropout_p, causal, return_softmax, scale=softmax_scale, softcap=softcap,
            window_size_left=window_size_left, window_size_right=window_size_right,
        )  # fmt: skip
        return out, lse, q.new_empty(0), q.new_empty(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        assert alibi_slopes is None and isinstance(deterministic, bool)
        assert all(x.is_contiguous() for x in (dq, dk, dv))
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        grads = _backward(
            log, dout, q, k, v, out, softmax_lse, *lengths, dropout_p, causal, None, None,
            scale=softmax_scale, softcap=softcap,
            window_size_left=window_size_left, window_size_right=window_size_right,
        )  # fmt: skip
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)
        return softmax_lse.clone()

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface, package.__version__ = interface, version
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


@contextlib.contextmanager
def flash_on_cpu() -> Iterator[Log]:
    log = Log()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", lambda *a, **k: _forward(log, *a, **k), "CPU")
        library.impl("_flash_attention_backward", lambda *a, **k: _backward(log, *a, **k), "CPU")
        yield log


def _forward(
    log, q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale, window_size_left=-1, window_size_right=-1, softcap=0.0,
):  # fmt: skip
    assert dropout_p == 0 and not return_debug_mask
    visible = _visible(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, window_size_left, window_size_right)
    log.forward.append((len(visible), _pairs(visible), (window_size_left, window_size_right)))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=_wide(q))
    for queries, keys, visible_LS in visible:
        scores = _scores(q, k, queries, keys, scale, softcap).masked_fill(~visible_LS, -INF)
        values = _heads(v, keys, q.shape[1])
        lse_HL = scores.logsumexp(-1)
        out[queries] = (scores.softmax(-1).nan_to_num() @ values).transpose(0, 1).to(out.dtype)
        lse[:, queries] = lse_HL.masked_fill(lse_HL == -INF, INF)  # as in FlashAttention-2
    nothing = q.new_empty(0)
    return out, lse, nothing, nothing, nothing


def _backward(
    log, grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *,
    scale, window_size_left=-1, window_size_right=-1, softcap=0.0,
):  # fmt: skip
    assert dropout_p == 0 and lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0])
    assert lse.dtype == _wide(q) and out.shape == grad_out.shape == q.shape
    assert grad_out.dtype == out.dtype == q.dtype
    visible = _visible(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, window_size_left, window_size_right)
    log.backward.append((len(visible), _pairs(visible), (window_size_left, window_size_right)))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for queries, keys, visible_LS in visible:
        q_HLD, dout_HLD, out_HLD = (
            x[queries].to(_wide(q)).transpose(0, 1).contiguous() for x in (q, grad_out, out)
        )
        k_HSD, v_HSD = (_heads(x, keys, q.shape[1]) for x in (k, v))
        scores = _scores(q, k, queries, keys, scale, softcap)
        p_HLS = (scores.masked_fill(~visible_LS, -INF) - lse[:, queries, None]).exp()
        delta_HL1 = (dout_HLD * out_HLD).sum(-1, keepdim=True)
        dscore_HLS = p_HLS * (dout_HLD @ v_HSD.mT - delta_HL1) * scale
        if softcap:
            dscore_HLS = dscore_HLS * (1 - (scores / softcap) ** 2)
        dq[queries] = (dscore_HLS @ k_HSD).transpose(0, 1).to(dq.dtype)
        for into, grad_HSD in ((dk, dscore_HLS.mT @ q_HLD), (dv, p_HLS.mT @ dout_HLD)):
            by_key_head = grad_HSD.unflatten(0, (k.shape[1], -1)).sum(1)
            into[keys] = by_key_head.transpose(0, 1).to(into.dtype)
    return dq, dk, dv


def _visible(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, left, right) -> list[Sequence]:
    """Ranges of queries and keys of each sequence, and which key a query sees, bool [L, S]."""
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape and q.shape[2] == k.shape[2]
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256
    for x in (q, k, v):  # loaded by 16 bytes
        assert x.stride(-1) == 1 and all(n % 8 == 0 for n in (x.storage_offset(), *x.stride()[:2]))
    result = []
    lengths = []
    for cu, tokens, longest in ((cu_q, q.shape[0], max_q), (cu_k, k.shape[0], max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0 and cu[-1] == tokens
        lengths.append(cu.diff())
        assert lengths[-1].min() > 0, "what comes out of an empty sequence differs between kernels"
        assert lengths[-1].max() == longest
    right = 0 if is_causal else right
    for b, (num_q, num_k) in enumerate(zip(*(x.tolist() for x in lengths), strict=True)):
        distance = (
            torch.arange(num_q)[:, None] + num_k - num_q - torch.arange(num_k)
        )  # from the bottom right corner
        visible = torch.ones(num_q, num_k, dtype=torch.bool)
        if right >= 0:
            visible &= distance >= -right
        if left >= 0:
            visible &= distance <= left
        q_start, k_start = int(cu_q[b]), int(cu_k[b])
        result.append((slice(q_start, q_start + num_q), slice(k_start, k_start + num_k), visible))
    return result


def _pairs(visible: list[Sequence]) -> int:
    return sum(int(x.sum()) for _, _, x in visible)


def _scores(q, k, queries: slice, keys: slice, scale: float, softcap: float) -> Tensor:
    scores = q[queries].to(_wide(q)).transpose(0, 1) @ _heads(k, keys, q.shape[1]).mT * scale
    return softcap * (scores / softcap).tanh() if softcap else scores


def _heads(x: Tensor, keys: slice, heads: int) -> Tensor:
    """[H, S, D], heads repeated for the queries that share them."""
    x_KSD = x[keys].to(_wide(x)).transpose(0, 1)
    return x_KSD.repeat_interleave(heads // x_KSD.shape[0], 0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
