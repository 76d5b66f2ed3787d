"""Commands that use a run: predict, rank, evaluate."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loracle.cli import terminal
from loracle.cli.options import (
    BASE,
    DATA_ARGUMENT,
    DEVICE,
    FILE,
    JSON,
    RUN_ARGUMENT,
    command,
    given,
    option,
    out_option,
    setting_options,
)
from loracle.config import DataConfig
from loracle.errors import UserError
from loracle.runs.columns import EVALUATION_COLUMNS, columns_of_run

if TYPE_CHECKING:
    from loracle.examples import RankGroup
    from loracle.runs.folder import RunInfo
    from loracle.runs.ranking import WordScores

LIFT_DRAWS = 2048  # for each lift where many groups are ranked: exact to a few points, and a millisecond each
MATRIX_TITLES = 10  # the terminal shows each title's chance against each other one up to this many titles


@command()
@RUN_ARGUMENT
@DATA_ARGUMENT
@setting_options(DataConfig, only=("text", "context"))
@out_option("CSV, TSV, JSON lines or Parquet file, continued after a stop  [default: CSV to the terminal]")
@option(
    "--abstain-below",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="PROBABILITY",
    help="give no label to rows below this confidence, and count them: the highest probability, or in multi_label that of "
    "the least certain label",
)
@BASE
@DEVICE
@option("--on", type=click.Choice(["ray"]), help="predict on a Ray cluster: $RAY_ADDRESS, or a local one")
@option("--workers", type=click.IntRange(1), help="with --on ray: their number; default: one a GPU, else one a node")
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
    """Label every row of a file with a classifier.

    The output has the columns of DATA, then predicted and one p(LABEL) for each label. DATA is a file, a folder,
    hf:owner/name, or several files as a pattern in quotes: 'logs/*.csv'.
    """
    from loracle.data.columns import infer_text_column
    from loracle.data.sources import open_table
    from loracle.runs.folder import read_info

    if workers and not on:
        raise UserError("--workers needs --on ray.", "Add --on ray, or leave out --workers.")
    info, table = read_info(run), open_table(data)
    if (name := info.task.output.command) != "predict":
        raise UserError(
            f"{run} does not predict: it is {info.task.reading.description}.", f"Use loracle {name} {run} {data}"
        )
    text_columns = infer_text_column(table, columns_of_run(info, table, given(columns), only=("text", "context")))
    for line in text_columns.lines:
        terminal.note(line)
    terminal.silence_libraries()
    from loracle.runs import batch

    job = batch.Job(
        run=run, info=info, data=data, table=table, columns=text_columns, base=base, device=device,
        workers=None if on is None else workers or 0,
    )  # fmt: skip
    batch.predict(job, out, abstain_below, log=terminal.note, quiet=terminal.is_set("quiet"))


@command()
@RUN_ARGUMENT
@click.argument("titles", nargs=-1, required=True, type=FILE)
@setting_options(DataConfig, only=("text", "group"))
@option("--context", help="what the titles are for; with a file, the column that holds it", group="Data")
@out_option("CSV, TSV, JSON lines or Parquet file  [default: the terminal]")
@option("--explain", is_flag=True, help="also print how much the score drops without each word")
@BASE
@DEVICE
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
    """Rank titles, best first.

    TITLES are titles, one file with groups of titles, or - for one title a line on standard input. A ranker that was trained
    on clicks also prints the chance of each title against each other one, and its expected lift over their mean.
    """
    from loracle.runs.folder import read_info

    groups = _groups_to_rank(read_info(run), titles, context, columns)
    terminal.silence_libraries()
    from loracle.runs.explain import leave_one_out
    from loracle.runs.output import open_output
    from loracle.runs.predictor import Predictor
    from loracle.runs.ranking import ranking_rows

    predictor = Predictor(run, base=base, device=device)
    results = (
        (group, ranked, leave_one_out(predictor, [r.text for r in ranked], group.context) if explain else None)
        for group, ranked in predictor.rank_groups(groups, draws=None if len(groups) == 1 else LIFT_DRAWS)
    )
    if out is None and len(groups) == 1:
        _, ranked, words = next(results)
        click.echo("\n".join(_ranking_lines(ranked, words)))
        return
    with open_output(out) as write:
        for group, ranked, words in results:
            for row in ranking_rows(group.group, ranked, words, calibrated=predictor.calibration is not None):
                write(row)


def _groups_to_rank(
    info: RunInfo, titles: tuple[str, ...], context: str | None, columns: dict[str, Any]
) -> list[RankGroup]:
    """Groups from the arguments, from standard input (-), or from a file."""
    from loracle.data.formats import format_of
    from loracle.examples import RankGroup

    if len(titles) == 1 and titles[0] != "-" and _is_file(titles[0]):
        from loracle.runs.ranking import read_titles

        groups, issues = read_titles(titles[0], info, given({"context": context, **columns}))
        for issue in issues:
            terminal.note(f"note: {issue}")
        return groups
    if len(titles) == 1 and format_of(Path(titles[0])) is not None and " " not in titles[0]:
        raise UserError(f"There is no file {titles[0]}.", "Check the path.")
    if titles == ("-",):
        titles = tuple(_lines_of_stdin())
        if not titles:
            raise UserError("No titles on standard input.", "Pipe some in: loracle rank run - < titles.txt")
    distinct = tuple(dict.fromkeys(titles))
    if len(distinct) < len(titles):
        terminal.note(f"note: {len(titles) - len(distinct)} repeated titles are ranked once")
    return [RankGroup(group="", texts=distinct, rows=tuple(range(1, 1 + len(distinct))), context=context)]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # a title that is too long for a file name
        return False


def _lines_of_stdin() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            title = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise UserError(f"Line {number} of standard input is not UTF-8.", "Convert it to UTF-8.") from None
        if title:
            yield title


def _ranking_lines(ranked: list, words: list[WordScores] | None) -> list[str]:
    """A ranking as a table; below it, if there are ``words``, the score of each word."""
    from loracle.formatting import plain_table

    rows = []
    has_lift, has_matrix = ranked[0].lift is not None, len(ranked) <= MATRIX_TITLES
    if has_lift:
        opponents = [f"beats {j}" for j in range(1, len(ranked) + 1)] if has_matrix else []
        rows.append(["", "score", "lift", "95 %", *opponents, "title"])
    for position, r in enumerate(ranked, 1):
        chances = [f"{p:.0%}" if j != position else "" for j, p in enumerate(r.beats or (), 1)]
        lift = [f"{r.lift:+.0%}", f"{r.lift_low:+.0%} to {r.lift_high:+.0%}"] if has_lift else []
        rows.append([f"{position:>3}", f"{r.score:+.3f}", *lift, *(chances if has_matrix else []), r.text])
    lines = plain_table(rows).splitlines()
    if words is not None:
        lines += ["", "score lost without the word:"]
        for position, of_title in enumerate(words, 1):
            by_size = sorted(of_title, key=lambda word: -abs(word[1]))
            lines.append(f"{position:>3}  " + "  ".join(f"{word} {value:+.3f}" for word, value in by_size))
    return lines


@command()
@RUN_ARGUMENT
@DATA_ARGUMENT
@setting_options(DataConfig, only=EVALUATION_COLUMNS)
@BASE
@DEVICE
@JSON
def evaluate(run: Path, data: str, base: str | None, device: str, as_json: bool, **columns: Any) -> None:
    """Measure a run on labelled data.

    DATA is read like the training data of RUN, unless flags name other columns.
    """
    from loracle.data.sources import open_table
    from loracle.runs.folder import read_info
    from loracle.tasks.dataset import read_examples

    info, table = read_info(run), open_table(data)
    examples = read_examples(table, columns_of_run(info, table, given(columns)), task=info.task)
    for issue in examples.issues:
        terminal.note(f"note: {issue}")
    terminal.silence_libraries()
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
