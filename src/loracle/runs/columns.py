"""Columns of new data for a run: the columns of its training where they exist, unless flags name others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loracle.config import DataConfig

if TYPE_CHECKING:
    from loracle.data.table import Table
    from loracle.runs.folder import RunInfo

# Settings that read labelled data. Weight and date are used in training only.
EVALUATION_COLUMNS = (
    "text", "label", "group", "compare_within", "context", "clicks", "impressions", "clicked", "grade", "label_delimiter",
    "min_impressions",
)  # fmt: skip


def columns_of_run(
    info: RunInfo, table: Table, flags: dict[str, Any], only: tuple[str, ...] = EVALUATION_COLUMNS
) -> DataConfig:
    """The columns that training named or inferred, where ``table`` has them; ``flags`` win.

    Sums of clicks and single impressions exclude each other: flags of one kind drop what the run has of the other.
    """
    inferred = info.provenance.get("columns", {})
    trained = {name: inferred.get(name, getattr(info.config.data, name)) for name in only}
    columns = {name: value for name, value in trained.items() if _fits(name, value, table.columns)}
    if "clicked" in flags:
        columns = {name: value for name, value in columns.items() if name not in ("clicks", "impressions")}
    elif "clicks" in flags or "impressions" in flags:
        columns.pop("clicked", None)
    return DataConfig(**{**columns, **flags})


def _fits(name: str, value: Any, columns: tuple[str, ...]) -> bool:
    """Whether the table has the columns of a setting. Settings that name no column always fit."""
    if name in ("label_delimiter", "min_impressions"):
        return True
    return value is not None and all(c.strip() in columns for c in value.split(","))
