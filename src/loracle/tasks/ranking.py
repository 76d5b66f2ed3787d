"""Titles to rank, learnt from pairs (this one beat that one) or from grades (a number a title)."""

from __future__ import annotations

from collections.abc import Sequence

from loracle.config import DataConfig
from loracle.data.columns import Columns, grade_columns, pair_columns
from loracle.data.groups import READERS
from loracle.data.issues import IssueLog
from loracle.data.table import Table
from loracle.examples import RankGroup
from loracle.tasks.base import ReadResult, TaskType
from loracle.tasks.changes import GroupChanges
from loracle.tasks.groups import GroupEvaluation, GroupLearning, GroupOutput, GroupReading

DESCRIPTION = "ranking from pairs or grades"


def infer(table: Table, data: DataConfig) -> Columns | None:
    """Columns of pairs or grades; None where there are neither, or labels are named."""
    return None if data.label else pair_columns(table, data) or grade_columns(table, data)


def read(
    table: Table, columns: Columns, data: DataConfig, issues: IssueLog, label_names: tuple[str, ...]
) -> ReadResult:
    """Groups of titles with preferences or grades."""
    groups, arms = READERS["pairs" if columns.chosen else "grades"](table, columns, data, issues)
    return ReadResult(items=groups, arms=arms)


class GradedLearning(GroupLearning):
    """Grades also order pairs, so losses on pairs fit both."""

    def evidence(self, examples: Sequence[RankGroup]) -> frozenset[str]:
        return frozenset({"pairs", "grades"} if any(g.grades is not None for g in examples) else {"pairs"})

    def default_loss(self, examples: Sequence[RankGroup]) -> str:
        return "list" if "grades" in self.evidence(examples) else "bradley-terry"


RANKING = TaskType(
    unit="groups",
    reading=GroupReading(
        infer=infer, read=read, description=DESCRIPTION, needs="chosen and rejected columns, or grade column"
    ),
    learning=GradedLearning(),
    evaluation=GroupEvaluation(),
    output=GroupOutput(GroupChanges(), description=DESCRIPTION),
)
