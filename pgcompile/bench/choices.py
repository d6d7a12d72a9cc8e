"""What `pgcompile bench` was asked for: cases, contestants and settings."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import click
import torch

from ..cli.run import parse_options
from .cases import GRIDS, Case, group_case, tree_case
from .contestants import CONTESTANTS
from .machine import describe
from .results import OURS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The model, the shape and the dtype that suit a device.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": dict(model="qwen3-0.6b", dtype="bf16", prompt=4096, answer=512),
    "cpu": dict(model="tiny-cpu", dtype="fp32", prompt=512, answer=64),
}


@dataclass
class Choices:
    """What is measured, by whom, and how.

    Args:
        names: of the contestants, in the order they are measured.
        settings: what a record must have been measured with to stand for one of the cases.
        options: of the backend.
    """

    cases: list[Case]
    names: list[str]
    settings: dict[str, Any]
    options: dict[str, Any]
    machine: dict[str, Any]


def read_choices(given: dict[str, Any]) -> Choices:
    """Fill in defaults, in `given` too, and refuse what doesn't fit together."""
    if given["device"] is None:
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    elif given["device"] == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("there is no CUDA device", param_hint="--device")
    defaults = DEFAULTS[given["device"]]
    cases = _cases(given, defaults)
    for name in ("model", "dtype"):
        given[name] = given[name] or defaults[name]
    options = parse_options(given["pairs"])
    names = _names(given["against"])
    settings = {
        name: given[name] for name in ("model", "layers", "dtype", "phase", "repeats", "min_run_time")
    }
    settings["options"] = sorted(given["pairs"])
    machine = describe(torch.device(given["device"]))
    return Choices(cases, names, settings, vars(options), machine)


def _cases(given: dict[str, Any], defaults: dict[str, Any]) -> list[Case]:
    shape = [name for name in ("prompt", "answer", "group", "batch", "tree") if given[name] is not None]
    if given["grid"] is not None:
        if shape:
            raise click.UsageError(f"--grid has shapes of its own; leave out --{shape[0]}")
        return GRIDS[given["grid"]]
    batch = given["batch"] or 1
    if given["tree"] is not None:
        if set(shape) - {"tree", "batch"}:
            raise click.UsageError("--tree replaces --prompt, --answer and --group")
        return [_tree(given["tree"], batch)]
    prompt = defaults["prompt"] if given["prompt"] is None else given["prompt"]
    case = group_case(prompt, given["answer"] or defaults["answer"], given["group"] or 8, batch)
    return [_with_answers(case, "--answer")]


def _tree(text: str, batch: int) -> Case:
    try:
        depth, branch, turn = text.split(",")
        fewest, _, most = turn.partition("-")
        sizes = int(depth), int(branch), int(fewest), int(most or fewest)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} isn't DEPTH,BRANCH,TURN, as in 4,3,200-800", param_hint="--tree"
        ) from None
    if min(sizes) < 1 or sizes[2] > sizes[3]:
        raise click.BadParameter(f"{text!r}: numbers are at least 1, ranges ascend", param_hint="--tree")
    return _with_answers(tree_case(*sizes, batch), "--tree")


def _with_answers(case: Case, option: str) -> Case:
    """A row's first token is predicted by nothing."""
    if case.fewest_tokens < 2:
        raise click.BadParameter("rows need two tokens, one to predict the other", param_hint=option)
    return case


def _names(against: str) -> list[str]:
    """Contestants in the order they are measured; pgcompile is always one."""
    names = [name.strip() for name in against.split(",") if name.strip()]
    for name in names:
        if name not in CONTESTANTS:
            near = difflib.get_close_matches(name, CONTESTANTS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            text = f"{name!r} is none of {', '.join(CONTESTANTS)}{hint}"
            raise click.BadParameter(text, param_hint="--against")
    return [name for name in CONTESTANTS if name in names or name == OURS]
