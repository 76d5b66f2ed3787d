"""Sections of a ranker's report: the groups in which its pick lost most and least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loracle.evaluation.intervals import Array
from loracle.examples import RankGroup
from loracle.formatting import shortened

LISTED = 20  # titles of a group
LETTERS = 400  # characters shown of a text
GROUPS = 6  # example groups, half of them where the ranker did worst


def example_groups(scores: Sequence[Array], groups: Sequence[RankGroup]) -> list[dict[str, Any]]:
    """A few groups, best score first: where the pick lost most to the best title, then where it lost least."""
    worth = [_worth(group) for group in groups]
    decided = [i for i, w in enumerate(worth) if w is not None and w.max() > w.min()]

    def lost(i: int) -> float:
        w = worth[i]
        assert w is not None
        return float((w.max() - w[np.argmax(scores[i])]) / max(abs(w.max()), 1e-12))

    by_loss = sorted(decided, key=lost, reverse=True)
    half = GROUPS // 2
    chosen = [("lost most", i) for i in by_loss[:half]] + [("lost least", i) for i in by_loss[half:][-half:]]
    return [{"why": why, **_group(scores[i], groups[i])} for why, i in chosen]


def _worth(group: RankGroup) -> Array | None:
    """Click rate, grade, or wins less losses of each title. None without evidence."""
    if group.clicks is not None:
        return np.array(group.clicks) / np.maximum(np.array(group.impressions), 1)
    if group.grades is not None:
        return np.array(group.grades, dtype=np.float64)
    if not group.preferences:
        return None
    wins = np.zeros(len(group.texts))
    for preference in group.preferences:
        wins[preference.winner] += 1
        wins[preference.loser] -= 1
    return wins


def _group(scores: Array, group: RankGroup) -> dict[str, Any]:
    def title(i: int) -> dict[str, Any]:
        values: dict[str, Any] = {
            "text": shortened(group.texts[i], LETTERS),
            "row": group.rows[i],
            "score": float(scores[i]),
        }
        if group.clicks is not None and group.impressions is not None:
            impressions = group.impressions[i]
            rate = group.clicks[i] / max(impressions, 1)
            values |= {"impressions": impressions, "clicks": group.clicks[i], "rate": rate}
        elif group.grades is not None:
            values["grade"] = group.grades[i]
        else:
            values["won"] = sum(p.winner == i for p in group.preferences)
        return values

    best_first = np.argsort(-scores, kind="stable")[:LISTED]
    return {"group": str(group.group), "context": group.context and shortened(group.context, LETTERS),
            "titles": [title(int(i)) for i in best_first], "of": len(scores)}  # fmt: skip
