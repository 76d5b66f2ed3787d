"""Whether what is served looks like what was trained on: the population stability index of scores, lengths and labels.

PSI is the symmetric divergence of two histograms, Σ (p - q) ln(p / q). Of n texts beside m drawn alike it is about
(1/n + 1/m) times a chi-square of (bins - 1) degrees (Yurdakul and Naranjo 2020), so few texts show a high one by chance;
``limit`` says how high. Only counts are kept, no texts.

Legend of shapes: B bins, C labels.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import chdtri  # the inverse survival function of chi2, without the second that scipy.stats takes

BINS = 10  # equally filled by what was trained on
IN_A_BIN = 10  # values that each is to hold at least
CHANCE = 1e-3  # that texts as in training exceed the limit
SMOOTHED = 0.5  # added to each count, so that an empty bin is no infinity


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How values were distributed: bin i holds those above ``edges[i - 1]`` and up to ``edges[i]``; the last has no end."""

    edges: tuple[float, ...]  # [B - 1], rising
    counts: tuple[int, ...]  # [B]
    total: float  # sum of the values

    def bins(self, values: Sequence[float]) -> list[int]:
        """The bin of each value."""
        return [bisect.bisect_left(self.edges, value) for value in values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a run looked like: lengths of its training texts; scores and labels of its validation texts."""

    tokens: Histogram  # a text, template included
    scores: Histogram  # the highest probability of a text, calibrated; a ranker's score
    labels: tuple[int, ...] = ()  # [C] how often each was given; empty for rankers

    @classmethod
    def from_json(cls, known: dict[str, Any]) -> Reference:
        """What ``dataclasses.asdict`` made of it."""
        tokens, scores = (
            Histogram(edges=tuple(of["edges"]), counts=tuple(of["counts"]), total=of["total"])
            for of in (known["tokens"], known["scores"])
        )
        return cls(tokens=tokens, scores=scores, labels=tuple(known["labels"]))


def histogram(values: Iterable[float]) -> Histogram:
    """Bins that hold equally many of the values, as far as ties allow: at most ``BINS``, fewer of few values."""
    found = np.sort(np.fromiter(values, dtype=np.float64))
    count = int(np.clip(len(found) // IN_A_BIN, 1, BINS))
    edges = np.unique(np.quantile(found, np.arange(1, count) / count, method="lower")) if len(found) else np.zeros(0)
    edges = edges[edges < found[-1]] if len(found) else edges  # the last bin holds something
    counts = np.bincount(np.searchsorted(edges, found, side="left"), minlength=len(edges) + 1)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()), total=float(found.sum()))


def reference(tokens: Iterable[int], scores: Iterable[float], labels: Iterable[int] = ()) -> Reference:
    """The reference of a run.

    Args:
        tokens: length of each training text. scores: one value for each validation text. labels: ``[C]``, how often each
            label was assigned on the validation texts; empty for tasks without labels.
    """
    return Reference(tokens=histogram(tokens), scores=histogram(scores), labels=tuple(labels))


def psi(seen: Sequence[int], known: Sequence[int]) -> float:
    """Population stability index of two histograms over the same bins ``[B]``; NaN where one of them is empty."""
    if not sum(seen) or not sum(known):
        return float("nan")
    p, q = (np.asarray(counts, dtype=np.float64) + SMOOTHED for counts in (seen, known))
    p, q = p / p.sum(), q / q.sum()
    return float(((p - q) * np.log(p / q)).sum())


def limit(seen: Sequence[int], known: Sequence[int]) -> float:
    """What the index of as many texts, drawn as in training, exceeds once in ``1 / CHANCE``; NaN where that is unknown."""
    n, m = sum(seen), sum(known)
    if not n or not m or len(known) < 2:
        return float("nan")
    return float((1 / n + 1 / m) * chdtri(len(known) - 1, CHANCE))
