"""Titles to rank from a file, and the rows of a ranking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loracle.data.columns import infer_text_column
from loracle.data.reader import read_unlabeled_groups
from loracle.data.sources import open_table
from loracle.examples import RankGroup
from loracle.runs.columns import columns_of_run
from loracle.runs.folder import RunInfo
from loracle.runs.predictor import RankedTitle

WordScores = list[tuple[str, float]]


def read_titles(path: str, info: RunInfo, columns: dict[str, Any]) -> tuple[list[RankGroup], tuple[str, ...]]:
    """Groups of titles from a file, and what reading it skipped.

    Raises:
        UserError: the file or a column cannot be read.
    """
    table = open_table(path)
    named = columns_of_run(info, table, columns, only=("text", "group", "context"))
    groups, issues = read_unlabeled_groups(table, infer_text_column(table, named))
    return groups, issues


def ranking_rows(
    group: str, ranked: Sequence[RankedTitle], words: list[WordScores] | None, *, calibrated: bool
) -> Iterator[dict[str, Any]]:
    """One row for each title, best first; of a calibrated run also with its lift and its chances against the others."""
    for position, title in enumerate(ranked, 1):
        row: dict[str, Any] = {"group": group, "rank": position, "score": round(title.score, 6), "text": title.text}
        if calibrated:
            row |= {name: _rounded(getattr(title, name)) for name in ("lift", "lift_low", "lift_high")}
            row["beats"] = None if title.beats is None else [round(p, 4) for p in title.beats]
        if words is not None:
            row["words"] = [[word, round(value, 4)] for word, value in words[position - 1]]
        yield row


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
