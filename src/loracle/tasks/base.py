"""What a task decides. Code outside ``tasks/`` asks a ``Task`` and never which task it is.

A task type has four parts: *reading* (cells to examples, splits), *learning* (outputs, losses, linear baselines), *evaluation*
(metrics, tests, calibration) and *output* (predictions, report sections). ``TASKS`` in ``tasks/__init__.py`` lists the types.

Legend of shapes: n texts of an example, C outputs of a text. Scores are a list with one ``float32 [n, C]`` an example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from loracle.config import DataConfig
from loracle.data.checks import Counts
from loracle.data.columns import Columns
from loracle.data.issues import Issue, IssueLog
from loracle.data.splits import Split
from loracle.data.table import Table
from loracle.errors import UserError, near
from loracle.examples import Arms

if TYPE_CHECKING:
    from loracle.evaluation.drift import Reference
    from loracle.evaluation.intervals import Interval
    from loracle.evaluation.linear_models import Objective
    from loracle.evaluation.significance import Paired

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]  # transformers' words
Scores = Sequence[np.ndarray]
Calibrations = tuple[Any, Any]  # of two runs; each as ``Evaluation.fit_calibration`` returns it, or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a run learns: the name of a type in ``TASKS``, and the label names found in its training data (if any)."""

    name: str
    label_names: tuple[str, ...] = ()

    @property
    def type(self) -> TaskType:
        """The entry of ``TASKS``.

        Raises:
            UserError: there is none of this name.
        """
        from loracle.tasks import TASKS  # imported here, as that module imports every task

        if self.name not in TASKS:
            raise UserError(f"Unknown task '{self.name}'{near(self.name, TASKS)}.", f"Known tasks: {', '.join(TASKS)}.")
        return TASKS[self.name]

    @property
    def unit(self) -> str:
        """What examples are called: "texts" or "groups"."""
        return self.type.unit

    @property
    def reading(self) -> Reading:
        """How rows become examples."""
        return self.type.reading

    @property
    def learning(self) -> Learning:
        """What is fitted."""
        return self.type.learning

    @property
    def evaluation(self) -> Evaluation:
        """How scores are measured."""
        return self.type.evaluation

    @property
    def output(self) -> Output:
        """How results are shown."""
        return self.type.output


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskType:
    """One entry of ``TASKS``."""

    unit: str
    reading: Reading
    learning: Learning
    evaluation: Evaluation
    output: Output


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Examples of a table, the label names, and all that a click log showed."""

    items: list[Any]
    label_names: tuple[str, ...] = ()
    arms: tuple[Arms, ...] = ()


class Reading(Protocol):
    """From a table to examples, and from examples to training, validation and test."""

    description: str  # the task in a few words

    def infer(self, table: Table, data: DataConfig) -> Columns | None:
        """The columns, if the table has what this task learns from; else None."""

    def fits(self, table: Table, columns: Columns, data: DataConfig) -> bool:
        """Whether a table with these columns is for this task, where none is named."""

    def read(
        self, table: Table, columns: Columns, data: DataConfig, issues: IssueLog, label_names: tuple[str, ...]
    ) -> ReadResult:
        """All examples. ``label_names``: of the training data, for a table to be tested on; else empty."""

    def read_unlabeled(self, table: Table, columns: Columns) -> tuple[list[Any], tuple[str, ...]]:
        """Examples without anything to learn from, and notes about skipped rows."""

    def missing_evidence(self, table: Table, data: DataConfig) -> str | None:
        """Why nothing in a table tells right from wrong, or None where something does."""

    def check_trainable(self, items: Sequence[Any], task: Task) -> None:
        """Raise ``UserError`` where nothing can be learnt."""

    def count(self, items: Sequence[Any], task: Task, arms: Sequence[Arms] = ()) -> Counts:
        """What ``loracle check`` says of the examples."""

    def split(self, items: Sequence[Any], share: float, seed: int, task: Task) -> Split:
        """Hold out ``share`` of the examples, so that no text is in both parts."""

    def folds(self, items: Sequence[Any], folds: int, seed: int, task: Task) -> list[Split]:
        """Rotations in which every example is held out once."""

    def remove_leaks(self, train: Sequence[Any], test: Sequence[Any]) -> tuple[list[Any], tuple[Issue, ...]]:
        """Training examples without the texts of the test examples, and issues about them."""


class Learning(Protocol):
    """What is fitted, and what it is fitted by."""

    problem_type: ProblemType  # of transformers' config
    zero_shot: str  # how the base model is asked without training: a key of ``baselines.zero_shot.QUESTIONS``
    saturates: bool  # whether the weight of an example saturates with its clicks
    sets_thresholds: bool  # whether each label has a threshold of its own

    def outputs(self, task: Task) -> int:
        """Outputs of a text, C."""

    def label_words(self, task: Task) -> list[str]:
        """Label names as words; empty where there are none, or they are numbers."""

    def evidence(self, examples: Sequence[Any]) -> frozenset[str]:
        """What the examples offer to a loss or baseline: label, labels, pairs, grades, clicks."""

    def default_loss(self, examples: Sequence[Any]) -> str:
        """The key of ``LOSSES`` that ``--loss auto`` picks."""

    def prior(self, train: Sequence[Any], other: Sequence[Any], task: Task) -> list[np.ndarray]:
        """Scores of other examples that ignore their texts: frequencies of the training targets."""

    def fit_words(self, train: Sequence[Any], other: Sequence[Any], task: Task, fit: LinearFit) -> list[np.ndarray]:
        """Scores of other examples by a linear model on TF-IDF."""

    def fit_features(
        self, features: tuple[list[np.ndarray], list[np.ndarray]], train: Sequence[Any], task: Task, fit: LinearFit
    ) -> list[np.ndarray]:
        """Scores of other examples by a linear model on features ``[n, H]`` of training and other examples."""

    def probe(
        self, features: tuple[list[np.ndarray], list[np.ndarray]], train: Sequence[Any], task: Task, fit: LinearFit
    ) -> list[np.ndarray]:
        """``fit_features``, but fast enough for every layer of a model."""


@dataclass(frozen=True, slots=True)
class LinearFit:
    """How linear models are fitted: the loss for optimizers that want NumPy, and the seed."""

    objective: Objective
    seed: int


class Evaluation(Protocol):
    """How scores are measured. ``calibration`` is what ``fit_calibration`` returned, or None."""

    headline: str  # the metric of early stopping and of the report's first line
    paired_metric: str  # the metric of the paired test
    table: Sequence[str]  # metrics in tables, the first ones first

    def metrics(
        self, scores: Scores, examples: Sequence[Any], task: Task, calibration: Any = None
    ) -> Mapping[str, Any]:
        """Metrics with intervals, and counts."""

    def differences(
        self, a: Scores, b: Scores, examples: Sequence[Any], task: Task, calibrations: Calibrations = (None, None)
    ) -> Mapping[str, Interval]:
        """By how much each metric of a is above that of b, with intervals of a paired bootstrap."""

    def compare(
        self, a: Scores, b: Scores, examples: Sequence[Any], task: Task, calibrations: Calibrations = (None, None)
    ) -> Paired:
        """The paired test of ``paired_metric``."""

    def fit_calibration(
        self, scores: Scores, examples: Sequence[Any], task: Task, precision: float | None = None
    ) -> Any:
        """What scores mean, from validation examples: a frozen dataclass of plain values, or None."""

    def read_calibration(self, values: Mapping[str, Any]) -> Any:
        """The dataclass from its fields, as calibration.json holds them."""

    def describe_calibration(self, calibration: Any, task: Task) -> str | None:
        """One line for the terminal, or None."""

    def reference(self, tokens: Iterable[int], scores: Scores, task: Task, calibration: Any) -> Reference:
        """Distributions of the training and validation data, for drift."""

    def pooled(self, folds: Sequence[tuple[Scores, Sequence[Any], Any]], task: Task) -> Mapping[str, Any]:
        """Metrics of all held-out examples together; each fold has scores, examples and calibration."""

    def reorder(
        self, scores: Scores, calibration: Any, names: tuple[str, ...], task: Task
    ) -> tuple[list[np.ndarray], Any]:
        """Scores and calibration of a run whose labels have the order ``names``, in the order of ``task``."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Cells that ``predict`` adds to a row, and whether the model abstains there."""

    cells: list[Any]
    abstains: bool = False


class Output(Protocol):
    """How results are shown."""

    command: str  # the command and the HTTP route that answer: "predict" or "rank"
    pipeline_tag: str  # of the model card
    changes: Changes

    def describe(self, task: Task) -> str:
        """The task in a few words, for people."""

    def report(
        self, scores: Scores, examples: Sequence[Any], task: Task, metrics: Mapping[str, Any], calibration: Any
    ) -> dict[str, Any]:
        """Sections of the report from test scores."""

    def training_report(self, examples: Sequence[Any], task: Task, *, seed: int) -> dict[str, Any]:
        """Sections of the report from training examples."""

    def prediction_table(
        self, scores: Scores, examples: Sequence[Any], task: Task, calibration: Any, *, texts: bool
    ) -> Iterator[list[Any]]:
        """Header and rows of predictions.csv. Without ``texts``, rows of the data take their place."""

    def values(self, scores: np.ndarray, task: Task, calibration: Any) -> np.ndarray:
        """Numbers ``[N, K]`` that scores ``[N, C]`` stand for: probabilities, or the scores themselves."""

    def names(self, values: np.ndarray, task: Task, calibration: Any) -> list[list[str]]:
        """Label names that each row of ``values`` assigns; none where an answer is only a number."""

    def columns(self, task: Task) -> list[str]:
        """Columns that ``predict`` adds to a table."""

    def cells(
        self, values: np.ndarray, task: Task, calibration: Any, *, abstain_below: float = 0.0
    ) -> Iterator[Answer]:
        """Cells of these columns for each row of ``values``."""

    def agreement(self, a: np.ndarray, b: np.ndarray, rows: list[dict[str, str]], task: Task, calibration: Any) -> str:
        """How well scores b of an export agree with the run's scores a, ``[N, C]``; rows of predictions.csv."""

    def lost_in_transformers(self) -> tuple[str, ...]:
        """Notes on what plain transformers does not show."""


class Changes(Protocol):
    """What a second version answers differently, for ``loracle diff``."""

    def compare(
        self, a: Scores, b: Scores, examples: Sequence[Any], task: Task, *, calibrations: Calibrations, labeled: bool
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A summary, and a row for each example that changed."""

    def lines(self, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The same for the terminal."""


def label_words(names: Sequence[str]) -> list[str]:
    """Label names as words; empty where all of them are numbers."""
    if all(name.strip().lstrip("-").replace(".", "", 1).isdecimal() for name in names):
        return []
    return [name.replace("_", " ").replace("-", " ") for name in names]


def by_example(values: np.ndarray, examples: Sequence[Any]) -> list[np.ndarray]:
    """Split values of all texts ``[N, …]`` into those of each example, ``[n, …]``."""
    return np.split(values, np.cumsum([len(e.texts) for e in examples])[:-1])
