"""The command `pgcompile`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .. import __version__
from ..bench.command import bench
from ..coverage.command import coverage
from .doctor import doctor
from .run import Script, parse_options


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pgcompile")
def commands() -> None:
    """Train on batches with shared prefixes, each distinct token computed once."""


@commands.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
)
@click.option("--only", metavar="PATTERN", default="*", help="Only models of these classes, * is a wildcard.")
@click.option(
    "--options",
    "pairs",
    metavar="KEY=VALUE",
    multiple=True,
    help="An option of the backend, see pgcompile.Options; may be repeated.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="At exit, write here what was packed, as JSON.",
)
@click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module, as in python -m.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    only: str,
    pairs: tuple[str, ...],
    report: Path | None,
    is_module: bool,
    script: str,
    arguments: tuple[str, ...],
) -> Script:
    """Run a training SCRIPT with its own ARGUMENTS, every language model in it through pgcompile.

    Under torchrun or accelerate: torchrun -m pgcompile run train.py ...
    """
    if report is not None and not report.absolute().parent.is_dir():
        raise click.UsageError(f"there is no folder {report.absolute().parent}")
    if script.startswith("-"):
        raise click.NoSuchOption(script)
    report = None if report is None else report.absolute()  # the script may go elsewhere
    return Script(script, list(arguments), is_module, only, parse_options(pairs), report)


commands.add_command(bench)
commands.add_command(coverage)
commands.add_command(doctor)


def main() -> None:
    """Parse the command line; a script runs outside of click, which would catch what it raises."""
    try:
        asked = commands.main(prog_name="pgcompile", standalone_mode=False)
        loaded = asked.load() if isinstance(asked, Script) else None
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("Aborted!", err=True)
        sys.exit(1)
    if loaded is not None:
        asked.run(*loaded)
    elif isinstance(asked, int):  # as `--help` and `ctx.exit` leave it
        sys.exit(asked)
