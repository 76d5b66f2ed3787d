"""Examples from Python lists: the task is told from what stands in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loracle.data.click_logs.counts import Shown, check_counts
from loracle.data.columns import Columns
from loracle.errors import UserError
from loracle.examples import LabeledText, Preference, RankGroup
from loracle.tasks import Task
from loracle.tasks.dataset import Examples


def labeled_texts(texts: Sequence[str], labels: Sequence[Any]) -> Examples:
    """Texts with their labels: strings, integers, or a list of them each, which makes the task multi-label.

    Raises:
        UserError: the lengths differ.
    """
    if len(texts) != len(labels):
        raise UserError(f"There are {len(texts)} texts but {len(labels)} labels.", "Give one label for each text.")
    several = any(isinstance(label, (list, tuple, set, frozenset)) for label in labels)
    given = [sorted(label, key=str) if several else [label] for label in labels]
    distinct = {label for some in given for label in some}
    numeric = all(isinstance(label, (int, np.integer)) for label in distinct)
    names = tuple(str(label) for label in sorted(distinct, key=int if numeric else str))
    index = {name: i for i, name in enumerate(names)}
    items = [
        LabeledText(text=text, labels=tuple(index[str(label)] for label in some), row=row)
        for row, (text, some) in enumerate(zip(texts, given, strict=True), 1)
    ]
    task = Task(name="multi_label" if several else "single_label", label_names=names)
    return Examples(task=task, items=items, columns=Columns())


def labeled_groups(groups: Sequence[Mapping[str, Any]]) -> Examples:
    """Groups as ``TextRanker.fit`` takes them. Rows count groups from 1.

    Raises:
        UserError: a group without evidence, evidence of several kinds, or lists of other lengths than the titles.
    """
    items = [_group(i, g) for i, g in enumerate(groups, 1)]
    names = {_evidence(g) for g in items}
    if len(names) != 1:
        found = ", ".join(sorted(names)) or "no group"
        raise UserError(f"All groups need the same evidence; they have: {found}.", "Keep one.")
    task = Task(name="click_ranking" if "clicks" in names else "ranking")
    return Examples(task=task, items=items, columns=Columns())


def _group(number: int, group: Mapping[str, Any]) -> RankGroup:
    texts = tuple(group["texts"])
    known: dict[str, Any] = {name: tuple(group[name]) for name in ("clicks", "impressions", "grades") if name in group}
    if bad := [name for name, values in known.items() if len(values) != len(texts)]:
        raise UserError(f"Group {number} has {len(texts)} titles but {len(known[bad[0]])} {bad[0]}.", "Give one each.")
    if not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(f"Group {number} has a blank title: {list(texts)!r}.", "Leave it out.")
    if len(set(texts)) < max(2, len(texts)):
        raise UserError(f"Group {number} needs two or more distinct titles: {list(texts)!r}.", "Merge equal titles.")
    if "clicks" in known and "impressions" in known:
        counts = zip(texts, known["clicks"], known["impressions"], strict=True)
        check_counts([Shown(number, *count) for count in counts], "the groups")
    best = group.get("best")
    if best is not None and best not in range(len(texts)):
        raise UserError(f"best of group {number} is {best!r}; it must be the index of a title, 0 to {len(texts) - 1}.")
    pairs = () if best is None else tuple(Preference(winner=best, loser=i) for i in range(len(texts)) if i != best)
    return RankGroup(
        group=str(number),
        texts=texts,
        rows=(number,) * len(texts),
        context=group.get("context"),
        preferences=pairs,
        **known,
    )


def _evidence(group: RankGroup) -> str:
    if group.clicks and group.impressions:
        return "clicks"
    if group.grades:
        return "grades"
    if group.preferences:
        return "pairs"
    raise UserError(f"Group {group.group} has nothing to learn from.", "Give clicks and impressions, grades, or best.")
