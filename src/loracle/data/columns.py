"""Which column is what: flags first, then names, then the content of the columns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loracle.config import DataConfig
from loracle.data.table import Table
from loracle.errors import UserError, near

# Names by which columns are known, whatever their case; where several are there, the first of these is taken.
TEXT_NAMES = (
    "text", "sentence", "content", "review", "comment", "abstract", "body", "message", "question", "query", "utterance",
    "tweet", "headline", "title", "description",
)  # fmt: skip
TITLE_NAMES = (
    "headline",
    "title",
    "text",
    "candidate",
    "document",
    "passage",
    "response",
    "answer",
    "content",
    "sentence",
)
LABEL_NAMES = (
    "label", "labels", "category", "categories", "class", "topic", "topics", "sentiment", "intent", "target", "stars",
    "rating", "emotion", "emotions", "tag", "tags", "genre",
)  # fmt: skip
GROUP_NAMES = ("group", "group_id", "test_id", "query_id", "qid")
GRADE_NAMES = ("grade", "relevance", "score")
SLICE_NAMES = ("source", "language", "lang")
CONTEXT_NAMES = ("context", "prompt", "query", "brief")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column is what. ``lines`` tell the user which assumptions were made."""

    messages: str | None = None  # chat messages, whose user content is the text
    text: str | None = None
    label: str | None = None
    group: tuple[str, ...] = ()
    compare_within: tuple[str, ...] = ()  # only titles that are equal in these are compared
    context: str | None = None
    clicks: str | None = None
    impressions: str | None = None
    clicked: str | None = None  # of one impression, a row each
    grade: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    margin: str | None = None
    weight: str | None = None
    slice: tuple[str, ...] = ()  # by whose values a classifier's report is sliced
    date: str | None = None
    lines: tuple[str, ...] = field(default=(), compare=False)

    def named(self) -> dict[str, tuple[str, ...]]:
        """``{role: columns}`` of those that are set."""
        roles = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "lines"}
        return {role: (c,) if isinstance(c, str) else c for role, c in roles.items() if c}


def cell_of(row: dict[str, Any], column: str | None) -> Any:
    """What stands in a column; None where there is no such column, or a JSON object leaves it out."""
    return None if column is None else row.get(column)


def check_flags(data: DataConfig) -> None:
    """Check that the flags name one thing to learn from.

    Raises:
        UserError: labels beside clicks or grades, or counts beside single impressions.
    """
    if data.label and (
        other := next((n for n in ("clicks", "impressions", "clicked", "grade") if getattr(data, n)), None)
    ):
        raise UserError(f"--label and --{other} exclude each other.", "Leave one of them out.")
    if data.clicked and (data.clicks or data.impressions):
        raise UserError(
            "--clicked names single impressions, --clicks and --impressions name their sums.", "Leave one of them out."
        )


def check_flags_used(columns: Columns, data: DataConfig) -> None:
    """Check that no flag names a column that this kind of data does not use.

    Raises:
        UserError: such a flag.
    """
    flags = {"compare-within": "clicks or grades", "slice": "texts with labels", "date": "titles to rank"}
    for flag, use in flags.items():
        name = flag.replace("-", "_")
        if getattr(data, name) and not getattr(columns, name):
            instead = " Pass --test FILE instead." if flag == "date" else ""
            raise UserError(f"--{flag} is only used with {use}.", f"Leave --{flag} out.{instead}")


def infer_text_column(table: Table, data: DataConfig) -> Columns:
    """Text, and as far as they are there context and group, of a table without labels.

    Raises:
        UserError: a named column is not there, or nothing tells which column is the text.
    """
    columns = _text_columns(table, data, TEXT_NAMES, group=group_columns(table, data))
    return dataclasses.replace(columns, lines=assumptions(columns))


def assumptions(columns: Columns) -> tuple[str, ...]:
    """One line for each role: the columns that it was read from."""
    lines = [
        f"{role.replace('_', '-')} column{'s' if len(names) > 1 else ''}: {', '.join(map(repr, names))}"
        for role, names in columns.named().items()
    ]
    if columns.clicked:
        lines.append("one impression a row: summed to clicks and impressions of each title")
    return tuple(lines)


def label_lists(table: Table, columns: Columns) -> bool:
    """Whether the label cells of the first rows hold lists."""
    return any(isinstance(cell_of(row, columns.label), list) for _, row in table.head())


def _columns_of(table: Table) -> str:
    return f"columns: {', '.join(map(repr, table.columns))}"


# ---------------------------------------------------------------------------------------------------------------------
# Flags and names


def _flagged(table: Table, name: str | None, flag: str) -> str | None:
    """The column that a flag names, which must be there."""
    if name is None or name in table.columns:
        return name
    raise UserError(
        f"No column '{name}' in {table.name} ({_columns_of(table)}){near(name, table.columns)}.",
        f"Name one of them with --{flag}.",
    )


def _common(table: Table, names: Iterable[str], taken: Iterable[str | None] = ()) -> str | None:
    """The first of these names among the columns, whatever its case."""
    there = {column.strip().lower(): column for column in reversed(table.columns) if column not in taken}
    return next((there[name] for name in names if name in there), None)


def group_columns(table: Table, data: DataConfig) -> tuple[str, ...]:
    if data.group is None:
        name = _common(table, GROUP_NAMES)
        return (name,) if name else ()
    return _several(table, data.group, "group")


def _several(table: Table, flagged: str | None, flag: str) -> tuple[str, ...]:
    """The columns that a flag names, joined by commas."""
    if flagged is None:
        return ()
    names = (flagged,) if flagged in table.columns else tuple(name.strip() for name in flagged.split(","))
    for name in names:
        _flagged(table, name, flag)
    return names


def pair_columns(table: Table, data: DataConfig) -> Columns | None:
    chosen, rejected = _common(table, ["chosen"]), _common(table, ["rejected"])
    if not (chosen and rejected) or data.text or data.clicks or data.impressions or data.clicked or data.grade:
        return None
    return Columns(
        chosen=chosen,
        rejected=rejected,
        group=group_columns(table, data) if data.group else (),
        context=_flagged(table, data.context, "context") or _common(table, ["prompt", "context"]),
        margin=_common(table, ["margin"]),
        weight=_flagged(table, data.weight, "weight"),
        date=_flagged(table, data.date, "date"),
    )


def click_columns(table: Table, data: DataConfig) -> Columns | None:
    clicks = _flagged(table, data.clicks, "clicks") or _common(table, ["clicks"])
    impressions = _flagged(table, data.impressions, "impressions") or _common(table, ["impressions"])
    wanted = data.clicks or data.impressions
    if data.grade or data.clicked or not (wanted or (clicks and impressions)):
        return None
    if not (clicks and impressions):
        missing = "impressions" if clicks else "clicks"
        raise UserError(
            f"No {missing} column found in {table.name} ({_columns_of(table)}).", f"Name it with --{missing}."
        )
    return _competing(table, data, clicks=clicks, impressions=impressions)


def event_columns(table: Table, data: DataConfig) -> Columns | None:
    """By flag, or of a column called clicked that holds nothing but 0 and 1 where nothing else could be learnt."""
    clicked = _flagged(table, data.clicked, "clicked") or _common(table, ["clicked"])
    if not clicked or data.grade:
        return None
    if not data.clicked and (
        not group_columns(table, data)
        or _common(table, [*LABEL_NAMES, *GRADE_NAMES])
        or not all(str(cell_of(row, clicked)).strip().lower() in ("0", "1", "true", "false") for _, row in table.head())
    ):
        return None
    return _competing(table, data, clicked=clicked)


def grade_columns(table: Table, data: DataConfig) -> Columns | None:
    grade = _flagged(table, data.grade, "grade") or _common(table, GRADE_NAMES)
    grouped = data.group or data.context or group_columns(table, data)
    if not grade or (not data.grade and (not grouped or _common(table, LABEL_NAMES))):
        return None
    return _competing(table, data, grade=grade)


def _competing(table: Table, data: DataConfig, **evidence: Any) -> Columns:
    """Columns of titles that compete; a shared context makes a group where no column is called one."""
    group = group_columns(table, data)
    context = _flagged(table, data.context, "context") or (None if group else _common(table, CONTEXT_NAMES))
    if not (group or context):
        raise UserError(
            f"No column in {table.name} tells which titles compete ({_columns_of(table)}).",
            "Name it with --group. Join several by commas.",
        )
    known = {
        "compare_within": _several(table, data.compare_within, "compare-within"),
        "weight": _flagged(table, data.weight, "weight"),
        "date": _flagged(table, data.date, "date"),
        **evidence,
    }
    taken = {*group, *known["compare_within"], context, known["weight"], known["date"], *evidence.values()} - {None}
    columns = _text_columns(table, data, TITLE_NAMES, group=group, taken=taken)
    return dataclasses.replace(columns, group=group or (str(context),), context=context, **known)


def label_columns(table: Table, data: DataConfig) -> Columns:
    slices = _several(table, data.slice, "slice")
    taken = [data.text, data.context, data.weight, *slices]
    label = _flagged(table, data.label, "label") or _common(table, LABEL_NAMES, taken=taken)
    weight = _flagged(table, data.weight, "weight") or _common(table, ["sample_weight"], taken=[label])
    columns = _text_columns(table, data, TEXT_NAMES, taken={label, weight} - {None})
    known = {columns.text, columns.messages, columns.context, weight}
    label = label or _guessed_label(table, taken={*known, *slices})
    if data.slice is None:
        slices = tuple(c for name in SLICE_NAMES if (c := _common(table, [name], taken={*known, label})))
    return dataclasses.replace(columns, label=label, weight=weight, slice=slices)


def _text_columns(
    table: Table,
    data: DataConfig,
    names: Iterable[str],
    *,
    group: tuple[str, ...] = (),
    taken: Iterable[str | None] = (),
) -> Columns:
    """Text (or messages) and the context that a flag names."""
    context = _flagged(table, data.context, "context")
    taken = {*taken, *group, context}
    messages = _common(table, ["messages"], taken) if data.text is None else None
    if messages and not isinstance(table.head(1)[0][1].get(messages), str):
        return Columns(messages=messages, context=context, group=group)
    text = _flagged(table, data.text, "text") or _common(table, names, taken) or _guessed_text(table, taken)
    return Columns(text=text, context=context, group=group)


# ---------------------------------------------------------------------------------------------------------------------
# What stands in the columns


def _guessed_text(table: Table, taken: Iterable[str | None]) -> str:
    """The column of the longest texts in the first rows, if it is by far the longest.

    Ids, dates and addresses are no texts, so that only cells count that hold a blank or a letter beyond ASCII.
    """
    _check_header(table)
    lengths = {}
    for column in (c for c in table.columns if c not in taken):
        cells = [cell for _, row in table.head() if isinstance(cell := row.get(column), str) and cell.strip()]
        if any(not re.fullmatch(r"[!-~]+", cell.strip()) for cell in cells) or (cells and len(table.columns) == 1):
            lengths[column] = sum(map(len, cells)) / len(cells)
    longest = sorted(lengths, key=lambda column: -lengths[column])
    if not longest or (len(longest) > 1 and lengths[longest[1]] > lengths[longest[0]] / 2):
        raise UserError(f"No text column found in {table.name} ({_columns_of(table)}).", "Name it with --text.")
    return longest[0]


def _guessed_label(table: Table, taken: Iterable[str | None]) -> str:
    """The one column whose values recur in the first rows; where several do, those with one value are passed over."""
    _check_header(table)
    rows = [row for _, row in table.head()]
    distinct = {}
    for column in (c for c in table.columns if c not in taken):
        cells = [str(cell) for row in rows if (cell := row.get(column)) not in (None, "")]
        if cells and 2 * len(set(cells)) <= len(cells):
            distinct[column] = len(set(cells))
    recurring = [column for column, count in distinct.items() if count > 1] or list(distinct)
    if len(recurring) != 1:
        raise UserError(f"No label column found in {table.name} ({_columns_of(table)}).", "Name it with --label.")
    return recurring[0]


def _check_header(table: Table) -> None:
    """Names that read like data: a sentence, or a number (but 0, 1, 2, ... is how pandas names columns)."""
    if table.columns == tuple(map(str, range(len(table.columns)))):
        return
    for name in table.columns:
        if len(name) > 60 or len(name.split()) > 5 or re.fullmatch(r"-?\d+([.,]\d+)*", name):
            raise UserError(
                f"The first row of {table.name} has no column names: '{name[:60]}' reads like data.",
                "Add a first row such as: text,label. If these are the names, pass --text and --label.",
            )
