"""The triton engine without a GPU: its tests, in a process of their own.

Triton interprets kernels if TRITON_INTERPRET is set before it is imported, and inductor imports it, too: here, nothing
else must run with that.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


# Of the contract's larger test, one of two trees: interpreted, it takes seconds per case.
@pytest.mark.parametrize(
    "file, chosen, least", [("test_ops.py", "triton and not triton-1-", 50), ("triton_checks.py", "", 25)]
)
def test_in_tritons_interpreter(file, chosen, least):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        TESTS / file,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed and int(passed[1]) >= least and "skipped" not in done.stdout, done.stdout
