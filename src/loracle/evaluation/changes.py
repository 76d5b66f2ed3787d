"""What a second version of a classifier or ranker says otherwise than the first, on the same examples. Pure NumPy.

Fixed: wrong by the first (A) and right by the second (B); broken: the other way round. Where no truth is known there are
only changes.

Legend of shapes: N texts, C labels, n titles of a group, P pairs of them with a winner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loracle.evaluation.pairs import group_pairs
from loracle.examples import RankGroup

Mask = npt.NDArray[np.bool_]
FIXED, BROKEN, OTHER = "fixed", "broken", "changed"


def label_changes(given_a: Mask, given_b: Mask, true: Mask | None) -> list[str | None]:
    """What happened to each of N texts, by the labels ``[N, C]`` that A and B give it: None where they are the same.

    A text is right where all of its labels are. ``OTHER`` where both are wrong, or nobody knows.
    """
    changed = (given_a != given_b).any(axis=1)
    if true is None:
        return [OTHER if c else None for c in changed]
    right_a, right_b = ((given == true).all(axis=1) for given in (given_a, given_b))
    return [
        None if not c else FIXED if b else BROKEN if a else OTHER
        for c, a, b in zip(changed, right_a, right_b, strict=True)
    ]


def class_changes(given_a: Mask, given_b: Mask, true: Mask | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """Who gained and who lost, a row for each label that is given to other texts than before, the most moved first.

    Counts of texts: ``given_a``, ``given_b``, and where the truth is known ``texts`` that have the label, of these
    ``fixed`` (found by B, missed by A) and ``broken``, and ``false_a``, ``false_b``, which are given it wrongly.
    """
    rows = []
    for c in np.flatnonzero((given_a != given_b).any(axis=0)):
        a, b = given_a[:, c], given_b[:, c]
        row: dict[str, Any] = {"label": names[int(c)], "given_a": int(a.sum()), "given_b": int(b.sum())}
        if true is not None:
            t = true[:, c]
            row |= {"texts": int(t.sum()), "fixed": int((b & ~a & t).sum()), "broken": int((a & ~b & t).sum())}
            row |= {"false_a": int((a & ~t).sum()), "false_b": int((b & ~t).sum())}
        rows.append((int((a != b).sum()), row))
    return [row for _, row in sorted(rows, key=lambda moved: -moved[0])]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupChange:
    """A group as A and B rank it: titles best first as indices, and the pairs of titles, of which some have a winner."""

    order_a: tuple[int, ...]
    order_b: tuple[int, ...]
    pairs: int  # of titles
    reversed: int  # of these those that A and B order otherwise; a tie is an order of its own
    decided: int  # pairs with a winner
    fixed: int
    broken: int

    @property
    def pick_changed(self) -> bool:
        """Whether another title comes first."""
        return self.order_a[0] != self.order_b[0]


def group_change(scores_a: np.ndarray, scores_b: np.ndarray, group: RankGroup) -> GroupChange:
    """How scores ``[n]`` of A and B differ in what they say of a group's titles; equal scores keep their order."""
    first, second = np.triu_indices(len(group.texts), 1)
    signs = [np.sign(s[first] - s[second]) for s in (scores_a, scores_b)]
    winner, loser = group_pairs(group).T  # [P] each
    gain = np.sign(scores_b[winner] - scores_b[loser]) - np.sign(scores_a[winner] - scores_a[loser])
    order_a, order_b = (tuple(map(int, np.argsort(-s, kind="stable"))) for s in (scores_a, scores_b))
    return GroupChange(
        order_a=order_a,
        order_b=order_b,
        pairs=len(first),
        reversed=int((signs[0] != signs[1]).sum()),
        decided=len(winner),
        fixed=int((gain > 0).sum()),
        broken=int((gain < 0).sum()),
    )
