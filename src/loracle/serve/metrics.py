"""What ``/metrics`` shows: load, speed and errors, and how what is scored is distributed, for drift to be seen.

Of texts only counts, lengths and scores are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from loracle.serve.batcher import Batcher
from loracle.text.encode import Encoded

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PROBABILITIES = tuple(i / 20 for i in range(1, 21))
SCORES = (-8, -4, -2, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 2, 4, 8)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, batcher: Batcher):
        self.registry = registry = CollectorRegistry()
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

    def classified(self, run: str, proba: np.ndarray, labels: Sequence[Sequence[str]]) -> None:
        for top in proba.max(axis=1):
            self.confidence.labels(run).observe(top)
        for names in labels:
            for name in names:
                self.labels.labels(run, name).inc()

    def ranked(self, run: str, scores: np.ndarray) -> None:
        for score in scores:
            self.scores.labels(run).observe(score)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
