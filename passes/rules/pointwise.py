"""Operations that treat every element by itself, after broadcasting; and the random ones among them."""

from __future__ import annotations

from typing import Any

import torch

from ..layout import Dim, TokenLayout
from ..reasons import Unsupported
from .common import Op, Operand, Outcome, broadcast, operands_in, refuse, register

aten = torch.ops.aten


def pointwise_rule(op: Op, *args: Any, **kwargs: Any) -> Outcome | Unsupported:
    """Any elementwise operation: `out[n, s, ...]` depends on element `[n, s, ...]` of its broadcast arguments."""
    found = broadcast([*operands_in(args), *operands_in(kwargs)])
    if isinstance(found, Unsupported):
        return found
    layout, columns = found
    return Outcome(layout, columns)


def dropout_rule(op: Op, x: Operand, p: float, train: bool, *_: Any, **__: Any) -> Outcome | Unsupported:
    """Inactive dropout is the identity; active dropout draws once for all copies of a token: only if asked for."""
    if train and p != 0 and op.dropout != "shared":
        return refuse(
            "randomness",
            f"dropout with p={p} draws other numbers for each copy of a shared token",
            'set the dropout to 0, call model.eval(), or accept shared draws with dropout="shared"',
        )
    return Outcome(x.tokens)


def random_rule(op: Op, *args: Any, **kwargs: Any) -> Outcome | Unsupported:
    if op.dropout == "shared":
        return pointwise_rule(op, *args, **kwargs)
    return refuse("randomness", f"`{op.name}` draws other numbers for each copy of a shared token")


def complex_view_rule(op: Op, x: Operand) -> Outcome | Unsupported:
    """view_as_complex drops a last dim of size 2, view_as_real adds it."""
    if len(op.shape) < x.tokens.rank:
        if x.tokens.is_token_dim(x.tokens.rank - 1):
            return refuse("row_layout", "the real and imaginary parts are spread over token dims")
        dims: tuple[Dim, ...] = x.tokens.dims[:-1]
    else:
        dims = (*x.tokens.dims, (2,))
    return Outcome(x.tokens.with_dims(dims))


def new_values_rule(op: Op, x: Operand, *args: Any, **kwargs: Any) -> Outcome | Unsupported:
    """zeros_like and its kin: the value doesn't depend on the tokens at all."""
    return Outcome(x.tokens)


def glu_rule(op: Op, x: Operand, dim: int = -1) -> Outcome | Unsupported:
    dim %= x.tokens.rank
    if x.tokens.is_token_dim(dim):
        return refuse("token_mixing", "glu halves a token dim")
    dims = list(x.tokens.dims)
    dims[dim] = (op.shape[dim],)
    return Outcome(TokenLayout(tuple(dims), x.tokens.selection))


# Elementwise operations without the `pointwise` tag; the tagged ones need no entry (propagate.py).
POINTWISE = (
    aten.to, aten._to_copy, aten.type_as, aten.contiguous, aten.clone, aten.alias, aten.detach,
    aten.lift_fresh, aten.masked_fill, aten.where, aten.clamp, aten.clamp_min, aten.clamp_max,
    aten.silu, aten.gelu, aten.relu, aten.relu6, aten.leaky_relu, aten.elu, aten.selu, aten.celu, aten.mish,
    aten.hardtanh, aten.hardswish, aten.hardsigmoid, aten.softplus, aten.log_sigmoid, aten.threshold, aten.prelu,
    aten.tanh, aten.sigmoid, aten.square, aten.polar, aten.complex, aten.conj, aten.real, aten.imag, aten.angle,
    aten.resolve_conj, aten.lerp, aten.addcmul, aten.addcdiv, aten.nan_to_num, aten.special_expit, aten.isfinite,
    aten.isnan, aten.isinf, aten.true_divide, aten.floor_divide, aten.remainder, aten.logical_and, aten.logical_or,
    aten.logical_not, aten.logical_xor, aten.__and__, aten.__or__, aten.__xor__, aten.rsub, aten.float_power,
    aten.masked_fill, aten.heaviside, aten.copysign, aten.sgn, aten.maximum, aten.minimum,
)  # fmt: skip

for packet in POINTWISE:
    register(pointwise_rule, packet)
register(dropout_rule, aten.dropout.default, aten.feature_dropout.default)
register(dropout_rule, aten.alpha_dropout.default)
register(random_rule, aten.rand_like, aten.randn_like, aten.bernoulli, aten.rrelu)
register(complex_view_rule, aten.view_as_complex, aten.view_as_real)
register(new_values_rule, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like)
register(glu_rule, aten.glu)
