"""float64 throughout: casts to float32 inside of a model become casts to float64, in eager and compiled alike.

Many models cast to float32 for norms, softmax and rotary tables, so that two exact computations of a float64 model
still differ by float32 rounding. With these casts promoted they agree to 1e-10, and an error has nowhere to hide.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _PromoteFloat32(TorchFunctionMode):
    """Every torch call made under this mode reads `float32` as `float64`.

    Dynamo traces a torch function mode by inlining it, so the graph that a backend receives says float64 as well, in
    every model and library without naming their modules. It gets what follows a graph break wrong in torch 2.13, so
    compile with `fullgraph=True` under this mode.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.unflatten:  # written in Python with super(), which Dynamo cannot inline
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def float64_everywhere() -> Iterator[None]:
    """In-model casts to float32 (`.float()`, `.to(torch.float32)`, `softmax(dtype=torch.float32)`) give float64.

    Enter it around tracing, forward and backward alike, eager and compiled alike. The default dtype is float64 too.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _PromoteFloat32():
            yield
    finally:
        torch.set_default_dtype(default)
