"""Commands that pass runs on, serve them or maintain this machine: export, push, pull, serve, cache, completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from loracle.cli import terminal
from loracle.cli.options import (
    BASE,
    DEVICE,
    RUN_ARGUMENT,
    RunFolder,
    command,
    given,
    option,
    out_option,
    setting_options,
)
from loracle.config import ServeConfig
from loracle.errors import UserError
from loracle.runs.export import EXPORTERS


@command()
@RUN_ARGUMENT
@option(
    "--to",
    type=click.Choice(tuple(EXPORTERS)),
    required=True,
    help="; ".join(f"{name}: {exporter.help}" for name, exporter in EXPORTERS.items()),
)
@out_option("folder  [default: RUN-FORMAT]")
@BASE
def export(run: Path, to: str, out: Path | None, base: str | None) -> None:
    """Write a run for transformers or OpenVINO.

    The export is scored beside RUN at once, and removed if its scores differ.
    """
    terminal.silence_libraries()
    from loracle.runs import export as exporting

    named = run.resolve() if run.name in ("", "..") else run
    folder = exporting.export(run, out or named.with_name(f"{named.name}-{to}"), to, base=base, log=terminal.log)
    click.echo(f"export: {folder}")


@command()
@RUN_ARGUMENT
@click.argument("to")
@option("--private", is_flag=True, help="visible to its owner only; the repository must be new or private")
@option("--revision", metavar="BRANCH", help="branch to push to; Hugging Face creates it  [default: the main branch]")
def push(run: Path, to: str, private: bool, revision: str | None) -> None:
    """Upload a run with a model card to a hub.

    TO is hf:owner/name or modelscope:owner/name. No text of your data is uploaded: report, predictions and logs stay here.
    Label names, settings and metrics are uploaded.
    """
    terminal.silence_libraries()
    from loracle.runs import sharing

    click.echo(f"page: {sharing.push(run, to, private=private, revision=revision, log=terminal.log)}")


@command()
@click.argument("source")
@out_option("folder  [default: runs/NAME]")
def pull(source: str, out: Path | None) -> None:
    """Download a run from a hub and check its checksums.

    SOURCE is hf:owner/name or modelscope:owner/name, perhaps with @revision. A run that was pulled works without a network.
    """
    terminal.silence_libraries()
    from loracle.runs import sharing

    click.echo(f"run folder: {sharing.pull(source, out, log=terminal.log)}")


@command()
@click.argument("runs", nargs=-1, required=True, type=RunFolder())
@setting_options(ServeConfig)
@BASE
@DEVICE
def serve(runs: tuple[Path, ...], base: str | None, device: str, **values: Any) -> None:
    """Answer HTTP requests with one or more runs.

    Each run is named after its folder. GET /openapi.json lists the routes, with examples; / is a page to try them. SIGTERM
    finishes the open requests first.
    """
    settings = ServeConfig(**given(values, ServeConfig))
    terminal.silence_libraries()
    try:
        from loracle.serving import server
    except ModuleNotFoundError as e:
        raise UserError(f"loracle serve needs {e.name}.", "Run: pip install 'loracle[serve]'") from None
    server.serve(runs, settings, base=base, device=device, log=terminal.log)


@command(can_be_quiet=False)
@option("--clear", is_flag=True, help="remove all of them")
def cache(clear: bool) -> None:
    """List or clear the cached states of frozen layers.

    `loracle train --adapt-top` writes them.
    """
    terminal.silence_libraries()
    from loracle.models import hidden_state_cache

    if clear:
        click.echo(f"{hidden_state_cache.clear() / 1e6:,.1f} MB freed")
        return
    entries = hidden_state_cache.entries()
    for e in entries:
        click.echo(f"{e.size / 1e6:>9,.1f} MB  {e.about['base']}, lower {e.about['depth']} layers  {e.folder}")
    click.echo(f"{sum(e.size for e in entries) / 1e6:>9,.1f} MB  in all, in {hidden_state_cache.cache_root()}")


@command(can_be_quiet=False)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for bash, zsh or fish.

    It completes commands, options, files and run folders. To load it in each new shell:

    \b
      bash  loracle completion bash >> ~/.bashrc
      zsh   loracle completion zsh >> ~/.zshrc
      fish  loracle completion fish > ~/.config/fish/completions/loracle.fish
    """
    completion_class = get_completion_class(shell)
    assert completion_class is not None, shell
    click.echo(completion_class(ctx.find_root().command, {}, "loracle", "_LORACLE_COMPLETE").source())
