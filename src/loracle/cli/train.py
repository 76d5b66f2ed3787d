"""``loracle train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loracle.cli import terminal
from loracle.cli.options import OPTIONAL_DATA, RECIPE, RunFolder, command, given, option, run_settings, setting_options
from loracle.config import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from loracle.errors import UserError


@command()
@OPTIONAL_DATA
@setting_options(DataConfig, ModelConfig, LoraConfig, TrainConfig, RunConfig)
@RECIPE
@option("--resume", type=RunFolder(), metavar="RUN", help="continue the interrupted run in this folder")
def train(data: str | None, recipe: Path | None, resume: Path | None, **values: Any) -> None:
    """Train a classifier or ranker and save it as a run folder.

    DATA is a file (CSV, TSV, JSON, JSON lines, Parquet, each also .gz), a folder, hf:owner/name or modelscope:owner/name.
    Columns and task are inferred and printed. Flags override what is inferred.
    """
    values = given(values)
    if resume is None:
        config, _ = run_settings(data, recipe, values, "train")
    elif data or values or recipe:
        other = data or "--" + next(iter(values), "recipe").replace("_", "-")
        raise UserError(f"--resume takes nothing else, but {other} was given.", "The run folder holds the settings.")
    terminal.silence_libraries()
    from loracle import pipeline

    quiet = terminal.is_set("quiet")
    if resume is not None:
        folder = pipeline.resume(resume, log=terminal.log, quiet=quiet)
    else:
        folder = pipeline.train(config, log=terminal.log, quiet=quiet)
    terminal.print_folder(folder)
