"""A click log becomes groups of titles with clicks and impressions: checked, merged, filtered, all of it counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loracle.data.issues import Issue, IssueLog, rows_named
from loracle.errors import UserError
from loracle.examples import RankGroup

CLICK_ISSUES = {
    "repeated-title": "rows that repeat a title of their group, merged with it",
    "few-impressions": "titles with too few impressions, left out",
    "single-title": "groups with one title, skipped since nothing competes with it",
    "zero-clicks": "groups without any click, skipped since they prefer nothing",
    "no-clicked": "impressions that do not say whether they were clicked, skipped",
}


@dataclass(frozen=True, slots=True)
class Shown:
    """One line of a click log: a title, how often it was clicked and how often shown (as read, unchecked)."""

    row: int
    text: str
    clicks: float
    impressions: float


def check_counts(shown: Sequence[Shown], source: str) -> None:
    """That counts are whole, not negative, and no title was clicked more often than shown.

    Raises:
        UserError: naming all that is wrong, how often and in which rows.
    """
    wrong = {
        "fractions": [s.row for s in shown if s.clicks % 1 or s.impressions % 1],
        "counts below 0": [s.row for s in shown if s.clicks < 0 or s.impressions < 0],
        "more clicks than impressions": [s.row for s in shown if s.clicks > s.impressions],
    }
    if found := [f"{what}: {len(rows):,} ({_named(rows)})" for what, rows in wrong.items() if rows]:
        raise UserError(
            f"Impossible counts in {source}: {', '.join(found)}.",
            "Clicks and impressions must be whole numbers, 0 or more, with clicks at most impressions. "
            "Correct or remove the rows.",
        )


def _named(rows: Sequence[int]) -> str:
    return rows_named(rows[: Issue.ROWS_NAMED], len(rows))


def click_group(
    shown: Sequence[Shown], make: Callable[..., RankGroup], *, min_impressions: int, issues: IssueLog
) -> RankGroup | None:
    """The titles of one group, each once, with the sums of its counts; None where they tell nothing.

    Titles are merged before they are filtered: two rows of 60 impressions are one title of 120.

    Args:
        shown: checked rows of this group, in the order of the log. make: of its titles and counts, the group, which knows
            the rest about itself.
        min_impressions: titles shown less often are left out.
        issues: counts what was merged, left out and skipped.
    """
    merged: dict[str, Shown] = {}
    for s in shown:
        if first := merged.get(s.text):
            issues.add("repeated-title", s.row)
            clicks, impressions = first.clicks + s.clicks, first.impressions + s.impressions
            s = Shown(first.row, s.text, clicks, impressions)
        merged[s.text] = s
    for s in merged.values():
        if s.impressions < min_impressions:
            issues.add("few-impressions", s.row)
    titles = [s for s in merged.values() if s.impressions >= min_impressions]
    if not titles:
        return None  # each of its titles was counted
    if len(titles) == 1:
        issues.add("single-title", titles[0].row)
        return None
    if not any(s.clicks for s in titles):
        issues.add("zero-clicks", titles[0].row)
        return None
    return make(
        texts=tuple(s.text for s in titles),
        rows=tuple(s.row for s in titles),
        clicks=tuple(int(s.clicks) for s in titles),
        impressions=tuple(int(s.impressions) for s in titles),
    )
