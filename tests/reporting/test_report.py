"""What the report says, against scikit-learn and plain counting; the page holds the same."""

import dataclasses
import html
import json
import re

import numpy as np
import pytest
from reports import results_of
from sklearn import metrics as reference

from loracle.evaluation.calibration import Calibration
from loracle.evaluation.labels import AnyLabels, OneLabel
from loracle.examples import LabeledText, RankGroup
from loracle.reporting.html import render
from loracle.reporting.report import build_report
from loracle.tasks import Task
from loracle.tasks import label_report as of
from loracle.tasks.group_report import example_groups

NAMES = tuple(f"label {i}" for i in range(15))
RUN = {
    "name": "a run", "unit": "texts", "counts": {"train": 9, "validation": 9, "test": 300}, "facts": [["data", "<b>.csv"]],
    "issues": ["1 row <skipped>"], "settings": {"lr": 1e-3}, "versions": {"loracle": "0"},
}  # fmt: skip


def made(n=300, c=4, *, strength=2.0, seed=0):
    """Texts, their task, scores of a model of that strength."""
    rng = np.random.default_rng(seed)
    task = Task(name="single_label", label_names=NAMES[:c])
    has = np.eye(c, dtype=bool)[rng.integers(c, size=n)]
    texts = [f"{'текст' if i % 5 == 0 else 'text'} {i} {'long ' * (i % 7)}" for i in range(n)]
    examples = [
        LabeledText(text=text, labels=tuple(np.flatnonzero(row).tolist()), row=i)
        for i, (text, row) in enumerate(zip(texts, has, strict=True))
    ]
    return task, examples, list((rng.normal(size=(n, c)) + strength * has)[:, None])


def report(task, examples, scores, baselines, calibration=None):
    validation = [{"step": k, "validation_metric": 0.5 + k / 10, "validation_loss": 1 / k} for k in (1, 2)]
    curves = {"steps": [{"step": k, "loss": 1 / k} for k in range(1, 9)], "validation": validation}
    results, data = results_of(task, examples, scores, baselines, calibration)
    return json.loads(json.dumps(build_report(results, data) | {"run": RUN, "curves": curves}))


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "beats", "words"),
    [
        (4.0, True, "beats the best baseline (other)"),
        (0.2, False, "WORSE than"),
        (1.6, False, "does NOT reliably beat"),
    ],
)
def test_the_verdict_is_the_paired_interval(strength, beats, words):
    task, examples, scores = made(strength=strength)
    targets, rng = OneLabel().targets(examples, 4), np.random.default_rng(5)
    poor, other = (list((rng.normal(size=(300, 4)) + k * np.eye(4)[targets])[:, None]) for k in (0, 1.5))
    found = report(task, examples, scores, {"poor": poor, "other": other})["verdict"]
    own, others = ((np.concatenate(s).argmax(1) == targets).mean() for s in (scores, other))
    assert found["baseline"] == "other"
    assert found["beats"] is beats
    assert words in found["text"]
    assert found["lead"]["value"] == pytest.approx(own - others)
    assert (found["lead"]["low"] > 0) is beats


def test_without_baselines_nothing_is_claimed():
    task, examples, scores = made()
    found = report(task, examples, scores, {})["verdict"]
    assert (found["beats"], found["text"]) == (None, "Not compared: no baseline was measured.")


def test_labels_agree_with_scikit_learn():
    task, examples, scores = made()
    targets, predicted = OneLabel().targets(examples, 4), np.concatenate(scores).argmax(1)
    precision, recall, f1, support = reference.precision_recall_fscore_support(targets, predicted)
    rows = report(task, examples, scores, {})["classes"]
    assert [row["texts"] for row in rows] == sorted(support, reverse=True)
    for row in rows:
        c = NAMES.index(row["label"])
        expected = (precision[c], recall[c], f1[c], support[c])
        assert (row["precision"], row["recall"], row["f1"], row["texts"]) == pytest.approx(expected)


def test_confusion_agrees_with_scikit_learn_and_many_classes_are_grouped():
    rng = np.random.default_rng(0)
    targets = rng.integers(15, size=900)
    predicted = np.where(rng.random(900) < 0.3, rng.integers(15, size=900), targets)
    predicted[targets == 3] = 3
    predicted[predicted == 3] = np.where(targets[predicted == 3] == 3, 3, 4)  # a class that is never mistaken
    counts = reference.confusion_matrix(targets, predicted)
    found = of.confusion(predicted, targets, NAMES)
    assert found["labels"][-1] == "3 others"
    assert "label 3" not in found["labels"]
    shown = [NAMES.index(name) for name in found["labels"][:-1]]
    grouped = np.array(found["counts"])
    np.testing.assert_array_equal(grouped[:-1, :-1], counts[np.ix_(shown, shown)])
    np.testing.assert_array_equal(grouped.sum(axis=1)[:-1], counts.sum(axis=1)[shown])
    assert grouped.sum() == 900
    off = counts - np.diag(np.diag(counts))
    assert found["pairs"][0]["count"] == off.max()
    whole = of.confusion(predicted % 4, targets % 4, NAMES[:4])
    np.testing.assert_array_equal(whole["counts"], reference.confusion_matrix(targets % 4, predicted % 4))


def test_coverage_by_counting():
    rng = np.random.default_rng(1)
    confidence, right = rng.random(200).round(2), (rng.random(200) < 0.7).astype(float)
    points = of.coverage(confidence, right)
    assert points[-1]["coverage"] == 1
    for point in points:
        kept = confidence >= point["threshold"]  # what `predict --abstain-below` labels
        assert (point["coverage"], point["accuracy"]) == pytest.approx((kept.mean(), right[kept].mean()))


def test_a_threshold_as_it_is_printed_labels_what_is_printed():
    """0.99962 shown as 1.000 would label nothing."""
    confidence = 1 - 10.0 ** -np.arange(1, 9)
    for point in of.coverage(confidence, np.ones(8)):
        assert np.mean(confidence >= float(f"{point['threshold']:.6f}")) == point["coverage"] > 0


def test_of_several_labels_the_one_that_is_doubted_most_counts():
    """A text that surely has none of them is no doubtful one."""
    proba = np.array([[0.01, 0.02], [0.9, 0.4], [0.3, 0.02]])
    assigned = AnyLabels().assigned(proba, Calibration(thresholds=(0.2, 0.5)))
    assert AnyLabels().confidence(proba, assigned).tolist() == pytest.approx([0.98, 0.6, 0.3])


def test_slices_by_counting():
    task, examples, scores = made()
    right = np.concatenate(scores).argmax(1) == OneLabel().targets(examples, 4)
    found = report(task, examples, scores, {})["slices"]
    lengths = [part for part in found if part["by"] == "length"]
    assert sum(part["texts"] for part in lengths) == 300
    assert sum(part["texts"] * part["accuracy"]["value"] for part in lengths) == pytest.approx(right.sum())
    cyrillic = next(part for part in found if part["slice"] == "cyrillic")
    # Five Cyrillic letters in every fifth text, and four Latin ones for each `long` after it.
    held = np.array([i % 5 == 0 and i % 7 < 2 for i in range(300)])
    assert cyrillic["texts"] == held.sum()
    assert cyrillic["accuracy"]["value"] == pytest.approx(right[held].mean())


def test_slices_by_the_columns_that_the_data_name():
    task, examples, scores = made()
    right = np.concatenate(scores).argmax(1) == OneLabel().targets(examples, 4)
    source = ["web" if i % 3 else "print" if i % 2 else f"rare {i}" for i in range(300)]
    examples = [dataclasses.replace(e, slices=(("source", s),)) for e, s in zip(examples, source, strict=True)]
    found = report(task, examples, scores, {}, Calibration())
    parts = [part for part in found["slices"] if part["by"] == "source"]
    assert [(p["slice"], p["texts"]) for p in parts] == [("web", 200), ("print", 50), ("50 others", 50)]
    for part, held in zip(parts, ([s == "web" for s in source], [s == "print" for s in source]), strict=False):
        accuracy = part["accuracy"]
        assert accuracy["value"] == pytest.approx(right[held].mean())
        error = np.sqrt(accuracy["value"] * (1 - accuracy["value"]) / np.sum(held))
        assert accuracy["high"] - accuracy["low"] == pytest.approx(2 * 1.96 * error, rel=0.2)
    page = render(found)
    assert all(f"<td>source</td><td>{name}</td>" in page for name in ("web", "print", "50 others"))

    alone = [dataclasses.replace(e, slices=(("id", str(i)),)) for i, e in enumerate(examples)]
    assert {part["by"] for part in of.slices(right, alone)} == {"length", "script"}  # no value has texts enough


def test_the_calibration_of_several_labels_is_over_pairs():
    task = Task(name="multi_label", label_names=("a", "b"))
    rng = np.random.default_rng(3)
    has = rng.random((300, 2)) < 0.4
    examples = [
        LabeledText(text=f"t{i}", labels=tuple(np.flatnonzero(row).tolist()), row=i) for i, row in enumerate(has)
    ]
    logits = 3 * (rng.normal(size=(300, 2)) + 2 * has - 1)
    found = report(task, examples, list(logits[:, None]), {}, Calibration(temperature=3.0, thresholds=(0.5, 0.4)))
    for name, temperature in (("before", 1.0), ("after", 3.0)):
        sure = 1 / (1 + np.exp(-logits / temperature))
        bins = found["reliability"][name]
        assert sum(b["texts"] for b in bins) == 600
        assert sum(b["texts"] * b["confidence"] for b in bins) == pytest.approx(sure.sum())
        assert sum(b["texts"] * b["accuracy"] for b in bins) == pytest.approx(has.sum())
    assert found["label_errors"]["test"]["of"] == 600
    page = render(found)
    assert "over every pair of a text and a label" in page
    assert f"{found['metrics']['test']['ece_uncalibrated']['value']:.3f}" in page


SCRIPTS = {"hello мир": "latin", "привет": "cyrillic", "新闻 abc 标题题": "cjk", "12 !": "none", "한국어": "hangul"}


@pytest.mark.parametrize(("text", "name"), SCRIPTS.items())
def test_script(text, name):
    assert of.script(text) == name


def test_the_groups_shown_are_those_that_lost_most_and_least():
    groups = [RankGroup(group=str(i), texts=("a", "b"), rows=(1, 2), clicks=(10, 10 + i), impressions=(100, 100))
              for i in range(8)]  # fmt: skip
    shown = example_groups([np.array([1.0, 0.0])] * 8, groups)
    assert [s["group"] for s in shown] == ["7", "6", "5", "3", "2", "1"]  # group 0 tells nothing
    first = {"text": "a", "row": 1, "score": 1.0, "impressions": 100, "clicks": 10, "rate": 0.1}
    assert shown[0]["titles"][0] == first


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_and_report_json_say_the_same():
    task, examples, scores = made()
    found = report(task, examples, scores, {"other": made(seed=3)[2]}, Calibration(temperature=1.3))
    text = " ".join(html.unescape(re.sub("<[^>]*>", " ", render(found))).split())
    test = found["metrics"]["test"]
    for name in ("accuracy", "macro_f1"):
        value, low, high = (f"{100 * test[name][k]:.1f}" for k in ("value", "low", "high"))
        assert f"{value} [{low}, {high}]" in text
    for name in ("ece", "log_loss"):
        assert f"{test[f'{name}_uncalibrated']['value']:.3f}" in text
        assert f"{test[name]['value']:.3f}" in text
    assert f"Temperature {1.3:.3g}" in text
    assert all(" ".join(row["text"].split()) in text for row in found["errors"])


def test_before_and_after_differ_by_the_temperature_alone():
    task, examples, scores = made()
    found = report(task, examples, scores, {}, Calibration(temperature=2.0))["reliability"]
    logits = np.concatenate(scores)
    for name, temperature in (("before", 1.0), ("after", 2.0)):
        sure = OneLabel().probabilities(logits, Calibration(temperature=temperature)).max(1)
        assert np.average(
            [b["confidence"] for b in found[name]], weights=[b["texts"] for b in found[name]]
        ) == pytest.approx(sure.mean())
        assert sum(b["texts"] for b in found[name]) == 300
