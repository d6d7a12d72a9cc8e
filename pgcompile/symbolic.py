"""Sizes that a graph is traced for without a value."""

import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv


def dynamic_size(env: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    """A new symbol of `env`; where a compiler has to choose, it takes `hint` for it."""
    from torch._dynamo.source import ConstantSource

    source = ConstantSource(f"num_{name}")
    symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    size = env.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)  # an int is for static sizes
    return size
