"""The parts that ranking tasks share: groups of titles that compete.

Legend of shapes: n titles of a group, T titles of all groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from loracle.config import DataConfig
from loracle.data.checks import (
    Counts,
    Quantiles,
    allocation_issues,
    arms_of,
    check_groups,
    group_issues,
    remove_leaked_titles,
)
from loracle.data.click_logs.aggregation import sum_events
from loracle.data.click_logs.allocation import allocation
from loracle.data.columns import Columns, click_columns, event_columns, grade_columns, pair_columns
from loracle.data.groups import READERS
from loracle.data.issues import Issue, IssueLog
from loracle.data.reader import read_unlabeled_groups
from loracle.data.splits import Split, group_folds, split_groups
from loracle.data.table import Table
from loracle.errors import UserError
from loracle.evaluation import drift
from loracle.evaluation.intervals import Interval
from loracle.evaluation.linear_models import feature_ranker, tfidf_ranker
from loracle.evaluation.ranking import rank_metrics, ranking_differences
from loracle.evaluation.significance import Paired, compare_rankers
from loracle.examples import Arms, RankGroup
from loracle.tasks.base import Answer, Calibrations, LinearFit, ProblemType, ReadResult, Scores, Task
from loracle.tasks.group_report import example_groups
from loracle.tasks.text_columns import text_columns

GAPS = {"under_10": "under 10 %", "10_to_25": "10 to 25 %", "25_to_50": "25 to 50 %", "over_50": "over 50 %"}
RANKING_TABLE = (
    "pair_accuracy", "significant_pair_accuracy", "ctr_lift", "top1", "regret", "ndcg", "kendall_tau",
)  # fmt: skip


class GroupReading:
    """Groups of titles with preferences, grades or clicks.

    A ranker may be evaluated on any of these, so every ranking task reads all. ``fits`` tells which task learns from them.
    """

    def __init__(self, *, description: str):
        self.description = description

    def infer(self, table: Table, data: DataConfig) -> Columns | None:
        if data.label:
            return None
        kinds = (pair_columns, click_columns, event_columns, grade_columns)
        return next((columns for kind in kinds if (columns := kind(table, data))), None)

    def fits(self, table: Table, columns: Columns, data: DataConfig) -> bool:
        return True

    def read(
        self, table: Table, columns: Columns, data: DataConfig, issues: IssueLog, label_names: tuple[str, ...]
    ) -> ReadResult:
        evidence = "pairs" if columns.chosen else "grades" if columns.grade else "clicks"
        summed = sum_events(table, columns, issues) if columns.clicked else (table, columns)
        groups, arms = READERS[evidence](*summed, data, issues)
        return ReadResult(items=groups, arms=arms)

    def read_unlabeled(self, table: Table, columns: Columns) -> tuple[list[Any], tuple[str, ...]]:
        return read_unlabeled_groups(table, columns)

    def missing_evidence(self, table: Table, data: DataConfig) -> str | None:
        asked = data.label or data.clicks or data.impressions or data.clicked or data.grade
        try:
            found = self.infer(table, data)
        except UserError:
            if asked:
                raise
            found = None
        return None if found or asked else "no columns with clicks, grades, or chosen and rejected titles"

    def check_trainable(self, items: Sequence[RankGroup], task: Task) -> None:
        check_groups(items)

    def count(self, items: Sequence[RankGroup], task: Task, arms: Sequence[Arms] = ()) -> Counts:
        titles = Quantiles.of([len(group.texts) for group in items] or [0])
        preferences = sum(len(group.preferences) for group in items)
        clicks, impressions = (sum(sum(getattr(g, name) or ()) for g in items) for name in ("clicks", "impressions"))
        facts = [("task", self.description), ("groups", f"{len(items):,}")]
        facts += [("titles", f"{sum(len(g.texts) for g in items):,}"), ("titles per group", str(titles))]
        if preferences:
            facts.append(("preferences", f"{preferences:,}"))
        if impressions:
            facts += [("impressions", f"{impressions:,}"), ("clicks", f"{clicks:,} ({clicks / impressions:.2%})")]
        shares = allocation(arms) if (arms := arms or arms_of(items)) else None
        issues = [*group_issues(items), *(allocation_issues(shares) if shares else ())]
        values = {"titles": titles, "preferences": preferences, "clicks": clicks, "impressions": impressions}
        return Counts(facts=facts, values=values, issues=tuple(issues), allocation=shares)

    def split(self, items: Sequence[RankGroup], share: float, seed: int, task: Task) -> Split:
        return split_groups(items, share, seed)

    def folds(self, items: Sequence[RankGroup], folds: int, seed: int, task: Task) -> list[Split]:
        return group_folds(items, folds, seed)

    def remove_leaks(
        self, train: Sequence[RankGroup], test: Sequence[RankGroup]
    ) -> tuple[list[RankGroup], tuple[Issue, ...]]:
        return remove_leaked_titles(train, test)


class GroupLearning:
    """One score a title."""

    problem_type: ProblemType = "regression"
    zero_shot = "likelihood"
    sets_thresholds = False
    saturates = False

    def outputs(self, task: Task) -> int:
        return 1

    def label_words(self, task: Task) -> list[str]:
        return []

    def prior(self, train: Sequence[Any], other: Sequence[RankGroup], task: Task) -> list[np.ndarray]:
        return [np.zeros((len(group.texts), 1)) for group in other]

    def fit_words(self, train: Sequence[Any], other: Sequence[Any], task: Task, fit: LinearFit) -> list[np.ndarray]:
        return [s[:, None] for s in tfidf_ranker(train, other, fit.objective, seed=fit.seed)]

    def fit_features(
        self, features: tuple[list[np.ndarray], list[np.ndarray]], train: Sequence[Any], task: Task, fit: LinearFit
    ) -> list[np.ndarray]:
        return [s[:, None] for s in feature_ranker(features[0], train, features[1], fit.objective, seed=fit.seed)]

    def probe(
        self, features: tuple[list[np.ndarray], list[np.ndarray]], train: Sequence[Any], task: Task, fit: LinearFit
    ) -> list[np.ndarray]:
        return self.fit_features(features, train, task, fit)


class GroupEvaluation:
    """Metrics of rankers."""

    headline = "pair_accuracy"
    paired_metric = "pair_accuracy"
    table: Sequence[str] = RANKING_TABLE

    def metrics(
        self, scores: Scores, examples: Sequence[RankGroup], task: Task, calibration: Any = None
    ) -> Mapping[str, Any]:
        return rank_metrics(_flat(scores), examples)

    def differences(
        self, a: Scores, b: Scores, examples: Sequence[Any], task: Task, calibrations: Calibrations = (None, None)
    ) -> Mapping[str, Interval]:
        return ranking_differences(_flat(a), _flat(b), examples)

    def compare(
        self, a: Scores, b: Scores, examples: Sequence[Any], task: Task, calibrations: Calibrations = (None, None)
    ) -> Paired:
        return compare_rankers(_flat(a), _flat(b), examples)

    def fit_calibration(
        self, scores: Scores, examples: Sequence[RankGroup], task: Task, precision: float | None = None
    ) -> Any:
        return None

    def read_calibration(self, values: Mapping[str, Any]) -> Any:
        return None

    def describe_calibration(self, calibration: Any, task: Task) -> str | None:
        return None

    def reference(self, tokens: Iterable[int], scores: Scores, task: Task, calibration: Any) -> drift.Reference:
        return drift.reference(tokens, np.concatenate(scores)[:, 0])

    def pooled(self, folds: Sequence[tuple[Scores, Sequence[Any], Any]], task: Task) -> Mapping[str, Any]:
        scores = [s for part, _, _ in folds for s in part]
        return self.metrics(scores, [e for _, items, _ in folds for e in items], task)

    def reorder(
        self, scores: Scores, calibration: Any, names: tuple[str, ...], task: Task
    ) -> tuple[list[np.ndarray], Any]:
        return list(scores), calibration


class GroupOutput:
    """Titles, best first."""

    command = "rank"
    pipeline_tag = "text-ranking"

    def __init__(self, changes: Any, *, description: str, lost: tuple[str, ...] = ()):
        self.changes, self.description, self.lost = changes, description, lost

    def describe(self, task: Task) -> str:
        return self.description

    def report(
        self, scores: Scores, examples: Sequence[RankGroup], task: Task, metrics: Mapping[str, Any], calibration: Any
    ) -> dict[str, Any]:
        gaps = [(words, metrics["test"].get(f"pair_accuracy_gap_{name}")) for name, words in GAPS.items()]
        return {"gaps": [gap for gap in gaps if gap[1]], "groups": example_groups(_flat(scores), examples)}

    def training_report(self, examples: Sequence[Any], task: Task, *, seed: int) -> dict[str, Any]:
        return {}

    def prediction_table(
        self, scores: Scores, examples: Sequence[RankGroup], task: Task, calibration: Any, *, texts: bool
    ) -> Iterator[list[Any]]:
        shown = text_columns(examples, texts)
        yield ["row", "group", *shown, "score"]
        for number, (e, s) in enumerate(zip(examples, scores, strict=True), 1):
            group = e.group if texts else number
            for row, text, score in zip(e.rows, e.texts, s[:, 0], strict=True):
                yield [row, group, *[text, e.context][: len(shown)], f"{score:.6g}"]

    def values(self, scores: np.ndarray, task: Task, calibration: Any) -> np.ndarray:
        return np.asarray(scores, dtype=np.float64)

    def names(self, values: np.ndarray, task: Task, calibration: Any) -> list[list[str]]:
        return [[] for _ in values]

    def columns(self, task: Task) -> list[str]:
        return ["score"]

    def cells(
        self, values: np.ndarray, task: Task, calibration: Any, *, abstain_below: float = 0.0
    ) -> Iterator[Answer]:
        for (score,) in values:
            yield Answer([round(float(score), 6)])

    def agreement(self, a: np.ndarray, b: np.ndarray, rows: list[dict[str, str]], task: Task, calibration: Any) -> str:
        groups = np.array([row["group"] for row in rows])
        equal = together = 0
        for group in dict.fromkeys(groups.tolist()):
            x, y = a[groups == group, 0], b[groups == group, 0]
            first, second = np.triu_indices(len(x), 1)
            agree = np.sign(x[first] - x[second]) == np.sign(y[first] - y[second])
            equal, together = equal + int(agree.sum()), together + len(agree)
        return f"int8 orders {equal / together if together else 1.0:.1%} of the pairs of titles as the run does"

    def lost_in_transformers(self) -> tuple[str, ...]:
        return self.lost


def _flat(scores: Scores) -> list[np.ndarray]:
    """Scores ``[n]`` of each group."""
    return [s[:, 0] for s in scores]
