"""The table that ends a run and stands in its model card: the model beside its baselines, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = {
    "single": ("accuracy", "macro_f1", "log_loss"),
    "multi": ("micro_f1", "macro_f1", "map", "subset_accuracy"),
    "rank": ("pair_accuracy", "significant_pair_accuracy", "ctr_lift", "ndcg"),
}
PERCENT = {"accuracy", "macro_f1", "micro_f1", "map", "subset_accuracy", "pair_accuracy", "significant_pair_accuracy"}


def result_rows(metrics: Mapping[str, Any], kind: str) -> list[list[str]]:
    """Header and one row a scorer, baselines first: ``value [low, high]``, in per cent where that is the custom."""
    results = {**metrics.get("baselines", {}), "loracle": metrics["test"]}
    names = [n for n in SHOWN[kind] if n in metrics["test"]]
    return [["", *names], *([who, *(figure(r[n], n) for n in names)] for who, r in results.items())]


def figure(metric: Any, name: str) -> str:
    """A number or ``{"value", "low", "high"}`` as people write it."""
    value, low, high = (
        (metric[k] for k in ("value", "low", "high")) if isinstance(metric, dict) else (metric, None, None)
    )
    if value is None:
        return "–"
    shown = _written(value, name)
    return shown if low is None or high is None else f"{shown} [{_written(low, name)}, {_written(high, name)}]"


def _written(value: float, name: str) -> str:
    if name == "ctr_lift":
        return f"{100 * value:+.1f} %"
    return f"{100 * value:.1f}" if name in PERCENT else f"{value:.3f}"


def plain_table(rows: list[list[str]]) -> str:
    """Columns aligned for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown_table(rows: list[list[str]]) -> str:
    """The same for a model card."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
