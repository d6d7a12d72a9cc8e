"""The command `pgcompile`."""

from __future__ import annotations

import click

from . import __version__
from .coverage.command import coverage


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pgcompile")
def main() -> None:
    """Train on batches with shared prefixes, each distinct token computed once."""


main.add_command(coverage)
