"""Baselines: losses against finite differences and known optima, tiny and degenerate data, and that they learn."""

import dataclasses

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from loracle.evaluation.classification import classification_metrics
from loracle.evaluation.labels import AnyLabels, OneLabel
from loracle.evaluation.linear_models import (
    feature_classifier,
    feature_ranker,
    length_ranker,
    linear_ranker,
    tfidf_classifier,
    tfidf_ranker,
)
from loracle.evaluation.ranking import rank_metrics
from loracle.examples import Preference, RankGroup
from loracle.training.losses import LOSSES, LossSettings, numpy_objective

SINGLE, MULTI = OneLabel(), AnyLabels()
DEFAULT = {"clicks": "list", "grades": "list", "pairs": "bradley-terry"}


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


def objective(evidence="clicks", loss="auto"):
    name = DEFAULT[evidence] if loss == "auto" else loss
    return numpy_objective(LOSSES[name].make(LossSettings()))


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
    weights = linear_ranker(np.concatenate(features), groups, objective())
    np.testing.assert_allclose(weights, [1.0, -0.5, 0.0, 0.0], atol=0.08)


def test_linear_ranker_is_the_same_on_sparse_features():
    groups, features = click_log(groups=60)
    dense = np.concatenate(features)
    expected = linear_ranker(dense, groups, objective())
    np.testing.assert_allclose(linear_ranker(csr_matrix(dense), groups, objective()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["list", "bradley-terry", "margin"])
def test_feature_ranker_learns_with_each_loss_whatever_the_units(loss):
    groups, features = click_log()
    features = [x * [1, 1000, 1, 1] + [0, 0, 5, 0] for x in features]
    scores = feature_ranker(features[:200], groups[:200], features[200:], objective(loss=loss))
    assert [s.shape for s in scores] == [(len(g.texts),) for g in groups[200:]]
    assert rank_metrics(scores, groups[200:])["pair_accuracy"].value > 0.85


def test_arm_order_does_not_matter():
    groups, features = click_log(groups=60)
    flipped = [
        dataclasses.replace(g, texts=g.texts[::-1], clicks=g.clicks[::-1], impressions=g.impressions[::-1])
        for g in groups
    ]
    expected = feature_ranker(features, groups, features, objective())
    found = feature_ranker([x[::-1] for x in features], flipped, features, objective())
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
    scores = tfidf_ranker(groups[:80], groups[80:], objective("pairs"))
    assert rank_metrics(scores, groups[80:])["pair_accuracy"].value == 1


def test_length_ranker_sees_length_and_nothing_else():
    rng = np.random.default_rng(0)
    pairs = [
        ("ab " * int(a), "xyz " * int(b))
        for a, b in zip(rng.integers(1, 9, 100), rng.integers(10, 19, 100), strict=True)
    ]
    groups = titled(pairs, lambda texts: 1)
    scores = length_ranker(groups[:70], groups[70:], objective("pairs"))
    assert rank_metrics(scores, groups[70:])["pair_accuracy"].value == 1
    same_length = titled([("abc", "xyz")], lambda texts: 0)
    first, second = length_ranker(groups, same_length, objective("pairs"))[0]
    assert first == second


@pytest.mark.parametrize("loss", ["auto", "bradley-terry", "margin"])
@pytest.mark.parametrize(
    ("evidence", "groups"),
    [
        *(("clicks", g) for g in (CLICKS[2:], CLICKS[:1], CLICKS)),
        *(("grades", g) for g in (GRADES[2:], GRADES)),
        *(("pairs", g) for g in (PAIRS[2:], PAIRS)),
    ],
)
def test_rankers_survive_tiny_data_and_none(evidence, groups, loss):
    test, fit = [group(("p", "q"))], objective(evidence, loss)
    features = [np.ones((len(g.texts), 2)) for g in groups]
    for scores in (
        length_ranker(groups, test, fit),
        tfidf_ranker(groups, test, fit),
        feature_ranker(features, groups, [np.ones((2, 2))], fit),
    ):
        assert [s.shape for s in scores] == [(2,)]
        assert np.isfinite(scores[0]).all()


def test_without_evidence_the_scorer_is_constant():
    scores = feature_ranker([np.eye(2)], CLICKS[2:], [np.eye(2)], objective())[0]
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
    np.testing.assert_allclose(np.exp(SINGLE.prior(np.array([0, 0, 2]), 3)), [3 / 6, 1 / 6, 2 / 6])
    several = MULTI.prior(np.array([[True, False, True], [True, False, False]]), 3)
    np.testing.assert_allclose(MULTI.probabilities(several), [3 / 4, 1 / 4, 2 / 4])


def test_tfidf_classifier_learns_single_labels():
    texts, given = labelled()
    keep = given.sum(axis=1) == 1
    texts, targets = [t for t, k in zip(texts, keep, strict=True) if k], given[keep].argmax(axis=1)
    scores = tfidf_classifier(texts[:60], targets[:60], texts[60:], SINGLE, 3)
    assert classification_metrics(scores, targets[60:], SINGLE)["accuracy"].value == 1


def test_tfidf_classifier_learns_several_labels():
    texts, targets = labelled()
    scores = tfidf_classifier(texts[:200], targets[:200], texts[200:], MULTI, 3)
    assert classification_metrics(scores, targets[200:], MULTI)["subset_accuracy"].value > 0.98


def test_tfidf_classifier_reads_chinese_without_spaces():
    texts = ["今天股市上涨", "明天股市下跌", "足球比赛开始", "今天足球比赛"] * 5
    scores = tfidf_classifier(texts, np.array([0, 0, 1, 1] * 5), ["看股市", "踢足球"], SINGLE, 2)
    assert scores.argmax(axis=1).tolist() == [0, 1]


def test_feature_classifier_learns_whatever_the_units_of_a_feature():
    rng = np.random.default_rng(0)
    targets = rng.integers(3, size=400)
    features = (2.5 * np.eye(3)[targets] + rng.normal(size=(400, 3))) * [1e-4, 1, 1e4] + [0, 50, 0]
    features = np.column_stack([features, np.full(400, 0.1)]).astype(np.float32)  # and one that is constant
    scores = feature_classifier((features[:300], features[300:]), targets[:300], SINGLE, 3)
    found = classification_metrics(scores, targets[300:], SINGLE)
    assert found["accuracy"].value > 0.85
    assert found["log_loss"].value < 0.5


def test_feature_classifier_chooses_strong_regularisation_on_noise():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(120, 100)).astype(np.float32), rng.integers(3, size=120)
    scores = feature_classifier((features, rng.normal(size=(50, 100)).astype(np.float32)), targets, SINGLE, 3)
    assert np.abs(scores - scores.mean(axis=0)).max() < 1  # a free fit to noise gives tens


@pytest.mark.slow
@pytest.mark.parametrize("task", [SINGLE, MULTI])
def test_baselines_repeat_themselves(task):
    texts, given = labelled(60)
    targets = given if task is MULTI else given.argmax(axis=1)
    features = np.random.default_rng(0).normal(size=(60, 5))
    for fit in (
        lambda: tfidf_classifier(texts[:40], targets[:40], texts[40:], task, 3),
        lambda: feature_classifier((features[:40], features[40:]), targets[:40], task, 3),
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
            np.tile(task.prior(targets, 3), (2, 1)),
            tfidf_classifier(texts, targets, test, task, 3),
            feature_classifier((features, np.zeros((2, 1), dtype=np.float32)), targets, task, 3),
        ):
            assert scores.shape == (2, 3)
            assert np.isfinite(scores).all()


def test_a_label_never_seen_in_training_is_least_likely_but_not_impossible():
    texts, _ = labelled(30)
    scores = tfidf_classifier(texts, np.array([0, 1] * 15), ["apple"], SINGLE, 3)
    assert scores[0].argmin() == 2
    assert 0 < SINGLE.probabilities(scores)[0, 2] < 0.1


@pytest.mark.slow
def test_the_click_likelihood_recovers_more_of_the_truth_than_hard_pairs():
    """Same few clicks, same features, over seeds; benchmarks/simulated_clicks.py has the figures."""
    recovered = {"list": [], "bradley-terry": []}
    for seed in range(5):
        rng, groups, features, truth = np.random.default_rng(seed), [], [], []
        for i in range(260):
            x = rng.normal(size=(int(rng.integers(2, 6)), 8))
            told = x @ (0.3 * np.ones(8) / np.sqrt(8))
            shown = rng.integers(200, 4000, len(x))
            clicks = rng.binomial(shown, 0.015 * np.exp(told + 0.2 * rng.normal(size=len(x))))
            texts = [f"title {i} {j}" for j in range(len(x))]
            groups.append(group(texts, f"g{i}", clicks=tuple(clicks.tolist()), impressions=tuple(shown.tolist())))
            features.append(x)
            truth.append(told - told.mean())
        for loss, found in recovered.items():
            scores = feature_ranker(features[:130], groups[:130], features[130:], objective(loss=loss))
            centred = np.concatenate([s - s.mean() for s in scores])
            found.append(np.corrcoef(centred, np.concatenate(truth[130:]))[0, 1])
    assert np.mean(recovered["list"]) > 0.9
    assert np.mean(recovered["list"]) > np.mean(recovered["bradley-terry"])
