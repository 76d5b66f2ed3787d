"""Write ``docs/commands.md`` from the command line itself.

python docs/make_commands.py            # write the page
python docs/make_commands.py --check    # exit with 1 if the page is out of date
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from loracle.cli import main as cli

PAGE = Path(__file__).parent / "commands.md"
EVERYWHERE = {"--quiet", "--verbose", "--help-all"}  # flags of every command, described once
INTRO = """# Command reference

`docs/make_commands.py` writes this page from the commands themselves. Brackets at the end of a line hold the default.

Every command exits with 0 on success, 2 on an error that you can fix, and 130 after Ctrl-C. Errors go to standard
error. `loracle COMMAND --help` shows the common flags, `--help-all` every flag.

`--quiet` prints results and errors only. `--verbose` also shows tracebacks and the libraries' messages. Colors appear
on a terminal only; `NO_COLOR` switches them off.

Shells complete commands, files and run folders. For bash (zsh and fish work the same way):

```sh
loracle completion bash >> ~/.bashrc
```
"""


def page() -> str:
    """The whole page."""
    context = click.Context(cli, info_name="loracle")
    names = [name for name in cli.list_commands(context) if not cli.commands[name].hidden]
    summary = [f"- [{name}](#{name}): {first_line(cli.commands[name])}" for name in names]
    parts = [INTRO.rstrip(), "\n".join(summary)]
    for name in names:
        parts += list(section(name, cli.commands[name]))
    return "\n\n".join(parts) + "\n"


def section(name: str, command: click.Command) -> Iterator[str]:
    """Heading, usage, help and flags of one command."""
    context = click.Context(command, info_name=f"loracle {name}")
    yield f"## {name}"
    yield f"```text\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```"
    yield inspect.cleandoc(command.help or "").replace("\b\n", "")
    groups: dict[str, list[str]] = {}
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden and option.opts[-1] not in EVERYWHERE:
            groups.setdefault(getattr(option, "group", "Flags"), []).append(flag(option, context))
    for title, flags in groups.items():
        yield f"**{title}**"
        yield "\n".join(flags)


def flag(option: click.Option, context: click.Context) -> str:
    """One bullet: the spellings, the kind of value, and the help."""
    names = ", ".join(f"`{spelling}`" for spelling in (*option.opts, *option.secondary_opts))
    value = "" if option.is_flag or option.count else f" `{option.make_metavar(context)}`"
    return f"- {names}{value}: {option.help}" if option.help else f"- {names}{value}"


def first_line(command: click.Command) -> str:
    """The summary of a command."""
    return inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")


def main() -> int:
    """Write the page, or compare it with the file."""
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
            print("docs/commands.md is out of date. Run: python docs/make_commands.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
