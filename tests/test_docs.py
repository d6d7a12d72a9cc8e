"""The documentation does what it says: its examples run, its messages are the printed ones, its names exist.

python tests/test_docs.py writes the messages into docs/fallbacks.md as they are printed now
"""

import contextlib
import dataclasses
import inspect
import io
import itertools
import linecache
import os
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

import pgcompile
from pgcompile.options import CHOICES
from pgcompile.passes import KINDS, PASSES
from pgcompile.report import AttentionReport, BatchReport, GraphReport

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FALLBACKS = ROOT / "docs" / "fallbacks.md"
API = ROOT / "docs" / "api.md"
BLOCK = re.compile(r"^```(\w+)[ ]?(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTIONS = {f.name for f in dataclasses.fields(pgcompile.Options)}

_number = itertools.count()


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """`(label, text)` of a page's code blocks."""
    return [(label, text) for found, label, text in BLOCK.findall(page.read_text()) if found == language]


def run_example(text: str, name: str = "example.py") -> str:
    """Run a program as if it were the file `name`; what it printed."""
    module = types.ModuleType(f"docs_example_{next(_number)}")  # Dynamo keeps globals by module name
    sys.modules[module.__name__] = module
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    printed = io.StringIO()
    try:
        torch._dynamo.reset()
        # tables are as wide as the terminal
        with contextlib.redirect_stdout(printed), mock.patch.dict(os.environ, COLUMNS="110"):
            exec(compile(text, name, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return printed.getvalue()


def run_fallback(kind: str) -> str:
    examples = dict(blocks(FALLBACKS, "python"))
    return run_example(f"{examples['setup']}\n\n{examples[kind]}")


def message(printed: str, kind: str) -> str:
    """The lines about a kind: its own, and those that belong to it (`at`, `hint`, and wrapped ones)."""
    lines = [line.rstrip() for line in printed.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith(f"  {kind}: "))
    end = start + 1
    while (
        end < len(lines)
        and re.match(r"    (at|hint)|[^\s\u2500-\u257f]", lines[end])
        and lines[end] != "batches"
    ):
        end += 1
    return "\n".join(line.removeprefix("  ") for line in lines[start:end])


def sections(page: Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# -- docs/fallbacks.md -----------------------------------------------------------------------------------------------


def test_a_section_for_each_kind_in_their_order():
    assert [title for title in sections(FALLBACKS) if title != "The examples"] == list(KINDS)


def test_an_example_for_each_kind_in_its_section():
    for kind in KINDS:
        assert f"```python {kind}\n" in sections(FALLBACKS)[kind]
        assert "**What to do.**" in sections(FALLBACKS)[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_example_prints_what_the_page_says(kind, request):
    found = message(run_fallback(kind), kind)
    assert f"```text\n{found}\n```" in sections(FALLBACKS)[kind]


def write_messages() -> None:
    """Put each example's message behind it."""
    page = FALLBACKS.read_text()
    for kind in KINDS:
        try:
            text = message(run_fallback(kind), kind)
        except StopIteration:
            print(f"{kind}: the example gives another kind")
            continue
        pattern = re.compile(
            rf"(^```python {kind}\n.*?^```\n)(\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL
        )
        page = pattern.sub(lambda found, text=text: f"{found[1]}\n```text\n{text}\n```\n", page, count=1)
    FALLBACKS.write_text(page)


# -- all pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [README, API], ids=lambda p: p.name)
def test_python_blocks_run(page):
    """One program per page, in order, prints what the page's `text` blocks say. Blocks labelled `sketch` only parse."""
    for _, text in blocks(page, "python"):
        compile(text, page.name, "exec")
    program = "\n\n".join(text for label, text in blocks(page, "python") if label != "sketch")
    if "transformers" in program:
        pytest.importorskip("transformers")
    # inductor takes a minute
    program = program.replace("@pgcompile.optimize\n", '@pgcompile.optimize(inner="aot_eager")\n')
    printed = "\n".join(line.rstrip() for line in run_example(program, page.name).splitlines())
    for _, text in blocks(page, "text"):
        assert text in printed + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_exist(page):
    text = page.read_text()
    for name in re.findall(r"pgcompile\.([A-Za-z_]+)", text):
        assert hasattr(pgcompile, name) or find_spec(f"pgcompile.{name}"), f"pgcompile.{name}"
    for name in re.findall(r"\b([a-z]+_pass)\b", text):
        assert name in {p.__name__ for p in PASSES}, name
    for keys in re.findall(r"options=\{(.*?)\}", text):
        assert set(re.findall(r'"(\w+)":', keys)) <= OPTIONS, keys
    for option, value in re.findall(r'`(\w+)="?(\w+)"?`', text):
        if option in CHOICES:
            assert value in CHOICES[option], f"{option}={value}"
    for field in re.findall(r"stats\(\)\.(\w+)", text):
        assert field in {f.name for f in dataclasses.fields(pgcompile.Stats)}, field


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    """Files exist, and so do the headings that links name."""
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)|src=\"([^\"]+)\"", page.read_text()):
        target = target[0] or target[1]
        if target and "://" not in target:
            assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]*)\)", page.read_text()):
        other = page.parent / target if target else page
        headings = re.findall(r"^#+ (.+)$", other.read_text(), flags=re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
        assert anchor in slugs, f"{other.name}#{anchor}"


def test_api_has_every_public_name_field_and_default():
    titles = "\n".join(sections(API))
    for name in pgcompile.__all__:
        assert re.search(rf"\b{name}\b", titles), name
    text = API.read_text()
    for cls in (
        pgcompile.Options,
        pgcompile.Stats,
        pgcompile.Explanation,
        GraphReport,
        AttentionReport,
        BatchReport,
    ):
        for field in dataclasses.fields(cls):
            assert f"`{field.name}`" in text, f"{cls.__name__}.{field.name}"
    for field in dataclasses.fields(pgcompile.Options):
        default = f'"{field.default}"' if isinstance(field.default, str) else repr(field.default)
        assert re.search(rf"^\| `{field.name}` \| `{re.escape(default)}` \|", text, re.MULTILINE), field.name
    for name in ("explain", "optimize", "pgcompile"):
        parameters = inspect.signature(getattr(pgcompile, name)).parameters
        assert all(p in sections(API)[f"`{name}`"] for p in parameters), name


if __name__ == "__main__":
    write_messages()
