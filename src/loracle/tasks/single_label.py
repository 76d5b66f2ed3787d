"""One label a text: sentiment, topic, intent."""

from __future__ import annotations

from collections.abc import Sequence

from loracle.data.splits import Split, by_class, single_text_classes, split_texts, text_folds
from loracle.evaluation.labels import OneLabel
from loracle.examples import LabeledText
from loracle.tasks.base import Task, TaskType
from loracle.tasks.changes import LabelChanges
from loracle.tasks.labels import LabelEvaluation, LabelLearning, LabelOutput, LabelReading

DESCRIPTION = "one label a text"
NOT_MEASURED = "classes with one distinct text, which trains, so that they are not measured"
NOT_LEARNT = "classes with one distinct text, which no rotation both learns and measures"


class SingleLabelReading(LabelReading):
    """Splits keep every class in both parts, and name the classes that are too small for that."""

    def split(self, items: Sequence[LabeledText], share: float, seed: int, task: Task) -> Split:
        split, units = split_texts(items, share, seed, len(task.label_names), self.stratify)
        return Split(split.train, split.held_out, single_text_classes(items, units, NOT_MEASURED))

    def folds(self, items: Sequence[LabeledText], folds: int, seed: int, task: Task) -> list[Split]:
        splits, units = text_folds(items, folds, seed)
        notes = single_text_classes(items, units, NOT_LEARNT)
        return [Split(split.train, split.held_out, notes) for split in splits]


LABELS = OneLabel()
SINGLE_LABEL = TaskType(
    unit="texts",
    reading=SingleLabelReading(several=False, description=DESCRIPTION, stratify=by_class),
    learning=LabelLearning(
        LABELS,
        evidence="label",
        loss="cross-entropy",
        problem_type="single_label_classification",
        sets_thresholds=False,
    ),
    evaluation=LabelEvaluation(LABELS, headline="accuracy", table=("accuracy", "macro_f1", "log_loss")),
    output=LabelOutput(LABELS, LabelChanges(LABELS, per_label=False), description=DESCRIPTION, per_label=False),
)
