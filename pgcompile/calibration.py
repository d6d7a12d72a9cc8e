"""Where a device's calibration lies: one JSON file for each device and dtype, by `pgcompile bench --calibrate`.

In the folder `$PGCOMPILE_CACHE_DIR`, by default `$XDG_CACHE_HOME/pgcompile` or `~/.cache/pgcompile`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from .cost import Speed
from .files import write_atomically
from .report import log


def calibration_file(device: torch.device, dtype: torch.dtype, engine: str) -> Path:
    """Where the calibration of a device in a dtype, with an engine, is or would be; other threads of a CPU are another
    device.

    Raises:
        RuntimeError: if there is no home directory, and no environment variable that names a folder.
    """
    folder = os.environ.get("PGCOMPILE_CACHE_DIR")
    if not folder:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(caches) / "pgcompile")
    words = f"{device_name(device)} {str(dtype).removeprefix('torch.')} {engine}"
    return Path(folder) / f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}.json"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()} {torch.get_num_threads()} threads"


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_speed(file: Path, speed: Speed, about: dict[str, Any]) -> None:
    """Write a calibration, with a few words `about` it for who reads the file; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({**about, "seconds": asdict(speed)}, indent=1) + "\n")


def read_speed(device: torch.device, dtype: torch.dtype, engine: str) -> Speed | None:
    """The device's calibration, or None; a file that isn't one is left alone, with a warning."""
    if device.type not in ("cpu", "cuda"):
        return None
    try:
        file = calibration_file(device, dtype, engine)
        content = file.read_bytes()
    except (OSError, RuntimeError):
        return None
    try:
        found = json.loads(content)["seconds"]
        speed = Speed(**{field.name: float(found[field.name]) for field in fields(Speed)})
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        speed = None
    if (
        speed is None
        or speed.linear <= 0
        or not all(math.isfinite(x) and x >= 0 for x in asdict(speed).values())
    ):
        log.warning("pgcompile: %s is no calibration; `pgcompile bench --calibrate` writes a new one", file)
        return None
    return speed
