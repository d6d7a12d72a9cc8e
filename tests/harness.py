"""What every test shares: batches with known prefix trees, float64 throughout, and the comparison with eager.

    batch = random_tree_batch(rows=8, positions=12, seed=0, padding="left")
    with float64_everywhere():
        report = assert_same(model, (batch.input_ids, batch.attention_mask), expect_status="packed")
    assert report.stats.packed_tokens == brute_force_packed_tokens([batch.input_ids], batch.kept)

Shapes: N rows, S positions, V vocabulary.
"""

import copy
import dataclasses
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pgcompile.coverage.measure import named_tensors
from pgcompile.coverage.precision import float64_everywhere as float64_everywhere

# Set to "eager" or "aot_eager" to run the suites without pgcompile: every assertion about values must hold there too,
# and every assertion about packing is skipped.
BACKEND = os.environ.get("PGCOMPILE_TEST_BACKEND", "pgcompile")
ALWAYS_PACK = {"inner": "eager", "min_saving": 0}

VALUE_TOLERANCE = 1e-10
GRADIENT_TOLERANCE = 1e-9
# Gradients that are zero in exact arithmetic (a key bias's) are rounding noise: judged against the model's largest.
NEGLIGIBLE_GRADIENT = 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """input_ids [N, S]; attention_mask [N, S] of 0 and 1, or None where no row is padded; kept [N, S] bool."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None

    @property
    def kept(self) -> torch.Tensor:
        return kept_positions(self.input_ids, self.attention_mask)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        return inputs

    @property
    def dense_positions(self) -> torch.Tensor:
        """The column index [N, S], for models that number positions without looking at the mask."""
        rows, positions = self.input_ids.shape
        return torch.arange(positions).expand(rows, positions)


def kept_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[N, S] bool: False on leading and trailing runs of masked positions, True on holes and on everything else."""
    if attention_mask is None:
        return torch.ones(input_ids.shape, dtype=torch.bool)
    valid = attention_mask.bool().to(torch.int64)
    return (valid.cumsum(1) > 0) & (valid.flip(1).cumsum(1).flip(1) > 0)


def random_tree_batch(
    *,
    rows: int = 8,
    positions: int = 12,
    vocab: int = 31,
    seed: int = 0,
    padding: str = "none",
    trees: int = 2,
    duplicates: int = 1,
    prefixes: int = 1,
    holes: int = 0,
    shuffle: bool = True,
) -> Batch:
    """A batch whose rows fork from each other at random positions, so that prefixes are shared at several depths.

    padding: "none" (all rows have S tokens), "right", "left", or "both" (each row is placed anywhere). With padding,
        lengths are random, the longest is S, and padding carries random ids, so that reading it shows.
    trees: rows that share nothing by construction. duplicates: rows that repeat a row. prefixes (needs padding): rows
        that are a proper prefix of a row. holes: masked positions inside rows (needs padding).
    shuffle: False keeps rows of a group adjacent.
    """
    if padding not in ("none", "right", "left", "both"):
        raise ValueError(f"padding={padding!r}")
    rng = random.Random(seed)
    padded = padding != "none"

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    sequences = [tokens(positions) for _ in range(min(trees, rows))]
    derived = min(duplicates + (prefixes if padded else 0), max(rows - len(sequences), 0))
    while len(sequences) < rows - derived:
        parent = rng.choice(sequences)
        fork = rng.randint(1, max(positions - 1, 1))
        sequences.append(parent[:fork] + tokens(positions - fork))
    if padded:
        # The first row keeps all its tokens: a batch is as wide as its longest row.
        sequences = sequences[:1] + [row[: rng.randint(1, positions)] for row in sequences[1:]]
    for index in range(derived):
        source = rng.choice(sequences[: rows - derived])
        if index >= duplicates:
            source = source[: rng.randint(1, max(len(source) - 1, 1))]
        sequences.append(list(source))
    if shuffle:
        rng.shuffle(sequences)
    else:
        sequences.sort()

    input_ids = torch.tensor([tokens(positions) for _ in range(rows)])
    attention_mask = torch.zeros(rows, positions, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        room = positions - len(sequence)
        start = {"none": 0, "right": 0, "left": room, "both": rng.randint(0, room)}[padding]
        input_ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        attention_mask[row, start : start + len(sequence)] = 1
    for _ in range(holes if padded else 0):
        row = rng.randrange(rows)
        inner = attention_mask[row].nonzero().flatten()[1:-1].tolist()
        if inner:
            attention_mask[row, rng.choice(inner)] = 0
    return Batch(input_ids, attention_mask if padded else None)


def brute_force_packed_tokens(columns: Sequence[torch.Tensor], kept: torch.Tensor) -> int:
    """The number of distinct prefixes: what every column [N, S] says from a row's first kept token up to a token."""
    prefixes: set[tuple] = set()
    for row in range(kept.shape[0]):
        prefix: tuple = ()
        for position in kept[row].nonzero().flatten().tolist():
            prefix += (tuple(column[row, position].item() for column in columns),)
            prefixes.add(prefix)
    return len(prefixes)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with eager
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """What one call left behind, by name. Tensors are detached copies."""

    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    state: dict[str, torch.Tensor]  # parameters, buffers and tensor inputs after the call: catches mutation
    loss: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Both results, and pgcompile's counters for the compiled call (None under another backend)."""

    eager: Result
    compiled: Result
    stats: Any


def _parameters(roots: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the modules among `roots`, and the tensors in the rest."""
    named: dict[str, torch.Tensor] = {}
    for index, root in enumerate(roots):
        if isinstance(root, nn.Module):
            named |= {f"{index}.{name}": tensor for name, tensor in root.named_parameters()}
            named |= {f"{index}.{name}": tensor for name, tensor in root.named_buffers()}
        else:
            named |= named_tensors(root, f"input{index}")
    return named


def _is_per_token(tensor: torch.Tensor, kept: torch.Tensor | None) -> bool:
    return kept is not None and tensor.shape[:2] == kept.shape


def _zero_pads(tensor: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    if not _is_per_token(tensor, kept):
        return tensor
    return tensor.masked_fill(~kept.reshape(kept.shape + (1,) * (tensor.dim() - 2)), 0)


def run(
    call: Callable,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    kept: torch.Tensor | None = None,
    owner: nn.Module | None = None,
    backward: bool = True,
    seed: int = 0,
) -> Result:
    """Calls once, and back through a scalar: every floating output times fixed random weights, padding left out.

    owner: the module whose parameters are read, where `call` is not itself one (a compiled module's original).
    kept: [N, S] bool; outputs of shape [N, S, ...] are compared and weighted there only.
    """
    kwargs = dict(kwargs or {})
    module = owner if owner is not None else call
    roots = [module, *args, *kwargs.values()]
    leaves = {
        name: tensor for name, tensor in _parameters(roots).items() if tensor.requires_grad and tensor.is_leaf
    }
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(seed)
    outputs = named_tensors(call(*args, **kwargs))
    generator = torch.Generator().manual_seed(1234)
    loss = torch.zeros((), dtype=torch.float64)
    for tensor in outputs.values():
        if tensor.is_floating_point():
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            loss = loss + (_zero_pads(tensor, kept) * _zero_pads(weights, kept)).sum()
    if backward and loss.requires_grad:
        loss.backward()

    def snapshot(tensors: Mapping[str, torch.Tensor | None]) -> dict:
        copies = {
            name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()
        }
        return {
            name: copy.to_dense() if copy is not None and copy.is_sparse else copy
            for name, copy in copies.items()
        }

    return Result(
        outputs=snapshot({name: _zero_pads(tensor, kept) for name, tensor in outputs.items()}),
        gradients=snapshot({name: leaf.grad for name, leaf in leaves.items()}),
        state=snapshot(_parameters(roots)),
        loss=loss.item(),
    )


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; infinite where only one is NaN or infinite, or they are different infinities."""
    if expected.numel() == 0:
        return 0.0
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        return 0.0 if torch.equal(actual, expected) else float("inf")
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = torch.where(same, torch.zeros_like(actual), actual - expected).abs()
    return difference.nan_to_num(nan=float("inf")).max().item()


def _largest(tensor: torch.Tensor | None) -> float:
    if tensor is None or tensor.numel() == 0 or tensor.dtype == torch.bool:
        return 0.0
    return tensor.nan_to_num().abs().max().item()


def differences(actual: Result, expected: Result, tol: float, gradient_tol: float) -> list[str]:
    """One line for everything that differs by more than the tolerances; empty when all is the same."""
    lines = []

    def compare(kind: str, name: str, got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
        if got.shape != want.shape or got.dtype != want.dtype:
            lines.append(
                f"{kind} {name}: {list(got.shape)} {got.dtype}, eager {list(want.shape)} {want.dtype}"
            )
        elif (difference := _difference(got, want)) > bound:
            lines.append(f"{kind} {name}: differs by {difference:.3g}, allowed {bound:.3g}")

    for kind, got, want in (
        ("output", actual.outputs, expected.outputs),
        ("state", actual.state, expected.state),
    ):
        if got.keys() != want.keys():
            lines.append(f"{kind}s {sorted(got)}, eager {sorted(want)}")
            continue
        for name, tensor in want.items():
            compare(kind, name, got[name], tensor, tol * max(1.0, _largest(tensor)))
    largest = max((_largest(gradient) for gradient in expected.gradients.values()), default=0.0)
    for name, want in expected.gradients.items():
        got = actual.gradients[name]
        if want is None:
            if _largest(got) > 0:
                lines.append(f"gradient {name}: {_largest(got):.3g}, eager has none")
        elif got is None:
            lines.append(f"gradient {name}: none, eager's largest entry is {_largest(want):.3g}")
        else:
            compare(
                "gradient", name, got, want, gradient_tol * max(_largest(want), NEGLIGIBLE_GRADIENT * largest)
            )
    return lines


def assert_no_worse_than_eager(
    tensors_of: Callable[[str, int], dict[str, torch.Tensor]], eps: float, seeds: int = 5
) -> None:
    """Relative L2 error of every tensor against float64: at most twice eager's, or `eps`; median over the seeds.

    tensors_of: ("truth" | "eager" | "compiled", seed) -> tensors by name.
    """
    ratios: dict[str, list[float]] = {}
    for seed in range(seeds):
        truth, eager, mine = (tensors_of(side, seed) for side in ("truth", "eager", "compiled"))
        for name, want in truth.items():
            own, error = ((side[name].double() - want).norm() / want.norm() for side in (eager, mine))
            ratios.setdefault(name, []).append((error / max(2 * own, eps)).item())
    medians = {name: sorted(values)[seeds // 2] for name, values in ratios.items()}
    assert medians and all(ratio <= 1 for ratio in medians.values()), {
        name: ratio for name, ratio in medians.items() if ratio > 1
    }


def compiled(
    call: Callable,
    options: Mapping[str, Any] | None = None,
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Callable:
    """torch.compile of `call` with the backend under test, after a Dynamo reset."""
    torch._dynamo.reset()
    if BACKEND != "pgcompile":
        return torch.compile(call, backend=BACKEND, dynamic=dynamic, fullgraph=fullgraph)
    options = {**ALWAYS_PACK, **(options or {})}
    return torch.compile(call, backend="pgcompile", options=options, dynamic=dynamic, fullgraph=fullgraph)


def status_of(stats: Any) -> str:
    """How the calls since `reset_stats` went, the worst first: "eager", "dense", "packed", or "none"."""
    return next((outcome for outcome in ("eager", "dense", "packed") if getattr(stats, outcome)), "none")


def assert_same(
    call: Callable,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    kept: torch.Tensor | None = None,
    tol: float = VALUE_TOLERANCE,
    gradient_tol: float = GRADIENT_TOLERANCE,
    expect_status: str | None = None,
    backward: bool = True,
) -> Report:
    """Eager and compiled agree on outputs, gradients, and everything they leave behind; each runs on its own copy.

    call: an nn.Module, or a function of modules and tensors. kept: see `run`; by default it comes from the
        `attention_mask` and `input_ids` (or the first two positional) arguments.
    expect_status: "packed", "dense" or "eager": the worst outcome among the compiled calls.
    """
    kwargs = dict(kwargs or {})
    if kept is None:
        kept = _kept_from_arguments(args, kwargs)
    eager_call, eager_args, eager_kwargs = copy.deepcopy((call, tuple(args), kwargs))
    expected = run(eager_call, eager_args, eager_kwargs, kept=kept, backward=backward)
    own_call, own_args, own_kwargs = copy.deepcopy((call, tuple(args), kwargs))
    fast_call = compiled(own_call, options, dynamic=dynamic, fullgraph=fullgraph)
    stats = None
    if BACKEND == "pgcompile":
        import pgcompile

        pgcompile.reset_stats()
    actual = run(fast_call, own_args, own_kwargs, kept=kept, owner=own_call, backward=backward)
    lines = differences(actual, expected, tol, gradient_tol)
    if BACKEND == "pgcompile":
        stats = pgcompile.stats()
        if expect_status is not None and status_of(stats) != expect_status:
            lines.append(f"status {status_of(stats)}, expected {expect_status}: {stats}")
    assert not lines, "\n".join(["compiled differs from eager:", *lines])
    return Report(expected, actual, stats)


def _kept_from_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    ids = kwargs.get("input_ids", tensors[0] if tensors else None)
    mask = kwargs.get("attention_mask", tensors[1] if len(tensors) > 1 else None)
    if ids is None or mask is None or ids.shape != mask.shape or mask.is_floating_point():
        return None
    return kept_positions(ids, mask)


def rewire(module: nn.Module, scale: float = 0.05, seed: int = 0) -> nn.Module:
    """Adds noise to every parameter and makes the module float64: a token that leaks anywhere then shows.

    Fresh modules start with zero biases and unit norms, which hide errors in what they multiply or add to.
    """
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module
