"""What changed between two versions, on cases small enough to be counted by hand; and differences of every metric."""

from __future__ import annotations

import numpy as np
import pytest

from loracle.evaluation.calibration import Calibration
from loracle.evaluation.changes import class_changes, group_change, label_changes
from loracle.evaluation.classification import classification_differences, classification_metrics
from loracle.evaluation.labels import AnyLabels, OneLabel
from loracle.examples import Preference, RankGroup

NAMES = ("neg", "pos", "mid")


def one_hot(*labels):
    return np.eye(3, dtype=bool)[list(labels)]


def test_label_changes_by_hand():
    true, a, b = one_hot(0, 0, 1, 1, 2), one_hot(0, 1, 1, 0, 0), one_hot(0, 0, 2, 2, 0)
    assert label_changes(a, b, true) == [None, "fixed", "broken", "changed", None]
    assert label_changes(a, b, None) == [None, "changed", "changed", "changed", None]
    assert class_changes(a, b, true, NAMES) == [
        {"label": "neg", "given_a": 3, "given_b": 3, "texts": 2, "fixed": 1, "broken": 0, "false_a": 2, "false_b": 1},
        {"label": "pos", "given_a": 2, "given_b": 0, "texts": 2, "fixed": 0, "broken": 1, "false_a": 1, "false_b": 0},
        {"label": "mid", "given_a": 0, "given_b": 2, "texts": 1, "fixed": 0, "broken": 0, "false_a": 0, "false_b": 2},
    ]
    assert class_changes(a, a, true, NAMES) == []


def test_several_labels_are_right_together():
    true = np.array([[True, True, False]] * 3)
    a = np.array([[True, False, False], [True, True, False], [False, False, False]])
    b = np.array([[True, True, False], [True, True, True], [True, False, False]])
    assert label_changes(a, b, true) == ["fixed", "broken", "changed"]


def test_group_change_by_hand():
    """Ties are no order: a pair that is tied by one and not by the other has reversed, and half of it is fixed."""
    group = RankGroup(
        group="g", texts=("x", "y", "z"), rows=(1, 2, 3),
        preferences=(Preference(winner=0, loser=1), Preference(winner=2, loser=1), Preference(winner=0, loser=2)),
    )  # fmt: skip
    found = group_change(np.array([1.0, 2.0, 0.0]), np.array([3.0, 2.0, 2.0]), group)
    assert (found.order_a, found.order_b, found.pick_changed) == ((1, 0, 2), (0, 1, 2), True)
    assert (found.pairs, found.reversed, found.decided, found.fixed, found.broken) == (3, 2, 3, 2, 0)
    back = group_change(np.array([3.0, 2.0, 2.0]), np.array([1.0, 2.0, 0.0]), group)
    assert (back.reversed, back.fixed, back.broken) == (2, 0, 2)
    same = group_change(np.array([1.0, 2.0, 0.0]), np.array([11.0, 12.0, 10.0]), group)
    assert (same.reversed, same.fixed, same.broken, same.pick_changed) == (0, 0, 0, False)


@pytest.mark.parametrize("labels", [OneLabel(), AnyLabels()])
def test_differences_equal_those_of_the_metrics(labels):
    rng, count = np.random.default_rng(0), 80
    one = isinstance(labels, OneLabel)
    targets = rng.integers(3, size=count) if one else rng.random((count, 3)) < 0.4
    true = np.eye(3)[targets] if one else targets
    a, b = (true * strength + rng.normal(size=(count, 3)) for strength in (2.0, 0.5))
    kept = (
        (Calibration(temperature=2.0), Calibration(temperature=0.5))
        if one
        else (Calibration(thresholds=(0.3, 0.5, 0.7)), Calibration(thresholds=(0.6, 0.4, 0.5)))
    )
    found = classification_differences((a, b), targets, labels, calibrations=kept)
    own, other = (classification_metrics(s, targets, labels, calibration=c) for s, c in zip((a, b), kept, strict=True))
    assert {"accuracy", "macro_f1", "auc"} <= found.keys() <= own.keys()
    for name, gap in found.items():
        assert gap.value == pytest.approx(own[name].value - other[name].value, abs=1e-12)
        assert gap.low <= gap.value <= gap.high
    assert found["auc"].low > 0, "a scorer four times as strong is better"
    equal = classification_differences((a, a), targets, labels)
    assert all((g.value, g.low, g.high) == (0, 0, 0) for g in equal.values())
