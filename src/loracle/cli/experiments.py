"""Commands that train several times or compare runs: compare, validate, tune, diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from loracle.cli import terminal
from loracle.cli.options import (
    DATA_ARGUMENT,
    DEVICE,
    FILE,
    JSON,
    OPTIONAL_DATA,
    RECIPE,
    RunFolder,
    command,
    given,
    option,
    out_option,
    run_settings,
    setting_options,
)
from loracle.config import (
    CompareConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    TuneConfig,
    ValidateConfig,
)
from loracle.runs.columns import EVALUATION_COLUMNS, columns_of_run


@command()
@OPTIONAL_DATA
@setting_options(CompareConfig, DataConfig, ModelConfig, LoraConfig, TrainConfig)
@setting_options(RunConfig, only=("out",))
@RECIPE
def compare(data: str | None, recipe: Path | None, **values: Any) -> None:
    """Train several models on the same split and print one table.

    The table has metrics, a paired test against --model, training time, memory, size and cost. The same command continues
    after a stop and trains nothing twice.
    """
    flags = given(values, CompareConfig)
    config, other_sections = run_settings(data, recipe, values, "compare")
    settings = CompareConfig(**{**other_sections.get("compare", {}), **flags})
    terminal.silence_libraries()
    from loracle.experiments import compare

    terminal.print_folder(compare.run(config, settings, log=terminal.log, quiet=terminal.is_set("quiet")))


@command()
@OPTIONAL_DATA
@setting_options(ValidateConfig, DataConfig, ModelConfig, LoraConfig, TrainConfig)
@setting_options(RunConfig, only=("out",))
@RECIPE
def validate(data: str | None, recipe: Path | None, **values: Any) -> None:
    """Repeat a training over folds or seeds and print the spread.

    With --folds every example is tested on once. With --seeds the runs differ by chance alone. The same command continues
    after a stop and trains nothing twice.
    """
    settings = ValidateConfig(**given(values, ValidateConfig))
    config, _ = run_settings(data, recipe, values, "validate")
    terminal.silence_libraries()
    from loracle.experiments import validate

    terminal.print_folder(validate.run(config, settings, log=terminal.log, quiet=terminal.is_set("quiet")))


@command()
@OPTIONAL_DATA
@setting_options(TuneConfig, DataConfig, ModelConfig, LoraConfig)
@setting_options(TrainConfig, without=("texts", "track"))
@setting_options(RunConfig, only=("out",))
@RECIPE
def tune(data: str | None, recipe: Path | None, **values: Any) -> None:
    """Search learning rate, rank, targets and epochs for your data.

    Trials are compared on validation examples; the test is never scored. The best settings become a recipe for
    `loracle train --recipe`. The same command continues after a stop, and more --trials search further.
    """
    settings = TuneConfig(**given(values, TuneConfig))
    config, _ = run_settings(data, recipe, values, "tune")
    terminal.silence_libraries()
    from loracle.experiments import tune

    terminal.print_folder(tune.run(config, settings, log=terminal.log, quiet=terminal.is_set("quiet")))


@command()
@click.argument("run_a", type=RunFolder())
@click.argument("run_b", type=RunFolder())
@DATA_ARGUMENT
@setting_options(DataConfig, only=EVALUATION_COLUMNS)
@option("--base-a", type=FILE, help="where the base model of RUN_A is now, if it moved", group="Model")
@option("--base-b", type=FILE, help="where the base model of RUN_B is now, if it moved", group="Model")
@DEVICE
@out_option("file of every row that changed: CSV, TSV or JSON lines")
@JSON
def diff(
    run_a: Path,
    run_b: Path,
    data: str,
    out: Path | None,
    base_a: str | None,
    base_b: str | None,
    device: str,
    as_json: bool,
    **columns: Any,
) -> None:
    """Compare two runs on the same data, row by row.

    Prints metrics with paired tests, and which texts RUN_B gets right or wrong unlike RUN_A. Without labels it prints only
    what changed.
    """
    from loracle.data.sources import open_table
    from loracle.runs.output import open_output

    terminal.silence_libraries()
    from loracle.experiments import diff as versions

    info, _ = versions.check_same_task(run_a, run_b)
    table = open_table(data)
    rows = versions.read_rows(table, columns_of_run(info, table, given(columns)), info.task)
    for line in rows.notes:
        terminal.note(f"note: {line}")
    changes = versions.compare(run_a, run_b, rows, bases=(base_a, base_b), device=device)
    if out is not None:
        with open_output(out) as write:
            for row in changes.rows:
                write(row)
    if as_json:
        click.echo(json.dumps(changes.summary, indent=1, ensure_ascii=False))
        return
    click.echo("\n".join(versions.lines(changes, run_a, run_b)))
    if out is not None:
        click.echo(f"\nall {len(changes.rows):,} changed rows: {out}")
