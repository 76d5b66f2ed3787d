"""What a second version of a run answers differently on the same examples, for ``loracle diff``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loracle.evaluation.calibration import UNCALIBRATED
from loracle.evaluation.changes import (
    BROKEN,
    FIXED,
    OTHER,
    GroupChange,
    class_changes,
    group_change,
    label_changes,
)
from loracle.evaluation.labels import Labels
from loracle.examples import LabeledText, RankGroup
from loracle.formatting import plain_table, shortened
from loracle.tasks.base import Calibrations, Scores, Task

LISTED = 5  # rows of each kind on the terminal
LETTERS = 100  # characters of a text there
CLASSES = 12  # labels there, those that changed most


class LabelChanges:
    """Changed labels: fixed, broken, or wrong both times."""

    def __init__(self, labels: Labels, *, per_label: bool):
        self.labels, self.per_label = labels, per_label

    def compare(
        self,
        a: Scores,
        b: Scores,
        examples: Sequence[LabeledText],
        task: Task,
        *,
        calibrations: Calibrations,
        labeled: bool,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        names, used = task.label_names, [c or UNCALIBRATED for c in calibrations]
        proba = [self.labels.probabilities(np.concatenate(s), c) for s, c in zip((a, b), used, strict=True)]
        assigned = [self.labels.assigned(p, c) for p, c in zip(proba, used, strict=True)]
        true = self.labels.indicator(self.labels.targets(examples, len(names)), len(names)) if labeled else None
        changes = label_changes(assigned[0], assigned[1], true)
        counts = Counter(change for change in changes if change)
        summary: dict[str, Any] = {"changed": counts.total()}
        if labeled:
            summary |= {FIXED: counts[FIXED], BROKEN: counts[BROKEN], "wrong_both_times": counts[OTHER]}
        classes = class_changes(assigned[0], assigned[1], true, names)
        has_context = any(e.context for e in examples)
        rows = []
        for i, (e, change) in enumerate(zip(examples, changes, strict=True)):
            if change is None:
                continue
            row: dict[str, Any] = {"row": e.row, "change": change}
            if labeled:
                row["label"] = "|".join(names[j] for j in e.labels)
            row |= {
                run: "|".join(names[j] for j in np.flatnonzero(m[i])) for run, m in zip("ab", assigned, strict=True)
            }
            if not self.per_label:
                row |= {f"p_{run}": round(float(p[i].max()), 4) for run, p in zip("ab", proba, strict=True)}
            rows.append(row | ({"context": e.context} if has_context else {}) | {"text": e.text})
        return {"changes": summary, "classes": classes}, rows

    def lines(self, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
        counts, texts = summary["changes"], summary["texts"]
        line = f"labels: {counts['changed']:,} of {texts:,} texts changed ({counts['changed'] / texts:.1%})"
        if FIXED in counts:
            line += (
                f": {counts[FIXED]:,} fixed, {counts[BROKEN]:,} broken, {counts['wrong_both_times']:,} wrong both times"
            )
        return [line, *self._class_lines(summary["classes"]), *self._row_lines(rows)]

    def _class_lines(self, classes: Sequence[Mapping[str, Any]]) -> list[str]:
        if not classes:
            return []
        names = ("texts", FIXED, BROKEN, "given_a", "given_b", "false_a", "false_b")
        columns = [c for c in names if c in classes[0]]
        head = ["", *(c.replace("_a", " A").replace("_b", " B") for c in columns)]
        table = [head, *([row["label"], *(f"{row[c]:,}" for c in columns)] for row in classes[:CLASSES])]
        more = [f"… and {len(classes) - CLASSES} labels more"] if len(classes) > CLASSES else []
        return ["", plain_table(table), *more]

    def _row_lines(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The first rows of each kind, broken ones first."""
        lines = []
        for change in (BROKEN, FIXED, OTHER):
            for row in [row for row in rows if row["change"] == change][:LISTED]:
                label = f", labelled {row['label']}" if "label" in row and change == OTHER else ""
                answers = f"{row['a'] or '–'} → {row['b'] or '–'}{label}"
                lines.append(f"{change:<7}  row {row['row']}: {answers}  {_short(row['text'])}")
        return ["", *lines] if lines else []


class GroupChanges:
    """Changed orders and picks."""

    def compare(
        self,
        a: Scores,
        b: Scores,
        examples: Sequence[RankGroup],
        task: Task,
        *,
        calibrations: Calibrations,
        labeled: bool,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        changes = [group_change(x[:, 0], y[:, 0], group) for x, y, group in zip(a, b, examples, strict=True)]
        counts = {name: sum(getattr(c, name) for c in changes) for name in ("pick_changed", "pairs", "reversed")}
        counts["order_changed"] = sum(c.reversed > 0 for c in changes)
        if labeled:
            counts |= {name: sum(getattr(c, name) for c in changes) for name in ("decided", FIXED, BROKEN)}
        rows = [self._row(c, group, labeled) for c, group in zip(changes, examples, strict=True) if c.reversed]
        return {"changes": counts}, rows

    def _row(self, change: GroupChange, group: RankGroup, labeled: bool) -> dict[str, Any]:
        what = "pick" if change.pick_changed else "order"
        row: dict[str, Any] = {"group": group.group, "row": group.rows[0], "change": what}
        row |= {"reversed": change.reversed, "pairs": change.pairs}
        if labeled:
            row |= {FIXED: change.fixed, BROKEN: change.broken}
        orders = {"a": change.order_a, "b": change.order_b}
        row |= {f"pick_{run}": group.texts[order[0]] for run, order in orders.items()}
        return row | {f"order_{run}": [group.texts[i] for i in order] for run, order in orders.items()}

    def lines(self, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
        counts, groups = summary["changes"], summary["groups"]
        same = 1 - counts["reversed"] / max(1, counts["pairs"])
        lines = [
            f"groups: {counts['order_changed']:,} of {groups:,} in another order, "
            f"{counts['pick_changed']:,} with another pick; {same:.1%} of pairs of titles unchanged"
        ]
        if FIXED in counts:
            fixed = f"{counts[FIXED]:,} fixed, {counts[BROKEN]:,} broken, of {counts['decided']:,}"
            lines.append(f"pairs with a winner: {fixed}")
        examples = []
        by_loss = sorted(rows, key=lambda row: (row["change"] != "pick", row.get(FIXED, 0) - row.get(BROKEN, 0)))
        for row in by_loss[: 2 * LISTED]:
            where = f"group {row['group']}" if row["group"] else f"row {row['row']}"
            counts_of_row = f", {row[FIXED]} fixed, {row[BROKEN]} broken" if FIXED in row else ""
            examples.append(f"{where}: {row['change']} changed{counts_of_row}")
            examples += [f"    {run}  {_short(row[f'pick_{run.lower()}'])}" for run in "AB"]
        return lines + (["", *examples] if examples else [])


def _short(text: str) -> str:
    return shortened(" ".join(text.split()), LETTERS)
