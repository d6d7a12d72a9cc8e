"""Operations that treat every element by itself, after broadcasting; and the random ones among them."""

from __future__ import annotations

from typing import Any

import torch

from ..layout import Dim, plain
from ..reasons import Unsupported
from .common import STREAM, Op, Operand, Outcome, broadcast, operands_in, refuse, register, same_size

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
    dims[dim] = plain(op.shape[dim])
    return Outcome(x.tokens.with_dims(dims))


def like_rule(op: Op, x: Operand, other: Operand, *_: Any, **__: Any) -> Outcome | Unsupported:
    """type_as, to(other): `other` gives its dtype only, its shape doesn't matter."""
    if not isinstance(x, Operand) or x.kind != STREAM:
        return refuse("row_layout", "a value without tokens gets the dtype of tokens")
    return Outcome(x.tokens)


def prelu_rule(op: Op, x: Operand, weight: Operand) -> Outcome | Unsupported:
    """The weight has one entry, or one for each index of dim 1, which then must be plain."""
    if x.kind != STREAM or weight.kind == STREAM:
        return refuse("unknown_op", "prelu with a slope computed from tokens")
    if x.tokens.rank > 1 and x.tokens.is_token_dim(1) and not all(same_size(s, 1) for s in weight.shape):
        return refuse("row_layout", "prelu with a slope for each row or position")
    return Outcome(x.tokens)


# Elementwise operations without the `pointwise` tag; the tagged ones need no entry (propagate.py).
POINTWISE = (
    aten.to,
    aten._to_copy,  aten.contiguous, aten.clone, aten.alias, aten.detach,
    aten.lift_fresh, aten.masked_fill,
    aten.where.self,
    aten.where.Scalar,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.clamp, aten.clamp_min, aten.clamp_max,
    aten.silu, aten.gelu, aten.relu, aten.relu6, aten.leaky_relu, aten.elu, aten.selu, aten.celu, aten.mish,
    aten.hardtanh, aten.hardswish, aten.hardsigmoid, aten.softplus, aten.log_sigmoid, aten.threshold,
    aten.tanh, aten.sigmoid, aten.square, aten.polar, aten.complex, aten.conj, aten.real, aten.imag, aten.angle,
    aten.resolve_conj, aten.lerp, aten.addcmul, aten.addcdiv, aten.nan_to_num, aten.special_expit, aten.isfinite,
    aten.isnan, aten.isinf, aten.true_divide, aten.floor_divide, aten.remainder, aten.logical_and, aten.logical_or,
    aten.logical_not, aten.logical_xor, aten.__and__, aten.__or__, aten.__xor__, aten.rsub, aten.float_power,
    aten.multiply, aten.divide.Tensor, aten.divide.Scalar, aten.subtract, aten.negative, aten.absolute,
    aten.heaviside, aten.copysign, aten.sgn, aten.maximum, aten.minimum,
)  # fmt: skip

for packet in POINTWISE:
    register(pointwise_rule, packet)
register(like_rule, aten.type_as, aten.to.other, aten.to.prim_other)
register(prelu_rule, aten.prelu)
register(dropout_rule, aten.dropout.default, aten.feature_dropout.default)
register(dropout_rule, aten.alpha_dropout.default)
register(random_rule, aten.rand_like, aten.randn_like, aten.bernoulli, aten.rrelu)
register(complex_view_rule, aten.view_as_complex, aten.view_as_real)
register(new_values_rule, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like)
register(glu_rule, aten.glu)
