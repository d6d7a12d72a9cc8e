"""Samples of every rule: calls that must pack, and calls that must be refused.

`packs(op, *args)` and `refuses(op, *args)` write one ATen call each. Tensors are given by their dims: "N" rows, "S"
positions, "N*3" a product (outermost first), ints plain sizes. An argument that is a function gets `(n, s)`, so that
sizes of the batch can be written; `call(...)` nests another operation. `tests/test_rules.py` runs them.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from pgcompile.passes.rules import RULES, pointwise_rule
from pgcompile.passes.rules.losses import ELEMENTWISE_LOSSES
from pgcompile.passes.softmax_forms import softmax_with_sink

aten = torch.ops.aten
# Sizes of heads (3), of a head (4) and of the hidden state (6): test_rules.SIZES has batches where N or S is the same.

MORE = "the result has more tokens than the batch"

# Where rows and positions may be. Every rule that takes any layout is enumerated over these.
TOKENS = [
    ("N", "S", 6), ("S", "N", 6), (6, "N", "S"), ("N", 6, "S"), ("N", 3, "S", 4), ("N", "S", 3, 4), ("N*S", 6),
    ("S*N", 6), ("N*3", "S", 4), ("3*N", "S", 4), ("N", "S*3", 4), ("N", "S"), ("N", "S", 1), (1, "N", "S", 6),
]  # fmt: skip
TABLES = [("S", 6), (1, "S", 6), (3, "S", 4), (6, "S")]  # by position: the same for all rows


@dataclass(eq=False)
class Tensor:
    """A tensor argument.

    Args:
        kind: "stream", "column" (prologue, by token), "data" (prologue, the same for all tokens), "weight", or
            "late" (prologue, another value for every copy of a token).
        dims: its dims; sizes only for data and weights, which may be functions of `(n, s)`.
        high: of integers, which are in `range(high)`.
    """

    kind: str
    dims: tuple[Any, ...]
    dtype: torch.dtype = torch.float64
    high: int = 4

    def __repr__(self) -> str:
        return f"{self.kind}[{', '.join('f(n, s)' if callable(d) else str(d) for d in self.dims)}]"


@dataclass(eq=False)
class Call:
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        given = [_text(a) for a in self.args] + [f"{k}={_text(v)}" for k, v in self.kwargs.items()]
        return f"{str(self.op).removeprefix('aten.')}({', '.join(given)})"


def _text(arg: Any) -> str:
    return f"{arg(4, 5)} for N=4, S=5" if callable(arg) else str(arg)


@dataclass(eq=False)
class Sample:
    """One call and what its rule must say.

    Args:
        packs: must it pack, or be refused?
        late: does no token mixer depend on it (so that tokens may be cut and labels be looked up)?
        conservative: why the rule refuses although nothing forces it to; others must be proved right.
        sizes: the batches `(n, s)` to try; those of test_rules.SIZES if empty.
        shape_only: results are random, or arbitrary: only shapes are compared.
    """

    call: Call
    packs: bool
    late: bool = False
    dropout: str = "fallback"
    conservative: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    shape_only: bool = False

    def __repr__(self) -> str:
        marks = (" late" if self.late else "") + (
            f" dropout={self.dropout}" if self.dropout != "fallback" else ""
        )
        return f"{self.call}{marks} {'packs' if self.packs else 'is refused'}"


SAMPLES: list[Sample] = []


def stream(*dims: Any, **options: Any) -> Tensor:
    return Tensor("stream", dims, **options)


def column(*dims: Any, **options: Any) -> Tensor:
    return Tensor("column", dims, **options)


def data(*sizes: Any, **options: Any) -> Tensor:
    return Tensor("data", sizes, **options)


def weight(*sizes: Any, **options: Any) -> Tensor:
    return Tensor("weight", sizes, **options)


def late(*dims: Any, **options: Any) -> Tensor:
    return Tensor("late", dims, **options)


def sizes_of(*dims: Any) -> Any:
    """Sizes of a tensor with these dims, as an argument."""

    def sizes(n: int, s: int) -> list[int]:
        return [math.prod({"N": n, "S": s}.get(f) or int(f) for f in str(dim).split("*")) for dim in dims]

    return sizes


def call(op: Any, *args: Any, **kwargs: Any) -> Call:
    return Call(op, args, kwargs)


OPTIONS = ("late", "dropout", "conservative", "sizes", "shape_only")


def packs(op: Any, *args: Any, **kwargs: Any) -> None:
    _add(True, op, args, kwargs)


def refuses(op: Any, *args: Any, **kwargs: Any) -> None:
    _add(False, op, args, kwargs)


def _add(accepted: bool, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    options = {o: kwargs.pop(o) for o in OPTIONS if o in kwargs}
    options["late"] = options.pop("late", False)
    SAMPLES.append(Sample(Call(op, args, kwargs), accepted, **options))


def merged_column(op: Any, *args: Any, dims: tuple[Any, ...]) -> None:
    """A column with all of the stream's dims packs, unless one of them merges tokens with a plain size."""
    if any(is_token(d) and "3" in d for d in dims):
        refuses(
            op, *args, conservative="the runtime packs columns with rows and positions in dims of their own"
        )
    else:
        packs(op, *args)


def is_token(dim: Any) -> bool:
    return isinstance(dim, str)


def each_dim(layouts: Any = None) -> Iterator[tuple[tuple[Any, ...], int, Any]]:
    """Layout, dim (counted from the front and from the back in turn), and the function that must hold."""
    for i, dims in enumerate(layouts or TOKENS + TABLES):
        for d in range(len(dims)):
            yield dims, d - len(dims) if (i + d) % 2 else d, refuses if is_token(dims[d]) else packs


# -- pointwise.py ------------------------------------------------------------------------------------------------------

ints = dict(dtype=torch.int64)
bools = dict(dtype=torch.bool)
complexes = dict(dtype=torch.complex128)

for dims in TOKENS + TABLES:
    packs(aten.silu.default, stream(*dims))
    packs(aten.add.Tensor, stream(*dims), stream(*dims))
    merged_column(aten.add.Tensor, stream(*dims), column(*dims), dims=dims)
    packs(aten.mul.Tensor, stream(*dims), 2.5)
for dims in TOKENS[:6]:
    packs(aten.mul.Tensor, stream(*dims), column(*(1 if not is_token(d) else d for d in dims)))
    packs(aten.mul.Tensor, stream(*dims), column(*(1 if d != "S" else d for d in dims)))  # a table
    packs(aten.mul.Tensor, stream(*dims), column(*(1 if d != "N" else d for d in dims)))  # per row
packs(aten.mul.Tensor, stream("N", "S", 6), weight(6))
packs(aten.mul.Tensor, stream("N", 3, "S", 4), weight(3, 1, 4))
packs(aten.mul.Tensor, stream("N", "S", 6), column("S", 1))
packs(aten.mul.Tensor, column("N", 1, 6), stream("N", "S", 6))
packs(aten.mul.Tensor, stream("N", "S", 1), weight(6))
packs(aten.mul.Tensor, stream("N", "S", 3, 1), weight(3, 4))
packs(aten.mul.Tensor, stream("N", 3, "S", 4), stream("S", 4))
packs(aten.mul.Tensor, stream("N", "S", 6), stream(1, "S", 6))
packs(aten.mul.Tensor, stream("N*3", "S", 4), stream("S", 4))
packs(aten.where.self, column("N", "S", 1, **bools), stream("N", "S", 6), stream("N", "S", 6))
packs(aten.masked_fill.Scalar, stream("N", "S", 6), column("N", "S", 1, **bools), 0.0)
refuses(
    aten.mul.Tensor,
    stream("N", "S", 6),
    weight(lambda n, s: s, 6),
    conservative="read as a table by the walk",
)
refuses(aten.mul.Tensor, stream("N", "S"), stream("S", "N"), sizes=((4, 4),))
refuses(aten.mul.Tensor, stream("N", "S", 6), stream("N", 6), sizes=((5, 5),))
refuses(
    aten.mul.Tensor,
    stream("N", "S", 6),
    column(4, "S", 6),
    sizes=((1, 5),),
    conservative="one row becomes four",
)
refuses(
    aten.mul.Tensor,
    stream("N", "S", 6),
    data(1, 7, 6),
    sizes=((4, 1),),
    conservative="one position becomes seven",
)
refuses(
    aten.mul.Tensor,
    stream("S", "N", 6),
    column("N", 6),
    conservative="a value per row without a position dim",
)
refuses(
    aten.mul.Tensor,
    stream("N", "S*3", 4),
    column("N", 1, 4),
    conservative="a value per row without a position dim",
)
refuses(aten.add.Tensor, stream("N", 1, "S"), stream("N", "S", 1))
refuses(
    aten.add.Tensor, call(aten.slice.Tensor, stream("N", "S", 6), 1, 0, 1), stream("N", "S", 6), late=True
)
refuses(
    aten.add.Tensor, call(aten.slice.Tensor, x := stream("N", "S", 6), 1, 0, 2), call(aten.slice.Tensor, x, 1, 1, 3),
    late=True,
)  # fmt: skip
refuses(aten.type_as.default, data(5), stream("N", "S", 6), conservative="canonicalize removes it")
packs(aten.type_as.default, stream("N", "S", 6), stream("N", "S", 3, 4))
packs(aten.to.other, stream("N", "S", 6), stream("N", "S", 3, 4))
packs(aten.prelu.default, stream("N", "S", 6), weight(1))
packs(aten.prelu.default, stream("N*S", 6), weight(6))
packs(aten.prelu.default, stream("N", 3, "S", 4), weight(3))
refuses(aten.prelu.default, stream("N", "S", 6), weight(lambda n, s: s), conservative="a weight by position")


def pointwise_samples() -> Iterator[Sample]:
    """Every overload that is registered as elementwise, with streams for tensors and constants for numbers."""
    special = {
        aten.to.other, aten.type_as.default, aten.to.device, aten.to.prim_Device, aten.to.prim_other,
        aten.to.prim_dtype, aten.to.dtype_layout, aten._to_copy.default, aten.clamp.default, aten.clamp.Tensor,
    }  # fmt: skip
    for op, rule in RULES.items():
        takes_tensor = any(str(a.type) == "Tensor" for a in op._schema.arguments)
        if rule is pointwise_rule and op not in special and takes_tensor:
            args = [
                _argument(op, a)
                for a in op._schema.arguments
                if not a.has_default_value() and not a.kwarg_only
            ]
            yield Sample(Call(op, tuple(args)), True)
    for op in (aten.clamp.default, aten.clamp.Tensor):
        bound = -0.5 if op is aten.clamp.default else stream("N", "S", 6)
        yield Sample(Call(op, (stream("N", "S", 6), bound)), True)
    for options in (dict(dtype=torch.float64), dict()):
        yield Sample(Call(aten._to_copy.default, (stream("N", "S", 6),), options), True)


def _argument(op: Any, arg: Any) -> Any:
    name = op._schema.name.removeprefix("aten::")
    if str(arg.type) == "Tensor":
        if arg.name in ("mask", "condition"):
            return stream("N", "S", 6, **bools)
        if name.startswith(("__", "bitwise")):
            return stream("N", "S", 6, **ints)
        if arg.name == "value" and name == "masked_fill":
            return data()
        return stream("N", "S", 6, **(complexes if name == "imag" else {}))
    if "dtype" in arg.name:
        return torch.float64
    return (
        2 if name.startswith("__") else 0.5 if "Scalar" in str(arg.type) or "number" in str(arg.type) else 1
    )


SAMPLES.extend(pointwise_samples())

packs(aten.dropout.default, stream("N", "S", 6), 0.5, False)
packs(aten.dropout.default, stream("N", "S", 6), 0.0, True)
packs(aten.dropout.default, stream("N", "S", 6), 0.5, True, dropout="shared", shape_only=True)
refuses(aten.dropout.default, stream("N", "S", 6), 0.5, True)
refuses(aten.alpha_dropout.default, stream("N*S", 6), 0.5, True)
refuses(aten.bernoulli.default, call(aten.sigmoid.default, stream("N", "S", 6)))
refuses(aten.rand_like.default, stream("N", "S", 6))
packs(aten.randn_like.default, stream("N", "S", 6), dropout="shared", shape_only=True)
for dims in TOKENS + TABLES:
    packs(aten.view_as_real.default, stream(*dims, **complexes))
    packs(aten.view_as_complex.default, stream(*dims, 2))
    packs(aten.zeros_like.default, stream(*dims))
refuses(aten.view_as_complex.default, stream(6, "N", "S"), sizes=((5, 2),))  # fmt: skip
packs(aten.full_like.default, stream("N", "S", 6), 3.0)
packs(aten.ones_like.default, stream("N", "S", 6), dtype=torch.float32)
packs(aten.empty_like.default, stream("N", "S", 6), shape_only=True)
for dims, d, verdict in each_dim([t for t in TOKENS if 1 not in t]):
    if not is_token(dims[d]):
        verdict(
            aten.glu.default, stream(*(2 * x if i == d % len(dims) else x for i, x in enumerate(dims))), d
        )
packs(aten.squeeze.dim, call(aten.glu.default, stream("N", "S", 2), -1), -1)
refuses(aten.glu.default, call(aten.slice.Tensor, stream("N", "S", 6), 1, 0, 2), 1, late=True)

# -- views.py ----------------------------------------------------------------------------------------------------------

VIEWS: list[tuple[tuple[Any, ...], Any]] = [
    (("N", "S", 12), lambda n, s: [n, s, 3, 4]),
    (("N", "S", 12), lambda n, s: [n * s, 12]),
    (("N", "S", 12), lambda n, s: [n, s, 1, 12]),
    (("N", "S", 12), lambda n, s: [1, n, 1, s, 6, 2]),
    (("N", "S", 12), lambda n, s: [n, s * 3, 4]),
    (("N", "S", 12), lambda n, s: [n * s * 2, 6]),
    (("N", "S", 3, 4), lambda n, s: [n, s, 12]),
    (("N", "S", 3, 4), lambda n, s: [n * s, 3, 2, 2]),
    (("N*S", 12), lambda n, s: [n, s, 3, 4]),
    (("N*S", 12), lambda n, s: [n * s, 3, 4]),
    (("S*N", 12), lambda n, s: [s, n, 12]),
    (("S", "N", 12), lambda n, s: [s, n * 3, 4]),
    (("N", 3, "S", 4), lambda n, s: [n * 3, s, 4]),
    (("N", 3, "S", 4), lambda n, s: [n, 3, s, 2, 2]),
    (("N*3", "S", 4), lambda n, s: [n, 3, s, 4]),
    (("N*3", "S", 4), lambda n, s: [n, 1, 3, s, 4]),
    (("3*N", "S", 4), lambda n, s: [3, n, s, 4]),
    (("N", "S*3", 4), lambda n, s: [n, s, 12]),
    (("S", 12), lambda n, s: [1, s, 3, 4]),
    ((1, "S", 12), lambda n, s: [s, 12]),
    (("N", 6, "S"), lambda n, s: [n, 2, 3, s]),
]  # fmt: skip
TORN: list[tuple[tuple[Any, ...], Any]] = [
    (("N", "S", 12), lambda n, s: [s, n, 12]),
    (("N", "S", 12), lambda n, s: [n, 12, s]),
    (("N", "S", 12), lambda n, s: [n, 3, s, 4]),
    (("N", "S", 12), lambda n, s: [n, 2, s * 6]),
    (("N", 3, "S", 4), lambda n, s: [n, s, 12]),
    (("N*3", "S", 4), lambda n, s: [3, n, s, 4]),
    (("N", 6, "S"), lambda n, s: [n, s, 6]),
    (("N*S", 12), lambda n, s: [s, n, 12]),
    (("S*N", 12), lambda n, s: [n, s, 12]),
]  # fmt: skip
for dims, sizes in VIEWS:
    packs(aten.view.default, stream(*dims), sizes)
    packs(aten.reshape.default, stream(*dims), lambda n, s, f=sizes: [*f(n, s)[:-1], -1])
for dims, sizes in TORN:
    refuses(aten.reshape.default, stream(*dims), sizes)
for dims in TOKENS:
    for start, end in itertools.combinations(range(len(dims)), 2):
        packs(aten.flatten.using_ints, stream(*dims), start, end)
packs(aten.unflatten.int, stream("N", "S", 12), -1, [3, -1])
packs(aten.unflatten.int, stream("N*S", 6), 0, lambda n, s: [n, s])
packs(aten.view_as.default, stream("N", "S", 12), stream("N", "S", 3, 4))
packs(aten.reshape_as.default, stream("N*S", 12), stream("N", "S", 3, 4))
refuses(
    aten.view_as.default,
    data(lambda n, s: n * s * 6),
    stream("N", "S", 6),
    conservative="no layout to start from",
)
refuses(aten.reshape_as.default, stream("N", "S", 6), stream("S", "N", 6))
for dims in TOKENS + TABLES:
    for d in (-len(dims) - 1, -1, 1, len(dims)):
        packs(aten.unsqueeze.default, stream(*dims), d)
    for a, b in itertools.combinations(range(len(dims)), 2):
        packs(aten.transpose.int, stream(*dims), a, b - len(dims))
    if len(dims) == 2:
        packs(aten.t.default, stream(*dims))
    packs(aten.mT.default, stream(*dims))
    packs(aten.permute.default, stream(*dims), [*range(1, len(dims)), 0])
    packs(aten.permute.default, stream(*dims), list(range(len(dims)))[::-1])
    packs(aten.movedim.int, stream(*dims), 0, -1)
    packs(aten.movedim.intlist, stream(*dims), [-1, 0], [0, -2 if len(dims) > 2 else 1])
    packs(aten.squeeze.dim, call(aten.unsqueeze.default, stream(*dims), 1), 1)
    refuses(aten.squeeze.default, stream(*dims), conservative="what it drops depends on N and S")
packs(aten.adjoint.default, stream("N", 3, "S", 4, **complexes))
packs(aten.squeeze.dims, stream("N", "S", 1, 6, 1), [2, 3, -1])
packs(aten.squeeze.dim, stream("N", "S", 6), -1)
for d in (0, 1):
    refuses(aten.squeeze.dim, stream("N", "S", 6), d, conservative="does something only where the size is 1")
packs(aten.expand.default, stream("N", "S", 1), lambda n, s: [n, s, 6])
packs(aten.expand.default, stream("N", "S", 1, 4), lambda n, s: [-1, -1, 3, -1])
packs(aten.expand.default, stream("N", "S", 4), lambda n, s: [1, n, s, 4])
packs(aten.expand.default, stream("N", "S", 4), lambda n, s: [3, n, s, 4])
packs(aten.expand.default, stream(1, "S", 6), lambda n, s: [n, s, 6])
packs(aten.expand.default, stream("S", 6), lambda n, s: [n, s, 6])
packs(aten.expand.default, stream(1, 1, "S", 4), lambda n, s: [n, 3, s, 4])
packs(aten.broadcast_to.default, stream("N", 1, "S", 4), lambda n, s: [n, 3, s, 4])
packs(aten.expand_as.default, stream("N", 1, "S", 4), stream("N", 3, "S", 4))
packs(aten.expand_as.default, stream("S", 6), stream("N", "S", 6))
refuses(
    aten.expand.default,
    stream("N", "S", 6),
    [4, -1, -1],
    sizes=((1, 5),),
    conservative="one row becomes four",
)
refuses(aten.expand_as.default, data(6), stream("N", "S", 6), conservative="no layout to start from")
for dims, d, verdict in each_dim():
    if verdict is refuses:
        refuses(aten.cat.default, [stream(*dims), stream(*dims)], d, conservative=MORE)
    else:
        packs(aten.cat.default, [stream(*dims), stream(*dims)], d)
        merged_column(aten.cat.default, [stream(*dims), stream(*dims), column(*dims)], d, dims=dims)
    verdict(aten.unbind.int, stream(*dims), d, late=True)
packs(aten.cat.default, [data(0), stream("N", 3, "S", 4)], 2)
packs(aten.concat.default, [column("N", "S", 6), stream("N", "S", 6)], -1)
refuses(
    aten.cat.default,
    [stream("N", "S", 6), weight(lambda n, s: n, lambda n, s: s, 6)],
    -1,
    conservative="a table",
)
refuses(aten.cat.default, [stream("N", "S"), stream("S", "N")], 1, sizes=((4, 4),), conservative=MORE)
refuses(aten.cat.default, [stream("N", "S", 6), stream("S", "N", 6)], 2, sizes=((4, 4),))
for dims in TOKENS + TABLES:
    for d in (-len(dims) - 1, -1, 1):
        packs(aten.stack.default, [stream(*dims), stream(*dims)], d)
refuses(
    aten.stack.default,
    [stream("N", "S", 6), data(lambda n, s: n, lambda n, s: s, 6)],
    0,
    conservative="no layout",
)
refuses(
    aten.stack.default,
    [call(aten.slice.Tensor, x := stream("N", "S", 6), 1, 0, 2), call(aten.slice.Tensor, x, 1, 1, 3)],
    0,
    late=True,
)
for dims, d, verdict in each_dim([t for t in TOKENS + TABLES if 1 not in t]):
    verdict(aten.split.Tensor, stream(*dims), 2, d)
    verdict(aten.chunk.default, stream(*dims), 2, d)
packs(aten.split_with_sizes.default, stream("N", "S", 6), [1, 3, 2], -1)
packs(aten.split.sizes, stream("N", 6, "S"), [5, 1], 1)
packs(aten.tensor_split.sections, stream("N", "S", 6), 4, 2)
packs(aten.tensor_split.indices, stream("N", "S", 6), [1, 4], 2)
packs(aten.repeat.default, stream("N", "S", 6), [1, 1, 2])
packs(aten.repeat.default, stream("N", "S", 6), [3, 1, 1, 1])
packs(aten.repeat.default, stream("N", "S", 6), [1, 1, 1])
packs(aten.tile.default, stream("N", "S", 6), [2])
packs(aten.tile.default, stream("N", "S", 3, 4), [2, 1])
packs(aten.repeat.default, stream("N", 1, "S", 4), [1, 3, 1, 1])
for dims in (("N", "S", 6), ("S", "N", 6)):
    for times in ([2, 1, 1], [1, 2, 1], [4, 2, 1, 1]):
        packs(aten.repeat.default, stream(*dims), times)
packs(aten.tile.default, stream(6, "N", "S"), [2])
for dims, d, _ in each_dim():
    packs(aten.repeat_interleave.self_int, stream(*dims), 2, d)
packs(aten.expand_as.default, weight(6), stream("N", "S", 6))
refuses(aten.repeat_interleave.self_int, stream("N", "S", 6), 2, conservative="flattens")

# -- indexing.py -------------------------------------------------------------------------------------------------------

for dims, d, verdict in each_dim([t for t in TOKENS + TABLES if 1 not in t]):
    verdict(aten.slice.Tensor, stream(*dims), d, 1, 3)
    verdict(aten.slice.Tensor, stream(*dims), d, 0, None, 2)
    verdict(aten.narrow.default, stream(*dims), d, 1, 2)
    verdict(aten.select.int, stream(*dims), d, -1)
    verdict(aten.index_select.default, stream(*dims), d, data(3, high=2, **ints))
packs(aten.slice.Tensor, stream("N", "S", 6), 1, 0, lambda n, s: s)
packs(aten.slice.Tensor, stream("N", "S", 6), 0, 0, None)
for dims in (("N", "S", 6), ("S", "N", 6), ("N", 3, "S", 4), ("N", 6, "S")):
    for d in (d for d in range(len(dims)) if is_token(dims[d])):
        for args in ((1, None), (None, -1), (0, None, 2), (-2, None), (1, 2)):
            packs(aten.slice.Tensor, stream(*dims), d, *args, late=True)
        packs(aten.narrow.default, stream(*dims), d, 1, 2, late=True)
        packs(aten.select.int, stream(*dims), d, -1, late=True)
        packs(aten.select.int, stream(*dims), d, 1, late=True)
        packs(
            aten.index_select.default,
            stream(*dims),
            d,
            data(5, high=lambda n, s: min(n, s, 2), **ints),
            late=True,
        )
        packs(aten.select.int, call(aten.slice.Tensor, stream(*dims), d, 1, None), d, -1, late=True)
packs(aten.slice.Tensor, stream("N*3", "S", 4), 1, 1, None, late=True)
packs(aten.slice.Tensor, call(aten.slice.Tensor, stream("N", "S", 6), 1, 1, None), 0, 1, None, late=True)
packs(aten.silu.default, call(aten.select.int, stream("N", "S", 6), 1, -1), late=True)
packs(aten.view.default, call(aten.select.int, stream("N", "S", 6), 1, -1), lambda n, s: [n, 2, 3], late=True)
packs(aten.slice.Tensor, call(aten.select.int, stream("N", "S", 6), 1, -1), 0, 1, None, late=True)
packs(aten.slice.Tensor, call(aten.select.int, stream("N", "S", 6), 0, -1), 0, 1, None, late=True)
refuses(aten.slice.Tensor, stream("N*S", 6), 0, 1, None, late=True)
refuses(
    aten.select.int, stream("N*3", "S", 4), 1, -1, late=True, conservative="the row's dim holds heads, too"
)
refuses(aten.select.int, stream("S", 6), 0, -1, late=True)
refuses(aten.slice.Tensor, stream("S", 6), 0, 1, None, late=True)
refuses(aten.select.int, call(aten.select.int, stream("N", "S", 6), 1, -1), 0, 0, late=True)
x = stream("N", "S", 6)
refuses(  # two cuts that begin alike
    aten.matmul.default,
    call(aten.narrow.default, x, 1, 0, 2),
    call(aten.mT.default, call(aten.narrow.default, x, 1, 0, 3)),
    late=True,
)
refuses(  # two cuts that begin alike
    aten.add.Tensor,
    call(aten.narrow.default, x := stream("N", "S", 6), 1, 0, 1),
    call(aten.narrow.default, x, 1, 0, 3),
    late=True,
)
packs(
    aten.add.Tensor,
    call(aten.narrow.default, x := stream("N", "S", 6), 1, 0, 3),
    call(aten.narrow.default, x, 1, 0, 3),
    late=True,
)
rows, places = dict(high=lambda n, s: n, **ints), dict(high=lambda n, s: s, **ints)
packs(
    aten.index.Tensor,
    stream("N", "S", 6),
    [data(lambda n, s: n, **rows), data(lambda n, s: n, **places)],
    late=True,
)
packs(aten.index.Tensor, stream("N", "S", 6), [data(7, **rows), data(7, **places)], late=True)
packs(aten.index.Tensor, stream("N", "S", 6), [data(3, 1, **rows), data(2, **places)], late=True)
packs(aten.index.Tensor, stream("N", "S", 6), [None, data(2, **places)], late=True)
packs(aten.index.Tensor, stream("N", 6, "S"), [None, data(2, high=6, **ints)])
packs(aten.index.Tensor, weight(4, 3), [stream("N", "S", **ints)])
packs(aten.index.Tensor, weight(4), [stream("N*S", **ints)])
packs(aten.index.Tensor, stream("N", "S"), [data(7, **rows), data(7, **places)], late=True)
refuses(aten.index.Tensor, stream("N", "S", 6), [data(7, **rows), data(7, **places)])
refuses(aten.index.Tensor, stream("N", "S", 6), [data(2, **rows)], late=True, conservative="has no lowering")
refuses(aten.index.Tensor, stream("N*S", 6), [data(2, **rows)], late=True, conservative="has no lowering")
refuses(aten.index.Tensor, data(4, 6), [stream("N", "S", **ints)], conservative="a table of constants")
for dims in (("N", "S", 6), ("N", "S", 3, 4), ("N*S", 6), ("S", "N", 6), ("N", 3, "S", 4)):
    packs(aten.gather.default, stream(*dims), -1, stream(*dims[:-1], 2, **ints))
    packs(aten.gather.default, stream(*dims), -1, column(*dims[:-1], 2, **ints))
for dims in (("N", "S", 6), ("N*S", 6), ("S*N", 6), ("S", "N", 6)):
    for entries in (1, 3):
        packs(aten.gather.default, stream(*dims), -1, late(*dims[:-1], entries, **ints), late=True)
packs(
    aten.gather.default,
    call(aten.slice.Tensor, stream("N", "S", 6), 1, 1, None),
    -1,
    late(lambda n, s: n, lambda n, s: s - 1, 1, **ints),
    late=True,
)
refuses(
    aten.gather.default,
    stream("N*3", "S", 4),
    -1,
    late("N*3", "S", 1, **ints),
    late=True,
    conservative="labels by head",
)
refuses(
    aten.gather.default,
    stream("S", 6),
    -1,
    late("S", 1, **ints),
    late=True,
    conservative="labels by position",
)
refuses(
    aten.gather.default,
    stream("N", "S", 3, 4),
    -1,
    late("N", "S", 3, 1, **ints),
    late=True,
    conservative="labels by head",
)
for d in (0, 1):
    refuses(aten.gather.default, stream("N", "S", 6), d, column("N", "S", 6, high=1, **ints))
refuses(aten.gather.default, stream("N", "S", 6), -1, data(2, 1, 1, **ints))
refuses(aten.gather.default, data(4, 6), 0, stream("N", "S", **ints), conservative="smaller than the tokens")
for dims in (("N", "S"), ("N*S",), ("S", "N"), ("N", "S", 3), ("S",)):
    packs(aten.embedding.default, weight(4, 6), stream(*dims, **ints))
refuses(aten.embedding.default, stream("N*S", 6), data(4, 2, **ints))
packs(aten.index_select.default, stream("N", "S", 6), 2, data(3, **ints))
refuses(aten.index_select.default, stream("N", "S", 6), 2, stream("N*S", **ints))

# -- reductions.py -----------------------------------------------------------------------------------------------------

for dims, d, verdict in each_dim():
    verdict(aten.sum.dim_IntList, stream(*dims), [d], True)
    verdict(aten.argmax.default, stream(*dims), d)
    verdict(aten.max.dim, stream(*dims), d)
    verdict(aten.linalg_vector_norm.default, stream(*dims), 2, [d], True)
    verdict(aten.var.dim, stream(*dims), [d], False, True)
    verdict(aten.var_mean.correction, stream(*dims), [d], correction=0)
    verdict(aten.softmax.int, stream(*dims), d)
    verdict(aten.cumsum.default, stream(*dims), d)
    verdict(aten.sort.stable, stream(*dims), stable=True, dim=d)
    verdict(aten.flip.default, stream(*dims), [d])
    verdict(aten.roll.default, stream(*dims), [1], [d])
    verdict(aten.topk.default, stream(*dims), 1, d)
    verdict(aten.cosine_similarity.default, stream(*dims), stream(*dims), d)
    pad = [0] * (2 * len(dims) - 2 * (d % len(dims)))
    verdict(aten.constant_pad_nd.default, stream(*dims), [*pad[:-2], 1, 2], 1.0)
for dims in TOKENS + TABLES:
    verdict = packs if not is_token(dims[-1]) else refuses
    if verdict is packs:
        packs(aten.layer_norm.default, stream(*dims), [dims[-1]], weight(dims[-1]), weight(dims[-1]))
    refuses(aten.sum.default, stream(*dims), late=True)
    refuses(aten.sum.dim_IntList, stream(*dims), [], late=True)
    refuses(aten.roll.default, stream(*dims), [1])
for op in (
    aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default,
):  # fmt: skip
    packs(op, stream("N", "S", 3, 4), [-1, 2])
    refuses(op, stream("N", "S", 3, 4), [1])
for op in (
    aten.prod.dim_int, aten.argmin.default, aten.min.dim, aten.median.dim, aten.cumprod.default,
    aten.logcumsumexp.default, aten.cummax.default, aten.log_softmax.int, aten.sort.default, aten.argsort.default,
):  # fmt: skip
    packs(op, stream("N", 6, "S"), 1)
    refuses(op, stream("N", 6, "S"), 2)
for op in (
    aten.mean.default, aten.max.default, aten.std.default, aten.var.default,
    aten.prod.default, aten.median.default,
):  # fmt: skip
    refuses(op, stream("N", "S", 6), late=True)
for op in (aten.any.dims, aten.all.dims, aten.count_nonzero.dim_IntList):
    packs(op, stream("N", "S", 3, 4, **bools), [-1, 2])
    refuses(op, stream("N", "S", 3, 4, **bools), [1], conservative="one value rarely decides")
for op in (aten.any.dim, aten.all.dim):
    packs(op, stream("N", 6, "S", **bools), 1)
    refuses(op, stream("N", 6, "S", **bools), 2, conservative="one value rarely decides")

# -- routing.py --------------------------------------------------------------------------------------------------------


def sorted_by(keys: Tensor, *args: Any, op: Any = aten.sort.default, **kwargs: Any) -> tuple[Call, Call]:
    """Values and permutation."""
    both = call(op, keys, *args, **kwargs)
    return call(operator.getitem, both, 0), call(operator.getitem, both, 1)


def indexed(x: Any, index: Any) -> Call:
    return call(aten.index.Tensor, x, [index])


for dims in ("N*S", "S*N", "N*S*2", "2*N*S"):
    keys = stream(dims, high=3, **ints)
    values, permutation = sorted_by(keys)
    inverse = call(aten.argsort.default, permutation)
    packs(aten.index.Tensor, indexed(stream(dims, 6), permutation), [inverse])
    packs(aten.index.Tensor, call(aten.mul.Tensor, indexed(stream(dims), permutation), values), [inverse])
    packs(
        aten.index_select.default,
        call(aten.index_select.default, stream(dims, 6), 0, permutation),
        0,
        inverse,
    )
keys, tokens = stream("N*S*2", high=3, **ints), stream("N*S", 6)
values, permutation = sorted_by(keys)
of_token = call(aten.floor_divide.default, permutation, 2)
count = call(aten.arange.default, lambda n, s: n * s * 2)
numbered = call(aten.index_put.default, call(aten.empty_like.default, permutation), [permutation], count)
scattered = call(aten.scatter.src, call(aten.empty_like.default, permutation), 0, permutation, count)
for inverse in (numbered, scattered, call(aten.argsort.default, permutation)):
    packs(aten.index.Tensor, indexed(tokens, of_token), [inverse])
packs(
    aten.index.Tensor,
    indexed(tokens, call(aten.div.Tensor_mode, permutation, 2, rounding_mode="floor")),
    [numbered],
)
packs(aten.index.Tensor, indexed(tokens, call(aten.to.dtype, of_token, torch.int64)), [numbered])
packs(
    aten.index_add.default,
    stream("N*S", 6, **ints),
    0,
    of_token,
    indexed(stream("N*S*2", 6, **ints), permutation),
)
_, by_argsort = keys, call(aten.argsort.default, keys, -1, True)
packs(aten.index.Tensor, indexed(tokens, call(aten.floor_divide.default, by_argsort, 2)),
      [call(aten.argsort.default, by_argsort)])  # fmt: skip
# of other entries, by another sort, or divided by something else than the entries of a token
_, other = sorted_by(stream("N*S*2", high=3, **ints))
refuses(aten.index.Tensor, indexed(stream("N*S*2", 6), permutation), [call(aten.argsort.default, other)])
refuses(
    aten.index.Tensor, indexed(stream("S*N*2", 6), permutation), [numbered], conservative="undone in the end"
)
refuses(aten.index.Tensor, indexed(tokens, call(aten.floor_divide.default, permutation, 3)), [numbered])
refuses(aten.index.Tensor, indexed(stream("N*S*2", 6), permutation), [permutation])
refuses(aten.index.Tensor, stream("N*S*2", 6), [call(aten.argsort.default, permutation, -1, True)])
refuses(aten.index_add.default, stream("N*S", 6), 0, of_token, stream("N*S*2", 6))
refuses(aten.index.Tensor, call(aten.cumsum.default, indexed(stream("N*S*2", 6), permutation), 0), [numbered])
twice = call(aten.mul.Tensor, indexed(stream("N*S*2"), permutation), stream("N*S*2"))
refuses(aten.index.Tensor, twice, [numbered])
# numbers of entries are no values
refuses(aten.mul.Tensor, permutation, 2)
refuses(aten.add.Tensor, numbered, numbered)
refuses(aten.index.Tensor, indexed(stream("N*S*2", 6), call(aten.bitwise_xor.Scalar, permutation, 1)), [numbered],
        conservative="no rule")  # fmt: skip
refuses(aten.histc.default, stream("N*S"), 4)
refuses(aten.histc.default, indexed(stream("N*S*2"), permutation), 3, 0, 2)
refuses(aten.cumsum.default, permutation, 0)

# -- writes.py ---------------------------------------------------------------------------------------------------------

for dims, d, verdict in each_dim():
    if verdict is packs:
        packs(aten.slice_scatter.default, stream(*dims), stream(*dims), d)
    else:
        refuses(
            aten.slice_scatter.default, stream(*dims), stream(*dims), d, conservative="writes over everything"
        )
    verdict(aten.scatter.value, stream(*dims), d, stream(*dims, high=1, **ints), 2.0)
for dims in (("N", "S", 6), ("S", "N", 6), ("N*S", 6), ("N", 3, "S", 6)):
    part, index = (*dims[:-1], 2), stream(*dims[:-1], 2, high=6, **ints)
    packs(aten.slice_scatter.default, stream(*dims), stream(*part), -1, 3, 5)
    packs(aten.slice_scatter.default, column(*dims), stream(*part), -1, 0, 4, 2)
    packs(aten.slice_scatter.default, stream(*dims), column(*part), -1, 3, 5)
    packs(aten.scatter.src, stream(*dims), -1, index, stream(*part))
    packs(aten.scatter_add.default, column(*dims), -1, index, stream(*part))
    for late_or_not in (False, True):
        constant = call(aten.full.default, sizes_of(*dims), 0.5, dtype=torch.float64)
        packs(aten.scatter.src, constant, -1, index, stream(*part), late=late_or_not)
        packs(aten.slice_scatter.default, constant, stream(*part), -1, 3, 5, late=late_or_not)
    packs(aten.scatter_reduce.two, stream(*dims), -1, index, stream(*part), "amax")
    packs(aten.select_scatter.default, stream(*dims), stream(*dims[:-1]), -1, 3)
    packs(aten.select_scatter.default, stream(*dims), column(*dims[:-1]), -1, 3)
    refuses(
        aten.select_scatter.default,
        weight(lambda n, s: n * s, 6),
        stream("N*S"),
        1,
        2,
        conservative="not sliced",
    )
refuses(aten.select_scatter.default, stream("N", "S", 6), stream("N", 6), 1, 2)
refuses(aten.slice_scatter.default, stream("N", "S", 6), stream("N", 2, 6), 1, 1, 3, sizes=((4, 5),))
refuses(
    aten.scatter.src,
    stream("N", 4, 6),
    2,
    stream("N", "S", 2, high=6, **ints),
    stream("N", "S", 2),
    sizes=((4, 4),),
)

# -- softmax_forms.py --------------------------------------------------------------------------------------------------

for dims, d, verdict in each_dim():
    ones = [1 if i == d % len(dims) else size if isinstance(size, int) else 1 for i, size in enumerate(dims)]
    verdict(softmax_with_sink, stream(*dims), weight(*ones), d)
packs(softmax_with_sink, stream("N", "S", 6), stream("N", "S", 1), -1)
packs(softmax_with_sink, stream("N", "S", 6), column("N", "S", 1), 2, torch.float32)

# -- reductions.py, once more ------------------------------------------------------------------------------------------

refuses(aten.norm.Scalar, stream("N", "S", 6))
packs(aten.norm.ScalarOpt_dim, stream("N", "S", 6), 2, [-1], True)
packs(aten.linalg_norm.default, stream("N", "S", 3, 4), None, [2, 3])
refuses(aten.linalg_norm.default, stream("N", 6, "S"), None, [1, 2])
packs(aten.std.correction, stream("N", "S", 6), [-1], correction=1, keepdim=True)
packs(aten.std.dim, stream("N", "S", 6), [-1])
refuses(aten.var.correction, stream("N", "S", 6))
packs(aten._softmax.default, stream("N", "S", 6), -1, False)
packs(aten.argsort.stable, stream("N", "S", 6), stable=True)
packs(aten.rms_norm.default, stream("N", "S", 3, 4), [3, 4], weight(3, 4))
packs(aten.native_layer_norm.default, stream("N", "S", 6), [6], weight(6), weight(6), 1e-5)
packs(aten.native_layer_norm.default, stream("N", 3, "S", 3, 4), [3, 4], None, None, 1e-5)
refuses(aten.layer_norm.default, stream("N", 6, "S"), lambda n, s: [s])
refuses(aten.layer_norm.default, stream("N", "S", 6), lambda n, s: [s, 6])
refuses(aten.batch_norm.default, stream("N*S", 6), None, None, None, None, True, 0.1, 1e-5, False)
refuses(aten.group_norm.default, stream("N", 6, "S"), 2)
packs(aten.pad.default, stream("N", 6, "S"), [0, 0, 1, 2])
refuses(aten.pad.default, stream("N", 6, "S"), [1, -1])
refuses(aten.constant_pad_nd.default, stream("N", "S", 6), [0, 0, -1, 1])
for dims in (("N", "S"), ("N*S",), ("S", "N"), ("S",), ("N", "S", 3)):
    packs(aten.one_hot.default, stream(*dims, **ints), 4)

packs(aten.cosine_similarity.default, stream("N", "S", 6), column("N", "S", 6), 2)
packs(aten.cosine_similarity.default, stream("N", "S", 6), weight(6), -1)

# -- matmul.py ---------------------------------------------------------------------------------------------------------

for dims in [d for d in TOKENS + TABLES if not is_token(d[-1])]:
    packs(aten.linear.default, stream(*dims), weight(5, dims[-1]), weight(5))
    packs(aten.matmul.default, stream(*dims), weight(dims[-1], 5))
    packs(aten.matmul.default, stream(*dims), weight(dims[-1]))
for dims in [d for d in TOKENS + TABLES if is_token(d[-1])]:
    if dims[-2:-1] == (6,):
        packs(aten.matmul.default, weight(5, 6), stream(*dims))
    size = {"S": lambda n, s: s, "N": lambda n, s: n}[dims[-1]]
    refuses(aten.linear.default, stream(*dims), weight(5, size))
    refuses(aten.matmul.default, stream(*dims), weight(size, 5))
    refuses(aten.matmul.default, stream(*dims), data(size))
packs(aten.linear.default, stream("N", "S", 6), weight(6))
packs(aten.linear.default, stream("N", "S", 6), data(1, 6))
refuses(aten.linear.default, data(2, 6), stream("N*S", 6), conservative="tokens as the rows of a weight")
refuses(aten.linear.default, stream("N*S", 6), stream("N*S", 6))
packs(aten.mm.default, stream("N*S", 6), weight(6, 5))
packs(aten.mm.default, weight(5, 6), call(aten.t.default, stream("N*S", 6)))
refuses(aten.mm.default, stream("N*S", 6), call(aten.t.default, stream("N*S", 6)))
packs(aten.mv.default, stream("N*S", 6), weight(6))
packs(aten.matmul.default, stream("N", "S", 3, 4), stream("N", "S", 4, 3))
packs(aten.matmul.default, stream("N", "S", 3, 4), column("N", "S", 4, 2))
packs(aten.matmul.default, stream("N*S", 3, 4), stream("N*S", 4, 3))
packs(aten.bmm.default, stream("N*S", 3, 4), column("N*S", 4, 3))
packs(aten.matmul.default, stream("N", "S", 3, 4), weight(4, 2))
packs(aten.matmul.default, stream("N", 3, "S", 4), weight(3, 4, 2))
packs(aten.matmul.default, weight(5, 6), stream("N", 6, "S"))
refuses(aten.matmul.default, weight(lambda n, s: s, lambda n, s: s), stream("N", "S", 6))
refuses(aten.matmul.default, column("N", 2, "S"), stream("N", "S", 6))
refuses(
    aten.matmul.default,
    stream("N", "S", 6),
    column("N", 6, 4),
    conservative="a matrix per row, aligned with no position",
)
refuses(aten.matmul.default, stream("N", 6, "S"), stream("N", "S", 6))
refuses(aten.matmul.default, stream("N", "S", 6), stream("S", 6, "N"), sizes=((4, 4),))
refuses(aten.bmm.default, stream("S", "N", 6), stream("S", 6, "N"))
packs(aten.addmm.default, weight(5), stream("N*S", 6), weight(6, 5))
packs(aten.addmm.default, stream("N*S", 5), stream("N*S", 6), weight(6, 5), beta=0.5, alpha=2)
packs(aten.addmm.default, column("N*S", 5), stream("N*S", 6), weight(6, 5))
refuses(
    aten.addmm.default,
    weight(lambda n, s: n * s, 5),
    stream("N*S", 6),
    weight(6, 5),
    conservative="a weight by token",
)
refuses(aten.addmm.default, data(4), weight(3, lambda n, s: n * s), stream("N*S", 4))
packs(aten.baddbmm.default, stream("N*S", 3, 2), stream("N*S", 3, 4), stream("N*S", 4, 2))
packs(aten.baddbmm.default, column("N*S", 1, 2), stream("N*S", 3, 4), stream("N*S", 4, 2))
refuses(aten.baddbmm.default, data(1), column("N", 2, "S"), stream("N", "S", 6))
for equation, first, second in (
    ("nsd,de->nse", ("N", "S", 6), (6, 5)), ("nshd,hde->nshe", ("N", "S", 3, 4), (3, 4, 2)),
    ("td,ed->te", ("N*S", 6), (5, 6)), ("snd,de->sne", ("S", "N", 6), (6, 5)), ("nsd,d->ns", ("N", "S", 6), (6,)),
):  # fmt: skip
    packs(aten.einsum.default, equation, [stream(*first), weight(*second)])
packs(aten.einsum.default, "nshd,nsgd->nshg", [stream("N", "S", 3, 4), stream("N", "S", 2, 4)])
packs(aten.einsum.default, "nsd,nsd->sn", [stream("N", "S", 6), stream("N", "S", 6)])
refuses(aten.einsum.default, "nsd->nd", [stream("N", "S", 6)])
refuses(aten.einsum.default, "nsd,ms->nmd", [stream("N", "S", 6), weight(2, lambda n, s: s)])
refuses(aten.einsum.default, "nqd,nkd->nqk", [stream("N", "S", 6), stream("N", "S", 6)])
refuses(aten.einsum.default, "nsd,msd->nms", [stream("N", "S", 6), stream("N", "S", 6)])
refuses(
    aten.einsum.default,
    "nsd,ns->nsd",
    [stream("N", "S", 6), column("N", "S")],
    conservative="columns have no rule",
)

heads = [stream("N", 3, "S", 4) for _ in range(3)]
sdpa = aten.scaled_dot_product_attention.default
packs(sdpa, *heads, None, 0.0, True)
packs(sdpa, *heads, None, 0.0, True, scale=0.7)
packs(sdpa, stream("N", 6, "S", 4), *heads[1:], None, 0.0, True, enable_gqa=True)
packs(sdpa, *(stream("N*3", "S", 4) for _ in range(3)), None, 0.0, True)
packs(sdpa, *(stream("N", "S", 4) for _ in range(3)), None, 0.0, True)
packs(sdpa, *(stream("N", "S", 3, 4) for _ in range(3)))  # over the heads of one token
packs(sdpa, *(stream("N*S", 3, 4) for _ in range(3)), data(3, 3))
refuses(sdpa, *(stream("S", 3, "N", 4) for _ in range(3)))  # over the rows
refuses(
    sdpa,
    *(stream(3, "N", "S", 4) for _ in range(3)),
    None,
    0.0,
    True,
    conservative="rows aren't the batch dim",
)
refuses(
    sdpa,
    heads[0],
    data(lambda n, s: n, 3, 7, 4),
    data(lambda n, s: n, 3, 7, 4),
    conservative="keys from inputs",
)
refuses(sdpa, *(stream("N", 3, 4, "S") for _ in range(3)))
refuses(
    sdpa,
    stream("N", "S", 2, 4),
    *(stream("N", "S", 3, 4) for _ in range(2)),
    late("N", "S", 2, 3),
    conservative="a mask by token",
)

conv = (None, [1], [1], [1], 1)
refuses(aten.conv1d.default, stream("N", 6, "S"), weight(6, 6, 3), *conv)
refuses(aten.conv1d.default, stream("S", 6, "N"), weight(6, 6, 3), *conv)
refuses(aten.tril.default, stream("N", "S", 6))
refuses(aten.triu.default, stream("N", 6, "S"), 1)
refuses(aten.unfold.default, stream("N", "S", 6), 1, 1, 1, conservative="windows of one")
refuses(aten.unfold.default, stream("N*S", 6), 0, 1, 2)
refuses(aten.outer.default, stream("N*S"), stream("N*S"))

refuses(aten.cdist.default, stream("N", "S", 6), stream("N", "S", 6))
refuses(aten.index_add.default, data(4, 6), 0, data(lambda n, s: n * s, **ints), stream("N*S", 6))
refuses(
    aten.scatter_add.default,
    stream("N", "S", 6),
    1,
    data(lambda n, s: n, lambda n, s: s, 6, high=1, **ints),
    stream("N", "S", 6),
)
refuses(aten.adaptive_avg_pool1d.default, stream("N", 6, "S"), [1])

# -- losses.py ---------------------------------------------------------------------------------------------------------

for dims in (("N*S", 6), ("S*N", 6)):
    for reduction in (0, 1, 2):
        target = late(dims[0], high=6, **ints)
        packs(aten.cross_entropy_loss.default, stream(*dims), target, None, reduction, late=True)
        packs(aten.cross_entropy_loss.default, stream(*dims), target, weight(6), reduction, 5, 0.3, late=True)
        packs(aten.nll_loss_nd.default, stream(*dims), target, weight(6), reduction, late=True)
    packs(aten.cross_entropy_loss.default, stream(*dims), target, None, 1, -100, 0.1, late=True)
    packs(aten.nll_loss.default, stream(*dims), target, None, 1, 2, late=True)
last = call(aten.select.int, stream("N", "S", 6), 1, -1)
packs(aten.cross_entropy_loss.default, last, late("N", high=6, **ints), late=True)
refuses(aten.cross_entropy_loss.default, stream("N*S", 6), late("N*S", high=6, **ints))
refuses(aten.cross_entropy_loss.default, stream("N*S", 6), late("N*S", 6), late=True)
refuses(aten.cross_entropy_loss.default, stream("N", 6, "S"), late("N", "S", high=6, **ints), late=True)
refuses(aten.cross_entropy_loss.default, stream(6, "S"), late(6, high=4, **ints), late=True)
refuses(aten.cross_entropy_loss.default, stream("N*S*3", 6), late("N*S*3", high=6, **ints), late=True)
refuses(aten.cross_entropy_loss.default, stream("S", 6), late("S", high=6, **ints), late=True)
refuses(aten.nll_loss.default, stream("N*S", 6), late("N*S", high=6, **ints))

for name in ELEMENTWISE_LOSSES:
    loss = getattr(aten, name).default
    names = [a.name for a in loss._schema.arguments]
    defaults = {"log_input": True, "full": True, "eps": 1e-8, "reduction": 0, "beta": 1.0, "delta": 1.0}
    rest = [defaults.get(n) for n in names[2:] if n != "log_target"]
    for dims in [("N", "S", 6), ("N*S", 6), (6, "S", "N")]:
        values = [stream(*dims), stream(*dims)]
        if name == "binary_cross_entropy":  # of probabilities
            values = [call(aten.sigmoid.default, value) for value in values]
        packs(loss, *values, *rest)
        refuses(loss, *values, *[2 if n == "reduction" else r for n, r in zip(names[2:], rest)])
packs(aten.kl_div.default, stream("N", "S", 6), column("N", "S", 6), 0, log_target=True)
