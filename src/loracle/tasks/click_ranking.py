"""Titles to rank, learnt from a click log: clicks and impressions of each title, or one impression a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loracle.config import DataConfig
from loracle.data.columns import Columns
from loracle.data.table import Table
from loracle.evaluation.click_model import ClickModel, fit_click_model
from loracle.examples import RankGroup
from loracle.tasks.base import Scores, Task, TaskType
from loracle.tasks.changes import GroupChanges
from loracle.tasks.groups import GroupEvaluation, GroupLearning, GroupOutput, GroupReading

DESCRIPTION = "ranking from clicks"
FREQUENT = 0.1  # click rate above which clicks are no longer rare, and the list likelihood no longer exact


def click_rate(groups: Sequence[RankGroup]) -> float:
    """Clicks per impression over all groups; 0 without impressions."""
    clicks, impressions = (sum(sum(getattr(g, name) or ()) for g in groups) for name in ("clicks", "impressions"))
    return clicks / impressions if impressions else 0.0


class ClickReading(GroupReading):
    """A table is for this task when it has clicks."""

    def fits(self, table: Table, columns: Columns, data: DataConfig) -> bool:
        return bool(columns.clicks or columns.clicked)


class ClickLearning(GroupLearning):
    """Clicks also order pairs, so losses on pairs fit too."""

    saturates = True

    def evidence(self, examples: Sequence[RankGroup]) -> frozenset[str]:
        return frozenset({"clicks", "pairs"})

    def default_loss(self, examples: Sequence[RankGroup]) -> str:
        return "binomial" if click_rate(examples) > FREQUENT else "list"


class ClickEvaluation(GroupEvaluation):
    """The calibration is a click model: how many log-odds of a click a unit of score is worth."""

    def fit_calibration(
        self, scores: Scores, examples: Sequence[RankGroup], task: Task, precision: float | None = None
    ) -> ClickModel | None:
        model = fit_click_model(examples, [s[:, 0] for s in scores])
        return model if model.groups else None

    def read_calibration(self, values: Mapping[str, Any]) -> ClickModel:
        return ClickModel(**values)


CLICK_RANKING = TaskType(
    unit="groups",
    reading=ClickReading(description=DESCRIPTION),
    learning=ClickLearning(),
    evaluation=ClickEvaluation(),
    output=GroupOutput(
        GroupChanges(), description=DESCRIPTION, lost=("win probabilities and lifts; the export returns scores",)
    ),
)
