"""What ``/metrics`` shows: load, speed, errors, and drift of the served texts from the training data.

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
from loracle.serving.queue import RequestQueue
from loracle.text.tokenize import Encoded

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PROBABILITIES = tuple(i / 20 for i in range(1, 21))
SCORES = (-8, -4, -2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2, 4, 8)
RECENT = 10_000  # values in a stability index, so that a change shows however long the server has run


class BinCounts:
    """How many served values fell into each bin: of all values, and of the last ``RECENT``."""

    def __init__(self, bins: int):
        self.all, self.recent, self._last = [0] * bins, [0] * bins, deque[int](maxlen=RECENT)
        self.total = 0.0

    def add(self, bins: Sequence[int], total: float = 0.0) -> None:
        """Count values by their bins, in order of arrival. ``total`` is the sum of the values."""
        self.total += total
        for place in bins:
            if len(self._last) == RECENT:
                self.recent[self._last[0]] -= 1
            self._last.append(place)
            self.all[place] += 1
            self.recent[place] += 1


class DriftCollector:
    """Distributions of training and of served texts in the same bins, and their stability index.

    A feature is "tokens", "score" or "labels".
    """

    def __init__(self, references: Mapping[str, drift.Reference], labels: Mapping[str, Sequence[str]]):
        self._labels = {run: {name: i for i, name in enumerate(labels[run])} for run in references}
        self._histograms = {run: {"tokens": r.tokens, "score": r.scores} for run, r in references.items()}
        self._trained = {
            run: {"tokens": r.tokens.counts, "score": r.scores.counts} | ({"labels": r.labels} if r.labels else {})
            for run, r in references.items()
        }
        self._served = {
            run: {feature: BinCounts(len(counts)) for feature, counts in features.items()}
            for run, features in self._trained.items()
        }

    def add(self, run: str, feature: str, values: Sequence[float]) -> None:
        """Count lengths or scores of served texts."""
        if run in self._served:
            self._served[run][feature].add(self._histograms[run][feature].bins(values), sum(values))

    def add_labels(self, run: str, labels: Sequence[Sequence[str]]) -> None:
        if run in self._served:
            self._served[run]["labels"].add([self._labels[run][name] for names in labels for name in names])

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics (prometheus_client calls this)."""
        keys = ("run", "feature")
        trained = HistogramMetricFamily(
            "loracle_drift_trained", "Lengths of training texts and scores of validation texts", labels=keys
        )
        served = HistogramMetricFamily(
            "loracle_drift_served", "Lengths and scores of the served texts, in the same bins", labels=keys
        )
        trained_labels = GaugeMetricFamily(
            "loracle_drift_trained_labels", "Labels assigned to validation texts", labels=("run", "label")
        )
        index = GaugeMetricFamily(
            "loracle_drift_psi",
            f"Population stability index of the last {RECENT} texts against training",
            labels=keys,
        )
        limit = GaugeMetricFamily(
            "loracle_drift_psi_limit", "Stability index that chance alone exceeds once in 1000", labels=keys
        )
        for run, features in self._trained.items():
            for feature, histogram in self._histograms[run].items():
                ends = [*map(floatToGoString, histogram.edges), "+Inf"]
                counts = self._served[run][feature]
                key = [run, feature]
                trained.add_metric(key, list(zip(ends, accumulate(histogram.counts), strict=True)), histogram.total)
                served.add_metric(key, list(zip(ends, accumulate(counts.all), strict=True)), counts.total)
            for label, place in self._labels[run].items():
                trained_labels.add_metric([run, label], features["labels"][place])
            for feature, before in features.items():
                index.add_metric([run, feature], drift.psi(self._served[run][feature].recent, before))
                limit.add_metric([run, feature], drift.limit(self._served[run][feature].recent, before))
        yield from (trained, served, trained_labels, index, limit)


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        references: distributions in training, of the runs that have them. labels: label names of each run.
    """

    def __init__(
        self, queue: RequestQueue, references: Mapping[str, drift.Reference], labels: Mapping[str, Sequence[str]]
    ):
        self.registry = registry = CollectorRegistry()
        self.drift = DriftCollector(references, labels)
        registry.register(self.drift)
        self.requests = Counter("loracle_requests", "Answered requests", ("route", "status"), registry=registry)
        self.latency = Histogram(
            "loracle_request_seconds",
            "Time from a request to its answer",
            ("route", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self.texts = Counter("loracle_texts", "Scored texts", ("run",), registry=registry)
        self.tokens = Counter(
            "loracle_tokens",
            "Tokens of the scored texts, shared prefixes counted each time",
            ("run",),
            registry=registry,
        )
        self.truncated = Counter(
            "loracle_texts_truncated", "Texts that were longer than max_length", ("run",), registry=registry
        )
        self.lengths = Histogram(
            "loracle_text_tokens", "Tokens of a text, template included", ("run",), buckets=LENGTHS, registry=registry
        )
        self.labels = Counter("loracle_labels", "Assigned labels", ("run", "label"), registry=registry)
        self.confidence = Histogram(
            "loracle_top_probability",
            "Highest probability of a text",
            ("run",),
            buckets=PROBABILITIES,
            registry=registry,
        )
        self.scores = Histogram("loracle_score", "Scores of a ranker", ("run",), buckets=SCORES, registry=registry)
        for name, help, read in (
            ("loracle_queue_texts", "Texts that wait or are being scored", lambda: queue.texts),
            ("loracle_queue_tokens", "Tokens that wait or are being scored", lambda: queue.tokens),
            ("loracle_queue_seconds", "Expected wait of a new request in seconds", queue.expected_wait),
            ("loracle_micro_batches", "Micro-batches that were scored", lambda: queue.batches),
            ("loracle_micro_batches_failed", "Micro-batches that failed", lambda: queue.failed_batches),
        ):
            Gauge(name, help, registry=registry).set_function(read)

    def count_texts(self, run: str, texts: Sequence[Encoded]) -> None:
        self.texts.labels(run).inc(len(texts))
        self.tokens.labels(run).inc(sum(e.tokens for e in texts))
        self.truncated.labels(run).inc(sum(e.cut for e in texts))
        for e in texts:
            self.lengths.labels(run).observe(e.tokens)
        self.drift.add(run, "tokens", [e.tokens for e in texts])

    def count_labels(self, run: str, proba: np.ndarray, labels: Sequence[Sequence[str]]) -> None:
        """Count the highest probability of each text, ``proba [N, C]``, and its labels."""
        confidences = proba.max(axis=1).tolist()
        for confidence in confidences:
            self.confidence.labels(run).observe(confidence)
        for names in labels:
            for name in names:
                self.labels.labels(run, name).inc()
        self.drift.add(run, "score", confidences)
        self.drift.add_labels(run, labels)

    def count_ranking(self, run: str, scores: np.ndarray) -> None:
        """Count scores ``[N]`` of a ranker."""
        values = scores.tolist()
        for value in values:
            self.scores.labels(run).observe(value)
        self.drift.add(run, "score", values)

    def to_text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
