"""Texts on which an export is compared with its run: of the test split, or random where the run keeps no texts."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loracle.runs import folder as run_folder
from loracle.runs.predictor import Predictor
from loracle.text.template import needs_context

RANDOM_TEXTS = 64


@dataclass(frozen=True, slots=True)
class Samples:
    """Texts, the context of each, and their rows of ``predictions.csv``; no rows where the texts are random."""

    texts: list[str]
    contexts: list[str | None]
    rows: list[dict[str, str]]


def draw_samples(run: Path, predictor: Predictor, limit: int) -> Samples:
    """At most ``limit`` texts of the run's test split, or ``RANDOM_TEXTS`` random ones."""
    rows, needed = _test_rows(run, limit), needs_context(predictor.info.config.model.template)
    if needed and rows and "context" not in rows[0]:  # a run of an earlier version, which did not keep contexts
        rows = []
    texts = [row["text"] for row in rows] or _random_texts(predictor)
    if needed and not rows:
        return Samples(texts, [*texts[1:], texts[0]], rows)
    contexts = [row.get("context", "") for row in rows] or [""] * len(texts)
    return Samples(texts, [context if context or needed else None for context in contexts], rows)


def _test_rows(run: Path, limit: int) -> list[dict[str, str]]:
    """Rows of the test split; none where the run keeps no texts (``--no-texts``, or pulled from a hub)."""
    if not run_folder.read_info(run).config.train.texts or not (run / run_folder.PREDICTIONS).exists():
        return []
    with (run / run_folder.PREDICTIONS).open(encoding="utf-8", newline="") as f:
        return [row for row, _ in zip(csv.DictReader(f), range(limit), strict=False)]


def _random_texts(predictor: Predictor) -> list[str]:
    """Texts of 0 to 47 random tokens of the model."""
    rng, tokenizer = np.random.default_rng(0), predictor.encoder.tokenizer
    drawn = (rng.integers(len(tokenizer), size=rng.integers(0, 48)) for _ in range(RANDOM_TEXTS))
    return [str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)) for ids in drawn]
