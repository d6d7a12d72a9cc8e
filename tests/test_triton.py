"""The triton engine without a GPU: its tests, in a process of their own, and that its kernels compile.

Triton interprets kernels if TRITON_INTERPRET is set before it is imported, and inductor imports it, too: here, nothing
else must run with that.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pgcompile.engines.triton import TILINGS

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


TENSORS = ["q", "k", "v", "out", "grad_out", "dq", "dk", "dv"]
TYPES = {
    **dict.fromkeys(["lse", "delta"], "*fp32"),
    **dict.fromkeys(["subtree_end", "depth", "same_value"], "*i64"),
    **dict.fromkeys(["rows", "tiles"], "*i32"),
    "key_valid": "*i1",
    **dict.fromkeys(["scale", "softcap"], "fp32"),
}


USUAL = 128, 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
@pytest.mark.parametrize(
    "size, itemsize", [pytest.param(*key, marks=[] if key == USUAL else pytest.mark.slow) for key in TILINGS]
)
def test_kernels_compile_for_hopper(size, itemsize, kernel, masked):
    """Compiled code has types where interpreted code has Python's values, and a limit on shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pgcompile.engines import triton_kernels

    tiling = getattr(TILINGS[size, itemsize], kernel)
    constants = dict(HEADS=32, GROUP=4, D=size, E=size - 32, PADDED_D=size, PADDED_E=size)
    constants.update(NUM_SAME=2 if masked else 0, BLOCK_Q=tiling.block_q, BLOCK_K=tiling.block_k)
    if not masked:
        constants.update(key_valid=None, same_value=None, window=None, softcap=None)
    function = getattr(triton_kernels, f"{kernel}_kernel")
    types = TYPES | dict.fromkeys(TENSORS, "*bf16" if itemsize == 2 else "*fp32")
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names
    }
    source = ASTSource(function, signature, {(function.arg_names.index(n),): c for n, c in constants.items()})
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 227 * 1024  # what a block may have on an H100
    assert "wgmma" in compiled.asm["ptx"] or (size, itemsize) != USUAL
