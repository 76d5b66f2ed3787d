"""Two versions of a classifier or ranker on the same rows: what changed for whom, and whether another sample would agree."""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loracle.config import DataConfig
from loracle.data.columns import LABEL_NAMES, infer_columns, infer_text_column
from loracle.data.reader import iter_texts, read_examples, read_unlabelled_groups
from loracle.data.table import Table
from loracle.errors import UserError
from loracle.evaluation.calibration import Calibration
from loracle.evaluation.changes import BROKEN, MENDED, OTHER, GroupChange, class_changes, group_change, label_changes
from loracle.evaluation.classification import (
    as_json,
    differences,
    given_labels,
    headline_metric,
    probabilities,
    target_array,
)
from loracle.evaluation.ranking import paired_difference
from loracle.evaluation.significance import compare_rankers, credit, mcnemar
from loracle.examples import LabeledText, RankGroup, Task
from loracle.reporting.terminal import difference as signed
from loracle.reporting.terminal import figure, plain_table, shortened
from loracle.runs.folder import RunInfo, read_info
from loracle.runs.predictor import Predictor
from loracle.training import scoring

LISTED = 5  # rows of a kind that the terminal shows
LETTERS = 100  # of a text there
CLASSES = 12  # labels there, those that moved most


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The examples that both score; ``labelled`` says whether anything is known that tells right from wrong."""

    items: list[Any]  # all LabeledText, or all RankGroup
    labelled: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What changed. ``summary`` is plain JSON, ``rows`` one dictionary a text or group that changed, in their order."""

    task: Task
    summary: dict[str, Any]
    rows: list[dict[str, Any]]


def same_task(run_a: Path, run_b: Path) -> tuple[RunInfo, RunInfo]:
    """Both runs' settings.

    Raises:
        UserError: they do different jobs, or know different labels.
    """
    a, b = read_info(run_a), read_info(run_b)
    kinds = {"single": "a classifier (one label a text)", "multi": "a classifier (several labels a text)",
             "rank": "a ranker"}  # fmt: skip
    if a.task.kind != b.task.kind:
        found = f"{kinds[a.task.kind]} in {run_a}, {kinds[b.task.kind]} in {run_b}"
        raise UserError("two runs that do the same job", found, "evaluate each of them")
    if differing := sorted(set(a.task.label_names) ^ set(b.task.label_names)):
        only = run_a if differing[0] in a.task.label_names else run_b
        found = f"{len(differing)} that one of them lacks, as '{differing[0]}', which only {only} knows"
        raise UserError("two runs with the same labels", found, "evaluate each of them")
    return a, b


def read_rows(table: Table, data: DataConfig, task: Task) -> Rows:
    """Labelled rows where there are labels (or, of titles, anything that tells which is better), else plain ones.

    Raises:
        UserError: as ``read_examples``.
    """
    asked = data.label or data.clicks or data.impressions or data.clicked or data.grade
    why = None
    if task.kind == "rank":
        try:
            _, columns = infer_columns(table, data, task)
        except UserError as error:
            if asked:
                raise
            why = f"no {error.expected}"
    elif not asked and not {c.strip().lower() for c in table.columns} & set(LABEL_NAMES):
        why = "no column with the labels"
    if why is None:
        found = read_examples(table, data, task=task)
        return Rows(items=list(found.items), labelled=True, notes=tuple(map(str, found.issues)))
    columns = infer_text_column(table, data)
    said = f"{why} in {table.name}: only what changed is shown"
    if task.kind == "rank":
        groups, issues = read_unlabelled_groups(table, columns)
        return Rows(items=groups, labelled=False, notes=(said, *map(str, issues)))
    rows = list(iter_texts(table, columns))
    items = [LabeledText(text=t, labels=(), row=n, context=c) for n, _, t, c in rows if t is not None]
    if not items:
        raise UserError("texts to score", f"none in {table.name}", "name their column with --text")
    unread = (f"{len(rows) - len(items):,} rows without a text, skipped",) if len(items) < len(rows) else ()
    return Rows(items=items, labelled=False, notes=(said, *unread))


def compare(
    run_a: Path, run_b: Path, rows: Rows, *, bases: tuple[str | None, str | None] = (None, None), device: str = "auto"
) -> Difference:
    """Score the rows by both runs, one after the other so that only one base is in memory, and set them side by side.

    Raises:
        UserError: the runs do different jobs, or one of them cannot be loaded.
    """
    info, _ = same_task(run_a, run_b)
    task, names = info.task, info.task.label_names
    scores, calibrations = [], []
    for run, base in zip((run_a, run_b), bases, strict=True):
        predictor = Predictor(run, base=base, device=device)
        own = scoring.score_examples(predictor.scorer, predictor.encoder, rows.items)
        calibration = predictor.calibration
        if predictor.task.label_names != names:  # the same labels in another order
            order = [predictor.task.label_names.index(name) for name in names]
            own = [s[:, order] for s in own]
            thresholds = tuple(calibration.thresholds[i] for i in order) if calibration.thresholds else ()
            calibration = dataclasses.replace(calibration, thresholds=thresholds)
        scores.append(own)
        calibrations.append(calibration)
        del predictor
        gc.collect()
    if task.kind == "rank":
        return _of_rankers(scores[0], scores[1], rows, task)
    return _of_classifiers(scores[0], scores[1], rows, task, (calibrations[0], calibrations[1]))


def _of_classifiers(
    a: list[np.ndarray],
    b: list[np.ndarray],
    rows: Rows,
    task: Task,
    calibrations: tuple[Calibration, Calibration],
) -> Difference:
    logits = [np.concatenate(scores) for scores in (a, b)]
    proba = [probabilities(s, task, c) for s, c in zip(logits, calibrations, strict=True)]
    given = [given_labels(p, task, c) for p, c in zip(proba, calibrations, strict=True)]
    true: np.ndarray | None = None
    summary: dict[str, Any] = {"texts": len(rows.items)}
    if rows.labelled:
        same = [e.identity for e in rows.items]
        targets = target_array(rows.items, task)
        true = targets if task.kind == "multi" else np.arange(proba[0].shape[1]) == targets[:, None]
        paired = differences(logits[1], logits[0], targets, task, groups=same, calibrations=calibrations[::-1])
        right = [
            credit(s, rows.items, task) if task.kind == "single" else (g == true).all(axis=1)
            for s, g in zip(logits, given, strict=True)
        ]
        summary |= {
            "metrics_a": scoring.measure(a, rows.items, task, calibrations[0]),
            "metrics_b": scoring.measure(b, rows.items, task, calibrations[1]),
            "difference": as_json(paired),
            "test": {"name": "McNemar, exact", "metric": "accuracy", "p": mcnemar(right[1], right[0], same)},
        }
    changes = label_changes(given[0], given[1], true)
    summary |= {
        "changes": _counts(changes, rows.labelled),
        "classes": class_changes(given[0], given[1], true, task.label_names),
    }
    contexts = any(e.context for e in rows.items)
    changed = []
    for i, (e, change) in enumerate(zip(rows.items, changes, strict=True)):
        if change is None:
            continue
        row: dict[str, Any] = {"row": e.row, "change": change}
        if rows.labelled:
            row["label"] = "|".join(task.label_names[j] for j in e.labels)
        row |= {who: _names(g[i], task) for who, g in zip("ab", given, strict=True)}
        if task.kind == "single":
            row |= {f"p_{who}": round(float(p[i].max()), 4) for who, p in zip("ab", proba, strict=True)}
        changed.append(row | ({"context": e.context} if contexts else {}) | {"text": e.text})
    return Difference(task=task, summary=summary, rows=changed)


def _names(given: np.ndarray, task: Task) -> str:
    return "|".join(task.label_names[j] for j in np.flatnonzero(given))


def _counts(changes: Sequence[str | None], labelled: bool) -> dict[str, int]:
    counted = Counter(change for change in changes if change)
    known = {MENDED: counted[MENDED], BROKEN: counted[BROKEN], "wrong_both_times": counted[OTHER]}
    return {"changed": counted.total(), **(known if labelled else {})}


def _of_rankers(a: list[np.ndarray], b: list[np.ndarray], rows: Rows, task: Task) -> Difference:
    flat = [[s[:, 0] for s in scores] for scores in (a, b)]
    summary: dict[str, Any] = {"groups": len(rows.items)}
    if rows.labelled:
        paired = compare_rankers(flat[1], flat[0], rows.items)
        summary |= {
            "metrics_a": scoring.measure(a, rows.items, task),
            "metrics_b": scoring.measure(b, rows.items, task),
            "difference": as_json(paired_difference(flat[1], flat[0], rows.items)),
            "test": {"name": "bootstrap over groups", "metric": paired.metric, "p": paired.p},
        }
    changes = [group_change(x, y, group) for x, y, group in zip(*flat, rows.items, strict=True)]
    counted = {name: sum(getattr(c, name) for c in changes) for name in ("pick_changed", "pairs", "turned")}
    counted["order_changed"] = sum(c.turned > 0 for c in changes)
    if rows.labelled:
        counted |= {name: sum(getattr(c, name) for c in changes) for name in ("decided", "mended", "broken")}
    summary["changes"] = counted
    changed = [_group_row(c, group, rows.labelled) for c, group in zip(changes, rows.items, strict=True) if c.turned]
    return Difference(task=task, summary=summary, rows=changed)


def _group_row(change: GroupChange, group: RankGroup, labelled: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "group": group.group,
        "row": group.rows[0],
        "change": "pick" if change.pick_changed else "order",
    }
    row |= {"turned": change.turned, "pairs": change.pairs}
    if labelled:
        row |= {"mended": change.mended, "broken": change.broken}
    orders = {"a": change.order_a, "b": change.order_b}
    row |= {f"pick_{who}": group.texts[order[0]] for who, order in orders.items()}
    return row | {f"order_{who}": [group.texts[i] for i in order] for who, order in orders.items()}


# --- for the terminal -------------------------------------------------------------------------------------------------


def lines(found: Difference, run_a: Path, run_b: Path) -> list[str]:
    """The difference for a terminal; every row that changed is in ``found.rows``."""
    summary, unit = found.summary, found.task.unit
    said = [f"{summary[unit]:,} {unit}; A is {run_a}, B is {run_b}"]
    if "difference" in summary:
        said += ["", plain_table(_metric_table(found)), "", _told(found)]
    said += ["", *(_ranker_lines(found) if found.task.kind == "rank" else _classifier_lines(found))]
    return said + _some_rows(found)


def _metric_table(found: Difference) -> list[list[str]]:
    """Each metric of A and B with its interval, and of the difference where it can be resampled in pairs."""
    a, b, gap = (found.summary[name] for name in ("metrics_a", "metrics_b", "difference"))
    twice = {"accuracy"} if found.task.kind == "multi" else set()  # there it is the subset accuracy
    names = [n for n, value in a.items() if isinstance(value, dict) and value["value"] is not None and n not in twice]
    rows = [[n, figure(a[n], n), figure(b[n], n), signed(gap[n], n) if n in gap else ""] for n in names if n in b]
    return [["", "A", "B", "B − A"], *rows]


def _told(found: Difference) -> str:
    """Whether the two can be told apart."""
    test, name = found.summary["test"], headline_metric(found.task) if found.task.kind == "rank" else "accuracy"
    gap, p = found.summary["difference"][name], test["p"]
    verdict = "not told apart" if p >= 0.05 or not gap["value"] else "B is better" if gap["value"] > 0 else "B is WORSE"
    return f"{name.replace('_', ' ')}: {signed(gap, name)} points, p = {p:.2g} ({test['name']}): {verdict}"


def _classifier_lines(found: Difference) -> list[str]:
    counts, texts = found.summary["changes"], found.summary["texts"]
    said = f"labels: {counts['changed']:,} of {texts:,} texts changed ({counts['changed'] / texts:.1%})"
    if "difference" in found.summary:
        said += (
            f": {counts[MENDED]:,} mended, {counts[BROKEN]:,} broken, {counts['wrong_both_times']:,} wrong both times"
        )
    classes = found.summary["classes"]
    if not classes:
        return [said]
    columns = [c for c in ("texts", "mended", "broken", "given_a", "given_b", "false_a", "false_b") if c in classes[0]]
    head = ["", *(c.replace("_a", " A").replace("_b", " B") for c in columns)]
    table = [head, *([row["label"], *(f"{row[c]:,}" for c in columns)] for row in classes[:CLASSES])]
    more = [f"… and {len(classes) - CLASSES} labels more"] if len(classes) > CLASSES else []
    return [said, "", plain_table(table), *more]


def _ranker_lines(found: Difference) -> list[str]:
    counts, groups = found.summary["changes"], found.summary["groups"]
    same = 1 - counts["turned"] / max(1, counts["pairs"])
    said = [
        f"groups: {counts['order_changed']:,} of {groups:,} in another order, {counts['pick_changed']:,} with another pick; "
        f"{same:.1%} of pairs of titles as before"
    ]
    if "difference" in found.summary:
        said.append(
            f"pairs with a winner: {counts['mended']:,} mended, {counts['broken']:,} broken, of {counts['decided']:,}"
        )
    return said


def _some_rows(found: Difference) -> list[str]:
    """The first few of each kind, broken ones first."""
    said = []
    if found.task.kind == "rank":
        rows = sorted(
            found.rows, key=lambda row: (row["change"] != "pick", row.get("mended", 0) - row.get("broken", 0))
        )
        for row in rows[: 2 * LISTED]:
            where = f"group {row['group']}" if row["group"] else f"row {row['row']}"
            told = f", {row['mended']} mended, {row['broken']} broken" if "mended" in row else ""
            said.append(f"{where}: {row['change']} changed{told}")
            said += [f"    {who}  {_short(row[f'pick_{who.lower()}'])}" for who in "AB"]
    else:
        for kind in (BROKEN, MENDED, OTHER):
            for row in [row for row in found.rows if row["change"] == kind][:LISTED]:
                label = f", labelled {row['label']}" if "label" in row and kind == OTHER else ""
                said.append(
                    f"{kind:<7}  row {row['row']}: {row['a'] or '–'} → {row['b'] or '–'}{label}  {_short(row['text'])}"
                )
    return ["", *said] if said else []


def _short(text: str) -> str:
    return shortened(" ".join(text.split()), LETTERS)
