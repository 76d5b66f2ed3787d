"""A task in one file, as someone else would write it: star ratings. Its labels have an order, and its answer is also a mean.

``loracle predict`` writes the expected number of stars beside the label, and macro F1 is the headline.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from loracle.tasks.base import Answer, Task
from loracle.tasks.changes import LabelChanges
from loracle.tasks.labels import LabelEvaluation, LabelOutput
from loracle.tasks.single_label import LABELS, SINGLE_LABEL

DESCRIPTION = "a number of stars"


class StarsOutput(LabelOutput):
    """Labels, probabilities, and the mean of the stars that they stand for."""

    def columns(self, task: Task) -> list[str]:
        return [*super().columns(task), "stars"]

    def cells(
        self, values: np.ndarray, task: Task, calibration: Any, *, abstain_below: float = 0.0
    ) -> Iterator[Answer]:
        answers = super().cells(values, task, calibration, abstain_below=abstain_below)
        for answer, proba in zip(answers, values, strict=True):
            mean = float(proba @ [int(name) for name in task.label_names])
            yield replace(answer, cells=[*answer.cells, round(mean, 4)])


STARS = replace(
    SINGLE_LABEL,
    evaluation=LabelEvaluation(LABELS, headline="macro_f1", table=("macro_f1", "accuracy")),
    output=StarsOutput(LABELS, LabelChanges(LABELS, per_label=False), description=DESCRIPTION, per_label=False),
)
