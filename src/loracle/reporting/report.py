"""What the report of a run says, as plain values: ``report.json`` holds it, and ``page`` draws nothing else.

``metrics`` in it is the run's metrics.json, whole; all else is worked out here from the same test scores.

Legend of shapes: N texts, C labels.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from loracle.baselines.budget import SEARCHED
from loracle.evaluation.calibration import Calibration
from loracle.evaluation.classification import (
    UNCALIBRATED,
    Array,
    bootstrap,
    calibration_bins,
    claims,
    confidence_of,
    given_labels,
    headline_metric,
    lead,
    probabilities,
    ratio,
    sum_by_unit,
    target_array,
    units_of,
)
from loracle.evaluation.label_errors import out_of_fold, pair_suspects, suspects
from loracle.evaluation.ranking import paired_difference
from loracle.examples import LabeledText, RankGroup, Task
from loracle.reporting.terminal import ceiling_line, result_rows, shortened

LISTED = 20  # texts a list shows
LETTERS = 400  # characters of a text that are shown
NAMED = 60  # of the value of a column
CONFUSED = 12  # classes up to which the confusion matrix is whole; of more, those confused most
GROUPS = 6  # example groups of a ranker, half of them where it did worst
POINTS = 40  # of the coverage curve
GAPS = {"under_10": "under 10 %", "10_to_25": "10 to 25 %", "25_to_50": "25 to 50 %", "over_50": "over 50 %"}
SLICE_TEXTS = 5  # a script or a value of a column with fewer texts is no slice of its own
SLICES = 20  # values of a column that are slices of their own


def verdict(
    scores: Sequence[np.ndarray], rivals: Mapping[str, Sequence[np.ndarray]], metrics: Mapping[str, Any],
    examples: Sequence[Any], task: Task,
) -> dict[str, Any]:  # fmt: skip
    """Whether the model beats the baseline that is best on the same test side, by the bootstrap in pairs."""
    name = headline_metric(task)
    known = {who: metrics["baselines"][who][name]["value"] for who in rivals}
    known = {who: value for who, value in known.items() if value is not None}
    own, spoken = metrics["test"][name]["value"], name.replace("_", " ").replace("map", "mean average precision")
    if own is None or not known:
        why = "no baseline was measured" if own is not None else "nothing on the test side tells right from wrong"
        return {"beats": None, "text": f"Not compared: {why}."}
    best = max(known, key=known.__getitem__)
    gap = _lead(scores, rivals[best], examples, task).to_json()
    ahead = (
        f"{spoken} {100 * own:.1f} % against {100 * known[best]:.1f} %, "
        f"{100 * gap['value']:+.1f} points [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
    )
    beats = gap["low"] > 0
    if beats:
        text = f"The model beats the best baseline ({best}): {ahead}."
    elif gap["high"] < 0:
        text = f"The model is WORSE than the best baseline ({best}): {ahead}. Do not use it as it is."
    else:
        text = f"The model does NOT reliably beat the best baseline ({best}): {ahead}; the interval includes 0."
    return {"beats": bool(beats), "text": text, "baseline": best, "lead": gap}


def _lead(a: Sequence[np.ndarray], b: Sequence[np.ndarray], examples: Sequence[Any], task: Task) -> Any:
    if task.kind == "rank":
        return paired_difference([s[:, 0] for s in a], [s[:, 0] for s in b], examples)[headline_metric(task)]
    same = [e.identity for e in examples]
    return lead(np.concatenate(a), np.concatenate(b), target_array(examples, task), task, groups=same)


def build_report(
    scores: Sequence[np.ndarray],
    examples: Sequence[Any],
    task: Task,
    metrics: Mapping[str, Any],
    rivals: Mapping[str, Sequence[np.ndarray]],
    calibration: Calibration | None,
) -> dict[str, Any]:
    """All that the test side shows; ``rivals`` are the baselines' scores of it."""
    found: dict[str, Any] = {
        "task": task.kind,
        "verdict": verdict(scores, rivals, metrics, examples, task),
        "headline": headline_metric(task),
        "table": result_rows(metrics, task.kind),
        "ceiling": ceiling_line(metrics["test"]),
        "metrics": metrics,
        "calibration": asdict(calibration) if calibration else None,
        "thresholds": dict(zip(task.label_names, calibration.thresholds, strict=False)) if calibration else {},
    }
    if task.kind == "rank":
        gaps = [(spoken, metrics["test"].get(f"pair_accuracy_gap_{name}")) for name, spoken in GAPS.items()]
        groups = example_groups([s[:, 0] for s in scores], examples)
        return found | {"gaps": [gap for gap in gaps if gap[1]], "groups": groups}
    logits, targets = np.concatenate(scores), target_array(examples, task)
    proba = probabilities(logits, task, calibration or UNCALIBRATED)
    given = given_labels(proba, task, calibration or UNCALIBRATED)
    true = targets if task.kind == "multi" else np.arange(proba.shape[1]) == targets[:, None]
    found |= {
        "classes": class_table(given, true, task.label_names),
        "errors": worst_errors(proba, given, true, examples, task),
        "slices": slices((given == true).all(axis=1), examples),
    }
    before = probabilities(logits, task)
    found |= {
        "reliability": {
            name: reliability(*(a.ravel() for a in claims(p, targets, task)))
            for name, p in (("before", before), ("after", proba))
        },
        "suspects": {"test": suspect_rows(proba, targets, examples, task)},
    }
    right = (given == true).all(axis=1).astype(np.float64)
    found["coverage"] = coverage(confidence_of(proba, given, task), right)
    if task.kind == "single":
        found["confusion"] = confusion(given.argmax(1), targets, task.label_names)
    return found


# --- classifiers ------------------------------------------------------------------------------------------------------


def class_table(given: np.ndarray, true: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each label, the most frequent first; null where there is nothing to divide by."""
    hits, predicted, support = ((part).sum(axis=0).astype(np.float64) for part in (given & true, given, true))
    figures = (ratio(hits, predicted), ratio(hits, support), ratio(2 * hits, predicted + support))
    rows = [
        {"label": name, "texts": int(support[c]), "predicted": int(predicted[c])}
        | {k: _number(v[c]) for k, v in zip(("precision", "recall", "f1"), figures, strict=True)}
        for c, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: -row["texts"])


def confusion(predicted: np.ndarray, targets: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Counts ``[true][predicted]``; of many classes those with the most errors, the others in one last row and column.

    Beside it the pairs of classes that are confused most, of all.
    """
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (targets, predicted), 1)
    wrong = counts - np.diag(np.diag(counts))
    shown = np.arange(len(names))
    if len(names) > CONFUSED:
        shown = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:CONFUSED])
    place = np.full(len(names), len(shown))
    place[shown] = np.arange(len(shown))
    grouped = np.zeros((len(shown) + 1, len(shown) + 1), dtype=int)
    np.add.at(grouped, (place[targets], place[predicted]), 1)
    whole = len(shown) == len(names)
    pairs = [(int(wrong[i, j]), int(i), int(j)) for i, j in np.argwhere(wrong)]
    return {
        "labels": [names[i] for i in shown.tolist()] + ([] if whole else [f"{len(names) - len(shown)} others"]),
        "counts": (grouped[:-1, :-1] if whole else grouped).tolist(),
        "pairs": [
            {"count": n, "true": names[i], "predicted": names[j]} for n, i, j in sorted(pairs, key=lambda p: -p[0])[:10]
        ],
    }


def reliability(confidence: Array, right: Array) -> list[dict[str, float]]:
    """Of each equal-mass bin: its texts, their mean confidence, and the share that is right."""
    bins = calibration_bins(confidence)
    held = [bins == k for k in np.unique(bins)]
    return [
        {"texts": int(h.sum()), "confidence": float(confidence[h].mean()), "accuracy": float(right[h].mean())}
        for h in held
    ]


def coverage(confidence: Array, right: Array) -> list[dict[str, float]]:
    """What ``--abstain-below`` buys: for thresholds from high to low, the share of texts labelled, and their accuracy.

    Thresholds have the six digits that the page shows, rounded down, so that they label what they are said to.
    """
    steps = np.unique(np.floor(confidence * 1e6) / 1e6)[::-1]
    chosen = steps[np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))]
    labelled = [confidence >= threshold for threshold in chosen]
    return [
        {"threshold": float(t), "coverage": float(sure.mean()), "accuracy": float(right[sure].mean())}
        for t, sure in zip(chosen, labelled, strict=True)
    ]


def worst_errors(
    proba: Array, given: np.ndarray, true: np.ndarray, examples: Sequence[LabeledText], task: Task
) -> list[dict[str, Any]]:
    """Wrongly labelled texts, those first whose true labels the model held for least likely."""
    likelihood = np.where(true, proba, 1 - proba if task.kind == "multi" else 1.0)
    loss = -np.log(np.maximum(likelihood, 1e-300)).sum(axis=1)
    wrong = np.flatnonzero((given != true).any(axis=1))
    return [
        _row(examples[i], task) | {"predicted": _names(given[i], task), "probability": float(proba[i].max())}
        for i in wrong[np.argsort(-loss[wrong], kind="stable")][:LISTED]
    ]


def suspect_rows(proba: Array, targets: np.ndarray, examples: Sequence[LabeledText], task: Task) -> dict[str, Any]:
    """Labels that are likely wrong: how many, of how many, and the first ones; of several, each label of a text is one."""
    if task.kind == "multi":
        pairs = pair_suspects(proba, targets)
        return {"count": len(pairs), "of": targets.size, "rows": [
            _row(examples[i], task) | _doubted(task.label_names[c], bool(targets[i, c]), float(proba[i, c]))
            for i, c in pairs[:LISTED].tolist()
        ]}  # fmt: skip
    found = suspects(proba, targets)
    rows = [
        _row(examples[i], task)
        | {"rather": task.label_names[proba[i].argmax()], "probability": float(proba[i].max()),
           "given": float(proba[i, targets[i]])}
        for i in found[:LISTED]
    ]  # fmt: skip
    return {"count": len(found), "of": len(examples), "rows": rows}


def _doubted(name: str, has: bool, proba: float) -> dict[str, Any]:
    """Of one label of a text: what stands there, what it rather is, and how likely each is."""
    yes, no = name, f"not {name}"
    label, rather, given = (yes, no, proba) if has else (no, yes, 1 - proba)
    return {"label": label, "rather": rather, "probability": 1 - given, "given": given}


def training_suspects(
    examples: Sequence[LabeledText], task: Task, *, seed: int, searched: int = SEARCHED
) -> dict[str, Any]:
    """The same on the training side, by cross-validation of a TF-IDF classifier on ``searched`` of the texts."""
    order = np.sort(np.random.default_rng(seed).permutation(len(examples))[:searched])
    some = [examples[i] for i in order.tolist()]
    return suspect_rows(out_of_fold(some, task, seed=seed), target_array(some, task), some, task)


def slices(right: np.ndarray, examples: Sequence[LabeledText]) -> list[dict[str, Any]]:
    """Accuracy by the columns that examples name, by length, in thirds of the texts, and by script, each with a bootstrap
    interval over distinct texts. Columns show their most frequent values, and what is left as one slice.
    """
    named: list[tuple[str, str, np.ndarray]] = []
    for column in dict.fromkeys(name for e in examples for name, _ in e.slices):
        values = np.array([shortened(dict(e.slices).get(column, "none"), NAMED) for e in examples])
        counts = Counter(values.tolist())
        shown = [value for value, n in counts.most_common(SLICES) if n >= SLICE_TEXTS]
        if shown and len(counts) > 1:
            named += [(column, value, values == value) for value in shown]
            named.append((column, f"{len(counts) - len(shown)} others", ~np.isin(values, shown)))
    length = np.array([len(e.text) for e in examples])
    first, second = (int(q) for q in np.quantile(length, (1 / 3, 2 / 3), method="lower"))
    parts = [
        *named,
        ("length", f"up to {first:,} characters", length <= first),
        ("length", f"{first + 1:,} to {second:,}", (length > first) & (length <= second)),
        ("length", f"over {second:,}", length > second),
    ]
    scripts = np.array([script(e.text) for e in examples])
    if len(common := [s for s, n in Counter(scripts.tolist()).most_common() if n >= SLICE_TEXTS]) > 1:
        parts += [("script", name, scripts == name) for name in common]
    parts = [part for part in parts if part[2].any()]
    unit, units = units_of([e.identity for e in examples], len(examples))
    inside = np.stack([part for _, _, part in parts], axis=1)
    hits, texts = (sum_by_unit(rows, unit, units) for rows in (inside & right[:, None], inside))

    def statistics(weights: Array) -> dict[str, Array]:
        shares = ratio(weights @ hits, weights @ texts)
        return {str(k): shares[:, k] for k in range(len(parts))}

    found = bootstrap(statistics, units)
    return [
        {"by": by, "slice": name, "texts": int(part.sum()), "accuracy": found[str(k)].to_json()}
        for k, (by, name, part) in enumerate(parts)
    ]


def script(text: str) -> str:
    """The script of most letters, by Unicode's names for them: ``latin``, ``cyrillic``, ``cjk`` …; ``none`` without any.

    Not the language, which takes a model of its own: English and French are one script.
    """
    letters = Counter(unicodedata.name(c, "other").split(" ")[0].split("-")[0] for c in text[:LETTERS] if c.isalpha())
    return letters.most_common(1)[0][0].lower() if letters else "none"


# --- rankers ----------------------------------------------------------------------------------------------------------


def example_groups(scores: Sequence[Array], groups: Sequence[RankGroup]) -> list[dict[str, Any]]:
    """A few groups, best score first: those in which the pick lost most to the best title, then those it lost least in."""
    worth = [_worth(group) for group in groups]
    told = [i for i, w in enumerate(worth) if w is not None and w.max() > w.min()]

    def lost(i: int) -> float:
        w = worth[i]
        assert w is not None
        return float((w.max() - w[np.argmax(scores[i])]) / max(abs(w.max()), 1e-12))

    by_loss = sorted(told, key=lost, reverse=True)
    half = GROUPS // 2
    chosen = [("lost most", i) for i in by_loss[:half]] + [("lost least", i) for i in by_loss[half:][-half:]]
    return [{"why": why, **_group(scores[i], groups[i])} for why, i in chosen]


def _worth(group: RankGroup) -> Array | None:
    """What evidence says of each title: click rate, grade, or how often it was preferred; None without."""
    if group.clicks is not None:
        return np.array(group.clicks) / np.maximum(np.array(group.impressions), 1)
    if group.grades is not None:
        return np.array(group.grades, dtype=np.float64)
    if not group.preferences:
        return None
    wins = np.zeros(len(group.texts))
    for preference in group.preferences:
        wins[preference.winner] += 1
        wins[preference.loser] -= 1
    return wins


def _group(scores: Array, group: RankGroup) -> dict[str, Any]:
    def title(i: int) -> dict[str, Any]:
        known: dict[str, Any] = {
            "text": shortened(group.texts[i], LETTERS),
            "row": group.rows[i],
            "score": float(scores[i]),
        }
        if group.clicks is not None and group.impressions is not None:
            shown = group.impressions[i]
            known |= {"impressions": shown, "clicks": group.clicks[i], "rate": group.clicks[i] / max(shown, 1)}
        elif group.grades is not None:
            known["grade"] = group.grades[i]
        else:
            known["won"] = sum(p.winner == i for p in group.preferences)
        return known

    best_first = np.argsort(-scores, kind="stable")[:LISTED]
    return {"group": str(group.group), "context": group.context and shortened(group.context, LETTERS),
            "titles": [title(int(i)) for i in best_first], "of": len(scores)}  # fmt: skip


# --- without texts ----------------------------------------------------------------------------------------------------


def without_texts(found: dict[str, Any]) -> dict[str, Any]:
    """The same findings with the rows of the data where its texts, contexts and names of groups stood."""
    suspected = [side["rows"] for side in found.get("suspects", {}).values()]
    for row in [row for rows in (found.get("errors", []), *suspected) for row in rows]:
        row["text"] = f"row {row['row']}"
    for number, group in enumerate(found.get("groups", []), 1):
        group |= {"group": str(number), "context": None}
        for title in group["titles"]:
            title["text"] = f"row {title['row']}"
    return found


# --- the run ----------------------------------------------------------------------------------------------------------


def curves(log: Path) -> dict[str, list[dict[str, float]]]:
    """What ``log.jsonl`` holds: the loss of each step, and the looks at the validation side; numbers only, no NaN."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []

    def of(*names: str) -> list[dict[str, float]]:
        return [
            {n: r[n] for n in ("step", *names)} for r in records if all(np.isfinite(r.get(n, np.nan)) for n in names)
        ]

    return {"steps": of("loss"), "looks": of("validation_metric", "validation_loss")}


# --- small things -----------------------------------------------------------------------------------------------------


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _row(example: LabeledText, task: Task) -> dict[str, Any]:
    names = ", ".join(task.label_names[i] for i in example.labels) or "none"
    return {"row": example.row, "text": shortened(example.text, LETTERS), "label": names}


def _names(given: np.ndarray, task: Task) -> str:
    return ", ".join(task.label_names[i] for i in np.flatnonzero(given)) or "none"
