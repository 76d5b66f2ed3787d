"""The report of a run as plain values: ``report.json`` holds it, and ``html`` draws nothing else.

``metrics`` in it is the run's metrics.json. Everything else is computed here and by the task from the same test scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from loracle.reporting.results import Results
from loracle.reporting.terminal import ceiling_line, result_rows
from loracle.tasks.base import Scores
from loracle.tasks.dataset import Data


def build_report(results: Results, data: Data) -> dict[str, Any]:
    """All that the test examples show, and what the training examples show of label errors."""
    task, metrics = data.task, results.metrics
    report: dict[str, Any] = {
        "task": task.name,
        "verdict": verdict(results, data),
        "headline": task.evaluation.headline,
        "table": result_rows(metrics, task),
        "ceiling": ceiling_line(metrics["test"]),
        "metrics": metrics,
        "calibration": asdict(results.calibration) if results.calibration else None,
    }
    report |= task.output.report(results.test_scores, data.test, task, metrics, results.calibration)
    return merged(report, results.training_report)


def verdict(results: Results, data: Data) -> dict[str, Any]:
    """Whether the model beats the best baseline on the test examples, by the paired bootstrap."""
    task, metrics, baselines = data.task, results.metrics, results.baseline_scores
    name = task.evaluation.headline
    values = {baseline: metrics["baselines"][baseline][name]["value"] for baseline in baselines}
    values = {baseline: value for baseline, value in values.items() if value is not None}
    own, words = metrics["test"][name]["value"], name.replace("_", " ").replace("map", "mean average precision")
    if own is None or not values:
        why = "no baseline was measured" if own is not None else "nothing in the test examples tells right from wrong"
        return {"beats": None, "text": f"Not compared: {why}."}
    best = max(values, key=values.__getitem__)
    gap = _difference(results.test_scores, baselines[best], data)
    figures = (
        f"{words} {100 * own:.1f} % against {100 * values[best]:.1f} %, "
        f"{100 * gap['value']:+.1f} points [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
    )
    beats = gap["low"] > 0
    if beats:
        text = f"The model beats the best baseline ({best}): {figures}."
    elif gap["high"] < 0:
        text = f"The model is WORSE than the best baseline ({best}): {figures}. Do not use it as it is."
    else:
        text = f"The model does NOT reliably beat the best baseline ({best}): {figures}; the interval includes 0."
    return {"beats": bool(beats), "text": text, "baseline": best, "lead": gap}


def _difference(a: Scores, b: Scores, data: Data) -> dict[str, Any]:
    """By how much scores a are above scores b in the headline metric, before calibration."""
    return data.task.evaluation.differences(a, b, data.test, data.task)[data.task.evaluation.headline].to_json()


def merged(report: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The report with further sections; a section that is in both keeps the keys of both."""
    return report | {name: report.get(name, {}) | section for name, section in more.items()}


def without_texts(value: Any) -> Any:
    """The same report with rows of the data in place of its texts, contexts and names of groups."""
    if isinstance(value, list):
        return [without_texts(v) for v in value]
    if not isinstance(value, dict):
        return value
    plain = {name: without_texts(v) for name, v in value.items()}
    if "row" in plain and "text" in plain:
        plain["text"] = f"row {plain['row']}"
    if "titles" in plain and "group" in plain:
        plain |= {"group": f"of row {plain['titles'][0]['row']}", "context": None}
    return plain


def curves(log: Path) -> dict[str, list[dict[str, float]]]:
    """Loss of each step and validation results from ``log.jsonl``, without NaN."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []

    def of(*names: str) -> list[dict[str, float]]:
        return [
            {n: r[n] for n in ("step", *names)} for r in records if all(np.isfinite(r.get(n, np.nan)) for n in names)
        ]

    return {"steps": of("loss"), "validation": of("validation_metric", "validation_loss")}
