"""The embedded data are what their documentation says, and the simulated log obeys the truth that it names."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2

from loracle.data.demo import Form, Truth, bbc_headlines, form_of, simulate_clicks, write_demo

TOPICS = ("business", "entertainment", "politics", "sports", "tech")


@pytest.fixture(scope="module")
def headlines() -> list[tuple[str, str]]:
    return bbc_headlines()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def pair_accuracy(scores: np.ndarray, rates: np.ndarray) -> float:
    """Share of the pairs of a test that ``scores`` and ``rates`` (both [tests, arms]) order alike."""
    upper = np.triu_indices(scores.shape[1], 1)
    ours, theirs = (np.sign(x[:, :, None] - x[:, None, :])[:, *upper] for x in (scores, rates))
    return float(np.mean((ours * theirs + 1) / 2, where=theirs != 0))


def test_headlines(headlines: list[tuple[str, str]]) -> None:
    texts, topics = zip(*headlines, strict=True)
    assert len(set(texts)) == len(texts) == 2096
    assert {topic: topics.count(topic) for topic in TOPICS} == {
        "business": 501,
        "entertainment": 365,
        "politics": 397,
        "sports": 500,
        "tech": 333,
    }
    assert ("Ink helps drive democracy in Asia", "tech") in headlines
    assert ("Hendrix guitar fetches £100,000", "entertainment") in headlines  # UTF-8
    assert all(text == text.strip() and "\n" not in text and "\ufffd" not in text for text in texts)


@pytest.mark.parametrize(
    ("headline", "form"),
    [
        ("Microsoft releases new patches!", Form(-1, 0, 0)),
        ("US trade gap ballooned in October", Form(1, 0, 2 / 3)),
        ("Film row over Pirates 'cannibals'", Form(1, 1, 2 / 3)),
        ("'Debate needed' on donations cap", Form(-1, 1, 1 / 3)),
        ("Chinese exports rise for 'EU'", Form(1, 1, -2 / 3)),
        ("Connors' cry", Form(-1, 0, -19 / 3)),
        ("sell £4m iPods", Form(-1, 0, -17 / 3)),
    ],
)
def test_form(headline: str, form: Form) -> None:
    assert form_of(headline) == form


def test_log_odds_are_the_documented_sum() -> None:
    truth = Truth()
    headline = "Film row over Pirates 'cannibals'"
    for topic in TOPICS:
        expected = (
            truth.base + truth.topic[topic] + truth.name[topic] + truth.quote[topic] + truth.length[topic] * 2 / 3
        )
        assert truth.log_odds(headline, topic) == pytest.approx(expected)


def test_every_form_attracts_in_some_topics_and_repels_in_others() -> None:
    truth = Truth()
    for effect in (truth.name, truth.quote, truth.length):
        assert min(effect.values()) < 0 < max(effect.values())


class TestSimulation:
    def test_same_seed_same_log(self, headlines: list[tuple[str, str]]) -> None:
        texts, topics = zip(*headlines, strict=True)
        one, same, other = (simulate_clicks(texts, topics, seed, tests=9) for seed in (1, 1, 2))
        assert one.headlines == same.headlines != other.headlines
        assert (one.clicks == same.clicks).all()
        assert (one.impressions == same.impressions).all()

    def test_no_headline_twice(self, headlines: list[tuple[str, str]]) -> None:
        texts, topics = zip(*headlines, strict=True)
        log = simulate_clicks(texts, topics, 0, tests=524)
        assert len({text for test in log.headlines for text in test}) == 524 * 4
        with pytest.raises(ValueError, match="525 tests of 4 need 2100 headlines; there are 2096"):
            simulate_clicks(texts, topics, 0, tests=525)

    def test_clicks_follow_the_truth_and_impressions_are_allotted_at_random(
        self, headlines: list[tuple[str, str]]
    ) -> None:
        texts, topics = zip(*headlines, strict=True)
        log = simulate_clicks(texts, topics, 0, tests=500)
        odds = np.array([[log.truth[text] for text in test] for test in log.headlines])
        rate = 1 / (1 + np.exp(-odds))
        surprise = (log.clicks - log.impressions * rate) ** 2 / (log.impressions * rate * (1 - rate))
        balance = (log.impressions - log.impressions.mean(1, keepdims=True)) ** 2 / log.impressions.mean(
            1, keepdims=True
        )
        assert 0.001 < chi2.sf(surprise.sum(), 2000) < 0.999
        assert 0.001 < chi2.sf(balance.sum(), 1500) < 0.999
        assert 2000 < log.impressions.mean() < 5000
        assert 0.03 < log.clicks.sum() / log.impressions.sum() < 0.08

    def test_a_perfect_knower_is_good_and_length_is_not(self, headlines: list[tuple[str, str]]) -> None:
        texts, topics = zip(*headlines, strict=True)
        log = simulate_clicks(texts, topics, 0, tests=500)
        rates = log.clicks / log.impressions
        odds = np.array([[log.truth[text] for text in test] for test in log.headlines])
        lengths = np.array([[len(text) for text in test] for test in log.headlines], dtype=float)
        assert pair_accuracy(odds, rates) > 0.88
        assert 0.42 < pair_accuracy(lengths, rates) < 0.58


class TestFiles:
    def test_topics(self, tmp_path: Path, headlines: list[tuple[str, str]]) -> None:
        files = write_demo(tmp_path / "new" / "folder")
        train, test = read(files.topics_train), read(files.topics_test)
        assert len(test) == 500
        assert sorted((row["text"], row["label"]) for row in train + test) == sorted(headlines)
        shares = {topic: sum(row["label"] == topic for row in test) for topic in TOPICS}
        assert shares == {"business": 120, "entertainment": 87, "politics": 95, "sports": 119, "tech": 79}

    def test_clicks(self, tmp_path: Path) -> None:
        files = write_demo(tmp_path, train_tests=30, test_tests=10)
        train, test = read(files.clicks_train), read(files.clicks_test)
        assert (len(train), len(test)) == (120, 40)
        assert list(train[0]) == ["test_id", "headline", "impressions", "clicks"]
        assert not {row["headline"] for row in train} & {row["headline"] for row in test}
        assert not {row["test_id"] for row in train} & {row["test_id"] for row in test}
        assert len({row["test_id"] for row in train}) == 30
        assert all(0 <= int(row["clicks"]) <= int(row["impressions"]) for row in train + test)

    def test_the_truth_is_written_down(self, tmp_path: Path, headlines: list[tuple[str, str]]) -> None:
        files = write_demo(tmp_path, train_tests=3, test_tests=2)
        truth = json.loads(files.truth.read_text(encoding="utf-8"))
        topic_of = dict(headlines)
        rows = read(files.clicks_train) + read(files.clicks_test)
        assert set(truth["log_odds"]) == {row["headline"] for row in rows}
        for headline, log_odds in truth["log_odds"].items():
            t, form = topic_of[headline], form_of(headline)
            effects = truth["topic"][t], truth["name"][t] * form.name, truth["quote"][t] * form.quote
            assert math.isclose(log_odds, truth["base"] + sum(effects) + truth["length"][t] * form.length)

    def test_same_seed_same_files(self, tmp_path: Path) -> None:
        folders = [tmp_path / name for name in ("one", "two", "other")]
        for folder, seed in zip(folders, (0, 0, 1), strict=True):
            write_demo(folder, seed, train_tests=5, test_tests=5)
        for name in ("topics_train.csv", "topics_test.csv", "clicks_train.csv", "clicks_test.csv", "clicks_truth.json"):
            one, two, other = ((folder / name).read_bytes() for folder in folders)
            assert one == two != other
