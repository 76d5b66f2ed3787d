"""Commands before a training: demo, check, probe, simulate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from loracle.cli import terminal
from loracle.cli.options import DATA_ARGUMENT, FILE, JSON, PLOT, command, data_config, given, option, setting_options
from loracle.config import DataConfig, ModelConfig, PlanConfig, RunConfig, TrainConfig
from loracle.errors import UserError

CLICK_COLUMNS = ("group", "compare_within", "text", "context", "clicks", "impressions", "clicked", "min_impressions")


@command()
@option("-o", "--out", default="runs/demo", type=click.Path(path_type=Path), help="folder  [default: runs/demo]")
@option("--max-steps", type=int, metavar="STEPS", help="stop both trainings after this many steps", group="Training")
def demo(out: Path, max_steps: int | None) -> None:
    """Train a classifier and a ranker on embedded data and use both."""
    terminal.silence_libraries()
    from loracle.experiments import demo as showcase

    showcase.run(out, max_steps=max_steps, log=terminal.log)


@command(can_be_quiet=False)
@DATA_ARGUMENT
@setting_options(DataConfig, without=("test_share", "validation_share"))
@JSON
def check(data: str, as_json: bool, **values: Any) -> None:
    """Report what is in a data file and whether it can be trained on.

    Exits with 2 if it cannot.
    """
    from loracle.data.sources import open_splits, open_table
    from loracle.tasks.dataset import check_examples, read_examples

    config = data_config(data=data, **values)
    tables = open_splits(data)
    examples = read_examples(tables["train"], config)
    test_table = open_table(config.test) if config.test else tables.get("test")
    report = check_examples(examples, read_examples(test_table, config, task=examples.task) if test_table else None)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join([*examples.columns.lines, *report.lines()]))
    examples.task.reading.check_trainable(examples.items, examples.task)


@command()
@DATA_ARGUMENT
@setting_options(DataConfig, without=("slice",))
@setting_options(ModelConfig, only=("model", "revision", "template", "max_length", "long", "dtype", "device"))
@setting_options(TrainConfig, only=("loss", "seed"))
@PLOT
@JSON
def probe(data: str, picture: Path | None, as_json: bool, **values: Any) -> None:
    """Measure how many layers of the base model the data need.

    Fits a linear probe on the states of each layer and trains nothing. `loracle train --depth N` then drops the layers
    above; --depth auto probes and chooses.
    """
    terminal.silence_libraries()
    from loracle.experiments.probe import probe_data
    from loracle.reporting.plots import plot_depths
    from loracle.training.probe import choose, probe_table

    config = RunConfig.from_flat({"data": data, **given(values)})
    depths, metric = probe_data(config, log=terminal.note if as_json else terminal.log)
    if picture is not None:
        plot_depths(depths, metric, picture)
    if as_json:
        chosen = choose(depths).layers
        click.echo(json.dumps({"metric": metric, "depths": [dataclasses.asdict(d) for d in depths], "auto": chosen}))
    else:
        click.echo("\n".join(probe_table(depths, metric)))


@command()
@setting_options(PlanConfig)
@option("--data", type=FILE, help="take rate, spread, titles and impressions from this click log", group="Data")
@setting_options(DataConfig, only=CLICK_COLUMNS)
@PLOT
@JSON
def simulate(data: str | None, picture: Path | None, as_json: bool, **values: Any) -> None:
    """Estimate how many tests and impressions a click log needs.

    Simulates click logs and trains no model. The true log-odds of the titles of a test differ by SPREAD; the simulated
    clicks show them with noise. With --data it also prints a learning curve of that log.
    """
    from loracle.experiments import power

    settings = given(values, PlanConfig)
    columns = given(values)
    if data is not None:
        plan, log_groups, learning_curve = power.plan_from_log(_read_click_log(data, columns), settings)
    elif columns:
        raise UserError(f"--{next(iter(columns)).replace('_', '-')} needs --data.", "Name the click log with --data.")
    else:
        plan, log_groups, learning_curve = PlanConfig(**settings), None, []
    curves = power.plan(plan, log_groups)
    if picture is not None:
        power.plot(curves, learning_curve, picture)
    if as_json:
        points = {name: [dataclasses.asdict(p) for p in points] for name, points in curves.items()}
        document = {"process": dataclasses.asdict(plan), **points, "learning_curve": learning_curve}
        click.echo(json.dumps(document, indent=1))
    else:
        click.echo("\n".join(power.lines(plan, curves, learning_curve, own=log_groups is not None)))


def _read_click_log(data: str, columns: dict[str, Any]) -> list[Any]:
    from loracle.data.sources import open_splits
    from loracle.tasks.dataset import read_examples

    examples = read_examples(open_splits(data)["train"], data_config(data=data, task="click_ranking", **columns))
    for line in (*examples.columns.lines, *(f"note: {issue}" for issue in examples.issues)):
        terminal.note(line)
    return list(examples.items)
