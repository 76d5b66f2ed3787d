"""Which labels are likely wrong: confident learning (Northcutt et al. 2021, arXiv:1911.00068), ranked by margin. NumPy.

Own lines instead of cleanlab, as that brings pandas along for what is thirty lines. The probabilities must come from a model
that has not learnt the text: out of fold on the training side, the run's own on the test side.

Legend of shapes: N texts, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loracle.data.examples import Task
from loracle.judge.baselines import tfidf_classifier
from loracle.judge.metrics import Array, probabilities

FOLDS = 5


def suspects(proba: Array, targets: np.ndarray) -> npt.NDArray[np.intp]:
    """Rows whose label is suspect, the worst first.

    Those that a model is sure to be of another class: at least as sure as it is on average of the texts labelled so. In the
    order of ``margins``.
    """
    usual = np.array([proba[targets == c, c].mean() if (targets == c).any() else np.inf for c in range(proba.shape[1])])
    sure = np.where(proba >= usual, proba, -1.0)
    rows = np.flatnonzero((sure.max(axis=1) >= 0) & (sure.argmax(axis=1) != targets))
    return rows[np.argsort(margins(proba, targets)[rows], kind="stable")]


def margins(proba: Array, targets: np.ndarray) -> Array:
    """Probability of the given label less that of the likeliest other one, ``[N]``: low where the label is doubtful."""
    given = np.eye(proba.shape[1], dtype=bool)[targets]
    return proba[given] - np.where(given, -1.0, proba).max(axis=1)


def out_of_fold(texts: Sequence[str], targets: np.ndarray, task: Task, *, seed: int = 0) -> Array:
    """Probabilities ``[N, C]`` of each text by a TF-IDF classifier that learnt from the other four fifths."""
    fold = np.empty(len(texts), dtype=np.intp)
    # Class by class and shuffled within: every fold has its share of each.
    fold[np.lexsort((np.random.default_rng(seed).random(len(texts)), targets))] = np.arange(len(texts)) % FOLDS
    proba = np.empty((len(texts), len(task.label_names)))
    for k in range(min(FOLDS, len(texts))):
        held, seen = (np.flatnonzero(side).tolist() for side in (fold == k, fold != k))
        logits = tfidf_classifier([texts[i] for i in seen], targets[seen], [texts[i] for i in held], task)
        proba[held] = probabilities(logits, task)
    return proba
