"""Prefix attention on NVIDIA GPUs by variable-length flash attention, in one of two ways, both exact.

Ancestor split: one causal call in which every segment attends itself; then one call for each level of the tree, in
which the tokens below each inner segment of that level, a contiguous range in preorder, attend all of it. Results merge
by log-sum-exp, and each call's backward runs with the merged out and lse, as in cpu.py. D levels below the roots take
D + 1 calls.

Path gather: one call, every segment's queries against copies of the keys on its path from the root. Causal masks are
aligned at the bottom right, so that windows are the kernel's own.

Both compute the same pairs; `calls` takes the way that moves fewer bytes. No call has an empty sequence: what a kernel
returns for one differs between generations.

dq is summed by atomics, unless `torch.use_deterministic_algorithms(True)` says otherwise, as in
scaled_dot_product_attention.

Shapes by suffix as in reference.py, M segments, P segments on the longest path; within a call as in flash_kernels.py.
"""

import torch
from torch import Tensor

from ..copies import sums_of_copies
from ..devices import to_device
from . import flash_kernels, reference
from .common import merge_, result, with_positive_scale
from .contract import Scores, TreeMask
from .flash_kernels import CAUSAL, EVERYTHING, Call, Tokens
from .per_plan import once_per_plan

# The largest head size of the kernels; what head sizes and strides have to be multiples of, since 16 bytes are loaded
# at a time; and the most sequences of a call, which are the second dim of a CUDA grid.
MAX_SIZE = 256
ALIGNMENT = 8
MAX_SEQUENCES = 65535

# FlashAttention-2's backward sums dq in float32 in as many more rows for each sequence: bytes of them that are too
# many, if they are that many times the tokens' own, too.
ROWS_PER_SEQUENCE = 128
MAX_SCRATCH, MAX_SCRATCH_RATIO = 1 << 30, 4

Ranges = tuple[Tensor, Tensor]  # starts and lengths, int64 in host memory


def attention(
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTE: Tensor,
    mask: TreeMask,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """See reference.attention."""
    q_1HTD, scores, _ = with_positive_scale(q_1HTD, scores)
    q, k, v = token_major(q_1HTD, k_1KTD, v_1KTE)
    first, *levels = planned_calls(mask, q, k)
    out_THE, lse_HT = flash_kernels.forward(first, q, k, v, scores)
    lse_TH = lse_HT.t()
    if levels:
        out_THE = out_THE.to(reference.compute_dtype(q))
    for call in levels:
        part_LHE, lse_HL = flash_kernels.forward(call, q, k, v, scores)
        part_LHE, at = part_LHE.to(out_THE.dtype), call.queries
        seen_LHE, seen_LH = out_THE[at], lse_TH[at]
        merge_(seen_LHE, seen_LH, part_LHE, lse_HL.t())
        if isinstance(at, Tensor):  # else they were views
            out_THE[at], lse_TH[at] = seen_LHE, seen_LH
    return result(out_THE, v_1KTE.shape[-1], q.dtype), lse_TH.t().contiguous()[None]


def attention_backward(
    grad_out_1HTE: Tensor,
    q_1HTD: Tensor,
    k_1KTD: Tensor,
    v_1KTE: Tensor,
    out_1HTE: Tensor,
    lse_1HT: Tensor,
    mask: TreeMask,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.attention_backward."""
    q_1HTD, scores, factor = with_positive_scale(q_1HTD, scores)
    tensors = token_major(grad_out_1HTE, q_1HTD, k_1KTD, v_1KTE, out_1HTE)
    q, k = tensors[1:3]
    lse_TH = lse_1HT[0].t()
    first, *levels = planned_calls(mask, q, k)
    grads = list(flash_kernels.backward(first, tensors, lse_TH, scores))
    if isinstance(first.keys, Tensor):  # keys were copied
        copies, key = first.keys, ("copies of varlen", mask.window, k.dtype, k.device)
        sums = once_per_plan(mask.segments_M5, key, lambda: sums_of_copies(copies, len(k), k.dtype))
        grads[1:] = map(sums, grads[1:])
    if levels:
        grads = [grad.to(reference.compute_dtype(q)) for grad in grads]
    for call in levels:
        parts = flash_kernels.backward(call, tensors, lse_TH, scores)
        for grad, tokens, part in zip(grads, (call.queries, call.keys, call.keys), parts, strict=True):
            _add(grad, tokens, part)
    if factor != 1:
        grads[0].mul_(factor)
    dq, dk, dv = (
        result(grad, x.shape[-1], q.dtype) for grad, x in zip(grads, (q_1HTD, k_1KTD, v_1KTE), strict=True)
    )
    return dq, dk, dv


# -- what the kernels can't do -----------------------------------------------------------------------------------------


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """See contract.Engine."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "flash attention with variable lengths needs an NVIDIA GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention has no kernel for {dtype}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without flash attention"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash attention needs compute capability 8.0"
    return None


def why_not_heads(size: int, scores: Scores) -> str | None:
    """See contract.Engine."""
    if size > MAX_SIZE:
        return f"flash attention has no kernel for heads of {size}"
    why_no_package = flash_kernels.why_no_package() if scores.softcap is not None else None
    return why_no_package and f"PyTorch's flash attention doesn't cap scores, and {why_no_package}"


def why_not_call(mask: TreeMask, q_1HTD: Tensor, v_1KTE: Tensor) -> str | None:
    """See contract.Engine."""
    segments = len(mask.segments_M5)
    if segments > MAX_SEQUENCES:
        return f"flash attention takes at most {MAX_SEQUENCES} sequences, the tree has {segments} segments"
    _, heads, tokens, size = q_1HTD.shape
    rows = ROWS_PER_SEQUENCE * segments
    scratch = 4 * rows * heads * max(size, v_1KTE.shape[-1])
    if scratch > MAX_SCRATCH and rows > MAX_SCRATCH_RATIO * tokens:
        return f"flash attention's backward would take {scratch >> 20:,} MiB for {segments} short segments"
    if mask.key_valid or mask.same_value:
        return "columns hide keys, and flash attention takes no mask"
    return None


def _add(into: Tensor, tokens: Tokens, part: Tensor) -> None:
    """No token twice: the order of additions is fixed."""
    if isinstance(tokens, slice):
        into[tokens].add_(part)
    else:
        into.index_add_(0, tokens, part.to(into.dtype))


def token_major(*tensors_1HTD: Tensor) -> list[Tensor]:
    """`[T, heads, size]` each, of one size that the kernels know: the smaller ones are padded with zeros."""
    size = -(-max(x.shape[-1] for x in tensors_1HTD) // ALIGNMENT) * ALIGNMENT
    return [_aligned(x[0].transpose(0, 1), size) for x in tensors_1HTD]


def _aligned(x_THD: Tensor, size: int) -> Tensor:
    if x_THD.shape[-1] < size:
        return torch.nn.functional.pad(x_THD, (0, size - x_THD.shape[-1]))
    steps = (x_THD.storage_offset(), *x_THD.stride()[:2])
    if x_THD.stride(-1) == 1 and all(step % ALIGNMENT == 0 for step in steps):
        return x_THD
    return x_THD.clone(memory_format=torch.contiguous_format)


# -- a tree as calls ---------------------------------------------------------------------------------------------------


def planned_calls(mask: TreeMask, q_THD: Tensor, k_TKD: Tensor) -> list[Call]:
    """`calls`, worked out once per plan."""
    heads, key_heads, device = q_THD.shape[1], k_TKD.shape[1], q_THD.device
    key = ("calls of varlen", heads, key_heads, mask.window, device)
    return once_per_plan(mask.segments_M5, key, lambda: calls(mask, heads, key_heads, device))


def calls(mask: TreeMask, heads: int, key_heads: int, device: torch.device) -> list[Call]:
    """The calls of a tree, planned on the host: the first has all tokens as queries, in order.

    Ancestor split or path gather: whichever moves fewer bytes beside what one call has to, counted for half precision,
    forward and backward, in bytes per number. Launches aren't counted, nor that a level may lie in one piece.

    - A query of a level: q gathered, its out made float32, merged and put back (4 + 6 + 28); then q, out and its
      gradient gathered, dq added to float32 (12 + 18): 68. A key of a level: gathered twice and its gradient added
      (8 + 18), for k and for v: 52.
    - A copied key: gathered twice, its gradient written, made float32 and added up (8 + 2 + 10), for k and for v: 40.
      Before that the kernel writes dk and dv once for each query head, and they are read again: 8.
    """
    start, end, subtree_end, depth, _ = mask.segments_M5.unbind(1)
    window = mask.window
    if window is not None and window < int((depth + end - start).max()):
        return [path_gather(mask.segments_M5, window, device)]
    asking = int((subtree_end - end).sum())
    asked = int((end - start)[subtree_end > end].sum())
    copied = int((depth + end - start).sum())
    if (40 * key_heads + 8 * heads) * copied < 68 * heads * asking + 52 * key_heads * asked:
        return [path_gather(mask.segments_M5, None, device)]
    return ancestor_split(mask.segments_M5, device)


def ancestor_split(segments_M5: Tensor, device: torch.device) -> list[Call]:
    """Every segment by itself, then level by level what is asked from below."""
    start, end, subtree_end = segments_M5[:, :3].unbind(1)
    itself, below = (start, end - start), (end, subtree_end - end)
    result = [_call(itself, itself, itself[1], CAUSAL, device)]
    level_M = (paths(segments_M5) >= 0).sum(1) - 1
    for level in range(int(level_M.max())):
        inner = (level_M == level) & (subtree_end > end)
        queries, keys = ((starts[inner], lengths[inner]) for starts, lengths in (below, itself))
        result.append(_call(queries, keys, keys[1], EVERYTHING, device))
    return result


def path_gather(segments_M5: Tensor, window: int | None, device: torch.device) -> Call:
    """Every segment with its path from the root, or what a window leaves its first token of that."""
    start, end, _, depth, _ = segments_M5.unbind(1)
    path_MP = paths(segments_M5)
    start_MP, end_MP, depth_MP = (column[path_MP.clamp(min=0)] for column in (start, end, depth))
    if window is not None:
        start_MP = start_MP + (depth[:, None] - (window - 1) - depth_MP).clamp(min=0)
    lengths_MP = (end_MP - start_MP).clamp(min=0).masked_fill(path_MP < 0, 0)
    keys = start_MP.flatten(), lengths_MP.flatten()
    window_size = CAUSAL if window is None else (window - 1, 0)
    return _call((start, end - start), keys, lengths_MP.sum(1), window_size, device)


def paths(segments_M5: Tensor) -> Tensor:
    """int64 [M, P], the segments from the root to each one, itself last; -1 in front of shorter paths."""
    parent = segments_M5[:, 4]
    at = torch.arange(len(parent), device="cpu")
    steps = []
    while bool((at >= 0).any()):
        steps.append(at)
        at = torch.where(at >= 0, parent[at], -1)
    return torch.stack(steps[::-1], 1)


def _call(
    queries: Ranges, keys: Ranges, key_lengths_B: Tensor, window_size: tuple[int, int], device: torch.device
) -> Call:
    """One range of queries for each sequence; as many ranges of keys as make up `key_lengths_B`."""
    cu_queries, cu_keys = (
        to_device(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(), device)
        for lengths in (queries[1], key_lengths_B)
    )
    return Call(
        _tokens(queries, device), _tokens(keys, device), cu_queries, cu_keys,
        int(queries[1].max()), int(key_lengths_B.max()), window_size,
    )  # fmt: skip


def _tokens(ranges: Ranges, device: torch.device) -> Tokens:
    """The tokens of ranges, one after the other: a slice where they touch, which saves the copy."""
    starts, lengths = (x[ranges[1] > 0] for x in ranges)
    ends = starts + lengths
    if bool((starts[1:] == ends[:-1]).all()):
        return slice(int(starts[0]), int(ends[-1]))
    total = int(lengths.sum())
    shift, repeats = to_device(torch.stack([ends - lengths.cumsum(0), lengths]), device)
    # with the size given, the host doesn't wait for the device to count
    return torch.arange(total, device=device) + shift.repeat_interleave(repeats, output_size=total)
