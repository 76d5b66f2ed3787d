"""The scikit-learn manner: fit returns self, names come back, and the run folder opens again."""

from __future__ import annotations

import numpy as np
import pytest
from small import WORDS, facts, labelled

import loracle
from loracle import TextClassifier, TextRanker, UserError

QUICK = {"epochs": 8, "batch": 8, "lr": 1e-2, "baselines": False, "test_share": 0.2, "validation_share": 0.2}


def settings(tiny_model, tmp_path, **more):
    quick = {k: v for k, v in QUICK.items() if k != "baselines"}
    return {"model": str(tiny_model("qwen2")), "out": tmp_path / "run", "verbose": False, **quick, **more}


@pytest.mark.slow
def test_a_classifier(tiny_model, tmp_path):
    rows = labelled()
    fitted = TextClassifier(**settings(tiny_model, tmp_path))
    assert fitted.fit([r["text"] for r in rows], [r["label"] for r in rows]) is fitted
    assert fitted.classes_ == ("mid", "neg", "pos")
    assert fitted.predict([f"{WORDS['neg']} number 5"]) == ["neg"]
    proba = fitted.predict_proba(["good number 1", "so number 2"])
    np.testing.assert_allclose(proba.sum(1), 1)
    again = TextClassifier.load(tmp_path / "run")
    np.testing.assert_allclose(again.predict_proba(["good number 1", "so number 2"]), proba, atol=1e-6)


@pytest.mark.slow
def test_integer_labels_sort_as_numbers(tiny_model, tmp_path):
    texts, labels = zip(*((f"text {i}", i % 12) for i in range(60)), strict=True)
    fitted = TextClassifier(**settings(tiny_model, tmp_path, epochs=1)).fit(texts, labels)
    assert fitted.classes_ == tuple(map(str, range(12)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "evidence", [{"clicks": [9, 90], "impressions": [1000, 1000]}, {"grades": [0, 1]}, {"best": 1}], ids=lambda e: next(iter(e))
)  # fmt: skip
def test_a_ranker(tiny_model, tmp_path, evidence):
    groups = [{"texts": [f"bad title {i}", f"good title {i}"], **evidence} for i in range(40)]
    ranker = TextRanker(**settings(tiny_model, tmp_path)).fit(groups)
    (first, high), (second, low) = ranker.rank(["bad title 7", "good title 7"])
    assert (first, second) == ("good title 7", "bad title 7")
    assert high > low


def test_what_cannot_be_used_is_said(tiny_model, tmp_path):
    with pytest.raises(UserError, match=facts("learning_rate", "--help-all")):
        TextClassifier(learning_rate=1)
    with pytest.raises(UserError, match=facts("2", "1")):
        TextClassifier(**settings(tiny_model, tmp_path)).fit(["a", "b"], ["x"])
    ranker = TextRanker(**settings(tiny_model, tmp_path))
    with pytest.raises(UserError, match=facts("group 1", "clicks", "grades", "best")):
        ranker.fit([{"texts": ["a", "b"]}])
    with pytest.raises(UserError, match=facts("group 1", "2 titles", "1 clicks")):
        ranker.fit([{"texts": ["a", "b"], "clicks": [1], "impressions": [2, 3]}])
    with pytest.raises(UserError, match="two or more distinct titles"):
        ranker.fit([{"texts": ["a", "a"], "grades": [1, 2]}])
    counts = {"clicks": [5, 500], "impressions": [100, 100]}
    with pytest.raises(UserError, match=facts("more clicks than impressions", "row 1")):
        ranker.fit([{"texts": ["a", "b"], **counts}])
    for best in (-1, 2, 1.5, "b"):
        with pytest.raises(UserError, match=facts("best", "group 1", "0 to 1")):
            ranker.fit([{"texts": ["a", "b"], "best": best}])
    with pytest.raises(UserError, match=facts("group 1", "blank")):
        ranker.fit([{"texts": ["a", " "], "grades": [1, 2]}])
    with pytest.raises(UserError, match="same evidence"):
        ranker.fit([{"texts": ["a", "b"], "grades": [1, 2]}, {"texts": ["c", "d"], "best": 0}])


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loracle.nothing
