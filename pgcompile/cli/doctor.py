"""`pgcompile doctor`: what is installed, what can run here, and a self-test."""

from __future__ import annotations

import platform
import sys
import time
from collections import defaultdict

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import pgcompile

from ..bench.machine import installed_version
from ..calibration import calibration_file, device_name, read_speed
from ..engines import ENGINES
from ..engines.choose import choose
from ..options import Options

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "triton", "flash-attn", "numpy")


@click.command()
def doctor() -> None:
    """Print versions, devices and engines, and run a self-test (about ten seconds).

    Exits with 1 if the self-test fails.
    """
    console = Console(highlight=False)
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    table.add_row("pgcompile", pgcompile.__version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        table.add_row(name, installed_version(name) or "not installed")
    for device in _devices():
        table.add_row(str(device), device_name(device))
        same = defaultdict(list)  # dtypes that the same is said of
        for dtype in (torch.float32, torch.bfloat16):
            said = describe_engines(device, dtype), _describe_calibration(device, dtype)
            same[said].append(str(dtype).removeprefix("torch."))
        for (engines, calibration), dtypes in same.items():
            table.add_row(", ".join(dtypes), engines)
            table.add_row("", calibration)
    console.print(table)
    failed = False
    for inner in ("eager", "inductor"):
        started = time.perf_counter()
        problem = self_test(inner)
        failed |= problem is not None
        result = (
            "[green]packs, equal to eager[/green]" if problem is None else f"[red]failed[/red]: {problem}"
        )
        console.print(f"self-test, {inner}: {result} ({time.perf_counter() - started:.1f} s)")
    if failed:
        sys.exit(1)


class _Tiny(nn.Module):
    """A causal language model of one layer: ids [N, S] → logits [N, S, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.qkv, self.head = nn.Linear(32, 96), nn.Linear(32, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return self.head(x)


def self_test(inner: str, device: torch.device | None = None) -> str | None:
    """Train a tiny model on eight rows with one prompt, packed, compared with eager; what went wrong, or None."""
    device = device or _devices()[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Tiny().to(device)
        ids = torch.randint(64, (8, 40), device=device)
    ids[:, :32] = ids[0, :32].clone()
    before = pgcompile.stats()
    options = Options(inner=inner, strict=True, check=1, min_saving=0)  # whatever a calibration says
    try:
        torch.compile(model, backend=pgcompile.pgcompile, options=vars(options))(
            ids
        ).square().mean().backward()
    except Exception as error:  # what went wrong is the answer
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None if pgcompile.stats().packed > before.packed else "the batch wasn't packed"


def describe_engines(device: torch.device, dtype: torch.dtype) -> str:
    """What "auto" takes there, what else there is, and why not the others."""
    chosen, _ = choose("auto", device, dtype)
    reasons = {name: engine.why_not(device, dtype) for name, engine in ENGINES.items() if name != chosen}
    others = [f"also {name}" if why is None else f"not {name} ({why})" for name, why in reasons.items()]
    return f"engine {chosen}; {', '.join(others)}"


def _describe_calibration(device: torch.device, dtype: torch.dtype) -> str:
    """Whether the cost model knows the device, and from which file."""
    engine, _ = choose("auto", device, dtype)
    if read_speed(device, dtype, engine) is None:
        return "not calibrated: a batch is packed if that saves a tenth of the work (`pgcompile bench --calibrate`)"
    return f"calibrated: {calibration_file(device, dtype, engine)}"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
