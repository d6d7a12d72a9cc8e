"""Speed-up and memory over P/R, a line for each group size and a panel for each length of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .results import Record


def check_format(path: Path) -> None:
    """Before anything is measured.

    Raises:
        click.BadParameter: if matplotlib can't write such a file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in {*known, ""}:
        text = f"{path.name}: matplotlib writes {', '.join(sorted(known))}"
        raise click.BadParameter(text, param_hint="--plot")


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw what is made of groups with a prompt.

    Raises:
        click.ClickException: if there is nothing to draw.
    """
    drawn = sorted((r for r in records if is_drawn(r.case) and r.speedup(r.ours) is not None), key=_ratio)
    if not drawn:
        raise click.ClickException(
            "nothing to draw: no case with a prompt and answers of one length was measured"
        )
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    prompts = sorted({record.case["prompt"] for record in drawn})
    groups = sorted({record.case["group"] for record in drawn})
    figure, panels = plt.subplots(
        2, len(prompts), figsize=(1 + 3.6 * len(prompts), 6.4), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    colors = plt.get_cmap("viridis")
    for column, prompt in enumerate(prompts):
        speed, memory = panels[:, column]
        for i, group in enumerate(groups):
            line = [r for r in drawn if (r.case["prompt"], r.case["group"]) == (prompt, group)]
            style: dict[str, Any] = dict(color=colors(i / max(len(groups), 2)))
            ratio = list(map(_ratio, line))
            speed.plot(ratio, [r.speedup(r.ours) for r in line], "o-", label=f"G = {group}", **style)
            speed.plot(ratio, [r.ideal for r in line], "_--", linewidth=1, **style)
            memory.plot(ratio, [r.memory_ratio(r.ours) for r in line], "o-", clip_on=False, **style)
        speed.set(title=f"P = {prompt}", xscale="log", yscale="log")
        memory.set(xlabel="P / R", ylim=(0, None))
        ticks = sorted({r.case["prompt"] // r.case["answer"] for r in drawn})
        speed.set_xticks(ticks, ticks)
        speed.minorticks_off()
    heights = [0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16]
    panels[0, 0].set_yticks(heights, heights)
    panels[0, 0].set(ylabel="speed-up; dashes: ideal")
    panels[1, 0].set(ylabel="peak memory, share of dense")
    panels[0, 0].legend(frameon=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _ratio(record: Record) -> float:
    return record.case["prompt"] / record.case["answer"]


def is_drawn(case: Mapping[str, Any]) -> bool:
    """Does a case have a prompt and answers of one length?"""
    return bool(case["prompt"] and case["answer"]) and case["shortest"] is None and case["tree"] is None
