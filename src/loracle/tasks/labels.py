"""The parts that tasks with labels share: one label a text, or any number of them.

Legend of shapes: N texts, C labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import logit

from loracle.config import DataConfig
from loracle.data.checks import Counts, check_labels, class_counts, class_lines, label_issues, remove_leaked_texts
from loracle.data.columns import LABEL_NAMES, Columns, label_columns
from loracle.data.issues import Issue, IssueLog
from loracle.data.reader import read_labeled_texts, read_unlabeled_texts
from loracle.data.splits import Split, Stratify, split_texts, text_folds
from loracle.data.table import Table
from loracle.evaluation import drift
from loracle.evaluation.calibration import UNCALIBRATED, Calibration
from loracle.evaluation.classification import classification_differences, classification_metrics
from loracle.evaluation.intervals import Interval
from loracle.evaluation.labels import Labels
from loracle.evaluation.linear_models import feature_classifier, ridge_classifier, tfidf_classifier, words_of
from loracle.evaluation.significance import Paired, compare_classifiers
from loracle.examples import Arms, LabeledText
from loracle.tasks.base import Answer, Calibrations, LinearFit, ProblemType, ReadResult, Scores, Task, label_words
from loracle.tasks.label_report import label_error_section, label_sections
from loracle.tasks.text_columns import text_columns

MAX_LOGIT = 1e3  # of a threshold: one of 0 or 1 has no finite logit


class LabelReading:
    """Texts with labels."""

    def __init__(self, *, several: bool, description: str, stratify: Stratify):
        self.several, self.description, self.stratify = several, description, stratify

    def infer(self, table: Table, data: DataConfig) -> Columns | None:
        return label_columns(table, data)

    def fits(self, table: Table, columns: Columns, data: DataConfig) -> bool:
        return True

    def read(
        self, table: Table, columns: Columns, data: DataConfig, issues: IssueLog, label_names: tuple[str, ...]
    ) -> ReadResult:
        names, items = read_labeled_texts(table, columns, data, issues, several=self.several, label_names=label_names)
        return ReadResult(items=items, label_names=names)

    def read_unlabeled(self, table: Table, columns: Columns) -> tuple[list[Any], tuple[str, ...]]:
        return read_unlabeled_texts(table, columns)

    def missing_evidence(self, table: Table, data: DataConfig) -> str | None:
        named = {column.strip().lower() for column in table.columns} & set(LABEL_NAMES)
        return None if named or data.label else "no label column"

    def check_trainable(self, items: Sequence[LabeledText], task: Task) -> None:
        check_labels(items, task.label_names)

    def count(self, items: Sequence[LabeledText], task: Task, arms: Sequence[Arms] = ()) -> Counts:
        classes = class_counts(items, task.label_names)
        sizes = f", of {min(classes.values()):,} to {max(classes.values()):,} texts" if classes else ""
        facts = [("task", self.description), ("texts", f"{len(items):,}"), ("classes", f"{len(classes):,}{sizes}")]
        return Counts(
            facts=facts, values={"classes": classes}, lines=class_lines(classes), issues=tuple(label_issues(items))
        )

    def split(self, items: Sequence[LabeledText], share: float, seed: int, task: Task) -> Split:
        return split_texts(items, share, seed, len(task.label_names), self.stratify)[0]

    def folds(self, items: Sequence[LabeledText], folds: int, seed: int, task: Task) -> list[Split]:
        return text_folds(items, folds, seed)[0]

    def remove_leaks(
        self, train: Sequence[LabeledText], test: Sequence[LabeledText]
    ) -> tuple[list[LabeledText], tuple[Issue, ...]]:
        return remove_leaked_texts(train, test)


class LabelLearning:
    """One output a label, on one vector a text."""

    zero_shot = "label names"
    saturates = False

    def __init__(self, labels: Labels, *, evidence: str, loss: str, problem_type: ProblemType, sets_thresholds: bool):
        self.labels, self.loss, self.problem_type = labels, loss, problem_type
        self.offers, self.sets_thresholds = frozenset({evidence}), sets_thresholds

    def outputs(self, task: Task) -> int:
        return len(task.label_names)

    def label_words(self, task: Task) -> list[str]:
        return label_words(task.label_names)

    def evidence(self, examples: Sequence[Any]) -> frozenset[str]:
        return self.offers

    def default_loss(self, examples: Sequence[Any]) -> str:
        return self.loss

    def prior(self, train: Sequence[LabeledText], other: Sequence[Any], task: Task) -> list[np.ndarray]:
        targets = self.labels.targets(train, len(task.label_names))
        return [self.labels.prior(targets, len(task.label_names))[None]] * len(other)

    def fit_words(
        self, train: Sequence[LabeledText], other: Sequence[LabeledText], task: Task, fit: LinearFit
    ) -> list[np.ndarray]:
        count = len(task.label_names)
        targets = self.labels.targets(train, count)
        return list(tfidf_classifier(words_of(train), targets, words_of(other), self.labels, count)[:, None])

    def fit_features(
        self, features: tuple[list[np.ndarray], list[np.ndarray]], train: Sequence[Any], task: Task, fit: LinearFit
    ) -> list[np.ndarray]:
        count = len(task.label_names)
        flat = (np.concatenate(features[0]), np.concatenate(features[1]))
        targets = self.labels.targets(train, count)
        return list(feature_classifier(flat, targets, self.labels, count, seed=fit.seed)[:, None])

    def probe(
        self, features: tuple[list[np.ndarray], list[np.ndarray]], train: Sequence[Any], task: Task, fit: LinearFit
    ) -> list[np.ndarray]:
        count = len(task.label_names)
        indicator = self.labels.indicator(self.labels.targets(train, count), count)
        return list(ridge_classifier(np.concatenate(features[0]), indicator, np.concatenate(features[1]))[:, None])


class LabelEvaluation:
    """Metrics of classifiers."""

    paired_metric = "accuracy"

    def __init__(self, labels: Labels, *, headline: str, table: Sequence[str]):
        self.labels, self.headline = labels, headline
        self.table: Sequence[str] = table

    def metrics(
        self, scores: Scores, examples: Sequence[LabeledText], task: Task, calibration: Calibration | None = None
    ) -> Mapping[str, Any]:
        targets, texts = self.labels.targets(examples, len(task.label_names)), [e.identity for e in examples]
        logits = np.concatenate(scores)
        return classification_metrics(logits, targets, self.labels, groups=texts, calibration=calibration)

    def differences(
        self, a: Scores, b: Scores, examples: Sequence[Any], task: Task, calibrations: Calibrations = (None, None)
    ) -> Mapping[str, Interval]:
        targets, texts = self.labels.targets(examples, len(task.label_names)), [e.identity for e in examples]
        logits = (np.concatenate(a), np.concatenate(b))
        return classification_differences(logits, targets, self.labels, groups=texts, calibrations=_known(calibrations))

    def compare(
        self, a: Scores, b: Scores, examples: Sequence[Any], task: Task, calibrations: Calibrations = (None, None)
    ) -> Paired:
        logits = (np.concatenate(a), np.concatenate(b))
        return compare_classifiers(logits, examples, self.labels, _known(calibrations))

    def fit_calibration(
        self, scores: Scores, examples: Sequence[LabeledText], task: Task, precision: float | None = None
    ) -> Calibration:
        targets = self.labels.targets(examples, len(task.label_names))
        return self.labels.fit_calibration(np.concatenate(scores).astype(np.float64), targets, precision)

    def read_calibration(self, values: Mapping[str, Any]) -> Calibration:
        return Calibration(**{**values, "thresholds": tuple(values.get("thresholds", ()))})

    def describe_calibration(self, calibration: Calibration, task: Task) -> str:
        line = f"calibration on {calibration.examples:,} validation texts: temperature {calibration.temperature:.3g}"
        if not (thresholds := calibration.thresholds):
            return line
        never = [name for name, t in zip(task.label_names, thresholds, strict=True) if t >= 1]
        line += f"; thresholds from {min(thresholds):.2f} to {max(thresholds):.2f}"
        return line + (f"; never assigned, as no threshold is precise enough: {', '.join(never)}" if never else "")

    def reference(
        self, tokens: Iterable[int], scores: Scores, task: Task, calibration: Calibration | None
    ) -> drift.Reference:
        proba = self.labels.probabilities(np.concatenate(scores), calibration or UNCALIBRATED)
        assigned = self.labels.assigned(proba, calibration or UNCALIBRATED)
        return drift.reference(tokens, proba.max(axis=1), assigned.sum(axis=0).tolist())

    def pooled(
        self, folds: Sequence[tuple[Scores, Sequence[Any], Calibration | None]], task: Task
    ) -> Mapping[str, Any]:
        """Each fold at its own temperature and thresholds: logits are shifted so that every threshold is at one half."""
        examples = [e for _, items, _ in folds for e in items]
        tempered: list[np.ndarray] = []
        shifted: list[np.ndarray] = []
        for scores, _, calibration in folds:
            own = [s / (calibration or UNCALIBRATED).temperature for s in scores]
            thresholds = (calibration or UNCALIBRATED).thresholds
            tempered += own
            shifted += [s - np.clip(logit(thresholds), -MAX_LOGIT, MAX_LOGIT) for s in own] if thresholds else own
        metrics = dict(self.metrics(tempered, examples, task))
        at_thresholds = self.metrics(shifted, examples, task)
        threshold_metrics = ("accuracy", "subset_accuracy", "micro_f1", "macro_f1")
        return metrics | {name: at_thresholds[name] for name in threshold_metrics if name in metrics}

    def reorder(
        self, scores: Scores, calibration: Calibration | None, names: tuple[str, ...], task: Task
    ) -> tuple[list[np.ndarray], Calibration | None]:
        if names == task.label_names:
            return list(scores), calibration
        order = [names.index(name) for name in task.label_names]
        if calibration is not None and calibration.thresholds:
            thresholds = tuple(calibration.thresholds[i] for i in order)
            calibration = dataclasses.replace(calibration, thresholds=thresholds)
        return [s[:, order] for s in scores], calibration


def _known(calibrations: Calibrations) -> tuple[Calibration, Calibration]:
    return calibrations[0] or UNCALIBRATED, calibrations[1] or UNCALIBRATED


class LabelOutput:
    """Labels and their probabilities."""

    command = "predict"
    pipeline_tag = "text-classification"

    def __init__(self, labels: Labels, changes: Any, *, description: str, per_label: bool):
        self.labels, self.changes, self.description, self.per_label = labels, changes, description, per_label

    def describe(self, task: Task) -> str:
        return f"{len(task.label_names)} labels, {self.description}"

    def values(self, scores: np.ndarray, task: Task, calibration: Calibration | None) -> np.ndarray:
        """Probability of each label, ``float64 [N, C]``."""
        return self.labels.probabilities(scores, calibration or UNCALIBRATED)

    def names(self, proba: np.ndarray, task: Task, calibration: Calibration | None) -> list[list[str]]:
        """Names of the labels that each row of probabilities assigns."""
        assigned = self.labels.assigned(proba, calibration or UNCALIBRATED)
        return [[task.label_names[i] for i in np.flatnonzero(row)] for row in assigned]

    def report(
        self, scores: Scores, examples: Sequence[Any], task: Task, metrics: Mapping[str, Any], calibration: Any
    ) -> dict[str, Any]:
        sections = label_sections(np.concatenate(scores), examples, task.label_names, self.labels, calibration)
        return {**sections, "per_label": self.per_label}

    def training_report(self, examples: Sequence[LabeledText], task: Task, *, seed: int) -> dict[str, Any]:
        return {"label_errors": {"train": label_error_section(examples, task.label_names, self.labels, seed=seed)}}

    def prediction_table(
        self, scores: Scores, examples: Sequence[LabeledText], task: Task, calibration: Any, *, texts: bool
    ) -> Iterator[list[Any]]:
        shown = text_columns(examples, texts)
        yield ["row", *shown, "label", "predicted", "probability"]
        proba = self.values(np.concatenate(scores), task, calibration)
        for e, p, names in zip(examples, proba, self.names(proba, task, calibration), strict=True):
            labels = "|".join(task.label_names[i] for i in e.labels)
            yield [e.row, *[e.text, e.context][: len(shown)], labels, "|".join(names), f"{p.max():.6g}"]

    def columns(self, task: Task) -> list[str]:
        return ["predicted", *(f"p({name})" for name in task.label_names)]

    def cells(
        self, values: np.ndarray, task: Task, calibration: Any, *, abstain_below: float = 0.0
    ) -> Iterator[Answer]:
        assigned = self.labels.assigned(values, calibration or UNCALIBRATED)
        confidence = self.labels.confidence(values, assigned)
        for p, names, sure in zip(values, self.names(values, task, calibration), confidence, strict=True):
            abstains = bool(sure < abstain_below)
            yield Answer(["" if abstains else "|".join(names), *(round(float(x), 6) for x in p)], abstains)

    def agreement(self, a: np.ndarray, b: np.ndarray, rows: list[dict[str, str]], task: Task, calibration: Any) -> str:
        names = [self.names(self.values(s, task, calibration), task, calibration) for s in (a, b)]
        equal = np.mean([x == y for x, y in zip(*names, strict=True)])
        line = f"int8 assigns the labels of the run to {equal:.1%} of {len(rows):,} test texts"
        if self.per_label:
            return line
        right = [np.mean([x == [row["label"]] for x, row in zip(own, rows, strict=True)]) for own in names]
        return f"{line}; accuracy {right[0]:.1%} before, {right[1]:.1%} after"

    def lost_in_transformers(self) -> tuple[str, ...]:
        if self.per_label:
            return ("pipelines return probabilities, not labels; config.json (thresholds) has each label's threshold",)
        return ()
