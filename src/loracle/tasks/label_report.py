"""Sections of a classifier's report, computed from test scores.

Legend of shapes: N texts, C labels.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from loracle.evaluation.calibration import UNCALIBRATED, Calibration
from loracle.evaluation.classification import calibration_bins
from loracle.evaluation.intervals import Array, bootstrap, ratio, sum_by_unit, units_of
from loracle.evaluation.label_errors import label_errors, label_errors_of_sets, out_of_fold
from loracle.evaluation.labels import Labels
from loracle.examples import LabeledText
from loracle.formatting import shortened

LISTED = 20  # texts in a list
LETTERS = 400  # characters shown of a text
NAMED = 60  # characters shown of a value of a column
CONFUSED = 12  # classes up to which the confusion matrix is complete; of more, those confused most
POINTS = 40  # of the coverage curve
SLICE_TEXTS = 5  # a script or a value of a column with fewer texts is no slice of its own
SLICES = 20  # values of a column that are slices of their own
SEARCHED = 10_000  # training texts among which label errors are searched, at most


def label_sections(
    logits: np.ndarray,
    examples: Sequence[LabeledText],
    names: Sequence[str],
    labels: Labels,
    calibration: Calibration | None,
) -> dict[str, Any]:
    """All sections of test logits ``[N, C]``."""
    used = calibration or UNCALIBRATED
    targets = labels.targets(examples, len(names))
    before, proba = labels.probabilities(logits), labels.probabilities(logits, used)
    assigned, true = labels.assigned(proba, used), labels.indicator(targets, len(names))
    right = (assigned == true).all(axis=1)
    sections: dict[str, Any] = {
        "classes": class_table(assigned, true, names),
        "errors": worst_errors(proba, assigned, examples, names, labels),
        "slices": slices(right, examples),
        "reliability": {
            name: reliability(*(a.ravel() for a in labels.claims(p, targets)))
            for name, p in (("before", before), ("after", proba))
        },
        "label_errors": {"test": label_error_rows(proba, examples, names, labels)},
        "coverage": coverage(labels.confidence(proba, assigned), right.astype(np.float64)),
        "thresholds": dict(zip(names, used.thresholds, strict=False)),
    }
    if targets.ndim == 1:
        sections["confusion"] = confusion(assigned.argmax(1), targets, names)
    return sections


def class_table(assigned: np.ndarray, true: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each label, the most frequent first. None where they are undefined."""
    hits, predicted, support = (part.sum(axis=0).astype(np.float64) for part in (assigned & true, assigned, true))
    figures = (ratio(hits, predicted), ratio(hits, support), ratio(2 * hits, predicted + support))
    rows = [
        {"label": name, "texts": int(support[c]), "predicted": int(predicted[c])}
        | {k: _number(v[c]) for k, v in zip(("precision", "recall", "f1"), figures, strict=True)}
        for c, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: -row["texts"])


def confusion(predicted: np.ndarray, targets: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Counts ``[true][predicted]``, and the pairs of classes that are confused most.

    Of many classes only those with the most errors have a row. The others share the last one.
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
    """Number of texts, mean confidence and share right of each bin of equal mass."""
    bins = calibration_bins(confidence)
    members = [bins == k for k in np.unique(bins)]
    return [
        {"texts": int(m.sum()), "confidence": float(confidence[m].mean()), "accuracy": float(right[m].mean())}
        for m in members
    ]


def coverage(confidence: Array, right: Array) -> list[dict[str, float]]:
    """Share of texts labelled, and their accuracy, for thresholds of ``--abstain-below`` from high to low.

    Thresholds are rounded down to the six digits that the page shows, so a copied threshold labels the same texts.
    """
    steps = np.unique(np.floor(confidence * 1e6) / 1e6)[::-1]
    chosen = steps[np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))]
    labelled = [confidence >= threshold for threshold in chosen]
    return [
        {"threshold": float(t), "coverage": float(sure.mean()), "accuracy": float(right[sure].mean())}
        for t, sure in zip(chosen, labelled, strict=True)
    ]


def worst_errors(
    proba: Array, assigned: np.ndarray, examples: Sequence[LabeledText], names: Sequence[str], labels: Labels
) -> list[dict[str, Any]]:
    """Wrongly labelled texts. Those whose true labels got the lowest probability come first."""
    targets = labels.targets(examples, len(names))
    true = labels.indicator(targets, len(names))
    likelihood = np.where(true, proba, 1.0 if targets.ndim == 1 else 1 - proba)
    surprise = -np.log(np.maximum(likelihood, 1e-300)).sum(axis=1)
    wrong = np.flatnonzero((assigned != true).any(axis=1))
    return [
        _row(examples[i], names) | {"predicted": _joined(assigned[i], names), "probability": float(proba[i].max())}
        for i in wrong[np.argsort(-surprise[wrong], kind="stable")][:LISTED]
    ]


def label_error_section(
    examples: Sequence[LabeledText], names: Sequence[str], labels: Labels, *, seed: int
) -> dict[str, Any]:
    """Likely label errors of training texts, by cross-validation of a TF-IDF classifier on at most ``SEARCHED`` of them."""
    order = np.sort(np.random.default_rng(seed).permutation(len(examples))[:SEARCHED])
    sample = [examples[i] for i in order.tolist()]
    return label_error_rows(out_of_fold(sample, labels, len(names), seed=seed), sample, names, labels)


def label_error_rows(
    proba: Array, examples: Sequence[LabeledText], names: Sequence[str], labels: Labels
) -> dict[str, Any]:
    """Likely label errors: how many, of how many labels, and the first ones.

    Where a text can have several labels, each pair of text and label counts.
    """
    targets = labels.targets(examples, len(names))
    if targets.ndim == 1:
        errors = label_errors(proba, targets)
        rows = [
            _row(examples[i], names)
            | {"rather": names[proba[i].argmax()], "probability": float(proba[i].max())}
            | {"given": float(proba[i, targets[i]])}
            for i in errors[:LISTED].tolist()
        ]
    else:
        errors = label_errors_of_sets(proba, targets)
        rows = [
            _row(examples[i], names) | _doubted(names[c], bool(targets[i, c]), float(proba[i, c]))
            for i, c in errors[:LISTED].tolist()
        ]
    return {"count": len(errors), "of": targets.size, "rows": rows}


def _doubted(name: str, has: bool, proba: float) -> dict[str, Any]:
    """One label of one text: the label as given, the likelier one, and their probabilities."""
    label, rather, given = (name, f"not {name}", proba) if has else (f"not {name}", name, 1 - proba)
    return {"label": label, "rather": rather, "probability": 1 - given, "given": given}


def slices(right: np.ndarray, examples: Sequence[LabeledText]) -> list[dict[str, Any]]:
    """Accuracy by column values, by length in thirds, and by script, with bootstrap intervals over distinct texts.

    Columns show their most frequent values; the rest is one slice.
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
    """The script of most letters, by their Unicode names: ``latin``, ``cyrillic``, ``cjk``; ``none`` without letters.

    A script is not a language: English and French share one.
    """
    letters = Counter(unicodedata.name(c, "other").split(" ")[0].split("-")[0] for c in text[:LETTERS] if c.isalpha())
    return letters.most_common(1)[0][0].lower() if letters else "none"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _row(example: LabeledText, names: Sequence[str]) -> dict[str, Any]:
    labels = ", ".join(names[i] for i in example.labels) or "none"
    return {"row": example.row, "text": shortened(example.text, LETTERS), "label": labels}


def _joined(assigned: np.ndarray, names: Sequence[str]) -> str:
    return ", ".join(names[i] for i in np.flatnonzero(assigned).tolist()) or "none"
