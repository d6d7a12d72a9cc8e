"""The machine and what is installed on it: what figures depend on besides the code."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ..calibration import processor

# bfloat16 without sparsity, operations per second, from NVIDIA's data sheets; a name that contains another comes first.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
PACKAGES = ("torch", "transformers", "triton", "trl", "prefix_grouper")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads, Python and versions; of a GPU, whose kernels dense attention runs."""
    found = {name: installed_version(name) for name in PACKAGES}
    versions = {"pgcompile": _own_version()} | {name: v for name, v in found.items() if v is not None}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    machine = {
        "device": name, "processor": processor(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "versions": versions,
    }  # fmt: skip
    return machine | ({"sdpa": _dense_attention(device)} if device.type == "cuda" else {})


def _dense_attention(device: torch.device) -> str:
    """What scaled_dot_product_attention takes for usual heads in bfloat16; kernels differ much in speed."""
    q = torch.empty(1, 8, 1024, 128, dtype=torch.bfloat16, device=device, requires_grad=True)
    k = q[:, :4]
    return SDPBackend(torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=True)).name


def peak_rate(device_name: str, dtype: str) -> float | None:
    """Operations per second that the device could do, where that is known."""
    if dtype not in ("bf16", "fp16"):
        return None
    return next((rate for name, rate in PEAKS.items() if name in device_name), None)


def installed_version(package: str) -> str | None:
    """None if it isn't installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    """With a digest of compiler and runtime: figures of another state of the sources aren't figures of this one."""
    from .. import __version__, passes

    digest = hashlib.sha256()
    folders = Path(__file__).parent.parent, Path(passes.__path__[0])
    for folder in folders:
        files = (Path(at, n) for at, _, names in os.walk(folder, followlinks=True) for n in names)
        for file in sorted(f for f in files if f.suffix == ".py"):
            place = file.relative_to(folder)
            if place.parts[0] not in ("bench", "cli", "coverage", "passes"):  # the last is the other folder
                digest.update(f"{place}\n".encode() + file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:8]}"


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Tell glibc to keep large blocks instead of handing them back to the kernel.

    Else a dense step on a CPU, whose tensors are large, spends up to a third of its time on page faults, which would
    count as ours.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Within it, host memory that isn't there is refused, and is a contestant's failure.

    Else Linux promises it, and kills the process when it is used.
    """
    import resource

    before, hardest = resource.getrlimit(resource.RLIMIT_DATA)
    ours, free = (
        _kibibytes(*where) for where in (("/proc/self/status", "VmData"), ("/proc/meminfo", "MemAvailable"))
    )
    limits = [limit for limit in (before, hardest) if limit != resource.RLIM_INFINITY]
    if ours is not None and free is not None:
        limits.append(1024 * (ours + free * 19 // 20))  # the rest is for others
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits, default=before), hardest))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hardest))


def _kibibytes(file: str, name: str) -> int | None:
    """A line "name:  123 kB" of one of Linux's files; None where there is none."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def peak_memory(device: torch.device, step: Callable[[], object]) -> int:
    """Bytes that a step needs above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # else it prints a line when it starts and one when it stops
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    results = profile.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    level = highest = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        level += change
        highest = max(highest, level)
    return highest


def free_memory() -> None:
    """Give back what a model that is gone, or an exception's frames, held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device, or of the host, whose allocator raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
