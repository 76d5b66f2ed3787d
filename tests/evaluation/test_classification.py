"""Classification metrics: against hand-computed values, scikit-learn, chance, and a simulation of their intervals."""

import json
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference

from loracle.errors import UserError
from loracle.evaluation.classification import classification_metrics
from loracle.evaluation.intervals import Interval, bootstrap, ratio
from loracle.evaluation.labels import AnyLabels, OneLabel
from loracle.examples import LabeledText
from loracle.tasks import Task

SINGLE, MULTI = OneLabel(), AnyLabels()


def values(metrics):
    return {name: metric.value for name, metric in metrics.items()}


def random_single(n=200, c=3, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(c, size=n)
    return (rng.normal(size=(n, c)) + 1.5 * np.eye(c)[targets]).astype(np.float32), targets


def random_multi(n=200, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.random((n, 3)) < [0.5, 0.2, 0.1]
    return (rng.normal(size=(n, 3)) + 1.5 * targets - 0.5).round(1).astype(np.float32), targets  # rounded: with ties


def test_single_by_hand():
    scores = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]))
    found = values(classification_metrics(scores, np.array([0, 0, 1, 1]), SINGLE))
    # a: 1 hit of 2 given and 1 predicted, f1 2/3; b: 2 hits of 2 given and 3 predicted, f1 4/5; c occurs nowhere.
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["weighted_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["log_loss"] == pytest.approx((3 * np.log(2) + np.log(4)) / 4)


def test_single_agrees_with_scikit_learn():
    scores, targets = random_single()
    found, predicted = values(classification_metrics(scores, targets, SINGLE)), scores.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(targets, predicted))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(targets, predicted, average="macro"))
    assert found["weighted_f1"] == pytest.approx(reference.f1_score(targets, predicted, average="weighted"))
    assert found["log_loss"] == pytest.approx(reference.log_loss(targets, SINGLE.probabilities(scores)))


def test_multi_agrees_with_scikit_learn_ties_included():
    scores, targets = random_multi()
    found, predicted = values(classification_metrics(scores, targets, MULTI)), scores > 0
    assert len(np.unique(scores[:, 0])) < len(scores), "no tie: the test would be vacuous"
    assert found["micro_f1"] == pytest.approx(reference.f1_score(targets, predicted, average="micro"))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(targets, predicted, average="macro"))
    assert found["subset_accuracy"] == found["accuracy"] == pytest.approx(reference.accuracy_score(targets, predicted))
    assert found["map"] == pytest.approx(reference.average_precision_score(targets, scores, average="macro"))


@pytest.mark.parametrize("favoured", [0, 1, 2])
def test_constant_scorer_gets_chance_whichever_label_is_frequent(favoured):
    targets = np.array([favoured] * 8 + [0, 1])
    assert values(classification_metrics(np.zeros((10, 3)), targets, SINGLE))["accuracy"] == pytest.approx(1 / 3)


def test_constant_scorer_gets_the_share_of_positives_in_map():
    targets = np.zeros((10, 3), dtype=bool)
    targets[:2, 0] = targets[5:, 1] = True  # third label: nobody has it, so it is left out
    found = values(classification_metrics(np.ones((10, 3)), targets, MULTI))
    assert found["map"] == pytest.approx((0.2 + 0.5) / 2)


def test_row_order_does_not_matter():
    scores, targets = random_multi()
    order = np.random.default_rng(1).permutation(len(scores))
    shuffled, found = (values(classification_metrics(*side, MULTI)) for side in
                       ((scores[order], targets[order]), (scores, targets)))  # fmt: skip
    simulated = shuffled.pop("ece_if_calibrated"), found.pop("ece_if_calibrated")
    assert simulated[0] == pytest.approx(simulated[1], rel=0.02)
    assert shuffled == pytest.approx(found)


def test_repeated_texts_are_one_unit():
    """Ten copies of each text tell nothing new: the values stay, and so do the intervals."""
    scores, targets = random_single(n=60)
    texts = [str(i) for i in range(60)]
    once = classification_metrics(scores, targets, SINGLE, groups=texts)
    copied = np.tile(scores, (10, 1)), np.tile(targets, 10)
    copies = classification_metrics(*copied, SINGLE, groups=texts * 10)
    naive = classification_metrics(*copied, SINGLE)
    for name, metric in once.items():
        assert (copies[name].value, copies[name].low, copies[name].high) == pytest.approx(
            (metric.value, metric.low, metric.high), nan_ok=True
        )
    assert naive["accuracy"].high - naive["accuracy"].low < 0.5 * (copies["accuracy"].high - copies["accuracy"].low)


def test_what_is_undefined_is_nan_and_null():
    found = classification_metrics(-np.ones((4, 3)), np.zeros((4, 3), dtype=bool), MULTI)
    assert found["accuracy"].value == 1
    for name in ("map", "micro_f1", "macro_f1"):
        assert np.isnan(found[name].value)
        assert json.dumps(found[name].to_json()) == '{"value": null, "low": null, "high": null}'


def test_json_of_an_interval():
    assert Interval(0.5, 0.25, 0.75).to_json() == {"value": 0.5, "low": 0.25, "high": 0.75}


def test_seed_decides_the_interval_and_nothing_else():
    scores, targets = random_single()
    first, again, other = (classification_metrics(scores, targets, SINGLE, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    simulated = first.pop("ece_if_calibrated").value, other.pop("ece_if_calibrated").value
    assert simulated[0] == pytest.approx(simulated[1], rel=0.02)
    assert values(first) == values(other)


def test_interval_does_not_depend_on_the_chunks(monkeypatch):
    scores, targets = random_multi(n=50)
    whole = classification_metrics(scores, targets, MULTI)
    monkeypatch.setattr("loracle.evaluation.intervals.CHUNK", 50 * 7)
    assert classification_metrics(scores, targets, MULTI) == whole


def test_intervals_cover_the_truth_at_their_nominal_rate():
    rng, n, truth, runs = np.random.default_rng(0), 150, 0.7, 300
    covered = 0
    for run in range(runs):
        hits = (rng.random(n) < truth).astype(float)
        interval = bootstrap(lambda w, hits=hits: {"mean": w @ hits / w.sum(axis=1)}, n, seed=run, replicates=400)[
            "mean"
        ]
        covered += interval.low <= truth <= interval.high
    assert 0.91 <= covered / runs <= 0.98


def test_statistics_share_their_draws():
    rng = np.random.default_rng(0)
    first = rng.normal(size=100)

    def statistics(w):
        return {"difference": (w @ (first + 1) - w @ first) / w.sum(axis=1), "mean": w @ first / w.sum(axis=1)}

    found = bootstrap(statistics, 100)
    assert found["difference"].low == pytest.approx(1)
    assert found["difference"].high == pytest.approx(1)
    assert found["mean"].high - found["mean"].low > 0.2


def test_replicates_without_a_value_stay_out_of_the_interval():
    found = bootstrap(lambda w: {"share": ratio(w[:, 0], w[:, 0])}, 3)["share"]  # undefined in (2/3)³ of them
    assert (found.value, found.low, found.high) == (1, 1, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_are_stable(dtype):
    scores = np.array([[1e4, 0, -1e4], [0, 0, 0]], dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soft, independent = SINGLE.probabilities(scores), MULTI.probabilities(scores)
    assert soft.dtype == independent.dtype == np.float64
    np.testing.assert_allclose(soft, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(independent, [[1, 0.5, 0], [0.5, 0.5, 0.5]])


def test_log_loss_of_a_sure_mistake_is_finite():
    found = values(classification_metrics(np.array([[1e4, 0, 0]]), np.array([1]), SINGLE))
    assert found["log_loss"] == pytest.approx(1e4)


def test_targets_of_examples():
    examples = [LabeledText(text="x", labels=(2,), row=1), LabeledText(text="y", labels=(0,), row=2)]
    assert SINGLE.targets(examples, 3).tolist() == [2, 0]
    several = [LabeledText(text="x", labels=(0, 2), row=1), LabeledText(text="y", labels=(), row=2)]
    assert MULTI.targets(several, 3).tolist() == [[True, False, True], [False, False, False]]


@pytest.mark.parametrize("name", ["single_label", "multi_label"])
def test_headline_and_table_metrics_are_measured(name):
    labels, evaluation = (SINGLE, MULTI)[name == "multi_label"], Task(name=name).evaluation
    scores, targets = random_single() if labels is SINGLE else random_multi()
    found = classification_metrics(scores, targets, labels)
    assert {evaluation.headline, evaluation.paired_metric, *evaluation.table} <= found.keys()


def test_scores_that_are_not_finite_are_refused_by_row():
    scores = np.zeros((3, 3))
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"1 rows .* row 1"):
        classification_metrics(scores, np.zeros(3, dtype=int), SINGLE)


def test_shapes_must_fit_the_task():
    with pytest.raises(ValueError, match=r"\(2, 3\) do not fit targets \(3,\)"):
        classification_metrics(np.zeros((2, 3)), np.zeros(3, dtype=int), SINGLE)


def test_no_example_is_explained():
    with pytest.raises(UserError, match="no test examples"):
        classification_metrics(np.zeros((0, 3)), np.zeros(0, dtype=int), SINGLE)
