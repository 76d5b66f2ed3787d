"""Baselines: losses against finite differences and known optima, tiny and degenerate data, and that they learn."""

import dataclasses

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from loracle.data.examples import Preference, RankGroup, Task
from loracle.errors import UserError
from loracle.judge.baselines import (
    frozen_classifier,
    frozen_ranker,
    length_ranker,
    linear_ranker,
    majority,
    rank_loss,
    tfidf_classifier,
    tfidf_ranker,
)
from loracle.judge.metrics import classification_metrics, probabilities
from loracle.judge.ranking import rank_metrics

SINGLE = Task(kind="single", label_names=("a", "b", "c"))
MULTI = Task(kind="multi", label_names=("a", "b", "c"))
SETTINGS = {"saturation": 200.0, "margin": 1.0}


def group(texts=("x", "y", "z"), name="g", **evidence):
    return RankGroup(group=name, texts=tuple(texts), rows=tuple(range(1, len(texts) + 1)), **evidence)


CLICKS = [
    group(clicks=(10, 5, 0), impressions=(1000, 700, 300)),
    group(("u", "v"), clicks=(300, 200), impressions=(9000, 8000), weight=2.0),
    group(("s", "t"), clicks=(0, 0), impressions=(10, 0)),
]
GRADES = [group(grades=(2.0, 0.0, 1.0)), group(("u", "v"), grades=(-1.0, 1.5)), group(("s", "t"), grades=(0.0, 0.0))]
PAIRS = [
    group(preferences=(Preference(winner=0, loser=1), Preference(winner=2, loser=1, margin=0.4))),
    group(("u", "v"), preferences=(Preference(winner=1, loser=0, margin=2.0),), weight=0.5),
    group(("s", "t")),
]


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["list", "bradley-terry", "margin"])
@pytest.mark.parametrize("groups", [CLICKS, GRADES, PAIRS], ids=["clicks", "grades", "pairs"])
def test_gradient_agrees_with_finite_differences(groups, loss):
    objective = rank_loss(groups, loss, **SETTINGS)
    scores, step = np.random.default_rng(0).normal(size=7), 1e-6
    _, gradient = objective(scores)
    numeric = [(objective(scores + step * e)[0] - objective(scores - step * e)[0]) / (2 * step) for e in np.eye(7)]
    np.testing.assert_allclose(gradient, numeric, atol=1e-8)
    assert np.abs(gradient).max() > 0.01


def test_list_loss_of_clicks_by_hand():
    """Each group's click shares times m/(1 + m/m0), divided once by the total weight; p is softmax(s + log n)."""
    scores = np.array([0.3, -0.2, 0.1, 1.0, -1.0, 0.0, 0.0])
    p = np.exp(scores[:3]) * [1000, 700, 300]
    q = np.exp(scores[3:5]) * [9000, 8000]
    first, second = 15 / (1 + 15 / 200), 2 * 500 / (1 + 500 / 200)
    expected = -first * np.array([10, 5]) / 15 @ np.log(p / p.sum())[:2] - second * np.array([0.6, 0.4]) @ np.log(
        q / q.sum()
    )
    assert rank_loss(CLICKS, "list", **SETTINGS)(scores)[0] == pytest.approx(expected / (first + second))


def test_list_loss_of_grades_by_hand():
    scores = np.array([0.3, -0.2, 0.1, 1.0, -1.0, 0.0, 0.0])
    expected = -np.array([0.75, 0, 0.25]) @ log_softmax(scores[:3]) - log_softmax(scores[3:5])[1]
    assert rank_loss(GRADES, "list", **SETTINGS)(scores)[0] == pytest.approx(expected / 2)


def test_pair_losses_by_hand():
    scores = np.array([0.5, 0.0, 1.0, 0.2, 0.3, 0.0, 0.0])
    leads, weights = np.array([0.5, 1.0, 0.1]), np.array([1, 1, 0.5])
    bradley_terry = weights @ np.log1p(np.exp(-(leads - [0, 0.4, 2.0]))) / 2.5
    assert rank_loss(PAIRS, "bradley-terry", **SETTINGS)(scores)[0] == pytest.approx(bradley_terry)
    margin = weights @ np.maximum(0, np.array([1.0, 0.4, 2.0]) - leads) / 2.5
    assert rank_loss(PAIRS, "margin", **SETTINGS)(scores)[0] == pytest.approx(margin)


def test_a_preference_is_a_list_of_two():
    scores = np.random.default_rng(0).normal(size=7)
    assert rank_loss(PAIRS, "list", **SETTINGS)(scores)[0] == rank_loss(PAIRS, "bradley-terry", **SETTINGS)(scores)[0]
    pair = [group(("u", "v"), preferences=(Preference(winner=0, loser=1),))]
    graded = [group(("u", "v"), grades=(1.0, 0.0))]
    as_pair, as_list = (rank_loss(g, "list", **SETTINGS)(scores[:2])[0] for g in (pair, graded))
    assert as_pair == pytest.approx(as_list)


def test_list_loss_is_least_at_the_log_odds_of_the_click_rates():
    objective = rank_loss(CLICKS[1:2], "list", **SETTINGS)
    best = np.log(np.array([300, 200]) / [9000, 8000])
    value, gradient = objective(best)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    assert all(objective(best + np.array([shift, 0]))[0] > value for shift in (-0.1, 0.1))


@pytest.mark.parametrize("loss", ["list", "bradley-terry", "margin"])
def test_losses_ignore_a_shift_of_a_group_and_survive_huge_scores(loss):
    objective, scores = rank_loss(CLICKS, loss, **SETTINGS), np.random.default_rng(0).normal(size=7)
    assert objective(scores + np.array([5, 5, 5, -3, -3, 0, 0]))[0] == pytest.approx(objective(scores)[0])
    value, gradient = objective(scores * 1e5)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_list_loss_refuses_mixed_evidence():
    with pytest.raises(UserError, match="one kind of evidence in all groups; found clicks and pairs"):
        rank_loss([CLICKS[0], PAIRS[0]], "list", **SETTINGS)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss 'auto' is none of list, bradley-terry, margin"):
        rank_loss(CLICKS, "auto", **SETTINGS)


# --- rankers ----------------------------------------------------------------------------------------------------------


def click_log(groups=300, seed=0, h=4, true=(1.0, -0.5, 0.0, 0.0)):
    """Groups whose log click rate is linear in features of the titles, with those features."""
    rng, made, features = np.random.default_rng(seed), [], []
    for i in range(groups):
        x = rng.normal(size=(int(rng.integers(2, 5)), h))
        impressions = rng.integers(500, 3000, len(x))
        clicks = rng.binomial(impressions, 0.02 * np.exp(np.clip(x @ true, -3, 3)))
        texts = [f"title {i} {j}" for j in range(len(x))]
        made.append(group(texts, f"g{i}", clicks=tuple(clicks.tolist()), impressions=tuple(impressions.tolist())))
        features.append(x)
    return made, features


def test_linear_ranker_recovers_the_weights_behind_the_clicks():
    groups, features = click_log()
    weights = linear_ranker(np.concatenate(features), groups, "list", **SETTINGS)
    np.testing.assert_allclose(weights, [1.0, -0.5, 0.0, 0.0], atol=0.08)


def test_linear_ranker_is_the_same_on_sparse_features():
    groups, features = click_log(groups=60)
    dense = np.concatenate(features)
    expected = linear_ranker(dense, groups, "list", **SETTINGS)
    np.testing.assert_allclose(
        linear_ranker(csr_matrix(dense), groups, "list", **SETTINGS), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("loss", ["list", "bradley-terry", "margin"])
def test_frozen_ranker_learns_with_each_loss_whatever_the_units(loss):
    groups, features = click_log()
    features = [x * [1, 1000, 1, 1] + [0, 0, 5, 0] for x in features]
    scores = frozen_ranker(features[:200], groups[:200], features[200:], loss, **SETTINGS)
    assert [s.shape for s in scores] == [(len(g.texts),) for g in groups[200:]]
    assert rank_metrics(scores, groups[200:])["pair_accuracy"].value > 0.85


def test_arm_order_does_not_matter():
    groups, features = click_log(groups=60)
    flipped = [
        dataclasses.replace(g, texts=g.texts[::-1], clicks=g.clicks[::-1], impressions=g.impressions[::-1])
        for g in groups
    ]
    expected = frozen_ranker(features, groups, features, "list", **SETTINGS)
    found = frozen_ranker([x[::-1] for x in features], flipped, features, "list", **SETTINGS)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-3)


def titled(pairs, tell):
    return [
        group(texts, f"g{i}", preferences=(Preference(winner=tell(texts), loser=1 - tell(texts)),))
        for i, texts in enumerate(pairs)
    ]


def random_titles(count=120, seed=0, chinese=False):
    rng = np.random.default_rng(seed)
    words = list("股市上涨天气晴朗足球比赛") if chinese else ["stocks", "rise", "rain", "goal", "match", "sun"]
    space, mark = ("", "好") if chinese else (" ", "great")

    def title(wins):
        return space.join([*rng.choice(words, 5), mark] if wins else rng.choice(words, 6))

    return [(title(i % 2 == 0), title(i % 2 == 1)) for i in range(count)]


@pytest.mark.parametrize("chinese", [False, True])
def test_tfidf_ranker_finds_the_word_that_wins(chinese):
    groups = titled(random_titles(chinese=chinese), lambda texts: 0 if ("好" in texts[0] or "great" in texts[0]) else 1)
    scores = tfidf_ranker(groups[:80], groups[80:], "bradley-terry", **SETTINGS)
    assert rank_metrics(scores, groups[80:])["pair_accuracy"].value == 1


def test_length_ranker_sees_length_and_nothing_else():
    rng = np.random.default_rng(0)
    pairs = [
        ("ab " * int(a), "xyz " * int(b))
        for a, b in zip(rng.integers(1, 9, 100), rng.integers(10, 19, 100), strict=True)
    ]
    groups = titled(pairs, lambda texts: 1)
    scores = length_ranker(groups[:70], groups[70:], "bradley-terry", **SETTINGS)
    assert rank_metrics(scores, groups[70:])["pair_accuracy"].value == 1
    same_length = titled([("abc", "xyz")], lambda texts: 0)
    first, second = length_ranker(groups, same_length, "bradley-terry", **SETTINGS)[0]
    assert first == second


@pytest.mark.parametrize("loss", ["list", "bradley-terry", "margin"])
@pytest.mark.parametrize(
    "groups", [CLICKS[2:], GRADES[2:], PAIRS[2:], CLICKS[:1], CLICKS, GRADES, PAIRS], ids=lambda groups: groups[0].group
)
def test_rankers_survive_tiny_data_and_none(groups, loss):
    test = [group(("p", "q"))]
    features = [np.ones((len(g.texts), 2)) for g in groups]
    for scores in (
        length_ranker(groups, test, loss, **SETTINGS),
        tfidf_ranker(groups, test, loss, **SETTINGS),
        frozen_ranker(features, groups, [np.ones((2, 2))], loss, **SETTINGS),
    ):
        assert [s.shape for s in scores] == [(2,)]
        assert np.isfinite(scores[0]).all()


def test_without_evidence_the_scorer_is_constant():
    scores = frozen_ranker([np.eye(2)], CLICKS[2:], [np.eye(2)], "list", **SETTINGS)[0]
    assert scores.tolist() == [0, 0]


# --- classifiers ------------------------------------------------------------------------------------------------------


def labelled(count=300, seed=0):
    """Texts of random words, among them one that names each label they have."""
    rng = np.random.default_rng(seed)
    targets = rng.random((count, 3)) < 0.4
    names = np.array(["apple", "banana", "cherry"])
    texts = [" ".join([*rng.choice(["of", "the", "some", "one"], 4), *names[row]]) for row in targets]
    return texts, targets


def test_majority_is_the_log_frequency():
    scores = majority(np.array([0, 0, 2]), 4, SINGLE)
    np.testing.assert_allclose(np.exp(scores), np.tile([3 / 6, 1 / 6, 2 / 6], (4, 1)))
    several = majority(np.array([[True, False, True], [True, False, False]]), 1, MULTI)
    np.testing.assert_allclose(probabilities(several, MULTI), [[3 / 4, 1 / 4, 2 / 4]])


def test_tfidf_classifier_learns_single_labels():
    texts, given = labelled()
    keep = given.sum(axis=1) == 1
    texts, targets = [t for t, k in zip(texts, keep, strict=True) if k], given[keep].argmax(axis=1)
    scores = tfidf_classifier(texts[:60], targets[:60], texts[60:], SINGLE)
    assert classification_metrics(scores, targets[60:], SINGLE)["accuracy"].value == 1


def test_tfidf_classifier_learns_several_labels():
    texts, targets = labelled()
    scores = tfidf_classifier(texts[:200], targets[:200], texts[200:], MULTI)
    assert classification_metrics(scores, targets[200:], MULTI)["subset_accuracy"].value > 0.98


def test_tfidf_classifier_reads_chinese_without_spaces():
    texts = ["今天股市上涨", "明天股市下跌", "足球比赛开始", "今天足球比赛"] * 5
    scores = tfidf_classifier(
        texts, np.array([0, 0, 1, 1] * 5), ["看股市", "踢足球"], Task(kind="single", label_names=("a", "b"))
    )
    assert scores.argmax(axis=1).tolist() == [0, 1]


def test_frozen_classifier_learns_whatever_the_units_of_a_feature():
    rng = np.random.default_rng(0)
    targets = rng.integers(3, size=400)
    features = (2.5 * np.eye(3)[targets] + rng.normal(size=(400, 3))) * [1e-4, 1, 1e4] + [0, 50, 0]
    features = np.column_stack([features, np.full(400, 0.1)]).astype(np.float32)  # and one that is constant
    scores = frozen_classifier(features[:300], targets[:300], features[300:], SINGLE)
    found = classification_metrics(scores, targets[300:], SINGLE)
    assert found["accuracy"].value > 0.85
    assert found["log_loss"].value < 0.5


def test_frozen_classifier_chooses_strong_regularisation_on_noise():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(120, 100)).astype(np.float32), rng.integers(3, size=120)
    scores = frozen_classifier(features, targets, rng.normal(size=(50, 100)).astype(np.float32), SINGLE)
    assert np.abs(scores - scores.mean(axis=0)).max() < 1  # a free fit to noise gives tens


@pytest.mark.parametrize("task", [SINGLE, MULTI])
def test_baselines_repeat_themselves(task):
    texts, given = labelled(60)
    targets = given if task is MULTI else given.argmax(axis=1)
    features = np.random.default_rng(0).normal(size=(60, 5))
    for fit in (
        lambda: tfidf_classifier(texts[:40], targets[:40], texts[40:], task),
        lambda: frozen_classifier(features[:40], targets[:40], features[40:], task),
    ):
        np.testing.assert_array_equal(fit(), fit())


@pytest.mark.parametrize(
    ("texts", "single", "multi"),
    [
        (["x", "y"], [0, 1], [[1, 0, 0], [0, 1, 1]]),
        (["x", "y"], [2, 2], [[1, 1, 0], [1, 1, 0]]),
        (["x"], [1], [[0, 0, 0]]),
        (["", "  ", "\n"], [0, 1, 2], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (["x"] * 7, [0, 1] * 3 + [2], [[1, 0, 0]] * 3 + [[0, 1, 0]] * 4),
        (["\x00", "!!", "\ud800"], [0, 1, 1], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ],
    ids=["two", "one class", "one text", "blank", "equal texts", "odd characters"],
)
def test_classifiers_survive_tiny_data(texts, single, multi):
    features, test = np.arange(len(texts), dtype=np.float32)[:, None], ["x", ""]
    for task, targets in ((SINGLE, np.array(single)), (MULTI, np.array(multi, dtype=bool))):
        for scores in (
            majority(targets, 2, task),
            tfidf_classifier(texts, targets, test, task),
            frozen_classifier(features, targets, np.zeros((2, 1), dtype=np.float32), task),
        ):
            assert scores.shape == (2, 3)
            assert np.isfinite(scores).all()


def test_a_label_never_seen_in_training_is_least_likely_but_not_impossible():
    texts, _ = labelled(30)
    scores = tfidf_classifier(texts, np.array([0, 1] * 15), ["apple"], SINGLE)
    assert scores[0].argmin() == 2
    assert 0 < probabilities(scores, SINGLE)[0, 2] < 0.1
