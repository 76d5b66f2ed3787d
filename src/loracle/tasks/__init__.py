"""What can be learnt. To add a task, write a file beside these and register it here."""

from __future__ import annotations

from loracle.tasks.base import ProblemType, Task, TaskType
from loracle.tasks.click_ranking import CLICK_RANKING
from loracle.tasks.multi_label import MULTI_LABEL
from loracle.tasks.ranking import RANKING
from loracle.tasks.single_label import SINGLE_LABEL

__all__ = ["TASKS", "ProblemType", "Task", "TaskType"]

# In the order in which a table is tried: the first task that finds its columns is taken.
TASKS: dict[str, TaskType] = {
    "click_ranking": CLICK_RANKING,
    "ranking": RANKING,
    "multi_label": MULTI_LABEL,
    "single_label": SINGLE_LABEL,
}
