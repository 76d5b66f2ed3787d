"""Options made from ``config.py``, grouped help, paths that shells complete, and the checks of the command line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from loracle.cli import terminal
from loracle.config import DataConfig, RunConfig
from loracle.errors import UserError

SHORT = {"out": "-o"}
GENERAL = "General"
RUN_FILE = "run.toml"  # in every run folder; runs/folder.py takes too long to import for a completion


class Option(click.Option):
    """An option with its heading in ``--help``; the short help leaves out those that are not ``common``."""

    def __init__(self, *args: Any, group: str = "Output", common: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group, self.common = group, common


class Command(click.Command):
    """A command with options under headings, ``--help-all`` where the short help is partial, and ``--verbose``."""

    def __init__(self, *args: Any, can_be_quiet: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        flags = [("-v", "--verbose", "show tracebacks, and messages and warnings of libraries")]
        if can_be_quiet:
            flags.insert(0, ("-q", "--quiet", "print results and errors only"))
        for short, flag, text in flags:
            self.params.append(
                Option(
                    [short, flag],
                    is_flag=True,
                    expose_value=False,
                    callback=terminal.remember,
                    help=text,
                    group=GENERAL,
                )
            )
        if self._rare():
            self.params.append(
                Option(
                    ["--help-all"], is_flag=True, expose_value=False, is_eager=True, callback=_print_full_help,
                    help="show every option", group=GENERAL,
                )
            )  # fmt: skip

    def _rare(self) -> list[Option]:
        return [p for p in self.params if isinstance(p, Option) and not p.common]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record and (ctx.meta.get("full_help") or getattr(param, "common", True)):
                groups.setdefault(getattr(param, "group", GENERAL), []).append(record)
        groups[GENERAL] = groups.pop(GENERAL)
        for name, records in groups.items():
            terminal.write_section(formatter, name, records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if (rare := self._rare()) and not ctx.meta.get("full_help"):
            formatter.write_paragraph()
            formatter.write_text(f"{len(rare)} more options: {ctx.command_path} --help-all")


def _print_full_help(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta["full_help"] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def command(*, can_be_quiet: bool = True) -> Callable[[Callable], Command]:
    """Decorator of a command function."""
    return click.command(cls=Command, can_be_quiet=can_be_quiet)


def option(*names: str, **kwargs: Any) -> Callable[[Callable], Callable]:
    """An option that is no setting of ``config.py``."""
    return click.option(*names, cls=Option, **kwargs)


def setting_options(
    *configs: type, only: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> Callable[[Callable], Callable]:
    """One option for each setting. The command gets None for those that are not given."""

    def decorate(function: Callable) -> Callable:
        for config in reversed(configs):
            hints = _type_hints(config)
            for f in reversed(dataclasses.fields(config)):
                if f.metadata and f.name not in ("data", *without) and (not only or f.name in only):
                    function = _setting_option(f, hints[f.name], config)(function)
        return function

    return decorate


_type_hints = functools.cache(typing.get_type_hints)  # five commands share most settings


def _setting_option(f: dataclasses.Field, hint: Any, config: Any) -> Callable[[Callable], Callable]:
    value_types = [t for t in typing.get_args(hint) if t is not types.NoneType] or [hint]
    metadata, is_flag = f.metadata, value_types[0] is bool
    flag, text = "--" + f.name.replace("_", "-"), metadata["help"]
    unit, choices = metadata["unit"], metadata["choices"]
    if is_flag:
        flag, text = f"{flag}/--no-{flag[2:]}", f"{text}  [default: yes]" if f.default else text
    elif f.default is not None:
        text += f"  [default: {f.default}]"
    value_type = click.Choice(choices) if choices else FILE if metadata["path"] else value_types[0]
    return option(
        *([SHORT[f.name]] if f.name in SHORT else []), flag, f.name,
        type=None if is_flag else number_or_auto if value_types == [int, str] else value_type, default=None, help=text,
        metavar=unit.upper() if unit else None,
        group=metadata["group"] or config.GROUP, common=config.COMMON if metadata["common"] is None else metadata["common"],
    )  # fmt: skip


def number_or_auto(text: str) -> int | str:
    """The value of a setting that is a number or ``auto``. The config refuses other words."""
    return int(text) if text.isdecimal() else text


def given(values: dict[str, Any], config: type | None = None) -> dict[str, Any]:
    """Options that the user gave; with ``config``, takes the settings of this class out of ``values``."""
    if config is not None:
        values = {f.name: values.pop(f.name) for f in dataclasses.fields(config) if f.name in values}
    return {name: value for name, value in values.items() if value is not None}


def data_config(**values: Any) -> DataConfig:
    """A config from options, where None means not given."""
    return DataConfig(**given(values))


def run_settings(
    data: str | None, recipe: Path | None, values: dict[str, Any], name: str
) -> tuple[RunConfig, dict[str, dict[str, Any]]]:
    """Settings of a run: flags before the recipe before defaults; and the recipe's sections of other commands.

    Raises:
        UserError: no data, or a recipe or setting that cannot be used.
    """
    from loracle.runs.recipes import read_recipe

    flat, other_sections = read_recipe(recipe) if recipe else ({}, {})
    flat |= given({"data": data, **values})
    if not flat.get("data"):
        raise UserError(f"{name} needs data.", f"Give a file: loracle {name} reviews.csv")
    return RunConfig.from_flat(flat), other_sections


class RunFolder(click.Path):
    """Path of a run folder: completed by shells, and suggested for one that does not exist."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        folder = Path(value)
        if not folder.exists():
            similar = _similar_run(folder)
            raise UserError(f"No run folder {folder}.", f"Did you mean {similar}?" if similar else None)
        return super().convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        parents = {os.path.dirname(incomplete), "" if os.path.dirname(incomplete) else "runs"}
        paths = sorted({path for parent in parents for path in _runs_in(parent) if path.startswith(incomplete)})
        return [CompletionItem(path) for path in paths] or [CompletionItem(incomplete, type="dir")]


class RecipePath(click.Path):
    """Name of a packaged recipe, or path of a recipe."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, readable=False)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from loracle.runs.recipes import recipe_names

        names = [CompletionItem(name) for name in recipe_names() if name.startswith(incomplete)]
        return names or super().shell_complete(ctx, param, incomplete)


def _similar_run(folder: Path) -> str | None:
    """The run folder beside ``folder`` or in ``runs/`` with the most similar name."""
    paths = [path for parent in dict.fromkeys((str(folder.parent), "runs")) for path in _runs_in(parent)]
    names = {Path(path).name: os.path.normpath(path) for path in reversed(paths)}
    close = difflib.get_close_matches(folder.name, names, n=1)
    return names[close[0]] if close else None


def _runs_in(parent: str) -> list[str]:
    try:
        return [
            path
            for name in os.listdir(parent or ".")
            if os.path.isfile(os.path.join(path := os.path.join(parent, name), RUN_FILE))
        ]
    except OSError:
        return []


FILE = click.Path(readable=False)  # errors of reading are worded where it is read
RUN_ARGUMENT = click.argument("run", type=RunFolder())
DATA_ARGUMENT = click.argument("data", type=FILE)
OPTIONAL_DATA = click.argument("data", required=False, type=FILE)
RECIPE = option("--recipe", type=RecipePath(), help="settings: a recipe by name, a TOML file or a run.toml; flags win")
BASE = option("--base", type=FILE, help="where the base model is now, if it moved", group="Model")
DEVICE = option("--device", default="auto", help="cpu, cuda, mps or auto  [default: auto]", group="Model")
JSON = option("--json", "as_json", is_flag=True, help="print JSON")
PLOT = option("--plot", "picture", type=click.Path(path_type=Path), help="also draw it: a .png, .svg or .pdf file")


def out_option(text: str, **kwargs: Any) -> Callable[[Callable], Callable]:
    """``--out``, with the help of this command."""
    return option("-o", "--out", type=click.Path(path_type=Path, readable=False), help=text, **kwargs)
