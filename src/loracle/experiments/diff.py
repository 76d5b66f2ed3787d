"""Two runs on the same rows: which answers changed, and whether the difference is more than chance."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.config import DataConfig
from loracle.data.columns import infer_text_column
from loracle.data.table import Table
from loracle.errors import UserError
from loracle.evaluation.intervals import as_json
from loracle.formatting import plain_table
from loracle.reporting.terminal import difference as signed
from loracle.reporting.terminal import figure
from loracle.runs.folder import RunInfo, read_info
from loracle.runs.predictor import Predictor
from loracle.tasks import Task
from loracle.tasks.dataset import read_examples
from loracle.training import scoring


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The examples that both runs score, and whether anything in them tells right from wrong."""

    items: list[Any]
    labeled: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What changed: ``summary`` is plain JSON, ``rows`` has a dictionary for each example that changed, in their order."""

    task: Task
    summary: dict[str, Any]
    rows: list[dict[str, Any]]


def check_same_task(run_a: Path, run_b: Path) -> tuple[RunInfo, RunInfo]:
    """The settings of both runs.

    Raises:
        UserError: their tasks or their labels differ.
    """
    a, b = read_info(run_a), read_info(run_b)
    if a.task.name != b.task.name:
        kinds = [f"{run} is {info.task.reading.description}" for run, info in ((run_a, a), (run_b, b))]
        raise UserError(f"The runs have different tasks: {kinds[0]}, {kinds[1]}.", "Evaluate each of them.")
    if differing := sorted(set(a.task.label_names) ^ set(b.task.label_names)):
        only = run_a if differing[0] in a.task.label_names else run_b
        raise UserError(
            f"The runs have different labels ({len(differing)} differ): only {only} has '{differing[0]}'.",
            "Evaluate each of them.",
        )
    return a, b


def read_rows(table: Table, data: DataConfig, task: Task) -> Rows:
    """Labelled examples where there is something that tells right from wrong, else plain ones.

    Raises:
        UserError: as ``read_examples``.
    """
    missing = task.reading.missing_evidence(table, data)
    if missing is None:
        examples = read_examples(table, data, task=task)
        return Rows(items=list(examples.items), labeled=True, notes=tuple(map(str, examples.issues)))
    items, notes = task.reading.read_unlabeled(table, infer_text_column(table, data))
    note = f"{table.name} has {missing}: only changes are shown"
    return Rows(items=items, labeled=False, notes=(note, *notes))


def compare(
    run_a: Path, run_b: Path, rows: Rows, *, bases: tuple[str | None, str | None] = (None, None), device: str = "auto"
) -> Difference:
    """Score the rows with both runs, one after the other so that only one base is in memory, and compare.

    Raises:
        UserError: the runs have different tasks, or one of them cannot be loaded.
    """
    task = check_same_task(run_a, run_b)[0].task
    a, calibration_a = _scored(run_a, rows, task, bases[0], device)
    b, calibration_b = _scored(run_b, rows, task, bases[1], device)
    evaluation, calibrations = task.evaluation, (calibration_b, calibration_a)
    summary: dict[str, Any] = {task.unit: len(rows.items)}
    if rows.labeled:
        paired = evaluation.compare(b, a, rows.items, task, calibrations)
        summary |= {
            "metrics_a": scoring.measure(a, rows.items, task, calibration_a),
            "metrics_b": scoring.measure(b, rows.items, task, calibration_b),
            "difference": as_json(evaluation.differences(b, a, rows.items, task, calibrations)),
            "test": {"name": paired.test, "metric": paired.metric, "p": paired.p},
        }
    changes, changed = task.output.changes.compare(
        a, b, rows.items, task, calibrations=(calibration_a, calibration_b), labeled=rows.labeled
    )
    return Difference(task=task, summary=summary | changes, rows=changed)


def _scored(run: Path, rows: Rows, task: Task, base: str | None, device: str) -> tuple[list[Any], Any]:
    """Scores and calibration of a run, its labels in the order of ``task``."""
    predictor = Predictor(run, base=base, device=device)
    scores = scoring.score_examples(predictor.scorer, predictor.encoder, rows.items)
    names, calibration = predictor.task.label_names, predictor.calibration
    del predictor
    gc.collect()
    return task.evaluation.reorder(scores, calibration, names, task)


def lines(difference: Difference, run_a: Path, run_b: Path) -> list[str]:
    """The difference for a terminal. Every row that changed is in ``difference.rows``."""
    summary, unit = difference.summary, difference.task.unit
    text = [f"{summary[unit]:,} {unit}; A is {run_a}, B is {run_b}"]
    if "difference" in summary:
        text += ["", plain_table(_metric_table(summary)), "", _conclusion(summary)]
    return [*text, "", *difference.task.output.changes.lines(summary, difference.rows)]


def _metric_table(summary: dict[str, Any]) -> list[list[str]]:
    """Each metric of A and B with its interval, and their difference where it can be resampled in pairs."""
    a, b, gap = (summary[name] for name in ("metrics_a", "metrics_b", "difference"))
    repeated = {"accuracy"} if "subset_accuracy" in a else set()  # the same figure under two names
    names = [n for n, v in a.items() if isinstance(v, dict) and v["value"] is not None and n not in repeated]
    rows = [[n, figure(a[n], n), figure(b[n], n), signed(gap[n], n) if n in gap else ""] for n in names if n in b]
    return [["", "A", "B", "B − A"], *rows]


def _conclusion(summary: dict[str, Any]) -> str:
    """Whether the difference is significant."""
    test = summary["test"]
    name, p = test["metric"], test["p"]
    gap = summary["difference"][name]
    result = "no significant difference" if p >= 0.05 or not gap["value"] else "B is better"
    if p < 0.05 and gap["value"] and gap["value"] < 0:
        result = "B is WORSE"
    return f"{name.replace('_', ' ')}: {signed(gap, name)} points, p = {p:.2g} ({test['name']}): {result}"
