"""Paired tests: known values, levels by simulation, and copies that count once."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from loracle.evaluation.labels import AnyLabels, OneLabel
from loracle.evaluation.significance import compare_classifiers, compare_rankers, holm, mcnemar
from loracle.examples import LabeledText, Preference, RankGroup


def right_or_wrong(both, only_a, only_b, neither):
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    return np.array(a), np.array(b)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (10, 0, 2 / 2**10),
        (1, 9, 22 / 2**10),  # 2 (C(10,0) + C(10,1)) / 2^10
        (5, 5, 1.0),
        (0, 0, 1.0),
        (6, 16, 2 * (1 + 22 + 231 + 1540 + 7315 + 26334 + 74613) / 2**22),
    ],
)
def test_mcnemar_by_known_values(only_a, only_b, p):
    assert mcnemar(*right_or_wrong(59, only_a, only_b, 80)) == pytest.approx(p, abs=1e-12)
    tails = 2 * binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
    assert mcnemar(*right_or_wrong(0, only_a, only_b, 3)) == pytest.approx(min(1.0, tails))


def test_copies_of_a_text_are_one():
    a, b = right_or_wrong(3, 6, 0, 3)
    once = mcnemar(a, b)
    groups = list(range(12))
    assert mcnemar(np.tile(a, 5), np.tile(b, 5), groups * 5) == once == 2 / 2**6
    assert mcnemar(np.tile(a, 5), np.tile(b, 5)) < 1e-6  # what counting them would claim


@pytest.mark.slow
def test_mcnemar_keeps_its_level():
    """Two classifiers that are equally good, right together or not: rejections at .05 come at most as often."""
    rng = np.random.default_rng(0)
    draws = [rng.random((2, 200)) < 0.7 for _ in range(2000)]
    rejected = np.mean([mcnemar(a, b) < 0.05 for a, b in draws])
    assert 0.02 < rejected <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 2000)  # exact tests are on the safe side


def test_holm_by_hand():
    """0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 · 1 raised to what came before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_familywise_level():
    rng = np.random.default_rng(1)
    families = rng.random((4000, 5))
    assert np.mean([min(holm(p)) < 0.05 for p in families]) == pytest.approx(0.05, abs=0.01)
    assert np.mean([min(p) < 0.05 for p in families]) > 0.2


def texts(n, copies=1):
    return [LabeledText(text=f"t{i}", labels=(i % 2,), row=i) for i in range(n) for _ in range(copies)]


def test_classifiers_are_compared_by_what_accuracy_counts():
    items, rng = texts(60, copies=2), np.random.default_rng(0)
    truth = np.eye(2)[[e.labels[0] for e in items]]
    noise = np.repeat(rng.normal(size=(2, 60, 2)), 2, axis=1)
    good, poor = truth + 0.2 * noise[0], truth + 3 * noise[1]
    found = compare_classifiers((good, poor), items, OneLabel())
    accuracy = [np.mean(s.argmax(1) == truth.argmax(1)) for s in (good, poor)]
    assert found.difference.value == pytest.approx(accuracy[0] - accuracy[1])
    assert found.difference.low < found.difference.value < found.difference.high
    ahead = ((good.argmax(1) == truth.argmax(1)) & (poor.argmax(1) != truth.argmax(1))).sum() // 2
    behind = ((good.argmax(1) != truth.argmax(1)) & (poor.argmax(1) == truth.argmax(1))).sum() // 2
    assert found.p == pytest.approx(min(1.0, 2 * binom.cdf(min(ahead, behind), ahead + behind, 0.5)))
    assert found.metric == "accuracy"


def test_credit_shares_ties_and_wants_whole_label_sets():
    assert OneLabel().credit(np.array([[1.0, 1.0], [2.0, 0.0]]), np.array([0, 1])).tolist() == [0.5, 0.0]
    several = np.array([[True, True], [False, False]])
    assert AnyLabels().credit(np.array([[1.0, -1.0], [-1.0, -1.0]]), several).tolist() == [0.0, 1.0]


def groups(n):
    return [
        RankGroup(group=str(i), texts=("x", "y"), rows=(i, i), preferences=(Preference(winner=0, loser=1),))
        for i in range(n)
    ]


@pytest.mark.slow
def test_rankers_keep_the_level_about():
    rng, some = np.random.default_rng(2), groups(60)
    rejected = []
    for _ in range(200):
        a, b = rng.normal(size=(2, 60, 2))
        rejected.append(compare_rankers(list(a), list(b), some).p < 0.05)
    assert 0.005 < np.mean(rejected) < 0.1


def test_a_better_ranker_stands_out_but_not_on_a_few_groups():
    up, down = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    found = compare_rankers([up] * 20, [down] * 20, groups(20))
    assert (found.difference.value, found.p) == (1.0, 2.0**-19)
    assert compare_rankers([up] * 3, [down] * 3, groups(3)).p == 0.25
    assert compare_rankers([up] * 3, [up] * 3, groups(3)).p == 1.0
