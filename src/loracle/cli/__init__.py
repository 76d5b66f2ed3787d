"""The command line: options and terminal output, no logic.

    options       options from config.py, grouped help, paths that shells complete
    terminal      progress, notes, errors, colour, silence of libraries
    data          demo, check, probe, simulate
    train         train
    experiments   compare, validate, tune, diff
    predict       predict, rank, evaluate
    deploy        export, push, pull, serve, cache, completion
    doctor        doctor

Commands import what they run inside their functions: ``--help`` and ``check`` do not import torch.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

import loracle
from loracle.cli import data, deploy, doctor, experiments, predict, terminal, train
from loracle.errors import Interrupted, UserError

SECTIONS = {
    "Explore": (data.demo, data.check, data.probe, data.simulate),
    "Train": (train.train, experiments.compare, experiments.validate, experiments.tune),
    "Use a run": (predict.predict, predict.rank, predict.evaluate, experiments.diff),
    "Deploy and maintain": (
        *(deploy.export, deploy.push, deploy.pull, deploy.serve),
        *(deploy.cache, doctor.doctor, deploy.completion),
    ),
}


class Commands(click.Group):
    """Commands under headings, and errors as one message with a hint."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        return super().make_context(*args, **{"color": terminal.color_setting(), **extra})

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            rows = [(str(c.name), c.get_short_help_str(limit=200)) for c in commands]
            terminal.write_section(formatter, title, rows)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        records = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        terminal.write_section(formatter, "Options", records)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] != "train" and terminal.process_count() > 1:
            raise UserError(
                f"{args[0]} runs in one process, but several were started.",
                "Start it without torchrun or accelerate launch.",
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as e:
            terminal.show_error(e)
            sys.exit(2)
        except Interrupted as e:
            terminal.show_interrupt(e)
            sys.exit(130)
        except BrokenPipeError:  # `loracle predict … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except Exception:
            terminal.show_bug()
            raise


@click.group(
    "loracle",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(loracle.__version__)
def main() -> None:
    """Turn labelled text, preference pairs or click logs into an LLM classifier or ranker.

    Begin with `loracle demo`, or with a file of your own: `loracle train reviews.csv`.
    """


for _commands in SECTIONS.values():
    for _command in _commands:
        main.add_command(_command)
