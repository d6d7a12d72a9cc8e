"""Prefix attention by FlexAttention (arXiv 2412.05496): kernels that inductor writes, from a mask function.

A function of two indices reads off columns whether a query sees a key; a block mask, made from the segments, names the
blocks that are computed at all, and those that need not ask. Scores may be capped, columns may hide keys.

PyTorch's `flex_attention` leaves its derivative to autograd, which has no say inside of an operator. So the two
higher-order operators that it is made of are called, as its own autograd function does. Each is traced for a model's
heads with the number of tokens as a symbol, and compiled once for all batches.

Not yet measured on a GPU. On a CPU, for tests, the traced graphs run as they are, on all T² pairs: inductor has no
backward there.

Shapes by suffix as in reference.py; 1 for a dim of one, B blocks of tokens, L listed pairs of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..devices import to_device
from ..modes import numerics
from ..symbolic import dynamic_size
from .blocks import Pairs, stable_order
from .common import result
from .contract import Scores, TreeMask
from .per_plan import once_per_plan
from .triton import why_no_triton

# Tokens of a block, FlexAttention's own default.
BLOCK = 128
# tl.dot wants 16 at least; for more than 256, inductor's tiles don't fit into the shared memory of data-centre GPUs.
SMALLEST_HEAD, LARGEST_HEAD = 16, 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# What code is chosen for where the number of tokens counts: short queries would get a kernel for decoding.
TYPICAL_TOKENS = 100003

# Of a tensor: kernels find a block's tokens in 32 bits, whatever the hint.
MOST_NUMBERS = (1 << 31) - 1

# What the public function passes to the operators. A query may see nothing ("safe" rows are those that see something).
KERNEL_OPTIONS = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}


class Formula(NamedTuple):
    """What is compiled in: everything but tensors.

    Args:
        columns: names of the rules in SEES, in the order of their tensors.
        block_mask: what `block_lists` returns, with an Ellipsis for each tensor.
    """

    scores: Scores
    window: int | None
    columns: tuple[str, ...]
    block_mask: tuple[Any, ...]


# By name, whether query q sees key k, as one column of the packed tokens knows it; with the window, 0 for none.
SEES: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "subtree_end": lambda end_T, q, k, window: q < end_T[k],
    "depth": lambda depth_T, q, k, window: depth_T[q] - depth_T[k] < window,
    "key_valid": lambda valid_T, q, k, window: valid_T[k],
    "same_value": lambda value_T, q, k, window: value_T[q] == value_T[k],
}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """See contract.Engine."""
    if device.type not in ("cuda", "xpu"):
        return f"FlexAttention has no backward pass on {device.type}"
    if dtype not in DTYPES:
        return f"FlexAttention has no kernel for {dtype}"
    return why_no_triton(device)


def why_not_heads(size: int, scores: Scores) -> str | None:
    """See contract.Engine."""
    return f"FlexAttention has no tiles for heads of {size}" if size > LARGEST_HEAD else None


def why_not_call(mask: TreeMask, q_1HTD: Tensor, v_1KTE: Tensor) -> str | None:
    """See contract.Engine."""
    _, heads, tokens, size = q_1HTD.shape
    numbers = heads * tokens * max(size, v_1KTE.shape[-1], SMALLEST_HEAD)
    if numbers > MOST_NUMBERS:
        return f"FlexAttention's kernels count in 32 bits, and the query heads have {numbers:,} numbers"
    return None


def attention(
    q_1HTD: Tensor, k_1KTD: Tensor, v_1KTE: Tensor, mask: TreeMask, scores: Scores
) -> tuple[Tensor, Tensor]:
    """See reference.attention."""
    formula, mask_tensors = formula_of(mask, scores, q_1HTD.device)
    heads = [as_kernels_want(x) for x in (q_1HTD, k_1KTD, v_1KTE)]
    out_1HTE, lse_1HT = run(forward, formula, [*heads, *mask_tensors])
    return contracted(out_1HTE, v_1KTE), lse_1HT.mul_(math.log(2))


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
    formula, mask_tensors = formula_of(mask, scores, q_1HTD.device)
    heads = [as_kernels_want(x) for x in (grad_out_1HTE, q_1HTD, k_1KTD, v_1KTE, out_1HTE)]
    lse = ("1HT", lse_1HT.contiguous() / math.log(2))
    dq, dk, dv = run(backward, formula, [*heads, lse, *mask_tensors])
    return contracted(dq, q_1HTD), contracted(dk, k_1KTD), contracted(dv, v_1KTE)


# -- what is traced ----------------------------------------------------------------------------------------------------


def forward(
    formula: Formula, q: Tensor, k: Tensor, v: Tensor, *mask_tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """out, and lse in powers of 2."""
    out, lse, *_ = torch.ops.higher_order.flex_attention(
        q, k, v, score_function(formula.scores), *mask_and_options(formula, q, mask_tensors)
    )
    return out, lse


def backward(
    formula: Formula, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *mask_tensors: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv."""
    dq, dk, dv, _ = torch.ops.higher_order.flex_attention_backward(
        q, k, v, out, lse, grad_out, None,
        score_function(formula.scores), score_derivative(formula.scores),
        *mask_and_options(formula, q, mask_tensors),
    )  # fmt: skip
    return dq, dk, dv


def mask_and_options(formula: Formula, q: Tensor, mask_tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What either operator takes last; scores read no tensor, the mask its columns."""
    mask, columns = block_mask(formula, q.shape[2], mask_tensors), mask_tensors[: len(formula.columns)]
    return mask, formula.scores.scale, dict(KERNEL_OPTIONS), (), columns


def score_function(scores: Scores) -> Callable[..., Tensor]:
    """Of a score, batch, head, query and key."""
    cap = scores.softcap
    if cap is None:
        return lambda score, *where: score
    return lambda score, *where: cap * torch.tanh(score / cap)


def score_derivative(scores: Scores) -> Callable[..., list[Tensor | None]]:
    """Of the same and a gradient: the gradients of the five."""
    cap = scores.softcap
    if cap is None:
        return lambda score, b, h, q, k, grad: [grad, None, None, None, None]
    return lambda score, b, h, q, k, grad: [grad * (1 - torch.tanh(score / cap) ** 2), None, None, None, None]


def block_mask(
    formula: Formula, tokens: int | torch.SymInt, mask_tensors: Sequence[Tensor]
) -> tuple[Any, ...]:
    """BlockMask.as_tuple() of so many tokens."""
    lists = iter(mask_tensors[len(formula.columns) :])
    entries = [next(lists) if entry is ... else entry for entry in formula.block_mask]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *columns: Tensor) -> Tensor:
        seen = k <= q
        for name, column_T in zip(formula.columns, columns, strict=True):
            seen = seen & SEES[name](column_T, q, k, formula.window or 0)
        return seen

    return (tokens, tokens, *entries, sees)


# -- tensors, each with its dims ---------------------------------------------------------------------------------------

Argument = tuple[str, Tensor]


def as_kernels_want(x_1HTD: Tensor) -> Argument:
    """Token-major, without holes."""
    short = SMALLEST_HEAD - x_1HTD.shape[-1]
    x_1HTD = F.pad(x_1HTD, (0, short)) if short > 0 else x_1HTD
    return "1HTD", x_1HTD.transpose(1, 2).contiguous().transpose(1, 2)


def contracted(x_1HTD: Tensor, like: Tensor) -> Tensor:
    return result(x_1HTD[0].transpose(0, 1), like.shape[-1], like.dtype)


def formula_of(mask: TreeMask, scores: Scores, device: torch.device) -> tuple[Formula, list[Argument]]:
    """What the mask says, compiled in and as tensors."""
    columns = [("subtree_end", mask.subtree_end_T)]
    if mask.window is not None:
        columns.append(("depth", mask.depth_T))
    columns += [("key_valid", x) for x in mask.key_valid] + [("same_value", x) for x in mask.same_value]
    hides = bool(mask.key_valid or mask.same_value)
    entries = once_per_plan(
        mask.segments_M5,
        ("flex", BLOCK, mask.window, hides, device),
        lambda: block_lists(mask.segments_M5.numpy(), mask.window, hides, device),
    )
    names, tensors = zip(*columns, strict=True)
    constants = tuple(... if isinstance(entry, Tensor) else entry for entry in entries)
    lists = [("11BB"[: x.dim()], x) for x in entries if isinstance(x, Tensor)]
    return Formula(scores, mask.window, names, constants), [*(("T", x.contiguous()) for x in tensors), *lists]


def block_lists(
    segments_M5: np.ndarray, window: int | None, hides: bool, device: torch.device
) -> tuple[Any, ...]:
    """BlockMask.as_tuple() of a tree, without the number of tokens and the function, which come first and last.

    Where columns hide keys, every block has to ask.
    """
    from torch.nn.attention.flex_attention import BlockMask, noop_mask

    pairs = Pairs.of(segments_M5, BLOCK, BLOCK, window)
    full_L = pairs.full_L & (not hides)
    tables: dict[str, Any] = {}
    for prefix, chosen_L in (("", ~full_L), ("full_", full_L)):
        query_L, key_L = pairs.query_L[chosen_L], pairs.key_L[chosen_L]
        for name, row_L, tile_L in (("kv", query_L, key_L), ("q", key_L, query_L)):
            count_B, index_BB = _table(row_L, tile_L, pairs.queries)
            tables[f"{prefix}{name}_num_blocks"] = to_device(count_B[None, None], device)
            tables[f"{prefix}{name}_indices"] = to_device(index_BB[None, None], device)
    mask = BlockMask(seq_lengths=(0, 0), **tables, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=noop_mask)
    return mask.as_tuple()[2:-1]


def _table(row_L: np.ndarray, tile_L: np.ndarray, rows: int) -> tuple[Tensor, Tensor]:
    """How many tiles each row has, and which, in ascending order; behind them, zeros. Both int32."""
    order_L = stable_order(row_L, rows)  # pairs come ordered, so each row's tiles are
    count_B = np.bincount(row_L, minlength=rows)
    place_L = np.arange(len(row_L)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    index_BB = np.zeros((rows, rows), dtype=np.int32)
    index_BB[row_L[order_L], place_L] = tile_L[order_L]
    return torch.from_numpy(count_B.astype(np.int32)), torch.from_numpy(index_BB)


# -- compiled graphs ---------------------------------------------------------------------------------------------------

_compiled: dict[Any, Callable[..., Any]] = {}


def run(function: Callable[..., Any], formula: Formula, arguments: Sequence[Argument]) -> Any:
    """`function(formula, *tensors)`, compiled once for all T."""
    from torch._dynamo.convert_frame import compile_lock

    key = function, formula, tuple(_signature(*argument) for argument in arguments), numerics()
    if key not in _compiled:
        with compile_lock, torch.no_grad():
            if key not in _compiled:
                _compiled[key] = _compile(function, formula, arguments)
    return _compiled[key](*(x for _, x in arguments))


def _signature(dims: str, x: Tensor) -> tuple[Any, ...]:
    sizes = tuple(size for dim, size in zip(dims, x.shape, strict=True) if dim not in "TB")
    return dims, sizes, x.dtype, x.device


def _compile(
    function: Callable[..., Any], formula: Formula, arguments: Sequence[Argument]
) -> Callable[..., Any]:
    gm, inputs = traced(function, formula, arguments)
    if inputs[0].device.type == "cpu":
        return gm
    from torch._inductor.compile_fx import compile_fx

    # no graph of its own: its outputs would lie in a pool that the next call overwrites
    compiled = compile_fx(gm, inputs, config_patches={"triton.cudagraphs": False})
    assert callable(compiled)  # anything else is for AOTInductor
    return compiled


def traced(
    function: Callable[..., Any], formula: Formula, arguments: Sequence[Argument]
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph of `function(formula, *tensors)` for any T, and its fake inputs."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    tokens = dynamic_size(env, "tokens", TYPICAL_TOKENS)
    symbols = {"T": tokens, "B": (tokens + BLOCK - 1) // BLOCK}
    with FakeTensorMode(shape_env=env):
        inputs = list(_fakes(arguments, symbols))
        gm = make_fx(lambda *tensors: function(formula, *tensors))(*inputs)
    return gm, inputs


def _fakes(arguments: Sequence[Argument], symbols: dict[str, Any]) -> Iterator[Tensor]:
    for dims, x in arguments:
        sizes = [symbols.get(dim, size) for dim, size in zip(dims, x.shape, strict=True)]
        if dims == "1HTD":
            sizes[1:3] = sizes[2], sizes[1]
        fake = torch.empty(sizes, dtype=x.dtype, device=x.device)
        yield fake.transpose(1, 2) if dims == "1HTD" else fake
