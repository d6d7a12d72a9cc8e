"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file at once, or leave it as it was."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)
