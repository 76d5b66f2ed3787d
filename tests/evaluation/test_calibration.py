"""Calibration: against what was planted, brute force and scikit-learn; errors of calibration by hand and by simulation."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import norm
from sklearn import metrics as reference

from loracle.evaluation.calibration import Calibration, fit_temperature, fit_threshold
from loracle.evaluation.classification import (
    calibration_band,
    calibration_error,
    classification_differences,
    classification_metrics,
)
from loracle.evaluation.labels import AnyLabels, OneLabel

SINGLE, MULTI = OneLabel(), AnyLabels()


def temperature(logits, targets):
    return fit_temperature(lambda scale: SINGLE.log_likelihood(logits * scale, targets))


def lead(a, b, targets, groups=None):
    return classification_differences((a, b), targets, SINGLE, groups=groups)["accuracy"]


def drawn(proba, rng):
    """A label of each row, with just the probabilities that it names."""
    return (rng.random((len(proba), 1)) > proba.cumsum(axis=1)).sum(axis=1).clip(max=proba.shape[1] - 1)


@pytest.mark.parametrize("planted", [0.5, 1.0, 3.0])
def test_the_planted_temperature_is_found(planted):
    rng = np.random.default_rng(0)
    logits = 2 * planted * rng.normal(size=(20_000, 4))
    found = temperature(logits, drawn(softmax(logits / planted, axis=1), rng))
    assert found == pytest.approx(planted, rel=0.03)


@pytest.mark.slow
def test_no_other_temperature_is_likelier():
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(size=(60, 4)), rng.integers(4, size=60)
    logits[np.arange(60), targets] += 1

    def loss(t):
        summed = 60 * reference.log_loss(targets, softmax(logits / t, axis=1))
        return summed - norm.logpdf(np.log(t), scale=0.5)

    found = temperature(logits, targets)
    assert loss(found) <= min(map(loss, np.geomspace(0.1, 10, 400))) + 1e-9


def test_a_few_texts_without_a_mistake_do_not_make_it_certain():
    few, many = (temperature(8 * np.eye(4)[np.arange(n) % 4], np.arange(n) % 4) for n in (8, 8000))
    assert 0.8 < few < 1
    assert many < 0.75 * few


def test_a_temperature_moves_no_label():
    scores = np.random.default_rng(2).normal(size=(50, 4))
    cold, hot = (SINGLE.probabilities(scores, Calibration(temperature=t)) for t in (0.3, 3))
    assert (cold.argmax(1) == hot.argmax(1)).all()
    assert (cold.max(1) > hot.max(1)).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("precision", [None, 0.8])
def test_no_other_threshold_does_better(seed, precision):
    rng = np.random.default_rng(seed)
    true = rng.random(40) < 0.3
    proba = np.clip(0.3 * true + 0.7 * rng.random(40), 0, 1).round(1 if seed % 2 else 4)  # odd seeds: with ties

    def worth(threshold):
        given = proba > threshold
        if precision is None:
            return reference.f1_score(true, given, zero_division=0)
        precise = reference.precision_score(true, given, zero_division=0) >= precision
        return (given & true).sum() if precise else 0

    found = fit_threshold(proba, true, precision=precision)
    assert worth(found) == pytest.approx(max(worth(t) for t in [0.0, *(np.unique(proba) + 1e-9)]))


def test_labels_with_nothing_to_go_by():
    proba = np.array([0.9, 0.8, 0.1])
    assert fit_threshold(proba, np.zeros(3, dtype=bool)) == 0.5
    assert fit_threshold(proba, np.array([False, True, True]), precision=0.9) == 1.0  # never that precise: never given
    assert fit_threshold(proba, np.array([True, True, False])) == pytest.approx(0.45)  # half-way


def test_each_label_gets_its_own_threshold_and_labels_follow_it():
    rng = np.random.default_rng(3)
    targets = rng.random((300, 3)) < [0.5, 0.2, 0.1]
    logits = rng.normal(size=(300, 3)) + 1.5 * targets - [0, 1, 2]
    found = MULTI.fit_calibration(logits, targets)
    proba = MULTI.probabilities(logits, found)
    assert (MULTI.assigned(proba, found) == (proba > found.thresholds)).all()
    own, half = (classification_metrics(logits, targets, MULTI, calibration=c)["macro_f1"].value
                 for c in (found, Calibration()))  # fmt: skip
    assert own == pytest.approx(reference.f1_score(targets, proba > found.thresholds, average="macro"))
    assert own > half + 0.02
    strict = MULTI.fit_calibration(logits, targets, 0.75)
    given = MULTI.assigned(proba, strict)
    assert min(reference.precision_score(targets, given, average=None)) >= 0.75


# --- what it is worth -------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    confidence = np.repeat([0.6, 0.9], 30)  # two values, so two bins, however many could be
    right = np.r_[np.ones(15), np.zeros(15), np.ones(30)]
    assert calibration_error(confidence, right) == pytest.approx((abs(0.6 - 0.5) + abs(0.9 - 1.0)) / 2)


def test_calibration_error_over_bins_of_equally_many():
    rng = np.random.default_rng(4)
    confidence, right = rng.random(1500), (rng.random(1500) < 0.5).astype(float)
    by_hundreds = np.array_split(np.argsort(confidence), 15)
    gaps = [abs((confidence[part] - right[part]).mean()) for part in by_hundreds]
    assert calibration_error(confidence, right) == pytest.approx(
        np.mean(gaps), abs=2e-3
    )  # an edge text may change bins


def test_true_probabilities_lie_in_the_band_as_often_as_it_says():
    rng = np.random.default_rng(5)
    proba = softmax(2 * rng.normal(size=(400, 4)), axis=1)
    band = calibration_band(proba.max(1, keepdims=True))
    errors = np.array(
        [calibration_error(proba.max(1), drawn(proba, rng) == proba.argmax(1)) for _ in range(1000)], dtype=float
    )
    assert np.mean((errors >= band.low) & (errors <= band.high)) == pytest.approx(0.95, abs=0.02)
    assert errors.mean() == pytest.approx(band.value, rel=0.03)


def test_every_label_of_a_text_is_a_claim_where_several_stand_together():
    rng = np.random.default_rng(12)
    logits = 2 * rng.normal(size=(150, 3))
    proba = expit(logits)
    band = calibration_band(proba)
    errors = [
        calibration_error(proba.ravel(), (rng.random((150, 3)) < proba).ravel().astype(float)) for _ in range(600)
    ]
    inside = (np.array(errors) >= band.low) & (np.array(errors) <= band.high)
    assert inside.mean() == pytest.approx(0.95, abs=0.03)

    targets = rng.random((150, 3)) < proba
    found = classification_metrics(3 * logits, targets, MULTI)
    bins = np.argsort(np.argsort(proba.ravel(), kind="stable")) * 15 // 450  # thirty pairs a bin, as no two are equal
    gaps = np.abs(np.bincount(bins, expit(3 * logits).ravel() - targets.ravel()))
    assert found["ece"].value == pytest.approx(gaps.sum() / 450)
    assert found["log_loss"].value == pytest.approx(
        np.mean([reference.log_loss(targets[:, c], expit(3 * logits[:, c])) for c in range(3)])
    )


def test_too_sure_of_several_labels_is_mended_and_no_label_moves():
    """Logits three times what is true: the temperature is found, the error falls into its band, each label's order stays."""
    rng = np.random.default_rng(13)
    logits = 2 * rng.normal(size=(3000, 3))
    targets = rng.random((3000, 3)) < expit(logits)
    fitted = MULTI.fit_calibration(3 * logits[:2000], targets[:2000])
    assert fitted.temperature == pytest.approx(3, rel=0.1)
    found = classification_metrics(3 * logits[2000:], targets[2000:], MULTI, calibration=fitted)
    assert found["log_loss"].high < found["log_loss_uncalibrated"].low
    assert found["ece"].value < found["ece_if_calibrated"].high < found["ece_uncalibrated"].value
    cold = MULTI.probabilities(3 * logits, fitted)
    given = MULTI.assigned(cold, fitted)
    for c in range(3):
        assert logits[given[:, c], c].min() > logits[~given[:, c], c].max()


def test_calibration_brings_an_overconfident_scorer_into_the_band():
    rng = np.random.default_rng(6)
    logits = 2 * rng.normal(size=(4000, 4))
    targets = drawn(softmax(logits / 2, axis=1), rng)
    fitted = SINGLE.fit_calibration(logits[:2000], targets[:2000])
    found = classification_metrics(logits[2000:], targets[2000:], SINGLE, calibration=fitted)
    assert found["log_loss"].high < found["log_loss_uncalibrated"].low
    assert found["ece_uncalibrated"].value > found["ece_if_calibrated"].high > found["ece"].value
    plain = classification_metrics(logits[2000:], targets[2000:], SINGLE)
    assert plain["ece"].value == found["ece_uncalibrated"].value
    assert plain["accuracy"] == found["accuracy"]
    assert "log_loss_uncalibrated" not in plain


def test_area_under_the_curve_agrees_with_scikit_learn_ties_included():
    rng = np.random.default_rng(7)
    targets = rng.integers(4, size=300)
    logits = (rng.normal(size=(300, 4)) + np.eye(4)[targets]).round(1)
    found = classification_metrics(logits, targets, SINGLE)["auc"]
    assert found.value == pytest.approx(
        reference.roc_auc_score(targets, SINGLE.probabilities(logits), multi_class="ovr"), abs=1e-9
    )
    several = rng.random((300, 3)) < 0.3
    scores = (rng.normal(size=(300, 3)) + several).round(1)
    assert classification_metrics(scores, several, MULTI)["auc"].value == pytest.approx(
        reference.roc_auc_score(several, scores)
    )


@pytest.mark.slow
def test_interval_of_the_area_is_that_of_the_plain_bootstrap():
    rng = np.random.default_rng(8)
    several = rng.random((200, 1)) < 0.4
    scores = rng.normal(size=(200, 1)) + several
    found = classification_metrics(scores, several, MULTI)["auc"]
    drawn_rows = (rng.integers(200, size=200) for _ in range(400))
    plain = [reference.roc_auc_score(several[rows, 0], scores[rows, 0]) for rows in drawn_rows]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.012)


def test_lead_is_the_difference_and_copies_change_nothing():
    rng = np.random.default_rng(9)
    targets = rng.integers(4, size=80)
    good, poor = (rng.normal(size=(80, 4)) + k * np.eye(4)[targets] for k in (3, 1))
    found = lead(good, poor, targets)
    assert found.value == pytest.approx((good.argmax(1) == targets).mean() - (poor.argmax(1) == targets).mean())
    assert found.low > 0
    assert lead(good, good, targets).high == 0
    copies = [np.tile(a, (5, 1)) for a in (good, poor)]
    again = lead(*copies, np.tile(targets, 5), groups=list(range(80)) * 5)
    assert (again.low, again.high) == pytest.approx((found.low, found.high))
