"""The table at the end of a run and in its model card: the model and its baselines, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loracle.evaluation.ranking_metrics import GAPS
from loracle.formatting import plain_table
from loracle.tasks import Task

FIGURES = 5  # columns beside the name, which fit a terminal
PERCENT = {
    *("accuracy", "macro_f1", "micro_f1", "weighted_f1", "map", "subset_accuracy"),
    *("pair_accuracy", "significant_pair_accuracy", "top1", "regret", "ceiling", "significant_ceiling", "way"),
    *(f"pair_accuracy_gap_{name}" for name in GAPS),
}


def result_rows(metrics: Mapping[str, Any], task: Task) -> list[list[str]]:
    """Header and one row a scorer, baselines first: ``value [low, high]``, in per cent where that is the custom."""
    results = {**metrics.get("baselines", {}), "loracle": metrics["test"]}
    names = shown_metrics(task, metrics["test"])
    return [["", *names], *([who, *(figure(r[n], n) for n in names)] for who, r in results.items())]


def shown_metrics(task: Task, test: Mapping[str, Any]) -> list[str]:
    """Names of the metrics that tables show: the first ones that were measured."""
    return [name for name in task.evaluation.table if name in test][:FIGURES]


def ceiling_line(test: Mapping[str, Any], who: str = "the model") -> str | None:
    """The noise ceiling of a click log and how far the model got towards it; None where clicks are too few to say.

    ``noise ceiling: 81.2 % of all pairs, 98.2 % of significant ones; the model is 39 % [35, 43] of the way from chance
    to it``
    """
    ceiling, strict, way = (test.get(name) or {} for name in ("ceiling", "significant_ceiling", "way"))
    if ceiling.get("value") is None:
        return None
    parts = [f"{100 * ceiling['value']:.1f} % of all pairs"]
    if strict.get("value") is not None:
        parts.append(f"{100 * strict['value']:.1f} % of significant ones")
    line = f"noise ceiling: {', '.join(parts)}"
    if way.get("value") is None:
        return line
    value, low, high = (way[k] if way[k] is None else f"{100 * way[k]:.0f}" for k in ("value", "low", "high"))
    interval = "" if low is None or high is None else f" [{low}, {high}]"
    return f"{line}; {who} is {value} %{interval} of the way from chance to it"


def summary(metrics: Mapping[str, Any], task: Task, note: str | None) -> str:
    """What ends a run or an evaluation: the table, the noise ceiling of a click log, and what ``note`` says of the base."""
    lines = [plain_table(result_rows(metrics, task)), ceiling_line(metrics["test"]), note and f"(figures of {note})"]
    return "\n".join(filter(None, lines))


def figure(metric: Any, name: str) -> str:
    """A number or ``{"value", "low", "high"}`` as people write it."""
    value, low, high = (
        (metric[k] for k in ("value", "low", "high")) if isinstance(metric, dict) else (metric, None, None)
    )
    if value is None:
        return "–"
    shown = _written(value, name)
    return shown if low is None or high is None else f"{shown} [{_written(low, name)}, {_written(high, name)}]"


def difference(metric: Mapping[str, float | None], name: str) -> str:
    """A difference ``{"value", "low", "high"}`` with its sign: in points where the metric itself is written in per cent."""
    points = name in PERCENT or name == "ctr_lift"
    value, low, high = (
        v if v is None else f"{100 * v:+.1f}" if points else f"{v:+.3f}"
        for v in (metric[k] for k in ("value", "low", "high"))
    )
    return "–" if value is None else value if low is None or high is None else f"{value} [{low}, {high}]"


def _written(value: float, name: str) -> str:
    if name == "ctr_lift":
        return f"{100 * value:+.1f} %"
    return f"{100 * value:.1f}" if name in PERCENT else f"{value:.3f}"
