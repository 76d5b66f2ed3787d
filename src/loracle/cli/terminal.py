"""What the terminal shows: progress, notes, results and errors, with colour on a terminal only."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import click

from loracle.errors import Interrupted, UserError

PEER_WAIT = 5.0  # seconds; a launcher notices within 0.1 s that another process has ended
LIBRARIES = (
    "accelerate", "bitsandbytes", "filelock", "fsspec", "httpx", "huggingface_hub", "matplotlib", "mlflow", "modelscope",
    "numpy", "openvino", "peft", "polars", "ray", "safetensors", "sklearn", "tensorboard", "tokenizers", "torch",
    "transformers", "urllib3", "wandb",
)  # fmt: skip


def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Callback of ``--quiet`` and ``--verbose``."""
    ctx.meta[str(param.name)] = value


def is_set(flag: str) -> bool:
    """Whether ``quiet`` or ``verbose`` is on."""
    ctx = click.get_current_context(silent=True)
    return bool(ctx and ctx.meta.get(flag))


def color_setting() -> bool | None:
    """False where ``NO_COLOR`` is set (https://no-color.org), else None: colour on a terminal only."""
    return False if os.environ.get("NO_COLOR") else None


def log(line: str) -> None:
    """Print a line of progress."""
    if not is_set("quiet"):
        click.echo(_colored(line))


def note(line: str) -> None:
    """Print a line of progress beside results: on standard error."""
    if not is_set("quiet"):
        click.echo(_colored(line), err=True)


def print_folder(folder: Path) -> None:
    """Print where the result is, for ``--quiet``; the log says it otherwise."""
    if is_set("quiet") and not process_number():
        click.echo(folder)


def _colored(line: str) -> str:
    start, _, rest = line.partition("note:")
    return line if start.strip() or not rest else f"{start}{click.style('note:', fg='yellow')}{rest}"


def write_section(formatter: click.HelpFormatter, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A heading of ``--help`` and its table."""
    with formatter.section(click.style(title, bold=True)):
        formatter.write_dl(rows)


def show_error(error: UserError) -> None:
    """Print an error and its hint on lines of their own; with ``--verbose``, the traceback before."""
    if is_set("verbose"):
        _print_from_process("".join(traceback.format_exception(error)))
    label = click.style("Error:", fg="red", bold=True)
    _print_from_process("\n".join(filter(None, (f"{label} {error.message}", error.hint))))


def show_interrupt(error: Interrupted) -> None:
    """Print how to continue."""
    _print_from_process(f"\n{error}")


def show_bug() -> None:
    """Print where to report a bug, before its traceback."""
    wait_for_peers()
    click.echo("This is a bug in loracle. Report it with the traceback and the output of `loracle doctor`.", err=True)


def _print_from_process(text: str) -> None:
    """Print to standard error. The main process prints first; the launcher then ends those with the same error."""
    wait_for_peers(main_waits=False)
    if number := process_number():
        text = f"process {number}: {text.strip()}"
    click.echo(text, err=True)


def wait_for_peers(*, main_waits: bool = True) -> None:
    """Wait until the launcher has ended this process, if another one has ended."""
    if process_count() > 1 and (main_waits or process_number()):
        time.sleep(PEER_WAIT)


def process_number() -> int:
    """Number of this process among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK") or 0)


def process_count() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def silence_libraries() -> None:
    """Keep progress bars, notices and warnings of libraries out of the output. Call it before they are imported.

    With ``--verbose`` they stay. On a terminal the bar of a download stays.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if is_set("verbose"):
        return
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if is_set("quiet") or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
