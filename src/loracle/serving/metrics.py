"""What ``/metrics`` shows: load, speed and errors, and how what is scored is distributed, for drift to be seen.

Of texts only counts, lengths and scores are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from loracle.evaluation import drift
from loracle.serving.queue import Batcher
from loracle.text.tokenize import Encoded

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PROBABILITIES = tuple(i / 20 for i in range(1, 21))
SCORES = (-8, -4, -2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2, 4, 8)
RECENT = 10_000  # values of which a stability index is taken, so that a change shows however long the server has run


class Seen:
    """Bins of what was served: counts of all, and of the last ``RECENT``."""

    def __init__(self, bins: int):
        self.all, self.recent, self._last = [0] * bins, [0] * bins, deque[int](maxlen=RECENT)
        self.total = 0.0

    def add(self, bins: Sequence[int], total: float = 0.0) -> None:
        """More of them, in the order in which they came; ``total`` is the sum of their values."""
        self.total += total
        for place in bins:
            if len(self._last) == RECENT:
                self.recent[self._last[0]] -= 1
            self._last.append(place)
            self.all[place] += 1
            self.recent[place] += 1


class Drift:
    """A collector of what runs saw in training and see now, in the same bins, and of how far they are apart."""

    def __init__(self, references: Mapping[str, drift.Reference], labels: Mapping[str, Sequence[str]]):
        self._labels = {run: {name: i for i, name in enumerate(labels[run])} for run in references}
        self._known = {
            run: {"tokens": r.tokens, "score": r.scores} for run, r in references.items()
        }  # what has an order, and so a histogram
        self._counts = {
            run: {"tokens": r.tokens.counts, "score": r.scores.counts} | ({"labels": r.labels} if r.labels else {})
            for run, r in references.items()
        }
        self._seen = {run: {of: Seen(len(known)) for of, known in each.items()} for run, each in self._counts.items()}

    def add(self, run: str, of: str, values: Sequence[float]) -> None:
        """Lengths or scores of texts."""
        if run in self._seen:
            self._seen[run][of].add(self._known[run][of].bins(values), sum(values))

    def add_labels(self, run: str, given: Sequence[Sequence[str]]) -> None:
        if run in self._seen:
            self._seen[run]["labels"].add([self._labels[run][name] for names in given for name in names])

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        trained = HistogramMetricFamily(
            "loracle_drift_trained", "Lengths of training texts, scores of validation texts", labels=("run", "of")
        )
        seen = HistogramMetricFamily("loracle_drift_seen", "The same of what was served", labels=("run", "of"))
        given = GaugeMetricFamily(
            "loracle_drift_trained_labels", "Labels given to validation texts", labels=("run", "label")
        )
        index = GaugeMetricFamily(
            "loracle_drift_psi",
            f"Population stability index of the last {RECENT} texts against training",
            labels=("run", "of"),
        )
        limit = GaugeMetricFamily(
            "loracle_drift_psi_limit", "What chance alone exceeds once in 1000", labels=("run", "of")
        )
        for run, each in self._counts.items():
            for of, known in self._known[run].items():
                ends = [*map(floatToGoString, known.edges), "+Inf"]
                now = self._seen[run][of]
                trained.add_metric([run, of], list(zip(ends, accumulate(known.counts), strict=True)), known.total)
                seen.add_metric([run, of], list(zip(ends, accumulate(now.all), strict=True)), now.total)
            for label, place in self._labels[run].items():
                given.add_metric([run, label], each["labels"][place])
            for of, counts in each.items():
                index.add_metric([run, of], drift.psi(self._seen[run][of].recent, counts))
                limit.add_metric([run, of], drift.limit(self._seen[run][of].recent, counts))
        yield from (trained, seen, given, index, limit)


class Metrics:
    """The figures of one server, in a registry of its own.

    Args:
        references: what runs saw in training, of those that kept it. labels: names of a run's labels.
    """

    def __init__(
        self, batcher: Batcher, references: Mapping[str, drift.Reference], labels: Mapping[str, Sequence[str]]
    ):
        self.registry = registry = CollectorRegistry()
        self.drift = Drift(references, labels)
        registry.register(self.drift)
        self.requests = Counter("loracle_requests", "Requests answered", ("route", "status"), registry=registry)
        self.latency = Histogram(
            "loracle_request_seconds",
            "Time to the answer",
            ("route", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self.texts = Counter("loracle_texts", "Texts scored", ("run",), registry=registry)
        self.tokens = Counter(
            "loracle_tokens", "Tokens of them, shared ones counted each time", ("run",), registry=registry
        )
        self.cut = Counter("loracle_texts_cut", "Texts that were longer than max_length", ("run",), registry=registry)
        self.lengths = Histogram(
            "loracle_text_tokens", "Tokens a text, template included", ("run",), buckets=LENGTHS, registry=registry
        )
        self.labels = Counter("loracle_labels", "Labels given", ("run", "label"), registry=registry)
        self.confidence = Histogram(
            "loracle_top_probability",
            "Highest probability of a text",
            ("run",),
            buckets=PROBABILITIES,
            registry=registry,
        )
        self.scores = Histogram("loracle_score", "Scores of a ranker", ("run",), buckets=SCORES, registry=registry)
        for name, about, read in (
            ("loracle_queue_texts", "Texts that wait or are at work", lambda: batcher.texts),
            ("loracle_queue_tokens", "Tokens that wait or are at work", lambda: batcher.tokens),
            ("loracle_queue_seconds", "Seconds until a request that came now would have its turn", batcher.wait),
            ("loracle_rounds", "Rounds that went through a model", lambda: batcher.rounds),
            ("loracle_rounds_failed", "Rounds that failed", lambda: batcher.failures),
        ):
            Gauge(name, about, registry=registry).set_function(read)

    def count(self, run: str, texts: Sequence[Encoded]) -> None:
        """Texts that were scored."""
        self.texts.labels(run).inc(len(texts))
        self.tokens.labels(run).inc(sum(e.tokens for e in texts))
        self.cut.labels(run).inc(sum(e.cut for e in texts))
        for e in texts:
            self.lengths.labels(run).observe(e.tokens)
        self.drift.add(run, "tokens", [e.tokens for e in texts])

    def classified(self, run: str, proba: np.ndarray, labels: Sequence[Sequence[str]]) -> None:
        tops = proba.max(axis=1).tolist()
        for top in tops:
            self.confidence.labels(run).observe(top)
        for names in labels:
            for name in names:
                self.labels.labels(run, name).inc()
        self.drift.add(run, "score", tops)
        self.drift.add_labels(run, labels)

    def ranked(self, run: str, scores: np.ndarray) -> None:
        known = scores.tolist()
        for score in known:
            self.scores.labels(run).observe(score)
        self.drift.add(run, "score", known)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
