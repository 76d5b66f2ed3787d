"""From examples to scores, and from scores to metrics, in the order of the examples.

Legend of shapes: n texts of an example (1, or the titles of a group), C outputs of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from loracle.evaluation.intervals import as_json
from loracle.examples import Example, texts_of
from loracle.models import scoring
from loracle.models.openvino import Int8Scorer
from loracle.models.scorer import Scorer
from loracle.tasks import Task
from loracle.tasks.base import by_example
from loracle.text.tokenize import Encoded, Encoder
from loracle.training import distributed
from loracle.training.losses import Loss

SCORES = "scores.safetensors"


def encode_examples(encoder: Encoder, examples: Sequence[Example]) -> list[list[Encoded]]:
    """The encoded texts of each example."""
    texts = [t for e in examples for t in texts_of(e)]
    contexts = [e.context for e in examples for _ in texts_of(e)]
    encoded = iter(encoder(texts, contexts))
    return [[next(encoded) for _ in texts_of(e)] for e in examples]


def encode_texts(encoder: Encoder, examples: Sequence[Example]) -> list[Encoded]:
    """``encode_examples``, flat."""
    return [e for unit in encode_examples(encoder, examples) for e in unit]


def score_examples(scorer: Scorer | Int8Scorer, encoder: Encoder, examples: Sequence[Example]) -> list[np.ndarray]:
    """Scores of each example's texts, ``float32 [n, C]`` each."""
    return by_example(scoring.score(scorer, encode_texts(encoder, examples)), examples)


def _score_together(scorer: Scorer, encoder: Encoder, examples: Sequence[Example]) -> list[np.ndarray]:
    """``score_examples`` with a part of the examples in each process; every process returns all scores."""
    if scorer.sharded:
        return distributed.on_main(lambda: score_examples(scorer, encoder, examples), along=scorer)
    world = distributed.start(scorer.device)
    own = distributed.partition(examples, world.num_processes)[world.process_index]
    scores = score_examples(scorer, encoder, [examples[i] for i in own]) if own else []
    by_place = dict(distributed.all_gather(list(zip(own, scores, strict=True))))
    return [by_place[i] for i in range(len(examples))]


def validate(scorer: Scorer, encoder: Encoder, examples: Sequence[Example], task: Task, loss: Loss) -> dict[str, float]:
    """The metric of early stopping and the loss on validation examples: ``{"metric", "loss"}``."""
    scores = _score_together(scorer, encoder, examples)
    if not all(np.isfinite(s).all() for s in scores):
        return {"metric": -np.inf, "loss": np.nan}
    summed, count = loss(examples)(torch.from_numpy(np.concatenate(scores)))
    metric = measure(scores, examples, task)[task.evaluation.headline]["value"]
    # None: nothing in the validation examples tells right from wrong, so the loss alone decides.
    return {"metric": 0.0 if metric is None else metric, "loss": float(summed) / max(count, 1e-12)}


def measure(
    scores: Sequence[np.ndarray], examples: Sequence[Any], task: Task, calibration: Any = None
) -> dict[str, Any]:
    """Metrics with intervals as plain JSON, at the calibration."""
    return as_json(task.evaluation.metrics(scores, examples, task, calibration))


def write_scores(folder: Path, scores: Sequence[np.ndarray]) -> None:
    """Write the test scores in full, for paired tests."""
    save_file({"scores": np.ascontiguousarray(np.concatenate(scores))}, folder / SCORES)


def read_scores(folder: Path, examples: Sequence[Example]) -> list[np.ndarray]:
    """Scores that ``write_scores`` wrote, by example."""
    return by_example(load_file(folder / SCORES)["scores"], examples)
