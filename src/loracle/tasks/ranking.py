"""Titles to rank, learnt from pairs (this one beat that one) or from grades (a number a title)."""

from __future__ import annotations

from collections.abc import Sequence

from loracle.examples import RankGroup
from loracle.tasks.base import TaskType
from loracle.tasks.changes import GroupChanges
from loracle.tasks.groups import GroupEvaluation, GroupLearning, GroupOutput, GroupReading

DESCRIPTION = "ranking from pairs or grades"


class GradedLearning(GroupLearning):
    """Grades also order pairs, so losses on pairs fit both."""

    def evidence(self, examples: Sequence[RankGroup]) -> frozenset[str]:
        return frozenset({"pairs", "grades"} if any(g.grades is not None for g in examples) else {"pairs"})

    def default_loss(self, examples: Sequence[RankGroup]) -> str:
        return "list" if "grades" in self.evidence(examples) else "bradley-terry"


RANKING = TaskType(
    unit="groups",
    reading=GroupReading(description=DESCRIPTION),
    learning=GradedLearning(),
    evaluation=GroupEvaluation(),
    output=GroupOutput(GroupChanges(), description=DESCRIPTION),
)
