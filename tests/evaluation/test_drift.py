"""The stability index against its definition and its distribution; bins that hold what they should."""

import numpy as np
import pytest

from loracle.evaluation.calibration import Calibration
from loracle.evaluation.drift import BINS, Reference, histogram, limit, psi, reference
from loracle.tasks import Task


def test_the_index_of_a_case_by_hand():
    p, q = np.array([20.5, 80.5]) / 101, np.array([50.5, 50.5]) / 101
    assert psi([20, 80], [50, 50]) == pytest.approx(((p - q) * np.log(p / q)).sum())
    assert psi([20, 80], [50, 50]) == pytest.approx(psi([50, 50], [20, 80]))
    assert psi([30, 60], [1000, 2000]) < 1e-3
    assert np.isfinite(psi([0, 9], [9, 0]))
    assert np.isnan([psi([0, 0], [5, 5]), limit([0, 0], [5, 5]), limit([7], [9])]).all()


def test_texts_as_in_training_pass_the_limit_about_once_in_a_thousand_and_others_always():
    rng = np.random.default_rng(0)
    over = others = 0
    for _ in range(500):
        known = histogram(rng.normal(size=300))
        for shift in (0.0, 0.5):
            seen = np.bincount(known.bins(rng.normal(shift, 1, size=400)), minlength=BINS).tolist()
            beyond = psi(seen, known.counts) > limit(seen, known.counts)
            over, others = over + (beyond and not shift), others + (beyond and shift > 0)
    assert over <= 6  # 0.5 expected; the bins are those of the sample itself
    assert others > 475


def test_bins_are_filled_alike_and_ties_stay_together():
    values = np.random.default_rng(0).normal(size=1000)
    known = histogram(values)
    assert known.counts == (100,) * BINS
    assert np.bincount(known.bins(values)).tolist() == list(known.counts)
    assert known.total == pytest.approx(values.sum())
    tied = histogram([5] * 70 + [6] * 20 + [9] * 10)
    assert (tied.edges, tied.counts) == ((5.0, 6.0), (70, 20, 10))
    assert tied.bins([4, 5, 5.5, 6, 7, 100]) == [0, 0, 1, 1, 2, 2]
    assert histogram([3] * 50).counts == (50,)
    assert (histogram([]).counts, histogram([1, 2]).counts) == ((0,), (2,))


def test_a_reference_has_calibrated_probabilities_and_the_labels_that_are_given():
    logits = np.array([[4.0, 0.0], [0.0, 2.0], [1.0, 0.0]], dtype=np.float32)

    def of(name, calibration):
        task = Task(name=name, label_names=("a", "b"))
        return task.evaluation.reference([3, 4], [row[None] for row in logits], task, calibration)

    single = of("single_label", Calibration(temperature=2.0))
    assert (single.labels, single.tokens.total) == ((2, 1), 7)
    assert single.scores.total == pytest.approx((1 / (1 + np.exp(-np.array([2.0, 1.0, 0.5])))).sum())
    multi = of("multi_label", Calibration(thresholds=(0.6, 0.4)))
    assert multi.labels == (2, 3)
    task = Task(name="ranking")
    assert task.evaluation.reference([3], [logits[:, :1]], task, None).labels == ()


def test_a_reference_survives_json():
    import dataclasses
    import json

    known = reference(range(100), np.random.default_rng(0).normal(size=50), [30, 20])
    assert Reference.from_json(json.loads(json.dumps(dataclasses.asdict(known)))) == known
