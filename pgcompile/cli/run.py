"""`pgcompile run`: somebody's training script, with every language model in it through pgcompile.

The script runs as `python script.py` would run it: it is `__main__`, with its own `sys.argv` and `sys.path[0]`, and
what it raises, returns to the shell or does with signals is its own. Three things are switched on: `everywhere.py`; and
as soon as the script imports them, micro-batches that keep their groups in TRL's trainers, and DoRA in one graph in
PEFT.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import functools
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

import click

from ..files import write_atomically
from ..integrations.peft import trace_dora
from ..options import Options
from .everywhere import Everywhere, switch_on

TRL_TRAINERS = {"trl.trainer.grpo_trainer": "GRPOTrainer", "trl.trainer.rloo_trainer": "RLOOTrainer"}


@dataclass
class Script:
    """What was asked for: a path or a module, and its arguments."""

    name: str
    arguments: list[str]
    is_module: bool = False
    only: str = "*"
    options: Options = field(default_factory=Options)
    report: Path | None = None

    def run(self, main: types.ModuleType, source: bytes | types.CodeType) -> None:
        """Run what `load` gave; whatever it raises comes through."""
        sys.modules["__main__"] = main
        sys.argv = [str(main.__file__) if self.is_module else self.name, *self.arguments]
        sys.excepthook = _without_own_frames(sys.excepthook)
        everywhere = Everywhere(self.options, self.only)
        switch_on(everywhere)
        for module, name in TRL_TRAINERS.items():
            after_import(module, functools.partial(_keep_groups, name))
        after_import("peft.tuners.lora.dora", lambda _: trace_dora())
        atexit.register(everywhere.warn_if_unused)
        if self.report is not None:
            atexit.register(write_report, _of_this_rank(self.report), everywhere)
        # without this file's own `from __future__` imports
        code = (
            source
            if isinstance(source, types.CodeType)
            else compile(source, str(main.__file__), "exec", dont_inherit=True)
        )
        try:
            exec(code, vars(main))
        except BaseException as error:
            if not (isinstance(error, SystemExit) and error.code in (None, 0)):
                atexit.unregister(everywhere.warn_if_unused)  # it has another reason to look for
            raise

    def load(self) -> tuple[types.ModuleType, bytes | types.CodeType]:
        """A module `__main__`, empty, and what is to run in it.

        Raises:
            click.ClickException: there is no such file or module.
        """
        if not sys.flags.safe_path:
            sys.path[0] = os.getcwd() if self.is_module else str(Path(self.name).resolve().parent)
        main = types.ModuleType("__main__")
        vars(main).update(__builtins__=builtins, __annotations__={}, __cached__=None)
        if self.is_module:
            spec = _find_module(self.name)
            loader: Any = None if spec is None else spec.loader
            if spec is None or spec.origin is None or not hasattr(loader, "get_code"):
                raise click.ClickException(f"there is no module {self.name} that can be run")
            vars(main).update(__file__=spec.origin, __spec__=spec, __package__=spec.parent, __loader__=loader)
            return main, loader.get_code(spec.name)
        try:
            source = Path(self.name).read_bytes()
        except OSError as error:
            raise click.UsageError(f"can't open {self.name}: {error.strerror}") from None
        path = os.path.abspath(self.name)
        vars(main).update(__file__=path, __loader__=SourceFileLoader("__main__", path))
        return main, source


def _find_module(name: str) -> ModuleSpec | None:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        return None
    return spec


def parse_options(given: Iterable[str]) -> Options:
    """`key=value` pairs; values are Python literals (true, false and none may be lower case), or words.

    Raises:
        click.BadParameter: not of that form, or not an option.
    """
    found = {}
    for pair in given:
        key, equals, text = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} isn't key=value", param_hint="--options")
        try:
            found[key.strip()] = ast.literal_eval(text.title() if text in ("true", "false", "none") else text)
        except (ValueError, SyntaxError):
            found[key.strip()] = text
    try:
        return Options.of(found)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--options") from None


def write_report(path: Path, everywhere: Everywhere) -> None:
    """Write the report as JSON, atomically; a script that ran isn't failed by it."""
    try:
        write_atomically(path, json.dumps(everywhere.report(), indent=2) + "\n")
    except OSError as error:
        print(f"pgcompile: the report can't be written: {error}", file=sys.stderr)


def _of_this_rank(path: Path) -> Path:
    """Under torchrun each process writes a file of its own; the first one that with the given name."""
    rank = os.environ.get("RANK", "0")
    return path if rank == "0" else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def _without_own_frames(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Tracebacks begin with the script, as they do without `pgcompile run`."""

    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> Any:
        while trace is not None and trace.tb_frame.f_code.co_filename != __file__:
            trace = trace.tb_next
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        if trace is not None or isinstance(error, SyntaxError):  # the latter: of the script itself
            error.__traceback__ = trace
        return hook(kind, error, error.__traceback__)

    return excepthook


def _keep_groups(name: str, module: types.ModuleType) -> None:
    from ..integrations.trl import regrouping

    trainer_class = getattr(module, name)
    trainer_class._prepare_inputs = regrouping(trainer_class._prepare_inputs)


def after_import(name: str, act: Callable[[types.ModuleType], None]) -> None:
    """Call `act` with the module as soon as it has been imported."""
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, act))


class _AfterImport(MetaPathFinder):
    """Finds one module, as the other finders do, and looks at it when it has been executed."""

    def __init__(self, name: str, act: Callable[[types.ModuleType], None]) -> None:
        self.name, self.act = name, act

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader, self)
        return spec


class _Watched(Loader):
    """A loader that tells `finder` after it has executed its module."""

    def __init__(self, loader: Any, finder: _AfterImport) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader  # type: ignore[union-attr]
        sys.meta_path.remove(self.finder)
        self.loader.exec_module(module)
        self.finder.act(module)
