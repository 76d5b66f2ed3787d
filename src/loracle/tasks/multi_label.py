"""Any number of labels a text: emotions, tags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loracle.config import DataConfig
from loracle.data.checks import Counts
from loracle.data.columns import Columns, label_lists
from loracle.data.splits import by_labels, issue_of
from loracle.data.table import Table
from loracle.evaluation.labels import AnyLabels
from loracle.examples import Arms, LabeledText
from loracle.tasks.base import Task, TaskType
from loracle.tasks.changes import LabelChanges
from loracle.tasks.labels import LabelEvaluation, LabelLearning, LabelOutput, LabelReading

DESCRIPTION = "any number of labels a text"


class MultiLabelReading(LabelReading):
    """Labels are lists, or cells that ``--label-delimiter`` splits."""

    def fits(self, table: Table, columns: Columns, data: DataConfig) -> bool:
        return bool(data.label_delimiter) or label_lists(table, columns)

    def count(self, items: Sequence[LabeledText], task: Task, arms: Sequence[Arms] = ()) -> Counts:
        counts = super().count(items, task, arms)
        unlabeled = issue_of("no-class", "texts without any label", (item.row for item in items if not item.labels))
        return replace(counts, issues=counts.issues + unlabeled)


LABELS = AnyLabels()
# Mean average precision needs no threshold, where F1 stays at 0 until the first logits cross it.
MULTI_LABEL = TaskType(
    unit="texts",
    reading=MultiLabelReading(several=True, description=DESCRIPTION, stratify=by_labels),
    learning=LabelLearning(
        LABELS, evidence="labels", loss="binary", problem_type="multi_label_classification", sets_thresholds=True
    ),
    evaluation=LabelEvaluation(LABELS, headline="map", table=("micro_f1", "macro_f1", "map", "subset_accuracy")),
    output=LabelOutput(LABELS, LabelChanges(LABELS, per_label=True), description=DESCRIPTION, per_label=True),
)
