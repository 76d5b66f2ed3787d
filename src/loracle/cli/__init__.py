"""The command line: options made from ``config.py``, work done by ``pipeline.py`` and ``run/``, errors in one line.

Nothing heavy is imported before it is needed: ``--help`` and ``check`` never see torch.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import loracle
from loracle.config import (
    CompareConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    PlanConfig,
    RunConfig,
    ServeConfig,
    TrainConfig,
    TuneConfig,
    ValidateConfig,
)
from loracle.errors import Interrupted, UserError
from loracle.runs.export import EXPORTERS

SHORT = {"out": "-o"}
FEW_DRAWS = 2048  # behind each lift of many groups: stable to a few points, and a millisecond each
FIRST_WORD = 5.0  # seconds; a launcher looks ten times a second whether a process has ended


def options(*configs: type, only: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """One option a config field, with its help and default; what is not given is not passed on."""

    def decorate(command: Callable) -> Callable:
        for config in reversed(configs):
            hints = typing.get_type_hints(config)
            for f in reversed(dataclasses.fields(config)):
                if f.metadata and f.name != "data" and (not only or f.name in only):
                    command = _option(f, hints[f.name])(command)
        return command

    return decorate


def _option(f: dataclasses.Field, hint: Any) -> Callable[[Callable], Callable]:
    kinds = [k for k in typing.get_args(hint) if k is not types.NoneType] or [hint]
    name = f.name.replace("_", "-")
    flag = f"--{name}/--no-{name}" if kinds[0] is bool else f"--{name}"
    shown = f.metadata["help"] + ("" if f.default is None or kinds[0] is bool else f"  [{f.default}]")
    choices = f.metadata["choices"]
    plain = number_or_auto if kinds == [int, str] else kinds[0]
    kind = None if kinds[0] is bool else click.Choice(choices) if choices else plain
    return click.option(
        *([SHORT[f.name]] if f.name in SHORT else []), flag, f.name, type=kind, default=None, help=shown
    )


def number_or_auto(word: str) -> int | str:
    """What a dial that can find its own number takes."""
    return int(word) if word.isdecimal() else word


RECIPE = click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="a recipe by name, a TOML file or a run.toml; flags win",
)


class Commands(click.Group):
    """Commands in the order of a user's way, and errors that a user is meant to read as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] != "train" and _of_launcher("WORLD_SIZE", 1) > 1:
            raise UserError(f"one process to {args[0]}", "several", "start it without torchrun or accelerate launch")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as e:
            _complain(f"loracle: {e}")
            sys.exit(2)
        except Interrupted as e:
            _complain(f"\nloracle: {e}")
            sys.exit(130)
        except BrokenPipeError:  # `loracle predict … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except Exception:
            if _of_launcher("WORLD_SIZE", 1) > 1:
                time.sleep(FIRST_WORD)  # most likely another one ended; if so, the launcher ends this one now
            raise


def _complain(line: str) -> None:
    """Say what went wrong. Of several processes the main one speaks first; the launcher then ends those that found the same."""
    if rank := _of_launcher("RANK", 0):
        time.sleep(FIRST_WORD)
        line = f"process {rank}: {line.strip()}"
    click.echo(line, err=True)


def _of_launcher(name: str, alone: int) -> int:
    """A number that torchrun gives each of its processes, or what it is without torchrun."""
    return int(os.environ.get(name) or alone)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(loracle.__version__)
def main() -> None:
    """Turn labelled text, preference pairs or click logs into an LLM classifier or ranker."""


@main.command()
@click.argument("data", required=False)
@options(DataConfig, ModelConfig, LoraConfig, TrainConfig, RunConfig)
@RECIPE
@click.option("--resume", type=click.Path(path_type=Path), help="go on with the interrupted run in this folder")
def train(data: str | None, recipe_file: Path | None, resume: Path | None, **given: Any) -> None:
    """Train on DATA: a file (CSV, TSV, JSON, JSON lines, Parquet, each also .gz) or hf:owner/name.

    Columns and task are inferred and said aloud; flags win.
    """
    given = {k: v for k, v in given.items() if v is not None}
    if resume is None:
        config, _ = _settings(data, recipe_file, given, "train")
    elif data or given or recipe_file:
        beside = data or "--" + next(iter(given), "recipe")
        raise UserError("--resume alone", f"{beside} beside it", "the run folder knows the rest")
    _calm()
    from loracle import pipeline

    if resume is not None:
        pipeline.resume(resume, log=click.echo)
    else:
        pipeline.train(config, log=click.echo)


def _taken(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """The options of one config, out of all that a command has; those that were given."""
    named = {f.name: given.pop(f.name) for f in dataclasses.fields(kind)}
    return {name: value for name, value in named.items() if value is not None}


def _settings(
    data: str | None, recipe_file: Path | None, given: dict[str, Any], command: str
) -> tuple[RunConfig, dict[str, dict[str, Any]]]:
    """A run's settings, flags before the recipe file before defaults; and the file's sections for other commands."""
    from loracle.runs.recipes import read_recipe

    flat, extra = read_recipe(recipe_file) if recipe_file else ({}, {})
    flat |= {k: v for k, v in {"data": data, **given}.items() if v is not None}
    if not flat.get("data"):
        raise UserError(f"data to {command} on", "none", f"give a file: loracle {command} reviews.csv")
    return RunConfig.from_flat(flat), extra


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data")
@options(DataConfig, only=("text", "context"))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="CSV, TSV, JSON lines or Parquet file, begun or gone on with; default: CSV to the terminal",
)
@click.option(
    "--abstain-below",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="give no label to rows of which the model is less sure than this, and count them: the highest probability; where "
    "labels can stand together, what it says of the one that it doubts most",
)
@click.option("--base", help="where the base model is now, if it moved")
@click.option("--device", default="auto", help="cpu, cuda, mps, or auto")
@click.option("--on", type=click.Choice(["ray"]), help="have a Ray cluster score: that of $RAY_ADDRESS, or a local one")
@click.option("--workers", type=click.IntRange(1), help="with --on ray: how many; default: one a GPU, else one a node")
def predict(
    run: Path,
    data: str,
    out: Path | None,
    abstain_below: float,
    base: str | None,
    device: str,
    on: str | None,
    workers: int | None,
    **columns: Any,
) -> None:
    """Label every row of DATA with the classifier in RUN: the columns as they were, then predicted and p(…).

    DATA is a file, a folder, hf:owner/name, or several files by a pattern in quotes: 'logs/*.csv'.
    """
    from loracle.data.columns import infer_text_column
    from loracle.data.sources import open_table
    from loracle.runs.folder import read_info

    if workers and not on:
        raise UserError("--on ray beside --workers", "--workers alone", "add --on ray, or leave out --workers")
    info, table = read_info(run), open_table(data)
    if (command := info.task.output.command) != "predict":
        raise UserError(
            f"{run} does not predict: it is {info.task.reading.description}.", f"Use loracle {command} {run} {data}"
        )
    found = infer_text_column(table, _remembered(info, table, columns, only=("text", "context")))
    for line in found.lines:
        click.echo(line, err=True)
    _calm()
    from loracle.runs import batch

    job = batch.Job(
        run=run,
        info=info,
        data=data,
        table=table,
        columns=found,
        base=base,
        device=device,
        workers=None if on is None else workers or 0,
    )
    batch.predict(job, out, abstain_below, log=lambda line: click.echo(line, err=True))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("titles", nargs=-1, required=True)
@options(DataConfig, only=("text", "group"))
@click.option("--context", help="what the titles are for; with a file: the column that says it")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="CSV, TSV, JSON lines or Parquet file; default: the terminal"
)
@click.option("--explain", is_flag=True, help="also say what each word adds to the score: what is lost without it")
@click.option("--base", help="where the base model is now, if it moved")
@click.option("--device", default="auto", help="cpu, cuda, mps, or auto")
def rank(
    run: Path,
    titles: tuple[str, ...],
    context: str | None,
    out: Path | None,
    explain: bool,
    base: str | None,
    device: str,
    **columns: Any,
) -> None:
    """Rank TITLES, best first, with the ranker in RUN; or one file of titles, group by group; or - for one a line.

    A ranker that learnt from clicks also says how likely each title is to beat each other one, and which lift over the mean
    of those offered to expect.
    """
    from loracle.runs.folder import read_info

    groups = _titles_to_rank(read_info(run), titles, context, columns)
    _calm()
    from loracle.runs.explain import leave_one_out
    from loracle.runs.output import open_output
    from loracle.runs.predictor import Predictor

    predictor = Predictor(run, base=base, device=device)

    def words_of(group: Any, ranked: list) -> list[list[tuple[str, float]]] | None:
        return leave_one_out(predictor, [r.text for r in ranked], group.context) if explain else None

    draws = None if len(groups) == 1 else FEW_DRAWS
    ranked = predictor.rank_groups(groups, draws=draws)
    if out is None and len(groups) == 1:
        group, best_first = next(ranked)
        click.echo("\n".join(_ranking_lines(best_first, words_of(group, best_first))))
        return
    with open_output(out) as write:
        for group, best_first in ranked:
            words = words_of(group, best_first)
            for position, r in enumerate(best_first, 1):
                row: dict[str, Any] = {
                    "group": group.group,
                    "rank": position,
                    "score": round(r.score, 6),
                    "text": r.text,
                }
                if predictor.calibration is not None:
                    row |= {name: _rounded(getattr(r, name)) for name in ("lift", "lift_low", "lift_high")}
                    row["beats"] = None if r.beats is None else [round(p, 4) for p in r.beats]
                if words is not None:
                    row["words"] = [[word, round(value, 4)] for word, value in words[position - 1]]
                write(row)


def _titles_to_rank(info: Any, titles: tuple[str, ...], context: str | None, columns: dict[str, Any]) -> list[Any]:
    """Groups from the command line, from standard input (-), or from a file."""
    from loracle.data.formats import format_of
    from loracle.examples import RankGroup

    if len(titles) == 1 and titles[0] != "-" and _is_file(titles[0]):
        from loracle.data.columns import infer_text_column
        from loracle.data.reader import read_unlabeled_groups
        from loracle.data.sources import open_table

        table = open_table(titles[0])
        named = _remembered(info, table, {"context": context, **columns}, only=("text", "group", "context"))
        groups, issues = read_unlabeled_groups(table, infer_text_column(table, named))
        for issue in issues:
            click.echo(f"note: {issue}", err=True)
        return groups
    if len(titles) == 1 and format_of(Path(titles[0])) is not None and " " not in titles[0]:
        raise UserError("a file of titles, or titles", f"no file {titles[0]}", "check the path")
    if titles == ("-",):
        titles = tuple(_lines_of_stdin())
        if not titles:
            raise UserError(
                "titles on standard input, one a line", "none", "pipe some in: loracle rank run - < titles.txt"
            )
    distinct = tuple(dict.fromkeys(titles))
    if len(distinct) < len(titles):
        click.echo(f"note: {len(titles) - len(distinct)} repeated titles are ranked once", err=True)
    return [RankGroup(group="", texts=distinct, rows=tuple(range(1, 1 + len(distinct))), context=context)]


def _lines_of_stdin() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            title = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise UserError("text in UTF-8", f"other bytes in line {number} of standard input", "convert it") from None
        if title:
            yield title


MATRIX = 10  # titles up to which the terminal shows each one's chance against each other


def _ranking_lines(ranked: list, words: list[list[tuple[str, float]]] | None) -> list[str]:
    """A ranking for the terminal; below it, if asked for, what each word of a title adds."""
    from loracle.reporting.terminal import plain_table

    rows = []
    if told := ranked[0].lift is not None:
        against = [f"beats {j}" for j in range(1, len(ranked) + 1)] if len(ranked) <= MATRIX else []
        rows.append(["", "score", "lift", "95 %", *against, "title"])
    for position, r in enumerate(ranked, 1):
        chances = [f"{p:.0%}" if j != position else "" for j, p in enumerate(r.beats or (), 1)]
        lift = [f"{r.lift:+.0%}", f"{r.lift_low:+.0%} to {r.lift_high:+.0%}"] if told else []
        rows.append([f"{position:>3}", f"{r.score:+.3f}", *lift, *(chances if len(ranked) <= MATRIX else []), r.text])
    lines = plain_table(rows).splitlines()
    if words is not None:
        lines += ["", "score lost without the word:"]
        for position, of_title in enumerate(words, 1):
            by_size = sorted(of_title, key=lambda word: -abs(word[1]))
            lines.append(f"{position:>3}  " + "  ".join(f"{word} {value:+.3f}" for word, value in by_size))
    return lines


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data")
@options(DataConfig)
@click.option("--base", help="where the base model is now, if it moved")
@click.option("--device", default="auto", help="cpu, cuda, mps, or auto")
@click.option("--json", "as_json", is_flag=True, help="print every metric as JSON")
def evaluate(run: Path, data: str, base: str | None, device: str, as_json: bool, **given: Any) -> None:
    """Measure the classifier or ranker in RUN on labelled DATA."""
    import json

    from loracle.data.sources import open_table
    from loracle.runs.folder import read_info
    from loracle.tasks.dataset import read_examples

    info, table = read_info(run), open_table(data)
    examples = read_examples(table, _remembered(info, table, given), task=info.task)
    for issue in examples.issues:
        click.echo(f"note: {issue}", err=True)
    _calm()
    from loracle.reporting.terminal import summary
    from loracle.runs.predictor import Predictor
    from loracle.training import scoring

    predictor = Predictor(run, base=base, device=device)
    scores = scoring.score_examples(predictor.scorer, predictor.encoder, examples.items)
    metrics = scoring.measure(scores, examples.items, info.task, predictor.calibration)
    if as_json:
        click.echo(json.dumps({"base": info.base.get("note") or info.base["source"], **metrics}, indent=1))
        return
    click.echo(f"{len(examples.items):,} {info.task.unit} of {data}")
    click.echo(summary({"test": metrics}, info.task, info.base.get("note")))


@main.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.argument("data")
@options(DataConfig)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="CSV, TSV or JSON lines file of every row that changed"
)
@click.option("--base-a", help="where the base model of RUN_A is now, if it moved")
@click.option("--base-b", help="where the base model of RUN_B is now, if it moved")
@click.option("--device", default="auto", help="cpu, cuda, mps, or auto")
@click.option("--json", "as_json", is_flag=True, help="print every figure as JSON")
def diff(
    run_a: Path,
    run_b: Path,
    data: str,
    out: Path | None,
    base_a: str | None,
    base_b: str | None,
    device: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Say what RUN_B does otherwise than RUN_A on DATA: metrics with a test in pairs, and who gained and lost.

    Both score the same rows, read as RUN_A reads them. Without labels only what changed is shown.
    """
    import json

    from loracle.data.sources import open_table
    from loracle.runs.output import open_output

    _calm()
    from loracle.experiments import diff as versions

    info, _ = versions.check_same_task(run_a, run_b)
    table = open_table(data)
    rows = versions.read_rows(table, _remembered(info, table, given), info.task)
    for note in rows.notes:
        click.echo(f"note: {note}", err=True)
    found = versions.compare(run_a, run_b, rows, bases=(base_a, base_b), device=device)
    if out is not None:
        with open_output(out) as write:
            for row in found.rows:
                write(row)
    if as_json:
        click.echo(json.dumps(found.summary, indent=1, ensure_ascii=False))
        return
    click.echo("\n".join(versions.lines(found, run_a, run_b)))
    if out is not None:
        click.echo(f"\nall {len(found.rows):,} that changed: {out}")


REMEMBERED = (
    "text", "label", "group", "compare_within", "context", "clicks", "impressions", "clicked", "grade", "label_delimiter",
    "min_impressions",
)  # fmt: skip


def _remembered(info: Any, table: Any, given: dict[str, Any], only: tuple[str, ...] = REMEMBERED) -> DataConfig:
    """Columns that training named or inferred are looked for again where they are there; flags win.

    Not those that only training minds: weight and date.
    """
    inferred = info.provenance.get("columns", {})
    known = {name: inferred.get(name, getattr(info.config.data, name)) for name in only}
    kept = {k: v for k, v in known.items() if _is_there(k, v, table.columns)}
    flags = {k: v for k, v in given.items() if v is not None}
    if "clicked" in flags:
        kept = {k: v for k, v in kept.items() if k not in ("clicks", "impressions")}
    elif "clicks" in flags or "impressions" in flags:
        kept.pop("clicked", None)
    return _data_config(**{**kept, **flags})


def _is_there(name: str, value: Any, columns: tuple[str, ...]) -> bool:
    """Whether a remembered setting still fits: columns if the table has them, what names no column always."""
    if name in ("label_delimiter", "min_impressions") or value is None:
        return True
    return all(c.strip() in columns for c in value.split(","))


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except OSError:  # a title too long to be a name
        return False


@main.command()
@click.argument("data")
@options(DataConfig)
@click.option("--json", "as_json", is_flag=True, help="print everything as JSON")
def check(data: str, as_json: bool, **given: Any) -> None:
    """Say what is in DATA and what is wrong with it; exits with 2 if it cannot be trained on."""
    import json

    from loracle.data.sources import open_splits, open_table
    from loracle.tasks.dataset import check_examples, read_examples

    config = _data_config(data=data, **given)
    tables = open_splits(data)
    found = read_examples(tables["train"], config)
    test_table = open_table(config.test) if config.test else tables.get("test")
    report = check_examples(found, read_examples(test_table, config, task=found.task) if test_table else None)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join([*found.columns.lines, *report.lines()]))
    found.task.reading.check_trainable(found.items, found.task)


@main.command()
@click.argument("data")
@options(DataConfig)
@options(ModelConfig, only=("model", "revision", "template", "max_length", "long", "dtype", "device"))
@options(TrainConfig, only=("loss", "seed"))
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="also draw it: a .png, .svg or .pdf file")
@click.option("--json", "as_json", is_flag=True, help="print everything as JSON")
def probe(data: str, picture: Path | None, as_json: bool, **given: Any) -> None:
    """Say how much of the model DATA needs: a linear probe on the states of every layer; nothing is trained.

    train --depth N, or auto, then drops the layers above.
    """
    import json

    _calm()
    from loracle.experiments.probe import probe_data
    from loracle.reporting.plots import plot_depths
    from loracle.training.probe import choose, probe_table

    config = RunConfig.from_flat({"data": data, **{k: v for k, v in given.items() if v is not None}})
    depths, metric = probe_data(config, log=lambda line: click.echo(line, err=as_json))
    if picture is not None:
        plot_depths(depths, metric, picture)
    if as_json:
        chosen = choose(depths).layers
        click.echo(json.dumps({"metric": metric, "depths": [dataclasses.asdict(d) for d in depths], "auto": chosen}))
    else:
        click.echo("\n".join(probe_table(depths, metric)))


@main.command()
@click.argument("data", required=False)
@options(CompareConfig, DataConfig, ModelConfig, LoraConfig, TrainConfig)
@options(RunConfig, only=("out",))
@RECIPE
def compare(data: str | None, recipe_file: Path | None, **given: Any) -> None:
    """Train --model and those it is compared with on the same split of DATA; one table.

    Accuracy, paired test against --model, training time, memory, size and cost. Run again it goes on where it was
    stopped; what is finished is not trained again.
    """
    own = _taken(CompareConfig, given)
    config, extra = _settings(data, recipe_file, given, "compare")
    settings = CompareConfig(**{**extra.get("compare", {}), **own})
    _calm()
    from loracle.experiments import compare

    compare.run(config, settings, log=click.echo)


@main.command()
@click.argument("data", required=False)
@options(ValidateConfig, DataConfig, ModelConfig, LoraConfig, TrainConfig)
@options(RunConfig, only=("out",))
@RECIPE
def validate(data: str | None, recipe_file: Path | None, **given: Any) -> None:
    """Train several times on DATA: --folds k, every example held out once; or --seeds n, how far luck goes.

    Run again it goes on where it was stopped; what is finished is not trained again.
    """
    settings = ValidateConfig(**_taken(ValidateConfig, given))
    config, _ = _settings(data, recipe_file, given, "validate")
    _calm()
    from loracle.experiments import validate

    validate.run(config, settings, log=click.echo)


@main.command()
@click.argument("data", required=False)
@options(TuneConfig, DataConfig, ModelConfig, LoraConfig, TrainConfig)
@options(RunConfig, only=("out",))
@RECIPE
def tune(data: str | None, recipe_file: Path | None, **given: Any) -> None:
    """Search settings for DATA on its validation examples; the test side is never scored.

    The learning rate alone first, then with rank, targets and epochs. What is found is written as a recipe for train
    --recipe. Run again it goes on where it was stopped; more --trials search on.
    """
    settings = TuneConfig(**_taken(TuneConfig, given))
    config, _ = _settings(data, recipe_file, given, "tune")
    _calm()
    from loracle.experiments import tune

    tune.run(config, settings, log=click.echo)


@main.command()
@options(PlanConfig)
@click.option(
    "--data", help="a click log whose rate, spread, titles and impressions are taken, with a learning curve of it"
)
@options(
    DataConfig,
    only=("group", "compare_within", "text", "context", "clicks", "impressions", "clicked", "min_impressions"),
)
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="also draw it: a .png, .svg or .pdf file")
@click.option("--json", "as_json", is_flag=True, help="print everything as JSON")
def simulate(data: str | None, picture: Path | None, as_json: bool, **given: Any) -> None:
    """Say how many tests and impressions a click log needs, from a simulated one; no model is trained.

    Titles of a test differ by SPREAD in their true log-odds of a click; noise decides what their click rates show of it.
    """
    import json

    from loracle.experiments import power

    settings = _taken(PlanConfig, given)
    plan, own, learnt = PlanConfig(**settings), None, []
    if data is not None:
        groups = _click_groups(data, given)
        plan, own = power.of_log(groups, plan)
        plan = dataclasses.replace(plan, **settings)
        learnt = power.learning_curve(groups, plan.seed)
        if settings.keys() - {"tests", "seed"}:  # other titles than the log's: its medians stand for the rest
            own = None
    elif columns := [name for name, value in given.items() if value is not None]:
        raise UserError("--data beside columns", f"--{columns[0].replace('_', '-')} alone", "name the click log")
    curves = power.plan(plan, own)
    if picture is not None:
        power.plot(curves, learnt, picture)
    if as_json:
        points = {name: [dataclasses.asdict(p) for p in points] for name, points in curves.items()}
        click.echo(json.dumps({"process": dataclasses.asdict(plan), **points, "learning_curve": learnt}, indent=1))
    else:
        click.echo("\n".join(power.lines(plan, curves, learnt, own=own is not None)))


def _click_groups(data: str, given: dict[str, Any]) -> list[Any]:
    from loracle.data.sources import open_splits
    from loracle.tasks.dataset import read_examples

    found = read_examples(open_splits(data)["train"], _data_config(data=data, task="click_ranking", **given))
    for line in (*found.columns.lines, *(f"note: {issue}" for issue in found.issues)):
        click.echo(line, err=True)
    return list(found.items)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(tuple(EXPORTERS)),
    required=True,
    help="; ".join(f"{name}: {exporter.help}" for name, exporter in EXPORTERS.items()),
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="folder; default: RUN-FORMAT")
@click.option("--base", help="where the base model is now, if it moved")
def export(run: Path, to: str, out: Path | None, base: str | None) -> None:
    """Write the run RUN as a folder that transformers loads without loracle, or in 8-bit integers for CPUs.

    It is scored beside the run at once, and removed if it differs.
    """
    _calm()
    from loracle.runs import export as exporting

    named = run.resolve() if run.name in ("", "..") else run
    folder = exporting.export(run, out or named.with_name(f"{named.name}-{to}"), to, base=base, log=click.echo)
    click.echo(f"export: {folder}")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("to")
@click.option("--private", is_flag=True, help="let only its owner see the repository, which must be new or private")
@click.option("--revision", help="the branch to push to; on Hugging Face it is made if there is none  [the main one]")
def push(run: Path, to: str, private: bool, revision: str | None) -> None:
    """Upload RUN, with a model card, to hf:owner/name or modelscope:owner/name.

    No text of the data leaves this machine: report, predictions and logs are left out. Label names, settings and metrics go.
    """
    from loracle.runs import sharing

    click.echo(f"page: {sharing.push(run, to, private=private, revision=revision, log=click.echo)}")


@main.command()
@click.argument("source")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="folder  [runs/NAME]")
def pull(source: str, out: Path | None) -> None:
    """Fetch a run that was pushed: hf:owner/name or modelscope:owner/name, and perhaps @revision.

    Every file is checked against the run's own checksums. What was fetched once serves without a network.
    """
    from loracle.runs import sharing

    click.echo(f"run folder: {sharing.pull(source, out, log=click.echo)}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@options(ServeConfig)
@click.option("--base", help="where the base model is now, if it moved")
@click.option("--device", default="auto", help="cpu, cuda, mps, or auto")
def serve(runs: tuple[Path, ...], base: str | None, device: str, **given: Any) -> None:
    """Answer requests over HTTP with the classifiers and rankers in RUNS, each called by the name of its folder.

    Routes, with examples: /openapi.json. A page to try them: /. SIGTERM finishes what is at work.
    """
    settings = ServeConfig(**_taken(ServeConfig, given))
    _calm()
    try:
        from loracle.serving import server
    except ModuleNotFoundError as e:
        raise UserError("what loracle serve needs", f"no {e.name}", "run: pip install 'loracle[serve]'") from None
    server.serve(runs, settings, base=base, device=device, log=click.echo)


@main.command()
@click.option("--clear", is_flag=True, help="remove all of it")
def cache(clear: bool) -> None:
    """List the states of frozen lower layers that are kept on disk (--adapt-top), or clear them."""
    _calm()
    from loracle.models import hidden_state_cache

    if clear:
        click.echo(f"{hidden_state_cache.clear() / 1e6:,.1f} MB freed")
        return
    for e in hidden_state_cache.entries():
        click.echo(f"{e.size / 1e6:>9,.1f} MB  {e.about['base']}, lower {e.about['depth']} layers  {e.folder}")
    click.echo(
        f"{sum(e.size for e in hidden_state_cache.entries()) / 1e6:>9,.1f} MB  in all, in {hidden_state_cache.cache_root()}"
    )


@main.command()
@click.option("-o", "--out", default="runs/demo", type=click.Path(path_type=Path), help="folder for data and runs")
@click.option("--max-steps", type=int, help="stop both trainings after this many steps")
def demo(out: Path, max_steps: int | None) -> None:
    """Train a topic classifier and a title ranker on embedded data, and use both."""
    _calm()
    from loracle.experiments import demo as showcase

    showcase.run(out, max_steps=max_steps, log=click.echo)


def _data_config(**given: Any) -> DataConfig:
    return DataConfig(**{k: v for k, v in given.items() if v is not None})


def _calm() -> None:
    """Keep the libraries' notices, meant for developers, from the user's terminal."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it wherever it is installed
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


if __name__ == "__main__":
    main()
